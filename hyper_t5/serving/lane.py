"""A running batch of one adapter shape: rows join and leave at any step, and nothing compiles.

Every row has a slot with adapters of its own. Smaller adapters are padded to the lane's shape, the
backbone alone is a zero adapter. All programs have fixed shapes: the slots, the cache, and a few
input lengths, so that `Lane.warm_up` compiles all of them.

Shapes: B slots, E rows encoded together, L input ids, S output tokens, N layers, H heads, K head
width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from hyper_t5 import adapters as ad
from hyper_t5.adapters import Adapters, AdapterSpec
from hyper_t5.inference.engine import EncodedRows, encode_rows, padded_length
from hyper_t5.t5 import T5, DecoderCache, T5Config
from hyper_t5.t5.decoding import MIN_TEMPERATURE, NEVER

Array = jax.Array

ENCODE_ROWS = 4  # E
TOP_LOGPROBS = 5  # as many as the OpenAI API reports


@struct.dataclass
class SlotState:
    """The device arrays of all slots; leaves with layers lead with [N, B]."""

    encoded: EncodedRows
    self_kv: Any  # (keys, values) [N, B, S, H, K], a ring
    index: Array  # int32: the number of steps so far
    first_step: Array  # int32 [B]
    tokens: Array  # int32 [B]: the last tokens
    temperature: Array  # float32 [B]
    top_p: Array  # float32 [B]; 1 is all
    seeds: Array  # uint32 [B]


class StepResult(NamedTuple):
    """What one step gives each slot, numpy arrays.

    Attributes:
      tokens: [B].
      log_probs: of the tokens [B].
      top_ids: the most likely tokens [B, TOP_LOGPROBS].
      top_log_probs: of these [B, TOP_LOGPROBS].
    """

    tokens: np.ndarray
    log_probs: np.ndarray
    top_ids: np.ndarray
    top_log_probs: np.ndarray


class LaneRow(NamedTuple):
    """One row to insert: its ids (EOS included), adapters of the lane's shape, and sampling."""

    ids: Sequence[int]
    adapters: Adapters | None
    temperature: float
    top_p: float
    seed: int


class Lane:
    """The running batch of one adapter shape.

    Args:
      sizes: of the backbone.
      params: of the backbone.
      spec: the shape; one without parts is the backbone alone.
      slots: B.
      input_length: the longest input, in ids.
      output_length: the longest output, in tokens: S.
    """

    def __init__(
        self,
        sizes: T5Config,
        params: Any,
        spec: AdapterSpec,
        slots: int,
        input_length: int,
        output_length: int,
    ) -> None:
        self.spec, self.slots = spec, slots
        self._sizes, self._params = sizes, params
        self._input_length, self._output_length = padded_length(input_length), output_length
        self._empty = None if spec == AdapterSpec() else jax.device_get(ad.zeros(spec, sizes, 1))
        self._state = self._initial_state()

    def _initial_state(self) -> SlotState:
        rows = [LaneRow([1], self._empty, 0.0, 1.0, 0)] * self.slots
        first = self._encode(rows, self._input_length)
        c = self._sizes
        shape = (c.num_decoder_layers, self.slots, self._output_length, c.num_heads, c.head_dim)
        return SlotState(
            encoded=first,
            self_kv=(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)),
            index=jnp.int32(0),
            first_step=jnp.zeros(self.slots, jnp.int32),
            tokens=jnp.zeros(self.slots, jnp.int32),
            temperature=jnp.zeros(self.slots),
            top_p=jnp.ones(self.slots),
            seeds=jnp.zeros(self.slots, jnp.uint32),
        )

    def pad(self, adapters: Adapters | None) -> Adapters | None:
        """Return adapters of one task in the lane's shape; None is the backbone alone."""
        if self._empty is None:
            return None
        return self._empty if adapters is None else pad_adapters(adapters, self._empty)

    def _encode(self, rows: Sequence[LaneRow], length: int) -> EncodedRows:
        ids = np.zeros((len(rows), length), np.int32)
        for i, row in enumerate(rows):
            ids[i, : len(row.ids)] = row.ids
        adapters = None
        if self._empty is not None:
            trees = [row.adapters.tree for row in rows if row.adapters is not None]
            tree = jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *trees)
            adapters = Adapters(tree, self.spec)
        return encode_rows(self._sizes, self._params, jnp.asarray(ids), adapters)

    def insert(self, rows: Sequence[LaneRow], slots: Sequence[int]) -> None:
        """Encode at most ENCODE_ROWS rows and write them to their slots, and to no others."""
        length = padded_length(max(len(row.ids) for row in rows))
        filled = [*rows, *[rows[0]] * (ENCODE_ROWS - len(rows))]
        index = np.full(ENCODE_ROWS, self.slots, np.int32)  # out of range: dropped
        index[: len(rows)] = slots
        self._state = _insert(
            self._state,
            self._encode(filled, min(length, self._input_length)),
            index,
            np.array([row.temperature for row in filled], np.float32),
            np.array([row.top_p for row in filled], np.float32),
            np.array([row.seed % 2**32 for row in filled], np.uint32),
        )

    def step(self) -> StepResult:
        """Decode one token of every slot."""
        self._state, result = _step(self._sizes, self._params, self._state)
        return StepResult(*jax.device_get(result))

    def rewind(self) -> None:
        """Restart the count of steps; only while no slot is in use."""
        self._state = dataclasses.replace(self._state, index=jnp.int32(0))

    def warm_up(self) -> list[int]:
        """Compile every program; return the input lengths."""
        lengths = sorted({padded_length(n + 1) for n in range(self._input_length)})
        lengths = [min(n, self._input_length) for n in lengths]
        for length in dict.fromkeys(lengths):
            self.insert([LaneRow([1] * length, self._empty, 0.0, 1.0, 0)], [self.slots])
        self.step()
        self.rewind()
        return list(dict.fromkeys(lengths))


