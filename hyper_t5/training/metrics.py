"""Metrics of a run: metrics.jsonl, TensorBoard, and lines of progress on stdout.

All values are host numbers, which the training loop fetches a step late; the device never waits.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from hyper_t5.checkpoints.workdir import METRICS_FILE
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

TENSORBOARD = "tensorboard"
UPLOAD_SECONDS = 30.0  # buckets accept about one write per second and object
DATA_WAIT = 0.1  # share of a step's time; progress lines show longer waits for data
NOT_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

log = logging.getLogger(__name__)


class Writer:
    """Writer of `WORKDIR/metrics.jsonl` and `WORKDIR/tensorboard/`; a context manager.

    Each line of metrics.jsonl is written through at once: `{"step": 120, "time": 1700000000.0,
    "loss": 2.3}`. Non-finite numbers are the strings "NaN", "Infinity" and "-Infinity".

    Args:
      workdir: folder of the run; created if necessary.
      step: the step from which the run resumes. Later lines are of steps that will be repeated;
        they are dropped.

    Raises:
      UserError: a file cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int = 0) -> None:
        folder = files.as_path(workdir)
        self._path = folder / METRICS_FILE
        self._bucket: _Bucket | None = None
        with self._user_errors(), contextlib.ExitStack() as stack:
            local = Path(folder)
            if not files.is_local(folder):
                local = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                self._bucket = _Bucket(folder, local)
            local.mkdir(parents=True, exist_ok=True)
            dropped = _drop_after(local / METRICS_FILE, step)
            if dropped:
                log.warning("%s: dropped %d lines after step %d", self._path, dropped, step)
            # Unbuffered: after an error nothing is left to be written at close.
            self._file = stack.enter_context((local / METRICS_FILE).open("ab", buffering=0))
            self._tensorboard = _TensorBoard(local / TENSORBOARD, step)
            stack.callback(self._tensorboard.close)
            if self._bucket:
                self._bucket.upload()  # a bucket that cannot be written is an error now
            self._stack = stack.pop_all()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values of a step: Python numbers or NumPy scalars."""
        now = time.time()
        numbers = {name: np.asarray(value).item() for name, value in values.items()}
        line: dict[str, Any] = {"step": step, "time": round(now, 3)}
        line |= {k: x if math.isfinite(x) else NOT_FINITE[str(x)] for k, x in numbers.items()}
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        with self._user_errors():
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._tensorboard.write(step, now, numbers)
        if self._bucket:
            self._bucket.upload_if_due()

    @contextlib.contextmanager
    def _user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"could not write {self._path} or {TENSORBOARD}/ beside it: "
                f"{error.strerror or error}; make room there, or choose another --workdir "
                "(checkpoints are unchanged)"
            ) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            with self._user_errors(), self._stack:
                if self._bucket:
                    self._bucket.upload()
        except UserError as error:
            if kind is None:
                raise
            log.warning("%s", error)  # the first error is the one to raise


class _Bucket:
    """Mirror of a local folder in a bucket, whose objects cannot be appended to."""

    def __init__(self, remote: epath.Path, local: Path) -> None:
        self._remote, self._local = remote, local
        self._due = 0.0
        with files.as_os_error():
            if (remote / METRICS_FILE).exists():
                (local / METRICS_FILE).write_bytes(files.read_bytes(remote / METRICS_FILE))

    def upload(self) -> None:
        self._due = time.monotonic() + UPLOAD_SECONDS
        for file in sorted(path for path in self._local.rglob("*") if path.is_file()):
            files.write_bytes(self._remote / file.relative_to(self._local), file.read_bytes())

    def upload_if_due(self) -> None:
        """Upload every UPLOAD_SECONDS; an unreachable bucket is tried again later."""
        if time.monotonic() < self._due:
            return
        try:
            self.upload()
        except OSError as error:
            log.warning("%s: upload failed, will be retried: %s", self._remote, error)


class _TensorBoard:
    """Event file of scalars, written through at each call.

    tensorboardX's SummaryWriter writes from a thread, which ends after an error such as a full
    disk; the run then blocks on its queue.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter  # takes a second to import
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        # The default name has the time in seconds; a run may resume within one.
        self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}.{step}")
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard discards earlier events from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
        scalars = [self._summary.Value(tag=k, simple_value=x) for k, x in numbers.items()]
        self._write(step=step, wall_time=now, summary=self._summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        self._events.write_event(self._event(**fields))
        self._events.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `write` has raised it
            self._events.close()


class Progress:
    """Lines of progress, with rates since the line before.

        step 120/1000  loss 2.345  123.4 examples/s  4567 real tokens/s  MFU 41.2%  ETA 0:03:21

    The first `count` only starts the clock: that step was compiled. `utilisation` maps the seconds
    of a step to its model FLOPs utilisation (MFU) in [0, 1], or None if that is unknown.
    """

    def __init__(
        self,
        total_steps: int,
        clock: Callable[[], float] = time.monotonic,
        utilisation: Callable[[float], float | None] = lambda _: None,
    ) -> None:
        self._total, self._clock, self._utilisation = total_steps, clock, utilisation
        self._start: float | None = None
        self._steps = self._examples = self._tokens = 0

    def count(self, examples: int, tokens: int) -> None:
        """Count a finished step with its real (not padding) examples and tokens."""
        if self._start is None:
            self._start = self._clock()
            return
        self._steps += 1
        self._examples += examples
        self._tokens += tokens

    def report(
        self, step: int, values: Mapping[str, Any], times: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Print the line of a step.

        Returns:
          The rates, if any step was counted, and `times`, those of `profiling.StepTimer.report`.
        """
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {value:.4g}" for name, value in values.items()]
        now, rates = self._clock(), dict(times or {})
        if self._start is not None and self._steps and now > self._start:
            seconds = now - self._start
            rates["examples_per_second"] = self._examples / seconds
            rates["tokens_per_second"] = self._tokens / seconds
            rates["seconds_per_step"] = per_step = seconds / self._steps
            parts.append(f"{rates['examples_per_second']:.1f} examples/s")
            parts.append(f"{rates['tokens_per_second']:.0f} real tokens/s")
            if (mfu := self._utilisation(per_step)) is not None:
                rates["mfu"] = mfu
                parts.append(f"MFU {mfu:.1%}")
            data_wait = rates.get("seconds_data", 0.0) / per_step
            parts += [f"data wait {data_wait:.0%}"] if data_wait > DATA_WAIT else []
            eta = datetime.timedelta(seconds=round((self._total - step) * per_step))
            parts.append(f"ETA {eta}")
            self._start, self._steps, self._examples, self._tokens = now, 0, 0, 0
        print("  ".join(parts), flush=True)
        return rates


def _drop_after(path: Path, step: int) -> int:
    """Remove lines after a step, or cut off by a kill, from metrics.jsonl; returns how many."""
    if not path.exists():
        return 0
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(line)["step"] <= step:
                kept.append(f"{line}\n")
    if len(kept) < len(lines):
        files.write_text(path, "".join(kept))
    return len(lines) - len(kept)
