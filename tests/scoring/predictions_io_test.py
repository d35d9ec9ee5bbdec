"""Files of predictions, of submissions and their references, and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli
from hyper_t5.scoring import predictions_io
from tests.support import tiny_runs
from tests.support.prediction_rows import CASES, sni_rows


def write_lines(file: Path, lines: Iterable[Any]) -> Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_submission_scores_as_its_rows(tmp_path: Path) -> None:
    rows = sni_rows()
    lines = predictions_io.to_submission(rows)
    assert lines[0] == {"id": "task1_entail-0", "prediction": "Yes."}
    assert len(lines) == len(rows)
    official = [
        {"id": r["id"], "references": r["references"], "track": "default"}
        | {"task_id": r["task"], "task_category": r["category"]}
        for r in rows
    ]
    submission = write_lines(tmp_path / "submission.jsonl", lines[::-1])
    references = write_lines(tmp_path / "references.jsonl", official)
    argv = ["score", f"--predictions={submission}", f"--references={references}"]
    assert cli.main([*argv, f"--out={tmp_path / 'metrics.json'}"]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    expected = pytest.approx(CASES["sni"]["expected"], abs=1e-4)
    assert metrics["splits"]["test"]["official"] == expected


def test_instances_without_prediction_are_empty_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"id": "1", "prediction": "a"}, {"id": "9", "prediction": ""}]
    submission = write_lines(tmp_path / "submission.jsonl", lines)
    official = [{"id": "1", "references": ["a"]}, {"id": "2", "references": ["b"]}]
    references = write_lines(tmp_path / "references.jsonl", official)
    rows = predictions_io.read_predictions(submission, references)
    assert [r["prediction"] for r in rows] == ["a", ""]
    out = capsys.readouterr().out
    assert "no prediction for 1 of 2 instances" in out
    assert "1 predictions are of no instance" in out


OPTIONS = '"options": ["a"], "option_log_probs": [], "option_tokens": [1]'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "is empty"),
        ("\n[1]", "line 2: must be a JSON object"),
        ('{"id": 3', "line 1: not valid JSON"),
        ('{"id": "1", "prediction": "a"}', "line 1: lacks field split; pass a submission"),
        ('{"split": "test", "task": "t", "id": 1}', "field id must be text, this is 1"),
        (
            '{"split": "test", "task": "t", "id": "1", "prediction": "a", "references": []}',
            "field references must be a list of one or more texts",
        ),
        (
            '{"split": "test", "task": "t", "id": "1", "prediction": "a", "references": ["a"], '
            + OPTIONS
            + "}",
            "options, option_log_probs and option_tokens differ in length",
        ),
    ],
)
def test_bad_files_of_predictions(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    message = tiny_runs.fails(capsys, "score", f"--predictions={tmp_path / 'p.jsonl'}")
    assert expected in message
    assert "p.jsonl" in message
