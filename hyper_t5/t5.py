"""T5 (1.0 and 1.1) in Flax Linen; every block takes its adapters as an argument.

Parameter names, shapes, logical axes and numbers are those of T5X's ``examples/t5/network.py``,
except that the layers of a stack are stacked on a leading axis and scanned:
``encoder/layers/attention/query/kernel [N, D, H*K]`` is T5X's ``encoder/layers_i/...`` for all i.
With ``adapters=None`` the result equals T5X's.

Shapes: B rows, L positions, M memory positions, D model width, H heads, K head width, V vocabulary,
N layers, T tasks (B = T*G, the G rows of a task next to each other), P prefix slots.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from hyper_t5.adapters import MEMORY, Adapters

Array = jax.Array
Tree = dict[str, Any]

# T5X masks with an added -1e10, not -inf: a row that may see nothing then sees everything equally.
MASKED = -1e10


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, as T5X's T5Config names them. ``dtype`` is the compute dtype."""

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    remat: str = "none"  # 'none' | 'minimal' (keep matrix products) | 'full' (keep layer inputs)
    scan_unroll: int = 1
    relpos_buckets: int = 32
    relpos_max_distance: int = 128


def _v1_1(emb: int, heads: int, layers: int, mlp: int, **more: Any) -> T5Config:
    return T5Config(
        emb_dim=emb,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_dim=mlp,
        **more,
    )


PRESETS = {
    "tiny": _v1_1(64, 4, 2, 128, head_dim=16, vocab_size=512),
    "mini": _v1_1(256, 4, 4, 512, logits_via_embedding=True),  # 14.5 M: for trials on CPUs
    "small": _v1_1(512, 6, 8, 1024),
    "base": _v1_1(768, 12, 12, 2048),
    "large": _v1_1(1024, 16, 24, 2816),
    "xl": _v1_1(2048, 32, 24, 5120),
    "xxl": _v1_1(4096, 64, 24, 10240),
}
_v1_0 = functools.partial(_v1_1, mlp_activations=("relu",), logits_via_embedding=True)
T5_1_0_PRESETS = {
    "tiny": _v1_0(64, 4, 2, 256, head_dim=16, vocab_size=512),
    "small": _v1_0(512, 8, 6, 2048),
    "base": _v1_0(768, 12, 12, 3072),
    "large": _v1_0(1024, 16, 24, 4096),
    "xl": _v1_0(1024, 32, 24, 16384, head_dim=128),
    "xxl": _v1_0(1024, 128, 24, 65536, head_dim=128),
}


def preset(name: str, **overrides: Any) -> T5Config:
    """A T5 1.1 size by name; ``t5-small`` and so on name the T5 1.0 sizes."""
    table = T5_1_0_PRESETS if name.startswith("t5-") else PRESETS
    return dataclasses.replace(table[name.removeprefix("t5-")], **overrides)


# ---------------------------------------------------------------------------------- plain functions


def lora_delta(x: Array, lora: Tree) -> Array:
    """``(x a) b + bias`` per task, for x [B, L, in], a [T, in, R], b [T, R, out] -> [B, L, out]."""
    per_task = x.reshape(lora["a"].shape[0], -1, x.shape[-1])  # [T, G*L, in]
    delta = jnp.einsum("tli,tir->tlr", per_task, lora["a"].astype(x.dtype))
    delta = jnp.einsum("tlr,tro->tlo", delta, lora["b"].astype(x.dtype))
    if "bias" in lora:
        delta += lora["bias"].astype(x.dtype)[:, None]
    return delta.reshape(*x.shape[:-1], -1)


@struct.dataclass
class Bottleneck:
    """One layer's bottleneck adapters, leaves [T, ...], with what of their spec they compute by."""

    leaves: Tree
    activation: str = struct.field(pytree_node=False)
    input: str = struct.field(pytree_node=False)


