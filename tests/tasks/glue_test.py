"""GLUE from local files: text and labels of every task, splits, invalid rows and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from hyper_t5 import pipeline
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.evaluation import aggregation
from hyper_t5.scoring import text_metrics
from hyper_t5.tasks import glue
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs, toy_tasks
from tests.support.toy_tasks import BYTES, assert_seqio_reads

PAIR = {"sentence1": "A.", "sentence2": "B."}
# A row with the official columns, and the input and output that it becomes.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "cola": ({"sentence": "It it.", "label": 0}, "cola sentence: It it.", "0"),
    "sst2": ({"sentence": "so good ", "label": 1}, "sst2 sentence: so good ", "1"),
    "mrpc": ({**PAIR, "label": 1}, "mrpc sentence1: A. sentence2: B.", "1"),
    "qqp": (
        {"question1": "A?", "question2": "B?", "label": 0},
        "qqp question1: A? question2: B?",
        "0",
    ),
    "stsb": ({**PAIR, "label": 3.36}, "stsb sentence1: A. sentence2: B.", "3.4"),
    "mnli": (
        {"premise": "A.", "hypothesis": "B.", "label": 2},
        "mnli premise: A. hypothesis: B.",
        "2",
    ),
    "qnli": (
        {"question": "A?", "sentence": "B.", "label": 1},
        "qnli question: A? sentence: B.",
        "1",
    ),
    "rte": ({**PAIR, "label": 0}, "rte sentence1: A. sentence2: B.", "0"),
    "wnli": ({**PAIR, "label": 1}, "wnli sentence1: A. sentence2: B.", "1"),
}


def make_config(folder: Path, **fields: Any) -> ConfigDict:
    lengths = {"hyper_length": 256, "input_length": 64, "target_length": 8}
    return toy_tasks.make_config(
        mixture="glue", glue_dir=str(folder), shots=(0, 0), **{**lengths, **fields}
    )


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """rte with 8 and 3 rows, mnli with 4, 2 and 5."""
    sizes = {
        "rte": {"train": 8, "validation": 3},
        "mnli": {"train": 4, "validation": 2, "test": 5},
    }
    for task, splits in sizes.items():
        for split, size in splits.items():
            rows = [
                {"sentence1": f"{split} {i}", "sentence2": "other", "label": i % 2}
                for i in range(size)
            ]
            write(tmp_path / "glue" / task / f"{split}.jsonl", rows)
    return tmp_path / "glue"


# ------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("task", glue.TASKS)
def test_input_and_output_of_every_task(task: str, tmp_path: Path) -> None:
    official, text, answer = ROWS[task]
    texts = [value for name, value in official.items() if name != "label"]
    plain = dict(zip(glue.PAIR, texts, strict=False)) | {"label": official["label"], "idx": 17}
    loaded = glue.read_task(task, write(tmp_path / "train.jsonl", [official, plain]))
    assert [(row.id, row.input, row.outputs) for row in loaded.rows] == [
        (f"{task}-0", text, (answer,)),
        (f"{task}-17", text, (answer,)),
    ]
    assert loaded.name == task
    answers = range(len(glue.TASKS[task].answers)) or ["0.0", "5.0", "0.2"]
    assert all(f" {answer}" in loaded.instruction for answer in answers)


def test_scores_of_stsb_are_rounded_to_fifths(tmp_path: Path) -> None:
    answers = {0: "0.0", 5: "5.0", 0.09: "0.0", 0.11: "0.2", 2.25: "2.2", 4.999: "5.0", 3: "3.0"}
    rows = [{**PAIR, "label": label} for label in answers]
    task = glue.read_task("stsb", write(tmp_path / "train.jsonl", rows))
    assert [row.outputs for row in task.rows] == [(answer,) for answer in answers.values()]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("rte", '{"sentence1": "a", "label": 0}', "lacks field sentence2$"),
        ("mnli", '{"premise": "a", "label": 0}', "lacks field sentence2 or hypothesis$"),
        ("sst2", '{"label": 0}', "lacks field sentence1 or sentence$"),
        ("sst2", '{"sentence": null, "label": 0}', "field sentence must be text"),
        ("cola", '{"sentence": "a"}', "lacks field label"),
        ("cola", '{"sentence": "a", "label": 2}', "label must be a whole number from 0 to 1"),
        ("cola", '{"sentence": "a", "label": true}', "whole number from 0 to 1, this is True"),
        ("cola", '{"sentence": "a", "label": 0.5}', "whole number from 0 to 1, this is 0.5"),
        ("mnli", '{"premise": "a", "hypothesis": "b", "label": "1"}', "from 0 to 2, this is '1'"),
        ("cola", '{"sentence": "a", "label": -1}', "official test files have no labels"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 5.1}', "number from 0 to 5, this"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": NaN}', "number from 0 to 5, this"),
        ("cola", '{"sentence": "a", ', "not valid JSON"),
        ("cola", "[1]", "must be a JSON object"),
        ("cola", '{"sentence": "\\ud800", "label": 1}', "half a surrogate pair"),
        ("cola", '{"sentence": "\udcff", "label": 1}', "not UTF-8"),
    ],
)
def test_bad_rows_are_reported_or_skipped(
    task: str, line: str, message: str, tmp_path: Path
) -> None:
    good = json.dumps(ROWS[task][0])
    file = tmp_path / "train.jsonl"
    file.write_bytes(f"{good}\n\n{line}\n{good}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"train\.jsonl, line 3: .*{message}") as error:
        glue.read_task(task, file)
    assert "\n" not in str(error.value)
    loaded = glue.read_task(task, file, "skip")
    assert len(loaded.rows) == 2
    assert loaded.skipped == {f"{task}/train.jsonl": 1}


def test_a_task_needs_a_usable_row(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no usable row"):
        glue.read_task("cola", tmp_path / "train.jsonl")


# ------------------------------------------------------------------------------- mixture


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("train", {"mnli": 4, "rte": 8}),
        ("validation", {"mnli": 2, "rte": 3}),
        ("test", {"mnli": 5}),
    ],
)
def test_the_rate_of_a_task_is_its_number_of_rows(
    split: str, sizes: dict[str, int], folder: Path
) -> None:
    tasks = pipeline.load_tasks("glue", make_config(folder).data, split, BYTES)
    assert {task.name: len(task.rows) for task in tasks} == sizes
    assert {task.name: task.rate for task in tasks} == sizes
    assert all(f" {split} 0 " in task.rows[0].input for task in tasks)
    assert pipeline.held_out_splits("glue") == ("validation",)


def test_seqio_tasks_have_the_ids_of_evaluation(folder: Path) -> None:
    config = make_config(folder)
    config.eval.shots = 0
    assert tiny_runs.register("glue", config.data, "validation", BYTES) == "glue_validation"
    _, task = pipeline.load_tasks("glue", config.data, "validation", BYTES)
    [eval_task] = build_eval_tasks([task], BYTES, config)
    assert len(assert_seqio_reads("glue_rte_validation", "validation", eval_task, config)) == 3


def test_official_files_of_mnli(folder: Path) -> None:
    mnli = folder / "mnli"
    (mnli / "validation.jsonl").rename(mnli / "validation_mismatched.jsonl")
    (mnli / "test.jsonl").rename(mnli / "validation_matched.jsonl")
    files = {split: glue.split_files(str(folder), split)["mnli"].name for split in glue.SPLITS}
    assert files == {
        "train": "train.jsonl",
        "validation": "validation_mismatched.jsonl",
        "test": "validation_matched.jsonl",
    }


def test_invalid_folders_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for glue_dir, split, message in [
        ("", "train", "data.glue_dir is empty"),
        (str(folder / "none"), "train", "no such folder; data.glue_dir"),
        (str(folder / "rte"), "train", r"holds no folder of a GLUE task \(cola, sst2"),
        (str(folder), "dev", "split 'dev' is unknown; the splits are train, validation, test"),
    ]:
        with pytest.raises(UserError, match=message):
            glue.split_files(glue_dir, split)
    (folder / "rte" / "train.jsonl").unlink()
    (folder / "ax").mkdir()
    with pytest.raises(UserError, match=r"rte/train\.jsonl: no such file; .*on_missing_task"):
        glue.split_files(str(folder), "train")
    capsys.readouterr()
    config = make_config(folder, on_missing_task="skip")
    assert [t.name for t in pipeline.load_tasks("glue", config.data, "train", BYTES)] == ["mnli"]
    out = capsys.readouterr().out
    assert "skips ax: not a GLUE task\n" in out
    assert "train skips rte: no file\n" in out
    (folder / "mnli" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"mnli/train\.jsonl: no such file, nor that of any other"):
        glue.split_files(str(folder), "train", skip_missing=True)


def test_metrics_of_each_task() -> None:
    pairs = [("1", "1"), ("0", "0"), ("no", "1"), ("0", "1")]
    common = {"rows", "category", *text_metrics.METRICS}

    def own_metrics(task: str) -> dict[str, float]:
        origin = {"split": "validation", "mixture": "glue", "task": task}
        rows = [{**origin, "prediction": p, "references": [r]} for p, r in pairs]
        scores = aggregation.score_predictions(rows)["splits"]["validation"]["per_task"][task]
        return {name: value for name, value in scores.items() if name not in common}

    assert {task: set(own_metrics(task)) for task in glue.TASKS} == {
        **{task: {"accuracy"} for task in glue.TASKS},
        "cola": {"matthews"},
        "mrpc": {"f1", "accuracy"},
        "qqp": {"f1", "accuracy"},
        "stsb": {"pearson", "spearman"},
    }
    # 1 true positive, 2 false negatives: 2 / (2 + 2).
    assert own_metrics("mrpc") == {"f1": 50.0, "accuracy": 50.0}
