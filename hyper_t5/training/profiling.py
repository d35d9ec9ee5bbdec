"""Step times, device memory, model FLOPs utilisation, and a profiler trace of a few steps.

Nothing here waits for a device, except the two ends of a trace.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from hyper_t5.parallel import accelerators
from hyper_t5.utils import files

PROFILE = "profile"  # folder in the workdir
PROFILE_STEPS = (2, 5)  # of a run: the first compiles, the second may too

log = logging.getLogger(__name__)


class StepTimer:
    """Host time of the parts of a step.

        with timer.part("data", ahead=sums):
            batch = next(batches)
        state, sums = step(state, batch)
        timer.step()
        with timer.part("save"):
            checkpointer.save(...)
        values = timer.report()

    The first `step` only starts the clock, as in `metrics.Progress`: that step was compiled.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start: float | None = None
        self._steps = 0
        self._parts = {"data": 0.0, "validate": 0.0, "save": 0.0}

    @contextlib.contextmanager
    def part(self, name: str, ahead: Any = None) -> Iterator[None]:
        """Add the time of the context to a part.

        Args:
          name: "data", "validate" or "save".
          ahead: arrays of the last dispatched step. If the device still computes them at the end
            of the context, nothing has waited, and no time is added.
        """
        start = self._clock()
        yield
        if not any(map(_is_busy, jax.tree.leaves(ahead))):
            self._parts[name] += self._clock() - start

    def step(self) -> None:
        """Count a step."""
        if self._start is None:
            self._restart()
        else:
            self._steps += 1

    def report(self) -> dict[str, float]:
        """Compute the mean seconds per step since the last report; empty without steps.

        Returns:
          ``seconds_data``: waiting for a batch; ``seconds_validate``: validation;
          ``seconds_save``: blocked by a checkpoint;
          ``seconds_compute``: the rest.
        """
        if self._start is None or not self._steps:
            return {}
        total = (self._clock() - self._start) / self._steps
        times = {f"seconds_{name}": seconds / self._steps for name, seconds in self._parts.items()}
        self._restart()
        return times | {"seconds_compute": max(total - sum(times.values()), 0.0)}

    def _restart(self) -> None:
        self._start, self._steps = self._clock(), 0
        self._parts = dict.fromkeys(self._parts, 0.0)


def _is_busy(array: Any) -> bool:
    """Return whether a device still computes an array."""
    # Not documented by JAX. Without it, waits for data are counted whole.
    is_ready = getattr(array, "is_ready", None)
    return is_ready is not None and not is_ready()


def utilisation(
    flops: float, seconds: float, devices: Sequence[jax.Device] | None = None
) -> float | None:
    """Compute the model FLOPs utilisation: the share of the published bf16 peak of the chips.

    Args:
      flops: of a step, on all devices: `flops.train_flops`.
      seconds: of a step.
      devices: those of the mesh; None for all.

    Returns:
      A number in [0, 1]; None if the peak of a device is unknown, as for CPUs.
    """
    devices = jax.devices() if devices is None else devices
    peak = sum(accelerators.peak_of(device.device_kind) or math.nan for device in devices)
    return flops / seconds / peak if peak > 0 and seconds > 0 else None


def device_memory(devices: Iterable[jax.Device] | None = None) -> dict[str, int]:
    """Return bytes of the fullest local device; empty where devices do not report them (CPUs).

    ``device_peak_bytes`` since the start of the process, ``device_bytes`` now,
    ``device_bytes_limit``.
    """
    keys = {
        "device_peak_bytes": "peak_bytes_in_use",
        "device_bytes": "bytes_in_use",
        "device_bytes_limit": "bytes_limit",
    }
    stats = [d.memory_stats() or {} for d in (jax.local_devices() if devices is None else devices)]
    values = {
        name: [device[key] for device in stats if key in device] for name, key in keys.items()
    }
    return {name: max(sizes) for name, sizes in values.items() if sizes}


class Profile:
    """Profiler trace of three early steps in WORKDIR/profile, for TensorBoard's profile plugin.

        with Profile(workdir, first, enabled) as profile:
            for index in range(first, last):
                with profile.step(index, sums):
                    ...  # the step

    One process traces: all run the same program, and a trace is tens of MB and slows its host down.

    Args:
      workdir: folder of the run, local or `gs://`.
      first: first step of the run.
      enabled: False on all processes but one.
    """

    def __init__(self, workdir: str | os.PathLike[str], first: int, enabled: bool = True) -> None:
        self._folder = files.as_path(workdir) / PROFILE
        self._steps = range(first + PROFILE_STEPS[0], first + PROFILE_STEPS[1])
        self._enabled, self._tracing = enabled, False
        self._local: tempfile.TemporaryDirectory | None = None  # the profiler has no buckets

    def step(self, index: int, previous: Any = None) -> contextlib.AbstractContextManager:
        """Annotate a step; start or stop the trace before it.

        Args:
          index: number of the step.
          previous: arrays of the step before, for which the start and the end of the trace wait.
        """
        if self._enabled and index == self._steps.start:
            jax.block_until_ready(previous)
            self._start()
        if self._tracing and index >= self._steps.stop:
            jax.block_until_ready(previous)
            self._stop()
        if self._tracing:
            return jax.profiler.StepTraceAnnotation("train", step_num=index)
        return contextlib.nullcontext()

    def _start(self) -> None:
        if not files.is_local(self._folder):
            self._local = tempfile.TemporaryDirectory(prefix="hyper_t5_profile_")
        jax.profiler.start_trace(self._local.name if self._local else os.fspath(self._folder))
        self._tracing = True

    def _stop(self) -> None:
        self._enabled = self._tracing = False
        jax.profiler.stop_trace()
        if self._local:
            with self._local as local:
                for file in sorted(path for path in Path(local).rglob("*") if path.is_file()):
                    files.write_bytes(self._folder / file.relative_to(local), file.read_bytes())
        print(
            f"traced from step {self._steps.start + 1} on: {self._folder} (view it with "
            f"`tensorboard --logdir {self._folder}` and its plugin tensorboard-plugin-profile)",
            flush=True,
        )

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            self._stop()
        elif self._enabled:
            log.warning("the run ended before step %d: no trace", self._steps.start + 1)