def bottleneck_delta(x: Array, normed: Array, adapters: Tree | None) -> Array | float:
    """What a bottleneck adapter adds beside an MLP: [B, L, D], 0 without one.

    ``x`` [B, L, D] is the residual stream before the MLP, ``normed`` what the MLP reads of it.
    """
    made: Bottleneck | None = (adapters or {}).get("bottleneck")
    if made is None:
        return 0.0
    x = normed if made.input == "normed" else x
    w = {k: v.astype(x.dtype) for k, v in made.leaves.items()}
    per_task = x.reshape(w["down"].shape[0], -1, x.shape[-1])  # [T, G*L, D]
    hidden = jnp.einsum("tld,tda->tla", per_task, w["down"]) + w["down_bias"][:, None]
    hidden = getattr(nn, made.activation)(hidden)
    y = jnp.einsum("tla,tad->tld", hidden, w["up"]) + w["up_bias"][:, None]
    return y.reshape(x.shape)


def join_prefixes(first: Tree | None, second: Tree) -> Tree:
    """Two prefixes [T, P, H, K] one after the other, as one; a missing mask is all True."""
    if first is None:
        return second

    def mask(prefix: Tree) -> Array:
        return prefix.get("mask", jnp.ones(prefix["key"].shape[:2], bool))

    joined = {
        k: jnp.concatenate([first[k], second[k].astype(first[k].dtype)], 1)
        for k in ("key", "value")
    }
    return joined | {"mask": jnp.concatenate([mask(first), mask(second)], 1)}


def relative_buckets(
    relative: np.ndarray, bidirectional: bool, buckets: int, max_distance: int
) -> np.ndarray:
    """T5's buckets of ``key position - query position``: exact when near, logarithmic when far."""
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
    """[H, queries + keys - 1], one value a diagonal -> [H, queries, keys] (a Toeplitz matrix).

    Tiling with one spare column and cutting rows one shorter shifts each row by one: slices and
    reshapes only, where a gather's gradient would be a slow scatter.
    """
    heads, m = values.shape
    tiled = jnp.tile(jnp.pad(values, ((0, 0), (0, 1))), (1, queries))
    return tiled[:, : queries * m].reshape(heads, queries, m)[:, :, queries - 1 :]


