"""Benchmark of rank classification: the options of a row packed together, or one by one."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from hyper_t5 import model, t5
from hyper_t5.bench import Options, measure, steps
from hyper_t5.evaluation import rank_classification

PACKED, SINGLE = "packed options", "one option at a time"
OPTION = 8  # tokens of an option, EOS included, so that no arm has padding
CONDITIONING = 64
ROWS = 2  # in a batch
SYSTEM = "hyper_lora"


def ranking(options: Options, result: measure.Result) -> None:
    """Compare one encoding of a row for all its options with one for each option.

    Both arms use the same generated adapters.
    """
    size, rounds, lengths, counts = "small", 3, [64, 512], [2, 4, 8, 16]
    if options.tiny:
        size, rounds, lengths, counts = "tiny", 2, [16, 32], [2, 4]
    result.notes.append(
        f"T5 1.1 {size}, adapters of {SYSTEM} for one task, {ROWS} rows in a batch, options of "
        f"{OPTION} tokens, no padding"
    )
    sizes = t5.preset(size)
    shapes = steps.Shapes(1, 1, CONDITIONING, max(lengths), OPTION)
    m = model.build_model(steps.make_config(SYSTEM, shapes), sizes)
    params = steps.random_params(m, steps.random_backbone(sizes))
    for length in lengths:
        for count in counts:
            arms = _arms(m, params, length, count)
            packed, single = arms[PACKED](), arms[SINGLE]()
            error = float(np.max(np.abs(packed - single)) / np.max(np.abs(single)))
            if error > 1e-4:
                raise RuntimeError(f"log-probabilities differ by {error} of the largest")
            quantity = f"{length} tokens of input, {count} options"
            result.add(quantity, "s", measure.time_arms(arms, rounds), SINGLE)


def _arms(
    m: model.Model, params: steps.Tree, length: int, count: int
) -> dict[str, Callable[[], np.ndarray]]:
    """Build functions that return log-probabilities [ROWS, count] of the same random options."""
    backbone, vocab_size = params[model.BACKBONE], m.sizes.vocab_size
    text = steps.random_ids(vocab_size, 1, CONDITIONING)
    adapters = model.generate_adapters(m, params, text, np.zeros(1, np.int32))
    inputs = jnp.asarray(steps.random_ids(vocab_size, ROWS, length))
    options = steps.random_ids(vocab_size, ROWS, count, OPTION)
    segments = jnp.ones((ROWS, OPTION), jnp.int32)
    positions = jnp.tile(jnp.arange(OPTION), (ROWS, 1))

    def packed() -> np.ndarray:
        scores = rank_classification.rank_rows(m, params, adapters, inputs, options.tolist())
        return np.array([row.log_probs for row in scores])

    def single() -> np.ndarray:
        scores = []
        for ids in np.moveaxis(options, 1, 0):
            encoded = rank_classification.encode(m.sizes, backbone, inputs, adapters)
            packed_ids = (jnp.asarray(ids), segments, positions)
            log_probs = rank_classification.log_probs(
                m.sizes, backbone, encoded, inputs, *packed_ids, adapters
            )
            scores.append(np.sum(np.asarray(log_probs, np.float64), -1))
        return np.stack(scores, 1)

    return {PACKED: packed, SINGLE: single}
