"""MetaICL from its own folder: which files are read, what a row is, what is refused or skipped."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hyper_t5 import config as configuration
from hyper_t5 import pipeline
from hyper_t5.data import episodes, eval_tasks, task_rows
from hyper_t5.data.task_rows import LazyRows, OnBadRow
from hyper_t5.data.templates import format_example
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.tasks import metaicl
from hyper_t5.tasks.seqio_tasks import seqio
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

BYTES = ByteVocabulary()
TYPES = {"big-a": "classification", "big_b": "free-form", "few": "multi-choice"}
SIZES = {"big-a": 40, "big_b": 30}


def make_config(folder: Path, **fields: Any) -> ConfigDict:
    config = configuration.defaults()
    config.data.update(
        {
            "mixture": "metaicl",
            "metaicl_dir": str(folder),
            "metaicl_setting": "mini",
            "use_instruction": False,
            "hyper_length": 2000,
            "input_length": 64,
            "shots": (2, 2),
            **fields,
        }
    )
    return config


def line(task: str, text: str, number: int = 0, **fields: Any) -> dict[str, Any]:
    options = [] if task == "big_b" else ["yes", "no"]
    output = f"free {number}" if task == "big_b" else options[number % 2]
    return {"task": task, "input": text, "output": output, "options": options, **fields}


def write(file: Path, lines: Iterable[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(value) + "\n" for value in lines))
    return file


def write_rows(folder: Path, task: str, part: str, count: int) -> Path:
    file = folder / "data" / task / f"{task}_{part}.jsonl"
    return write(file, [line(task, f"{task} {part} {i}", i) for i in range(count)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two whole meta-training tasks and one with k-shot files; two targets, one with all files."""
    write(tmp_path / "config" / "mini.json", [{"train": ["big-a", "big_b", "few"], "test": ["t"]}])
    for task, kind in TYPES.items():
        write(tmp_path / "config" / "tasks" / f"{task}.json", [{"task_type": kind}])
    for task, count in SIZES.items():
        write_rows(tmp_path, task, "16384_100_train", count)
        write_rows(tmp_path, task, "16384_13_train", 3)  # not the official seed: not read
    for seed in metaicl.SEEDS:
        for task in ("few", "t", "big-a"):
            write_rows(tmp_path, task, f"16_{seed}_train", 16)
            write_rows(tmp_path, task, f"16_{seed}_dev", 16)
        write_rows(tmp_path, "t", f"16_{seed}_test", 20)
    write_rows(tmp_path, "few", "4_100_train", 4)
    return tmp_path


def load(folder: Path, split: str, **fields: Any) -> dict[str, task_rows.TaskData]:
    tasks = pipeline.load_tasks("metaicl", make_config(folder, **fields).data, split, BYTES)
    return {task.name: task for task in tasks}


# ------------------------------------------------------------------------------ the mixture