def attend(
    query: Array,
    key: Array,
    value: Array,
    bias: Array,
    prefix: Tree | None = None,
    prefix_bias: Array | None = None,
    dropout: Any = None,
) -> Array:
    """Unscaled dot-product attention, softmax in float32.

    Args:
      query [B, L, H, K]; key, value [B, M, H, K].
      bias: mask and position bias, broadcastable to [B, H, L, M], float32.
      prefix: ``key``/``value`` [T, P, H, K], optional ``mask`` [T, P]. They join at the logits:
        never copied to the G rows of a task.
      prefix_bias: [H, L, P], or [B, H, L, P] where rows are packed, float32.
      dropout: applied to the probabilities [B, H, L, P + M].
    Returns: [B, L, H, K].
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
    """[B, L, M] of what may be seen -> additive float32 [B, 1, L, M]."""
    return jnp.where(mask, 0.0, MASKED).astype(jnp.float32)[:, None]


def pair_mask(
    queries: Array,
    keys: Array,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
) -> Array:
    """True where both tokens are real and of one packed example: [B, L] x [B, M] -> [B, L, M]."""
    mask = queries.astype(bool)[:, :, None] & keys.astype(bool)[:, None, :]
    if query_segments is not None and key_segments is not None:
        mask &= query_segments[:, :, None] == key_segments[:, None, :]
    return mask


def shift_right(targets: Array, segments: Array | None = None) -> Array:
    """Decoder input ids: targets [B, L] behind a 0, one later; a 0 too where a segment starts."""
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    if segments is None:
        return shifted
    return jnp.where(segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1], shifted, 0)


# ------------------------------------------------------------------------------------------ modules


class Projection(nn.Module):
    """A dense layer without bias, T5X's DenseGeneral: [..., in] -> [..., features], plus LoRA."""

    features: int
    axes: tuple[str, str]
    kernel_init: Any
    dtype: str

    @nn.compact
    def __call__(self, x: Array, lora: Tree | None = None) -> Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), jnp.float32)
        x = x.astype(self.dtype)
        # As one matrix: XLA for CPUs is a third slower at the gradient of a product of more axes.
        rows = x.reshape(-1, x.shape[-1])
        y = (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        return y if lora is None else y + lora_delta(x, lora)


class RMSNorm(nn.Module):
    """T5's layer norm: no mean, no bias, in float32."""

    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        y = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
        return y.astype(self.dtype) * scale.astype(self.dtype)


class RelativeBias(nn.Module):
    """One table of position biases a stack, shared by its layers."""

    config: T5Config
    bidirectional: bool

    def setup(self) -> None:
        c = self.config
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        init = nn.with_logical_partitioning(init, ("heads", "relpos_buckets"))
        shape = (c.num_heads, c.relpos_buckets)
        self.rel_embedding = self.param("rel_embedding", init, shape, jnp.float32)

    def __call__(self, queries: int, keys: int, offset: int | Array = 0) -> Array:
        """float32 [H, queries, keys]; query i stands ``offset + i`` places after key 0.

        An offset [B], each row's own, gives [B, H, queries, keys].
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
        """float32 [H, ...] of the distances [...] from key to query, which need not be constants.

        By a table of all distances: those from max_distance on share the last one.
        """
        farthest = self.config.relpos_max_distance
        buckets = jnp.asarray(self._buckets(-np.arange(farthest + 1)))
        return jnp.asarray(self.rel_embedding)[:, buckets[jnp.clip(distance, 0, farthest)]]

    def _buckets(self, relative: np.ndarray) -> np.ndarray:
        c = self.config
        return relative_buckets(
            relative, self.bidirectional, c.relpos_buckets, c.relpos_max_distance
        )


def _dropout(config: T5Config, axis: int, deterministic: bool) -> Any:
    return nn.Dropout(config.dropout_rate, broadcast_dims=(axis,), deterministic=deterministic)


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
        """[B, M, D] -> keys and values [B, M, H, K]."""
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
        """x [B, L, D] -> [B, L, D]; x may be one row that asks the keys of all B."""
        a = adapters or {}
        query = self._heads(self.query(x, a.get("query")))
        query = jnp.broadcast_to(query, (key.shape[0], *query.shape[1:]))
        dropout = None if deterministic else functools.partial(self.dropout, deterministic=False)
        y = attend(query, key, value, bias, a.get("prefix"), prefix_bias, dropout)
        return self.out(y.reshape(*y.shape[:2], -1), a.get("out"))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.config.num_heads, self.config.head_dim)


class Mlp(nn.Module):
    """Feed-forward block: the product of ``act_i(x wi_i)``, then wo."""

    config: T5Config

    @nn.compact
    def __call__(self, x: Array, adapters: Tree | None = None, deterministic: bool = True) -> Array:
        c, a = self.config, adapters or {}
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        hidden: Any = 1.0
        for i, act in enumerate(c.mlp_activations):
            name = "wi" if len(c.mlp_activations) == 1 else f"wi_{i}"
            y = Projection(c.mlp_dim, ("embed", "mlp"), init, c.dtype, name=name)(x, a.get(name))
            hidden *= y if act == "linear" else getattr(nn, act)(y)
        hidden = _dropout(c, -2, deterministic)(hidden)
        return Projection(c.emb_dim, ("mlp", "embed"), init, c.dtype, name="wo")(
            hidden, a.get("wo")
        )


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each behind a norm and beside a residual."""

    config: T5Config
    collect: bool  # also return this layer's input, and its keys and values of it

    @nn.compact
    def __call__(
        self, x: Array, adapters: Tree, bias: Array, prefix_bias: Array | None, deterministic: bool
    ) -> tuple[Array, Any]:
        c = self.config
        drop = _dropout(c, -2, deterministic)
        attention, a = Attention(c, name="attention"), adapters.get("self")
        start = x
        y = RMSNorm(c.dtype, name="pre_attention_layer_norm")(x)
        key, value = attention.keys_values(y, a)
        x += drop(attention(y, key, value, bias, a, prefix_bias, deterministic))
        y = RMSNorm(c.dtype, name="pre_mlp_layer_norm")(x)
        a = adapters.get("mlp")
        beside = bottleneck_delta(x, y, a)
        x += drop(Mlp(c, name="mlp")(y, a, deterministic)) + beside
        return x, (key, value, start) if self.collect else None


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention and MLP, each behind a norm and beside a residual."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.pre_self_attention_layer_norm = RMSNorm(c.dtype)
        self.self_attention = Attention(c)
        self.pre_cross_attention_layer_norm = RMSNorm(c.dtype)
        self.encoder_decoder_attention = Attention(c)
        self.pre_mlp_layer_norm = RMSNorm(c.dtype)
        self.mlp = Mlp(c)
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Array | None,
        layer: Tree,
        memory: Any,
        bias: Any = None,
        memory_bias: Any = None,
        prefix_bias: Any = None,
        index: Any = None,
        deterministic: bool = True,
    ) -> tuple[Any, Any]:
        """x [B, L, D] -> [B, L, D] and the cache after it.

        ``memory`` is the rows' own [B, M, D] and the one that a task's rows share, if any
        ({"states" [T, M', D], "mask" [T, M']}). ``layer`` holds this layer's ``adapters`` and, when
        decoding by steps, its ``self`` cache (keys, values [B, S, H, K], written at ``index``) and
        what ``_cross`` made. Without x it only returns that: decoding computes it once.
        """
        a = layer["adapters"]
        if x is None:
            return None, self._cross(memory, a.get("cross"))
        drop = functools.partial(self.dropout, deterministic=deterministic)
        y = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.keys_values(y, a.get("self"))
        cache = None
        if index is not None:
            key, value = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), index, 1)
                for old, new in zip(layer["self"], (key, value), strict=True)
            )
        x += drop(
            self.self_attention(y, key, value, bias, a.get("self"), prefix_bias, deterministic)
        )
        y = self.pre_cross_attention_layer_norm(x)
        cross = a.get("cross")
        key, value, prefix = self._cross(memory, cross) if index is None else layer["cross"]
        seen = cross if prefix is None else {**(cross or {}), "prefix": prefix}
        attention = self.encoder_decoder_attention
        x += drop(attention(y, key, value, memory_bias, seen, None, deterministic))
        y = self.pre_mlp_layer_norm(x)
        beside = bottleneck_delta(x, y, a.get("mlp"))
        x += drop(self.mlp(y, a.get("mlp"), deterministic)) + beside
        return x, cache

    def _cross(self, memory: Any, adapters: Tree | None) -> tuple[Array, Array, Tree | None]:
        """Keys and values [B, M, H, K] of the rows' memory; the shared one's join the prefix."""
        own, shared = memory
        attention = self.encoder_decoder_attention
        key, value = attention.keys_values(own, adapters)
        prefix = (adapters or {}).get("prefix")
        if shared is not None:
            made = dict(
                zip(
                    ("key", "value"), attention.keys_values(shared["states"], adapters), strict=True
                )
            )
            prefix = join_prefixes(prefix, {**made, "mask": shared["mask"]})
        return key, value, prefix


