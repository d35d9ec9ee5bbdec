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
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from etils import epath

from hyper_t5 import files
from hyper_t5.errors import UserError

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"
UPLOAD_SECONDS = 30.0  # to a bucket, which takes about one write a second of an object
SLOW_DATA = 0.1  # the share of a step's time from which waiting for data is worth a word

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
        remote = files.as_path(workdir)
        self._bucket = None if files.is_local(remote) else _Bucket(remote)
        folder = self._bucket.copy if self._bucket else Path(workdir)
        self._shown = remote / JSONL if self._bucket else folder / JSONL
        self._opened = contextlib.ExitStack()
        try:
            self._open(folder, step)
        except OSError as error:
            self._opened.close()
            raise self._write_error(error) from error

    def _open(self, folder: Path, step: int) -> None:
        if self._bucket:
            self._opened.enter_context(self._bucket.temporary)
            self._bucket.fetch(JSONL)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSONL
        dropped = _drop_after(path, step) if path.exists() else 0
        if dropped:
            log.warning(
                "%s: dropped %d lines that are not of steps up to %d", self._shown, dropped, step
            )
        # Unbuffered: what a full disk did not take must not come up again when it is closed.
        self._file = self._opened.enter_context(path.open("ab", buffering=0))
        self._board = _Board(folder / TENSORBOARD, step)
        self._opened.callback(self._board.close)
        if self._bucket:  # at once: no right to write there is to be known now
            self._bucket.send()

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
        if self._bucket:
            self._bucket.send_if_due()

    def _write_error(self, error: OSError) -> UserError:
        return UserError(
            f"could not write {self._shown} or {TENSORBOARD}/ beside it: "
            f"{error.strerror or error}; make room there, or choose another --workdir (the "
            "checkpoints are as they were)"
        )

    def close(self) -> None:
        """Close the files; all that was written is in them already, or goes to the bucket now."""
        try:
            with self._opened:
                if self._bucket:
                    self._bucket.send()
        except OSError as error:
            raise self._write_error(error) from error

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except UserError as error:
            if kind is None:
                raise
            log.warning("%s", error)  # what ended the run is the graver error


class _Bucket:
    """A folder in a bucket, and the copy of it on this machine, `copy`, that is written to."""

    def __init__(self, folder: epath.Path) -> None:
        self._folder = folder
        self.temporary = tempfile.TemporaryDirectory(prefix="hyper_t5_metrics_")
        self.copy = Path(self.temporary.name)
        self._sent: dict[Path, int] = {}  # file -> bytes of it in the bucket
        self._due = 0.0

    def fetch(self, name: str) -> None:
        """Copy a file of the bucket, if it is there, to this machine."""
        with files.as_os_error():
            if (self._folder / name).exists():
                (self.copy / name).write_bytes(files.read_bytes(self._folder / name))

    def send(self) -> None:
        """Copy the files that have grown; OSError where the bucket does not take them."""
        self._due = time.monotonic() + UPLOAD_SECONDS
        for file in sorted(path for path in self.copy.rglob("*") if path.is_file()):
            content = file.read_bytes()
            if self._sent.get(file) == len(content):
                continue
            place = self._folder / file.relative_to(self.copy)
            files.write_bytes(place, content)
            self._sent[file] = len(content)

    def send_if_due(self) -> None:
        """`send`, when it is time again. A bucket out of reach for a while ends no run."""
        if time.monotonic() < self._due:
            return
        try:
            self.send()
        except OSError as error:
            log.warning("%s: not reached, will be tried again: %s", self._folder, error)


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

        step 120/1000  loss 2.345  123.4 examples/s  4567 real tokens/s  MFU 41.2%  ETA 0:03:21

    The first `count` starts the clock and nothing else: that step's time was spent compiling.

    Args:
        total_steps: of the whole run.
        stream: where to print; None for what stdout then is.
        clock: seconds.
        utilisation: seconds of a step -> model FLOPs utilisation between 0 and 1, or None where it
            is not known; printed as MFU.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        utilisation: Callable[[float], float | None] = lambda _: None,
    ) -> None:
        self._total, self._stream, self._clock = total_steps, stream, clock
        self._utilisation = utilisation
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

    def report(
        self, step: int, values: Mapping[str, Any], times: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Print the line of a step, and return the rates: empty if nothing was counted yet.

        ``times`` are seconds by part of a step, as `watch.Times.report` returns them; they are
        returned with the rates, and printed where a step waits long for its data.
        """
        parts = [f"step {step}/{self._total}"]
        parts += [f"{name} {_number(value):.4g}" for name, value in values.items()]
        now, rates = self._clock(), dict(times or {})
        if self._since is not None and self._steps and now > self._since:
            seconds = now - self._since
            rates |= {
                "examples_per_second": self._examples / seconds,
                "tokens_per_second": self._tokens / seconds,
                "seconds_per_step": seconds / self._steps,
            }
            parts += [
                f"{rates['examples_per_second']:.1f} examples/s",
                f"{rates['tokens_per_second']:.0f} real tokens/s",
            ]
            if (share := self._utilisation(rates["seconds_per_step"])) is not None:
                rates["mfu"] = share
                parts.append(f"MFU {share:.1%}")
            waited = rates.get("seconds_data", 0.0) / rates["seconds_per_step"]
            parts += [f"data wait {waited:.0%}"] if waited > SLOW_DATA else []
            left = round((self._total - step) * rates["seconds_per_step"])
            parts.append(f"ETA {datetime.timedelta(seconds=left)}")
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


def _drop_after(path: Path, step: int) -> int:
    """Rewrite the file without lines after `step`, or cut off by a kill; how many those are."""
    kept, dropped = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, TypeError, KeyError):
            keep = False
        kept += [line + "\n"] if keep else []
        dropped += not keep
    if dropped:
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
    return dropped
