"""The study of starts: what it makes of curves, and, slowly, that it makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

import runs
from hyper_t5 import learning_curves, quickstart
from hyper_t5.tasks import synthetic

FIRST, SECOND = synthetic.HELD_OUT


def test_half_of_the_rows_choose_and_half_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_curves, "ROWS", 4)
    rows = [
        {"task": f"{FIRST}-{task}", quickstart.METRIC: 100.0 * (row < right)}
        for task, right in {"one": 2, "other": 3}.items()
        for row in range(4)
    ]
    assert learning_curves._halves(rows) == {FIRST: (100.0, 25.0)}


def _curve(start: str, rate: float, seed: int, reported: list[float], best: bool) -> Any:
    values = {FIRST: reported, SECOND: [v / 2 for v in reported]}
    curve = {"kind": "lora", "start": start, "rate": rate, "seed": seed, "steps": [0, 10, 100]}
    return {**curve, "reported": values, "chosen_by": values, "best": best}


def test_tables_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learning_curves, "RATES", {"lora": (1e-3, 1e-2)})
    curves = [
        _curve(start, rate, seed, [0.0, 10.0 * seed, 40.0 + seed], rate == 1e-2)
        for start in learning_curves.STARTS
        for rate, seed in [(1e-3, 0), (1e-2, 0), (1e-2, 2)]
    ]
    head, steps, generated, *_ = learning_curves.table(curves).splitlines()
    assert head.split("  ")[0] == "exact match, %"
    assert steps.split() == ["after", "steps", *["0", "10", "100"] * 2]
    cells = ["lora", "generated", "0.01", "0.0", "±0.0", "10.0", "±10.0", "41.0", "±1.0"]
    assert generated.split()[:9] == cells
    rates = learning_curves.rates_table(curves).splitlines()
    assert rates[1].split() == ["lora", "generated", "30.0", "30.0"]
    plot = learning_curves.draw(curves, tmp_path / "curves.png")
    assert np.asarray(matplotlib.image.imread(plot)).std() > 0.05


def test_the_best_rate_is_chosen_by_the_other_half() -> None:
    curve = _curve("random", 1e-3, 0, [0.0, 0.0, 0.0], best=False)
    curve["chosen_by"] = {FIRST: [90.0, 20.0], SECOND: [90.0, 40.0]}
    assert learning_curves._chosen_by(curve) == 30.0


@pytest.mark.slow
def test_all_of_it_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.py"
    file.write_text(runs.QUICKSTART)
    small = {"RATES": {"prefix": (1e-3, 1e-2)}, "STEPS": (0, 2), "ROWS": 2}
    for name, value in (small | {"SOURCE_STEPS": 2, "EXAMPLES": 2, "BATCH": 1}).items():
        monkeypatch.setattr(learning_curves, name, value)
    monkeypatch.setattr(quickstart, "CONFIG", str(file))
    out = tmp_path / "out"
    argv = [f"--out={out}", "--seeds", "0", "1", "--tasks", "2"]
    assert learning_curves.command(argv) == 0
    curves = json.loads((out / "curves.json").read_text())["curves"]
    found = {(c["start"], c["rate"], c["seed"]) for c in curves}
    assert len(found) == len(curves) == 9
    assert {(start, rate, 0) for start in learning_curves.STARTS for rate in (1e-3, 1e-2)} < found
    assert sum(c["best"] for c in curves) == 6
    assert not list(out.glob("prefix_*/checkpoints"))
    # A second call makes nothing again.
    monkeypatch.setattr(quickstart, "train_run", lambda *args, **more: None)
    assert learning_curves.command(argv) == 0
    assert json.loads((out / "curves.json").read_text())["curves"] == curves


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert learning_curves.command(argv) == 2
    assert "does not exist" in capsys.readouterr().err
