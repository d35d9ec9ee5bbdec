"""Pictures of results. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5 import files
from hyper_t5.errors import UserError


def compare(
    reports: Sequence[dict[str, Any]], path: str | Path, metric: str = "strict_match"
) -> str | Path:
    """Bars of one metric, a group a split and a bar a system (reports of ``evaluate``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = list(dict.fromkeys(s for r in reports for s in r["splits"]))
    wide = min(2.2 * len(splits) * max(1, len(reports) / 4), 14)
    figure, axes = pyplot.subplots(figsize=(2 + wide, 4))
    width = 0.8 / len(reports)
    colors = pyplot.get_cmap("tab10" if len(reports) <= 10 else "tab20").colors
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
            color=colors[index % len(colors)],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(splits)), [s.replace("_", " ") for s in splits])
    axes.set_ylabel(f"{metric.replace('_', ' ')}, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return save(figure, path)


def quality_by_cost(points: Mapping[str, tuple[float, float]], path: str | Path) -> str | Path:
    """A labelled point a system: (MFLOPs per example, on a logarithmic scale, exact match in %)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6))
    axes.scatter(*zip(*points.values(), strict=True), s=18)
    for group in _near(points):
        # Labels stand right of all points of about this cost, one above the other.
        x, height = max(points[name][0] for name in group) * 1.05, -9.0
        free = 104.0 - 3.5 * len(group)
        for name in group:
            free += 3.5
            height = max(height + 3.5, min(points[name][1], free))
            axes.annotate(
                name,
                points[name],
                (x, height),
                fontsize=8,
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "grey", "relpos": (0, 0.5)},
            )
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", length=4, pad=4)
    axes.set_ylim(-9, 108)
    axes.set_xlabel("MFLOPs per example")
    axes.set_ylabel("exact match, %")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save(figure, path)


def _near(points: Mapping[str, tuple[float, float]], ratio: float = 1.2) -> list[list[str]]:
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
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot

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


def ratios(bars: Mapping[str, float], path: str | Path) -> str | Path:
    """One bar a ratio (``bench``), on a logarithmic scale around 1: to the right is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
