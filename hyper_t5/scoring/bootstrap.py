"""Confidence intervals by the bootstrap over tasks (Efron 1979).

Rows of a task share its text and difficulty and are not independent, so that tasks are resampled,
each with all its rows. A score is a ratio of sums over tasks: the mean over rows divides the sum of
each task's scores by its number of rows; the mean over tasks divides each task's score by 1. The
difference of two systems is paired: a resample has the same tasks for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
SEED = 0
BATCH = 500  # resamples in memory at once
METHOD = "percentile bootstrap"
SETTINGS = {"level": LEVEL, "method": METHOD, "resamples": RESAMPLES, "seed": SEED}

# Independent unit, a task or a group of tasks -> (sum of its scores, number of scores).
UnitSums = Mapping[str, tuple[float, float]]
Interval = list[float]  # [low, high]


def ratio(sums: UnitSums) -> float:
    """Return the score: the sum of scores over their number."""
    return float(_ratio(_table(sums, sums)))


def interval(sums: UnitSums) -> Interval | None:
    """Return the interval of `ratio`, or None with fewer than two units."""
    return _resample(_ratio, _table(sums, sums)) if len(sums) > 1 else None


def difference(first: UnitSums, second: UnitSums) -> tuple[int, float, Interval | None]:
    """Return (units, first minus second, its paired interval) over the units of both."""
    units = [unit for unit in first if unit in second]
    if not units:
        return 0, 0.0, None
    table = np.concatenate([_table(first, units), _table(second, units)])
    ends = _resample(_ratio_difference, table) if len(units) > 1 else None
    return len(units), float(_ratio_difference(table)), ends


def _table(sums: UnitSums, units: Iterable[str]) -> np.ndarray:
    """Return [2, units]: the sums of scores, and their numbers."""
    return np.array([sums[unit] for unit in units], np.float64).T


def _ratio(table: Any) -> np.ndarray:
    return table[0].sum(-1) / table[1].sum(-1)


def _ratio_difference(table: Any) -> np.ndarray:
    return _ratio(table[:2]) - _ratio(table[2:])


def _resample(statistic: Callable[[Any], np.ndarray], table: np.ndarray) -> Interval:
    from scipy import stats  # takes a second to import

    result = stats.bootstrap(
        table,
        lambda *resampled, axis: statistic(resampled),
        paired=True,
        vectorized=True,
        method="percentile",
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        batch=BATCH,
        rng=np.random.default_rng(SEED),
    )
    return [float(end) for end in result.confidence_interval]
