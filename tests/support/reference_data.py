"""The folder of reference data, which is not in the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

PARTS = ("data", "golden_hint", "golden_hyperdecoder", "golden_t5x")


def find(requested: str | None, default: Path) -> Path:
    """Return the folder; without one skip the test, with a requested one that lacks a part fail."""
    folder = Path(requested or default)
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing and requested:
        pytest.fail(f"HYPER_T5_SHARED={requested}: no folder {missing[0]}; set it to all the data")
    if missing:
        pytest.skip(f"no reference data at {folder}; set HYPER_T5_SHARED to its folder")
    return folder
