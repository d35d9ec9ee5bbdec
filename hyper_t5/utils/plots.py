"""Figures of results. Matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.utils import files

File = str | Path
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # name -> (x, y)


def headless() -> Any:
    """Return matplotlib's pyplot, set up to draw to files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def colors(names: Sequence[str]) -> dict[str, Any]:
    """Return a color for each name, the same in every figure of these names."""
    palette = headless().get_cmap("tab10" if len(names) <= 10 else "tab20").colors
    return {name: palette[i % len(palette)] for i, name in enumerate(names)}


def save(figure: Any, path: File) -> File:
    """Write a figure as PNG and close it; UserError when it cannot be written."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    headless().close(figure)
    files.write_atomic(path, png.getvalue())
    return path


def _panels(titles: Sequence[str], width: float, height: float, **options: Any) -> Any:
    """Return a figure of a size in inches and its panels, by default in one row."""
    options = {"ncols": len(titles), "squeeze": False, "layout": "constrained"} | options
    figure, grid = headless().subplots(figsize=(width, height), **options)
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, list(grid.flat)


def _line_panels(
    panels: Mapping[str, Lines], width: float, xlabel: str, color: Mapping[str, Any], **style: Any
) -> Any:
    figure, row = _panels(list(panels), width, 3.6)
    for axes, lines in zip(row, panels.values(), strict=True):
        for name, (x, y) in lines.items():
            axes.plot(x, y, label=name, color=color[name], **style)
        axes.set_xlabel(xlabel)
    _legend_outside(row[-1])
    return figure, row


def _legend_outside(axes: Any) -> None:
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with numbers such as 20, also between powers of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("{x:g}")


def compare(reports: Sequence[dict[str, Any]], path: File, metric: str = "strict_match") -> File:
    """Draw one metric of `evaluate`'s reports as bars: a group per split, a bar per system."""
    splits = list(dict.fromkeys(split for report in reports for split in report["splits"]))
    width = 4 + min(2.2 * len(splits) * max(1, len(reports) / 4), 14)
    figure, [axes] = _panels([""], width, 4)
    bar = 0.8 / len(reports)
    palette = list(colors([str(i) for i in range(len(reports))]).values())
    for index, report in enumerate(reports):
        positions = [i for i, split in enumerate(splits) if split in report["splits"]]
        bars = axes.bar(
            [i + (index - (len(reports) - 1) / 2) * bar for i in positions],
            [report["splits"][splits[i]]["overall"][metric] for i in positions],
            bar * 0.95,
            label=report.get("name", report["system"]),
            color=palette[index],
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(splits)), [split.replace("_", " ") for split in splits])
    axes.set_ylabel(f"{metric.replace('_', ' ')}, %")
    axes.set_ylim(0, 108)
    _legend_outside(axes)
    return save(figure, path)


def quality_by_cost(
    points: Mapping[str, tuple[float, float]], path: File, ylabel: str = "exact match, %"
) -> File:
    """Draw a point per system: (MFLOPs per example, on a logarithmic scale; quality in %)."""
    figure, [axes] = _panels([""], 8, 4.5)
    palette = colors(list(points))
    for name, (cost, quality) in points.items():
        axes.plot([cost], [quality], "o", label=name, color=palette[name], alpha=0.8)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.margins(0.1)
    axes.set(xlabel="MFLOPs per example", ylabel=ylabel)
    _legend_outside(axes)
    return save(figure, path)


def by_category(
    values: Mapping[str, Mapping[str, float]], path: File, xlabel: str, color: Mapping[str, Any]
) -> File:
    """Draw {system: {category: number}}: a line per category, a point per system."""
    categories = sorted({c for numbers in values.values() for c in numbers}, reverse=True)
    figure, [axes] = _panels([""], 8, 1.2 + 0.24 * len(categories))
    for name, numbers in values.items():
        rows = [i for i, category in enumerate(categories) if category in numbers]
        style = {"markersize": 5, "label": name, "color": color[name]}
        axes.plot([numbers[categories[i]] for i in rows], rows, "o", **style)
    axes.set_yticks(range(len(categories)), [c.replace("_", " ") for c in categories], fontsize=8)
    axes.set_ylim(-0.6, len(categories) - 0.4)
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", linewidth=0.3)
    _legend_outside(axes)
    return save(figure, path)


