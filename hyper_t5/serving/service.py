"""What the server does, without HTTP: adapters from text, rows into lanes, tokens out as text."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5.adapters import AdapterSpec
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.inference.predictor import (
    Adapter,
    GenerationConfig,
    Predictor,
    PredictRow,
    PredictStats,
)
from hyper_t5.serving import lane as lane_lib
from hyper_t5.serving.lane import Lane, LaneRow
from hyper_t5.serving.scheduler import Scheduler, ServedRow
from hyper_t5.serving.store import AdapterStore, check_name, task_digest
from hyper_t5.tasks import MIXTURES
from hyper_t5.utils.errors import UserError

SAMPLE_TASKS = 8  # of the run, which the page offers


class RefusedError(Exception):
    """A request that cannot be served: the HTTP status, and one sentence."""

    def __init__(self, status: int, message: str, field: str = "") -> None:
        super().__init__(message)
        self.status, self.field = status, field


class Token(NamedTuple):
    """A generated token: its text, log-probability, and the most likely tokens with theirs."""

    text: str
    log_prob: float
    top: dict[str, float]


class Delta(NamedTuple):
    """New text of a row; ``reason`` is set at its end: 'stop', 'length', 'cancelled' or 'error'."""

    text: str
    tokens: tuple[Token, ...] = ()
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Sizes of a server.

    Attributes:
      max_batch: slots of each lane.
      max_queue: rows that may wait.
      max_adapters: adapters in memory.
      max_input: the longest prompt, in ids.
      max_output: the longest output, in tokens.
    """

    max_batch: int = 16
    max_queue: int = 256
    max_adapters: int = 64
    max_input: int = 256
    max_output: int = 128


