"""`hyper-t5 data`: the numbers are those of the batches, and each thing wrong is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data, describe, packing
from hyper_t5 import describe_show as show
from hyper_t5.errors import UserError
from hyper_t5.prompts import show_rule
from hyper_t5.taskfile import LazyRows, Row, TaskRows
from hyper_t5.vocab import EOS_ID, ByteVocabulary

BYTES = ByteVocabulary()


def make_config(**fields: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.data.update(
        mixture="sni", vocab="bytes", extra_ids=0, tasks_per_batch=3, examples_per_task=2
    )
    config.data.update(fields)
    return config


def sni_task(outputs: Sequence[str] = ("yes", "no"), **fields: Any) -> dict[str, Any]:
    """An SNI file's content with nothing wrong; its twelve rows' outputs go round."""
    made = {
        "Definition": ["Answer it."],
        "Positive Examples": [{"input": f"shown {i}", "output": f"s{i}"} for i in range(3)],
        "Instances": [
            {"id": f"r{i}", "input": f"row {i}", "output": [outputs[i % len(outputs)]]}
            for i in range(12)
        ],
    }
    return made | fields


def rows(*inputs: str, output: str = "") -> list[dict[str, Any]]:
    return [{"input": x, "output": [output or f"o{i}"]} for i, x in enumerate(inputs)]


def write_sni(folder: Path, splits: dict[str, dict[str, dict[str, Any]]]) -> str:
    (folder / "tasks").mkdir()
    (folder / "splits" / "default").mkdir(parents=True)
    for split, tasks in splits.items():
        for name, raw in tasks.items():
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(raw))
        listing = folder / "splits" / "default" / f"{split}_tasks.txt"
        listing.write_text("\n".join(tasks))
    return str(folder)


def task(name: str, found: Sequence[Row], rate: float = 1.0) -> TaskRows:
    return TaskRows(name, ("Do.",), (), found, rate=rate)


# ---------------------------------------------------------------------------------------- names


def test_names_of_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert data.find_mixture("sni") == ("sni", "train", {})
    assert data.find_mixture("sni_test") == ("sni", "test", {})
    assert data.find_mixture("synthetic_unseen_wordings") == ("synthetic", "unseen_wordings", {})
    assert data.find_mixture("extractive_qa_validation") == ("extractive_qa", "validation", {})
    module: Any = ModuleType("made_up_tasks")
    module.HELD_OUT, module.MIXTURE_NAMES = ("test",), {"t0_like": "train", "t0_like_eval": "test"}
    fields = {"data.metaicl_setting": "x"}
    module.find = lambda name: ("test", fields) if name == "made_x" else None
    monkeypatch.setitem(sys.modules, "made_up_tasks", module)
    monkeypatch.setitem(data.MIXTURES, "made", "made_up_tasks")
    assert data.find_mixture("t0_like_eval") == ("made", "test", {})
    assert data.find_mixture("made_x") == ("made", "test", fields)
    with pytest.raises(UserError, match=r"unknown mixture 'sni_tset', the nearest is 'sni_test'"):
        data.find_mixture("sni_tset")


# ----------------------------------------------------------------------------------- the report


def test_the_report_on_the_embedded_suite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = config_lib.load("configs/quickstart.py", ["data.shots=1,2"])
    report = describe.describe(config, "synthetic", tmp_path / "out", episodes=2, steps=5)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == report
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, printed.splitlines()[:-1])) <= show.WIDTH
    assert config.data.mixture == "synthetic"

    vocab = data.mixture_vocab(config.data)
    tasks = data.load_tasks("synthetic", config.data, "train", vocab)
    sampler = data.EpisodeSampler(tasks, vocab, config.data, config.seed)
    batches = [sampler.batch(step) for step in range(5)]
    assert (report["tasks"], report["rows"]) == (len(tasks), sum(len(t.rows) for t in tasks))
    for name in ("hyper_inputs", "inputs", "targets"):
        ids = np.concatenate([batch[name].ravel() for batch in batches])
        assert report["padding"][name]["share"] == pytest.approx(np.mean(ids == 0))
    longest = max(int(np.count_nonzero(b["hyper_inputs"], 1).max()) for b in batches)
    assert report["lengths"]["conditioning"]["max"] == longest
    drawn = np.concatenate([b["tasks"] for b in batches])
    assert [t["drawn_share"] for t in report["by_task"]] == pytest.approx(
        [np.mean(drawn == i) for i in range(len(tasks))]
    )
    assert report["effective_tasks"] == pytest.approx(len(tasks))

    first = report["episodes"][0]
    chosen = tasks[int(batches[0]["tasks"][0])]
    assert first["task"] == chosen.name
    assert first["hyper_inputs"].startswith(tuple(chosen.instructions))
    pairs = {(row.input + "</s>", row.outputs[0] + "</s>") for row in chosen.rows}
    assert {(e["inputs"], e["targets"]) for e in first["examples"]} <= pairs
    assert first["examples"][0]["inputs"] in printed

    # Wordings that were held out are of tasks that were trained on; compositions are not.
    overlap = {w["text"]: w["tasks"] for w in report["warnings"] if w["kind"] == "overlap"}
    assert overlap.keys() == {"also in split unseen_wordings"}
    assert len(overlap["also in split unseen_wordings"]) == 24
    assert report["compared_with"] == ["unseen_compositions", "unseen_wordings"]


def test_a_split_to_evaluate_shows_what_evaluation_shows(tmp_path: Path) -> None:
    task = sni_task()
    folder = write_sni(tmp_path, {"train": {"task1_a": task}, "test": {"task2_b": task}})
    config = make_config(sni_dir=folder, shots=(0, 0), hyper_length=200)
    config.eval.shots = 2
    for split, shown in (("train", 0), ("test", 2)):
        report = describe.look_at_mixture(config.copy_and_resolve_references(), split, 1, 1)
        assert report["episodes"][0]["hyper_inputs"].count("Output: ") == shown
    assert ("example" in report["lengths"]) == (shown > 0)


def test_skipped_rows_are_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bad = sni_task(Instances=[*rows("a", "b", "c"), {"input": "no output"}])
    config = make_config(
        sni_dir=write_sni(tmp_path, {"train": {"task1_a": bad}}), on_bad_row="skip"
    )
    report = describe.describe(config, "sni_train", steps=2)
    assert list(report["skipped"].values()) == [1]
    assert f"skipped     {next(iter(report['skipped']))} 1" in capsys.readouterr().out
    assert report["compared_with"] == []  # there is no test split in the folder


@pytest.mark.parametrize("system", ["hyper_prefix", "concat"])
def test_packed_rows_are_taken_apart(system: str) -> None:
    config = config_lib.load("configs/quickstart.py", [f"system={system}", "data.pack=True"])
    config.data.update(input_length=40, target_length=40, tasks_per_batch=4)
    report = describe.look_at_mixture(config, "unseen_wordings", 3, 4)
    vocab = data.mixture_vocab(config.data)
    tasks = data.load_tasks("synthetic", config.data, "unseen_wordings", vocab)
    layout = "concat" if system == "concat" else "apart"
    sampler = data.EpisodeSampler(tasks, vocab, config.data, config.seed, layout)
    batches = [sampler.batch(step) for step in range(4)]
    examples = sum(packing.examples_of(batch) for batch in batches)
    assert report["examples_per_row"] == pytest.approx(examples / (4 * 4 * 4))
    assert report["examples_per_row"] > 1.2
    assert report["padding"]["targets"]["real"] == sum(
        int(np.count_nonzero(batch["targets"])) for batch in batches
    )
    inputs = {row.input for task in tasks for row in task.rows}
    for episode in report["episodes"]:
        for example in episode["examples"]:
            asked = example["inputs"].removesuffix("</s>").rpartition("Input: ")[2]
            assert asked in inputs
            assert example["targets"].count("</s>") == 1


# ------------------------------------------------------------------------------------- warnings

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "one_output": ({"Instances": rows("a", "b", "c", output="yes")}, "'yes'"),
    "one_label": (
        {"Instances": [*rows(*map(str, range(30)), output="yes"), *rows("x", output="no")]},
        "'yes'",
    ),
    "empty_outputs": (
        {"Instances": [*rows("a", "b"), {"input": "c", "output": [""]}]},
        "1 of 3",
    ),
    "long_instruction": ({"Definition": ["x" * 60]}, "61"),
    "cut_inputs": ({"Instances": [*rows("x" * 40), *rows("a", "b", "c")]}, "25%"),
    "cut_targets": ({"Instances": [*rows("a", output="y" * 20), *rows("b", "c")]}, "33%"),
    "no_examples": ({"Positive Examples": []}, ""),
    "repeated_inputs": ({"Instances": rows("a", "a ", "a", "a", "b")}, "60%"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_thing_wrong_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    change, note = WRONG[kind]
    tasks = {"task1_good": sni_task(), "task2_wrong": sni_task(**change)}
    config = make_config(
        sni_dir=write_sni(tmp_path, {"train": tasks}),
        hyper_length=50,
        input_length=16,
        target_length=10,
        empty_targets="keep",
    )
    report = describe.describe(config, "sni_train", steps=2)
    found = {w["kind"]: (w["tasks"], w["notes"]) for w in report["warnings"]}
    assert found == {kind: (["task2_wrong"], [note])}
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("  ! "))
    assert line.startswith("  ! 1 task: ")


def test_a_task_without_rows_is_named_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    full = [Row(str(i), f"row {i}", (f"o{i}",)) for i in range(8)]
    tasks = [task("empty", ()), task("full", full)]
    monkeypatch.setattr(data, "load_tasks", lambda *_: tasks)
    monkeypatch.setattr(describe, "other_names", lambda *_: {"test": ["full", "other"]})
    report = describe.look_at_mixture(make_config(), "train", 1, 2)
    found = {w["kind"]: w["tasks"] for w in report["warnings"]}
    assert found == {"empty": ["empty"], "no_examples": ["full"], "overlap": ["full"]}
    assert [t["rate_share"] for t in report["by_task"]] == [0, 1]
    assert report["effective_tasks"] == pytest.approx(1)
    monkeypatch.setattr(data, "load_tasks", lambda *_: tasks[:1])
    with pytest.raises(UserError, match="none of its 1 tasks has a row"):
        describe.look_at_mixture(make_config(), "train", 1, 2)


def test_over_long_instructions_are_all_found_before_training_stops(tmp_path: Path) -> None:
    tasks = {f"task{i}_long": sni_task(Definition=["x" * 99]) for i in range(5)}
    config = make_config(sni_dir=write_sni(tmp_path, {"train": tasks}), hyper_length=50)
    with pytest.raises(UserError, match=r"data\.on_long_instruction"):
        data.make_sampler(config, BYTES)
    report = describe.look_at_mixture(config, "train", 1, 1)
    (warning,) = (w for w in report["warnings"] if w["kind"] == "long_instruction")
    assert warning["tasks"] == list(tasks)
    assert "data.on_long_instruction=raise" in warning["text"]
    (line,) = (x for x in show.lines(report, 200) if "! 5 tasks" in x)
    assert line.strip().startswith("! 5 tasks: instruction over data.hyper_length=50")


def test_task_names_need_no_rows_where_a_module_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("made_up_tasks")
    module.HELD_OUT, module.task_names = ("test",), lambda config, split: [split]
    monkeypatch.setitem(sys.modules, "made_up_tasks", module)
    monkeypatch.setitem(data.MIXTURES, "made", "made_up_tasks")
    names = describe.other_names("made", "train", make_config().data, BYTES)
    assert names == {"test": ["test"]}
    names = describe.other_names("made", "test", make_config().data, BYTES)
    assert names == {"train": ["train"]}


# -------------------------------------------------------------------------------- large tasks


def test_of_a_large_task_few_rows_are_read() -> None:
    read: list[int] = []

    def row(number: int) -> Row:
        read.append(number)
        return Row(str(number), f"row {number}", ("x" * (number % 7),))

    large = task("large", LazyRows(row, range(10**6)))
    looked = [describe.look_at_task(large, 1.0, BYTES, make_config().data) for _ in range(2)]
    first, second = read[: len(read) // 2], read[len(read) // 2 :]
    assert first == second
    assert len(first) == len(set(first)) == describe.ROWS_LOOKED_AT
    assert max(first) > 900_000
    assert min(first) < 100_000
    facts, texts = looked[0]
    assert (facts.rows, facts.rows_looked_at, facts.labels) == (10**6, len(first), 7)
    assert texts["inputs"].lengths.tolist() == [len(f"row {n}") + 1 for n in first]


def test_labels_of_a_task_in_memory_come_from_all_rows() -> None:
    # One row in a thousand: two hundred of them would miss it.
    found = [Row(str(i), f"row {i}", ("yes" if i else "no",)) for i in range(1000)]
    facts, _ = describe.look_at_task(task("t", found), 1.0, BYTES, make_config().data)
    assert (facts.labels, facts.top_label, facts.top_label_share) == (2, "yes", 0.999)


# ----------------------------------------------------------------------------- rates and lengths


def test_rates_and_effective_number() -> None:
    some = [Row("0", "x", ("y",))]
    shares = describe.shares_of([task("a", some, 3), task("b", some, 1), task("c", (), 5)])
    assert shares.tolist() == [0.75, 0.25, 0]
    assert describe.effective_number(np.full(8, 1 / 8)) == pytest.approx(8)
    assert 1 < describe.effective_number(shares) < 2


def test_lengths_are_weighted_as_tasks_are_drawn() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.integers(1, 30, 40), rng.integers(1, 5, 40)
    spelled_out = np.sort(np.repeat(values, weights))
    for share in (0.05, 0.5, 0.95, 1.0):
        expected = spelled_out[int(np.ceil(share * len(spelled_out) - 1e-9)) - 1]
        assert describe.quantile(values, weights.astype(float), share) == expected
    made = describe.spread(describe.Texts(values, weights.astype(float), values > 20), 20)
    assert made["cut"] == pytest.approx(np.mean(spelled_out > 20))
    assert (made["p50"], made["max"]) == (np.median(spelled_out), values.max())
    shares = made["histogram"]["shares"]
    assert sum(shares) == pytest.approx(1)
    assert shares[:5] == pytest.approx([np.mean(spelled_out == n) for n in range(5)])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [False, False, True]),
        # Of 12 ids two are for marks and the output has 4 or 1.
        ({"example_length": 12}, [True, False, True]),
    ],
)
def test_what_is_cut_is_what_the_sampler_cuts(fields: dict[str, Any], expected: list[bool]) -> None:
    found = [Row("0", "x" * 7, ("y" * 4,)), Row("1", "x" * 9, ("y",)), Row("2", "z" * 19, ("y",))]
    config = make_config(input_length=16, shots=(0, 0), examples_per_task=1, **fields)
    _, texts = describe.look_at_task(task("t", found), 1.0, BYTES, config.data)
    assert texts["inputs"].cut.tolist() == expected
    config.data.tasks_per_batch = 1
    for row, cut in zip(found, expected, strict=True):
        sampler = data.EpisodeSampler([task("t", [row])], BYTES, config.data, 0)
        sampler.batch(0)
        assert sampler.stats["truncated_inputs"] == cut
    assert show_rule(config.data).instruction


def test_specials_are_visible() -> None:
    ids = [*BYTES.encode("é\n"), EOS_ID, *BYTES.encode("b"), 0, 2, 260, EOS_ID]
    decoded = describe.decode(ids, ByteVocabulary(4))
    assert decoded == "é\n</s>b<pad><unk><260></s>"
    assert show.visible("é\n\x1b") == "é\\n\\x1b"
    short = show.short("a" * 300 + "b" * 300, 100)
    assert len(short) == 100
    assert short.startswith("aaa")
    assert short.endswith("bbb")


# ----------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("system", ["hyper_prefix", "concat"])
def test_the_report_on_text(system: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    documents = [{"text": f"document {i} " + "some words " * 20} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    config = make_config(text=str(path), cache_dir=str(tmp_path / "cache"), chunk_length=64)
    config.system = system
    config.data.update(hyper_length=64, input_length=24, target_length=24)
    report = describe.describe(config, out=tmp_path / "out", episodes=4, steps=3)
    assert max(map(len, capsys.readouterr().out.splitlines()[1:-1])) <= 100 + len(str(path))
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == report
    assert len(report["episodes"]) == 4  # of two batches
    assert report["tasks_per_batch"] == 3
    for episode in report["episodes"]:
        (example,) = episode["examples"]
        # With concat the text is in the inputs, and of the conditioning there is an EOS alone.
        texts = (episode["hyper_inputs"] + example["inputs"]).removeprefix("</s>")
        first, last, second = texts.removesuffix("</s>").split("</s>")
        whole = first + second + example["targets"].removesuffix("</s>") + last
        assert any(whole in document["text"] for document in documents)
    assert ("hyper_inputs" in report["lengths"]) == (system != "concat")


# --------------------------------------------------------------------------------------- errors


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, out, message in [
        ("synthetc", None, "nearest is 'synthetic'"),
        ("synthetic", tmp_path / "file", "cannot write"),
        ("sni_train", None, r"data\.sni_dir is empty"),
        ("", None, r"data\.text is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            describe.describe(make_config(), name, out)
        assert "\n" not in str(error.value)
