"""Pictures of results. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5 import files
from hyper_t5.errors import UserError


def colors(names: Sequence[str]) -> dict[str, Any]:
    """A color for each, the same in every picture of these."""
    palette = headless().get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def compare(
    reports: Sequence[dict[str, Any]], path: str | Path, metric: str = "strict_match"
) -> str | Path:
    """Bars of one metric, a group a split and a bar a system (reports of ``evaluate``)."""
    pyplot = headless()
    splits = list(dict.fromkeys(s for r in reports for s in r["splits"]))
    wide = min(2.2 * len(splits) * max(1, len(reports) / 4), 14)
    figure, axes = pyplot.subplots(figsize=(4 + wide, 4), layout="constrained")
    width = 0.8 / len(reports)
    palette = list(colors([str(i) for i in range(len(reports))]).values())
    for index, report in enumerate(reports):
        found = [
            (i, report["splits"][s]["overall"][metric])
            for i, s in enumerate(splits)
            if s in report["splits"]
        ]
        places = [i + (index - (len(reports) - 1) / 2) * width for i, _ in found]
        bars = axes.bar(
            places,
            [v for _, v in found],
            width * 0.95,
            label=report.get("name", report["system"]),
            color=palette[index],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(splits)), [s.replace("_", " ") for s in splits])
    axes.set_ylabel(f"{metric.replace('_', ' ')}, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def quality_by_cost(
    points: Mapping[str, tuple[float, float]], path: str | Path, ylabel: str = "exact match, %"
) -> str | Path:
    """A labelled point a system: (MFLOPs per example, on a logarithmic scale, quality in %)."""
    pyplot = headless()
    figure, axes = pyplot.subplots(figsize=(10, 6))
    axes.scatter(*zip(*points.values(), strict=True), s=18)
    top = min(100.0, 1.5 * max(1.0, *(quality for _, quality in points.values())))
    line = 0.035 * top  # a label's height
    for group in _near(points):
        # Labels stand right of all points of about this cost, one above the other.
        x, height = max(points[name][0] for name in group) * 1.05, -0.09 * top
        free = 1.04 * top - line * len(group)
        for name in group:
            free += line
            height = max(height + line, min(points[name][1], free))
            axes.annotate(
                name,
                points[name],
                (x, height),
                fontsize=8,
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey", "relpos": (0, 0.5)},
            )
    axes.set_xscale("log")
    costs = [cost for cost, _ in points.values()]
    wide = max(max(costs) / min(costs), 1.5)  # room for labels also where all cost the same
    axes.set_xlim(min(costs) / wide**0.3, max(costs) * wide**0.5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", length=4, pad=4)
    axes.set_ylim(-0.09 * top, 1.08 * top)
    axes.set_xlabel("MFLOPs per example")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save(figure, path)


def _near(points: Mapping[str, tuple[float, float]], ratio: float = 1.3) -> list[list[str]]:
    """The names of points whose first numbers differ by little, each group from below upwards."""
    groups: list[list[str]] = []
    for name in sorted(points, key=lambda name: points[name]):
        if groups and points[name][0] <= ratio * points[groups[-1][0]][0]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [sorted(group, key=lambda name: points[name][1]) for group in groups]


def curves(
    steps: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    path: str | Path,
    xlabel: str,
    ylabel: str,
) -> str | Path:
    """Lines over steps, a panel a title; of several runs of a line the mean, and their range."""
    import numpy as np

    pyplot = headless()
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    shape = {"figsize": (1 + 4.5 * columns, 1 + 2.8 * rows), "squeeze": False}
    figure, grid = pyplot.subplots(rows, columns, sharex=True, sharey=True, **shape)
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, runs in lines.items():
            values = np.asarray(runs)
            (line,) = axes.plot(steps, values.mean(0), marker="o", markersize=3, label=name)
            axes.fill_between(
                steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.2
            )
        axes.set_title(title, fontsize=10)
        axes.set_xscale("symlog", linthresh=max(1, min(s for s in steps if s)))
        axes.set_xticks(steps, [str(s) for s in steps])
        axes.set_xticks([], minor=True)
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(fontsize=8, frameon=False)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    figure.tight_layout()
    return save(figure, path)


def by_category(
    values: Mapping[str, Mapping[str, float]],
    path: str | Path,
    xlabel: str,
    color: Mapping[str, Any],
) -> str | Path:
    """A line a category and a point a system in it: {system: {category: number}}."""
    pyplot = headless()
    categories = sorted({c for found in values.values() for c in found}, reverse=True)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.24 * len(categories)), layout="constrained")
    for name, found in values.items():
        places = [i for i, c in enumerate(categories) if c in found]
        numbers = [found[categories[i]] for i in places]
        axes.plot(numbers, places, "o", markersize=5, label=name, color=color[name])
    axes.set_yticks(range(len(categories)), [c.replace("_", " ") for c in categories], fontsize=8)
    axes.set_ylim(-0.6, len(categories) - 0.4)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def sorted_gaps(
    gaps: Mapping[str, Sequence[float]], path: str | Path, ylabel: str, color: Mapping[str, Any]
) -> str | Path:
    """For each system the differences of its tasks to another, from the worst to the best."""
    pyplot = headless()
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    for name, values in gaps.items():
        style = {"drawstyle": "steps-mid", "label": name, "color": color[name]}
        axes.plot(range(1, len(values) + 1), sorted(values), **style)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("tasks, from the worst difference to the best")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def training(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | Path,
    color: Mapping[str, Any],
) -> str | Path:
    """{title: {run: (steps, values)}}: a panel a title, a line a run."""
    pyplot = headless()
    shape = {"figsize": (1 + 4.5 * len(panels), 3.6), "squeeze": False, "layout": "constrained"}
    figure, grid = pyplot.subplots(1, len(panels), **shape)
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for name, (steps, values) in lines.items():
            axes.plot(steps, values, linewidth=1, label=name, color=color[name])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("steps")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, -1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]], path: str | Path) -> str | Path:
    """{title: {place: a number a layer}}: a panel a title, a line a place of adapters."""
    pyplot = headless()
    shape = {"figsize": (3 + 4.2 * len(panels), 3.6), "squeeze": False, "layout": "constrained"}
    figure, grid = pyplot.subplots(1, len(panels), **shape)
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        colors = pyplot.get_cmap("tab20").colors
        for index, (place, values) in enumerate(lines.items()):
            axes.plot(values, "o-", markersize=3, color=colors[index % 20], label=place)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, -1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return save(figure, path)


def similarities(maps: Mapping[str, Any], groups: Sequence[str], path: str | Path) -> str | Path:
    """Cosines of every two tasks, a map a title; ``groups`` names each task's, which are joined."""
    pyplot = headless()
    figure, grid = pyplot.subplots(
        1, len(maps), figsize=(1 + 5 * len(maps), 5), layout="constrained", squeeze=False
    )
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
    for axes, (title, values) in zip(grid[0], maps.items(), strict=True):
        drawn = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set_title(title, fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(drawn, ax=axes, fraction=0.046)
    grid[0, 0].set_yticks(starts, [groups[i] for i in starts], fontsize=6)
    return save(figure, path)


def robustness(runs: Mapping[str, Mapping[str, Any]], path: str | Path) -> str | Path:
    """Quality by number of examples, and what other changes of the text cost, with intervals.

    ``runs``: name -> what was found of it, as in robustness.json.
    """
    pyplot = headless()
    asked = {name: run["askings"] for name, run in runs.items()}
    changes = list(
        dict.fromkeys(
            name for told in asked.values() for name, x in told.items() if x["changed"] != "nothing"
        )
    )
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(12, 1.6 + 0.5 * max(len(changes), 4)), width_ratios=(2, 3)
    )
    palette = colors(list(runs))
    for index, (name, told) in enumerate(asked.items()):
        shots = sorted(
            (x["shots"], x["quality"])
            for x in told.values()
            if x["base"] == "unchanged" and x["changed"] == "nothing"
        )
        color = palette[name]
        left.plot(*zip(*shots, strict=True), "o-", markersize=3, label=name, color=color)
        for place, change in enumerate(changes):
            if change not in told:
                continue
            x, at = told[change], -place - 0.6 * (index + 0.5) / len(runs) + 0.3
            low, high = x["interval"] or (x["difference"], x["difference"])
            right.plot([low, high], [at, at], "-", color=color, linewidth=1.5)
            right.plot([x["difference"]], [at], "o", color=color, markersize=5)
    counts = sorted({x["shots"] for told in asked.values() for x in told.values()})
    left.set_xscale("symlog", linthresh=1, base=2)
    left.set_xticks(counts, [str(count) for count in counts])
    left.set_xlabel("examples asked for", fontsize=10)
    left.set_ylabel("mean over tasks, %", fontsize=10)
    left.set_ylim(-3, 103)
    left.legend(fontsize=8, frameon=False)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks([-place for place in range(len(changes))], changes, fontsize=9)
    right.set_xlabel("difference to unchanged text, 95 % interval over tasks", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save(figure, path)


def against(
    panels: Mapping[str, Mapping[str, Mapping[str, Any]]], other: str, path: str | Path
) -> str | Path:
    """A panel a title, a line a system: its seeds, their mean, and how sure it differs from other.

    ``panels``: title -> system -> {mean, seeds, and interval: of the difference to ``other``}. The
    interval is drawn about other's mean, so that one that does not touch its line is a difference.
    """
    pyplot = headless()
    systems = list(next(iter(panels.values())))
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 1 + 0.28 * len(systems)), squeeze=False
    )
    for axes, (title, told) in zip(row[0], panels.items(), strict=True):
        base = told[other]["mean"]
        axes.axvline(base, color="grey", linewidth=0.8)
        for place, name in enumerate(systems):
            found = told[name]
            if ends := found.get("interval"):
                axes.plot([base + e for e in ends], [-place, -place], "-", color="C0", linewidth=1)
            axes.plot(found["seeds"], [-place] * len(found["seeds"]), "o", color="C0", alpha=0.35)
            axes.plot([found["mean"]], [-place], "|", color="C0", markersize=13, markeredgewidth=2)
        axes.set_yticks([-place for place in range(len(systems))], systems, fontsize=9)
        axes.set_xlabel(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save(figure, path)


def ratios(bars: Mapping[str, float], path: str | Path) -> str | Path:
    """One bar a ratio (``bench``), on a logarithmic scale around 1: to the right is better."""
    pyplot = headless()
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(bars)))
    places = range(len(bars), 0, -1)
    drawn = axes.barh(places, [max(r, 1e-3) - 1 for r in bars.values()], 0.7, left=1)
    axes.bar_label(drawn, [f"{r:.3g}" for r in bars.values()], fontsize=8, padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.margins(x=0.15)
    axes.set_yticks(places, list(bars), fontsize=8)
    axes.set_xlabel("times better than what it is measured against")
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.tight_layout()
    return save(figure, path)


def break_even(curves: Sequence[Mapping[str, Any]], path: str | Path) -> str | Path:
    """Milliseconds an example by inputs a task, a panel each, and a mark where an arm pays.

    ``curves`` are those of ``bench.measure.Curve``, as dictionaries.
    """
    pyplot = headless()
    panels = list(dict.fromkeys(curve["panel"] for curve in curves))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(1 + 5 * len(panels), 4), squeeze=False)
    for axes, panel in zip(grid[0], panels, strict=True):
        _curves(axes, [curve for curve in curves if curve["panel"] == panel])
        axes.set_title(panel, fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return save(figure, path)


def _curves(axes: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Points that were measured; a line by what a generation and a row take in the outer two."""
    import numpy as np

    for index, curve in enumerate(curves):
        counts, times = np.array(curve["counts"]), 1e3 * np.array(curve["seconds"])
        once = (times[0] - times[-1]) / (1 / counts[0] - 1 / counts[-1])
        n, color = np.geomspace(counts[0], counts[-1], 100), f"C{index}"
        axes.plot(n, times[-1] + once * (1 / n - 1 / counts[-1]), color=color, linewidth=1)
        axes.plot(counts, times, "o", color=color, label=curve["arm"])
        if (pays := curve["break_even"]) is not None and pays >= counts[0]:
            axes.axvline(pays, color=color, linestyle=":", linewidth=1)
    level = 1e3 * curves[0]["baseline_seconds"]
    axes.axhline(level, color="black", linestyle="--", label=curves[0]["baseline"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.set_xlabel("inputs a task")
    axes.set_ylabel("milliseconds an example")
    axes.spines[["top", "right"]].set_visible(False)


def headless() -> Any:
    """matplotlib's pyplot, drawing to files alone."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: str | Path) -> str | Path:
    """Writes a figure, here or to a bucket, and closes it; UserError where it cannot be written."""
    from matplotlib import pyplot

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    pyplot.close(figure)
    try:
        files.write_bytes(files.as_path(path), drawn.getvalue())
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from e
    return path