def test_train_has_all_rows_of_each_task(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = load(folder, "train")
    assert {name: task.rate for name, task in tasks.items()} == {**SIZES, "few": 80.0}
    assert {name: task.category for name, task in tasks.items()} == TYPES
    for task in tasks.values():
        assert isinstance(task.rows, LazyRows)
        assert task.instructions == ("",)
        assert task.examples == ()
        numbers = range(1, len(task.rows) + 1)
        assert [row.id for row in task.rows] == [f"{task.name}-{i}" for i in numbers]
    rows = tasks["big-a"].rows
    assert [row.input for row in rows] == [f"big-a 16384_100_train {i}" for i in range(40)]
    assert rows[3].outputs == ("no",)
    assert rows[3].options == ("yes", "no")
    assert tasks["big_b"].rows[7].outputs == ("free 7",)
    assert tasks["big_b"].rows[7].options == ()
    # The largest k, every seed of it in the order of numbers, and no dev file.
    starts = [row.input for row in tasks["few"].rows][::16]
    assert starts == [f"few 16_{seed}_train 0" for seed in (13, 21, 42, 87, 100)]
    assert "1 of 3 tasks have no 16384 file and are read from their k-shot files: few\n" in (
        capsys.readouterr().out
    )


def test_a_held_out_split_shows_its_own_seed(folder: Path) -> None:
    assert pipeline.held_out_splits("metaicl") == metaicl.HELD_OUT
    for seed in metaicl.SEEDS:
        task = load(folder, f"test_{seed}")["t"]
        assert task.examples == tuple(
            (f"t 16_{seed}_train {i}", ["yes", "no"][i % 2]) for i in range(16)
        )
        assert [row.input for row in task.rows] == [f"t 16_{seed}_test {i}" for i in range(20)]
        assert task.category == ""  # nothing says it
    # The official code asks seed 100's rows whatever the demonstrations' seed.
    (folder / "data" / "t" / "t_16_13_test.jsonl").unlink()
    task = load(folder, "test_13")["t"]
    assert task.examples[0][0] == "t 16_13_train 0"
    assert task.rows[0].input == "t 16_100_test 0"
    (folder / "data" / "t" / "t_16_100_test.jsonl").unlink()
    with pytest.raises(
        UserError, match=r"none of the 1 tasks .* missing is data/t/t_16_100_test\.jsonl"
    ):
        load(folder, "test_13")


def test_two_settings_share_tasks(folder: Path) -> None:
    write(folder / "config" / "other.json", [{"train": ["big_b", "t"], "test": ["t"]}])
    names = {}
    for setting in ("mini", "other", "mini"):
        section = make_config(folder, metaicl_setting=setting).data
        name = tiny_runs.register("metaicl", section, "train", BYTES)
        names[name] = {task.name for task in seqio.get_mixture_or_task(name).tasks}
    assert names == {
        "metaicl_mini_train": {
            "metaicl_big_a_16384_100_train",
            "metaicl_big_b_16384_100_train",
            "metaicl_few_k_train",
        },
        "metaicl_other_train": {"metaicl_big_b_16384_100_train", "metaicl_t_k_train"},
    }
    assert len(load(folder, "train", metaicl_setting="other")["big_b"].rows) == 30
    write(folder / "config" / "clash.json", [{"train": ["big_b", "big-b"], "test": ["t"]}])
    write_rows(folder, "big-b", "16384_100_train", 2)
    with pytest.raises(UserError, match="both become metaicl_big_b_16384_100_train"):
        load(folder, "train", metaicl_setting="clash")


def test_find() -> None:
    assert metaicl.parse_name("metaicl_hr_to_lr_train") == (
        "train",
        {"data.metaicl_setting": "hr_to_lr"},
    )
    assert metaicl.parse_name("metaicl_qa_to_qa_test_13") == (
        "test_13",
        {"data.metaicl_setting": "qa_to_qa"},
    )
    for name in ("sni_train", "metaicl_train", "metaicl_hr_to_lr_test_14", "metaicl_hr_to_lr_dev"):
        assert metaicl.parse_name(name) is None


def test_max_instances(folder: Path) -> None:
    tasks = load(folder, "train", max_instances_per_task=5)
    assert {name: task.rate for name, task in tasks.items()} == dict.fromkeys(TYPES, 5.0)
    numbers = [int(row.id.rpartition("-")[2]) for row in tasks["big-a"].rows]
    assert numbers == sorted(numbers) != [1, 2, 3, 4, 5]
    test_task = load(folder, "test_42", max_instances_per_task=5)["t"]
    assert [row.id for row in test_task.rows] == [f"t-{i}" for i in range(1, 6)]
    assert len(test_task.examples) == 16


def test_seqio_tasks_and_the_fast_path_have_the_same_ids(folder: Path) -> None:
    config = make_config(folder)
    config.eval.shots, config.data.shots = 16, (16, 16)
    assert tiny_runs.register("metaicl", config.data, "test_21", BYTES) == "metaicl_mini_test_21"
    (task,) = pipeline.load_tasks("metaicl", config.data, "test_21", BYTES)
    [eval_task] = eval_tasks.build_eval_tasks([task], BYTES, config)
    assert eval_task.shown == task.examples
    lengths = {"hyper_inputs": 2000, "inputs": 64, "targets": 8}
    (name,) = (task.name for task in seqio.MixtureRegistry.get("metaicl_mini_test_21").tasks)
    rows = seqio.TaskRegistry.get(name).get_dataset(lengths, "test_21", shuffle=False)
    for i, row in enumerate(rows.as_numpy_iterator()):
        for name, ids in (("hyper_inputs", eval_task.hyper_ids), ("inputs", eval_task.inputs[i])):
            assert row[name].tolist() == ids[ids > 0].tolist()
        assert row["id"].decode() == eval_task.ids[i]
        assert BYTES.decode(row["targets"]) == row["references"][0].decode() == ["yes", "no"][i % 2]
    assert i == 19
    assert BYTES.decode(row["hyper_inputs"]) == "".join(map(format_example, task.examples))
    train = seqio.get_mixture_or_task(tiny_runs.register("metaicl", config.data, "train", BYTES))
    first = next(train.get_dataset(lengths, "train", shuffle=False).as_numpy_iterator())
    shown = BYTES.decode(first["hyper_inputs"])  # drawn from the other rows
    assert shown.count("\nInput: ") == 16
    assert f"Input: {BYTES.decode(first['inputs'])}\n" not in shown


def test_episodes(folder: Path) -> None:
    config = make_config(folder)
    tasks = pipeline.load_tasks("metaicl", config.data, "train", BYTES)
    sampler = episodes.EpisodeSampler(tasks, BYTES, config.data, seed=0)
    for step in range(4):
        batch = sampler.batch(step)
        for index, hyper, inputs in zip(
            batch["tasks"], batch["hyper_inputs"], batch["inputs"], strict=True
        ):
            shown = [part.split("\n")[0] for part in BYTES.decode(hyper).split("\nInput: ")[1:]]
            queries = [BYTES.decode(row) for row in inputs]
            assert len(shown) == 2
            assert all(text.startswith(f"{sampler.names[index]} ") for text in (*shown, *queries))
            assert not set(shown) & set(queries)


# ------------------------------------------------------------------------------- invalid input


def test_mistakes_in_the_config(folder: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"metaicl_dir": ""}, "data.metaicl_dir is empty"),
        ({"metaicl_dir": str(folder / "data")}, "data/config: no such folder, or no setting"),
        (
            {"metaicl_setting": "hr"},
            "metaicl_setting='hr' is not in .*/config; the settings there are mini$",
        ),
        ({"metaicl_setting": "tasks/few"}, "metaicl_setting='tasks/few' is not in"),
        ({"use_instruction": True}, "use_instruction=True needs an instruction.*'pos_16'"),
        ({"variant": "def_pos_2"}, "variant='def_pos_2' needs an instruction"),
    ]
    for fields, message in cases:
        with pytest.raises(UserError, match=message):
            load(folder, "train", **fields)
    with pytest.raises(UserError, match="split 'test' is unknown; the splits are train, test_100,"):
        load(folder, "test")
    # A variant says what is shown in place of use_instruction.
    assert load(folder, "test_100", use_instruction=True, variant="pos_16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", r"mini\.json, line 1: not valid JSON"),
        ('{"test": ["t"]}', r"mini\.json: field train must be a list"),
        ('{"train": ["a", 3]}', r"mini\.json: field train must be a list"),
        ('{"train": []}', r"mini\.json: field train is empty"),
        ('{"train": ["few", "few"]}', r"mini\.json: field train names few twice"),
    ],
)
def test_mistakes_in_a_setting(folder: Path, content: str, message: str) -> None:
    (folder / "config" / "mini.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load(folder, "train")


def test_missing_tasks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "data" / "big-a" / "big-a_16384_100_train.jsonl").unlink()
    for file in (folder / "data" / "big-a").iterdir():
        file.unlink()
    (folder / "data" / "big_b" / "big_b_16384_100_train.jsonl").unlink()
    (folder / "data" / "big_b" / "big_b_16384_13_train.jsonl").unlink()
    whole = r"big-a_16384_100_train\.jsonl: no such file, nor those of 1 more tasks; add it,"
    with pytest.raises(UserError, match=whole):
        load(folder, "train")
    assert list(load(folder, "train", on_missing_task="skip")) == ["few"]
    assert "skips 2 of 3 tasks of train, without files" in capsys.readouterr().out
    (folder / "data" / "t" / "t_16_42_train.jsonl").unlink()
    with pytest.raises(UserError, match="none of the 1 tasks of test_42 has its files"):
        load(folder, "test_42", on_missing_task="skip")


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"task_type": 3}', "field task_type must be text"), ("{", "line 1: not valid JSON")],
)
def test_mistakes_in_the_config_of_a_task(folder: Path, content: str, message: str) -> None:
    (folder / "config" / "tasks" / "few.json").write_text(content)
    with pytest.raises(UserError, match=rf"few\.json.* {message}"):
        load(folder, "train")


