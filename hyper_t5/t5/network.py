"""T5 1.0 and 1.1 in Flax Linen; every block takes its adapters as an argument.

Parameter names, shapes, logical axes and numbers are those of T5X's ``examples/t5/network.py``,
except that the layers of a stack are stacked on a leading axis and scanned:
``encoder/layers/attention/query/kernel [N, D, H*K]`` is T5X's ``encoder/layers_i/...`` for all i.
With ``adapters=None`` the result equals T5X's.

Shapes: B rows, L positions, M memory positions, D model width, H heads, K head width, V vocabulary,
N layers, T tasks (B = T*G, the G rows of a task are adjacent), P prefix slots.
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

from hyper_t5.adapters import Adapters
from hyper_t5.t5.attention import (
    Attention,
    Projection,
    RelativeBias,
    join_prefixes,
    mask_bias,
    pair_mask,
    prefix_position_bias,
    shared_memory,
)
from hyper_t5.t5.config import T5Config

Array = jax.Array
Tree = dict[str, Any]


@struct.dataclass
class Bottleneck:
    """The bottleneck adapters of one layer, leaves [T, ...], with their activation and input."""

    leaves: Tree
    activation: str = struct.field(pytree_node=False)
    input: str = struct.field(pytree_node=False)


def bottleneck_delta(x: Array, normed: Array, adapters: Tree | None) -> Array | float:
    """Return the output of the bottleneck adapter beside an MLP, [B, L, D]; 0 without one.

    Args:
      x: the residual stream before the MLP, [B, L, D].
      normed: the input of the MLP, [B, L, D].
      adapters: of the MLP's site.
    """
    bottleneck: Bottleneck | None = (adapters or {}).get("bottleneck")
    if bottleneck is None:
        return 0.0
    x = normed if bottleneck.input == "normed" else x
    w = {k: v.astype(x.dtype) for k, v in bottleneck.leaves.items()}
    per_task = x.reshape(w["down"].shape[0], -1, x.shape[-1])  # [T, G*L, D]
    hidden = jnp.einsum("tld,tda->tla", per_task, w["down"]) + w["down_bias"][:, None]
    hidden = getattr(nn, bottleneck.activation)(hidden)
    y = jnp.einsum("tla,tad->tld", hidden, w["up"]) + w["up_bias"][:, None]
    return y.reshape(x.shape)


def shift_right(targets: Array, segments: Array | None = None) -> Array:
    """Return decoder input ids: targets [B, L] shifted by one, 0 at the start of each segment."""
    shifted = jnp.pad(targets, ((0, 0), (1, 0)))[:, :-1]
    if segments is None:
        return shifted
    return jnp.where(segments == jnp.pad(segments, ((0, 0), (1, 0)))[:, :-1], shifted, 0)


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


def _dropout(config: T5Config, axis: int, deterministic: bool) -> Any:
    return nn.Dropout(config.dropout_rate, broadcast_dims=(axis,), deterministic=deterministic)


class Mlp(nn.Module):
    """Feed-forward block: the product of ``act_i(x wi_i)``, then ``wo``."""

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
    """Pre-norm self-attention and MLP with residuals."""

    config: T5Config
    collect: bool  # also return the layer's input, keys and values

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
    """Pre-norm self-attention, cross-attention and MLP with residuals."""

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
        """Return x [B, L, D] after the layer, and the cache after it.

        Args:
          x: [B, L, D]; None returns only the cross-attention keys and values, which decoding
            computes once.
          layer: the layer's ``adapters`` and, for step-by-step decoding, its ``self`` cache (keys
            and values [B, S, H, K], written at ``index``) and ``cross``, the output for x = None.
          memory: the rows' own memory [B, M, D], and the memory that a task's rows share, if any
            ({"states" [T, M', D], "mask" [T, M']}).
          bias: of self-attention.
          memory_bias: of cross-attention.
          prefix_bias: of the self-attention prefix.
          index: the cache position to write, None for teacher forcing.
          deterministic: without dropout.
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
        """Return keys and values [B, M, H, K] of the memory; shared memory joins the prefix."""
        own, shared = memory
        attention = self.encoder_decoder_attention
        key, value = attention.keys_values(own, adapters)
        prefix = (adapters or {}).get("prefix")
        if shared is not None:
            shared_key, shared_value = attention.keys_values(shared["states"], adapters)
            memory_slots = {"key": shared_key, "value": shared_value, "mask": shared["mask"]}
            prefix = join_prefixes(prefix, memory_slots)
        return key, value, prefix