def sorted_gaps(
    gaps: Mapping[str, Sequence[float]], path: File, ylabel: str, color: Mapping[str, Any]
) -> File:
    """Draw the differences of each system's tasks to a baseline, in increasing order."""
    lines = {name: (range(1, len(values) + 1), sorted(values)) for name, values in gaps.items()}
    xlabel = "tasks, from the worst difference to the best"
    figure, [axes] = _line_panels({"": lines}, 8, xlabel, color, drawstyle="steps-mid")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(ylabel)
    return save(figure, path)


def against(
    panels: Mapping[str, Mapping[str, Mapping[str, Any]]], baseline: str, path: File
) -> File:
    """Draw {title: {system: {mean, seeds, interval}}}: a panel per title, a line per system.

    The interval is that of the difference to ``baseline``, drawn around the baseline's mean: a mean
    outside its interval differs from the baseline.
    """
    systems = list(next(iter(panels.values())))
    figure, row = _panels([""] * len(panels), 5.5 * len(panels), 1 + 0.28 * len(systems))
    for axes, (title, results) in zip(row, panels.items(), strict=True):
        base = results[baseline]["mean"]
        axes.axvline(base, color="grey", linewidth=0.8)
        for y, name in enumerate(systems):
            result = results[name]
            if ends := result.get("interval"):
                axes.plot([base + end for end in ends], [-y, -y], "-", color="C0", linewidth=1)
            axes.plot(result["seeds"], [-y] * len(result["seeds"]), "o", color="C0", alpha=0.35)
            axes.plot([result["mean"]], [-y], "|", color="C0", markersize=13, markeredgewidth=2)
        axes.set_yticks([-y for y in range(len(systems))], systems, fontsize=9)
        axes.set_xlabel(title, fontsize=10)
    return save(figure, path)


