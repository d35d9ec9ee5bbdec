"""One page of what was evaluated: quality, where it differs, what it costs, and the adapters.

Made of files alone, of what `hyper-t5 evaluate` and `train` left in the workdirs: metrics.json,
predictions.jsonl, adapters.json and metrics.jsonl, and of `hyper-t5 robustness` its file. So it can
be made again anywhere, and of runs that were evaluated at different times. `report.html` holds its
pictures in it; they also lie beside it as PNG files.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hyper_t5 import files, metrics, plots, protocols, robustness
from hyper_t5.errors import UserError
from hyper_t5.evaluate import read_report, report_file

CONCAT = "concat"  # the system that all others are compared with
SAMPLES = 12
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
table {{ border-collapse: collapse; font-size: 13px; margin: 1rem 0; }}
td, th {{ padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
td.text {{ text-align: left; white-space: pre-wrap; max-width: 30rem; vertical-align: top; }}
img {{ max-width: 100%; }}
details {{ margin: 1rem 0; }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """One evaluated run.

    Attributes:
        name: what it is called here, its own in a report.
        report: metrics.json.
        rows: predictions.jsonl; empty where it is not beside it.
        adapters: adapters.json by split; empty where nothing was generated.
        training: the lines of metrics.jsonl.
    """

    name: str
    report: dict[str, Any]
    rows: list[dict[str, Any]]
    adapters: dict[str, Any]
    training: list[dict[str, Any]]

    def metric(self, split: str) -> str:
        """The one by which the benchmark of a split is told."""
        found = self.report["splits"][split]
        wanted = protocols.of_mixture(found.get("mixture", "")).headline
        tasks = found["per_task"].values()
        return wanted if all(wanted in task for task in tasks) else "rougeL"

    def quality(self, split: str) -> dict[str, float]:
        """{task: its headline metric}."""
        name = self.metric(split)
        return {t: s[name] for t, s in self.report["splits"][split]["per_task"].items()}

    def categories(self, split: str) -> dict[str, str]:
        """{task: its category}."""
        tasks = self.report["splits"][split]["per_task"]
        return {name: scores.get("category") or "" for name, scores in tasks.items()}


# ------------------------------------------------------------------------------------- the command


def write_report(
    workdirs: Sequence[str | Path],
    out: str | Path,
    title: str = "hyper_t5",
    asked: str | Path = "",
) -> epath.Path:
    """Writes OUT/report.html and its pictures of evaluated runs; returns the page's path.

    ``asked``: a robustness.json, all of which is shown.

    Raises:
        UserError: a workdir was not evaluated, or its files are damaged.
    """
    runs = _named([read_run(path) for path in workdirs], workdirs)
    return write_page(runs, out, title, robustness.read(asked) if asked else {})


def write_page(
    runs: Sequence[Run],
    out: str | Path,
    title: str = "hyper_t5",
    asked: Mapping[str, Mapping[str, Any]] | None = None,
) -> epath.Path:
    """`write_report` of what was read; the names of runs are taken as they are."""
    place = files.as_path(out)
    parts = [section(runs, place) for section in SECTIONS]
    parts += [_reading(asked, place)] if asked else []
    parts += [section(runs, place) for section in DETAILS]
    page = PAGE.format(title=html.escape(title), body="\n".join(filter(None, parts)))
    files.write_text(place / "report.html", page)
    return place / "report.html"


def read_run(path: str | Path) -> Run:
    """A workdir's newest evaluation; or that of a metrics.json."""
    file = report_file(path)
    report = read_report(file)
    rows = _lines(file.with_name("predictions.jsonl"))
    stats = file.with_name("adapters.json")
    workdir = files.as_path(path)
    if not workdir.is_dir():
        workdir = files.as_path(report.get("workdir", path))
    return Run(
        report.get("name", report["system"]),
        report,
        rows,
        files.read_json(stats) if stats.exists() else {},
        _lines(workdir / metrics.JSONL),
    )