def _scan(layer: Any, config: T5Config, length: int, broadcasts: int) -> Any:
    """Scan ``layer`` over the leading axis of its parameters and of its argument after x.

    ``broadcasts`` counts the arguments after that one; the last of them, ``deterministic``, is
    static.
    """
    policies = {"full": None, "minimal": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims}
    if config.remat != "none":
        layer = nn.remat(
            layer,
            policy=policies[config.remat],
            prevent_cse=False,
            static_argnums=(broadcasts + 2,),
        )
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, *(nn.broadcast,) * broadcasts),
        length=length,
        unroll=config.scan_unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


class TokenEmbedder(nn.Module):
    """Token embeddings, gathered (T5X multiplies by one-hot rows: a quarter of its step)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        shape = (c.vocab_size, c.emb_dim)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, ids: Array) -> Array:
        """[B, L] -> [B, L, D]."""
        return jnp.asarray(self.embedding)[ids].astype(self.config.dtype)


class Encoder(nn.Module):
    """The encoder stack over embeddings; also the hypermodels' reader."""

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x: Array,
        mask: Array,
        adapters: Adapters | None = None,
        deterministic: bool = True,
        collect: bool = False,
        positions: Array | None = None,
    ) -> Any:
        """x [B, L, D], mask [B, L, L], positions [B, L] of packed rows -> [B, L, D].

        With ``collect`` also each layer's keys and values [N, B, L, H, K] and its input
        [N, B, L, D].
        """
        c, length = self.config, x.shape[1]
        relpos = RelativeBias(c, bidirectional=True, name="relpos_bias")
        bias = relpos(length, length) + mask_bias(mask)
        tree = _stack_adapters(adapters, {"self": "enc_self", "mlp": "enc_mlp"})
        prefix_bias = _prefix_bias(relpos, adapters, "enc_self", length, positions=positions)
        x = _dropout(c, -2, deterministic)(x).astype(c.dtype)
        layers = _scan(EncoderLayer, c, c.num_encoder_layers, 3)(c, collect, name="layers")
        x, collected = layers(x, tree, bias, prefix_bias, deterministic)
        x = RMSNorm(c.dtype, name="encoder_norm")(x)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        return (x, collected) if collect else x


