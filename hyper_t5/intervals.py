"""Confidence intervals of what a report says, by the bootstrap over tasks (Efron 1979).

Rows of a task share its text and its difficulty, so that they are not independent: tasks are drawn
anew, each with all its rows. A score is a ratio of sums over tasks: the mean over rows has a task's
sum of scores over its number of rows, the mean over tasks its score over 1.

A difference of two systems is paired: both are asked the same tasks, and both are drawn as one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np

LEVEL = 0.95
RESAMPLES = 4000
SEED = 0

# Task (or whatever is independent) -> (sum of scores, number of them).
Parts = Mapping[str, tuple[float, float]]

HOW = {"level": LEVEL, "method": "percentile bootstrap", "resamples": RESAMPLES, "seed": SEED}


def interval(parts: Parts) -> list[float] | None:
    """[low, high] of the ratio of sums; None with fewer than two tasks, which tell no spread."""
    return None if len(parts) < 2 else _ends(_resampled(parts))


def difference(one: Parts, other: Parts) -> tuple[int, float, list[float] | None]:
    """(tasks, one's score less the other's, its [low, high]) over the tasks that both have."""
    common = [name for name in one if name in other]
    pair = [{name: parts[name] for name in common} for parts in (one, other)]
    if not common:
        return 0, 0.0, None
    made = ratio(pair[0]) - ratio(pair[1])
    if len(common) < 2:
        return len(common), made, None
    return len(common), made, _ends(_resampled(pair[0]) - _resampled(pair[1]))


def ratio(parts: Parts) -> float:
    """The score itself."""
    total, count = np.sum(np.array(list(parts.values()), np.float64), 0)
    return float(total / count)


def _resampled(parts: Parts) -> np.ndarray:
    """The score in each resample [RESAMPLES]; the same draws for the same number of tasks."""
    sums = _draws(len(parts)) @ np.array(list(parts.values()), np.float64)
    return sums[:, 0] / sums[:, 1]


def _ends(values: np.ndarray) -> list[float]:
    tail = (1 - LEVEL) / 2
    return [float(x) for x in np.quantile(values, [tail, 1 - tail])]


@functools.lru_cache(maxsize=4)
def _draws(tasks: int) -> np.ndarray:
    """How often each resample has each task [RESAMPLES, tasks]: float32, exact for counts."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(tasks, np.full(tasks, 1 / tasks), RESAMPLES).astype(np.float32)
