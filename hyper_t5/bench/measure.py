"""Rows, tables, and timing in turns. Imports no JAX, which the benchmarks' parent does not need."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """``arm`` against ``baseline`` in one respect.

    ``ratio`` is how many times better the arm is: of the two medians, or of two exact numbers.
    ``low`` and ``high`` are its extremes over the rounds.
    """

    what: str
    unit: str
    arm: str
    value: float
    baseline: str
    baseline_value: float
    ratio: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Curve:
    """Seconds an example by ``counts`` of inputs a task, and the inputs from where on it pays.

    ``break_even`` is the median over the rounds, ``low`` and ``high`` are its extremes, None stands
    for never; ``by_flops`` is what the FLOPs alone would make it. ``panel`` names what all curves
    of one picture have in common.
    """

    panel: str
    arm: str
    baseline: str
    counts: list[int]
    seconds: list[float]
    baseline_seconds: float
    break_even: float | None
    low: float | None
    high: float | None
    by_flops: float | None


@dataclasses.dataclass
class Result:
    """One benchmark's table, with what one must know to read it."""

    name: str
    title: str
    notes: list[str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    skipped: str = ""

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Result:
        """The inverse of ``dataclasses.asdict``."""
        rows = [Row(**row) for row in content["rows"]]
        curves = [Curve(**curve) for curve in content["curves"]]
        return cls(**{**content, "rows": rows, "curves": curves})


def in_turns(
    arms: Mapping[str, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each arm's call in each round, [rounds] an arm; every call must wait for its end.

    The order turns round from one round to the next: a machine that gets slower or faster on the
    way favours none.
    """
    for _ in range(warm_up):
        for run in arms.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for index in range(rounds):
        for name in list(arms)[:: 1 if index % 2 == 0 else -1]:
            started = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - started)
        tell(f"round {index + 1}/{rounds}", {name: times[-1] for name, times in seconds.items()})
    return seconds


def tell(what: str, seconds: Mapping[str, float]) -> None:
    """Progress, to stderr: what was just measured; a benchmark may take many minutes."""
    told = ", ".join(f"{name} {time:.3g} s" for name, time in seconds.items())
    print(f"  {what}: {told}", file=sys.stderr, flush=True)


def time_row(what: str, seconds: Mapping[str, Sequence[float]], arm: str, baseline: str) -> Row:
    """Seconds a call; twice as fast is a ratio of 2."""
    each = [b / a for a, b in zip(seconds[arm], seconds[baseline], strict=True)]
    value, other = (statistics.median(seconds[name]) for name in (arm, baseline))
    return Row(what, "s", arm, value, baseline, other, other / value, min(each), max(each))


def rate_row(
    what: str,
    unit: str,
    seconds: Mapping[str, Sequence[float]],
    amounts: Mapping[str, float],
    arm: str,
    baseline: str,
) -> Row:
    """``amounts`` a call, in a ``unit`` such as 'examples/s'; twice as many is a ratio of 2."""
    row = time_row(what, seconds, arm, baseline)
    factor = amounts[arm] / amounts[baseline]
    return Row(
        what,
        unit,
        arm,
        amounts[arm] / row.value,
        baseline,
        amounts[baseline] / row.baseline_value,
        row.ratio * factor,
        row.low * factor,
        row.high * factor,
    )


def exact_row(what: str, unit: str, sizes: Mapping[str, float], arm: str, baseline: str) -> Row:
    """Numbers that do not vary; half as many is a ratio of 2."""
    value, other = sizes[arm], sizes[baseline]
    return Row(what, unit, arm, value, baseline, other, *[other / value] * 3)


def memory_row(what: str, sizes: Mapping[str, int], arm: str, baseline: str) -> Row:
    """Bytes; half as many is a ratio of 2."""
    return exact_row(what, "MiB", {k: v / 2**20 for k, v in sizes.items()}, arm, baseline)


def machine() -> str:
    """The processor, as far as the system tells, and how many cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.machine()}, {cores} cores"


def table(result: Result) -> str:
    """Markdown: title, notes, one line a row."""
    lines = [f"## {result.name}: {result.title}", ""]
    if result.skipped:
        return "\n".join([*lines, f"SKIPPED: {result.skipped}", ""])
    lines += [*(f"- {note}" for note in result.notes), ""]
    head = ["", "", "median", "against", "median", "unit", "times better", "spread"]
    cells = [head, *(_cells(row) for row in result.rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in wide])
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, wide, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([*lines, ""])


def _cells(row: Row) -> list[str]:
    exact = row.low == row.high
    return [
        row.what,
        row.arm,
        _number(row.value),
        row.baseline,
        _number(row.baseline_value),
        row.unit,
        _number(row.ratio),
        "" if exact else f"{_number(row.low)} to {_number(row.high)}",
    ]


def _number(value: float) -> str:
    """Three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"
