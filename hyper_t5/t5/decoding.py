"""Greedy and beam decoding with a key-value cache, and sampling.

Semantics are T5X's ``decoding.temperature_sample`` and ``decoding.beam_search``: the first decoder
input is 0, a row ends with EOS, zeros follow. A batch decodes in one program until every row has
ended; `inference.engine` batches continuously.

Shapes: B rows, L inputs, S steps, K beams, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from hyper_t5.adapters import Adapters
from hyper_t5.t5 import T5, DecoderCache, T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import SEED_END

Array = jax.Array
NEVER = -1e7  # log-probability of excluded beams and tokens
MIN_TEMPERATURE = 1e-4  # sampling is greedy below it


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are sampled.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_k: samples from the ``top_k`` most likely tokens; 0 is all.
      top_p: samples from the smallest set of most likely tokens whose probabilities sum to
        ``top_p`` (Holtzman et al. 2020); 0 is all.
      seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k < 0 or not 0 <= self.top_p <= 1:
            raise UserError(
                f"top_k is {self.top_k} and top_p {self.top_p}; they must be 0 or more, and 0 to 1"
            )
        if not 0 <= self.seed < SEED_END:
            raise UserError(f"seed is {self.seed}; it must be 0 or more and below {SEED_END}")
        if self.top_k and self.top_p:
            raise UserError("top_k and top_p: use one of them")
        if self.temperature < MIN_TEMPERATURE and (self.top_k or self.top_p):
            raise UserError("top_k and top_p restrict sampling: set a temperature too")


def sample(logits: Array, sampling: Sampling, key: Array, rows: Array, steps: Array) -> Array:
    """Sample tokens [B] from logits [B, V].

    A token depends on key, row number and step [B] only, not on the rest of the batch.
    """
    if sampling.temperature < MIN_TEMPERATURE:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits /= sampling.temperature
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < least, NEVER, logits)
    if sampling.top_p:
        ordered = -jnp.sort(-logits)
        probs = jax.nn.softmax(ordered)
        inside = jnp.cumsum(probs, -1) - probs < sampling.top_p  # the sum before this token
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, NEVER, logits)

    def draw(row: Array, step: Array, logits: Array) -> Array:
        row_key = jax.random.fold_in(jax.random.fold_in(key, row), step)
        return jax.random.categorical(row_key, logits)

    return jax.vmap(draw)(rows, steps, logits).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("config", "steps", "beam_size", "alpha", "eos_id"))
def decode(
    config: T5Config,
    params: Any,
    inputs: Array,
    adapters: Adapters | None = None,
    *,
    steps: int,
    beam_size: int = 1,
    alpha: float = 0.6,
    eos_id: int = 1,
) -> tuple[Array, Array]:
    """Encode ``inputs [B, L]`` once and decode up to ``steps`` tokens with each row's adapters.

    Compiled once per shape.

    Args:
      config: of the backbone.
      params: of the backbone.
      inputs: ids [B, L].
      adapters: of the tasks of the rows.
      steps: S.
      beam_size: 1 is greedy.
      alpha: of the length penalty ``((5 + length) / 6) ** alpha``.
      eos_id: the id that ends a row.

    Returns:
      ids [B, S] (EOS included, 0 after it) and scores [B]: the sum of log-probabilities, for beams
      divided by the length penalty.
    """
    model, variables = T5(config), {"params": params}
    encoded = model.apply(variables, inputs, adapters, method="encode")
    if beam_size > 1:
        encoded, inputs = (jnp.repeat(x, beam_size, 0) for x in (encoded, inputs))
    state = model.apply(variables, encoded, inputs, adapters, steps, method="init_cache")

    def step(tokens: Array, state: DecoderCache) -> tuple[Array, DecoderCache]:
        return model.apply(variables, tokens, state, adapters, method="step")

    if beam_size == 1:
        return _greedy(step, state, inputs.shape[0], steps, eos_id)
    return _beam(step, state, inputs.shape[0] // beam_size, steps, beam_size, alpha, eos_id)


def _greedy(
    step: Any, state: DecoderCache, rows: int, steps: int, eos_id: int
) -> tuple[Array, Array]:
    def body(carry: Any) -> Any:
        i, ids, tokens, scores, ended, state = carry
        logits, state = step(tokens, state)
        tokens = jnp.where(ended, 0, jnp.argmax(logits, -1).astype(ids.dtype))
        chosen = jnp.max(logits, -1) - jax.nn.logsumexp(logits, -1)
        scores += jnp.where(ended, 0.0, chosen)
        ids = jax.lax.dynamic_update_slice(ids, tokens[:, None], (0, i))
        return i + 1, ids, tokens, scores, ended | (tokens == eos_id), state

    start = (
        0,
        jnp.zeros((rows, steps), jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows),
        jnp.zeros(rows, bool),
        state,
    )
    end = jax.lax.while_loop(lambda c: (c[0] < steps) & ~jnp.all(c[4]), body, start)
    return end[1], end[3]


def _beam(
    step: Any, state: DecoderCache, rows: int, steps: int, beams: int, alpha: float, eos_id: int
) -> tuple[Array, Array]:
    """Beam search with a set of live and a set of finished beams, best first in each."""

    def penalty(length: Any) -> Any:
        return ((5.0 + length) / 6.0) ** alpha

    def pick(x: Array, index: Array) -> Array:  # x [B, K', ...], index [B, K] -> [B, K, ...]
        return jnp.take_along_axis(x, index.reshape(*index.shape, *(1,) * (x.ndim - 2)), 1)

    def keep_going(carry: Any) -> Array:
        i, _, live_scores, _, done_scores, _, _ = carry
        best_live = live_scores[:, 0] / penalty(steps + 1)  # an upper bound of any live beam
        return (i < steps) & ~jnp.all(done_scores[:, -1] > best_live)

    def body(carry: Any) -> Any:
        i, live, live_scores, done, done_scores, tokens, state = carry
        logits, state = step(tokens.reshape(-1), state)
        scores = jax.nn.log_softmax(logits).reshape(rows, beams, -1) + live_scores[..., None]
        vocab = scores.shape[-1]
        # 2K candidates: K live ones remain even if K of them end here.
        top, flat = jax.lax.top_k(scores.reshape(rows, -1), 2 * beams)
        parent, token = flat // vocab, (flat % vocab).astype(live.dtype)
        candidates = pick(live, parent).at[:, :, i].set(token)
        ends = token == eos_id

        live_scores, keep = jax.lax.top_k(jnp.where(ends, NEVER, top), beams)
        parent = pick(parent, keep)
        rows_of = (parent + jnp.arange(rows)[:, None] * beams).reshape(-1)
        state = state.replace(self_kv=jax.tree.map(lambda x: x[:, rows_of], state.self_kv))

        finished = jnp.where(ends, top / penalty(i + 1), NEVER)
        done_scores, best = jax.lax.top_k(jnp.concatenate([done_scores, finished], 1), beams)
        done = pick(jnp.concatenate([done, candidates], 1), best)
        return (
            i + 1,
            pick(candidates, keep),
            live_scores,
            done,
            done_scores,
            pick(token, keep),
            state,
        )

    ids = jnp.zeros((rows, beams, steps), jnp.int32)
    only_first = jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, NEVER), (rows, 1))
    start = (
        0,
        ids,
        only_first,
        ids,
        jnp.full((rows, beams), NEVER),
        jnp.zeros((rows, beams), jnp.int32),
        state,
    )
    _, live, live_scores, done, done_scores, _, _ = jax.lax.while_loop(keep_going, body, start)
    any_done = done_scores[:, 0] > NEVER
    best = jnp.where(any_done[:, None], done[:, 0], live[:, 0])
    return best, jnp.where(any_done, done_scores[:, 0], live_scores[:, 0])
