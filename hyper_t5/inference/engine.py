"""Decoding engine: continuous batching of rows of many tasks, with few compiled programs.

A batch has T task slots of G slots each. A task slot holds the adapters of one task, a slot decodes
one row of it. A finished row is replaced at once by a row that was encoded meanwhile, and a task
slot without rows takes another task, so that no slot waits for the longest output of its batch.
Inputs are padded to a few bucket lengths.

Shapes: B = T*G rows, L inputs, S cache positions, N layers, H heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from hyper_t5.adapters import Adapters
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.t5 import T5, DecoderCache, T5Config
from hyper_t5.t5.decoding import Sampling, decode, sample

Array = jax.Array
BatchLayout = tuple[int, int]  # T task slots of G slots

SHORTEST = 16  # the smallest bucket length
CACHE = 32  # cache positions until a row needs more
# Rows are replaced when one slot in this many is free. On two cores, T5 mini, 384 rows with outputs
# of 10 tokens on average and 64 at most: 9.4 s, against 11.3 s for batches sorted by length.
REFILL = 8


@dataclasses.dataclass(frozen=True)
class DecodeRow:
    """One input: its number, which seeds its sampling; its task; its ids."""

    number: int
    task: int
    ids: Sequence[int]


# Rows [T*G, L] and the task of each task slot [T] -> adapters of T tasks, and ids [T*G, L'] to
# encode; L' is 0 where the adapters hold the encoding.
Source = Callable[[Array, tuple[int, ...]], tuple[Adapters | None, Array]]


@dataclasses.dataclass
class DecodeStats:
    """Counts of `decode_rows`.

    Attributes:
      rows: finished rows.
      tokens: generated tokens.
      slot_steps: B for each decoder step.
    """

    rows: int = 0
    tokens: int = 0
    slot_steps: int = 0

    @property
    def idle(self) -> float:
        """The share of slot steps without a row."""
        return 1 - self.tokens / self.slot_steps if self.slot_steps else 0.0


def choose_layout(tasks: int, rows: int, batch: int) -> BatchLayout:
    """Return (T, G): at most ``batch`` slots, at least one task slot a task where they suffice.

    A task slot's adapters are stored once for its G rows. A G of 1 (as many ``tasks`` as ``batch``)
    lets any row take any slot, which is faster where adapters are light.
    """
    batch = max(1, min(batch, 1 << (rows - 1).bit_length()))
    if tasks == 1:
        return 1, batch
    rows_per_task = max(1, batch // tasks)
    rows_per_task = 1 << (rows_per_task.bit_length() - 1)
    return batch // rows_per_task, rows_per_task


def padded_length(length: int) -> int:
    """Return the bucket length: 16, 24, 32, 48, 64, 96, ..., at most a third of it padding."""
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > SHORTEST and length <= size * 3 // 4 else size


def by_length(rows: Iterable[DecodeRow], batch: int) -> Iterator[tuple[int, list[DecodeRow]]]:
    """Yield (bucket length, rows), shorter rows first.

    Too few rows for a batch join the next bucket, if that is at most twice as long.
    """
    groups = itertools.groupby(
        sorted(rows, key=lambda row: len(row.ids)), lambda row: padded_length(len(row.ids))
    )
    lengths = [(length, list(members)) for length, members in groups]
    carried: list[DecodeRow] = []
    for i, (length, members) in enumerate(lengths):
        carried += members
        following = lengths[i + 1][0] if i + 1 < len(lengths) else None
        if following is None or len(carried) >= batch or following > 2 * length:
            yield length, carried
            carried = []


def decode_rows(
    config: T5Config,
    params: Any,
    rows: Iterable[DecodeRow],
    source: Source,
    layout: BatchLayout,
    *,
    steps: int,
    beam_size: int = 1,
    sampling: Sampling | None = None,
    stats: DecodeStats | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, ids [S], zeros after EOS) of every row, in the order in which they end.

    Args:
      config: of the backbone.
      params: of the backbone.
      rows: of any tasks and lengths.
      source: of adapters and ids to encode.
      layout: (T, G), from `choose_layout`.
      steps: the largest number of tokens of an output.
      beam_size: 1 is greedy, or sampling. Beams decode batch by batch: a row's beams move within
        the cache that a batch shares.
      sampling: None is greedy.
      stats: updated while this runs.
    """
    stats = DecodeStats() if stats is None else stats
    run = _Settings(config, params, source, *layout, steps, beam_size, sampling, stats)
    yield from (_decode_beams if beam_size > 1 else _decode_continuously)(
        run, by_length(rows, run.slots)
    )


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The arguments of ``decode_rows``."""

    config: T5Config
    params: Any
    source: Source
    task_slots: int
    rows_per_task: int
    steps: int
    beam_size: int
    sampling: Sampling | None
    stats: DecodeStats

    @property
    def slots(self) -> int:
        return self.task_slots * self.rows_per_task


# ------------------------------------------------------------------------------- host side


@dataclasses.dataclass
class _Group:
    """Up to G rows of one task that are encoded together; ``first`` is the slot of the first."""

    task: int
    rows: deque[DecodeRow]
    first: int


@dataclasses.dataclass
class _EncodedBlock:
    """Encoded rows that wait for a slot."""

    groups: list[_Group]
    encoded: EncodedRows


def _decode_beams(
    run: _Settings, buckets: Iterable[tuple[int, list[DecodeRow]]]
) -> Iterator[tuple[int, np.ndarray]]:
    for length, rows in buckets:
        queues = _queues(rows)
        while queues:
            groups = _take_groups(run, queues)
            ids, tasks = _pad(run, groups, length)
            adapters, ids = run.source(ids, tasks)
            options = {"steps": run.steps, "beam_size": run.beam_size}
            tokens, _ = decode(run.config, run.params, ids, adapters, **options)
            tokens = np.asarray(tokens)
            run.stats.slot_steps += run.slots * int(np.count_nonzero(tokens, 1).max(initial=1))
            for group in groups:
                for row, line in zip(group.rows, tokens[group.first :], strict=False):
                    yield _finish(run, row, line)


def _decode_continuously(
    run: _Settings, buckets: Iterator[tuple[int, list[DecodeRow]]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Decode all buckets in one running batch: rows of the next bucket join it."""
    batch, length, queues = _RunningBatch(run), 0, dict[int, deque[DecodeRow]]()
    while True:
        while True:
            batch.insert_waiting()
            if not queues and (following := next(buckets, None)):
                length, queues = following[0], _queues(following[1])
            requested = batch.requested_tasks(queues)
            if not requested:
                break
            groups = _take_groups(run, queues, requested, batch.blocks)
            ids, tasks = _pad(run, groups, length)
            adapters, ids = run.source(ids, tasks)
            encoded = encode_rows(run.config, run.params, ids, adapters)
            batch.blocks.append(_EncodedBlock(groups, encoded))
        active = run.slots - batch.slot_rows.count(None)
        if not active:
            return
        # The last rows decode to their end, others until enough slots are free for a refill.
        max_active = active - max(1, run.slots // REFILL) if queues or batch.blocks else 0
        for row, output in batch.decode_until(max(max_active, 0)):
            yield _finish(run, row, output)


def _finish(run: _Settings, row: DecodeRow, ids: np.ndarray) -> tuple[int, np.ndarray]:
    run.stats.rows += 1
    run.stats.tokens += int(np.count_nonzero(ids))
    return row.number, ids


def _queues(rows: Iterable[DecodeRow]) -> dict[int, deque[DecodeRow]]:
    """Return the rows by task."""
    queues: dict[int, deque[DecodeRow]] = {}
    for row in rows:
        queues.setdefault(row.task, deque()).append(row)
    return queues


def _take_groups(
    run: _Settings,
    queues: dict[int, deque[DecodeRow]],
    requested: Iterable[int] = (),
    blocks: Iterable[_EncodedBlock] = (),
) -> list[_Group]:
    """Return T groups of rows: of the requested tasks, then of those with the fewest encoded."""
    ahead = Counter[int]()
    for block in blocks:
        ahead.update({group.task: len(group.rows) for group in block.groups})
    groups: list[_Group] = []
    tasks = iter(requested)
    while queues and len(groups) < run.task_slots:
        task = next(tasks, None)
        if task not in queues:
            task = min(queues, key=lambda t: ahead[t])
        queue = queues[task]
        rows = deque(queue.popleft() for _ in range(min(run.rows_per_task, len(queue))))
        if not queue:
            del queues[task]
        ahead[task] += len(rows)
        groups.append(_Group(task, rows, len(groups) * run.rows_per_task))
    return groups


def _pad(run: _Settings, groups: list[_Group], length: int) -> tuple[Array, tuple[int, ...]]:
    """Return ids [B, L] of the groups' rows, zero elsewhere, and the task of each task slot."""
    ids = np.zeros((run.slots, length), np.int32)
    for group in groups:
        for slot, row in enumerate(group.rows, group.first):
            ids[slot, : len(row.ids)] = row.ids
    tasks = [group.task for group in groups]
    return jnp.asarray(ids), (*tasks, *[tasks[-1]] * (run.task_slots - len(tasks)))


class _RunningBatch:
    """The rows that decode, and the encoded rows that wait for a slot.

    Attributes:
      task_slots: the task of each task slot, None before its first.
      slot_rows: the row of each slot, None where it is free.
      blocks: encoded rows that wait.
    """

    def __init__(self, run: _Settings) -> None:
        self.run = run
        self.task_slots: list[int | None] = [None] * run.task_slots
        self.slot_rows: list[DecodeRow | None] = [None] * run.slots
        self.blocks: list[_EncodedBlock] = []
        self._encoded: EncodedRows | None = None
        self._state = _empty(run.config, run.slots, run.steps)

    def _free_slots(self, task_slot: int) -> list[int]:
        size = self.run.rows_per_task
        slots = range(task_slot * size, (task_slot + 1) * size)
        return [slot for slot in slots if self.slot_rows[slot] is None]

    def requested_tasks(self, queues: dict[int, deque[DecodeRow]]) -> list[int]:
        """Return the tasks whose rows would take free slots at once."""
        requested: list[int] = []
        left = {task: len(queue) for task, queue in queues.items()}
        for task_slot, task in enumerate(self.task_slots):
            free = len(self._free_slots(task_slot))
            if free == self.run.rows_per_task and (task is None or left.get(task, 0) <= 0):
                # Any task may take an empty task slot.
                task = max(left, key=lambda t: left[t], default=None)
            if free and task is not None and left.get(task, 0) > 0:
                requested.append(task)
                left[task] -= self.run.rows_per_task
        return requested

    def insert_waiting(self) -> None:
        """Insert waiting rows into free slots of their task, or of task slots without rows."""
        for block in self.blocks:
            self._insert_block(block)
        self.blocks = [block for block in self.blocks if any(g.rows for g in block.groups)]

    def _insert_block(self, block: _EncodedBlock) -> None:
        rows_from = np.full(self.run.slots, -1, np.int32)
        task_slots_from = np.full(self.run.task_slots, -1, np.int32)
        numbers = np.zeros(self.run.slots, np.int32)
        for task_slot in range(self.run.task_slots):
            free = self._free_slots(task_slot)
            occupied = len(free) < self.run.rows_per_task
            # Its own task first: changing the task copies adapters.
            own = self.task_slots[task_slot]
            for g, group in sorted(enumerate(block.groups), key=lambda pair: pair[1].task != own):
                is_new = group.task != self.task_slots[task_slot]
                if not free or not group.rows or (occupied and is_new):
                    continue
                if is_new:
                    self.task_slots[task_slot], task_slots_from[task_slot] = group.task, g
                occupied = True
                while free and group.rows:
                    slot, row = free.pop(0), group.rows.popleft()
                    self.slot_rows[slot], numbers[slot] = row, row.number
                    rows_from[slot], group.first = group.first, group.first + 1
        if self._encoded is None:
            self._encoded = block.encoded
            task_slots_from = np.maximum(task_slots_from, 0)
        if (rows_from < 0).all():
            return
        cache = self._state.self_kv  # a row's mask hides the positions before its first step
        self._encoded, state = _insert(
            self._encoded,
            dataclasses.replace(self._state, self_kv=None),
            block.encoded,
            rows_from,
            task_slots_from,
            numbers,
        )
        self._state = dataclasses.replace(state, self_kv=cache)

    def decode_until(self, max_active: int) -> Iterator[tuple[DecodeRow, np.ndarray]]:
        """Decode until at most ``max_active`` rows are active; yield (row, ids) of ended rows."""
        run, state = self.run, self._state
        sampling = run.sampling or Sampling()
        key = jax.random.key(sampling.seed)
        sampling = dataclasses.replace(sampling, seed=0)  # no compile per seed
        start = int(state.index)
        while True:
            state = _steps(
                run.config, run.params, self._encoded, state, max_active, key, run.steps, sampling
            )
            active, index = jax.device_get((state.active, state.index))
            if active.sum() <= max_active:
                break
            state = _grow_cache(state, run.steps)  # a row fills the cache
        self._state = state
        run.stats.slot_steps += run.slots * (int(index) - start)
        ids = np.asarray(state.ids)
        for slot in np.flatnonzero(~active):
            if (row := self.slot_rows[slot]) is not None:
                self.slot_rows[slot] = None
                yield row, ids[slot]


# ------------------------------------------------------------------------------- device side


@struct.dataclass
class EncodedRows:
    """Constants of decoding rows; leaves lead with [N, B], those of task slots with [N, T]."""

    key: Array  # of cross-attention [N, B, L, H, K]
    value: Array
    mask: Array  # [1, B, L]
    prefix: Any  # of cross-attention, {"key", "value" [N, T, P, H, K], "mask"}, or None
    adapters: Adapters | None  # the decoder's


@struct.dataclass
class DecodeState:
    """Variables of a decoder step; the cache is a ring, see `t5.DecoderCache`."""

    self_kv: Any  # (keys, values) [N, B, S, H, K]
    index: Array  # int32: the number of steps so far
    first_step: Array  # int32 [B]: of each row
    tokens: Array  # int32 [B]: the last tokens
    ids: Array  # int32 [B, steps]: all tokens
    active: Array  # bool [B]
    numbers: Array  # int32 [B]: row numbers, for sampling


def _empty(config: T5Config, slots: int, steps: int) -> DecodeState:
    length = min(CACHE, steps)
    shape = (config.num_decoder_layers, slots, length, config.num_heads, config.head_dim)
    zero = np.zeros(slots, np.int32)
    cache = (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    ids, active = np.zeros((slots, steps), np.int32), np.zeros(slots, bool)
    small = jax.device_put((np.int32(0), zero, zero, ids, active, zero))
    return DecodeState(cache, *small)


@functools.partial(jax.jit, static_argnames="config")
def encode_rows(
    config: T5Config, params: Any, ids: Array, adapters: Adapters | None
) -> EncodedRows:
    """Encode ids [B, L] to the cross-attention keys and values of every decoder layer."""
    model, variables = T5(config), {"params": params}
    encoded = model.apply(variables, ids, adapters, method="encode")
    state = model.apply(variables, encoded, ids, adapters, 1, method="init_cache")
    key, value, prefix = state.cross
    if adapters is not None:  # encoder adapters are applied, memory is in the prefix
        tree = {k: v for k, v in adapters.tree.items() if k.startswith("dec_")}
        adapters = Adapters(tree, adapters.spec)
    return EncodedRows(key, value, state.memory_mask[None], prefix, adapters)


@jax.jit
def _insert(
    encoded: EncodedRows,
    state: DecodeState,
    new: EncodedRows,
    rows_from: Array,
    task_slots_from: Array,
    numbers: Array,
) -> tuple[EncodedRows, DecodeState]:
    """Replace rows [B] and task slots [T] of a batch by those of ``new``; -1 keeps the old ones."""

    def select(old: Any, new: Any, source: Array) -> Any:
        def leaf(x: Array, y: Array) -> Array:
            taken = (source >= 0).reshape(1, -1, *(1,) * (x.ndim - 2))
            y = y[:, jnp.maximum(source, 0)]
            # Rows of another bucket: padding is masked.
            x, y = (_pad_length(z, max(x.shape[2:3], y.shape[2:3])) for z in (x, y))
            return jnp.where(taken, y, x)

        return jax.tree.map(leaf, old, new)

    taken, zero = rows_from >= 0, jnp.int32(0)
    return EncodedRows(
        key=select(encoded.key, new.key, rows_from),
        value=select(encoded.value, new.value, rows_from),
        mask=select(encoded.mask, new.mask, rows_from),
        prefix=select(encoded.prefix, new.prefix, task_slots_from),
        adapters=select(encoded.adapters, new.adapters, task_slots_from),
    ), dataclasses.replace(
        state,
        first_step=jnp.where(taken, state.index, state.first_step),
        tokens=jnp.where(taken, zero, state.tokens),
        ids=jnp.where(taken[:, None], zero, state.ids),
        active=taken | state.active,
        numbers=jnp.where(taken, numbers, state.numbers),
    )


def _pad_length(x: Array, length: tuple[int, ...]) -> Array:
    """Pad axis 2 with zeros to ``length`` (L,); () where there is no such axis."""
    missing = length[0] - x.shape[2] if length else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3))) if missing else x


