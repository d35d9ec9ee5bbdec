"""Watching a run: where its time and memory go, a trace of its steps, what a bad step was made of.

Nothing here makes a device wait, save a trace, at its two ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import math
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from hyper_t5 import chips, files
from hyper_t5.errors import UserError

PROFILE, REPLAY = "profile", "replay"  # in the workdir
BATCH, RECORD, STATE = "batch.npz", "replay.json", "state"  # in WORKDIR/replay/STEP
PROFILE_FROM, PROFILE_TO = 2, 5  # steps of a run: the first compiles, the second may too

log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------- time and memory


class Times:
    """Where the seconds of a step go, as the host sees it.

        with times.part("data", ahead=sums):
            batch = next(batches)
        state, sums = step(state, batch)
        times.step()
        with times.part("save"):
            saver.save(...)
        values = times.report()

    The first `step` starts the clock and nothing else, as in `metrics.Progress`: that one compiled.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._steps = 0
        self._parts = dict.fromkeys(("data", "save"), 0.0)

    @contextlib.contextmanager
    def part(self, name: str, ahead: Any = None) -> Iterator[None]:
        """Counts the block as time of "data" or "save".

        Args:
          name: the part.
          ahead: arrays of the last step that was started, where the host runs ahead of the device:
            the block does not count if the device was still busy with them when it ended, since
            then nobody waited for it.
        """
        began = self._clock()
        yield
        if not any(map(_is_busy, jax.tree.leaves(ahead))):
            self._parts[name] += self._clock() - began

    def step(self) -> None:
        """Counts a step."""
        if self._since is None:
            self._restart()
        else:
            self._steps += 1

    def report(self) -> dict[str, float]:
        """Mean seconds of a step since the last report; empty if none was counted.

        ``seconds_data``: waited for a batch; ``seconds_save``: held up by a checkpoint, which is
        written beside the training; ``seconds_compute``: the rest.
        """
        if self._since is None or not self._steps:
            return {}
        total = (self._clock() - self._since) / self._steps
        made = {f"seconds_{name}": spent / self._steps for name, spent in self._parts.items()}
        self._restart()
        return made | {"seconds_compute": max(total - sum(made.values()), 0.0)}

    def _restart(self) -> None:
        self._since, self._steps = self._clock(), 0
        self._parts = dict.fromkeys(self._parts, 0.0)


def _is_busy(array: Any) -> bool:
    """Whether a device is still to make an array; never waits for it."""
    # JAX types this method of its arrays, but does not document it: where it is gone, a wait for
    # data counts whole.
    is_ready = getattr(array, "is_ready", None)
    return is_ready is not None and not is_ready()


def utilisation(
    flops: float, seconds: float, devices: Sequence[jax.Device] | None = None
) -> float | None:
    """Model FLOPs utilisation: the share of the chips' published bf16 peak that a step reaches.

    Args:
      flops: of the whole step, on all devices together: `cost.train_flops`.
      seconds: that it takes.
      devices: those of the mesh; None for all.
    Returns: between 0 and 1; None where the peak of a device is not known, as of a CPU.
    """
    peaks = [chips.peak_of(d.device_kind) for d in (jax.devices() if devices is None else devices)]
    total = sum(peak or math.nan for peak in peaks)
    return flops / seconds / total if total > 0 and seconds > 0 else None


def device_memory(devices: Iterable[jax.Device] | None = None) -> dict[str, int]:
    """Bytes on the fullest of this host's devices; empty where devices do not say, as CPUs.

    ``device_peak_bytes`` since the process began, ``device_bytes`` now, ``device_bytes_limit``.
    """
    names = {
        "device_peak_bytes": "peak_bytes_in_use",
        "device_bytes": "bytes_in_use",
        "device_bytes_limit": "bytes_limit",
    }
    found = [d.memory_stats() or {} for d in (jax.local_devices() if devices is None else devices)]
    made = {name: [stats[key] for stats in found if key in stats] for name, key in names.items()}
    return {name: max(values) for name, values in made.items() if values}


# -------------------------------------------------------------------------------------- profile


class Profile:
    """A trace of three early steps in WORKDIR/profile, for TensorBoard's profile plugin or xprof.

        with Profile(workdir, first, enabled) as profile:
            for index in range(first, last):
                with profile.step(index, sums):
                    ...  # the step

    One process traces, and the run ends its trace when it ends: all hosts run the same program on
    devices of the same kind, and each trace is tens of MB and slows its host down.

    Args:
      workdir: the run's; may lie in a bucket.
      first: the step that the run starts from.
      enabled: False on all processes but one.
    """

    def __init__(self, workdir: str | os.PathLike[str], first: int, enabled: bool = True) -> None:
        self._folder = files.as_path(workdir) / PROFILE
        self._steps = range(first + PROFILE_FROM, first + PROFILE_TO)
        self._enabled, self._tracing = enabled, False
        self._spool: tempfile.TemporaryDirectory | None = None

    def step(self, index: int, made: Any = None) -> contextlib.AbstractContextManager:
        """Around step `index` (its batch, its start); `made`: arrays of the step before it.

        They are waited for where the trace begins and ends, so that it has these steps and no
        other's work.
        """
        if self._enabled and index == self._steps.start:
            jax.block_until_ready(made)
            self._start()
        if self._tracing and index >= self._steps.stop:
            jax.block_until_ready(made)
            self._stop()
        if self._tracing:
            return jax.profiler.StepTraceAnnotation("train", step_num=index)
        return contextlib.nullcontext()

    def close(self) -> None:
        """Ends a trace that the run did not reach the end of."""
        if self._tracing:
            self._stop()
        elif self._enabled:
            log.warning("the run ended before step %d: no trace was made", self._steps.start + 1)
        self._enabled = False

    def _start(self) -> None:
        # The profiler writes to a file system; to a bucket its files are copied.
        if not files.is_local(self._folder):
            self._spool = tempfile.TemporaryDirectory(prefix="hyper_t5_profile_")
        jax.profiler.start_trace(self._spool.name if self._spool else os.fspath(self._folder))
        self._tracing = True

    def _stop(self) -> None:
        self._enabled = self._tracing = False
        jax.profiler.stop_trace()
        if self._spool:
            with self._spool as spool:
                _copy_files(Path(spool), self._folder)
        print(
            f"traced from step {self._steps.start + 1} on: {self._folder} (look at it with "
            f"`tensorboard --logdir {self._folder}` and its plugin tensorboard-plugin-profile)",
            flush=True,
        )

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy_files(source: Path, target: epath.Path) -> None:
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(place, file.read_bytes())


