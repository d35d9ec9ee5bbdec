"""Benchmark of rank classification: a row's options beside each other, or every pair anew."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import hypermodels, model, ranking, t5
from hyper_t5.bench import Options, measure
from hyper_t5.bench.steps import Shapes, make_config, random_backbone, where
from hyper_t5.vocab import EOS_ID

TOGETHER, ANEW = "options together", "each pair anew"
OPTION = 8  # tokens of an option, EOS included: no arm has any padding
SYSTEM = "hyper_lora"


def rank(options: Options) -> measure.Result:
    """A row encoded once with all its options in one pass, against every (row, option) pair.

    Both arms have the task's adapters already, and compute as many rows at a time.

    Raises:
        RuntimeError: the two do not score alike.
    """
    sizes = t5.preset("tiny" if options.tiny else "small")
    rows, lengths = (2, (16, 32)) if options.tiny else (2, (64, 512))
    counts = (2, 4) if options.tiny else (2, 4, 8, 16)
    backbone = random_backbone(sizes)
    result = measure.Result(
        "ranking",
        "rank classification",
        [
            f"{measure.machine()}; {where()}",
            f"T5 1.1 {'tiny' if options.tiny else 'small'}, {SYSTEM}'s adapters of one task, "
            f"{rows} rows at a time, options of {OPTION} tokens, no padding",
            "each pair anew encodes the row once more for every option; the adapters are made "
            "once in both",
        ],
    )
    for length in lengths:
        m, params, adapters = _model(sizes, backbone, length)
        for count in counts:
            ids = _random_ids(sizes.vocab_size, rows, length, count)
            arms = {
                TOGETHER: functools.partial(_together, m, params, adapters, *ids),
                ANEW: functools.partial(_anew, m, params, adapters, *ids),
            }
            _compare(arms[TOGETHER](), arms[ANEW]())
            seconds = measure.in_turns(arms, 2 if options.tiny else 3)
            what = f"{length} tokens of input, {count} options"
            result.rows.append(measure.time_row(what, seconds, TOGETHER, ANEW))
    return result


def _model(sizes: t5.T5Config, backbone: Any, length: int) -> tuple[model.Model, Any, Any]:
    config = make_config(SYSTEM, Shapes(1, 1, 64, length, OPTION))
    m = model.build(config, sizes)
    made = hypermodels.init_params(m.hypermodel, jax.random.key(0), backbone)
    params = {model.BACKBONE: backbone, hypermodels.HYPERMODEL: made}
    conditioning = np.full((1, 64), EOS_ID + 1, np.int32)
    return m, params, model.generate(m, params, conditioning, np.zeros(1, np.int32))


def _random_ids(vocab: int, rows: int, length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs [rows, length] and options [rows, count, OPTION], EOS at each end."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(2, vocab, (rows, length), dtype=np.int32)
    options = rng.integers(2, vocab, (rows, count, OPTION), dtype=np.int32)
    inputs[..., -1] = options[..., -1] = EOS_ID
    return inputs, options


def _together(
    m: model.Model, params: Any, adapters: Any, inputs: np.ndarray, options: np.ndarray
) -> np.ndarray:
    found = ranking.rank_rows(m, params, adapters, jnp.asarray(inputs), options.tolist())
    return np.array([row.log_probs for row in found])


def _anew(
    m: model.Model, params: Any, adapters: Any, inputs: np.ndarray, options: np.ndarray
) -> np.ndarray:
    """Log-probabilities [rows, count], an option of each row at a time."""
    weights, rows = params[model.BACKBONE], jnp.asarray(inputs)
    place = jnp.tile(jnp.arange(OPTION), (len(inputs), 1))
    found = []
    for targets in np.moveaxis(options, 1, 0):
        encoded = ranking.encode(m.sizes, weights, rows, adapters)
        one = jnp.ones_like(place)
        made = ranking.log_probs(
            m.sizes, weights, encoded, rows, jnp.asarray(targets), one, place, adapters
        )
        found.append(np.sum(np.asarray(made, np.float64), -1))
    return np.stack(found, 1)


def _compare(together: np.ndarray, anew: np.ndarray) -> None:
    off = float(np.max(np.abs(together - anew)) / np.max(np.abs(anew)))
    if off > 1e-4:
        raise RuntimeError(f"the two ways to score differ by {off} of the largest score")
