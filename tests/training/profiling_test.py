"""Step times, device memory, utilisation, and traces."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5.parallel import accelerators
from hyper_t5.training import profiling
from tests.support import fake_bucket


class FakeArray:
    """A JAX array, ready or not."""

    def __init__(self, ready: bool) -> None:
        self.is_ready = lambda: ready


def test_a_step_is_data_and_save_and_the_rest() -> None:
    now = [100.0]
    timer = profiling.StepTimer(lambda: now[0])

    def spend(part: str, seconds: float, **options: Any) -> None:
        with timer.part(part, **options):
            now[0] += seconds

    assert timer.report() == {}
    spend("data", 50.0)  # before the end of the first step, which is compiled
    timer.step()
    for _ in range(4):
        spend("data", 0.25)
        now[0] += 1.5
        timer.step()
    none = dict.fromkeys(("seconds_data", "seconds_validate", "seconds_save"), 0.0)
    assert timer.report() == none | {"seconds_data": 0.25, "seconds_compute": 1.5}
    # A save after the report is part of the next one.
    spend("save", 3.0)
    for _ in range(2):
        now[0] += 2.0
        timer.step()
    assert timer.report() == none | {"seconds_save": 1.5, "seconds_compute": 2.0}
    assert timer.report() == {}
    # While the device is busy nothing waits.
    spend("data", 1.0, ahead={"loss": FakeArray(False), "norm": FakeArray(True)})
    spend("data", 2.0, ahead={"loss": FakeArray(True), "norm": FakeArray(True)})
    spend("data", 4.0)
    timer.step()
    assert timer.report() == none | {"seconds_data": 6.0, "seconds_compute": 1.0}


def test_arrays_of_jax_can_be_busy() -> None:
    array = jax.block_until_ready(jnp.ones(3))
    assert array.is_ready()
    assert not profiling._is_busy(array)
    assert profiling._is_busy(FakeArray(False))
    assert not profiling._is_busy(np.ones(3))


@dataclasses.dataclass
class Device:
    """A device of JAX."""

    device_kind: str = "TPU v4"
    stats: dict[str, int] | None = None

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def test_utilisation_is_a_share_of_the_published_peak() -> None:
    pod: list[Any] = [Device()] * 8
    peak = accelerators.CHIPS["v4"].bf16_flops
    assert profiling.utilisation(8 * peak, 2.0, pod) == pytest.approx(0.5)
    assert profiling.utilisation(peak, 1.0, pod) == pytest.approx(1 / 8)
    cores: list[Any] = [Device("TPU v3")] * 2  # half a chip each
    flops = accelerators.CHIPS["v3"].bf16_flops
    assert profiling.utilisation(flops, 1.0, cores) == pytest.approx(1.0)
    unknown: Any = Device("something new")
    assert profiling.utilisation(peak, 1.0, [*pod, unknown]) is None
    assert profiling.utilisation(peak, 1.0) is None  # CPUs
    assert profiling.utilisation(peak, 0.0, pod) is None


def test_memory_is_that_of_the_fullest_device() -> None:
    assert profiling.device_memory() == {}  # CPUs
    full = {"peak_bytes_in_use": 9, "bytes_in_use": 4, "bytes_limit": 16, "num_allocs": 99}
    pair: list[Any] = [Device(stats=full), Device(stats={**full, "bytes_in_use": 7})]
    expected = {"device_peak_bytes": 9, "device_bytes": 7, "device_bytes_limit": 16}
    assert profiling.device_memory(pair) == expected
    some: list[Any] = [Device(stats={"bytes_in_use": 5}), Device()]
    assert profiling.device_memory(some) == {"device_bytes": 5}


def traced_steps(workdir: Path) -> set[int]:
    """Return the numbers of the steps in the only trace."""
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
    step, array = jax.jit(lambda x: x + 1), jnp.zeros(())
    with profiling.Profile(workdir, first, enabled) as profile:
        for index in range(first, last):
            with profile.step(index, array):
                array = step(array)


def test_a_trace_of_three_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", 10, 20)
    assert traced_steps(tmp_path / "run") == {12, 13, 14}
    line = f"traced from step 13 on: {tmp_path / 'run' / 'profile'}"
    assert line in capsys.readouterr().out
    train(tmp_path / "other", 0, 8, enabled=False)
    assert not (tmp_path / "other").exists()


def test_a_run_that_ends_early_ends_its_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path / "stopped", 0, 4)
    assert traced_steps(tmp_path / "stopped") == {2, 3}

    def fail() -> None:
        with profiling.Profile(tmp_path / "failed", 0) as profile, profile.step(2):
            raise FloatingPointError("loss is nan")

    with pytest.raises(FloatingPointError):
        fail()
    assert traced_steps(tmp_path / "failed") == {2}
    with caplog.at_level(logging.WARNING):
        train(tmp_path / "short", 0, 2)
    assert "ended before step 3: no trace" in caplog.text
    assert not (tmp_path / "short").exists()


def test_a_trace_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_bucket.served(monkeypatch) as objects:
        train("gs://bucket/run", 0, 8)
    [name] = [name for name in objects if name.endswith(".xplane.pb")]
    file = tmp_path / name.removeprefix("gs://bucket/run/")
    file.parent.mkdir(parents=True)
    file.write_bytes(objects[name])
    assert traced_steps(tmp_path) == {2, 3, 4}
