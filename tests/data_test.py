"""Rows, episodes, chunks: nothing shown is asked, no cut is silent, any batch at any time."""

from __future__ import annotations

import copy
import itertools
import json
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data
from hyper_t5.errors import UserError
from hyper_t5.prompts import Conditioning, OnLong, example_text, join_conditioning
from hyper_t5.taskfile import (
    Example,
    LazyRows,
    Row,
    TaskRows,
    parse_sni_task,
    read_sni_task,
    read_task_file,
    take_rows,
)
from hyper_t5.vocab import EOS_ID, ByteVocabulary, load_vocab

BYTES = ByteVocabulary()


def make_config(**fields: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.seed = 3
    config.eval.update(max_rows_per_task=5, shots=2)
    config.data.update(
        mixture="sni",
        vocab="bytes",
        extra_ids=0,
        hyper_length=160,
        input_length=24,
        target_length=12,
        tasks_per_batch=3,
        examples_per_task=4,
        chunk_length=64,
    )
    config.data.update(fields)
    return config


def format_conditioning(
    instruction: str,
    examples: list[Example],
    max_len: int,
    on_long: OnLong = "raise",
    where: str = "the task",
    layout: str = "apart",
) -> Conditioning:
    shown = [BYTES.encode(example_text(example)) for example in examples]
    ids = BYTES.encode(instruction)
    return join_conditioning(ids, shown, max_len, on_long, where, layout)


def sni_object(name: str, rows: int = 8, examples: int = 3) -> dict[str, Any]:
    return {
        "Definition": [f"Definition of {name}."],
        "Categories": [f"Kind of {name}"],
        "Positive Examples": [
            {"input": f"{name} shown {i}", "output": f"s{i}", "explanation": ""}
            for i in range(examples)
        ],
        "Instances": [
            {"id": f"{name}-row-{i}", "input": f"{name} row {i}", "output": [f"a{i}", f"b{i}"]}
            for i in range(rows)
        ],
    }


@pytest.fixture
def sni_dir(tmp_path: Path) -> Path:
    """An official-looking folder with three training tasks and one test task."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for split, names in {"train": ["task1_a", "task2_b-c", "task3_d"], "test": ["task4_e"]}.items():
        for name in names:
            (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(sni_object(name), indent=1))
        listing = tmp_path / "splits" / "default" / f"{split}_tasks.txt"
        listing.write_text("\n".join(names) + "\n")
    return tmp_path


def rows_of(name: str, rows: int = 8, examples: int = 3, **fields: Any) -> TaskRows:
    raw = sni_object(name, rows, examples)
    return TaskRows(
        name,
        fields.pop("instructions", tuple(raw["Definition"])),
        tuple((e["input"], e["output"]) for e in raw["Positive Examples"]),
        tuple(Row(r["id"], r["input"], tuple(r["output"])) for r in raw["Instances"]),
        **fields,
    )


def sampler(tasks: list[TaskRows], seed: int = 0, layout: str = "apart", **fields: Any) -> Any:
    return data.EpisodeSampler(tasks, BYTES, make_config(**fields).data, seed, layout)


def at_eos(ids: np.ndarray) -> list[np.ndarray]:
    """A padded row's parts, each of which ends in EOS, without it."""
    ids = ids[: np.count_nonzero(ids)]
    assert ids[-1] == EOS_ID
    parts = np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)[:-1]
    return [part[:-1] for part in parts]


def ended_parts(ids: np.ndarray) -> list[str]:
    return [BYTES.decode(part) for part in at_eos(ids)]


# ---------------------------------------------------------------------------- task files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("Definition"), "field Definition is missing"),
        (lambda d: d.update(Definition=[" "]), "field Definition is empty"),
        (lambda d: d.update(Definition=3), "field Definition must be text"),
        (lambda d: d.pop("Instances"), "field Instances is missing"),
        (lambda d: d.update(Instances=[]), "Instances holds no usable row"),
        (lambda d: d.update(Instances={}), "Instances must be a list, this is an object"),
        (lambda d: d["Instances"][2].pop("output"), r"Instances\[2\] lacks field output"),
        (lambda d: d["Instances"][2].pop("input"), r"Instances\[2\] lacks field input"),
        (
            lambda d: d["Instances"][2].update(output=[]),
            r"Instances\[2\]: field output is an empty",
        ),
        (lambda d: d["Instances"][2].update(output=[1]), r"Instances\[2\]: field output must be"),
        (lambda d: d["Instances"][2].update(input=None), r"\[2\]: field input must be .* null"),
        (lambda d: d["Instances"].append("x"), r"Instances\[8\] must be an object .* is text"),
        (lambda d: d["Positive Examples"][1].pop("output"), r"Positive Examples\[1\] lacks field"),
    ],
)
def test_bad_task_files_name_file_and_field(change: Any, message: str, tmp_path: Path) -> None:
    raw = sni_object("t")
    change(raw)
    path = tmp_path / "task9_bad.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=rf"task9_bad\.json(, line 1)?: .*{message}") as error:
        read_sni_task(path)
    assert "\n" not in str(error.value)


