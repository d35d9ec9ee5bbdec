"""Times, memory and traces of a run, and what is kept of a bad step."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bucket
from hyper_t5 import chips, files, watch
from hyper_t5.errors import UserError

# --------------------------------------------------------------------------------- time and memory


class Clock:
    """Stands still but when told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Made:
    """An array of JAX, ready or not."""

    def __init__(self, ready: bool) -> None:
        self.ready = ready

    def is_ready(self) -> bool:
        return self.ready


def spend(times: watch.Times, clock: Clock, part: str, seconds: float, **how: Any) -> None:
    with times.part(part, **how):
        clock.now += seconds


def test_a_step_is_data_and_save_and_the_rest() -> None:
    clock = Clock()
    times = watch.Times(clock)
    assert times.report() == {}
    spend(times, clock, "data", 50.0)  # before the first step has been made: compiling, too
    times.step()
    for _ in range(4):
        spend(times, clock, "data", 0.25)
        clock.now += 1.5
        times.step()
    assert times.report() == {"seconds_data": 0.25, "seconds_save": 0.0, "seconds_compute": 1.5}
    # A checkpoint after the report is of the next one.
    spend(times, clock, "save", 3.0)
    for _ in range(2):
        clock.now += 2.0
        times.step()
    assert times.report() == {"seconds_data": 0.0, "seconds_save": 1.5, "seconds_compute": 2.0}
    assert times.report() == {}


def test_data_that_the_device_did_not_wait_for_is_no_wait() -> None:
    clock = Clock()
    times = watch.Times(clock)
    times.step()
    spend(times, clock, "data", 1.0, ahead={"loss": Made(False), "norm": Made(True)})
    spend(times, clock, "data", 2.0, ahead={"loss": Made(True), "norm": Made(True)})
    spend(times, clock, "data", 4.0)
    times.step()
    assert times.report() == {"seconds_data": 6.0, "seconds_save": 0.0, "seconds_compute": 1.0}


def test_an_array_of_jax_says_whether_it_is_there() -> None:
    array = jax.block_until_ready(jnp.ones(3))
    assert array.is_ready()
    assert not watch._is_busy(array)
    assert watch._is_busy(Made(False))
    assert not watch._is_busy(np.ones(3))


@dataclasses.dataclass
class Device:
    device_kind: str = "TPU v4"
    stats: dict[str, int] | None = None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def test_utilisation_is_of_the_published_peak() -> None:
    pod: list[Any] = [Device()] * 8
    peak = chips.CHIPS["v4"].bf16_flops
    assert watch.utilisation(8 * peak, 2.0, pod) == pytest.approx(0.5)
    assert watch.utilisation(peak, 1.0, pod) == pytest.approx(1 / 8)
    # Half a chip each.
    halves: list[Any] = [Device("TPU v3")] * 2
    assert watch.utilisation(chips.CHIPS["v3"].bf16_flops, 1.0, halves) == pytest.approx(1.0)
    unknown: Any = Device("something new")
    assert watch.utilisation(peak, 1.0, [*pod, unknown]) is None
    assert watch.utilisation(peak, 1.0) is None  # CPUs
    assert watch.utilisation(peak, 0.0, pod) is None


def test_memory_is_the_fullest_device_s() -> None:
    assert watch.device_memory() == {}  # CPUs do not say
    full = {"peak_bytes_in_use": 9, "bytes_in_use": 4, "bytes_limit": 16, "num_allocs": 99}
    pair: list[Any] = [Device(stats=full), Device(stats={**full, "bytes_in_use": 7})]
    expected = {"device_peak_bytes": 9, "device_bytes": 7, "device_bytes_limit": 16}
    assert watch.device_memory(pair) == expected
    some: list[Any] = [Device(stats={"bytes_in_use": 5}), Device()]
    assert watch.device_memory(some) == {"device_bytes": 5}


# -------------------------------------------------------------------------------------- profile


def traced_steps(workdir: Path) -> set[int]:
    """The numbers of the steps in the one trace there is."""
    [file] = (workdir / "profile").rglob("*.xplane.pb")
    data = jax.profiler.ProfileData.from_file(str(file))
    return {
        int(dict(event.stats)["step_num"])
        for plane in data.planes
        for line in plane.lines
        for event in line.events
        if event.name == "train" and "step_num" in dict(event.stats)
    }


def train(workdir: Any, first: int, last: int, enabled: bool = True) -> None:
    step, made = jax.jit(lambda x: x + 1), jnp.zeros(())
    with watch.Profile(workdir, first, enabled) as profile:
        for index in range(first, last):
            with profile.step(index, made):
                made = step(made)


def test_a_trace_of_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, 10, 20)
    assert traced_steps(tmp_path) == {12, 13, 14}
    assert f"traced from step 13 on: {tmp_path / 'profile'}" in capsys.readouterr().out


def test_a_run_that_ends_early_ends_its_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "stopped", 0, 4)
    assert traced_steps(tmp_path / "stopped") == {2, 3}

    def fail() -> None:
        with watch.Profile(tmp_path / "failed", 0) as profile, profile.step(2):
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError):
        fail()
    assert traced_steps(tmp_path / "failed") == {2}
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "short", 0, 2)
    assert "ended before step 3: no trace" in caplog.text
    assert not (tmp_path / "short").exists()


