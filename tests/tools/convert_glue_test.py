"""GLUE's rows from files of MetaICL and P3."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5 import pipeline
from hyper_t5.tasks import glue
from hyper_t5.tools import convert_glue
from hyper_t5.utils.errors import UserError
from tests.support import p3_cache
from tests.support.toy_tasks import BYTES, make_config


def write_metaicl(folder: Path, task: str, part: str, *rows: tuple[str, str]) -> None:
    lines = [{"task": f"glue-{task}", "input": i, "output": o, "options": []} for i, o in rows]
    file = folder / "data" / f"glue-{task}" / f"glue-{task}_{part}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_p3(folder: Path, task: str, split: str, *rows: tuple[str, str, int | None]) -> None:
    records = [
        {"inputs_pretokenized": [text], "targets_pretokenized": [target], "inputs": []}
        | ({} if correct is None else {"is_correct": [correct]})
        for text, target, correct in rows
    ]
    p3_cache.write_task(folder / "data", task, split, records)


def read(file: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.pop("idx") for row in rows] == list(range(len(rows)))
    return [tuple(row.values()) for row in rows]


def test_rows_of_both_sources_are_divided_into_train_and_validation(tmp_path: Path) -> None:
    metaicl, p3, out = tmp_path / "metaicl", tmp_path / "p3", tmp_path / "out"
    a, b, c = (f"sentence 1: {x} . [SEP] sentence 2: {x}{x}" for x in "abc")
    write_metaicl(metaicl, "rte", "16_13_train", (a, "entailment"), (b, "not_entailment"))
    write_metaicl(metaicl, "rte", "16_13_dev", (a, "not_entailment"))
    # A meta-training row that is also a test row is left out of train.
    rows = [(b, "not_entailment"), (c, "entailment")]
    write_metaicl(metaicl, "rte", "16384_100_train", *rows)
    rows = [(c.replace(" .", "  ."), "entailment"), ("odd", "yes")]
    write_metaicl(metaicl, "rte", "16_13_test", *rows)
    write_p3(
        p3,
        "super_glue_rte_GPT_3_style_score_eval",
        "validation",
        ('"c" .\nQuestion: cc True or False?', "True", 1),
        ('"c" .\nQuestion: cc True or False?', "False", 0),
        ("d\nQuestion: is it True or False? True or False?", "False", 1),
        ("d\nQuestion: e\nQuestion: f True or False?", "False", 1),
    )
    # qqp has no test rows: dev rows are its validation. [SEP] in a question is ambiguous.
    rows = [("question 1: a? [SEP] question 2: b?", "duplicate")]
    write_metaicl(metaicl, "qqp", "16_13_dev", *rows)
    rows = [("question 1: [SEP] [SEP] question 2: b?", "duplicate")]
    write_metaicl(metaicl, "qqp", "16_13_train", *rows)
    prompt = "Question 1: {}\nQuestion 2: {}\n\nDo these two questions convey the same meaning? "
    prompt += "Yes or no?"
    write_p3(
        p3,
        "glue_qqp_meaning",
        "train",
        (prompt.format("x?", "y?"), "Yes", None),
        (prompt.format("a?", "b?"), "No", None),
    )
    rows = [("sentence: it", "acceptable"), ("Me.", "unacceptable")]
    write_metaicl(metaicl, "cola", "16_13_test", *rows)

    counts = convert_glue.convert(metaicl, p3, out)
    files = {file.relative_to(out).as_posix(): read(file) for file in out.rglob("*.jsonl")}
    assert files == {
        "cola/validation.jsonl": [("sentence: it", 1), ("Me.", 0)],
        "qqp/train.jsonl": [("x?", "y?", 1)],
        "qqp/validation.jsonl": [("a?", "b?", 1)],
        "rte/train.jsonl": [("b .", "bb", 1), ("a .", "aa", 1)],
        "rte/validation.jsonl": [("c  .", "cc", 0), ("d", "is it True or False?", 1)],
    }
    assert counts["rte"] == Counter(
        {"train": 2, "validation": 2, "repeated": 4, "other label": 1, "unreadable": 2}
    )
    assert counts["qqp"] == Counter(
        {"train": 1, "validation": 1, "repeated": 1, "other label": 1, "unreadable": 1}
    )
    config = make_config(mixture="glue", glue_dir=str(out), on_missing_task="skip")
    assert len(pipeline.load_tasks("glue", config.data, "train", BYTES)) == 2


def test_invalid_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data/glue-TASK/\*\.jsonl in the one"):
        convert_glue.convert(tmp_path, "", tmp_path / "out")
    file = tmp_path / "data" / "glue_mrpc_equivalent" / "train.tfrecord-00000-of-00001"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a record, but long enough to be read as one")
    with pytest.raises(UserError, match=r"train\.tfrecord.*: damaged length, or no TFRecord file"):
        convert_glue.convert("", tmp_path, tmp_path / "out")
    file = tmp_path / "data" / "glue-rte" / "glue-rte_16_13_train.jsonl"
    file.parent.mkdir()
    file.write_text('{"output": "x"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: lacks field input"):
        convert_glue.convert(tmp_path, "", tmp_path / "out")
    with pytest.raises(UserError, match=r"--out .*: exists; use a new folder"):
        convert_glue.convert(tmp_path, "", tmp_path)


def test_command(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metaicl(tmp_path / "metaicl", "sst2", "16_13_train", ("sentence: fine", "positive"))
    argv = ["--metaicl", str(tmp_path / "metaicl"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-m", "hyper_t5.tools.convert_glue", *argv]
    process = subprocess.run(command, cwd=repo_root, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout.splitlines()[1].split() == ["sst2", "1", "0", "0", "0", "0"]
    assert convert_glue.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m hyper_t5.tools.convert_glue: error: --out ")
    assert err.count("\n") == 1


def test_official_files(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    counts = convert_glue.convert(real_data("metaicl"), real_data("p3"), tmp_path / "out")
    assert set(counts) == set(glue.TASKS) - {"stsb"}
    assert not any(count["unreadable"] for count in counts.values())
    # The whole official validation sets of these four, and their shares of label 1.
    sizes = {"sst2": 872, "mrpc": 408, "rte": 277, "wnli": 71}
    ones = {"sst2": 444, "mrpc": 279, "rte": 131, "wnli": 31}
    assert {task: counts[task]["validation"] for task in sizes} == sizes
    config = make_config(mixture="glue", glue_dir=str(tmp_path / "out"))
    tasks = {t.name: t for t in pipeline.load_tasks("glue", config.data, "validation", BYTES)}
    for name, size in sizes.items():
        share = np.mean([row.outputs == ("1",) for row in tasks[name].rows])
        assert share == pytest.approx(ones[name] / size)