@struct.dataclass
class DecodeState:
    """What step-by-step decoding carries. S is the longest output.

    With ``begun`` rows may begin at different steps: the cache is then a ring, in which step i
    writes place i modulo S for all rows alike, and a row sees the places since it began. T5 knows
    only distances, so a row need not know where in the ring it is.
    """

    self_kv: Any  # (keys, values) [N, B, S, H, K]
    cross: Any  # (keys, values [N, B, M, H, K], prefix [N, T, P, H, K] or None), computed once
    memory_mask: Array  # [B, M]
    index: Array  # int32 scalar: the next position to write
    begun: Array | None = None  # int32 [B]: the step that was each row's first; None: 0 for all


class Decoder(nn.Module):
    """The decoder stack over embeddings, up to and including the final norm."""

    config: T5Config
    causal: bool = True
    logits: bool = False

    def setup(self) -> None:
        c = self.config
        self.relpos_bias = RelativeBias(c, bidirectional=False)
        self.layers = _scan(DecoderLayer, c, c.num_decoder_layers, 6)(c)
        self.decoder_norm = RMSNorm(c.dtype)
        if self.logits:
            init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
            self.logits_dense = Projection(c.vocab_size, ("embed", "vocab"), init, "float32")
        self.dropout = nn.Dropout(c.dropout_rate, broadcast_dims=(-2,))

    def __call__(
        self,
        x: Array,
        memory: Array,
        mask: Array,
        memory_mask: Array,
        adapters: Adapters | None = None,
        deterministic: bool = True,
        positions: Array | None = None,
    ) -> Array:
        """x [B, L, D], memory [B, M, D], mask [B, L, L], memory_mask [B, L, M] -> [B, L, D].

        ``positions`` [B, L] are those of packed rows, which start anew with each segment.
        """
        length = x.shape[1]
        if self.causal:
            mask = mask & np.tri(length, dtype=bool)
        bias = self.relpos_bias(length, length) + mask_bias(mask)
        prefix_bias = _prefix_bias(
            self.relpos_bias, adapters, "dec_self", length, positions=positions
        )
        x = self.dropout(x, deterministic=deterministic).astype(self.config.dtype)
        layer = {"adapters": _stack_adapters(adapters, _DECODER_SITES)}
        x, _ = self.layers(
            x,
            layer,
            (memory, _shared_memory(adapters)),
            bias,
            mask_bias(memory_mask),
            prefix_bias,
            None,
            deterministic,
        )
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

    def start(
        self, memory: Array, memory_mask: Array, adapters: Adapters | None, steps: int
    ) -> DecodeState:
        """State before the first step; memory [B, M, D], memory_mask [B, M]."""
        c = self.config
        layer = {"adapters": _stack_adapters(adapters, _DECODER_SITES)}
        both = (memory, _shared_memory(adapters))
        _, cross = self.layers(None, layer, both, None, None, None, None, True)
        shape = (c.num_decoder_layers, memory.shape[0], steps, c.num_heads, c.head_dim)
        empty = jnp.zeros(shape, c.dtype)
        return DecodeState((empty, empty), cross, memory_mask, jnp.zeros((), jnp.int32))

    def step(
        self, x: Array, state: DecodeState, adapters: Adapters | None
    ) -> tuple[Array, DecodeState]:
        """One position, x [B, 1, D] -> [B, 1, D] and the state after it."""
        steps, index, own = state.self_kv[0].shape[2], state.index, state.index
        if state.begun is None:
            seen = jnp.arange(steps)[None, None, :] <= index  # [1, 1, S]
            bias = self.relpos_bias(1, steps, index) + mask_bias(seen)
        else:
            own, index = index - state.begun, index % steps
            distance = (index - jnp.arange(steps)) % steps  # [S]
            seen = distance <= own[:, None, None]  # [B, 1, S]
            bias = self.relpos_bias.at(distance)[:, None] + mask_bias(seen)
        prefix_bias = _prefix_bias(self.relpos_bias, adapters, "dec_self", 1, own)
        layer = {
            "adapters": _stack_adapters(adapters, _DECODER_SITES),
            "self": state.self_kv,
            "cross": state.cross,
        }
        memory_bias = mask_bias(state.memory_mask[:, None, :])
        x, cache = self.layers(
            x.astype(self.config.dtype),
            layer,
            None,
            bias,
            memory_bias,
            prefix_bias,
            index,
            True,
        )
        return self.decoder_norm(x), dataclasses.replace(
            state, self_kv=cache, index=state.index + 1
        )


