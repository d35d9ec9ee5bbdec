"""`hyper-t5 data`: its numbers are those of the batches, and each defect of a task is named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline
from hyper_t5.data import batch as batch_lib
from hyper_t5.data.batch import CONCAT, SEPARATE
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import LazyRows, TaskData, TaskRow
from hyper_t5.data.vocab import EOS_ID, ByteVocabulary
from hyper_t5.tools import inspect_data, inspect_report
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import BYTES, make_config, sni_object, task_data, write_sni


def rows(*inputs: str, output: str = "") -> list[dict[str, Any]]:
    return [{"input": x, "output": [output or f"o{i}"]} for i, x in enumerate(inputs)]


def sni_config(folder: Path, tasks: dict[str, Any], **fields: Any) -> ConfigDict:
    """Return a config of training tasks, {name: fields of the task's file}."""
    objects = {name: sni_object(name, rows=12) | content for name, content in tasks.items()}
    return make_config(sni_dir=str(write_sni(folder / "sni", {"train": objects})), **fields)


def text_rows(texts: Sequence[tuple[str, str]]) -> tuple[TaskRow, ...]:
    return tuple(TaskRow(str(i), x, (y,)) for i, (x, y) in enumerate(texts))


def stats_of(task: TaskData, **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return inspect_data.task_stats(task, 1.0, BYTES, make_config(**fields).data)


# ------------------------------------------------------------------------------- the report


def test_the_report_has_the_numbers_of_the_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_lib.load("configs/quickstart.py", ["data.shots=1,2"])
    report = inspect_data.describe(config, "synthetic", tmp_path / "out", episodes=2, steps=5)
    printed = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == report
    assert max(map(len, printed.splitlines()[:-1])) <= inspect_report.WIDTH
    assert config.data.mixture == "synthetic"

    vocab = pipeline.mixture_vocab(config.data)
    tasks = pipeline.load_tasks("synthetic", config.data, "train", vocab)
    sampler = EpisodeSampler(tasks, vocab, config.data, config.seed)
    batches = [sampler.batch(step) for step in range(5)]
    assert (report["tasks"], report["rows"]) == (len(tasks), sum(len(t.rows) for t in tasks))
    for name in batch_lib.IDS:
        ids = np.concatenate([batch[name].ravel() for batch in batches])
        assert report["padding"][name]["share"] == pytest.approx(np.mean(ids == 0))
    longest = max(int(np.count_nonzero(b["hyper_inputs"], 1).max()) for b in batches)
    assert report["lengths"]["conditioning"]["max"] == longest
    drawn = np.concatenate([b["tasks"] for b in batches])
    assert [t["drawn_share"] for t in report["by_task"]] == pytest.approx(
        [np.mean(drawn == i) for i in range(len(tasks))]
    )
    assert report["effective_tasks"] == pytest.approx(len(tasks))

    first, task = report["episodes"][0], tasks[int(batches[0]["tasks"][0])]
    assert first["task"] == task.name
    assert first["hyper_inputs"].startswith(tuple(task.instructions))
    pairs = {(row.input + "</s>", row.outputs[0] + "</s>") for row in task.rows}
    assert {(e["inputs"], e["targets"]) for e in first["examples"]} <= pairs
    assert first["examples"][0]["inputs"] in printed

    # Held-out wordings are of the training tasks; held-out compositions are other tasks.
    overlap = {w["text"]: w["tasks"] for w in report["warnings"] if w["kind"] == "overlap"}
    assert {text: len(names) for text, names in overlap.items()} == {
        "also in split unseen_wordings": 24
    }
    assert report["compared_with"] == ["unseen_compositions", "unseen_wordings"]


def test_a_held_out_split_shows_what_evaluation_shows(tmp_path: Path) -> None:
    splits = {"train": {"task1_a": sni_object("a")}, "test": {"task2_b": sni_object("b")}}
    config = make_config(sni_dir=str(write_sni(tmp_path / "sni", splits)), shots=(0, 0))
    for split, shown in (("train", 0), ("test", config.eval.shots)):
        report = inspect_data.mixture_report(config.copy_and_resolve_references(), split, 1, 1)
        assert report["episodes"][0]["hyper_inputs"].count("Output: ") == shown
        assert ("example" in report["lengths"]) == (shown > 0)


def test_skipped_rows_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    invalid = {"Instances": [*rows("a", "b", "c"), {"input": "no output"}]}
    config = sni_config(tmp_path, {"task1_a": invalid}, on_bad_row="skip")
    report = inspect_data.describe(config, "sni_train", steps=2)
    [(field, count)] = report["skipped"].items()
    assert count == 1
    assert f"skipped     {field} 1" in capsys.readouterr().out
    assert report["compared_with"] == []  # the folder has no test split


@pytest.mark.parametrize("system", ["hyper_prefix", "concat"])
def test_packed_rows_are_divided_into_examples(system: str) -> None:
    config = config_lib.load("configs/quickstart.py", [f"system={system}", "data.pack=True"])
    config.data.update(input_length=40, target_length=40, tasks_per_batch=4)
    report = inspect_data.mixture_report(config, "unseen_wordings", 3, 4)
    vocab = pipeline.mixture_vocab(config.data)
    tasks = pipeline.load_tasks("synthetic", config.data, "unseen_wordings", vocab)
    layout = CONCAT if system == "concat" else SEPARATE
    sampler = EpisodeSampler(tasks, vocab, config.data, config.seed, layout)
    batches = [sampler.batch(step) for step in range(4)]
    examples = sum(batch_lib.example_count(batch) for batch in batches)
    assert report["examples_per_row"] == pytest.approx(examples / (4 * 4 * 4))
    assert report["examples_per_row"] > 1.2
    inputs = {row.input for task in tasks for row in task.rows}
    for episode in report["episodes"]:
        for example in episode["examples"]:
            query = example["inputs"].removesuffix("</s>").rpartition("Input: ")[2]
            assert query in inputs
            assert example["targets"].count("</s>") == 1
    if system == "concat":
        longest = max(len(e["inputs"]) for b in batches for e in inspect_data.examples_of(b, 0))
        assert report["lengths"]["text and input"]["max"] >= longest


@pytest.mark.parametrize("system", ["hyper_prefix", "concat"])
def test_the_report_on_text(
    system: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    documents = [{"text": f"document {i} " + "some words " * 20} for i in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, documents)))
    config = make_config(text=str(path), cache_dir=str(tmp_path / "cache"), chunk_length=64)
    config.system = system
    config.data.update(hyper_length=64, input_length=24, target_length=24)
    report = inspect_data.describe(config, out=tmp_path / "out", episodes=4, steps=3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[1:-1])) <= inspect_report.WIDTH + len(str(path))
    assert json.loads((tmp_path / "out" / "data.json").read_text()) == report
    assert len(report["episodes"]) == 4  # of two batches
    assert report["tasks_per_batch"] == 3
    for episode in report["episodes"]:
        [example] = episode["examples"]
        # With concat the inputs hold the text, and hyper_inputs one EOS.
        texts = (episode["hyper_inputs"] + example["inputs"]).removeprefix("</s>")
        first, last, second = texts.removesuffix("</s>").split("</s>")
        chunk = first + second + example["targets"].removesuffix("</s>") + last
        assert any(chunk in document["text"] for document in documents)
    assert ("hyper_inputs" in report["lengths"]) == (system != "concat")


