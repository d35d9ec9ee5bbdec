"""Tables of evaluation reports: metrics, paired differences, cost, robustness.

Pure formatting of the dictionaries in metrics.json and robustness.json. A table is a list of lines
of cells, the header first: `aligned` formats it as text, `report.table` as HTML. Imports no JAX.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hyper_t5.evaluation import aggregation
from hyper_t5.scoring.text_metrics import METRICS

Report = Mapping[str, Any]
Table = list[list[str]]

MEGA = 1e6
# Perturbation of robustness.json that a verdict rests on -> the text that it replaces.
REPLACED_TEXT = {
    "all text of another task": "its conditioning",
    "instruction of another task": "its instruction",
    "examples of another task": "its examples",
}


def summary(report: Report, others: Sequence[Report]) -> str:
    """Format the scores of a report and others, and the paired differences to them, as text."""
    blocks = [aligned(metrics_table([report, *others])), *over_splits(report)]
    if differences := difference_table([report], others):
        blocks.append(aligned(differences))
    return "\n\n".join(blocks) + "\n"


def metrics_table(reports: Sequence[Report]) -> Table:
    """List overall scores with intervals, one line per system and split.

    Metrics that only some benchmarks have come last.
    """
    splits = [(r, name, split) for r in reports for name, split in r["splits"].items()]
    extra = dict.fromkeys(m for _, _, split in splits for m in split["overall"] if m not in METRICS)
    lines = [["system", "split", "tasks", *METRICS, *extra]]
    for report, name, split in splits:
        intervals = split.get("intervals", {})
        scores = [_score(split["overall"].get(m), intervals.get(m)) for m in (*METRICS, *extra)]
        lines.append([_name(report), name, str(split["tasks"]), *scores])
    return lines


def over_splits(report: Report) -> list[str]:
    """Format the scores that a benchmark computes over all its splits, one line per mixture."""
    lines = []
    for mixture, scores in report.get("over_splits", {}).items():
        intervals = scores.get("intervals", {})
        cells = [f"{k} {v}" for k, v in scores.items() if isinstance(v, int)]
        cells += [
            f"{k} {_score(v, intervals.get(k))}" for k, v in scores.items() if isinstance(v, float)
        ]
        lines.append(f"{mixture}: {', '.join(cells)}")
    return lines


def difference_table(reports: Sequence[Report], others: Sequence[Report]) -> Table:
    """List the paired differences of all reports to all others over their common tasks.

    Returns [] if no report has a task in common with another.
    """
    differences = [
        (report, other, split, scores)
        for report in reports
        for other in others
        for split, scores in aggregation.differences(report, other).items()
        if scores
    ]
    metrics = dict.fromkeys(metric for *_, scores in differences for metric in scores)
    lines = [["system", "less", "split", "tasks", *metrics]]
    for report, other, split, scores in differences:
        tasks = max(count for count, _, _ in scores.values())
        cells = [_score(*scores[m][1:], sign="+") if m in scores else "-" for m in metrics]
        lines.append([_name(report), _name(other), split, str(tasks), *cells])
    return lines if differences else []


def cost_table(reports: Sequence[Report]) -> Table:
    """List parameters, FLOPs and seconds of systems; the header is two lines."""
    mflops = ["MFLOPs per example,", "MFLOPs per example,", "MFLOPs"]
    lines = [
        ["system", "trained", "emitted", *mflops, "train", "evaluate"],
        ["", "", "per task", "text concatenated", "text in adapters", "per task", "s", "s"],
    ]
    for report in reports:
        counts = [report.get(f"{kind}_parameters") for kind in ("trained", "generated")]
        flops = map(report.get("flops", {}).get, ("concatenated", "per_example", "per_task"))
        seconds = map(report.get("seconds", {}).get, ("train", "evaluate"))
        cells = [_number(count, ",") for count in counts]
        cells += [_number(None if x is None else x / MEGA, ",.1f") for x in flops]
        cells += [_number(x, ".1f") for x in seconds]
        lines.append([_name(report), *cells])
    return lines


def robustness_table(run: Report) -> Table:
    """List quality and differences of a run of robustness.json, one line per condition."""
    lines = [
        [
            *("condition", "examples", "quality", "difference", "95 % interval"),
            *("same predictions", "compared with"),
        ]
    ]
    for name, condition in run["conditions"].items():
        cells = [name, f"{condition['shown']:.1f}", f"{condition['quality']:.1f}"]
        if name != condition["base"]:
            low, high = condition["interval"] or (math.nan, math.nan)
            cells += [f"{condition['difference']:+.1f}", f"[{low:+.1f}, {high:+.1f}]"]
            cells += [f"{condition['same_predictions']:.0f} %", condition["base"]]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    return lines


def verdicts(conditions: Mapping[str, Report]) -> list[str]:
    """State in one line each whether a run reads its text, its instruction, its examples."""
    return [
        verdict(conditions[name], text)
        for name, text in REPLACED_TEXT.items()
        if name in conditions
    ]


def verdict(condition: Report, text: str) -> str:
    """State whether a run reads ``text``, from its scores with another task's text instead."""
    low, high = condition["interval"] or (-math.inf, math.inf)
    evidence = (
        f"({condition['difference']:+.1f} with another task's, 95 % interval "
        f"[{low:+.1f}, {high:+.1f}], {condition['tasks']} tasks; "
        f"{condition['same_predictions']:.0f} % of predictions are the same)"
    )
    if condition["same_predictions"] == 100:
        return f"IGNORES {text}: all predictions are the same with another task's {evidence}"
    if high < 0:
        return f"reads {text} {evidence}"
    if low > 0:
        return f"is MISLED by {text}: it is better with another task's {evidence}"
    return f"shows NO EFFECT of {text} on these tasks {evidence}"


def aligned(table: Sequence[Sequence[str]], right: bool = False) -> str:
    """Format columns of equal width; ``right`` right-aligns all but the first column."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def _name(report: Report) -> str:
    return str(report.get("name", report["system"]))


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _score(value: float | None, interval: Sequence[float] | None = None, sign: str = "") -> str:
    form = f"{sign}.1f"
    ends = f" [{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""
    return _number(value, form) + ends
