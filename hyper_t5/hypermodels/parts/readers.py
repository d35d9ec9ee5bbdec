"""Readers: conditioning ids -> features, on T5 modules so that its weights initialize them.

Shapes: T tasks, L conditioning tokens, P gist or prefix tokens, N layers, D width, H heads, K head
width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from hyper_t5.t5 import Decoder, Encoder, T5Config
from hyper_t5.t5.attention import pair_mask
from hyper_t5.t5.network import TokenEmbedder

Array = jax.Array


def right_align(ids: Array) -> Array:
    """Move the padding of [T, L] rows from the end to the front.

    Whatever follows the text (gist tokens, the backbone's input) is then at the same distance from
    it for any padding.
    """
    length = ids.shape[-1]
    shift = length - jnp.sum(ids > 0, -1, keepdims=True)
    return jnp.take_along_axis(ids, (jnp.arange(length) - shift) % length, -1)


@struct.dataclass
class LayerFeatures:
    """The features of each layer of a reader's encoder.

    ``key``/``value`` [N, T, P, H, K] of self-attention, ``states`` [N, T, P, D] (each layer's
    input), ``output`` [T, P, D] (after the final norm), ``mask`` [T, P], False at padding.
    """

    key: Array
    value: Array
    states: Array
    output: Array
    mask: Array


def read_layers(
    embedder: TokenEmbedder,
    encoder: Encoder,
    ids: Array,
    gists: Array | None,
    deterministic: bool,
) -> LayerFeatures:
    """Encode ids [T, L], followed by gist embeddings [P, D] if any, and return layer features.

    The features are those of the gists, or without gists of all L tokens (P = L).
    """
    ids = right_align(ids)
    x, mask = embedder(ids), ids > 0
    if gists is not None:
        gists = gists.astype(x.dtype)
        x = jnp.concatenate([x, jnp.broadcast_to(gists, (x.shape[0], *gists.shape))], 1)
        mask = jnp.pad(mask, ((0, 0), (0, len(gists))), constant_values=True)
    output, (key, value, states) = encoder(x, pair_mask(mask, mask), None, deterministic, True)
    start = ids.shape[1] if gists is not None else 0
    return LayerFeatures(
        key[:, :, start:],
        value[:, :, start:],
        states[:, :, start:],
        output[:, start:],
        mask[:, start:],
    )


class LayerwiseReader(nn.Module):
    """A separate T5 encoder over the conditioning that returns layer features (ours).

    With ``gist_tokens`` P > 0, P learned embeddings follow the text and only their features are
    returned: the text compressed to P positions (Mu et al. 2023). With 0 those of the text.
    """

    config: T5Config
    gist_tokens: int = 0

    @nn.compact
    def __call__(self, ids: Array, deterministic: bool = True) -> LayerFeatures:
        """Return the features of P gist tokens, or of all L tokens of ids [T, L] (P = L)."""
        c, gists = self.config, None
        if self.gist_tokens:
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("prefix", "embed"))
            gists = self.param("gists", init, (self.gist_tokens, c.emb_dim), jnp.float32)
        embedder, encoder = TokenEmbedder(c, name="token_embedder"), Encoder(c, name="encoder")
        return read_layers(embedder, encoder, ids, gists, deterministic)


def mean_pool(states: Array, mask: Array) -> Array:
    """Return the mean [B, D] of states [B, L, D] where mask [B, L] is True, in float32."""
    weights = mask.astype(jnp.float32)[..., None]
    mean = jnp.sum(states * weights, 1) / jnp.maximum(jnp.sum(weights, 1), 1)
    return mean.astype(states.dtype)


class QueryReader(nn.Module):
    """The paper's reader: a T5 encoder over the conditioning, a T5 decoder over learned queries.

    The decoder has no causal mask and cross-attends to the encoder (HyperTuning, section 3).
    """

    config: T5Config
    queries: int

    @nn.compact
    def __call__(self, ids: Array, deterministic: bool = True) -> Array:
        """Map ids [T, L] to [T, queries, D]."""
        c, real = self.config, ids > 0
        embedded = TokenEmbedder(c, name="token_embedder")(ids)
        memory = Encoder(c, name="encoder")(embedded, pair_mask(real, real), None, deterministic)
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("prefix", "embed"))
        learned = self.param("queries", init, (self.queries, c.emb_dim), jnp.float32)
        x = jnp.broadcast_to(learned.astype(c.dtype), (ids.shape[0], *learned.shape))
        every = jnp.ones((ids.shape[0], self.queries), bool)
        return Decoder(c, causal=False, name="decoder")(
            x, memory, pair_mask(every, every), pair_mask(every, real), None, deterministic
        )


class CrossKeysValues(nn.Module):
    """A copy of the decoder's cross-attention key and value projections, all layers at once.

    Its names match the backbone's ``decoder/layers/encoder_decoder_attention``, which initializes
    it.
    """

    config: T5Config

    @nn.compact
    def __call__(self, memory: Array) -> tuple[Array, Array]:
        """Project memory [T, P, D] to keys and values [N, T, P, H, K]."""
        c = self.config
        projections = []
        for name in ("key", "value"):
            init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=(0,))
            shape = (c.num_decoder_layers, c.emb_dim, c.num_heads * c.head_dim)
            axes = ("layers", "embed", "joined_kv")
            kernel = _Kernel(shape, axes, init, name=name)().astype(c.dtype)
            y = jnp.einsum("tpd,ndf->ntpf", memory.astype(c.dtype), kernel)
            projections.append(y.reshape(*y.shape[:-1], c.num_heads, c.head_dim))
        return projections[0], projections[1]


class _Kernel(nn.Module):
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    kernel_init: Any

    @nn.compact
    def __call__(self) -> Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        return self.param("kernel", init, self.shape, jnp.float32)
