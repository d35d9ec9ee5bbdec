"""Timing in alternation, results and their tables."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
K = TypeVar("K")
T = TypeVar("T")
HEAD = ["", "", "median", "against", "median", "unit", "times better", "spread"]


# The fields of these three classes are the keys of bench.json.
@dataclasses.dataclass(frozen=True)
class BenchRow:
    """One arm against a baseline: medians, how many times better it is, range over the rounds."""

    quantity: str
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
    """Seconds per example by ``counts`` of inputs per task, and where the arm breaks even.

    ``break_even`` is the median over the rounds in inputs per task, ``low`` and ``high`` its range;
    None is never. ``by_flops`` is the break-even of FLOPs. ``panel`` is the title of the plot.
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
    """Table of one benchmark; ``notes`` describe the setting."""

    name: str
    title: str
    notes: list[str]
    rows: list[BenchRow] = dataclasses.field(default_factory=list)
    curves: list[Curve] = dataclasses.field(default_factory=list)
    skipped: str = ""

    def add(
        self,
        quantity: str,
        unit: str,
        costs: Mapping[str, Sequence[float]],
        baseline: str,
        items: Mapping[str, float] | None = None,
    ) -> None:
        """Add a row for each arm against the baseline.

        Args:
          quantity: the measured quantity, such as "training step".
          unit: of the values in the table.
          costs: numbers of each arm, less is better: one per round, or a single exact one.
          baseline: name of an arm.
          items: per call of each arm; the table then shows rates, items / cost.
        """
        units = {arm: 1.0 if items is None else items[arm] for arm in costs}
        each = {arm: [cost / units[arm] for cost in costs[arm]] for arm in costs}
        medians = {arm: statistics.median(rounds) for arm, rounds in each.items()}
        values = {arm: 1 / median if items else median for arm, median in medians.items()}
        for arm in costs:
            if arm != baseline:
                ratio = medians[baseline] / medians[arm]
                ratios = [b / a for a, b in zip(each[arm], each[baseline], strict=True)]
                pair = (arm, values[arm], baseline, values[baseline])
                self.rows.append(BenchRow(quantity, unit, *pair, ratio, min(ratios), max(ratios)))

    def add_memory(self, quantity: str, sizes: Mapping[str, float], baseline: str) -> None:
        """Add a row of MiB for each arm, from bytes."""
        self.add(quantity, "MiB", {arm: [size / 2**20] for arm, size in sizes.items()}, baseline)


def time_arms(
    arms: Mapping[K, Callable[[], Any]], rounds: int, warm_up: int = 1
) -> dict[K, list[float]]:
    """Return seconds of each arm [rounds], timed in alternation after ``warm_up`` calls.

    Machine load that changes over time falls on all arms. A call must block until its result is
    ready.
    """
    for _ in range(warm_up):
        for run in arms.values():
            run()
    seconds: dict[K, list[float]] = {name: [] for name in arms}
    for name in alternate(arms, rounds):
        started = time.perf_counter()
        arms[name]()
        seconds[name].append(time.perf_counter() - started)
        print(f"  {name}: {seconds[name][-1]:.3g} s", file=sys.stderr, flush=True)
    return seconds


def alternate(names: Iterable[K], rounds: int) -> Iterator[K]:
    """Yield all names once per round, in reverse order in every second round."""
    order = list(names)
    for index in range(rounds):
        yield from order if index % 2 == 0 else reversed(order)


def in_new_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a module-level function, called in a new Python process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def setting() -> str:
    """Describe the processor, the usable cores, and the device that JAX computes on."""
    import jax  # not at the top: the parent process needs no JAX

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    device = jax.devices()[0]
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores; JAX {jax.__version__} on "
        f"{device.platform} ({device.device_kind})"
    )


def table(result: Result) -> str:
    """Format a result as Markdown."""
    lines = [f"## {result.name}: {result.title}", ""]
    if result.skipped:
        return "\n".join([*lines, f"SKIPPED: {result.skipped}", ""])
    lines += [*(f"- {note}" for note in result.notes), ""]
    cells = [HEAD, *map(_cells, result.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(padded)} |")
    return "\n".join([*lines, ""])


def _cells(row: BenchRow) -> list[str]:
    numbers = (row.value, row.baseline_value, row.ratio, row.low, row.high)
    value, baseline_value, ratio, low, high = map(_number, numbers)
    spread = "" if row.low == row.high else f"{low} to {high}"
    return [row.quantity, row.arm, value, row.baseline, baseline_value, row.unit, ratio, spread]


def _number(value: float) -> str:
    """Format three significant digits, without exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.6f}"