# ------------------------------------------------------------------------------- warnings

DEFECTS: dict[str, tuple[dict[str, Any], str]] = {
    "one_output": ({"Instances": rows("a", "b", "c", output="yes")}, "'yes'"),
    "one_label": (
        {"Instances": [*rows(*map(str, range(30)), output="yes"), *rows("x", output="no")]},
        "'yes'",
    ),
    "empty_outputs": ({"Instances": [*rows("a", "b"), {"input": "c", "output": [""]}]}, "1 of 3"),
    "long_instruction": ({"Definition": ["x" * 60]}, "61"),
    "cut_inputs": ({"Instances": [*rows("x" * 40), *rows("a", "b", "c")]}, "25%"),
    "cut_targets": ({"Instances": [*rows("a", output="y" * 20), *rows("b", "c")]}, "33%"),
    "no_examples": ({"Positive Examples": []}, ""),
    "repeated_inputs": ({"Instances": rows("a", "a ", "a", "a", "b")}, "60%"),
}


@pytest.mark.parametrize("kind", DEFECTS)
def test_each_defect_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, note = DEFECTS[kind]
    tasks = {"task1_good": {}, "task2_defective": change}
    lengths = {"hyper_length": 50, "input_length": 24, "target_length": 10}
    config = sni_config(tmp_path, tasks, empty_targets="keep", **lengths)
    report = inspect_data.describe(config, "sni_train", steps=2)
    warnings = {w["kind"]: (w["tasks"], w["notes"]) for w in report["warnings"]}
    assert warnings == {kind: (["task2_defective"], [note])}
    [line] = (x for x in capsys.readouterr().out.splitlines() if x.startswith("  ! "))
    assert line.startswith("  ! 1 task: ")


def test_a_task_without_rows_is_named_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [replace(task_data("empty"), rows=()), task_data("full", examples=0)]
    monkeypatch.setattr(pipeline, "load_tasks", lambda *_: tasks)
    monkeypatch.setattr(inspect_data, "opposite_tasks", lambda *_: {"test": ["full", "other"]})
    report = inspect_data.mixture_report(make_config(), "train", 1, 2)
    warnings = {w["kind"]: w["tasks"] for w in report["warnings"]}
    assert warnings == {"empty": ["empty"], "no_examples": ["full"], "overlap": ["full"]}
    assert [t["rate_share"] for t in report["by_task"]] == [0, 1]
    assert report["effective_tasks"] == pytest.approx(1)
    monkeypatch.setattr(pipeline, "load_tasks", lambda *_: tasks[:1])
    with pytest.raises(UserError, match="none of its 1 tasks has a row"):
        inspect_data.mixture_report(make_config(), "train", 1, 2)