def test_broken_files_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    whole = json.dumps(sni_object("t"), indent=1)
    path.write_text(whole[: whole.index("row 3")])
    last = whole[: whole.index("row 3")].count("\n") + 1
    with pytest.raises(UserError, match=rf"task\.json, line {last}: not valid JSON"):
        read_sni_task(path)
    path.write_bytes(whole.encode().replace(b"row 3", b"row \xff"))
    with pytest.raises(UserError, match=rf"task\.json, line {last}: not UTF-8"):
        read_task_file(path)
    path.write_text("[1]")
    with pytest.raises(UserError, match="one JSON object, this is a list"):
        read_sni_task(path)
    with pytest.raises(UserError, match=r"none\.json: cannot read"):
        read_task_file(tmp_path / "none.json")


def test_a_bad_row_names_its_line(tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][5]["output"] = 7
    for text in (json.dumps(raw, indent=1), json.dumps(raw, indent=4).replace("\n", "\r\n")):
        path = tmp_path / "task.json"
        path.write_text(text, newline="")
        line = text[: text.index('"t-row-5"')].count("\n")
        with pytest.raises(UserError, match=rf"task\.json, line {line}: Instances\[5\]: .*'skip'"):
            read_sni_task(path)


def test_empty_targets_are_raised_skipped_or_kept(tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][3]["output"] = [" "]
    raw["Instances"][4]["output"] = ["a", ""]
    raw["Positive Examples"][1]["output"] = ""
    path = tmp_path / "task.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"Examples\[1\]: field output is empty;.*empty_targets"):
        read_sni_task(path)
    task = read_sni_task(path, on_empty="skip")
    assert (len(task.rows), len(task.examples)) == (6, 2)
    assert task.skipped == {"Instances, empty output": 2, "Positive Examples, empty output": 1}
    task = read_sni_task(path, on_empty="keep")
    assert (len(task.rows), task.skipped) == (8, {})


def test_an_id_given_twice_is_a_bad_row(tmp_path: Path) -> None:
    raw = sni_object("t")
    raw["Instances"][6]["id"] = raw["Instances"][2]["id"]
    path = tmp_path / "task.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"Instances\[6\]: field id is t-row-2 again"):
        read_sni_task(path)
    assert read_sni_task(path, "skip").skipped == {"Instances": 1}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read_or_told(read: Callable[[], TaskRows]) -> tuple[TaskRows | None, str]:
    """What was read, or the one line that says why not."""
    try:
        return read(), ""
    except UserError as error:
        return None, str(error)


@given(st.data())
def test_whatever_a_task_file_holds_is_a_task_or_one_line(draw: st.DataObject) -> None:
    """Any value in any place of the object: read, or told; under 'skip' no row goes uncounted."""
    raw = sni_object("t", rows=4)
    places: list[Any] = [(raw, key) for key in raw]
    for field in ("Instances", "Positive Examples"):
        places += [(raw[field], i) for i in range(len(raw[field]))]
        places += [(row, key) for row in raw[field] for key in row]
    for where, key in draw.draw(st.lists(st.sampled_from(places), max_size=3)):
        where[key] = draw.draw(JSON)
    on_empty: Any = draw.draw(st.sampled_from(["skip", "keep"]))
    given_rows = raw["Instances"]
    task, message = read_or_told(
        lambda: parse_sni_task(raw, "t", on_bad_row="skip", on_empty=on_empty)
    )
    if task is None:
        assert len(message.splitlines()) == 1
        return
    lost = sum(n for field, n in task.skipped.items() if field.startswith("Instances"))
    assert len(task.rows) + lost == len(given_rows)
    assert all(isinstance(text, str) for row in task.rows for text in (row.input, *row.outputs))