class Service:
    """A backbone, the run that generates adapters for it if any, and the adapters so far.

    Args:
      predictor: the backbone and the run.
      name: of the base model.
      folder: where generated adapters are kept.
      adapters: name -> native folder, served from the start.
      limits: sizes.
    """

    def __init__(
        self,
        predictor: Predictor,
        name: str,
        folder: Path,
        adapters: dict[str, Path],
        limits: Limits,
    ) -> None:
        self.predictor, self.name, self.limits = predictor, name, limits
        self.created = int(time.time())
        run = predictor.run
        if run is not None and run.model.system.conditioned_on == "input":
            raise UserError(
                f"system={run.config.system} generates adapters from each input, and the server "
                "generates them from a task; use `hyper-t5 predict`"
            )
        self.store = AdapterStore(predictor, folder, limits.max_adapters)
        specs = [AdapterSpec()]
        if run is not None:
            specs.append(self._probe().adapters.spec)
        specs += [self.store.load(*item).adapters.spec for item in adapters.items()]
        lanes: dict[AdapterSpec, Lane] = {}
        for spec in sorted(set(specs), key=lambda s: -len(repr(s))):
            if not any(lane_lib.fits(spec, other) for other in lanes):
                lanes[spec] = Lane(
                    predictor.backbone.sizes,
                    predictor.backbone.params,
                    spec,
                    limits.max_batch,
                    limits.max_input,
                    limits.max_output,
                )
        self.lanes = lanes
        self.scheduler = Scheduler(lanes, limits.max_queue)

    @property
    def vocab(self) -> Vocabulary:
        """The backbone's vocabulary."""
        return self.predictor.backbone.vocab

    def _probe(self) -> Adapter:
        """Generate some adapter, which compiles the hypermodel."""
        task = {"instruction": "a", "examples": [{"input": "a", "output": "a"}]}
        return self.predictor.adapt_all([task], log=lambda _: None)[0]

    def warm_up(self) -> list[str]:
        """Compile every program that serving runs; return a line for each lane."""
        lines = []
        for spec, lane in self.lanes.items():
            lengths = lane.warm_up()
            kinds = [k for k in ("lora", "prefix", "bottleneck", "memory") if getattr(spec, k)]
            shape = "+".join(kinds) or "no adapter"
            lines.append(f"{shape}: {lane.slots} slots, inputs of {', '.join(map(str, lengths))}")
        return lines

    # --------------------------------------------------------------------------- adapters

    def adapt(self, task: dict[str, Any], name: str = "") -> Future[dict[str, Any]]:
        """Generate the adapter of a task, or find it; the result describes it."""
        return self.scheduler.call(lambda: self._adapt(task, name))

    def _adapt(self, task: dict[str, Any], name: str) -> dict[str, Any]:
        run = self.predictor.run
        if run is None:
            raise RefusedError(
                409,
                "this server has a backbone without a hypermodel; start it with --workdir of a "
                "run, or load adapter folders",
            )
        self._check_free(name)
        digest = task_digest(str(run.digests), task, str(run.config.data.chunks))
        if existing := self.store.find(digest):
            if name and name != existing:
                self.store.add(name, self._stored(existing), {"digest": digest, "seconds": 0.0})
            return self.store.describe(name or existing) | {"cached": True}
        start = time.monotonic()
        adapter = self.predictor.adapt_all([task], log=lambda _: None)[0]
        seconds = time.monotonic() - start
        name = check_name(name or f"task-{digest[:12]}")
        self.store.add(name, adapter, {"digest": digest, "seconds": seconds})
        return self.store.describe(name) | {"cached": False}

    def _check_free(self, name: str) -> None:
        if name == self.name:
            raise RefusedError(409, f"{name} is the name of the base model; choose another", "name")

    def load(self, name: str, folder: Path) -> None:
        """Load a native adapter folder under a name; it must fit a lane."""
        self._check_free(name)
        adapter = self.store.load(name, folder)
        try:
            self._lane_of(adapter)
        except RefusedError:
            self.store.remove(name)
            raise

    def _stored(self, name: str) -> Adapter:
        adapter = self.store.get(name)
        assert adapter is not None
        return adapter

    def _lane_of(self, adapter: Adapter | None) -> AdapterSpec:
        if adapter is None:
            return min(self.lanes, key=lambda spec: len(repr(spec)))
        if adapter.hypermodel is not None:
            raise RefusedError(409, "adapters that are generated from each input are not served")
        for spec in self.lanes:
            if lane_lib.fits(adapter.adapters.spec, spec):
                return spec
        raise RefusedError(
            409,
            f"adapter {adapter.name}: its shape is larger than those this server has programs for; "
            "start the server with --adapter NAME=FOLDER of it",
        )

    # --------------------------------------------------------------------------- rows

    def find(self, model: str) -> Adapter | None:
        """Return the adapter of a model name; None is the base model."""
        if model == self.name:
            return None
        adapter = self.store.get(model)
        if adapter is None:
            raise RefusedError(
                404, f"The model `{model[:100]}` does not exist; GET /v1/models lists them", "model"
            )
        return adapter

    def submit(
        self,
        prompts: Sequence[str],
        adapter: Adapter | None,
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int],
        stops: Sequence[str],
        top_logprobs: int,
    ) -> tuple[list[RowStream], int]:
        """Queue the rows of a request, one for each prompt and seed; return them and their ids.

        Raises:
          RefusedError: a prompt or output that is too long, or an adapter without a lane.
          QueueFullError: too many rows wait.
        """
        if max_tokens > self.limits.max_output:
            raise RefusedError(
                400, f"max_tokens: at most {self.limits.max_output} here", "max_tokens"
            )
        spec = self._lane_of(adapter)
        padded = self.lanes[spec].pad(None if adapter is None else adapter.adapters)
        encoded = self._encode(prompts, adapter)
        loop = asyncio.get_running_loop()
        streams = []
        for ids in encoded:
            for seed in seeds:
                row = LaneRow(ids, padded, temperature, top_p, seed)
                streams.append(
                    RowStream(loop, self.vocab, spec, row, max_tokens, stops, top_logprobs)
                )
        self.scheduler.submit([stream.row for stream in streams])
        return streams, sum(map(len, encoded))

    def _encode(self, prompts: Sequence[str], adapter: Adapter | None) -> list[list[int]]:
        rows = [PredictRow(i, prompt, adapter) for i, prompt in enumerate(prompts)]
        config = GenerationConfig(max_input_length=self.limits.max_input, on_long="refuse")
        try:
            encoded = self.predictor.encode(rows, config, PredictStats(), "prompt {}".format)
        except UserError:
            encoded = [[0] * (self.limits.max_input + 1)]
        if max(map(len, encoded)) > self.limits.max_input:
            raise RefusedError(
                400,
                f"prompt: longer than {self.limits.max_input} tokens, with EOS and the task's text "
                "where it precedes the input; shorten it",
                "prompt",
            )
        return encoded

    def sample_tasks(self) -> list[dict[str, Any]]:
        """Return some held-out tasks of the run with inputs, for the page; [] where it has none."""
        run = self.predictor.run
        if run is None or run.config.data.mixture not in MIXTURES:
            return []
        dataset = MIXTURES[run.config.data.mixture]
        try:
            tasks = dataset.load_rows(run.config.data, dataset.held_out[0], self.vocab)
            read = [reader() for reader in list(tasks.readers.values())[::5][:SAMPLE_TASKS]]
        except (UserError, OSError):  # its data are not on this machine
            return []
        return [
            {
                "name": task.name,
                "instruction": task.instruction,
                "examples": [{"input": x, "output": y} for x, y in task.examples[:2]],
                "inputs": [row.input for row in task.rows[:3]],
            }
            for task in read
        ]


