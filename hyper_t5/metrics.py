"""Where a run's numbers go: metrics.jsonl, TensorBoard, and a line of progress.

Nothing here asks a device for anything: values come in as host numbers, which the training loop
fetches a step late, so that writing never makes the device wait.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

JSONL, TENSORBOARD = "metrics.jsonl", "tensorboard"

log = logging.getLogger(__name__)


class Writer:
    """Writes each set of values to `WORKDIR/metrics.jsonl` and to `WORKDIR/tensorboard/`.

    A line is `{"step": 120, "time": 1700000000.0, "loss": 2.3}`, written through at once. Numbers
    that are not finite stand there as "NaN", "Infinity" and "-Infinity", so that it stays JSON.

    Args:
        workdir: folder of the run; made if it is not there.
        step: the step the run goes on from. Later lines are of a run that was cut off after its
            last checkpoint; they are dropped, as those steps are made again.
    """

    def __init__(self, workdir: str | os.PathLike[str], step: int = 0) -> None:
        import tensorboardX  # takes a second, which no other command should pay

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / JSONL
        if path.exists():
            _drop_after(path, step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        # purge_step is how TensorBoard is told to forget: from this step on.
        self._board = tensorboardX.SummaryWriter(str(workdir / TENSORBOARD), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the values (host numbers, or numpy scalars) of a step."""
        now = time.time()
        numbers = {name: _number(value) for name, value in values.items()}
        line: dict[str, Any] = {"step": step, "time": round(now, 3)}
        line |= {name: _finite(number) for name, number in numbers.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step, now)

    def close(self) -> None:
        """Write out what is still held back, and close the files."""
        self._file.close()
        self._board.close()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
