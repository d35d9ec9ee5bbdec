"""Saved bad steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5.training import replay
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket


def make_replay(rows: slice = slice(None)) -> replay.Replay:
    batch = {
        "inputs": np.arange(24, dtype=np.int32).reshape(4, 2, 3)[rows],
        "tasks": np.arange(4, dtype=np.int32)[rows],
    }
    names, config = ["a", "b", "a", "ü"], {"seed": 3, "train": {"steps": 9}}
    return replay.Replay(7, "loss is nan", 3, names, math.nan, math.inf, config, batch)


def save(workdir: Any, *args: Any) -> Path:
    folder = replay.save_replay(workdir, *args)
    assert folder is not None
    return Path(folder)


def assert_same(actual: replay.Replay, expected: replay.Replay) -> None:
    left, right = (dataclasses.asdict(x) for x in (actual, expected))
    for side in (left, right):
        side["batch"] = {k: (v.dtype, v.tolist()) for k, v in side["batch"].items()}
        side |= {k: str(side[k]) for k in ("loss", "grad_norm")}  # NaN equals nothing
    assert left == right


def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, make_replay())
    assert folder == tmp_path / "replay" / "7"
    assert sorted(file.name for file in folder.iterdir()) == ["batch.npz", "replay.json"]
    assert_same(replay.load_replay(folder), make_replay())

    folder = save(tmp_path / "other", make_replay(), lambda state: state.mkdir(parents=True))
    loaded = replay.load_replay(folder)
    assert str(loaded.state) == str(folder / "state")
    assert_same(dataclasses.replace(loaded, state=None), make_replay())

    with fake_bucket.served(monkeypatch) as objects:
        name = "gs://bucket/run/replay/7"
        assert str(replay.save_replay("gs://bucket/run", make_replay())) == name
        assert f"{name}/batch.npz" in objects
        assert_same(replay.load_replay(name), make_replay())


def test_each_process_saves_its_rows(tmp_path: Path) -> None:
    for process in (1, 0):
        rows = slice(2 * process, 2 * process + 2)
        folder = save(tmp_path, make_replay(rows), None, process, 2)
    assert_same(replay.load_replay(folder), make_replay())
    (folder / "batch.1-of-2.npz").unlink()
    with pytest.raises(UserError, match=r"1-of-2.npz: cannot be read"):
        replay.load_replay(folder)


def test_a_failure_to_save_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "replay").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert replay.save_replay(tmp_path, make_replay()) is None
    assert "step 7 could not be saved for replay" in caplog.text
    (tmp_path / "replay").unlink()

    def fail(folder: Any) -> None:
        raise UserError("no space")

    assert replay.save_replay(tmp_path, make_replay(), fail) is None
    assert "for replay: no space" in caplog.text
    with pytest.raises(UserError, match=r"replay.json: cannot be read"):
        replay.load_replay(tmp_path / "replay" / "7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, "replay.json: cannot be read .*'more'.*; use a folder WORKDIR/replay"),
        ({"loss": "high"}, "replay.json: .*could not convert string to float: 'high'"),
        ({"state": True}, "replay.json: .*state/ is missing"),
        ({"processes": 2}, r"batch.0-of-2.npz: cannot be read"),
        ({"arrays": {"tasks": [[], "int32"]}}, "batch.npz: .*its arrays are not those of"),
    ],
)
def test_a_changed_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = save(tmp_path, make_replay())
    record = files.read_json(folder / "replay.json") | change
    (folder / "replay.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        replay.load_replay(folder)


def test_a_damaged_batch_is_refused(tmp_path: Path) -> None:
    file = save(tmp_path, make_replay()) / "batch.npz"
    intact = file.read_bytes()
    start = intact.index(np.arange(24, dtype=np.int32).tobytes())
    for content in (b"", intact[:-30], intact[:start] + b"\xff" + intact[start + 1 :]):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"batch.npz: cannot be read"):
            replay.load_replay(file.parent)