class RowStream:
    """The text of one row, as it is generated."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        vocab: Vocabulary,
        lane: AdapterSpec,
        row: LaneRow,
        max_tokens: int,
        stops: Sequence[str],
        top_logprobs: int,
    ) -> None:
        self.row = ServedRow(row, lane, max_tokens, self._emit)
        self._loop, self._vocab, self._stops, self._top = loop, vocab, stops, top_logprobs
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._ids: list[int] = []
        self._text, self._sent = "", 0

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Yield the deltas; the last has a reason."""
        while True:
            delta = await self._queue.get()
            yield delta
            if delta.reason:
                return

    def cancel(self) -> None:
        """Free the row's slot at the next step."""
        self.row.cancelled = True

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return len(self._ids)

    def _emit(self, token: int | None, result: Any, slot: int) -> bool:
        """Take a token; called in the scheduler's thread. Returns whether to go on."""
        if token is None:
            rest = self._text[self._sent :]
            self._put(Delta(rest if result in ("stop", "length") else "", (), result))
            return False
        self._ids.append(token)
        before, self._text = self._text, self._vocab.decode(self._ids)
        tokens = (self._token(token, result, slot, self._text[len(before) :]),)
        ends = [self._text.find(stop) for stop in self._stops]
        if any(end >= 0 for end in ends):
            self._text = self._text[: min(end for end in ends if end >= 0)]
            self._put(Delta(self._text[self._sent :], tokens))
            self._sent = len(self._text)
            return False
        safe = len(self._text) - max(map(self._overlap, self._stops), default=0)
        if self._text.endswith("\ufffd"):  # part of a character
            safe = min(safe, len(self._text) - 1)
        new, self._sent = self._text[self._sent : safe], max(self._sent, safe)
        self._put(Delta(new, tokens))
        return True

    def _overlap(self, stop: str) -> int:
        """Return the length of the text's end that may become a stop string."""
        lengths = range(min(len(stop) - 1, len(self._text)), 0, -1)
        return next((n for n in lengths if self._text.endswith(stop[:n])), 0)

    def _token(self, token: int, result: Any, slot: int, text: str) -> Token:
        top = {
            self._vocab.decode([int(i)]) or f"<{int(i)}>": float(p)
            for i, p in zip(
                result.top_ids[slot][: self._top], result.top_log_probs[slot], strict=False
            )
        }
        return Token(text, float(result.log_probs[slot]), top)

    def _put(self, delta: Delta) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
            self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
