"""Outputs of many rows, of many tasks, by few compiled programs and with few idle places.

A batch has T slots of G places each. A slot holds the adapters of one task, a place decodes one row
of it. As soon as enough rows have ended, others that were encoded meanwhile take their places, and
a slot without rows takes another task; so no place waits for the longest output of its batch. Rows
are grouped by length into few padded shapes.

Shapes: B = T*G rows, L inputs, S places of the cache, N layers, H heads, K head width.
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
from hyper_t5.decoding import Sampling, decode, sample
from hyper_t5.t5 import T5, DecodeState, T5Config
from hyper_t5.vocab import EOS_ID

Array = jax.Array
Layout = tuple[int, int]  # T slots of G places

SHORTEST = 16  # ids in a padded row
CACHE = 32  # steps that the cache has room for until a row needs more
# Rows are replaced when one place in so many is free. Measured as in `layout`, outputs of 10 tokens
# on average and 64 at most: 9.4 s and 158 steps of the decoder, against 11.3 s and 413 steps of
# batches sorted by length that wait for their longest output, and 19.2 s of batches in order.
REFILL = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One input: its number in the whole, which its random numbers hang on; its task; its ids."""

    number: int
    task: int
    ids: Sequence[int]


# Where adapters come from: rows [T*G, L] and the task of each slot [T] -> adapters of T, and ids
# [T*G, L'] to encode. L' is 0 where the adapters hold what was encoded.
Source = Callable[[Array, tuple[int, ...]], tuple[Adapters | None, Array]]


@dataclasses.dataclass
class Work:
    """What was done: ``places`` counts B for each step of the decoder, ``tokens`` those in use."""

    rows: int = 0
    tokens: int = 0
    places: int = 0
    read: int = 0
    read_places: int = 0

    @property
    def idle(self) -> float:
        """The share of decoder steps that no row used."""
        return 1 - self.tokens / self.places if self.places else 0.0