def test_a_task_of_train_and_test_is_printed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "config" / "mini.json", [{"train": ["big-a", "t"], "test": ["t"]}])
    for split in ("train", "test_13"):
        assert "t" in load(folder, split)
        assert "mini.json: t is a task of train and of test" in capsys.readouterr().out


BAD_LINES = [
    (b'{"task": "t", "input": "a', "JSON", r"not valid JSON"),
    (b'{"task": "t", "input": "\xff", "output": "b", "options": []}', "JSON", "not UTF-8"),
    (b'{"task": "t", "input": "\\ud800", "output": "", "options": []}', "JSON", "half a surrogate"),
    (b"[1]", "JSON", "must be a JSON object"),
    (b"[" * 100_000, "JSON", "not valid JSON"),
    (b'{"task": ' + b"1" * 5000 + b"}", "JSON", "not valid JSON"),
    (b'{"input": "a", "output": "b", "options": []}', "task", "lacks field task"),
    (b'{"task": "t", "output": "b", "options": []}', "input", "lacks field input"),
    (b'{"task": "t", "input": "a", "options": []}', "output", "lacks field output"),
    (b'{"task": "t", "input": "a", "output": "b"}', "options", "lacks field options"),
    (b'{"task": "t", "input": 1, "output": "b", "options": []}', "input", "input must be text"),
    (
        b'{"task": "t", "input": "a", "output": ["b"], "options": []}',
        "output",
        "field output must be text",
    ),
    (
        b'{"task": "t", "input": "a", "output": "b", "options": "b"}',
        "options",
        "must be a list of texts",
    ),
    (
        b'{"task": "t", "input": "a", "output": "b", "options": ["b", null]}',
        "options",
        "must be a list of texts",
    ),
    (
        b'{"task": "t", "input": "a", "output": "b", "options": ["c"]}',
        "options",
        "options lacks the output 'b'",
    ),
    (
        b'{"task": "s", "input": "a", "output": "b", "options": []}',
        "task",
        "field task is 's', not t",
    ),
]