_DECODER_SITES = {"self": "dec_self", "cross": "dec_cross", "mlp": "dec_mlp"}


def _stack_adapters(adapters: Adapters | None, sites: dict[str, str]) -> Tree:
    """The leaves that a stack scans over, under its own names; LoRA's scale already inside b."""
    tree: Tree = {}
    for name, site in sites.items():
        if adapters is None or site not in adapters.tree:
            continue
        tree[name] = {}
        for projection, leaf in adapters.tree[site].items():
            lora, bottleneck = adapters.spec.lora, adapters.spec.bottleneck
            if projection == "bottleneck" and bottleneck is not None:
                leaf = Bottleneck(leaf, bottleneck.activation, bottleneck.input)
            elif projection != "prefix" and lora is not None:
                scale = lora.scale_of(f"{site}.{projection}")
                leaf = {k: v if k == "a" else v * scale for k, v in leaf.items()}
            tree[name][projection] = leaf
    return tree


def _shared_memory(adapters: Adapters | None) -> Tree | None:
    """``states`` [T, M, D] and ``mask`` [T, M] that all rows of a task cross-attend, if any."""
    if adapters is None or MEMORY not in adapters.tree:
        return None
    return {k: v[0] for k, v in adapters.tree[MEMORY].items()}


def _prefix_bias(
    relpos: RelativeBias,
    adapters: Adapters | None,
    site: str,
    queries: int,
    offset: int | Array = 0,
    positions: Array | None = None,
) -> Array | None:
    """[H, queries, P] for spec.position_bias 'hf': slot j stands P - j places before position 0.

    [B, H, queries, P] by ``positions`` [B, queries], where these are given: a row's own biases are
    by distance and so the same in any segment, but the prefix stands before each of them.
    """
    spec = adapters.spec.prefix if adapters is not None else None
    if spec is None or site not in spec.sites or spec.position_bias == "zero":
        return None
    assert adapters is not None
    slots = adapters.tree[site]["prefix"]["key"].shape[2]
    bias = relpos(queries, slots, slots + offset)
    return bias if positions is None else jnp.moveaxis(bias[:, positions], 0, 1)


