"""Benchmarks at toy size: each runs, and a ratio says what it claims."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest

from hyper_t5 import bench, cli
from hyper_t5.bench import against_torch, measure, serving
from hyper_t5.utils import plots
from tests.support import tiny_runs


def test_a_slower_arm_is_worse_and_arms_alternate() -> None:
    calls: list[str] = []

    def arm(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    arms = {"ours": lambda: arm("ours", 0.002), "theirs": lambda: arm("theirs", 0.02)}
    seconds = measure.time_arms(arms, 2)
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]
    result = measure.Result("x", "", [])
    result.add("sleep", "s", seconds, "theirs")
    result.add("sleep", "s", seconds, "ours")
    better, worse = result.rows
    assert (better.arm, better.baseline) == ("ours", "theirs")
    assert better.ratio == better.baseline_value / better.value > 2
    assert better.low <= better.ratio <= better.high
    assert worse.ratio < 0.5


def test_rates_and_memory_count_amounts() -> None:
    result = measure.Result("x", "", [])
    seconds = {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}
    result.add("rows", "rows/s", seconds, "b", {"a": 4, "b": 32})
    result.add_memory("size", {"a": 2**20, "b": 2**22}, "b")
    rate, memory = result.rows
    assert (rate.value, rate.baseline_value, rate.ratio) == (4, 16, 0.25)
    assert (memory.value, memory.baseline_value, memory.ratio) == (1, 4, 4)
    assert "| size | a | 1 " in measure.table(result)


def test_adapters_break_even_where_their_generation_pays_off(tmp_path: Path) -> None:
    """A generation of 2 s, rows of 0.1 s, and 0.5 s per row with the text in front: 5 inputs."""
    costs = {("x", n): [g / n + 0.1 for g in (2.0, 2.0, 1.6)] for n in serving.COUNTS}
    costs[serving.TEXT, serving.ROWS] = [0.5] * 3
    curve = serving._curve("", "x", costs, 3.0)
    assert curve.break_even == pytest.approx(5)
    assert (curve.low, curve.high) == pytest.approx((4, 5))
    assert curve.seconds == pytest.approx([2.1, 0.3, 0.12])
    plots.break_even([dataclasses.asdict(curve)] * 2, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000

    costs[serving.TEXT, serving.ROWS] = [0.5, 0.5, 0.05]  # never in the last round
    curve = serving._curve("", "x", costs, None)
    assert (curve.break_even, curve.high) == (None, None)
    assert curve.low == pytest.approx(5)


def test_different_outputs_are_refused() -> None:
    expected = [[7, 1]] * 8
    with pytest.raises(RuntimeError, match=r"80\.0%"):
        against_torch._check_same([[7, 1]] * 10, [*expected, [8, 1], [8, 1]])
    assert against_torch._check_same([[7, 1]] * 10, [*expected, [7, 1], [8, 1]]) == 0.9


def test_a_missing_package_skips_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_torch, "REQUIRED", ("no_such_package",))
    result = measure.Result("predict", "", [])
    against_torch.predict(bench.Options(tiny=True), result)
    assert result.skipped == "no_such_package not installed; pip install no_such_package"
    assert "SKIPPED: no_such_package" in measure.table(result)


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == 2
    assert "benchmark" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.BENCHES)
def test_each_runs_and_writes_its_table(name: str, tmp_path: Path) -> None:
    sni = tiny_runs.save_sni(tmp_path / "official")
    gin = [f"--gin.data.sni_dir={sni}", "--gin.data.vocab=bytes"]
    flags = gin if name in ("data", "packing") else []
    assert cli.main(["bench", name, "--tiny", "--out", str(tmp_path), *flags]) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert not result["skipped"]
    assert result["rows"]
    for row in result["rows"]:
        assert min(row["value"], row["baseline_value"], row["ratio"]) > 0
    arms = {row["arm"] for row in result["rows"]} | {row["baseline"] for row in result["rows"]}
    text = (tmp_path / "bench.md").read_text()
    assert all(arm in text for arm in arms)
    picture = "break_even.png" if result["curves"] else "bench.png"
    assert (tmp_path / picture).stat().st_size > 1000
