"""Learning curves: tables and plot of given curves, and (slow) a whole run in two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hyper_t5.experiments import peft_init_curves
from hyper_t5.tasks import synthetic
from hyper_t5.tools import quickstart
from tests.support import tiny_runs

FIRST, SECOND = synthetic.HELD_OUT


def test_rows_are_halved_into_selection_and_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_init_curves, "ROWS", 4)
    rows = [
        {"task": f"{FIRST}-{task}", quickstart.METRIC: 100.0 * (row < right)}
        for task, right in {"a": 2, "b": 3}.items()
        for row in range(4)
    ]
    assert peft_init_curves._halves(rows) == {FIRST: {"selection": 100.0, "test": 25.0}}


def _curve(init: str, rate: float, seed: int, test: list[float], best: bool) -> Any:
    values = {FIRST: test, SECOND: [v / 2 for v in test]}
    curve = {"kind": "lora", "init": init, "rate": rate, "seed": seed, "steps": [0, 10, 100]}
    return {**curve, "test": values, "selection": values, "best": best}


def test_tables_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_init_curves, "RATES", {"lora": (1e-3, 1e-2)})
    curves = [
        _curve(init, rate, seed, [0.0, 10.0 * seed, 40.0 + seed], rate == 1e-2)
        for init in peft_init_curves.INITS
        for rate, seed in [(1e-3, 0), (1e-2, 0), (1e-2, 2)]
    ]
    head, steps, generated, *_ = peft_init_curves.table(curves).splitlines()
    assert head.split("  ")[0] == "exact match, %"
    assert steps.split() == ["after", "steps", *["0", "10", "100"] * 2]
    cells = ["lora", "generated", "0.01", "0.0", "±0.0", "10.0", "±10.0", "41.0", "±1.0"]
    assert generated.split()[:9] == cells
    rates = peft_init_curves.rates_table(curves).splitlines()
    assert rates[1].split() == ["lora", "generated", "30.0", "30.0"]
    plot = peft_init_curves.plot(curves, tmp_path / "curves.png")
    assert np.asarray(matplotlib.image.imread(plot)).std() > 0.05


def test_the_best_rate_is_selected_by_the_other_half() -> None:
    curve = _curve("random", 1e-3, 0, [0.0, 0.0, 0.0], best=False)
    curve["selection"] = {FIRST: [90.0, 20.0], SECOND: [90.0, 40.0]}
    assert peft_init_curves._selection_score(curve) == 30.0


@pytest.mark.slow
def test_a_whole_run_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.py"
    file.write_text(tiny_runs.QUICKSTART)
    small = {"RATES": {"prefix": (1e-3, 1e-2)}, "STEPS": (0, 2), "ROWS": 2}
    for name, value in (small | {"SOURCE_STEPS": 2, "EXAMPLES": 2, "BATCH": 1}).items():
        monkeypatch.setattr(peft_init_curves, name, value)
    monkeypatch.setattr(quickstart, "CONFIG", str(file))
    out = tmp_path / "out"
    argv = [f"--out={out}", "--seeds", "0", "1", "--tasks", "2"]
    assert peft_init_curves.main(argv) == 0
    curves = json.loads((out / "curves.json").read_text())["curves"]
    keys = {(c["init"], c["rate"], c["seed"]) for c in curves}
    assert len(keys) == len(curves) == 9
    assert {(init, rate, 0) for init in peft_init_curves.INITS for rate in (1e-3, 1e-2)} < keys
    assert sum(c["best"] for c in curves) == 6
    assert not list(out.glob("prefix_*/checkpoints"))
    # A second call trains nothing.
    monkeypatch.setattr(quickstart, "train_run", lambda *args, **more: None)
    assert peft_init_curves.main(argv) == 0
    assert json.loads((out / "curves.json").read_text())["curves"] == curves


def test_a_missing_backbone_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert peft_init_curves.main(argv) == 2
    assert "does not exist" in capsys.readouterr().err