def _scan(layer: Any, config: T5Config, length: int, broadcasts: int) -> Any:
    """Scan ``layer`` over the leading axis of its parameters and of its argument after x.

    Args:
      layer: a module class.
      config: remat policy and unrolling.
      length: the number of layers.
      broadcasts: the number of arguments after the scanned one; the last one, ``deterministic``, is
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
    """Token embeddings by gather (T5X multiplies by one-hot rows, a quarter of its step time)."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
        shape = (c.vocab_size, c.emb_dim)
        self.embedding = self.param("embedding", init, shape, jnp.float32)

    def __call__(self, ids: Array) -> Array:
        """Embed [B, L] to [B, L, D]."""
        return jnp.asarray(self.embedding)[ids].astype(self.config.dtype)


class Encoder(nn.Module):
    """The encoder stack over embeddings, also used by the hypermodels' readers."""

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
        """Encode x [B, L, D].

        Args:
          x: embeddings [B, L, D].
          mask: visible keys [B, L, L].
          adapters: of the tasks of the rows.
          deterministic: without dropout.
          collect: also return each layer's keys and values [N, B, L, H, K] and input [N, B, L, D].
          positions: [B, L] of packed rows.

        Returns:
          [B, L, D], with ``collect`` in a tuple.
        """
        c, length = self.config, x.shape[1]
        relpos = RelativeBias(c, bidirectional=True, name="relpos_bias")
        bias = relpos(length, length) + mask_bias(mask)
        tree = stack_adapters(adapters, {"self": "enc_self", "mlp": "enc_mlp"})
        prefix_bias = prefix_position_bias(
            relpos, adapters, "enc_self", length, positions=positions
        )
        x = _dropout(c, -2, deterministic)(x).astype(c.dtype)
        layers = _scan(EncoderLayer, c, c.num_encoder_layers, 3)(c, collect, name="layers")
        x, collected = layers(x, tree, bias, prefix_bias, deterministic)
        x = RMSNorm(c.dtype, name="encoder_norm")(x)
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        return (x, collected) if collect else x


@struct.dataclass
class DecoderCache:
    """The state of step-by-step decoding; S is the longest output.

    With ``first_step`` rows may start at different steps: the cache is then a ring, where step i
    writes position i modulo S of all rows, and a row sees the positions since its first step. T5's
    biases depend on distance only, so the ring needs no positions.
    """

    self_kv: Any  # (keys, values) [N, B, S, H, K]
    cross: Any  # (keys, values [N, B, M, H, K], prefix [N, T, P, H, K] or None), computed once
    memory_mask: Array  # [B, M]
    index: Array  # int32 scalar: the next position to write
    first_step: Array | None = None  # int32 [B]: of each row; None: 0 for all


