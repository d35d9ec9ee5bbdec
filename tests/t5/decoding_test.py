"""Greedy and beam decoding: T5X's tokens and scores; step by step equals teacher forcing."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import t5, weights
from hyper_t5.t5 import attention, network
from hyper_t5.t5.decoding import decode
from tests.support.tiny_model import (
    CONFIG,
    EVERYTHING,
    GOLDEN,
    ids,
    logits,
    off,
    params,
    random_adapters,
)

pytestmark = pytest.mark.smoke

Golden = tuple[t5.T5Config, dict[str, Any], dict[str, np.ndarray]]
STEPS = 16


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Load (sizes, parameters, arrays under ``decode/``) that T5X wrote."""
    config, tree, _ = weights.load_backbone(GOLDEN / "checkpoint_7")
    with np.load(GOLDEN / "golden.npz") as arrays:
        expected = {
            k.removeprefix("decode/"): v for k, v in arrays.items() if k.startswith("decode/")
        }
    return config, tree, expected


def test_greedy_is_t5x(golden: Golden) -> None:
    config, tree, arrays = golden
    tokens, scores = decode(config, tree, arrays["encoder_input_tokens"], steps=STEPS)
    np.testing.assert_array_equal(tokens, arrays["greedy_topk1/ids"])
    np.testing.assert_allclose(scores, arrays["greedy_topk1_rawlogprob/scores"], rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("beam4", {}),
        ("beam4_alpha0", {"alpha": 0.0}),
        # With these two some rows, or all, never end: the best live beam is the answer.
        ("beam4_eos_440", {"eos_id": 440}),
        ("beam4_eos_3", {"eos_id": 3}),
    ],
)
def test_beam_is_t5x(golden: Golden, name: str, options: dict[str, Any]) -> None:
    config, tree, arrays = golden
    inputs = arrays["encoder_input_tokens"]
    tokens, scores = decode(config, tree, inputs, steps=STEPS, beam_size=4, **options)
    np.testing.assert_array_equal(tokens, arrays[f"{name}/ids"][:, -1])
    np.testing.assert_allclose(scores, arrays[f"{name}/scores"][:, -1], rtol=1e-5)


def steps_taken(
    monkeypatch: pytest.MonkeyPatch, config: t5.T5Config, *arguments: Any, **options: Any
) -> int:
    """Count how many times ``decode`` runs the decoder."""
    taken: list[int] = []

    def step(model: t5.T5, tokens: jax.Array, state: t5.DecoderCache, adapters: Any) -> Any:
        jax.debug.callback(lambda index: taken.append(int(index)), state.index)
        return real(model, tokens, state, adapters)

    real = t5.T5.step
    monkeypatch.setattr(t5.T5, "step", step)
    unjitted = inspect.unwrap(decode)
    fresh = jax.jit(functools.partial(unjitted, config, **options))
    jax.block_until_ready(fresh(*arguments))
    jax.effects_barrier()
    monkeypatch.undo()
    assert sorted(taken) == list(range(len(taken)))
    return len(taken)


