"""Bootstrap intervals: coverage, the normal limit, pairing, and degenerate cases."""

from __future__ import annotations

import numpy as np
import pytest

from hyper_t5.scoring import bootstrap


def of_tasks(count: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the sums of tasks of 1 to 100 rows."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 101, count).astype(float)
    means = rng.beta(1, 2, count) * 100
    return {f"t{i}": (m * n, n) for i, (m, n) in enumerate(zip(means, rows, strict=True))}


def width(ends: list[float] | None) -> float:
    assert ends is not None
    return ends[1] - ends[0]


def test_the_interval_approaches_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(50, 20, 1000)
    interval = bootstrap.interval({str(i): (v, 1.0) for i, v in enumerate(values)})
    error = 1.959964 * values.std(ddof=1) / len(values) ** 0.5
    expected = [values.mean() - error, values.mean() + error]
    assert interval == pytest.approx(expected, abs=0.1 * error)


def test_the_interval_of_a_ratio_contains_it_as_often_as_stated() -> None:
    """Tasks of 1 to 9 rows with means around 20, larger ones with larger scores."""
    rng, inside = np.random.default_rng(0), 0
    true_ratio = 20 + float(np.var(np.arange(1, 10))) / 5
    for _ in range(300):
        rows: list[int] = rng.integers(1, 10, 60).tolist()
        sums = {str(i): (n * (rng.gamma(4, 5) + n - 5), float(n)) for i, n in enumerate(rows)}
        interval = bootstrap.interval(sums)
        assert interval is not None
        inside += interval[0] <= true_ratio <= interval[1]
    assert 0.90 < inside / 300 < 0.98


def test_rows_of_a_task_are_resampled_together() -> None:
    """Ten times the rows with the same scores say nothing more about other tasks."""
    sums = of_tasks(20)
    repeated = {name: (10 * total, 10 * count) for name, (total, count) in sums.items()}
    assert bootstrap.interval(repeated) == pytest.approx(bootstrap.interval(sums))
    separate = {f"{name} {i}": part for name, part in sums.items() for i in range(10)}
    assert width(bootstrap.interval(separate)) < 0.5 * width(bootstrap.interval(sums))


def test_fewer_than_two_tasks_have_no_interval() -> None:
    assert bootstrap.interval({"t": (1.0, 2.0)}) is None
    assert bootstrap.interval({}) is None
    assert bootstrap.interval({"t": (1.0, 2.0), "u": (2.0, 4.0)}) == [0.5, 0.5]


def test_intervals_are_reproducible() -> None:
    assert bootstrap.interval(of_tasks(30)) == bootstrap.interval(of_tasks(30))


def test_differences_are_paired() -> None:
    first = of_tasks(30)
    better = {name: (total + 2 * count, count) for name, (total, count) in first.items()}
    tasks, value, interval = bootstrap.difference(better, first)
    assert tasks == 30
    assert value == pytest.approx(2)
    assert interval == pytest.approx([2, 2])
    second = of_tasks(30, seed=1)
    tasks, value, interval = bootstrap.difference(first, second)
    assert value == pytest.approx(bootstrap.ratio(first) - bootstrap.ratio(second))
    assert interval is not None
    assert interval[0] < value < interval[1]
    _, reverse, reverse_interval = bootstrap.difference(second, first)
    assert reverse == pytest.approx(-value)
    assert reverse_interval == pytest.approx([-interval[1], -interval[0]])


def test_differences_are_over_the_tasks_of_both() -> None:
    first = of_tasks(10)
    some = {name: (total + 3 * count, count) for name, (total, count) in [*first.items()][6::-1]}
    tasks, value, interval = bootstrap.difference(first, some | {"u": (9.0, 1.0)})
    assert tasks == 7
    assert value == pytest.approx(-3)
    assert interval == pytest.approx([-3, -3])
    assert bootstrap.difference(first, {"t0": first["t0"]}) == (1, 0.0, None)
    assert bootstrap.difference(first, {"u": (9.0, 1.0)})[0] == 0