class Decoder(nn.Module):
    """The decoder stack over embeddings, including the final norm."""

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
        """Decode with teacher forcing.

        Args:
          x: embeddings of the decoder inputs [B, L, D].
          memory: encoder outputs [B, M, D].
          mask: visible targets [B, L, L], without the causal mask.
          memory_mask: visible memory [B, L, M].
          adapters: of the tasks of the rows.
          deterministic: without dropout.
          positions: [B, L] of packed rows, which start at 0 in each segment.

        Returns:
          [B, L, D].
        """
        length = x.shape[1]
        if self.causal:
            mask = mask & np.tri(length, dtype=bool)
        bias = self.relpos_bias(length, length) + mask_bias(mask)
        prefix_bias = prefix_position_bias(
            self.relpos_bias, adapters, "dec_self", length, positions=positions
        )
        x = self.dropout(x, deterministic=deterministic).astype(self.config.dtype)
        layer = {"adapters": stack_adapters(adapters, _DECODER_SITES)}
        x, _ = self.layers(
            x,
            layer,
            (memory, shared_memory(adapters)),
            bias,
            mask_bias(memory_mask),
            prefix_bias,
            None,
            deterministic,
        )
        return self.dropout(self.decoder_norm(x), deterministic=deterministic)

    def init_cache(
        self, memory: Array, memory_mask: Array, adapters: Adapters | None, steps: int
    ) -> DecoderCache:
        """Return the state before the first step; memory [B, M, D], memory_mask [B, M]."""
        c = self.config
        layer = {"adapters": stack_adapters(adapters, _DECODER_SITES)}
        both = (memory, shared_memory(adapters))
        _, cross = self.layers(None, layer, both, None, None, None, None, True)
        shape = (c.num_decoder_layers, memory.shape[0], steps, c.num_heads, c.head_dim)
        empty = jnp.zeros(shape, c.dtype)
        return DecoderCache((empty, empty), cross, memory_mask, jnp.zeros((), jnp.int32))

    def step(
        self, x: Array, state: DecoderCache, adapters: Adapters | None
    ) -> tuple[Array, DecoderCache]:
        """Decode one position, x [B, 1, D]; return [B, 1, D] and the state after it."""
        steps, index, own = state.self_kv[0].shape[2], state.index, state.index
        if state.first_step is None:
            seen = jnp.arange(steps)[None, None, :] <= index  # [1, 1, S]
            bias = self.relpos_bias(1, steps, index) + mask_bias(seen)
        else:
            own, index = index - state.first_step, index % steps
            distance = (index - jnp.arange(steps)) % steps  # [S]
            seen = distance <= own[:, None, None]  # [B, 1, S]
            bias = self.relpos_bias.at(distance)[:, None] + mask_bias(seen)
        prefix_bias = prefix_position_bias(self.relpos_bias, adapters, "dec_self", 1, own)
        layer = {
            "adapters": stack_adapters(adapters, _DECODER_SITES),
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


def stack_adapters(adapters: Adapters | None, sites: dict[str, str]) -> Tree:
    """Return the adapter leaves that a stack scans over, by module; b includes LoRA's scale."""
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


class T5(nn.Module):
    """The encoder-decoder with T5X's parameters; see the module docstring for shapes."""

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
        """Return teacher-forced float32 logits [B, Lt, V] of inputs [B, L] and targets [B, Lt].

        Segments and positions are those of packed rows (`data.packing`), of the same shapes.
        """
        encoded = self.encode(inputs, adapters, input_segments, input_positions, deterministic)
        x = self.decoder_states(
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

    def decoder_states(
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
        """Return the teacher-forced decoder states [B, Lt, D], before the output projection.

        With segments of the targets only, every target segment sees all of a row's inputs.
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
        """Return float32 log-probabilities of targets [B, L] from decoder states x [B, L, D]."""
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
        """Encode inputs [B, L] to [B, L, D]; L = 0 where a hypermodel has encoded the inputs."""
        if not inputs.shape[1]:
            return jnp.zeros((*inputs.shape, self.config.emb_dim), self.config.dtype)
        mask = pair_mask(inputs, inputs, segments, segments)
        return self.encoder(
            self.token_embedder(inputs), mask, adapters, deterministic, positions=positions
        )

    def init_cache(
        self, encoded: Array, inputs: Array, adapters: Adapters | None, steps: int
    ) -> DecoderCache:
        """Return the state to decode ``steps`` positions of rows encoded from ``inputs``."""
        return self.decoder.init_cache(encoded, inputs > 0, adapters, steps)

    def step(
        self, tokens: Array, state: DecoderCache, adapters: Adapters | None = None
    ) -> tuple[Array, DecoderCache]:
        """Return float32 logits [B, V] of the next tokens, and the state after ``tokens`` [B]."""
        x, state = self.decoder.step(self.token_embedder(tokens[:, None]), state, adapters)
        return self._logits(x)[:, 0], state

    def _logits(self, x: Array) -> Array:
        if not self.config.logits_via_embedding:
            return self.decoder.logits_dense(x)
        table = self.token_embedder.embedding.astype(jnp.float32)
        return x.astype(jnp.float32) @ table.T / np.sqrt(self.config.emb_dim)


def init_params(config: T5Config, rng: Array) -> Tree:
    """Return random parameters, initialized as in T5X."""
    ids = jnp.ones((1, 2), jnp.int32)
    return nn.unbox(T5(config).init(rng, ids, ids)["params"])


def logical_axes(config: T5Config) -> Tree:
    """Return the parameter tree with T5X's logical axis names (``layers`` first where stacked)."""
    ids = jnp.ones((1, 2), jnp.int32)
    boxed = jax.eval_shape(T5(config).init, jax.random.key(0), ids, ids)["params"]
    return jax.tree.map(lambda x: x.names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