def test_stops_when_every_row_has_ended(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    config, tree, arrays = golden
    inputs, expected = arrays["encoder_input_tokens"], arrays["greedy_topk1/ids"]
    lengths = np.count_nonzero(expected, 1)
    ending = (expected == 1).any(1)  # two of the rows never do
    count = functools.partial(steps_taken, monkeypatch, config, tree, steps=STEPS)
    assert count(inputs[ending]) == max(lengths[ending]) < STEPS
    # A beam goes on until none that lives can still win.
    assert count(inputs[ending], beam_size=4) < STEPS


@functools.partial(jax.jit, static_argnames="steps")
def by_steps(inputs: Any, fed: jax.Array, adapters: Any, steps: int) -> jax.Array:
    """Compute logits [B, S, V] of a decoder that is fed one token [B] per step."""
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(inputs, adapters, method="encode")
    state = apply(encoded, inputs, adapters, steps, method="init_cache")

    def body(state: t5.DecoderCache, tokens: jax.Array) -> tuple[t5.DecoderCache, jax.Array]:
        logits, state = apply(tokens, state, adapters, method="step")
        return state, logits

    return jax.lax.scan(body, state, fed.T)[1].swapaxes(0, 1)


@pytest.mark.parametrize("position_bias", ad.POSITION_BIASES)
def test_steps_with_adapters_everywhere_equal_teacher_forcing(position_bias: str) -> None:
    adapters = random_adapters(EVERYTHING[position_bias], 2)
    inputs, targets = ids(4, 7), ids(4, 9, shortest=9)
    expected = logits(inputs, targets, adapters, weights=params())
    # A cache longer than what is decoded changes nothing.
    assert off(by_steps(inputs, network.shift_right(targets), adapters, 12), expected) < 1e-5


@functools.partial(jax.jit, static_argnames=("room", "steps"))
def by_staggered_steps(
    inputs: Any, fed: jax.Array, first_step: jax.Array, adapters: Any, room: int, steps: int
) -> jax.Array:
    """Compute logits [B, steps, V] where row b is fed its first token at step first_step[b]."""
    apply = functools.partial(t5.T5(CONFIG).apply, {"params": params()})
    encoded = apply(inputs, adapters, method="encode")
    state = apply(encoded, inputs, adapters, room, method="init_cache")
    state = dataclasses.replace(state, first_step=first_step)

    def body(state: t5.DecoderCache, index: jax.Array) -> tuple[t5.DecoderCache, jax.Array]:
        own = jnp.clip(index - first_step, 0, fed.shape[1] - 1)
        logits, state = apply(fed[jnp.arange(len(fed)), own], state, adapters, method="step")
        return state, logits

    return jax.lax.scan(body, state, jnp.arange(steps))[1].swapaxes(0, 1)


@pytest.mark.parametrize("position_bias", ad.POSITION_BIASES)
def test_rows_that_begin_at_different_steps_equal_teacher_forcing(position_bias: str) -> None:
    """Also where they go round in a cache no longer than themselves."""
    adapters = random_adapters(EVERYTHING[position_bias], 2)
    inputs, targets, first_step = ids(4, 7), ids(4, 9, shortest=9), np.array([0, 2, 3, 7])
    expected = logits(inputs, targets, adapters, weights=params())
    actual = by_staggered_steps(inputs, network.shift_right(targets), first_step, adapters, 9, 16)
    for row, first in enumerate(first_step):
        assert off(actual[row, first : first + 9], expected[row]) < 1e-5


def test_position_bias_of_a_step_is_that_of_the_whole_far_away_too() -> None:
    length = CONFIG.relpos_max_distance + 30
    table = jax.random.normal(jax.random.key(0), (CONFIG.num_heads, CONFIG.relpos_buckets))
    relpos = attention.RelativeBias(CONFIG, bidirectional=False)
    apply = functools.partial(relpos.apply, {"params": {"rel_embedding": table}})
    whole = apply(length, length)
    for index in (0, 1, 20, length - 1):
        step = apply(1, length, jnp.asarray(index))
        np.testing.assert_array_equal(step[:, 0, : index + 1], whole[:, index, : index + 1])


def test_beams_decode_with_the_adapters_of_their_task() -> None:
    adapters, inputs = random_adapters(EVERYTHING["hf"], 2), ids(4, 7)
    options = {"steps": 5, "beam_size": 3}
    tokens, scores = decode(CONFIG, params(), inputs, adapters, **options)
    assert len({tuple(row) for row in tokens.tolist()}) > 1
    for task in (0, 1):
        rows = slice(2 * task, 2 * task + 2)
        alone = decode(CONFIG, params(), inputs[rows], ad.take(adapters, [task]), **options)
        np.testing.assert_array_equal(tokens[rows], alone[0])
        np.testing.assert_allclose(scores[rows], alone[1], rtol=1e-4)


def test_greedy_takes_the_likeliest_token_of_teacher_forcing() -> None:
    adapters, inputs = random_adapters(EVERYTHING["hf"], 2), ids(4, 7)
    tokens, scores = decode(CONFIG, params(), inputs, adapters, steps=9, eos_id=-1)
    forced = logits(
        inputs, jnp.maximum(tokens, 2), adapters, network.shift_right(tokens), weights=params()
    )
    np.testing.assert_array_equal(jnp.argmax(forced, -1), tokens)
    best = jnp.sum(jnp.max(jax.nn.log_softmax(forced), -1), -1)
    np.testing.assert_allclose(scores, best, rtol=1e-4)


def test_compiles_once_per_shape() -> None:
    compiled: Any = decode
    sizes = []
    for rows, length, seed in ((2, 5, 0), (2, 5, 1), (2, 6, 0), (2, 5, 2)):
        decode(CONFIG, params(), ids(rows, length, seed=seed), steps=3)
        sizes.append(compiled._cache_size())
    assert np.diff(sizes).tolist() == [0, 1, 0]
