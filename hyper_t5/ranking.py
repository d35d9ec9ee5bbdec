"""Rank classification: how likely each of a row's options is, without writing any of them.

As T0 (Sanh et al. 2021) and MetaICL (Min et al. 2022) judge tasks that are a choice. Here a row is
encoded once and its options are scored beside each other: they are packed into one row of targets,
each a segment that sees itself and the row's one encoding, and so share the encoder's output, the
keys and values of it, and the adapters. Adapters are generated once a task.

An option's end (EOS) is scored with it, as targets have one in training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import model, sharding, t5
from hyper_t5.adapters import Adapters
from hyper_t5.engine import padded_length
from hyper_t5.judged import EvalTask
from hyper_t5.vocab import EOS_ID, Vocabulary

Array = jax.Array

MOST = 512  # positions of targets at once, unless one option alone is longer
BLOCK = 8  # positions have their logits at once: [B, L, V] of long options is too much memory


class RowScores(NamedTuple):
    """Of each of a row's options: the sum of its tokens' log-probabilities, and their number."""

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]


def rank_task(
    m: model.Model,
    params: model.Tree,
    task: EvalTask,
    config: ConfigDict,
    vocab: Vocabulary,
    number: int = 0,
) -> Iterator[RowScores]:
    """The scores of the options of each row of one task; ``number`` is the task's own.

    Shapes are few: `eval.batch` rows, and lengths as `padded_length` has them.
    """
    flat = [option for options in task.options for option in options]
    encoded = iter(vocab.encode_batch(flat))
    options = [[[*next(encoded), EOS_ID] for _ in row] for row in task.options]
    width = padded_length(max(1, int(np.max(np.sum(task.inputs > 0, 1), initial=0))))
    inputs = task.inputs[:, : min(width, task.inputs.shape[1])]
    for first, adapters, rows in task_batches(m, params, task, inputs, config, number):
        yield from rank_rows(m, params, adapters, rows, options[first : first + rows.shape[0]])


def task_batches(
    m: model.Model,
    params: model.Tree,
    task: EvalTask,
    inputs: np.ndarray,
    config: ConfigDict,
    number: int,
) -> Iterator[tuple[int, Adapters | None, Array]]:
    """(number of its first row, adapters, what to encode [B, Li]) of each batch of a task's rows.

    The last one is filled with empty rows. On a mesh every process has all rows, and its devices
    take their part.
    """
    parts = m.placement.parts if m.placement else 1
    size, adapters = -(-config.eval.batch // parts) * parts, None
    numbers = np.full(size, number, np.int32)
    if m.choice.reads == "task":
        adapters = model.generate(m, params, np.asarray(task.hyper_ids)[None], numbers[:1])
    for first in range(0, len(inputs), size):
        rows = inputs[first : first + size]
        padded = np.zeros((size, rows.shape[1]), np.int32)
        padded[: len(rows)] = rows
        batch: Any = (padded, numbers)
        if m.placement:
            batch = sharding.put(batch, (m.placement.batch,) * 2)
        yield first, *model.read_rows(m, params, adapters, *map(jnp.asarray, batch))


def rank_rows(
    m: model.Model,
    params: model.Tree,
    adapters: Adapters | None,
    rows: Array,
    options: Sequence[Sequence[Sequence[int]]],
) -> list[RowScores]:
    """Scores of the options, ids [n][k][length], of the first n of rows [B, Li].

    The rows are encoded once. Options that `MOST` positions do not hold take several passes over
    that encoding.
    """
    weights = params[model.BACKBONE]
    encoded = encode(m.sizes, weights, rows, adapters)
    found: list[list[tuple[float, int]]] = [[] for _ in options]
    for taken in passes(options):
        packed: Any = pack(taken, rows.shape[0])
        if m.placement:
            placed = sharding.put(packed, (m.placement.batch,) * 3)
        else:
            placed = tuple(map(jnp.asarray, packed))
        made = sharding.fetch(log_probs(m.sizes, weights, encoded, rows, *placed, adapters))
        for row, ids, scores in zip(found, taken, made, strict=False):
            ends = np.cumsum([0, *map(len, ids)])
            for start, end in itertools.pairwise(ends):
                row.append((float(np.sum(scores[start:end], dtype=np.float64)), int(end - start)))
    return [RowScores(tuple(s for s, _ in row), tuple(n for _, n in row)) for row in found]


def passes(
    options: Sequence[Sequence[Sequence[int]]], most: int = MOST
) -> Iterator[list[list[Sequence[int]]]]:
    """Every row's options in their order, as many at a time as `most` positions hold."""
    waiting = [list(row) for row in options]
    while any(waiting):
        taken: list[list[Sequence[int]]] = []
        for row in waiting:
            sizes = np.cumsum([len(ids) for ids in row])
            count = max(int(np.searchsorted(sizes, most, "right")), min(1, len(row)))
            taken.append(row[:count])
            del row[:count]
        yield taken


def pack(
    options: Sequence[Sequence[Sequence[int]]], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(targets, segments, positions), each int32 [size, L]: a row's options one after the other."""
    longest = max(sum(map(len, row)) for row in options)
    made = np.zeros((3, size, padded_length(longest)), np.int32)
    for i, row in enumerate(options):
        sizes = [len(ids) for ids in row]
        end = sum(sizes)
        made[0, i, :end] = [token for ids in row for token in ids]
        made[1, i, :end] = np.repeat(np.arange(1, len(row) + 1), sizes)
        made[2, i, :end] = [place for count in sizes for place in range(count)]
    return made[0], made[1], made[2]


@functools.partial(jax.jit, static_argnames="sizes")
def encode(
    sizes: t5.T5Config, weights: model.Tree, rows: Array, adapters: Adapters | None
) -> Array:
    """rows [B, Li] -> [B, Li, D]."""
    return t5.T5(sizes).apply({"params": weights}, rows, adapters, method="encode")


@functools.partial(jax.jit, static_argnames="sizes")
def log_probs(
    sizes: t5.T5Config,
    weights: model.Tree,
    encoded: Array,
    rows: Array,
    targets: Array,
    segments: Array,
    positions: Array,
    adapters: Adapters | None,
) -> Array:
    """float32 log-probability of each of the targets [B, L] of rows [B, Li] that were encoded."""
    net, variables = t5.T5(sizes), {"params": weights}
    x = net.apply(
        variables,
        encoded,
        rows,
        targets,
        adapters,
        target_segments=segments,
        target_positions=positions,
        method="teach",
    )

    def blocks(x: Array) -> Array:  # [B, L, ...] -> [L / BLOCK, B, BLOCK, ...]
        return jnp.moveaxis(x.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)

    made = jax.lax.map(
        lambda pair: net.apply(variables, *pair, method="log_probs"), (blocks(x), blocks(targets))
    )
    return jnp.moveaxis(made, 0, 1).reshape(targets.shape)