class T5(nn.Module):
    """Encoder-decoder with T5X's parameters. See the module docstring for shapes."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.token_embedder = TokenEmbedder(c)
        self.encoder = Encoder(c)
        self.decoder = Decoder(c, logits=not c.logits_via_embedding)

    def __call__(
        self,
        inputs: Array,
        targets: Array,
        adapters: Adapters | None = None,
        decoder_inputs: Array | None = None,
        input_segments: Array | None = None,
        target_segments: Array | None = None,
        input_positions: Array | None = None,
        target_positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """inputs [B, L], targets [B, Lt] -> float32 logits [B, Lt, V] (teacher forcing).

        Segments and positions are those of packed rows (see ``packing``), of the same shapes.
        """
        encoded = self.encode(inputs, adapters, input_segments, input_positions, deterministic)
        x = self.teach(
            encoded,
            inputs,
            targets,
            adapters,
            decoder_inputs,
            input_segments,
            target_segments,
            target_positions,
            deterministic,
        )
        return self._logits(x)

    def teach(
        self,
        encoded: Array,
        inputs: Array,
        targets: Array,
        adapters: Adapters | None = None,
        decoder_inputs: Array | None = None,
        input_segments: Array | None = None,
        target_segments: Array | None = None,
        target_positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """What the decoder makes of targets [B, Lt], of which the logits are: [B, Lt, D].

        With segments of the targets alone, all of them see all of a row's inputs.
        """
        if decoder_inputs is None:
            decoder_inputs = shift_right(targets, target_segments)
        return self.decoder(
            self.token_embedder(decoder_inputs),
            encoded,
            pair_mask(targets, targets, target_segments, target_segments),
            pair_mask(targets, inputs, target_segments, input_segments),
            adapters,
            deterministic,
            target_positions,
        )

    def log_probs(self, x: Array, targets: Array) -> Array:
        """float32 log-probability of each of targets [B, L], of `teach`'s x [B, L, D]."""
        logits = self._logits(x)
        at_target = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return at_target - jax.nn.logsumexp(logits, -1)

    def encode(
        self,
        inputs: Array,
        adapters: Adapters | None = None,
        segments: Array | None = None,
        positions: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """inputs [B, L] -> [B, L, D]; nothing for L = 0, where a hypermodel has read the inputs."""
        if not inputs.shape[1]:
            return jnp.zeros((*inputs.shape, self.config.emb_dim), self.config.dtype)
        mask = pair_mask(inputs, inputs, segments, segments)
        return self.encoder(
            self.token_embedder(inputs), mask, adapters, deterministic, positions=positions
        )

    def start(
        self, encoded: Array, inputs: Array, adapters: Adapters | None, steps: int
    ) -> DecodeState:
        """Prepare to decode ``steps`` positions of rows that were encoded from ``inputs``."""
        return self.decoder.start(encoded, inputs > 0, adapters, steps)

    def step(
        self, tokens: Array, state: DecodeState, adapters: Adapters | None = None
    ) -> tuple[Array, DecodeState]:
        """Previous tokens [B] -> float32 logits of the next [B, V], and the state after it."""
        x, state = self.decoder.step(self.token_embedder(tokens[:, None]), state, adapters)
        return self._logits(x)[:, 0], state

    def _logits(self, x: Array) -> Array:
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(x)
        table = self.token_embedder.embedding.astype(jnp.float32)
        return x.astype(jnp.float32) @ table.T / np.sqrt(self.config.emb_dim)


def init_params(config: T5Config, rng: Array) -> Tree:
    """Random parameters, initialised as T5X does."""
    ids = jnp.ones((1, 2), jnp.int32)
    return nn.unbox(T5(config).init(rng, ids, ids)["params"])


def logical_axes(config: T5Config) -> Tree:
    """The parameter tree with T5X's logical axis names (``layers`` first where stacked)."""
    ids = jnp.ones((1, 2), jnp.int32)
    boxed = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids)["params"]
    return jax.tree.map(lambda x: x.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
