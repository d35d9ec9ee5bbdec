"""Rank classification: the likelihood of each of a row's options, without decoding.

The protocol of T0 (Sanh et al. 2021) and MetaICL (Min et al. 2022) for classification and multiple
choice. A row is encoded once and its options are scored side by side: they are packed into one row
of targets, each a segment that sees itself and the row's encoding, and so share the encoder output,
its keys and values, and the adapters. EOS is scored with each option, as targets have it in
training.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import model as model_lib
from hyper_t5 import t5
from hyper_t5.adapters import Adapters
from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.inference.engine import padded_length
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import sharding
from hyper_t5.runs import Run

Array = jax.Array

MAX_POSITIONS = 512  # target positions per pass, unless one option alone is longer
BLOCK = 8  # positions whose logits are computed at once: [B, L, V] of long options is too large


class RowScores(NamedTuple):
    """The scores of a row's options: sums of token log-probabilities, and token counts."""

    log_probs: tuple[float, ...]
    tokens: tuple[int, ...]


def rank_task(
    run: Run, task: EvalTask, adapters: Adapters | None, number: int = 0
) -> Iterator[RowScores]:
    """Yield the scores of the options of each row of a task.

    Shapes are few: ``eval.batch`` rows of a bucket length.
    """
    flat = [option for options in task.options for option in options]
    encoded = iter(run.backbone.vocab.encode_batch(flat))
    options = [[[*next(encoded), EOS_ID] for _ in row] for row in task.options]
    width = padded_length(max(1, int(np.max(np.sum(task.inputs > 0, 1), initial=0))))
    inputs = task.inputs[:, : min(width, task.inputs.shape[1])]
    for first, batch_adapters, rows in task_batches(run, inputs, adapters, number):
        batch_options = options[first : first + rows.shape[0]]
        yield from rank_rows(run.model, run.params, batch_adapters, rows, batch_options)


def task_batches(
    run: Run, inputs: np.ndarray, adapters: Adapters | None, number: int
) -> Iterator[tuple[int, Adapters | None, Array]]:
    """Yield (index of the first row, adapters, ids to encode [B, Li]) of a task's batches.

    The last batch is filled with empty rows. On a mesh every process has all rows, and each device
    takes its part.

    Args:
      run: an open run.
      inputs: of the task's rows [n, Li].
      adapters: of the task; None where the system emits none, or one set per input.
      number: of the task.
    """
    placement = run.model.placement
    parts = placement.batch_shards if placement else 1
    size = -(-run.config.eval.batch // parts) * parts
    numbers = np.full(size, number, np.int32)
    if adapters is not None and placement:
        adapters = sharding.device_put(
            adapters, jax.tree.map(lambda _: placement.replicated, adapters)
        )
    for first in range(0, len(inputs), size):
        rows = inputs[first : first + size]
        padded = np.zeros((size, rows.shape[1]), np.int32)
        padded[: len(rows)] = rows
        batch: Any = (padded, numbers)
        if placement:
            batch = sharding.device_put(batch, (placement.batch_sharding,) * 2)
        yield (
            first,
            *model_lib.resolve_adapters(run.model, run.params, adapters, *map(jnp.asarray, batch)),
        )


def rank_rows(
    m: Model,
    params: Tree,
    adapters: Adapters | None,
    rows: Array,
    options: Sequence[Sequence[Sequence[int]]],
) -> list[RowScores]:
    """Return the scores of the options, ids [n][k][length], of the first n of rows [B, Li].

    The rows are encoded once. Options that exceed `MAX_POSITIONS` take several passes over that
    encoding.
    """
    weights = params[BACKBONE]
    encoded = encode(m.sizes, weights, rows, adapters)
    scores: list[list[tuple[float, int]]] = [[] for _ in options]
    for batch_options in option_passes(options):
        packed: Any = pack(batch_options, rows.shape[0])
        if m.placement:
            packed = sharding.device_put(packed, (m.placement.batch_sharding,) * 3)
        else:
            packed = tuple(map(jnp.asarray, packed))
        log_p = sharding.fetch(log_probs(m.sizes, weights, encoded, rows, *packed, adapters))
        for row, ids, row_log_p in zip(scores, batch_options, log_p, strict=False):
            ends = np.cumsum([0, *map(len, ids)])
            for start, end in itertools.pairwise(ends):
                total = float(np.sum(row_log_p[start:end], dtype=np.float64))
                row.append((total, int(end - start)))
    return [RowScores(tuple(s for s, _ in row), tuple(n for _, n in row)) for row in scores]


def option_passes(
    options: Sequence[Sequence[Sequence[int]]], most: int = MAX_POSITIONS
) -> Iterator[list[list[Sequence[int]]]]:
    """Yield every row's options in order, as many at a time as fit ``most`` positions."""
    remaining = [list(row) for row in options]
    while any(remaining):
        batch: list[list[Sequence[int]]] = []
        for row in remaining:
            ends = np.cumsum([len(ids) for ids in row])
            count = max(int(np.searchsorted(ends, most, "right")), min(1, len(row)))
            batch.append(row[:count])
            del row[:count]
        yield batch


def pack(
    options: Sequence[Sequence[Sequence[int]]], size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (targets, segments, positions), int32 [size, L]: a row's options one after another."""
    longest = max(sum(map(len, row)) for row in options)
    packed = np.zeros((3, size, padded_length(longest)), np.int32)
    for i, row in enumerate(options):
        lengths = [len(ids) for ids in row]
        end = sum(lengths)
        packed[0, i, :end] = [token for ids in row for token in ids]
        packed[1, i, :end] = np.repeat(np.arange(1, len(row) + 1), lengths)
        packed[2, i, :end] = [position for length in lengths for position in range(length)]
    return packed[0], packed[1], packed[2]


@functools.partial(jax.jit, static_argnames="sizes")
def encode(sizes: t5.T5Config, weights: Tree, rows: Array, adapters: Adapters | None) -> Array:
    """Encode rows [B, Li] to [B, Li, D]."""
    return t5.T5(sizes).apply({"params": weights}, rows, adapters, method="encode")


@functools.partial(jax.jit, static_argnames="sizes")
def log_probs(
    sizes: t5.T5Config,
    weights: Tree,
    encoded: Array,
    rows: Array,
    targets: Array,
    segments: Array,
    positions: Array,
    adapters: Adapters | None,
) -> Array:
    """Return float32 log-probabilities of targets [B, L], of encoded rows [B, Li]."""
    net, variables = t5.T5(sizes), {"params": weights}
    states = net.apply(
        variables,
        encoded,
        rows,
        targets,
        adapters,
        target_segments=segments,
        target_positions=positions,
        method="decoder_states",
    )

    def blocks(x: Array) -> Array:  # [B, L, ...] -> [L / BLOCK, B, BLOCK, ...]
        return jnp.moveaxis(x.reshape(len(x), -1, BLOCK, *x.shape[2:]), 1, 0)

    by_block = jax.lax.map(
        lambda pair: net.apply(variables, *pair, method="log_probs"),
        (blocks(states), blocks(targets)),
    )
    return jnp.moveaxis(by_block, 0, 1).reshape(targets.shape)