@given(st.binary(max_size=4), st.integers(0, 2000), st.booleans())
def test_damaged_task_files_are_told_in_one_line(bytes_: bytes, at: int, cut: bool) -> None:
    whole = json.dumps(sni_object("t", rows=4), indent=1).encode()
    at = min(at, len(whole))
    damaged = whole[:at] if cut else whole[:at] + bytes_ + whole[at + len(bytes_) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_bytes(damaged)
        task, message = read_or_told(lambda: read_sni_task(path))
        if task is None:
            assert message.startswith(str(path))
            assert len(message.splitlines()) == 1
        else:
            assert len(task.rows) == 4


def test_skipped_rows_are_counted(tmp_path: Path) -> None:
    raw = sni_object("t")
    del raw["Instances"][0]["output"]
    raw["Instances"][5]["input"] = 4
    raw["Positive Examples"][0] = None
    path = tmp_path / "task.json"
    path.write_text(json.dumps(raw))
    task = read_sni_task(path, on_bad_row="skip")
    assert (len(task.rows), len(task.examples)) == (6, 2)
    assert task.skipped == {"Instances": 2, "Positive Examples": 1}
    assert task.category == "Kind of t"


def test_task_file_in_both_forms(tmp_path: Path) -> None:
    path = tmp_path / "task.json"
    raw = sni_object("t", examples=1)
    for instances in (raw["Instances"], None):
        if instances is None:
            del raw["Instances"]
        path.write_text(json.dumps(raw))
        assert read_task_file(path) == ("Definition of t.", [("t shown 0", "s0")])
    path.write_text(
        json.dumps({"instruction": " Do. ", "examples": [{"input": "x", "output": "y"}]})
    )
    assert read_task_file(path) == ("Do.", [("x", "y")])
    path.write_text(json.dumps({"examples": [{"input": "x", "output": "y"}]}))
    assert read_task_file(path) == ("", [("x", "y")])
    for bad, message in [
        ({"instruction": "", "examples": []}, "both empty"),
        ({"prompt": "x"}, "neither Definition"),
        ({"instruction": 3}, "instruction must be text"),
        ({"instruction": "x", "examples": [{"input": "y"}]}, r"examples\[0\] lacks field output"),
    ]:
        path.write_text(json.dumps(bad))
        with pytest.raises(UserError, match=message):
            read_task_file(path)


def task_files_config(files: Path | str, **fields: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.data.update(mixture="task_files", task_files=str(files), vocab="bytes", **fields)
    return config


def test_task_files_are_a_mixture(tmp_path: Path) -> None:
    pairs = [{"input": f"in {i}", "output": [f"out {i}", "or"]} for i in range(5)]
    short = {"instruction": " Do. ", "examples": pairs}
    (tmp_path / "b-short.json").write_text(json.dumps(short))
    (tmp_path / "a.json").write_text(json.dumps(sni_object("a", rows=3, examples=1)))
    for split in ("train", *data.held_out_splits("task_files")):
        config = task_files_config(tmp_path)
        first, second = data.load_tasks("task_files", config.data, split, BYTES)
        assert (first.name, len(first.rows), len(first.examples)) == ("a", 3, 1)
        assert (second.name, second.instruction, second.examples) == ("b-short", "Do.", ())
        assert second.rows[1].outputs == ("out 1", "or")
        assert len(second.rows) == 5
    config = task_files_config(tmp_path / "b-*.json")
    config.stage, config.eval.max_rows_per_task = "peft", 2
    (tuned,) = data.load_peft_tasks(config, BYTES)
    assert [row.input for row in tuned.rows] == ["in 2", "in 3", "in 4"]
    # A file that changed is read again.
    short["examples"] = pairs[:3]
    (tmp_path / "b-short.json").write_text(json.dumps(short))
    assert len(data.load_peft_tasks(config, BYTES)[0].rows) == 1


def test_task_files_that_are_wrong(tmp_path: Path) -> None:
    path, other = tmp_path / "one" / "task.json", tmp_path / "two" / "task.json"
    for file in (path, other):
        file.parent.mkdir()
        file.write_text(json.dumps({"instruction": "Do.", "examples": [{"input": "x"}]}))
    wrong: list[tuple[Path | str, str]] = [
        ("", r"data\.task_files is empty"),
        (tmp_path, "no such task file"),
        (tmp_path / "*" / "task.json", "two files are named task"),
        (path, r"task\.json: examples\[0\] lacks field output"),
    ]
    for files, message in wrong:
        with pytest.raises(UserError, match=message):
            data.load_tasks("task_files", task_files_config(files).data, "test", BYTES)
    config = task_files_config(path, on_bad_row="skip")
    with pytest.raises(UserError, match="field examples holds no usable row"):
        data.load_tasks("task_files", config.data, "test", BYTES)


# ------------------------------------------------------------------------- conditioning


def test_conditioning_drops_whole_examples_last_first() -> None:
    examples = [("one", "1"), ("two", "2"), ("three", "3")]
    whole, dropped, _ = format_conditioning("Count.", examples, 1000)
    assert dropped == 0
    assert BYTES.decode(whole) == "Count." + "".join(map(example_text, examples))
    assert whole[-1] == EOS_ID
    for length in range(len(whole), 6, -1):
        ids, dropped, _ = format_conditioning("Count.", examples, length)
        assert len(ids) <= length
        assert BYTES.decode(ids) == "Count." + "".join(map(example_text, examples[: 3 - dropped]))
        one_more = examples[: 4 - dropped]
        if dropped:
            assert len(format_conditioning("Count.", one_more, 1000)[0]) > length
    with pytest.raises(UserError, match=r"T: the instruction alone is 6 tokens .* holds 6"):
        format_conditioning("Count.", examples, 6, where="T")
    cut, dropped, _ = format_conditioning("Count.", examples, 6, on_long="truncate")
    assert (BYTES.decode(cut), cut[-1], dropped) == ("Count", EOS_ID, 3)
    with pytest.raises(UserError, match="neither instruction nor example"):
        format_conditioning("", [], 100)
    with pytest.raises(UserError, match="the first example alone"):
        format_conditioning("", examples, 10)


def test_parts_end_in_an_eos_each_and_none_is_cut() -> None:
    examples = [("one", "1"), ("two", "2"), ("three", "3")]
    for instruction in ("Count.", ""):
        texts = [text for text in (instruction, *map(example_text, examples)) if text]
        sizes = [len(BYTES.encode(text)) + 1 for text in texts]
        for length in range(sum(sizes), sizes[0] - 1, -1):
            fit = int(np.sum(np.cumsum(sizes) <= length))
            ids, dropped, _ = format_conditioning(instruction, examples, length, layout="parts")
            assert ended_parts(ids) == texts[:fit]
            assert dropped == len(texts) - fit
    cut, dropped, _ = format_conditioning("Count.", examples, 6, on_long="truncate", layout="parts")
    assert (ended_parts(cut), dropped) == (["Count"], 3)
    with pytest.raises(UserError, match="the first example alone is 21 tokens"):
        format_conditioning("", examples, 21, layout="parts")


# ------------------------------------------------------------------------------ episodes


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    tasks = [rows_of(name) for name in "abcde"]
    forward, again, other = sampler(tasks), sampler(copy.deepcopy(tasks)), sampler(tasks, seed=1)
    first = [forward.batch(step) for step in range(6)]
    for step in reversed(range(6)):
        repeated = again.batch(step)
        for key, value in first[step].items():
            np.testing.assert_array_equal(value, repeated[key])
    assert any(np.any(first[0][key] != other.batch(0)[key]) for key in first[0])
    assert any(np.any(first[0][key] != first[1][key]) for key in first[0])
    one_task = [sampler(tasks[:1], seed=s, tasks_per_batch=1).batch(0)["inputs"] for s in (0, 1)]
    assert np.any(one_task[0] != one_task[1])
    stream = data.train_batches(sampler(tasks), start_step=4)
    np.testing.assert_array_equal(next(stream)["inputs"], first[4]["inputs"])
    np.testing.assert_array_equal(next(stream)["inputs"], first[5]["inputs"])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_hosts_make_parts_of_one_batch(layout: str, pack: bool) -> None:
    """The same global batch from 1, 2, 4 and 8 hosts, at any step, with samplers made anew."""
    tasks = [rows_of(f"task{i}", rows=5 + i) for i in range(11)]
    fields: Any = {"tasks_per_batch": 8, "pack": pack, "input_length": 40}
    for step in (0, 1, 7, 100_003):
        whole = sampler(tasks, layout=layout, **fields).batch(step)
        assert ("input_segments" in whole) == pack
        for hosts in (2, 4, 8):
            made = sampler(tasks, layout=layout, **fields)  # as after a restart
            parts = [made.batch(step, host, hosts) for host in range(hosts)]
            assert whole.keys() == parts[0].keys()
            for name, array in whole.items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
    with pytest.raises(UserError, match=r"tasks_per_batch=8 cannot be cut .* for 3 hosts"):
        sampler(tasks, layout=layout, **fields).batch(0, 0, 3)


def test_a_host_reads_the_rows_of_its_slots_only() -> None:
    """Rows that lie on disk are read when they are drawn, and by the host that wants them."""
    tasks = [rows_of(f"task{i}", rows=40) for i in range(8)]
    read: list[str] = []

    def lazy(task: TaskRows) -> TaskRows:
        def row(number: int) -> Row:
            read.append(task.name)
            return task.rows[number]

        return replace(task, rows=LazyRows(row, range(len(task.rows))))

    fields: Any = {"tasks_per_batch": 8, "examples_per_task": 2, "shots": (1, 1)}
    made = sampler([lazy(task) for task in tasks], **fields)
    assert not read, "rows were read at the start"
    whole = sampler(tasks, **fields).batch(5)
    part = made.batch(5, 1, 4)
    np.testing.assert_array_equal(part["inputs"], whole["inputs"][2:4])
    wanted = [tasks[i].name for i in whole["tasks"][2:4]]
    assert sorted(set(read)) == sorted(wanted)
    assert len(read) <= 2 * 4, "more rows than the two that are asked, and one or two passed over"


def test_lazy_rows_are_rows() -> None:
    rows = rows_of("a", rows=10).rows
    lazy = LazyRows(rows.__getitem__, range(10))
    assert list(lazy) == list(rows)
    assert list(lazy[2:8][1:-1]) == list(rows[3:7])
    assert lazy[-1] == rows[-1]
    with pytest.raises(IndexError):
        lazy[10]
    taken = take_rows(lazy[2:], [3, 0])
    assert isinstance(taken, LazyRows)
    assert list(taken) == [rows[5], rows[2]]
    assert take_rows(rows, [3, 0]) == (rows[3], rows[0])


def test_tasks_of_very_many_rows_draw_each_once() -> None:
    """Beyond PERMUTED places are drawn one by one: still without repetition, and repeatable."""
    rows = LazyRows(lambda i: Row(f"{i}", f"{i}", ("x",)), range(10**9))
    task = TaskRows("big", ("Say.",), (), rows)
    fields: Any = {"tasks_per_batch": 1, "examples_per_task": 50, "shots": (2, 2)}
    first, again = (sampler([task], **fields).batch(3)["inputs"][0] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({tuple(row) for row in first}) == 50


def test_batch_layout() -> None:
    batch = sampler([rows_of(name) for name in "abcd"]).batch(0)
    assert {key: value.shape for key, value in batch.items()} == {
        "tasks": (3,),
        "hyper_inputs": (3, 160),
        "inputs": (3, 4, 24),
        "targets": (3, 4, 12),
    }
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    for key in ("hyper_inputs", "inputs", "targets"):
        value = batch[key]
        for row in value.reshape(-1, value.shape[-1]):
            length = int(np.sum(row != 0))
            assert row[length - 1] == EOS_ID
            assert not row[length:].any()
    names = {BYTES.decode(row)[len("Definition of ")] for row in batch["hyper_inputs"]}
    assert len(names) == 3, "a batch repeats a task though there are enough"


@pytest.mark.parametrize("layout", data.LAYOUTS)
def test_task_ids_are_of_the_rows_in_the_same_slot(layout: str) -> None:
    rates = {"d": 2.0, "b": 1.0, "a": 1.0}
    made = sampler([rows_of(name, rate=rate) for name, rate in rates.items()], layout=layout)
    assert made.names == ("d", "b", "a")
    seen = set()
    for step in range(20):
        batch = made.batch(step)
        seen.update(batch["tasks"].tolist())
        for task, rows in zip(batch["tasks"], batch["inputs"], strict=True):
            asked = f"{made.names[task]} row "
            assert all(
                BYTES.decode(row).rpartition("\nInput: ")[2].startswith(asked) for row in rows
            )
    assert seen == {0, 1, 2}


def shown_and_asked(batch: dict[str, np.ndarray]) -> Iterator[tuple[list[str], list[str]]]:
    for hyper, inputs in zip(batch["hyper_inputs"], batch["inputs"], strict=True):
        parts = BYTES.decode(hyper).split("\nInput: ")[1:]
        yield [part.split("\nOutput: ")[0] for part in parts], [BYTES.decode(row) for row in inputs]


@pytest.mark.parametrize("examples", [0, 1, 3])
@pytest.mark.parametrize("use_instruction", [True, False])
def test_shown_is_never_asked(examples: int, use_instruction: bool) -> None:
    tasks = [rows_of("a", 2, examples), rows_of("b", 5, examples)]
    # An example with the text of a row, spaced otherwise: the same input all the same.
    same = ((" b  row 1", "x"), *tasks[1].examples)
    tasks[1] = TaskRows("b", tasks[1].instructions, same, tasks[1].rows)
    made = sampler(tasks, tasks_per_batch=2, use_instruction=use_instruction, shots=(0, 3))
    counts = set()
    for step in range(60):
        for shown, asked in shown_and_asked(made.batch(step)):
            counts.add(len(shown))
            keys = [" ".join(text.split()) for text in shown]
            assert len(set(keys)) == len(keys)
            assert not set(keys) & set(asked)
            assert use_instruction or shown
    assert counts == ({0, 1, 2, 3} if use_instruction else {1, 2, 3})
    assert made.stats["shown_examples"] > 0
    assert (made.stats["missing_examples"] > 0) == (examples < 2)


def test_shots_are_uniform_and_instruction_is_optional() -> None:
    made = sampler([rows_of("a")], tasks_per_batch=1, shots=(1, 2), use_instruction=False)
    counts = [len(shown) for step in range(400) for shown, _ in shown_and_asked(made.batch(step))]
    assert 150 < counts.count(1) < 250
    assert counts.count(1) + counts.count(2) == 400
    assert not BYTES.decode(made.batch(0)["hyper_inputs"][0]).startswith("Definition")


def test_every_reference_and_wording_is_drawn() -> None:
    made = sampler([rows_of("a", instructions=("One.", "Two."))], tasks_per_batch=1, shots=(0, 0))
    batches = [made.batch(step) for step in range(40)]
    assert {BYTES.decode(b["hyper_inputs"][0]) for b in batches} == {"One.", "Two."}
    targets = {BYTES.decode(row) for b in batches for row in b["targets"][0]}
    assert targets == {f"{letter}{i}" for letter in "ab" for i in range(8)}


def test_rates_decide_how_often_a_task_comes() -> None:
    tasks = [rows_of("a", rate=3.0), rows_of("b", rate=1.0)]
    made = sampler(tasks, tasks_per_batch=1, shots=(0, 0))
    drawn = [BYTES.decode(made.batch(s)["hyper_inputs"][0])[-2] for s in range(400)]
    assert 260 < drawn.count("a") < 340


def test_cuts_are_counted_and_keep_eos() -> None:
    made = sampler([rows_of("a")], tasks_per_batch=1, input_length=4, target_length=2)
    batch = made.batch(0)
    assert (batch["inputs"][..., -1] == EOS_ID).all()
    assert (batch["targets"][..., -1] == EOS_ID).all()
    assert made.stats["truncated_inputs"] == made.stats["truncated_targets"] == 4
    made = sampler([rows_of("a")], tasks_per_batch=1, hyper_length=50, shots=(2, 2))
    made.batch(0)
    assert (made.stats["shown_examples"], made.stats["dropped_examples"]) == (1, 1)


def test_what_cannot_be_an_episode_is_refused_at_the_start() -> None:
    with pytest.raises(UserError, match="list of training tasks is empty"):
        sampler([])
    with pytest.raises(UserError, match="list of tasks to evaluate is empty"):
        data.eval_episodes([], BYTES, make_config())
    with pytest.raises(UserError, match="leaves nothing to condition on"):
        sampler([rows_of("a")], shots=(0, 0), use_instruction=False)
    with pytest.raises(UserError, match="fewest, most"):
        sampler([rows_of("a")], shots=(2, 1))
    with pytest.raises(UserError, match="task a has no example to show"):
        sampler([rows_of("a", rows=1, examples=0)], use_instruction=False)
    with pytest.raises(UserError, match="task a has no example to show"):
        sampler([rows_of("a")], use_instruction=False, hyper_length=20)
    with pytest.raises(UserError, match=r"a: the instruction alone .* data\.hyper_length"):
        sampler([rows_of("b"), rows_of("a", instructions=("x" * 160,))])
    made = sampler([rows_of("a", instructions=("x" * 160,))], on_long_instruction="truncate")
    made.batch(0)
    assert made.stats["truncated_conditionings"] == 3


def test_concat_reads_the_same_episodes() -> None:
    tasks = [rows_of(name) for name in "abcd"]
    apart, joined = sampler(tasks), sampler(tasks, layout="concat")
    for step in range(5):
        one, other = apart.batch(step), joined.batch(step)
        assert other["hyper_inputs"].tolist() == [[EOS_ID]] * 3
        assert other["inputs"].shape == (3, 4, 160 + 24)
        np.testing.assert_array_equal(one["targets"], other["targets"])
        for hyper, inputs, whole in zip(
            one["hyper_inputs"], one["inputs"], other["inputs"], strict=True
        ):
            for row, read in zip(inputs, whole, strict=True):
                expected = f"{BYTES.decode(hyper)}\nInput: {BYTES.decode(row)}"
                assert BYTES.decode(read) == expected
    full = sampler([rows_of("a")], layout="concat", hyper_length=17, input_length=8, shots=(0, 0))
    assert (full.batch(0)["inputs"][..., -1] == EOS_ID).all()
    assert full.stats["truncated_inputs"] == 12


@pytest.mark.parametrize("use_instruction", [True, False])
def test_parts_are_the_same_episodes_with_an_eos_after_each(use_instruction: bool) -> None:
    tasks = [rows_of(name) for name in "abcd"]
    fields: dict[str, Any] = {"use_instruction": use_instruction, "shots": (0, 3)}
    apart, parts = (sampler(tasks, layout=layout, **fields) for layout in ("apart", "parts"))
    counts = set()
    for step in range(10):
        one, other = apart.batch(step), parts.batch(step)
        for key in ("tasks", "inputs", "targets"):
            np.testing.assert_array_equal(one[key], other[key])
        assert other["hyper_inputs"].shape == one["hyper_inputs"].shape
        for whole, ended in zip(one["hyper_inputs"], other["hyper_inputs"], strict=True):
            texts = ended_parts(ended)
            assert texts[0].startswith("Definition") == use_instruction
            assert all(text.startswith("\nInput: ") for text in texts[use_instruction:])
            assert "".join(texts) == BYTES.decode(whole)
            counts.add(len(texts) - use_instruction)
    assert counts == ({0, 1, 2, 3} if use_instruction else {1, 2, 3})
    assert parts.stats == apart.stats


def test_an_unknown_layout_is_a_mistake_of_ours() -> None:
    for made in (
        lambda layout: sampler([rows_of("a")], layout=layout),
        lambda layout: data.eval_episodes([rows_of("a")], BYTES, make_config(), layout),
    ):
        for layout in data.LAYOUTS:
            made(layout)
        with pytest.raises(AssertionError, match="aside"):
            made("aside")


def test_eval_episodes_are_fixed_and_apart() -> None:
    # The first example is also a row that is asked: the rows stay, another example is shown.
    task = rows_of("a")
    task = TaskRows("a", task.instructions, (("a row 1", "x"), *task.examples[:1]), task.rows, "k")
    found = data.eval_episodes([task], BYTES, make_config())[0]
    assert (found.name, found.category, found.instruction) == ("a", "k", "Definition of a.")
    assert found.ids == tuple(f"a-row-{i}" for i in range(5))
    assert found.shown == (("a shown 0", "s0"), ("a row 5", "a5"))
    assert found.references[2] == ("a2", "b2")
    assert [BYTES.decode(row) for row in found.inputs] == list(found.texts)
    assert BYTES.decode(found.hyper_ids) == "Definition of a." + "".join(
        map(example_text, found.shown)
    )
    assert found.hyper_ids.shape == (160,)
    whole = data.eval_episodes([task], BYTES, make_config(), "concat")[0]
    assert (whole.hyper_ids.tolist(), whole.inputs.shape) == ([EOS_ID], (5, 184))
    assert BYTES.decode(whole.inputs[0]) == BYTES.decode(found.hyper_ids) + "\nInput: a row 0"
    parts = data.eval_episodes([task], BYTES, make_config(), "parts")[0]
    assert ended_parts(parts.hyper_ids) == [
        "Definition of a.",
        *(example_text(example) for example in found.shown),
    ]
    np.testing.assert_array_equal(parts.inputs, found.inputs)


# ------------------------------------------------------------------------- SNI and SeqIO


def test_seqio_tasks_and_the_fast_path_have_the_same_ids(sni_dir: Path) -> None:
    import seqio

    from hyper_t5.tasks import super_ni

    config = make_config(sni_dir=str(sni_dir))
    for _ in range(2):  # registering again is no error
        assert super_ni.register(config.data, "test", BYTES) == "sni_test"
        assert super_ni.register(config.data, "train", BYTES) == "sni_train"
    assert {task.name for task in seqio.get_mixture_or_task("sni_train").tasks} == {
        "sni_task1_a",
        "sni_task2_b_c",
        "sni_task3_d",
    }
    tasks = data.load_tasks("sni", config.data, "test", BYTES)
    assert [(t.name, t.rate) for t in tasks] == [("task4_e", 1.0)]
    for hyper_length in (160, 60):  # with both examples, with one dropped
        config.data.hyper_length = hyper_length
        found = data.eval_episodes(tasks, BYTES, config)[0]
        lengths = {"hyper_inputs": hyper_length, "inputs": 24, "targets": 12}
        dataset = seqio.get_mixture_or_task("sni_task4_e").get_dataset(
            lengths, split="test", shuffle=False
        )
        rows = list(itertools.islice(dataset.as_numpy_iterator(), 5))
        for i, row in enumerate(rows):
            assert row["id"].decode() == found.ids[i]
            assert [r.decode() for r in row["references"]] == list(found.references[i])
            assert row["targets"].tolist() == [*BYTES.encode(found.references[i][0]), EOS_ID]
            for ours, theirs in ((found.hyper_ids, "hyper_inputs"), (found.inputs[i], "inputs")):
                assert ours[ours != 0].tolist() == row[theirs].tolist()
    mixed = seqio.get_mixture_or_task("sni_train").get_dataset(
        lengths, split="train", shuffle=False, num_epochs=1
    )
    assert set(next(mixed.as_numpy_iterator())) >= {"hyper_inputs", "inputs", "targets"}


def test_registering_another_folder_replaces(sni_dir: Path, tmp_path: Path) -> None:
    raw = sni_object("task4_e", rows=2)
    from hyper_t5.tasks.super_ni import register_sni_tasks

    config = make_config(sni_dir=str(sni_dir)).data
    data.load_tasks("sni", config, "test", BYTES)
    import seqio

    assert register_sni_tasks("sni", "test", {"task4_e": raw}, BYTES, config) == "sni_test"
    source = seqio.get_mixture_or_task("sni_task4_e").source
    assert len(source.task_rows().rows) == 2
    with pytest.raises(UserError, match="has no tasks"):
        register_sni_tasks("sni", "test", {}, BYTES, config)
    with pytest.raises(UserError, match="become sni_a_b"):
        register_sni_tasks("sni", "test", {"a-b": raw, "a_b": raw}, BYTES, config)


def test_max_instances_caps_rows_and_rate(sni_dir: Path) -> None:
    config = make_config(sni_dir=str(sni_dir), max_instances_per_task=5).data
    path = sni_dir / "tasks" / "task3_d.json"
    path.write_text(json.dumps(sni_object("task3_d", rows=3)))
    tasks = {task.name: task for task in data.load_tasks("sni", config, "train", BYTES)}
    assert {name: (len(t.rows), t.rate) for name, t in tasks.items()} == {
        "task1_a": (5, 5.0),
        "task2_b-c": (5, 5.0),
        "task3_d": (3, 3.0),
    }
    assert [row.id[-1] for row in tasks["task1_a"].rows] != list("01234"), "not a random choice"
    test = data.load_tasks("sni", config, "test", BYTES)[0]
    assert [row.id[-1] for row in test.rows] == list("01234")


def test_split_mistakes(sni_dir: Path) -> None:
    config = make_config(sni_dir=str(sni_dir)).data
    listing = sni_dir / "splits" / "default" / "train_tasks.txt"
    (sni_dir / "tasks" / "task3_d.json").unlink()
    with pytest.raises(UserError, match=r"train_tasks\.txt: names task3_d, .*on_missing_task"):
        data.load_tasks("sni", config, "train", BYTES)
    config.on_missing_task = "skip"
    assert len(data.load_tasks("sni", config, "train", BYTES)) == 2
    listing.write_text("task3_d\n")
    with pytest.raises(UserError, match=r"train_tasks\.txt: none of its 1 tasks"):
        data.load_tasks("sni", config, "train", BYTES)
    listing.write_text("\n")
    with pytest.raises(UserError, match=r"train_tasks\.txt: the list is empty"):
        data.load_tasks("sni", config, "train", BYTES)
    with pytest.raises(UserError, match=r"dev_tasks\.txt: no such split"):
        data.load_tasks("sni", config, "dev", BYTES)
    config.sni_dir = ""
    with pytest.raises(UserError, match=r"data\.sni_dir is empty"):
        data.load_tasks("sni", config, "train", BYTES)
    with pytest.raises(UserError, match=r"'sn' is unknown.*nearest: sni"):
        data.load_tasks("sn", config, "train", BYTES)
    config.vocab = ""
    with pytest.raises(UserError, match=r"data\.vocab is empty"):
        data.mixture_vocab(config)


def test_skipped_rows_are_printed(sni_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = sni_object("task4_e")
    del raw["Instances"][1]["output"]
    (sni_dir / "tasks" / "task4_e.json").write_text(json.dumps(raw))
    config = make_config(sni_dir=str(sni_dir), on_bad_row="skip").data
    data.load_tasks("sni", config, "test", BYTES)
    assert "sni_test: 1 bad rows of Instances skipped" in capsys.readouterr().out


# ----------------------------------------------------------------------------- stage "peft"


def peft_config(**fields: Any) -> ConfigDict:
    config = make_config(**fields)
    config.stage = "peft"
    return config


def test_peft_trains_on_the_judged_tasks_other_rows(
    sni_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sni_object("task4_e", rows=12)
    raw["Instances"][9]["input"] = " task4_e  row 0"  # judged, spaced otherwise
    (sni_dir / "tasks" / "task4_e.json").write_text(json.dumps(raw))
    config = peft_config(sni_dir=str(sni_dir))
    (whole,) = data.load_tasks("sni", config.data, "test", BYTES)
    load = data.load_tasks  # with rates by size, as some mixtures have them
    monkeypatch.setattr(
        data, "load_tasks", lambda *args: [replace(task, rate=12.0) for task in load(*args)]
    )
    for limit, places in ((0, (5, 6, 7, 8, 10, 11)), (3, (5, 6, 7)), (40, (5, 6, 7, 8, 10, 11))):
        config.data.max_instances_per_task = limit
        (task,) = data.load_peft_tasks(config, BYTES)
        assert [row.id for row in task.rows] == [f"task4_e-row-{i}" for i in places]
        assert (task.name, task.examples, task.rate) == ("task4_e", whole.examples, 1.0)
        assert config.data.max_instances_per_task == limit
    config.data.max_instances_per_task = 0
    made = data.make_sampler(config, BYTES)
    assert made.names == ("task4_e",)
    asked = {
        BYTES.decode(row)
        for step in range(20)
        for row in made.batch(step)["inputs"].reshape(-1, 24)
    }
    assert asked == {f"task4_e row {i}" for i in (5, 6, 7, 8, 10, 11)}


@pytest.mark.parametrize("limit", [0, 10])
def test_peft_never_trains_on_what_any_split_judges(sni_dir: Path, limit: int) -> None:
    for name in ("task1_a", "task2_b-c", "task3_d"):
        (sni_dir / "tasks" / f"{name}.json").write_text(json.dumps(sni_object(name, rows=30)))
    config = peft_config(sni_dir=str(sni_dir), max_instances_per_task=limit)
    config.eval.split = "train"
    judged = data.eval_episodes(data.load_judged(config, "sni", "train", BYTES), BYTES, config)
    tasks = data.load_peft_tasks(config, BYTES)
    assert [task.name for task in tasks] == [task.name for task in judged]
    for task, asked in zip(tasks, judged, strict=True):
        assert len(asked.ids) == 5
        assert len(task.rows) == (limit or 25)
        assert not {row.id for row in task.rows} & set(asked.ids)


def test_peft_on_the_embedded_suite() -> None:
    config = peft_config(vocab="", mixture="synthetic", max_instances_per_task=4)
    vocab = data.mixture_vocab(config.data)
    config.eval.max_rows_per_task = 100
    with pytest.raises(UserError, match=r"none to train on; lower eval\.max_rows_per_task=100"):
        data.load_peft_tasks(config, vocab)
    config.eval.max_rows_per_task = 90
    tasks = data.load_peft_tasks(config, vocab)
    assert {tuple(row.id for row in task.rows) for task in tasks} == {("90", "91", "92", "93")}
    assert {len(task.examples) for task in tasks} == {8}
    splits = data.held_out_splits("synthetic")
    assert data.splits_of(config) == dict.fromkeys(splits, "synthetic")
    assert len(tasks) == 48
    config.data.mixture, config.eval.mixture, config.eval.split = "sni", "synthetic", splits[1]
    made = data.make_sampler(config, vocab, "parts")
    assert made.names == tuple(task.name for task in tasks[24:])
    assert made.batch(0)["targets"].any()


def test_peft_without_rows_is_refused(sni_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft_config(sni_dir=str(sni_dir))
    for most, message in [
        (0, r"eval\.max_rows_per_task=0 judges every row"),
        (8, r"task task4_e of split test: all its 8 rows .*; lower eval\.max_rows_per_task=8"),
    ]:
        config.eval.max_rows_per_task = most
        with pytest.raises(UserError, match=message):
            data.make_sampler(config, BYTES)
    config.eval.max_rows_per_task = 5
    monkeypatch.setattr("hyper_t5.tasks.super_ni.HELD_OUT", ("test", "dev"))
    (sni_dir / "splits" / "default" / "dev_tasks.txt").write_text("task4_e\n")
    with pytest.raises(UserError, match=r"two splits of sni have a task task4_e.*eval\.split"):
        data.load_peft_tasks(config, BYTES)


# ----------------------------------------------------------------------------- speed, threads


def test_pipeline_outruns_training() -> None:
    made = sampler([rows_of(str(i), 100) for i in range(50)], tasks_per_batch=8)
    begin = time.perf_counter()
    for step in range(50):
        made.batch(step)
    # Measured 10,000 episodes/s on a quiet core; a training step wants a few hundred.
    assert 400 / (time.perf_counter() - begin) > 500


def test_prefetch_keeps_order_passes_errors_and_stops() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise UserError("the sixth")

    stream = data.prefetch(failing())
    assert list(itertools.islice(stream, 5)) == list(range(5))
    with pytest.raises(UserError, match="the sixth"):
        next(stream)
    assert list(data.prefetch(iter("abc"))) == list("abc")
    before = threading.active_count()
    stream = data.prefetch(itertools.count())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


# -------------------------------------------------------------------------- the real data


def test_real_sni_when_at_hand(shared_dir: Path, real_data: Callable[[str], Path]) -> None:
    config = make_config(
        sni_dir=str(real_data("sni")),
        on_missing_task="skip",
        empty_targets="keep",
        on_long_instruction="truncate",
        hyper_length=512,
        input_length=256,
        target_length=64,
    )
    vocab = load_vocab(str(shared_dir / "data" / "tokenizer" / "spiece.model"))
    tasks = data.load_tasks("sni", config.data, "test", vocab)
    assert len(tasks) > 40
    found = data.eval_episodes(tasks, vocab, config)
    assert all(len(task.ids) == 5 and task.hyper_ids[0] for task in found)
    made = data.EpisodeSampler(tasks, vocab, config.data, 0)
    assert made.batch(0)["inputs"].max() < vocab.size