# ---------------------------------------------------------------------------------------- replay


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step as it was saved for a second look.

    Attributes:
      step: its number, counted from 1.
      reason: why it was saved.
      seed: the run's.
      tasks: the names of the batch's tasks, one a slot.
      loss: per token, in nats; grad_norm: of the gradient; both may be no numbers.
      config: the run's, as JSON has it.
      batch: name -> array, all hosts' rows.
      state: folder of the state that the step started from; None where it was not saved.
    """

    step: int
    reason: str
    seed: int
    tasks: list[str]
    loss: float
    grad_norm: float
    config: dict[str, Any]
    batch: dict[str, np.ndarray]
    state: epath.Path | None = None


def save_replay(
    workdir: str | os.PathLike[str],
    replay: Replay,
    save_state: Callable[[epath.Path], None] | None = None,
    process: int = 0,
    processes: int = 1,
) -> epath.Path | None:
    """Writes WORKDIR/replay/STEP/{batch.npz, replay.json, state/}; returns the folder.

    Of several processes all call it: each writes the rows it has of the batch, `batch.I-of-N.npz`,
    in the order of the global batch, and the first one writes the rest.

    What goes wrong is logged, and None returned: the run is about to end for a graver reason.

    Args:
      workdir: the run's; may lie in a bucket.
      replay: its ``batch`` has this process's rows, its ``state`` is not read.
      save_state: called with a folder to save the state that the step started from.
      process: this one; processes: how many there are.
    """
    folder = files.as_path(workdir) / REPLAY / str(replay.step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        packed, arrays = io.BytesIO(), dict[str, Any](replay.batch)
        np.savez(packed, **arrays)
        files.write_bytes(folder / _batch_file(process, processes), packed.getvalue())
        if save_state is not None:
            save_state(folder / STATE)
        if process == 0:
            record = dataclasses.asdict(dataclasses.replace(replay, batch={}, state=None))
            del record["batch"], record["state"]
            shapes = _row_shapes(replay.batch)
            # As text: numbers that are not finite are no JSON.
            record |= {"loss": str(replay.loss), "grad_norm": str(replay.grad_norm)}
            # Last: where it is, the rest is.
            record |= {"processes": processes, "arrays": shapes, "state": save_state is not None}
            files.write_json(folder / RECORD, record)
    except Exception as error:
        log.warning("%s: step %d could not be saved for replay: %s", folder, replay.step, error)
        return None
    return folder


def _batch_file(process: int, processes: int) -> str:
    return BATCH if processes == 1 else f"batch.{process}-of-{processes}.npz"


def load_replay(folder: str | os.PathLike[str]) -> Replay:
    """What `save_replay` wrote there; UserError naming file and field where it is not that."""
    place = files.as_path(folder)
    record = files.read_json(place / RECORD)
    kinds = {
        "step": int,
        "reason": str,
        "seed": int,
        "tasks": list,
        "loss": str,
        "grad_norm": str,
        "config": dict,
        "processes": int,
        "arrays": dict,
        "state": bool,
    }
    for name, kind in kinds.items():
        if not isinstance(record.get(name), kind):
            raise _not_a_replay(place / RECORD, f"{name} is missing or no {kind.__name__}")
    if record["state"] and not (place / STATE).exists():
        raise _not_a_replay(place / STATE, "is missing")
    processes, arrays = record.pop("processes"), record.pop("arrays")
    parts = [_read_part(place / _batch_file(i, processes), arrays) for i in range(processes)]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in arrays}
    try:
        numbers = {name: float(record[name]) for name in ("loss", "grad_norm")}
    except ValueError as error:
        raise _not_a_replay(place / RECORD, str(error)) from error
    state = place / STATE if record["state"] else None
    return Replay(**(record | numbers | {"batch": batch, "state": state}))


def _read_part(file: epath.Path, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One process's rows; a zip has a checksum of each of its files, which reading compares."""
    try:
        with np.load(io.BytesIO(files.read_bytes(file)), allow_pickle=False) as packed:
            found = {name: packed[name] for name in packed.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _not_a_replay(file, f"cannot be read ({error})") from error
    shapes = _row_shapes(found)
    if shapes != arrays:
        raise _not_a_replay(file, f"has {json.dumps(shapes)}, {RECORD} says {json.dumps(arrays)}")
    return found


def _row_shapes(batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Name -> [shape of one row, dtype], as JSON has it."""
    return {name: [list(array.shape[1:]), str(array.dtype)] for name, array in batch.items()}


def _not_a_replay(file: epath.Path, what: str) -> UserError:
    return UserError(f"{file}: {what}; give a folder WORKDIR/{REPLAY}/STEP as a run wrote it")
