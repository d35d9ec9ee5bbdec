"""T5 attention: projections with LoRA, relative position bias, masks, prefixes.

Shapes: B rows, L queries, M keys, D model width, H heads, K head width, T tasks (B = T*G, the G
rows of a task are adjacent), P prefix slots.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from hyper_t5.adapters import MEMORY, Adapters
from hyper_t5.t5.config import T5Config

Array = jax.Array
Tree = dict[str, Any]


# T5X masks with an added -1e10, not -inf: a row without visible keys attends to all equally.
MASKED = -1e10


def lora_delta(x: Array, lora: Tree) -> Array:
    """Return ``(x a) b + bias``, x [B, L, in], per task, a [T, in, R], b [T, R, out]."""
    per_task = x.reshape(lora["a"].shape[0], -1, x.shape[-1])  # [T, G*L, in]
    delta = jnp.einsum("tli,tir->tlr", per_task, lora["a"].astype(x.dtype))
    delta = jnp.einsum("tlr,tro->tlo", delta, lora["b"].astype(x.dtype))
    if "bias" in lora:
        delta += lora["bias"].astype(x.dtype)[:, None]
    return delta.reshape(*x.shape[:-1], -1)


class Projection(nn.Module):
    """A dense layer without bias (T5X's DenseGeneral), [..., in] -> [..., features], plus LoRA."""

    features: int
    axes: tuple[str, str]
    kernel_init: Any
    dtype: str

    @nn.compact
    def __call__(self, x: Array, lora: Tree | None = None) -> Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(self.dtype)
        # As one matrix: XLA on CPUs takes a third longer for gradients of products of more axes.
        rows = x.reshape(-1, x.shape[-1])
        y = (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        return y if lora is None else y + lora_delta(x, lora)


def relative_buckets(
    relative: np.ndarray, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """Return T5's buckets of ``key position - query position``: exact near, logarithmic far."""
    n = -relative.astype(np.int32)
    offset = np.zeros_like(n)
    if bidirectional:
        buckets //= 2
        offset = (n < 0).astype(np.int32) * buckets
        n = np.abs(n)
    else:
        n = np.maximum(n, 0)
    exact = buckets // 2
    ratio = np.log(n.astype(np.float32) / exact + np.finfo(np.float32).eps)
    far = exact + (ratio / np.log(max_distance / exact) * (buckets - exact)).astype(np.int32)
    return offset + np.where(n < exact, n, np.minimum(far, buckets - 1))


def expand_diagonals(values: Array, queries: int) -> Array:
    """Expand [H, queries + keys - 1], one value per diagonal, to Toeplitz [H, queries, keys].

    Tiling with one spare column and cutting rows one shorter shifts each row by one: slices and
    reshapes only, since the gradient of a gather is a slow scatter.
    """
    heads, m = values.shape
    tiled = jnp.tile(jnp.pad(values, ((0, 0), (0, 1))), (1, queries))
    return tiled[:, : queries * m].reshape(heads, queries, m)[:, :, queries - 1 :]


class RelativeBias(nn.Module):
    """One table of relative position biases per stack, shared by its layers."""

    config: T5Config
    bidirectional: bool

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        init = nn.with_logical_partitioning(init, ("heads", "relpos_buckets"))
        shape = (c.num_heads, c.relpos_buckets)
        self.rel_embedding = self.param("rel_embedding", init, shape, jnp.float32)

    def __call__(self, queries: int, keys: int, offset: int | Array = 0) -> Array:
        """Return float32 [H, queries, keys]; query i is ``offset + i`` positions after key 0.

        An offset [B] per row gives [B, H, queries, keys].
        """
        if isinstance(offset, int):
            diagonal = np.arange(1 - queries, keys) - offset
            table = jnp.asarray(self.rel_embedding)
            return expand_diagonals(table[:, self._buckets(diagonal)], queries)
        # A step of decoding: the offset is traced.
        distance = jnp.arange(queries)[:, None] - jnp.arange(keys)[None, :]
        bias = self.at(offset[..., None, None] + distance)
        return bias if bias.ndim == 3 else jnp.moveaxis(bias, 0, 1)

    def at(self, distance: Array) -> Array:
        """Return float32 [H, ...] of traced distances [...] from key to query.

        Looks up a table of all distances; those from max_distance on share the last entry.
        """
        farthest = self.config.relpos_max_distance
        buckets = jnp.asarray(self._buckets(-np.arange(farthest + 1)))
        return jnp.asarray(self.rel_embedding)[:, buckets[jnp.clip(distance, 0, farthest)]]

    def _buckets(self, relative: np.ndarray) -> np.ndarray:
        c = self.config
        return relative_buckets(
            relative, self.bidirectional, c.relpos_buckets, c.relpos_max_distance
        )


def join_prefixes(first: Tree | None, second: Tree) -> Tree:
    """Concatenate two prefixes [T, P, H, K]; a missing mask is all True."""
    if first is None:
        return second

    def mask(prefix: Tree) -> Array:
        return prefix.get("mask", jnp.ones(prefix["key"].shape[:2], bool))

    joined = {
        k: jnp.concatenate([first[k], second[k].astype(first[k].dtype)], 1)
        for k in ("key", "value")
    }
    return joined | {"mask": jnp.concatenate([mask(first), mask(second)], 1)}


def attend(
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    prefix: Tree | None = None,
    prefix_bias: Array | None = None,
    dropout: Any = None,
) -> Array:
    """Compute unscaled dot-product attention, softmax in float32.

    Args:
      query: [B, L, H, K].
      key: [B, M, H, K].
      value: [B, M, H, K].
      bias: mask and position bias, broadcastable to [B, H, L, M], float32.
      prefix: ``key``/``value`` [T, P, H, K], optional ``mask`` [T, P]. They join at the logits and
        are never copied to the G rows of a task.
      prefix_bias: [H, L, P], or [B, H, L, P] where rows are packed, float32.
      dropout: applied to the probabilities [B, H, L, P + M].

    Returns:
      [B, L, H, K].
    """
    b, length, heads, width = query.shape
    logits = jnp.einsum("blhk,bmhk->bhlm", query, key).astype(jnp.float32) + bias
    if prefix is None:
        probs = jax.nn.softmax(logits).astype(query.dtype)
        probs = probs if dropout is None else dropout(probs)
        return jnp.einsum("bhlm,bmhk->blhk", probs, value)
    tasks, slots = prefix["key"].shape[:2]
    rows = query.reshape(tasks, -1, length, heads, width)
    extra = jnp.einsum("tglhk,tphk->tghlp", rows, prefix["key"].astype(query.dtype))
    extra = extra.astype(jnp.float32)
    if prefix_bias is not None:
        if prefix_bias.ndim == 4:
            prefix_bias = prefix_bias.reshape(extra.shape)
        extra += prefix_bias
    if "mask" in prefix:
        extra = jnp.where(prefix["mask"][:, None, None, None, :], extra, MASKED)
    extra = extra.reshape(b, heads, length, slots)
    probs = jax.nn.softmax(jnp.concatenate([extra, logits], -1)).astype(query.dtype)
    probs = probs if dropout is None else dropout(probs)
    out = jnp.einsum("bhlm,bmhk->blhk", probs[..., slots:], value)
    probs = probs[..., :slots].reshape(tasks, -1, heads, length, slots)
    added = jnp.einsum("tghlp,tphk->tglhk", probs, prefix["value"].astype(query.dtype))
    return out + added.reshape(out.shape)


def mask_bias(mask: Array) -> Array:
    """Convert a mask [B, L, M] of visible keys to an additive float32 bias [B, 1, L, M]."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)[:, None]


def pair_mask(
    queries: Array,
    keys: Array,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
) -> Array:
    """Return [B, L, M], True where both tokens are real and of one packed example."""
    mask = queries.astype(bool)[:, :, None] & keys.astype(bool)[:, None, :]
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


class Attention(nn.Module):
    """Multi-head attention of T5: unscaled, without biases."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        joined = c.num_heads * c.head_dim
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
        scaled = nn.initializers.variance_scaling(1.0 / c.head_dim, "fan_in", "normal")
        make = functools.partial(Projection, dtype=c.dtype)
        self.query = make(joined, ("embed", "joined_kv"), scaled)
        self.key = make(joined, ("embed", "joined_kv"), fan_in)
        self.value = make(joined, ("embed", "joined_kv"), fan_in)
        self.out = make(c.emb_dim, ("joined_kv", "embed"), fan_in)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def keys_values(self, x: Array, adapters: Tree | None = None) -> tuple[Array, Array]:
        """Project [B, M, D] to keys and values [B, M, H, K]."""
        a = adapters or {}
        return (self._heads(self.key(x, a.get("key"))), self._heads(self.value(x, a.get("value"))))

    def __call__(
        self,
        x: Array,
        key: Array,
        value: Array,
        bias: Array,
        adapters: Tree | None = None,
        prefix_bias: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """Attend from x [B, L, D] (or one row for all B) to the keys; return [B, L, D]."""
        a = adapters or {}
        query = self._heads(self.query(x, a.get("query")))
        query = jnp.broadcast_to(query, (key.shape[0], *query.shape[1:]))
        dropout = None if deterministic else functools.partial(self.dropout, deterministic=False)
        y = attend(query, key, value, bias, a.get("prefix"), prefix_bias, dropout)
        return self.out(y.reshape(*y.shape[:2], -1), a.get("out"))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


def prefix_position_bias(
    relpos: RelativeBias,
    adapters: Adapters | None,
    site: str,
    queries: int,
    offset: int | Array = 0,
    positions: Array | None = None,
) -> Array | None:
    """Return the bias [H, queries, P] of spec.position_bias 'hf', None for 'zero'.

    Slot j is P - j positions before position 0. With ``positions`` [B, queries] of packed rows the
    result is [B, H, queries, P]: biases within a row depend on distance and so are the same in any
    segment, but the prefix precedes each segment.
    """
    spec = adapters.spec.prefix if adapters is not None else None
    if spec is None or site not in spec.sites or spec.position_bias == "zero":
        return None
    assert adapters is not None
    slots = adapters.tree[site]["prefix"]["key"].shape[2]
    bias = relpos(queries, slots, slots + offset)
    return bias if positions is None else jnp.moveaxis(bias[:, positions], 0, 1)


def shared_memory(adapters: Adapters | None) -> Tree | None:
    """Return the memory that all rows of a task cross-attend: states [T, M, D], mask [T, M]."""
    if adapters is None or MEMORY not in adapters.tree:
        return None
    return {k: v[0] for k, v in adapters.tree[MEMORY].items()}