def _lines(file: epath.Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; none where there is no file. The last may be cut off."""
    if not file.exists():
        return []
    lines, made = files.read_bytes(file).splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            made.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise UserError(f"{file}, line {number}: not JSON; evaluate again") from None
    return made


def _named(runs: Sequence[Run], workdirs: Sequence[str | Path]) -> list[Run]:
    """Names that tell the runs apart: a system's where it is alone, else with the folder's."""
    names = [run.name for run in runs]
    return [
        dataclasses.replace(run, name=f"{run.name} ({Path(path).name})")
        if names.count(run.name) > 1
        else run
        for run, path in zip(runs, workdirs, strict=True)
    ]


# ------------------------------------------------------------------------------------ the sections


def _headline(runs: Sequence[Run], place: epath.Path) -> str:
    """Every split's overall metrics, and the bars of the one it is told by."""
    body = (
        "<p>Held-out tasks, generated or ranked as their benchmark says; all numbers are %, with "
        "their intervals over tasks (95 %, bootstrap).</p>"
    )
    lines = []
    for run in runs:
        for split, found in run.report["splits"].items():
            ends = found.get("intervals", {})
            told = {k: (v, ends.get(k)) for k, v in found["overall"].items()}
            lines.append({"system": run.name, "split": split, "tasks": found["tasks"], **told})
    body += table(lines)
    for split in _splits(runs):
        having = [run for run in runs if split in run.report["splits"]]
        body += f"<p>{html.escape(split)} is told by {html.escape(having[0].metric(split))}.</p>"
    reports = [{**run.report, "name": run.name} for run in runs]
    return section("Quality", body, plots.compare(reports, place / "quality.png", "exact_match"))


def _by_category(runs: Sequence[Run], place: epath.Path) -> str:
    made = ""
    for split in _splits(runs):
        values = {}
        for run in _with(runs, split):
            quality, groups = run.quality(split), run.categories(split)
            values[run.name] = {
                c: float(np.mean([v for t, v in quality.items() if groups[t] == c]))
                for c in dict.fromkeys(groups.values())
                if c
            }
        if any(len(found) > 1 for found in values.values()):
            metric = _with(runs, split)[0].metric(split)
            picture = place / f"categories_{split}.png"
            made += figure(
                plots.by_category(values, picture, f"{metric}, %: {split}", _colors(runs))
            )
    text = "<p>The mean over a category's tasks.</p>"
    return made and section("Quality by category", text + made)


def _gaps(runs: Sequence[Run], place: epath.Path) -> str:
    """To the text in front of every input, task by task; of several such runs the last."""
    base = next((run for run in reversed(runs) if run.report["system"] == CONCAT), None)
    if base is None:
        return ""
    differences = {
        run.name: protocols.differences(run.report, base.report)
        for run in runs
        if run is not base and run.report["system"] != CONCAT
    }
    made = ""
    for split in _splits([base]):
        metric, theirs, gaps, lines = base.metric(split), base.quality(split), {}, []
        for run in _with(runs, split):
            tasks, value, ends = differences.get(run.name, {}).get(split, {}).get(metric, (0, 0, 0))
            if tasks and run.metric(split) == metric:
                ours = run.quality(split)
                each = gaps[run.name] = [ours[t] - theirs[t] for t in ours if t in theirs]
                told = {"tasks": tasks, "difference": (value, ends)}
                counts = {"better": sum(x > 0 for x in each), "worse": sum(x < 0 for x in each)}
                lines.append({"system": run.name, **told, **counts})
        if gaps:
            label = f"{metric} less that of {base.name}"
            picture = plots.sorted_gaps(gaps, place / f"gaps_{split}.png", label, _colors(runs))
            made += f"<h3>{html.escape(split)}: {metric}</h3>" + table(lines) + figure(picture)
    text = f"<p>Over the same tasks, less {html.escape(base.name)}; intervals are of pairs.</p>"
    return made and section("Gap to the text in front of every input", text + made)


def _training(runs: Sequence[Run], place: epath.Path) -> str:
    panels: dict[str, dict[str, Any]] = {}
    for title, field in (("loss", "loss"), ("share of outputs right", "exact")):
        lines = {}
        for run in runs:
            found = [(x["step"], x[field]) for x in run.training if field in x and "step" in x]
            if found:
                lines[run.name] = tuple(zip(*found, strict=True))
        if lines:
            panels[title] = lines
    if not panels:
        return ""
    return section("Training", "", plots.training(panels, place / "training.png", _colors(runs)))


def _cost(runs: Sequence[Run], place: epath.Path) -> str:
    """Quality by FLOPs of an example (HINT's figure), and the numbers."""
    lines, points = [], {}
    for run in runs:
        flops, seconds = run.report.get("flops", {}), run.report.get("seconds", {})
        lines.append(
            {
                "system": run.name,
                "trained parameters": run.report.get("trained_parameters"),
                "generated for a task": run.report.get("generated_parameters"),
                "MFLOPs an example": _millions(flops.get("per_example")),
                "with the text in front": _millions(flops.get("concatenated")),
                "MFLOPs a task": _millions(flops.get("per_task")),
                "seconds of training": seconds.get("train"),
                "of evaluation": seconds.get("evaluate"),
            }
        )
        if flops.get("per_example"):
            quality = [v for split in run.report["splits"] for v in run.quality(split).values()]
            points[run.name] = (flops["per_example"] / 1e6, float(np.mean(quality)))
    label = "mean over the tasks of all splits, %"
    picture = plots.quality_by_cost(points, place / "cost.png", label) if points else None
    return section("Quality and compute", table(lines), picture)


def _adapters(runs: Sequence[Run], place: epath.Path) -> str:
    """What was generated: norms and ranks by layer, and how alike the tasks' adapters are."""
    made = ""
    for index, run in enumerate(runs):
        for split, stats in run.adapters.items():
            groups = run.categories(split) if split in run.report["splits"] else {}
            order = sorted(range(len(stats["tasks"])), key=lambda i: _group(stats, groups, i))
            maps = {
                title: np.asarray(stats[field])[np.ix_(order, order)]
                for title, field in (
                    ("cosine", "similarity"),
                    ("cosine of what differs from the mean", "similarity_centred"),
                )
            }
            names = [_group(stats, groups, i)[0] for i in order]
            panels = {
                title: {place: found[field] for place, found in stats["places"].items()}
                for title, field in (("norm", "norm"), ("effective rank", "effective_rank"))
            }
            made += (
                f"<h3>{html.escape(run.name)}, {html.escape(split)}</h3><p>"
                f"{len(stats['tasks'])} tasks; norm {np.mean(stats['norms']):.3g} "
                f"({np.min(stats['norms']):.3g} to {np.max(stats['norms']):.3g}); "
                f"{stats['differing']:.1%} of the squared norm differs from task to task.</p>"
                + figure(plots.by_layer(panels, place / f"layers_{index}_{split}.png"))
                + figure(plots.similarities(maps, names, place / f"alike_{index}_{split}.png"))
            )
    text = "<p>Of the matrices that an adapter adds; 0 % differing: the text is ignored.</p>"
    return made and section("Generated adapters", text + made)


def _group(stats: Mapping[str, Any], groups: Mapping[str, str], i: int) -> tuple[str, str]:
    task = stats["tasks"][i]
    return groups.get(task) or task, task


def _reading(asked: Mapping[str, Mapping[str, Any]], place: epath.Path) -> str:
    """Whether the runs of a robustness.json read their text; what it rests on is folded away."""
    body = ""
    for name, run in asked.items():
        said = "".join(f"<li>{html.escape(verdict)}</li>" for verdict in run["verdicts"])
        lines = []
        for change, told in run["askings"].items():
            line = {"change": change, "examples": told["shown"], "quality": told["quality"]}
            if change != told["base"]:
                line["difference"] = (told["difference"], told["interval"])
                line |= {"same answers": told["same_answers"], "to": told["base"]}
            lines.append(line)
        summary = f"<summary>{len(lines)} ways to ask</summary>"
        body += (
            f"<h3>{html.escape(name)}</h3><ul>{said}</ul><details>{summary}{table(lines)}</details>"
        )
    picture = plots.robustness(asked, place / "robustness.png")
    return section("Whether the text is read", body, picture)


def _tasks(runs: Sequence[Run], place: epath.Path) -> str:
    made = ""
    for split in _splits(runs):
        having = _with(runs, split)
        tasks = dict.fromkeys(task for run in having for task in run.quality(split))
        groups = {t: c for run in having for t, c in run.categories(split).items()}
        lines = [
            {"task": task, "category": groups[task]}
            | {run.name: run.quality(split).get(task) for run in having}
            for task in tasks
        ]
        metric = having[0].metric(split)
        summary = f"{html.escape(split)}: {metric} of {len(tasks)} tasks"
        made += f"<details><summary>{summary}</summary>{table(lines)}</details>"
    return section("Task by task", made)


def _samples(runs: Sequence[Run], place: epath.Path) -> str:
    """What the runs said to some rows of each split, one a task, evenly chosen."""
    made = ""
    for split in _splits(runs):
        said: dict[tuple[str, str], dict[str, Any]] = {}
        for run in runs:
            for row in run.rows:
                if row["split"] == split:
                    key = (row["task"], str(row["id"]))
                    line = {
                        "task": row["task"],
                        "input": row["input"],
                        "references": " | ".join(row["references"]),
                    }
                    said.setdefault(key, line)[run.name] = row["prediction"]
        first = list({task: line for (task, _), line in reversed(said.items())}.values())
        places = np.linspace(0, len(first) - 1, min(SAMPLES, len(first)), dtype=int)
        chosen = [first[i] for i in places]
        summary = f"{html.escape(split)}: {len(chosen)} rows"
        made += f"<details><summary>{summary}</summary>{table(chosen)}</details>" if chosen else ""
    return made and section("What was said", made)


SECTIONS: tuple[Callable[[Sequence[Run], epath.Path], str], ...] = (
    _headline,
    _by_category,
    _gaps,
    _training,
    _cost,
    _adapters,
)
DETAILS = (_tasks, _samples)  # folded away, behind all else


# ------------------------------------------------------------------------------------------- HTML


def section(title: str, body: str, picture: str | Path | None = None) -> str:
    """A part of the page; ``picture`` is a PNG file, shown first."""
    shown = figure(picture) if picture is not None else ""
    return f"<h2>{html.escape(title)}</h2>\n{shown}\n{body}"


def figure(path: str | Path) -> str:
    """A PNG file as a part of the page itself."""
    file = files.as_path(path)
    data = base64.b64encode(files.read_bytes(file)).decode()
    return f'<p><img alt="{html.escape(file.stem)}" src="data:image/png;base64,{data}"></p>'


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines that may lack some of the columns; texts are escaped, numbers rounded."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    rows = ("".join(_cell(line.get(name)) for name in columns) for line in lines)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def _cell(value: Any) -> str:
    if value is None:
        return "<td>-</td>"
    if isinstance(value, str):
        return f'<td class="text">{html.escape(value)}</td>'
    if isinstance(value, tuple):  # with its interval
        value, ends = value
        return f"<td>{value:.1f}{f' [{ends[0]:.1f}, {ends[1]:.1f}]' if ends else ''}</td>"
    return f"<td>{value:,}</td>" if isinstance(value, int) else f"<td>{value:,.1f}</td>"


def _millions(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def _colors(runs: Sequence[Run]) -> dict[str, Any]:
    return plots.colors([run.name for run in runs])


def _splits(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(split for run in runs for split in run.report["splits"]))


def _with(runs: Sequence[Run], split: str) -> list[Run]:
    return [run for run in runs if split in run.report["splits"]]