def test_only_who_is_asked_traces(tmp_path: Path) -> None:
    train(tmp_path, 0, 8, enabled=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def objects() -> Iterator[bucket.Objects]:
    """What is in every gs:// bucket."""
    with pytest.MonkeyPatch.context() as patch, bucket.served(patch) as objects:
        yield objects


def test_a_trace_in_a_bucket(objects: bucket.Objects, tmp_path: Path) -> None:
    train("gs://bucket/run", 0, 8)
    [name] = [name for name in objects if name.endswith(".xplane.pb")]
    place = tmp_path / name.removeprefix("gs://bucket/run/")
    place.parent.mkdir(parents=True)
    place.write_bytes(objects[name])
    assert traced_steps(tmp_path) == {2, 3, 4}


# ---------------------------------------------------------------------------------------- replay


def make_replay(rows: slice = slice(None)) -> watch.Replay:
    batch = {
        "inputs": np.arange(24, dtype=np.int32).reshape(4, 2, 3)[rows],
        "tasks": np.arange(4, dtype=np.int32)[rows],
    }
    names, config = ["a", "b", "a", "ü"], {"seed": 3, "train": {"steps": 9}}
    return watch.Replay(7, "loss is nan", 3, names, math.nan, math.inf, config, batch)


def assert_same(found: watch.Replay, expected: watch.Replay) -> None:
    one, other = (dataclasses.asdict(x) for x in (found, expected))
    for side in (one, other):
        side["batch"] = {k: (v.dtype, v.tolist()) for k, v in side["batch"].items()}
        side |= {k: str(side[k]) for k in ("loss", "grad_norm")}  # a NaN equals nothing
    assert one == other


def test_a_step_comes_back_as_it_was(tmp_path: Path) -> None:
    folder = watch.save_replay(tmp_path, make_replay())
    assert folder is not None
    assert sorted(p.name for p in Path(folder).iterdir()) == ["batch.npz", "replay.json"]
    assert Path(folder) == tmp_path / "replay" / "7"
    assert_same(watch.load_replay(folder), make_replay())

    def save_state(place: Any) -> None:
        place.mkdir(parents=True)

    folder = watch.save_replay(tmp_path / "other", make_replay(), save_state)
    assert folder is not None
    found = watch.load_replay(folder)
    assert found.state == folder / "state"
    assert_same(dataclasses.replace(found, state=None), make_replay())


def test_each_process_saves_the_rows_it_has(tmp_path: Path) -> None:
    for process in (1, 0):
        rows = slice(2 * process, 2 * process + 2)
        folder = watch.save_replay(tmp_path, make_replay(rows), None, process, 2)
    assert folder is not None
    assert_same(watch.load_replay(folder), make_replay())
    (Path(folder) / "batch.1-of-2.npz").unlink()
    with pytest.raises(UserError, match=r"1-of-2.npz: cannot be read"):
        watch.load_replay(folder)


def test_a_step_in_a_bucket(objects: bucket.Objects) -> None:
    folder = watch.save_replay("gs://bucket/run", make_replay())
    assert str(folder) == "gs://bucket/run/replay/7"
    assert "gs://bucket/run/replay/7/batch.npz" in objects
    assert_same(watch.load_replay("gs://bucket/run/replay/7"), make_replay())


def test_what_cannot_be_saved_hides_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "replay").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert watch.save_replay(tmp_path, make_replay()) is None
    assert "step 7 could not be saved for replay" in caplog.text
    (tmp_path / "replay").unlink()

    def save_state(place: Any) -> None:
        raise UserError("no space")

    assert watch.save_replay(tmp_path, make_replay(), save_state) is None
    assert "for replay: no space" in caplog.text
    with pytest.raises(UserError, match=r"replay.json: cannot be read"):
        watch.load_replay(tmp_path / "replay" / "7")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": None}, "replay.json: step is missing or no int; give a folder WORKDIR/replay"),
        ({"tasks": "a"}, "replay.json: tasks is missing or no list"),
        ({"loss": "high"}, "replay.json: could not convert string to float: 'high'"),
        ({"state": True}, "state: is missing"),
        ({"processes": 2}, "batch.0-of-2.npz: cannot be read"),
        ({"arrays": {"tasks": [[], "int32"]}}, 'batch.npz: has {"inputs": .* replay.json says'),
    ],
)
def test_a_changed_record_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = watch.save_replay(tmp_path, make_replay())
    assert folder is not None
    record = files.read_json(Path(folder) / "replay.json") | change
    (Path(folder) / "replay.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=message):
        watch.load_replay(folder)


def test_a_damaged_batch_is_refused(tmp_path: Path) -> None:
    folder = watch.save_replay(tmp_path, make_replay())
    assert folder is not None
    file = Path(folder) / "batch.npz"
    good = file.read_bytes()
    place = good.index(np.arange(24, dtype=np.int32).tobytes())
    for bad in (b"", good[:-30], good[:place] + b"\xff" + good[place + 1 :]):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"batch.npz: cannot be read"):
            watch.load_replay(folder)