@pytest.mark.parametrize(("bad", "field", "message"), BAD_LINES)
def test_bad_lines(
    folder: Path, bad: bytes, field: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "data" / "t" / "t_16_100_test.jsonl"
    good = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*good[:2], b"\n", bad + b"\n", *good[2:]]))
    with pytest.raises(
        UserError, match=rf"t_16_100_test\.jsonl, line 4: .*{message}.*on_bad_row='skip'"
    ) as error:
        load(folder, "test_100")
    assert len(str(error.value).splitlines()) == 1
    task = load(folder, "test_100", on_bad_row="skip")["t"]
    assert [row.id for row in task.rows] == [f"t-{i}" for i in range(1, 23) if i not in (3, 4)]
    assert task.rows[2].input == "t 16_100_test 2"
    assert task.skipped == {field: 1}
    assert f"metaicl_mini_test_100: 1 bad rows of {field} skipped" in capsys.readouterr().out


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "data" / "big-a" / "big-a_16384_100_train.jsonl"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"line 40: .*the file ends here, is it complete\?"):
        load(folder, "train")


def test_empty_targets(folder: Path) -> None:
    file = folder / "data" / "big_b" / "big_b_16384_100_train.jsonl"
    rows = [line("big_b", f"input {i}", i) for i in range(4)]
    write(file, [rows[0], {**rows[1], "output": " "}, *rows[2:]])
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: field output is empty.*'keep'"):
        load(folder, "train", on_bad_row="skip")
    skipped = load(folder, "train", empty_targets="skip")["big_b"]
    assert [row.id for row in skipped.rows] == ["big_b-1", "big_b-3", "big_b-4"]
    assert skipped.skipped == {"empty output": 1}
    kept = load(folder, "train", empty_targets="keep")["big_b"]
    assert kept.rows[1].outputs == (" ",)
    assert kept.skipped == {}


