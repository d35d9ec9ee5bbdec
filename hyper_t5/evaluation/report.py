"""HTML report of evaluated runs: quality, differences, training, cost, adapters, samples.

Built only from files: metrics.json, predictions.jsonl and adapters.json of `hyper-t5 evaluate`,
metrics.jsonl of `hyper-t5 train` and robustness.json of `hyper-t5 robustness`. Imports no JAX.
"""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hyper_t5.evaluation import tables
from hyper_t5.evaluation.report_io import ReportRun, read_robustness, read_run
from hyper_t5.utils import files, plots

BASELINE = "concat"  # the system that all others are compared with
SAMPLES = 12  # rows per split
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1rem 0; }}
td, th {{ padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
.text td {{ text-align: left; white-space: pre-wrap; max-width: 30rem; vertical-align: top; }}
img {{ max-width: 100%; }}
details {{ margin: 1rem 0; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


# ------------------------------------------------------------------------------------------- page


def write_report(
    workdirs: Sequence[str | Path],
    out: str | Path,
    title: str = "hyper_t5",
    robustness: str | Path = "",
) -> epath.Path:
    """Write OUT/report.html and its pictures.

    Args:
      workdirs: evaluated runs, each a workdir or a metrics.json.
      out: folder to write to.
      title: heading of the page.
      robustness: a robustness.json to include; '' for none.

    Returns:
      The path of the page.

    Raises:
      UserError: a run has no evaluation, or a file is damaged.
    """
    runs = _with_unique_names([read_run(path) for path in workdirs], workdirs)
    conditions = read_robustness(robustness) if robustness else {}
    return write_page(runs, out, title, conditions)


def write_page(
    runs: Sequence[ReportRun],
    out: str | Path,
    title: str = "hyper_t5",
    robustness: Mapping[str, Mapping[str, Any]] | None = None,
) -> epath.Path:
    """Write OUT/report.html of runs whose names are unique; see `write_report`."""
    folder = files.as_path(out)
    sections = [
        _overall(runs, folder),
        _by_category(runs, folder),
        _differences(runs, folder),
        _training(runs, folder),
        _cost(runs, folder),
        _adapters(runs, folder),
        _robustness(robustness or {}, folder),
        _tasks(runs),
        _samples(runs),
    ]
    page = PAGE.format(title=html.escape(title), body="\n".join(filter(None, sections)))
    files.write_text(folder / "report.html", page)
    return folder / "report.html"


def _with_unique_names(
    runs: Sequence[ReportRun], workdirs: Sequence[str | Path]
) -> list[ReportRun]:
    """Append the folder's name to names that several runs share."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({Path(path).name})")
        if names.count(run.name) > 1
        else run
        for run, path in zip(runs, workdirs, strict=True)
    ]


# --------------------------------------------------------------------------------------- sections


def _overall(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    text = (
        "<p>Scores on held-out tasks in %, with 95 % bootstrap intervals over tasks. Predictions "
        "are generated or rank-classified, as the benchmark requires.</p>"
    )
    headlines = "".join(
        f"<p>Headline metric for {html.escape(split)}: "
        f"{html.escape(_with_split(runs, split)[0].metric(split))}.</p>"
        for split in _splits(runs)
    )
    named = _named_reports(runs)
    picture = plots.compare(named, folder / "quality.png", "exact_match")
    return section("Quality", text + table(tables.metrics_table(named)) + headlines, picture)


def _by_category(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    body = ""
    for split in _splits(runs):
        selected = _with_split(runs, split)
        means = {run.name: _category_means(run, split) for run in selected}
        if any(len(categories) > 1 for categories in means.values()):
            label = f"{selected[0].metric(split)}, %: {split}"
            path = folder / f"categories_{split}.png"
            body += figure(plots.by_category(means, path, label, _colors(runs)))
    return body and section(
        "Quality by category", "<p>Mean over the tasks of each category.</p>" + body
    )


def _category_means(run: ReportRun, split: str) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    categories = run.categories(split)
    for task, score in run.quality(split).items():
        if categories[task]:
            scores.setdefault(categories[task], []).append(score)
    return {category: float(np.mean(values)) for category, values in scores.items()}


def _differences(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    """Compare all runs with the last run of the baseline system, task by task."""
    baselines = [run for run in runs if run.report["system"] == BASELINE]
    others = [run for run in runs if run.report["system"] != BASELINE]
    if not baselines:
        return ""
    base = baselines[-1]
    differences = tables.difference_table(_named_reports(others), _named_reports([base]))
    if not differences:
        return ""
    body = (
        f"<p>Difference to {html.escape(base.name)} on the same tasks, with paired intervals. The "
        "plots show the headline metric of each task.</p>"
    )
    body += table(differences)
    for split in _splits([base]):
        metric, reference = base.metric(split), base.quality(split)
        gaps = {
            run.name: [v - reference[t] for t, v in run.quality(split).items() if t in reference]
            for run in _with_split(others, split)
            if run.metric(split) == metric
        }
        if gaps := {name: values for name, values in gaps.items() if values}:
            label = f"{split}: {metric} minus that of {base.name}"
            path = folder / f"gaps_{split}.png"
            body += figure(plots.sorted_gaps(gaps, path, label, _colors(runs)))
    return section("Difference to the concatenated text", body)


def _training(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    panels: dict[str, dict[str, Any]] = {}
    for title, field in {"loss": "loss", "exactly predicted targets": "exact"}.items():
        for run in runs:
            points = [(x["step"], x[field]) for x in run.training if field in x and "step" in x]
            if points:
                panels.setdefault(title, {})[run.name] = tuple(zip(*points, strict=True))
    if not panels:
        return ""
    picture = plots.training(panels, folder / "training.png", _colors(runs))
    return section("Training", "", picture)


def _cost(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    """Plot quality against FLOPs per example, as Ivison et al. 2023 do, and list all costs."""
    points = {}
    for run in runs:
        if flops := run.report.get("flops", {}).get("per_example"):
            scores = [v for split in run.report["splits"] for v in run.quality(split).values()]
            points[run.name] = (flops / tables.MEGA, float(np.mean(scores)))
    head, units, *lines = tables.cost_table(_named_reports(runs))
    columns = [f"{name} {unit}".strip() for name, unit in zip(head, units, strict=True)]
    label = "mean over the tasks of all splits, %"
    picture = plots.quality_by_cost(points, folder / "cost.png", label) if points else None
    return section("Quality and compute", table([columns, *lines]), picture)


def _adapters(runs: Sequence[ReportRun], folder: epath.Path) -> str:
    body = "".join(
        _adapter_statistics(run, split, folder, f"{index}_{split}")
        for index, run in enumerate(runs)
        for split in run.adapters
    )
    text = (
        "<p>Statistics of the weight updates of generated adapters. If 0 % differs between tasks, "
        "the hypermodel ignores its text.</p>"
    )
    return body and section("Generated adapters", text + body)


def _adapter_statistics(run: ReportRun, split: str, folder: epath.Path, suffix: str) -> str:
    """Plot norms and ranks by layer, and cosines of all pairs of tasks sorted by category."""
    stats = run.adapters[split]
    categories = run.categories(split) if split in run.report["splits"] else {}
    groups = [(categories.get(task) or task, task) for task in stats["tasks"]]
    order = sorted(range(len(groups)), key=groups.__getitem__)
    cosines = {
        title: np.asarray(stats[field])[np.ix_(order, order)]
        for title, field in {
            "cosine": "similarity",
            "cosine of differences from the mean": "similarity_centred",
        }.items()
    }
    by_layer = {
        title: {site: values[field] for site, values in stats["places"].items()}
        for title, field in {"norm": "norm", "effective rank": "effective_rank"}.items()
    }
    names = [groups[i][0] for i in order]
    return (
        f"<h3>{html.escape(run.name)}, {html.escape(split)}</h3><p>"
        f"{len(groups)} tasks; norm {np.mean(stats['norms']):.3g} "
        f"({np.min(stats['norms']):.3g} to {np.max(stats['norms']):.3g}); "
        f"{stats['differing']:.1%} of the squared norm differs between tasks.</p>"
        + figure(plots.by_layer(by_layer, folder / f"layers_{suffix}.png"))
        + figure(plots.similarities(cosines, names, folder / f"alike_{suffix}.png"))
    )


def _robustness(runs: Mapping[str, Mapping[str, Any]], folder: epath.Path) -> str:
    """List the verdicts of each run; fold the scores that they rest on."""
    if not runs:
        return ""
    body = ""
    for name, run in runs.items():
        verdicts = "".join(f"<li>{html.escape(verdict)}</li>" for verdict in run["verdicts"])
        lines = tables.robustness_table(run)
        body += f"<h3>{html.escape(name)}</h3><ul>{verdicts}</ul>"
        body += details(f"{len(lines) - 1} conditions", table(lines))
    picture = plots.robustness(runs, folder / "robustness.png")
    return section("Use of the task's text", body, picture)


def _tasks(runs: Sequence[ReportRun]) -> str:
    body = ""
    for split in _splits(runs):
        selected = _with_split(runs, split)
        qualities = [run.quality(split) for run in selected]
        categories = {t: c for run in selected for t, c in run.categories(split).items()}
        lines = [["task", "category", *(run.name for run in selected)]]
        for task, category in categories.items():
            scores = [f"{q[task]:.1f}" if task in q else "-" for q in qualities]
            lines.append([task, category, *scores])
        summary = f"{split}: {selected[0].metric(split)} of {len(categories)} tasks"
        body += details(summary, table(lines))
    return section("Scores by task", body)


def _samples(runs: Sequence[ReportRun]) -> str:
    """List the predictions of all runs for the first row of some tasks, evenly chosen."""
    body = ""
    for split in _splits(runs):
        rows: dict[str, dict[str, Any]] = {}  # the first row of each task
        predictions: dict[tuple[str, str], str] = {}  # by run and task
        for run in runs:
            for row in run.rows:
                if row["split"] == split:
                    first = rows.setdefault(row["task"], row)
                    if row["id"] == first["id"]:
                        predictions[run.name, row["task"]] = row["prediction"]
        tasks = list(rows)
        indices = np.linspace(0, len(tasks) - 1, min(SAMPLES, len(tasks)), dtype=int)
        lines = [["task", "input", "references", *(run.name for run in runs)]]
        for task in (tasks[i] for i in indices):
            row = rows[task]
            outputs = [predictions.get((run.name, task), "-") for run in runs]
            lines.append([task, row["input"], " | ".join(row["references"]), *outputs])
        if tasks:
            body += details(f"{split}: {len(indices)} rows", table(lines, text=True))
    return body and section("Sample predictions", body)


def _named_reports(runs: Sequence[ReportRun]) -> list[dict[str, Any]]:
    return [{**run.report, "name": run.name} for run in runs]


def _colors(runs: Sequence[ReportRun]) -> dict[str, Any]:
    return plots.colors([run.name for run in runs])


def _splits(runs: Sequence[ReportRun]) -> list[str]:
    return list(dict.fromkeys(split for run in runs for split in run.report["splits"]))


def _with_split(runs: Sequence[ReportRun], split: str) -> list[ReportRun]:
    return [run for run in runs if split in run.report["splits"]]


# ------------------------------------------------------------------------------------------- HTML


def section(title: str, body: str, picture: str | Path | None = None) -> str:
    """Format a section; ``picture`` is a PNG file that comes first."""
    shown = figure(picture) if picture is not None else ""
    return f"<h2>{html.escape(title)}</h2>\n{shown}\n{body}"


def figure(path: str | Path) -> str:
    """Embed a PNG file."""
    file = files.as_path(path)
    data = base64.b64encode(files.read_bytes(file)).decode()
    return f'<p><img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}"></p>'


def details(summary: str, body: str) -> str:
    """Fold a part of a section."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def table(lines: Sequence[Sequence[str]], text: bool = False) -> str:
    """Format lines of cells, the header first; ``text`` left-aligns and wraps them."""

    def row(cells: Sequence[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"

    body = "\n".join([row(lines[0], "th"), *(row(line, "td") for line in lines[1:])])
    return f'<table class="{"text" if text else "scores"}">{body}</table>'