def layout(tasks: int, rows: int, batch: int) -> Layout:
    """(T, G): ``batch`` places at most, one slot a task at least where there is room for it.

    A slot's adapters are kept and read once for its G rows; a G of 1 (``tasks`` as many as
    ``batch``) lets any row go anywhere. Where adapters are light that is the better: T5 mini, LoRA
    of rank 8 at all queries and values, 384 rows of 8 tasks, batch 32, on two busy cores in turns,
    medians of three: (1, 32) for one task 9.4 s; (32, 1) 9.5 s, 24 % idle; (8, 4) 10.4 s, 31 %.
    """
    batch = max(1, min(batch, 1 << (rows - 1).bit_length()))
    if tasks == 1:
        return 1, batch
    share = max(1, batch // tasks)
    share = 1 << (share.bit_length() - 1)
    return batch // share, share


def padded_length(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few shapes, and at most a third of padding."""
    size = max(SHORTEST, 1 << (length - 1).bit_length())
    return size * 3 // 4 if size > SHORTEST and length <= size * 3 // 4 else size


def by_length(rows: Iterable[Row], batch: int) -> Iterator[tuple[int, list[Row]]]:
    """(padded length, rows) of all rows, the shorter ones first.

    Too few for a batch are padded like the next longer ones, if those are not over twice as long.
    """
    groups = itertools.groupby(
        sorted(rows, key=lambda row: len(row.ids)), lambda row: padded_length(len(row.ids))
    )
    lengths = [(length, list(members)) for length, members in groups]
    carried: list[Row] = []
    for i, (length, members) in enumerate(lengths):
        carried += members
        following = lengths[i + 1][0] if i + 1 < len(lengths) else None
        if following is None or len(carried) >= batch or following > 2 * length:
            yield length, carried
            carried = []


def decode_rows(
    config: T5Config,
    params: Any,
    rows: Iterable[Row],
    source: Source,
    shape: Layout,
    *,
    steps: int,
    beam_size: int = 1,
    sampling: Sampling | None = None,
    work: Work | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, ids [S], zeros after EOS) of every row, in the order in which they end.

    Args:
      params: the backbone's.
      shape: (T, G), as ``layout`` makes it.
      steps: the most tokens in an output.
      beam_size: 1 is greedy, or sampling. Beams decode batch by batch, without refill: a row's
        beams move about in the cache, which all of a batch share.
      work: counts what is done.
    """
    work = Work() if work is None else work
    run = _Run(config, params, source, *shape, steps, beam_size, sampling, work)
    yield from (_beams if beam_size > 1 else _refilled)(run, by_length(rows, run.places))


@dataclasses.dataclass(frozen=True)
class _Run:
    """The arguments of ``decode_rows``."""

    config: T5Config
    params: Any
    source: Source
    slots: int
    share: int
    steps: int
    beam_size: int
    sampling: Sampling | None
    work: Work

    @property
    def places(self) -> int:
        return self.slots * self.share


# ------------------------------------------------------------------------------- what the host does


@dataclasses.dataclass
class _Group:
    """Up to G rows of one task that are read together; ``first`` is the place of the first."""

    task: int
    rows: deque[Row]
    first: int


@dataclasses.dataclass
class _Block:
    """Rows that were encoded, and wait for a place."""

    groups: list[_Group]
    fixed: _Fixed


def _beams(
    run: _Run, groups_of: Iterable[tuple[int, list[Row]]]
) -> Iterator[tuple[int, np.ndarray]]:
    for length, rows in groups_of:
        waiting = _queues(rows)
        while waiting:
            groups = _take(run, waiting)
            ids, tasks = _padded(run, groups, length)
            adapters, ids = run.source(ids, tasks)
            options = {"steps": run.steps, "beam_size": run.beam_size}
            made, _ = decode(run.config, run.params, ids, adapters, **options)
            found = np.asarray(made)
            run.work.places += run.places * int(np.count_nonzero(found, 1).max(initial=1))
            for group in groups:
                for row, line in zip(group.rows, found[group.first :], strict=False):
                    yield _done(run, row, line)


def _refilled(
    run: _Run, groups_of: Iterator[tuple[int, list[Row]]]
) -> Iterator[tuple[int, np.ndarray]]:
    """From one length to the next without a stop: its rows join those that still decode."""
    length, waiting, blocks = 0, dict[int, deque[Row]](), list[_Block]()
    slots: list[int | None] = [None] * run.slots  # the task of each
    held: list[Row | None] = [None] * run.places
    batch: tuple[_Fixed, _Moving] | None = None
    while True:
        while True:
            for block in blocks:
                batch = _move(run, batch, block, slots, held)
            blocks = [block for block in blocks if any(group.rows for group in block.groups)]
            if not waiting and (following := next(groups_of, None)):
                length, waiting = following[0], _queues(following[1])
            wanted = _wanted(run, slots, held, waiting)
            if not wanted:
                break
            blocks.append(_read(run, length, _take(run, waiting, wanted, blocks)))
        living = run.places - held.count(None)
        if batch is None or not living:
            return
        # Without more to come: to the end. Else until so many are free that a refill pays.
        least = living - max(1, run.places // REFILL) if waiting or blocks else 0
        batch, ended = _decode(run, batch, max(least, 0))
        for place, ids in ended:
            if (row := held[place]) is not None:
                held[place] = None
                yield _done(run, row, ids)


def _done(run: _Run, row: Row, ids: np.ndarray) -> tuple[int, np.ndarray]:
    run.work.rows += 1
    run.work.tokens += int(np.count_nonzero(ids))
    return row.number, ids


def _queues(rows: Iterable[Row]) -> dict[int, deque[Row]]:
    """The rows of each task; a task without rows is not there."""
    queues: dict[int, deque[Row]] = {}
    for row in rows:
        queues.setdefault(row.task, deque()).append(row)
    return queues


def _wanted(
    run: _Run, slots: list[int | None], held: list[Row | None], waiting: dict[int, deque[Row]]
) -> list[int]:
    """The tasks whose rows would go to work at once, if they were read."""
    wanted: list[int] = []
    left = {task: len(queue) for task, queue in waiting.items()}
    for slot, task in enumerate(slots):
        free = held[slot * run.share :][: run.share].count(None)
        if free == run.share and (task is None or left.get(task, 0) <= 0):
            task = max(left, key=lambda t: left[t], default=None)  # it may take any
        if free and task is not None and left.get(task, 0) > 0:
            wanted.append(task)
            left[task] -= run.share
    return wanted


def _take(
    run: _Run,
    waiting: dict[int, deque[Row]],
    wanted: Iterable[int] = (),
    blocks: Iterable[_Block] = (),
) -> list[_Group]:
    """T groups of waiting rows: of the wanted tasks, then of those with the fewest rows read."""
    ahead = Counter[int]()
    for block in blocks:
        ahead.update({group.task: len(group.rows) for group in block.groups})
    groups: list[_Group] = []
    tasks = iter(wanted)
    while waiting and len(groups) < run.slots:
        task = next(tasks, None)
        if task not in waiting:
            task = min(waiting, key=lambda t: ahead[t])
        queue = waiting[task]
        rows = deque(queue.popleft() for _ in range(min(run.share, len(queue))))
        if not queue:
            del waiting[task]
        ahead[task] += len(rows)
        groups.append(_Group(task, rows, len(groups) * run.share))
    return groups


def _padded(run: _Run, groups: list[_Group], length: int) -> tuple[Array, tuple[int, ...]]:
    """Ids [B, L] of the groups' rows, zeros where there are none, and the task of each slot."""
    ids = np.zeros((run.places, length), np.int32)
    for group in groups:
        for place, row in enumerate(group.rows, group.first):
            ids[place, : len(row.ids)] = row.ids
    tasks = [group.task for group in groups]
    run.work.read += sum(len(group.rows) for group in groups)
    run.work.read_places += run.places
    return jnp.asarray(ids), (*tasks, *[tasks[-1]] * (run.slots - len(tasks)))


def _read(run: _Run, length: int, groups: list[_Group]) -> _Block:
    ids, tasks = _padded(run, groups, length)
    adapters, ids = run.source(ids, tasks)
    return _Block(groups, _encode(run.config, run.params, ids, adapters))


def _move(
    run: _Run,
    batch: tuple[_Fixed, _Moving] | None,
    block: _Block,
    slots: list[int | None],
    held: list[Row | None],
) -> tuple[_Fixed, _Moving]:
    """Rows of a block go to free places: to slots of their task, or to slots without any rows."""
    rows_from = np.full(run.places, -1, np.int32)
    slots_from = np.full(run.slots, -1, np.int32)
    numbers = np.zeros(run.places, np.int32)
    for slot in range(run.slots):
        mine = range(slot * run.share, (slot + 1) * run.share)
        free = [place for place in mine if held[place] is None]
        kept = len(free) < run.share
        # Its own task first: to change it costs a copy, and would send its next rows elsewhere.
        order = sorted(range(len(block.groups)), key=lambda g: block.groups[g].task != slots[slot])
        for g in order:
            group = block.groups[g]
            if not free or not group.rows or (kept and group.task != slots[slot]):
                continue
            if group.task != slots[slot]:
                slots[slot], slots_from[slot] = group.task, g
            kept = True
            while free and group.rows:
                place, row = free.pop(0), group.rows.popleft()
                held[place], numbers[place] = row, row.number
                rows_from[place], group.first = group.first, group.first + 1
    if batch is None:
        slots_from[:] = np.where(slots_from < 0, 0, slots_from)
        batch = block.fixed, _empty(run.config, run.places, run.steps)
    if (rows_from < 0).all():
        return batch
    fixed, moving = batch
    cache = moving.self_kv  # a row sees nothing of what is there before it begins
    fixed, moving = _insert(
        fixed,
        dataclasses.replace(moving, self_kv=None),
        block.fixed,
        rows_from,
        slots_from,
        numbers,
    )
    return fixed, dataclasses.replace(moving, self_kv=cache)


def _decode(
    run: _Run, batch: tuple[_Fixed, _Moving], least: int
) -> tuple[tuple[_Fixed, _Moving], list[tuple[int, np.ndarray]]]:
    """Decode until ``least`` rows live; the batch then, and (place, ids) of those that do not."""
    fixed, moving = batch
    sampling = run.sampling or Sampling()
    key = jax.random.key(sampling.seed)
    sampling = dataclasses.replace(sampling, seed=0)  # not a program for each seed
    began = int(moving.index)
    while True:
        moving = _steps(run.config, run.params, fixed, moving, least, key, run.steps, sampling)
        living, index = jax.device_get((moving.living, moving.index))
        if living.sum() <= least:
            break
        moving = _lengthened(moving, run.steps)  # a row is longer than the cache
    run.work.places += run.places * (int(index) - began)
    ids = np.asarray(moving.ids)
    return (fixed, moving), [(int(place), ids[place]) for place in np.flatnonzero(~living)]


# ----------------------------------------------------------------------------- what the device does


@struct.dataclass
class _Fixed:
    """What stays while a row decodes: leaves lead with [N, B], or [N, T] where a slot's."""

    key: Array  # of cross-attention [N, B, L, H, K]
    value: Array
    mask: Array  # [1, B, L]
    prefix: Any  # of cross-attention, {"key", "value" [N, T, P, H, K], "mask"}, or None
    adapters: Adapters | None  # the decoder's


@struct.dataclass
class _Moving:
    """What changes with each step."""

    self_kv: Any  # (keys, values) [N, B, S, H, K]
    index: Array  # int32: steps made
    begun: Array  # int32 [B]: the step that was each row's first
    tokens: Array  # int32 [B]: the last ones
    ids: Array  # int32 [B, steps]: all of them
    living: Array  # bool [B]
    numbers: Array  # int32 [B]: of the rows


def _empty(config: T5Config, places: int, steps: int) -> _Moving:
    length = min(CACHE, steps)
    shape = (config.num_decoder_layers, places, length, config.num_heads, config.head_dim)
    zero = np.zeros(places, np.int32)
    cache = (jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    ids, living = np.zeros((places, steps), np.int32), np.zeros(places, bool)
    small = jax.device_put((np.int32(0), zero, zero, ids, living, zero))
    return _Moving(cache, *small)


@functools.partial(jax.jit, static_argnames="config")
def _encode(config: T5Config, params: Any, ids: Array, adapters: Adapters | None) -> _Fixed:
    """Encode ids [B, L]; keys and values of them for every decoder layer."""
    model, variables = T5(config), {"params": params}
    encoded = model.apply(variables, ids, adapters, method="encode")
    state = model.apply(variables, encoded, ids, adapters, 1, method="start")
    key, value, prefix = state.cross
    if adapters is not None:  # the encoder's have done their work, and memory is in the prefix
        tree = {k: v for k, v in adapters.tree.items() if k.startswith("dec_")}
        adapters = Adapters(tree, adapters.spec)
    return _Fixed(key, value, state.memory_mask[None], prefix, adapters)


@jax.jit
def _insert(
    fixed: _Fixed,
    moving: _Moving,
    read: _Fixed,
    rows_from: Array,
    slots_from: Array,
    numbers: Array,
) -> tuple[_Fixed, _Moving]:
    """The batch with rows [B] and slots [T] taken from what was read; -1 keeps what is there."""

    def put(old: Any, new: Any, source: Array) -> Any:
        def one(x: Array, y: Array) -> Array:
            taken = (source >= 0).reshape(1, -1, *(1,) * (x.ndim - 2))
            y = y[:, jnp.maximum(source, 0)]
            # Rows of another length: what is added to the shorter ones is masked.
            x, y = (_longer(z, max(x.shape[2:3], y.shape[2:3])) for z in (x, y))
            return jnp.where(taken, y, x)

        return jax.tree.map(one, old, new)

    taken, none = rows_from >= 0, jnp.int32(0)
    return _Fixed(
        *(put(getattr(fixed, k), getattr(read, k), rows_from) for k in ("key", "value", "mask")),
        *(put(getattr(fixed, k), getattr(read, k), slots_from) for k in ("prefix", "adapters")),
    ), dataclasses.replace(
        moving,
        begun=jnp.where(taken, moving.index, moving.begun),
        tokens=jnp.where(taken, none, moving.tokens),
        ids=jnp.where(taken[:, None], none, moving.ids),
        living=taken | moving.living,
        numbers=jnp.where(taken, numbers, moving.numbers),
    )


def _longer(x: Array, length: tuple[int, ...]) -> Array:
    """[N, B, L, ...] with zeros, or False, behind to ``length``; () where there is no such axis."""
    missing = length[0] - x.shape[2] if length else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3))) if missing else x


@functools.partial(
    jax.jit, static_argnames=("config", "steps", "sampling"), donate_argnames=("moving",)
)
def _steps(
    config: T5Config,
    params: Any,
    fixed: _Fixed,
    moving: _Moving,
    least: Any,
    key: Array,
    steps: int,
    sampling: Sampling,
) -> _Moving:
    """Decode until no more than ``least`` rows live, or one needs a longer cache."""
    room = moving.self_kv[0].shape[2]

    def going_on(m: _Moving) -> Array:
        too_long = m.living & (m.index - m.begun >= room)
        return (m.living.sum() > least) & ~too_long.any()

    def body(m: _Moving) -> _Moving:
        cross = (fixed.key, fixed.value, fixed.prefix)
        state = DecodeState(m.self_kv, cross, fixed.mask[0], m.index, m.begun)
        logits, state = T5(config).apply(
            {"params": params}, m.tokens, state, fixed.adapters, method="step"
        )
        own = m.index - m.begun
        tokens = sample(logits, sampling, key, m.numbers, own)
        tokens = jnp.where(m.living, tokens, 0)
        here = (jnp.arange(steps) == own[:, None]) & m.living[:, None]
        return dataclasses.replace(
            m,
            self_kv=state.self_kv,
            index=state.index,
            tokens=tokens,
            ids=jnp.where(here, tokens[:, None], m.ids),
            living=m.living & (tokens != EOS_ID) & (own + 1 < steps),
        )

    return jax.lax.while_loop(going_on, body, moving)


@functools.partial(jax.jit, static_argnames="steps")
def _lengthened(moving: _Moving, steps: int) -> _Moving:
    """The same with a cache of ``steps`` places: what step i wrote goes to place i modulo that."""
    room, last = moving.self_kv[0].shape[2], moving.index - 1
    written = last - (last - jnp.arange(steps)) % steps  # the last step that wrote to each place
    return dataclasses.replace(
        moving, self_kv=jax.tree.map(lambda x: x[:, :, written % room], moving.self_kv)
    )