def curves(
    steps: Sequence[int],
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    path: File,
    xlabel: str,
    ylabel: str,
) -> File:
    """Draw {title: {line: a sequence of values per run}} over steps: means and ranges of runs."""
    shape = {"nrows": -(-len(panels) // 2), "ncols": min(2, len(panels))}
    size = 1 + 4.5 * shape["ncols"], 1 + 2.8 * shape["nrows"]
    figure, grid = _panels(list(panels), *size, sharex=True, sharey=True, **shape)
    for axes, lines in zip(grid, panels.values(), strict=False):
        for name, runs in lines.items():
            values = np.asarray(runs)
            (line,) = axes.plot(steps, values.mean(0), marker="o", markersize=3, label=name)
            band = {"color": line.get_color(), "alpha": 0.2}
            axes.fill_between(steps, values.min(0), values.max(0), **band)
        axes.set_xscale("symlog", linthresh=max(1, min(step for step in steps if step)))
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.set_xticks([], minor=True)
        axes.set_ylim(-3, 103)
    grid[0].legend(fontsize=8, frameon=False)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    return save(figure, path)


def training(panels: Mapping[str, Lines], path: File, color: Mapping[str, Any]) -> File:
    """Draw {title: {run: (steps, values)}}: a panel per title, a line per run."""
    figure, _ = _line_panels(panels, 1 + 4.5 * len(panels), "steps", color, linewidth=1)
    return save(figure, path)


def by_layer(panels: Mapping[str, Mapping[str, Sequence[float]]], path: File) -> File:
    """Draw {title: {adapter site: a number per layer}}: a panel per title, a line per site."""
    lines = {
        title: {site: (range(len(values)), values) for site, values in sites.items()}
        for title, sites in panels.items()
    }
    color = colors(list(dict.fromkeys(site for sites in panels.values() for site in sites)))
    figure, row = _line_panels(lines, 3 + 4.2 * len(lines), "layer", color, marker=".")
    for axes in row:
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return save(figure, path)


def similarities(maps: Mapping[str, Any], groups: Sequence[str], path: File) -> File:
    """Draw matrices of cosines between tasks, a map per title; ``groups`` names each task's."""
    figure, row = _panels(list(maps), 1 + 5 * len(maps), 5)
    starts = [i for i, group in enumerate(groups) if i == 0 or groups[i - 1] != group]
    for axes, values in zip(row, maps.values(), strict=True):
        image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, fraction=0.046)
    row[0].set_yticks(starts, [groups[i] for i in starts], fontsize=6)
    return save(figure, path)


def robustness(runs: Mapping[str, Mapping[str, Any]], path: File) -> File:
    """Draw {run: results of robustness.json}: quality by examples, and effects of perturbations."""
    conditions = {name: run["conditions"] for name, run in runs.items()}
    every = [line for lines in conditions.values() for line in lines.items()]
    perturbed = list(dict.fromkeys(name for name, line in every if line["changed"] != "nothing"))
    height = 1.6 + 0.5 * max(len(perturbed), 4)
    figure, (left, right) = _panels(["", ""], 12, height, width_ratios=(2, 3))
    palette = colors(list(runs))
    for index, (run, lines) in enumerate(conditions.items()):
        color = palette[run]
        unchanged = [line for line in lines.values() if line["changed"] == "nothing"]
        shots = sorted((x["shots"], x["quality"]) for x in unchanged if x["base"] == "unchanged")
        left.plot(*zip(*shots, strict=True), "o-", markersize=3, label=run, color=color)
        for row, name in enumerate(perturbed):
            if line := lines.get(name):
                y, value = -row - 0.6 * (index + 0.5) / len(runs) + 0.3, line["difference"]
                right.plot(line["interval"] or (value, value), [y, y], color=color, linewidth=1.5)
                right.plot([value], [y], "o", color=color, markersize=5)
    counts = sorted({line["shots"] for _, line in every})
    left.set_xscale("symlog", linthresh=1, base=2)
    left.set_xticks(counts, [str(count) for count in counts])
    left.set(xlabel="examples", ylabel="mean over tasks, %", ylim=(-3, 103))
    left.legend(fontsize=8, frameon=False)
    right.axvline(0, color="grey", linewidth=0.8)
    right.set_yticks([-row for row in range(len(perturbed))], perturbed, fontsize=9)
    right.set_xlabel("difference to unchanged text, 95 % interval over tasks")
    return save(figure, path)


def ratios(bars: Mapping[str, float], path: File) -> File:
    """Draw one bar per ratio of `bench`, on a logarithmic scale around 1: right is better."""
    figure, [axes] = _panels([""], 8, 1 + 0.3 * len(bars))
    rows = range(len(bars), 0, -1)
    patches = axes.barh(rows, [max(ratio, 1e-3) - 1 for ratio in bars.values()], 0.7, left=1)
    axes.bar_label(patches, [f"{ratio:.3g}" for ratio in bars.values()], fontsize=8, padding=3)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    _plain_numbers(axes.xaxis)
    axes.margins(x=0.15)
    axes.set_yticks(rows, list(bars), fontsize=8)
    axes.set_xlabel("times better than the baseline")
    axes.spines["left"].set_visible(False)
    return save(figure, path)


def break_even(curves: Sequence[Mapping[str, Any]], path: File) -> File:
    """Draw milliseconds per example by inputs per task, and where each method breaks even.

    ``curves`` are fields of `bench.measure.Curve`, a panel for each value of ``panel``.
    """
    titles = list(dict.fromkeys(curve["panel"] for curve in curves))
    figure, row = _panels(titles, 1 + 5 * len(titles), 4)
    for axes, title in zip(row, titles, strict=True):
        _break_even_panel(axes, [curve for curve in curves if curve["panel"] == title])
    _legend_outside(row[-1])
    return save(figure, path)


def _break_even_panel(axes: Any, curves: Sequence[Mapping[str, Any]]) -> None:
    """Draw measured points, and a line by the costs of a task and a row at the outer two."""
    for index, curve in enumerate(curves):
        counts, times = np.array(curve["counts"]), 1e3 * np.array(curve["seconds"])
        per_task = (times[0] - times[-1]) / (1 / counts[0] - 1 / counts[-1])
        n, color = np.geomspace(counts[0], counts[-1], 100), f"C{index}"
        fitted = times[-1] + per_task * (1 / n - 1 / counts[-1])
        axes.plot(n, fitted, color=color, linewidth=1)
        axes.plot(counts, times, "o", color=color, label=curve["arm"])
        if (count := curve["break_even"]) is not None and count >= counts[0]:
            axes.axvline(count, color=color, linestyle=":", linewidth=1)
    baseline = 1e3 * curves[0]["baseline_seconds"]
    axes.axhline(baseline, color="black", linestyle="--", label=curves[0]["baseline"])
    axes.set(xscale="log", yscale="log", xlabel="inputs per task", ylabel="ms per example")
    axes.xaxis.set_major_formatter("{x:g}")
    _plain_numbers(axes.yaxis)
    axes.tick_params(axis="y", which="minor", labelsize=7)