@functools.partial(
    jax.jit, static_argnames=("config", "steps", "sampling"), donate_argnames=("state",)
)
def _steps(
    config: T5Config,
    params: Any,
    encoded: EncodedRows,
    state: DecodeState,
    max_active: Any,
    key: Array,
    steps: int,
    sampling: Sampling,
) -> DecodeState:
    """Decode until at most ``max_active`` rows are active, or one fills the cache."""
    room = state.self_kv[0].shape[2]

    def keep_going(state: DecodeState) -> Array:
        too_long = state.active & (state.index - state.first_step >= room)
        return (state.active.sum() > max_active) & ~too_long.any()

    def body(state: DecodeState) -> DecodeState:
        cross = (encoded.key, encoded.value, encoded.prefix)
        cache = DecoderCache(state.self_kv, cross, encoded.mask[0], state.index, state.first_step)
        logits, cache = T5(config).apply(
            {"params": params}, state.tokens, cache, encoded.adapters, method="step"
        )
        position = state.index - state.first_step
        tokens = sample(logits, sampling, key, state.numbers, position)
        tokens = jnp.where(state.active, tokens, 0)
        is_new = (jnp.arange(steps) == position[:, None]) & state.active[:, None]
        return dataclasses.replace(
            state,
            self_kv=cache.self_kv,
            index=cache.index,
            tokens=tokens,
            ids=jnp.where(is_new, tokens[:, None], state.ids),
            active=state.active & (tokens != EOS_ID) & (position + 1 < steps),
        )

    return jax.lax.while_loop(keep_going, body, state)


@functools.partial(jax.jit, static_argnames="steps")
def _grow_cache(state: DecodeState, steps: int) -> DecodeState:
    """Return the state with a cache of ``steps`` positions; step i is at position i % steps."""
    room, last = state.self_kv[0].shape[2], state.index - 1
    written = last - (last - jnp.arange(steps)) % steps  # the last step at each position
    return dataclasses.replace(
        state, self_kv=jax.tree.map(lambda x: x[:, :, written % room], state.self_kv)
    )
