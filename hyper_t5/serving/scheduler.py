"""The thread that owns JAX: it takes rows and jobs, and decodes all lanes in turn.

A row joins its lane at the next step where a slot is free and leaves it at its end. Jobs, such as
generating an adapter, run between steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from hyper_t5.adapters import AdapterSpec
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.serving.lane import ENCODE_ROWS, Lane, LaneRow, StepResult


class QueueFullError(Exception):
    """More rows wait than ``--max_queue``."""


class StoppedError(Exception):
    """The scheduler's thread has ended by an error."""


@dataclasses.dataclass
class ServedRow:
    """A row of a request.

    Attributes:
      row: what the lane takes.
      lane: the spec of its lane.
      max_tokens: the largest number of tokens.
      emit: receives (token, result of the step, slot) of each token, and at the end (None, reason).
        It is called in the scheduler's thread and returns whether to go on.
      cancelled: set by the request's thread.
      count: the number of tokens so far.
    """

    row: LaneRow
    lane: AdapterSpec
    max_tokens: int
    emit: Callable[[int | None, Any, int], bool]
    cancelled: bool = False
    count: int = 0


class Scheduler:
    """See the module's docstring. Start it with `start`, from any thread; stop it with `stop`.

    Args:
      lanes: by spec.
      max_queue: rows that may wait.
    """

    def __init__(self, lanes: Mapping[AdapterSpec, Lane], max_queue: int) -> None:
        self._lanes, self._max_queue = dict(lanes), max_queue
        self._slots: dict[AdapterSpec, list[ServedRow | None]] = {
            spec: [None] * lane.slots for spec, lane in lanes.items()
        }
        self._waiting: dict[AdapterSpec, deque[ServedRow]] = {spec: deque() for spec in lanes}
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pending = 0  # rows submitted and in no slot yet
        self._lock = threading.Lock()
        self._stopping = self._failed = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self.steps = self.slot_steps = self.used_slot_steps = 0

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Finish all rows, then end the thread."""
        self._stopping = True
        self._inbox.put(None)
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def queued(self) -> int:
        """The number of rows that wait for a slot."""
        return self._pending

    def submit(self, rows: Sequence[ServedRow]) -> None:
        """Add the rows of a request, all or none.

        Raises:
          QueueFullError: too many would wait.
          StoppedError: the thread has failed.
        """
        with self._lock:
            if self._failed:
                raise StoppedError
            if self._pending + len(rows) > self._max_queue:
                raise QueueFullError
            self._pending += len(rows)
        for row in rows:
            self._inbox.put(row)

    def call(self, job: Callable[[], Any]) -> Future[Any]:
        """Run a job in the thread, between steps."""
        future: Future[Any] = Future()
        self._inbox.put((job, future))
        return future

    # --------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException:
            # Out of memory, say. Waiting requests end with an error, /health says 503.
            self._failed = True
            self._take(block=False)
            rows = [row for slots in self._slots.values() for row in slots]
            for row in [*rows, *itertools.chain(*self._waiting.values())]:
                if row is not None:
                    row.emit(None, "error", 0)
            raise

    def _serve(self) -> None:
        while True:
            busy = any(any(slots) for slots in self._slots.values())
            waits = any(self._waiting.values())
            self._take(block=not busy and not waits)
            if self._stopping and not busy and not waits and self._inbox.empty():
                return
            for spec, lane in self._lanes.items():
                self._insert(spec, lane)
                if any(self._slots[spec]):
                    self._step(spec, lane)

    def _take(self, block: bool) -> None:
        """Take what has arrived: rows to their lane's queue; jobs are run."""
        while block or not self._inbox.empty():
            item = self._inbox.get()
            block = False
            if isinstance(item, ServedRow):
                self._waiting[item.lane].append(item)
            elif item is not None:
                job, future = item
                try:
                    future.set_result(job())
                except BaseException as error:  # raised again where the result is read
                    future.set_exception(error)

    def _insert(self, spec: AdapterSpec, lane: Lane) -> None:
        slots, waiting = self._slots[spec], self._waiting[spec]
        if waiting and not any(slots):
            lane.rewind()
        while waiting:
            free = [i for i, row in enumerate(slots) if row is None][:ENCODE_ROWS]
            rows: list[ServedRow] = []
            while waiting and len(rows) < len(free):
                row = waiting.popleft()
                with self._lock:
                    self._pending -= 1
                if row.cancelled:
                    row.emit(None, "cancelled", 0)
                else:
                    rows.append(row)
            if not rows:
                return
            for slot, row in zip(free, rows, strict=False):
                slots[slot] = row
            lane.insert([row.row for row in rows], free[: len(rows)])

    def _step(self, spec: AdapterSpec, lane: Lane) -> None:
        result = lane.step()
        self.steps += 1
        self.slot_steps += lane.slots
        for slot, row in enumerate(self._slots[spec]):
            if row is None:
                continue
            self.used_slot_steps += 1
            if reason := _deliver(row, result, slot):
                self._slots[spec][slot] = None
                row.emit(None, reason, slot)


def _deliver(row: ServedRow, result: StepResult, slot: int) -> str:
    """Hand a row its token; return why it ends, '' where it does not."""
    if row.cancelled:
        return "cancelled"
    token = int(result.tokens[slot])
    if token == EOS_ID:
        return "stop"
    row.count += 1
    if not row.emit(token, result, slot):
        return "stop"
    return "length" if row.count >= row.max_tokens else ""
