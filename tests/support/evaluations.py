"""Evaluations of tiny runs: the command, its files, and hand-written reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hyper_t5 import cli
from hyper_t5.scoring import text_metrics

Rows = list[dict[str, Any]]


def edit_task(sni: Path, task: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the file of a task in a Super-NaturalInstructions folder."""
    file = sni / "tasks" / f"{task}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def evaluate_run(run: Path, out: Path, *flags: str) -> tuple[dict[str, Any], Rows]:
    """Run ``hyper-t5 evaluate``; return (metrics, predictions) from its files."""
    assert cli.main(["evaluate", "--workdir", str(run), "--out", str(out), *flags]) == 0
    return read_evaluation(out)


def read_evaluation(out: Path) -> tuple[dict[str, Any], Rows]:
    """Read (metrics, predictions) from the folder of an evaluation."""
    return json.loads((out / "metrics.json").read_text()), read_predictions(out)


def read_predictions(out: Path) -> Rows:
    """Read the predictions.jsonl of an evaluation."""
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def texts(predictions: Rows) -> list[str]:
    """Return the predicted texts."""
    return [row["prediction"] for row in predictions]


def report(name: str, score: float, *splits: str) -> dict[str, Any]:
    """Return a metrics.json of one score in all metrics and splits."""
    overall = dict.fromkeys(text_metrics.METRICS, score)
    return {"system": name, "splits": {s: {"tasks": 3, "overall": overall} for s in splits}}
