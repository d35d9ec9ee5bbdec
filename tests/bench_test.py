"""Benchmarks at toy size: that each runs, and that a ratio says what it claims to say."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import runs

from hyper_t5 import bench, cli
from hyper_t5.bench import measure


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


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "speed"]) == 2
    assert "benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n != "data" else []) for n in bench.BENCHES],
)
def test_each_runs_and_writes_its_table(name: str, tmp_path: Path) -> None:
    if name == "torch":
        pytest.importorskip("peft")
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
    assert (tmp_path / "bench.png").stat().st_size > 1000