@pytest.mark.parametrize("count", [0, 15, 17])
def test_sixteen_demonstrations(
    folder: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(folder, "t", "16_87_train", count)
    with pytest.raises(UserError, match=rf"t_16_87_train\.jsonl: holds {count} demonst.* not 16"):
        load(folder, "test_87")
    if count:
        assert len(load(folder, "test_87", on_bad_row="skip")["t"].examples) == count
        assert f"holds {count} demonstrations and not 16" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="holds 0 demonstrations"):
            load(folder, "test_87", on_bad_row="skip")


def test_a_bad_demonstration_is_counted(folder: Path) -> None:
    file = write_rows(folder, "t", "16_87_train", 15)
    with open(file, "a") as lines:
        lines.write('{"task": "t", "output": "yes", "options": []}\n')
    with pytest.raises(UserError, match=r"t_16_87_train\.jsonl, line 16: lacks field input"):
        load(folder, "test_87")
    task = load(folder, "test_87", on_bad_row="skip")["t"]
    assert (len(task.examples), len(task.rows), task.skipped) == (15, 20, {"input": 1})


def test_no_usable_row(folder: Path) -> None:
    (folder / "data" / "t" / "t_16_100_test.jsonl").write_bytes(b"x\n\n")
    with pytest.raises(UserError, match=r"t_16_100_test\.jsonl: holds no usable row"):
        load(folder, "test_100", on_bad_row="skip")


def test_equal_rows_are_legal(folder: Path) -> None:
    file = folder / "data" / "t" / "t_16_100_test.jsonl"
    write(file, [line("t", "the same")] * 3)
    assert [row.id for row in load(folder, "test_100")["t"].rows] == ["t-1", "t-2", "t-3"]


def test_a_file_that_changes_meanwhile(folder: Path) -> None:
    rows = load(folder, "train")["big-a"].rows
    assert rows[0].input == "big-a 16384_100_train 0"
    file = folder / "data" / "big-a" / "big-a_16384_100_train.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b" " + whole)
    with pytest.raises(UserError, match=r"100_train\.jsonl: has changed since this run began"):
        rows[0]
    file.unlink()
    with pytest.raises(UserError, match=r"100_train\.jsonl: cannot be read \(No such file"):
        rows[0]


# ------------------------------------------------------------------------------ noise


ON_BAD_ROW: tuple[OnBadRow, ...] = ("raise", "skip")


