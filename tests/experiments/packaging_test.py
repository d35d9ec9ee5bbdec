"""Experiments stay out of the wheel, and nothing in the wheel imports them."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_has_no_experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("setuptools")
    options: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", options.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    assert {"hyper_t5.planning", "hyper_t5.tasks", "hyper_t5.configs"} <= set(options["packages"])
    assert not [name for name in options["packages"] if "experiments" in name]
    for package in ("hyper_t5", "tasks", "configs"):
        for file in (ROOT / package).rglob("*.py"):
            if "experiments" not in file.parts:
                assert "experiments" not in file.read_text(encoding="utf-8"), file
