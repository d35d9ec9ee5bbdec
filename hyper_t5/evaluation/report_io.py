"""Readers of the files of evaluated runs, such as metrics.json and robustness.json.

Imports no JAX.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath

from hyper_t5.evaluation import aggregation, tables
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

TRAINING_METRICS = "metrics.jsonl"  # as in checkpoints.workdir, which imports JAX
DAMAGED = (AttributeError, KeyError, TypeError, ValueError)  # of a file with other content


@dataclasses.dataclass(frozen=True)
class ReportRun:
    """One evaluated run.

    Attributes:
      name: label of the run, unique in a report.
      report: content of metrics.json.
      rows: lines of predictions.jsonl; empty without that file.
      adapters: content of adapters.json, by split; empty if no adapters were generated.
      training: lines of metrics.jsonl; empty without that file.
    """

    name: str
    report: dict[str, Any]
    rows: list[dict[str, Any]]
    adapters: dict[str, Any]
    training: list[dict[str, Any]]

    def metric(self, split: str) -> str:
        """Return the headline metric of a split's benchmark, or rougeL if a task lacks it."""
        return aggregation.headline(self.report["splits"][split])

    def quality(self, split: str) -> dict[str, float]:
        """Return the headline metric of each task."""
        metric = self.metric(split)
        return {t: s[metric] for t, s in self.report["splits"][split]["per_task"].items()}

    def categories(self, split: str) -> dict[str, str]:
        """Return the category of each task, '' for none."""
        tasks = self.report["splits"][split]["per_task"]
        return {name: scores.get("category") or "" for name, scores in tasks.items()}


def report_file(path: str | Path) -> epath.Path:
    """Return the newest metrics.json of a workdir; a path of a file is returned as it is."""
    file = files.as_path(path)
    if not file.is_dir():
        return file
    steps = sorted((file / "eval").glob("*/metrics.json"), key=lambda p: p.stat().mtime)
    if not steps:
        raise UserError(
            f"{path}: no eval/*/metrics.json in it; run `hyper-t5 evaluate --workdir {path}` first"
        )
    return steps[-1]


def read_report(path: str | Path) -> dict[str, Any]:
    """Read a metrics.json, or the newest one of a workdir.

    Raises:
      UserError: the file does not hold the metrics of an evaluation.
    """
    file = report_file(path)
    report = files.read_json(file)
    try:
        tables.metrics_table([report])
        tables.cost_table([report])
        for split in report["splits"].values():
            aggregation.unit_sums(split)
    except DAMAGED:
        raise UserError(f"{file}: not the metrics of an evaluation") from None
    return report


def read_run(path: str | Path) -> ReportRun:
    """Read the newest evaluation of a workdir, or the evaluation of a metrics.json."""
    file = report_file(path)
    report = read_report(file)
    stats = file.with_name("adapters.json")
    workdir = files.as_path(path)
    if not workdir.is_dir():
        workdir = files.as_path(report.get("workdir", path))
    return ReportRun(
        report.get("name", report["system"]),
        report,
        _read_lines(file.with_name("predictions.jsonl")),
        files.read_json(stats) if stats.exists() else {},
        _read_lines(workdir / TRAINING_METRICS),
    )


def read_robustness(file: str | Path) -> dict[str, dict[str, Any]]:
    """Read the runs of a robustness.json, by `name_runs`.

    Raises:
      UserError: the file is not a robustness.json.
    """
    content = files.read_json(file)
    try:
        for run in content["runs"]:
            tables.robustness_table(run)
            "".join(run["verdicts"])
        return name_runs(content["runs"])
    except DAMAGED:
        raise UserError(f"{file}: not what `hyper-t5 robustness` wrote") from None


def name_runs(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key runs by a unique name: the system, or the workdir if several runs share the system."""
    systems = [run["system"] for run in runs]
    return {
        run["system"] if systems.count(run["system"]) == 1 else run["workdir"]: run for run in runs
    }


def _read_lines(file: epath.Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file, [] if it is missing. An incomplete last line is skipped."""
    lines = files.read_bytes(file).splitlines() if file.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file}, line {number}: not JSON; evaluate again") from None
    return rows
