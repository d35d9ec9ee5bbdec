"""Pictures of results. matplotlib is imported when one is drawn, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5.errors import UserError


def compare(
    reports: Sequence[dict[str, Any]], path: str | Path, metric: str = "strict_match"
) -> Path:
    """Bars of one metric, a group a split and a bar a system (reports of ``evaluate``)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    splits = list(dict.fromkeys(s for r in reports for s in r["splits"]))
    figure, axes = pyplot.subplots(figsize=(2 + 2.2 * len(splits) * max(1, len(reports) / 4), 4))
    width = 0.8 / len(reports)
    for index, report in enumerate(reports):
        found = [
            (i, report["splits"][s]["overall"][metric])
            for i, s in enumerate(splits)
            if s in report["splits"]
        ]
        places = [i + (index - (len(reports) - 1) / 2) * width for i, _ in found]
        bars = axes.bar(
            places, [v for _, v in found], width * 0.95, label=report.get("name", report["system"])
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(splits)), [s.replace("_", " ") for s in splits])
    axes.set_ylabel(f"{metric.replace('_', ' ')}, %")
    axes.set_ylim(0, 108)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.tight_layout()
    return _save(figure, Path(path))


def ratios(bars: Mapping[str, float], path: str | Path) -> Path:
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
    return _save(figure, Path(path))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from e
    finally:
        pyplot.close(figure)
    return path
