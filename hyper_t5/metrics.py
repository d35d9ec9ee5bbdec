"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a line of progress.

Nothing here asks a device for anything: values come in as host numbers, which the training loop
fetches a step late, so that writing never makes the device wait.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from hyper_t5.errors import UserError

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"

log = logging.getLogger(__name__)


def peak_memory_mb() -> float:
    """The most resident memory that this process has had, in MB (10^6 bytes).

    Linux's own count of it: what `getrusage` says there begins with the parent's.
    """
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


class Writer:
    """Writes each set of values to `WORKDIR/metrics.jsonl` and to `WORKDIR/tensorboard/`.

    A line is `{"step": 120, "time": 1700000000.0, "loss": 2.3}`, written through at once. Numbers
    that are not finite stand there as "NaN", "Infinity" and "-Infinity", so that it stays JSON.

    Args:
        workdir: folder of the run; made if it is not there.
        step: the step the run goes on from. Later lines are of a run that was cut off after its
            last checkpoint; they are dropped, as those steps are made again.

    Raises:
        UserError: it cannot be written (no space, no right to).
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int = 0) -> None:
        workdir = Path(workdir)
        self._path = workdir / JSONL
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                _drop_after(self._path, step)
            # Unbuffered: what a full disk did not take must not come up again when it is closed.
            self._file = self._path.open("ab", buffering=0)
            self._board = _Board(workdir / TENSORBOARD, step)
        except OSError as error:
            raise self._write_error(error) from error

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values (host numbers, or numpy scalars) of a step."""
        now = time.time()
        numbers = {name: _number(value) for name, value in values.items()}
        line: dict[str, Any] = {"step": step, "time": round(now, 3)}
        line |= {name: _finite(number) for name, number in numbers.items()}
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._board.write(step, now, numbers)
        except OSError as error:
            raise self._write_error(error) from error

    def _write_error(self, error: OSError) -> UserError:
        return UserError(
            f"could not write {self._path} or {TENSORBOARD}/ beside it: {error.strerror}; make "
            "room there, or choose another --workdir (the checkpoints are as they were)"
        )

    def close(self) -> None:
        """Close the files; all that was written is in them already."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """TensorBoard's event file, written through at each call.

    Not tensorboardX's SummaryWriter: that writes from a thread, which dies of the first error, such
    as a full disk, and then the run waits for it without end.
    """

    def __init__(self, folder: Path, step: int) -> None:
        # Takes a second, which no other command should pay.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        folder.mkdir(parents=True, exist_ok=True)
        # The name holds the time in seconds; a run that goes on within one gets a file of its own.
        suffix = f".{os.getpid()}.{step}"
        self._events = EventsWriter(str(folder / "events"), suffix)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # This is how TensorBoard is told to forget: from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=step + 1, session_log=start)

    def write(self, step: int, now: float, numbers: Mapping[str, float]) -> None:
        """Write the scalars of a step; `now` is the time in seconds."""
        scalars = [
            self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()
        ]
        self._write(step=step, wall_time=now, summary=self._summary(value=scalars))

    def _write(self, **fields: Any) -> None:
        self._events.write_event(self._event(**fields))
        self._events.flush()

    def close(self) -> None:
        """Close the file. What a full disk did not take is given up: it was reported then."""
        with contextlib.suppress(OSError):
            self._events.close()


class Progress:
    """Prints a line when asked, with what was counted since the line before.

        step 120/1000  loss 2.345  123.4 examples/s  4567 real tokens/s  ETA 0:03:21

    The first `count` starts the clock and nothing else: that step's time was spent compiling.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._stream, self._clock = total_steps, stream, clock
        self._since: float | None = None
        self._steps = self._examples = self._tokens = 0

    def count(self, examples: int, tokens: int) -> None:
        """Add a finished step: its real (not padding) examples and tokens."""
        if self._since is None:
            self._since = self._clock()
            return
        self._steps += 1
        self._examples += examples
        self._tokens += tokens

    def report(self, step: int, values: Mapping[str, Any]) -> dict[str, float]:
        """Print the line of a step, and return the rates: empty if nothing was counted yet."""
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {_number(value):.4g}" for name, value in values.items()]
        now, rates = self._clock(), {}
        if self._since is not None and self._steps and now > self._since:
            seconds = now - self._since
            rates = {
                "examples_per_second": self._examples / seconds,
                "tokens_per_second": self._tokens / seconds,
                "seconds_per_step": seconds / self._steps,
            }
            left = round((self._total - step) * rates["seconds_per_step"])
            parts += [
                f"{rates['examples_per_second']:.1f} examples/s",
                f"{rates['tokens_per_second']:.0f} real tokens/s",
                f"ETA {datetime.timedelta(seconds=left)}",
            ]
            self._since, self._steps, self._examples, self._tokens = now, 0, 0, 0
        # Looked up now, not at import, and flushed: the output may be a file that somebody tails.
        print("  ".join(parts), file=self._stream or sys.stdout, flush=True)
        return rates


def _number(value: Any) -> int | float:
    return value if isinstance(value, int | float) else value.item()


def _finite(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without lines after `step`, or cut off in the middle by a kill."""
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            keep = False
        kept += [line + "\n"] if keep else []
        dropped += not keep
    if dropped:
        log.warning("%s: dropped %d lines that are not of steps up to %d", path, dropped, step)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