def test_all_over_long_instructions_are_listed(tmp_path: Path) -> None:
    tasks = {f"task{i}_long": {"Definition": ["x" * 99]} for i in range(5)}
    config = sni_config(tmp_path, tasks, hyper_length=50)
    with pytest.raises(UserError, match=r"data\.on_long_instruction"):
        pipeline.make_sampler(config, BYTES)
    report = inspect_data.mixture_report(config, "train", 1, 1)
    [warning] = (w for w in report["warnings"] if w["kind"] == "long_instruction")
    assert warning["tasks"] == list(tasks)
    [line] = (x for x in inspect_report.lines(report, 200) if "! 5 tasks" in x)
    assert line.strip().startswith("! 5 tasks: instruction over data.hyper_length=50, in training")


# ------------------------------------------------------------------------------- tasks


def test_a_few_rows_of_a_lazy_task_are_read_once() -> None:
    read: list[int] = []

    def row(number: int) -> TaskRow:
        read.append(number)
        return TaskRow(str(number), f"row {number}", ("x" * (number % 7),))

    lazy = replace(task_data("lazy"), rows=LazyRows(row, range(10**6)))
    stats, texts = stats_of(lazy)
    first = list(read)
    assert len(first) == len(set(first)) == inspect_data.MEASURED_ROWS
    assert min(first) < 100_000 < 900_000 < max(first)
    assert (stats["rows"], stats["rows_looked_at"], stats["labels"]) == (10**6, len(first), 7)
    assert texts["inputs"].lengths.tolist() == [len(f"row {n}") + 1 for n in first]
    stats_of(lazy)
    assert read == first * 2


def test_labels_of_a_task_in_memory_are_of_all_rows() -> None:
    # One row in a thousand, which few of the measured rows would include.
    texts = [(f"row {i}", "yes" if i else "no") for i in range(1000)]
    stats, _ = stats_of(replace(task_data("t"), rows=text_rows(texts)))
    assert (stats["labels"], stats["top_label"], stats["top_label_share"]) == (2, "yes", 0.999)


def test_rates_weight_lengths() -> None:
    tasks = [replace(task_data(n), rate=rate) for n, rate in (("a", 3.0), ("b", 1.0), ("c", 5.0))]
    tasks[2] = replace(tasks[2], rows=())
    assert inspect_data.rate_shares(tasks).tolist() == [0.75, 0.25, 0]
    # Three quarters of the episodes have lengths 1 and 2, a quarter 3, 4, 5 and 6.
    lengths = [np.arange(1, 3), np.arange(3, 7), np.arange(0)]
    texts = [inspect_data.Texts(n, n > 5) for n in lengths]
    stats = inspect_data.text_lengths(texts, np.array([0.75, 0.25, 0.0]), 5)
    assert stats == {"n": 6, "p50": 2, "p95": 6, "max": 6, "limit": 5, "cut": 0.0625}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [False, False, True]),
        # Of 12 ids two are for marks and the output has 4 or 1.
        ({"example_length": 12}, [True, False, True]),
    ],
)
def test_cut_inputs_are_those_that_the_sampler_truncates(
    fields: dict[str, Any], expected: list[bool]
) -> None:
    texts = text_rows([("x" * 7, "y" * 4), ("x" * 9, "y"), ("z" * 19, "y")])
    fields = {"input_length": 16, "shots": (0, 0), "examples_per_task": 1, **fields}
    _, measured = stats_of(replace(task_data("t"), rows=texts), **fields)
    assert measured["inputs"].cut.tolist() == expected
    config = make_config(tasks_per_batch=1, **fields)
    for row, cut in zip(texts, expected, strict=True):
        task = replace(task_data("t", examples=0), rows=(row,))
        sampler = EpisodeSampler([task], BYTES, config.data, 0)
        sampler.batch(0)
        assert sampler.stats["truncated_inputs"] == cut


# ------------------------------------------------------------------------------- text, errors


def test_special_ids_are_visible() -> None:
    ids = [*BYTES.encode("é\n"), EOS_ID, *BYTES.encode("b"), 0, 2, 260, EOS_ID]
    decoded = inspect_data.decode(ids, ByteVocabulary(4))
    assert decoded == "é\n</s>b<pad><unk><260></s>"
    assert inspect_report.visible("é\n\x1b") == "é\\n\\x1b"
    short = inspect_report.shorten("a" * 300 + "b" * 300, 100)
    assert len(short) == 100
    assert (short[:3], short[-3:]) == ("aaa", "bbb")


def test_invalid_input_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, out, message in [
        ("synthetc", None, "nearest is 'synthetic'"),
        ("synthetic", tmp_path / "file", "cannot write"),
        ("sni_train", None, r"data\.sni_dir is empty"),
        ("", None, r"data\.text is empty"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            inspect_data.describe(make_config(), name, out)
        assert "\n" not in str(error.value)