def fits(spec: AdapterSpec, lane: AdapterSpec) -> bool:
    """Return whether adapters of a spec can be padded to a lane's."""
    if spec.lora and not (
        lane.lora
        and (lane.lora.bias or not spec.lora.bias)
        and set(spec.lora.targets) <= set(lane.lora.targets)
        and all(spec.lora.rank_of(t) <= lane.lora.rank_of(t) for t in spec.lora.targets)
    ):
        return False
    if spec.prefix and not (
        lane.prefix
        and set(spec.prefix.sites) <= set(lane.prefix.sites)
        and spec.prefix.length <= lane.prefix.length
        and spec.prefix.position_bias == lane.prefix.position_bias
    ):
        return False
    if spec.bottleneck and not (
        lane.bottleneck
        and spec.bottleneck.activation == lane.bottleneck.activation
        and spec.bottleneck.input == lane.bottleneck.input
    ):
        return False
    if spec.bottleneck and lane.bottleneck:
        most = dict(zip(lane.bottleneck.sites, lane.bottleneck.sizes, strict=True))
        for site, size in zip(spec.bottleneck.sites, spec.bottleneck.sizes, strict=True):
            if size > most.get(site, 0):
                return False
    return spec.memory <= lane.memory


def pad_adapters(adapters: Adapters, empty: Adapters) -> Adapters:
    """Return adapters of one task, padded to the shape of ``empty``, with the same effect.

    Prefixes are padded in front, where they keep their distance to the row.
    """
    flat = dict(traverse_util.flatten_dict(jax.tree.map(np.array, empty.tree)))
    own = traverse_util.flatten_dict(adapters.tree)
    for path, x in own.items():
        scale = 1.0
        if path[-1] in ("b", "bias") and path[-2] != "bottleneck":
            target = ".".join(path[:2])
            assert adapters.spec.lora
            assert empty.spec.lora
            scale = adapters.spec.lora.scale_of(target) / empty.spec.lora.scale_of(target)
        first = [slice(0, n) for n in x.shape]
        if path[-2] == "prefix":
            first[2] = slice(flat[path].shape[2] - x.shape[2], None)
        flat[path][tuple(first)] = np.asarray(x) if x.dtype == bool else np.asarray(x) * scale
        if path[-1] == "key" and (*path[:-1], "mask") not in own:
            flat[*path[:-1], "mask"][tuple(first[:3])] = True
    return Adapters(traverse_util.unflatten_dict(flat), empty.spec)


# ------------------------------------------------------------------------------- device side


@functools.partial(jax.jit, donate_argnames="state")
def _insert(
    state: SlotState,
    new: EncodedRows,
    slots: Array,
    temperature: Array,
    top_p: Array,
    seeds: Array,
) -> SlotState:
    """Write rows [E] to their slots [E]; a slot of B is dropped. Other slots are not touched."""

    def write(old: Array, x: Array) -> Array:  # [N, B, ...], [N, E, ...]
        missing = [(0, n - m) for n, m in zip(old.shape[2:], x.shape[2:], strict=True)]
        x = jnp.pad(x, ((0, 0), (0, 0), *missing))  # shorter inputs: padding is masked
        return old.at[:, slots].set(x.astype(old.dtype), mode="drop")

    def put(old: Array, x: Any) -> Array:  # [B], [E]
        return old.at[slots].set(x, mode="drop")

    return dataclasses.replace(
        state,
        encoded=jax.tree.map(write, state.encoded, new),
        first_step=put(state.first_step, state.index),
        tokens=put(state.tokens, 0),
        temperature=put(state.temperature, temperature),
        top_p=put(state.top_p, top_p),
        seeds=put(state.seeds, seeds),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def _step(
    config: T5Config, params: Any, state: SlotState
) -> tuple[SlotState, tuple[Array, Array, Array, Array]]:
    """Decode one position of every slot."""
    rows = state.encoded
    cross = (rows.key, rows.value, rows.prefix)
    cache = DecoderCache(state.self_kv, cross, rows.mask[0], state.index, state.first_step)
    logits, cache = T5(config).apply(
        {"params": params}, state.tokens, cache, rows.adapters, method="step"
    )
    log_p = jax.nn.log_softmax(logits)
    is_sampled = state.temperature >= MIN_TEMPERATURE
    tokens = jax.lax.cond(
        is_sampled.any(),
        lambda: jnp.where(is_sampled, _sample(state, logits), jnp.argmax(logits, -1)),
        lambda: jnp.argmax(logits, -1),
    ).astype(jnp.int32)
    top = jax.lax.top_k(log_p, TOP_LOGPROBS)
    chosen = jnp.take_along_axis(log_p, tokens[:, None], 1)[:, 0]
    state = dataclasses.replace(state, self_kv=cache.self_kv, index=cache.index, tokens=tokens)
    return state, (tokens, chosen, top[1], top[0])


def _sample(state: SlotState, logits: Array) -> Array:
    """Sample tokens [B]; each depends on its row's seed and position alone."""
    logits = logits / jnp.maximum(state.temperature, MIN_TEMPERATURE)[:, None]
    ordered = -jnp.sort(-logits)
    probs = jax.nn.softmax(ordered)
    inside = jnp.cumsum(probs, -1) - probs < state.top_p[:, None]
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
    logits = jnp.where(logits < least, NEVER, logits)

    def draw(seed: Array, position: Array, row: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), row)

    return jax.vmap(draw)(state.seeds, state.index - state.first_step, logits)