def read_all(file: Path) -> tuple[int, int]:
    """Return the numbers of rows and of skipped lines of a file of task t."""
    files = metaicl.Files("x", (file,), None, file.with_name("none.json"))
    with_content = sum(bool(row.strip()) for row in file.read_bytes().split(b"\n"))
    for on_bad_row in ON_BAD_ROW:
        try:
            task = metaicl.read_task("t", files, on_bad_row, "skip")
        except UserError as error:
            message = str(error)
            kept, skipped = 0, with_content
        else:
            message = ""
            kept, skipped = len(task.rows), sum(task.skipped.values())
            assert all(row.outputs[0].strip() for row in task.rows)
        assert len(message.splitlines()) <= 1
        assert not message or on_bad_row == "raise" or "no usable row" in message
    assert kept + skipped == with_content
    return kept, skipped


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("t"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
texts = st.sampled_from(["t", "a", "", " ", "\u2028", "\x00"])
rows = st.fixed_dictionaries(
    {},
    optional={
        "task": st.just("t") | values,
        "input": texts | values,
        "output": texts | values,
        "options": st.lists(texts, max_size=3) | values,
    },
)


@settings(max_examples=100)
@given(st.lists(rows.map(lambda row: json.dumps(row).encode()) | st.binary(max_size=30)))
def test_any_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    file = tmp_path_factory.mktemp("noise") / "t.jsonl"
    file.write_bytes(b"\n".join(lines))
    read_all(file)


def test_cut_and_flipped_files(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [line("t", f"row {i} é", i) for i in range(6)])
    whole = file.read_bytes()
    assert read_all(file) == (6, 0)
    for end in range(0, len(whole), 3):
        file.write_bytes(whole[:end])
        lines = whole[:end].count(b"\n")
        # The last newline may go: a line without one is a line.
        assert read_all(file)[0] == lines + (whole[end : end + 1] == b"\n")
    rng = random.Random(0)
    for _ in range(300):
        noisy = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            noisy[rng.randrange(len(whole))] = rng.randrange(256)
        file.write_bytes(noisy)
        read_all(file)


# ------------------------------------------------------------------------------ the real data

# Tasks in the reference data, of the official lists: train (and of these with whole files), test.
REAL = {
    "hr_to_lr": (59, 59, 26),
    "class_to_class": (43, 20, 16),
    "non_class_to_class": (35, 18, 16),
    "qa_to_qa": (21, 14, 13),
    "non_qa_to_qa": (33, 33, 13),
    "non_nli_to_nli": (55, 24, 8),
    "non_paraphrase_to_paraphrase": (59, 26, 3),
}


def test_real_settings_when_at_hand(real_data: Callable[[str], Path]) -> None:
    folder = real_data("metaicl")
    for setting, (train, whole, test) in REAL.items():
        how = {"metaicl_setting": setting, "on_missing_task": "skip"}
        tasks = load(folder, "train", **how)
        assert len(tasks) == train
        listing = folder / "config" / f"{setting}.json"
        known = set(json.loads(listing.read_text())["train"])
        assert set(tasks) <= known
        mixture = seqio.MixtureRegistry.get(f"metaicl_{setting}_train")
        names = [task.name for task in mixture.tasks]
        assert sum(name.endswith("16384_100_train") for name in names) == whole
        for split in metaicl.HELD_OUT if setting == "hr_to_lr" else ("test_13",):
            held_out = load(folder, split, **how)
            assert len(held_out) == test
            # The official lists have sick on both sides of this one.
            assert set(held_out) & known == ({"sick"} if setting == "non_nli_to_nli" else set())
            assert {len(task.examples) for task in held_out.values()} == {16}
            for task in held_out.values():
                # The official code's own check of its target tasks.
                kinds = {row.options for row in task.rows}
                assert task.category == "multi-choice" or len(kinds) == 1
                assert all(len(options) >= 2 for options in kinds)
    for setting in ("hr_to_lr_inst", "hr_to_lr_inst_all"):
        with pytest.raises(UserError, match=r"none of the \d+ tasks of train has its files"):
            load(folder, "train", metaicl_setting=setting, on_missing_task="skip")
    file = folder / "data" / "superglue-multirc" / "superglue-multirc_16_21_train.jsonl"
    files = metaicl.Files("x", (file,), file, file)
    with pytest.raises(UserError, match="holds 15 demonstrations"):
        metaicl.read_task("superglue-multirc", files)
