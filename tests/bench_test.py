"""Benchmarks at toy size: that each runs, and that a ratio says what it claims to say."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import numpy as np
import pytest

import runs
from hyper_t5 import bench, cli, plots, t5
from hyper_t5.bench import against_peft, against_torch, measure, serving


def test_a_slower_arm_is_worse_and_turns_alternate() -> None:
    calls: list[str] = []

    def arm(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    seconds = measure.in_turns(
        {"ours": lambda: arm("ours", 0.002), "theirs": lambda: arm("theirs", 0.02)}, 2
    )
    assert calls == ["ours", "theirs", "ours", "theirs", "theirs", "ours"]
    row = measure.time_row("sleep", seconds, "ours", "theirs")
    assert row.ratio == row.baseline_value / row.value > 2
    assert measure.time_row("sleep", seconds, "theirs", "ours").ratio < 0.5
    assert row.low <= row.ratio <= row.high


def test_rates_and_memory_count_amounts() -> None:
    seconds = {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}
    row = measure.rate_row("x", "rows/s", seconds, {"a": 4, "b": 32}, "a", "b")
    assert (row.value, row.baseline_value, row.ratio) == (4, 16, 0.25)
    row = measure.memory_row("x", {"a": 2**20, "b": 2**22}, "a", "b")
    assert (row.value, row.baseline_value, row.ratio) == (1, 4, 4)


def test_adapters_break_even_where_their_generation_is_paid_back(tmp_path: Path) -> None:
    """A generation of 2 s, rows of 0.1 s, and 0.5 s a row with the text in front: 5 inputs."""
    setting = serving.Setting(t5.preset("tiny"), 32, 8, 2)
    generation, row = np.array([2.0, 2.0, 1.6]), 0.1
    each = {f"x {n}": generation / n + row for n in serving.COUNTS}
    costs = {"per_task": 60.0, "concatenated": 30.0, "per_example": 10.0}
    curve = serving._curve(setting, "x", {**each, serving.TEXT: np.full(3, 0.5)}, costs)
    assert curve.break_even == pytest.approx(5)
    assert (curve.low, curve.high) == pytest.approx((4, 5))
    assert curve.by_flops == 3
    assert curve.seconds == pytest.approx([2.1, 0.3, 0.12])
    plots.break_even([dataclasses.asdict(curve)] * 2, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 1000

    front = np.array([0.5, 0.5, 0.05])  # the last round says never
    curve = serving._curve(setting, "x", {**each, serving.TEXT: front}, costs)
    assert curve.break_even is None
    assert curve.high is None
    assert curve.low == pytest.approx(5)
    assert "never" in serving._told(curve)


@dataclasses.dataclass
class Told:
    """An arm that gives these answers."""

    answers: list[list[int]]
    idle: float = 0.0

    def __call__(self, work: against_peft.Work) -> list[list[int]]:
        return self.answers


def test_answers_that_differ_are_no_race() -> None:
    result = measure.Result("predict", "", [])
    work = against_peft.Work([[5, 1]] * 10, [0] * 10, 4, 4)
    ours, most = Told([[7, 1]] * 10), [[7, 1]] * 8
    theirs = Told([*most, [8, 1], [8, 1]])
    with pytest.raises(RuntimeError, match=r"80\.0%"):
        against_peft._compare(result, "one task", work, ours, theirs, tiny=True)
    assert not result.rows
    against_peft._compare(result, "one task", work, ours, Told([*most, [7, 1], [8, 1]]), tiny=True)
    assert "90.0% of them the same" in result.notes[0]
    assert result.rows[0].unit == "tokens/s"


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(against_torch, "NEEDED", ("no_such_package",))
    result = against_peft.predict(bench.Options(tiny=True))
    assert result.skipped == "no_such_package not installed; pip install no_such_package"
    assert "SKIPPED: no_such_package" in measure.table(result)


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == 2
    assert "benchmark" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", bench.BENCHES)
def test_each_runs_and_writes_its_table(name: str, tmp_path: Path) -> None:
    sni = runs.save_sni(tmp_path / "official")
    gin = [f"--gin.data.sni_dir={sni}", "--gin.data.vocab=bytes"]
    given = gin if name in ("data", "packing", "scaling") else []
    assert cli.main(["bench", name, "--tiny", "--out", str(tmp_path), *given]) == 0
    (result,) = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert not result["skipped"]
    for row in result["rows"]:
        assert min(row["value"], row["baseline_value"], row["ratio"]) > 0
    named = {row["arm"] for row in result["rows"]} | {row["baseline"] for row in result["rows"]}
    text = (tmp_path / "bench.md").read_text()
    assert all(arm in text for arm in named)
    picture = "break_even.png" if result["curves"] else "bench.png"
    assert (tmp_path / picture).stat().st_size > 1000
