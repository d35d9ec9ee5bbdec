"""Intervals: against SciPy's bootstrap, against the normal limit, and what they must not do."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hyper_t5 import intervals


def of_tasks(count: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Scores of tasks of 1 to 100 rows each."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 101, count).astype(float)
    means = rng.beta(1, 2, count) * 100
    return {f"t{i}": (m * n, n) for i, (m, n) in enumerate(zip(means, rows, strict=True))}


def width(ends: list[float] | None) -> float:
    assert ends is not None
    return ends[1] - ends[0]


@pytest.mark.parametrize("count", [9, 119])
def test_it_is_scipys_bootstrap_of_the_same_ratio(count: int) -> None:
    parts = of_tasks(count)
    sums, rows = np.array(list(parts.values())).T
    theirs = stats.bootstrap(
        (sums, rows),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    ours = intervals.interval(parts)
    assert ours is not None
    assert ours == pytest.approx(theirs, abs=0.03 * width(ours))
    assert ours[0] < intervals.ratio(parts) < ours[1]


def test_of_many_tasks_it_is_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(50, 20, 3000)
    found = intervals.interval({str(i): (v, 1.0) for i, v in enumerate(values)})
    error = 1.959964 * values.std(ddof=1) / len(values) ** 0.5
    assert found == pytest.approx([values.mean() - error, values.mean() + error], abs=0.1 * error)


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        found = intervals.interval({str(i): (v, 1.0) for i, v in enumerate(rng.gamma(4, 5, 60))})
        assert found is not None
        inside += found[0] <= 20 <= found[1]
    assert 0.90 < inside / 300 < 0.98


def test_rows_of_a_task_count_as_one_draw() -> None:
    """Ten times the rows, all as those before: that tells no more about other tasks."""
    parts = of_tasks(20)
    more = {name: (10 * total, 10 * count) for name, (total, count) in parts.items()}
    assert intervals.interval(more) == pytest.approx(intervals.interval(parts))
    apart = {f"{name} {i}": part for name, part in parts.items() for i in range(10)}
    assert width(intervals.interval(apart)) < 0.5 * width(intervals.interval(parts))


def test_one_task_tells_no_spread() -> None:
    assert intervals.interval({"t": (1.0, 2.0)}) is None
    assert intervals.interval({}) is None
    assert intervals.interval({"t": (1.0, 2.0), "u": (2.0, 4.0)}) == [0.5, 0.5]


def test_the_same_again() -> None:
    found = intervals.interval(of_tasks(30))
    intervals._draws.cache_clear()
    assert intervals.interval(of_tasks(30)) == found


def test_differences_are_paired() -> None:
    one = of_tasks(30)
    better = {name: (total + 2 * count, count) for name, (total, count) in one.items()}
    tasks, value, ends = intervals.difference(better, one)
    assert tasks == 30
    assert value == pytest.approx(2)
    assert ends == pytest.approx([2, 2])
    other = of_tasks(30, seed=1)
    tasks, value, ends = intervals.difference(one, other)
    assert value == pytest.approx(intervals.ratio(one) - intervals.ratio(other))
    assert ends is not None
    assert ends[0] < value < ends[1]
    _, back, back_ends = intervals.difference(other, one)
    assert back == pytest.approx(-value)
    assert back_ends == pytest.approx([-ends[1], -ends[0]])


def test_differences_are_over_the_tasks_of_both() -> None:
    one = of_tasks(10)
    some = {name: (total + 3 * count, count) for name, (total, count) in [*one.items()][6::-1]}
    tasks, value, ends = intervals.difference(one, some | {"u": (9.0, 1.0)})
    assert tasks == 7
    assert value == pytest.approx(-3)
    assert ends == pytest.approx([-3, -3])
    assert intervals.difference(one, {"t0": one["t0"]}) == (1, 0.0, None)
    assert intervals.difference(one, {"u": (9.0, 1.0)})[0] == 0
