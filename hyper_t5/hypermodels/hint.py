"""HINT (Ivison et al. 2023): the backbone's own encoder reads the task; all of it is trained.

One cross-attention from learned component queries to the encoded instruction makes a vector for
each row of each generated matrix; a small MLP a tensor, shared over the network, turns it into that
row. Emitted are bottleneck adapters at every MLP, prefixes at every attention, and the encoded
instruction as memory of the decoder ("instruction fusion").

Names and counts of parameters are those of allenai/hyper-task-descriptions, whose golden numbers a
test holds. Two things that its code does otherwise are taken as slips: it encodes the instruction
without a padding mask, and reshapes the down matrices where they should be transposed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import specs
from hyper_t5.t5 import T5, Attention, Projection, T5Config, mask_bias

Array = jax.Array


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """``hint``."""
    bottleneck, prefix = specs.bottleneck(config), specs.prefix(config)
    if len(set(bottleneck.sizes)) > 1:
        raise UserError("adapter.bottleneck_sizes: system hint has one size for all places")
    return Hint(sizes, ad.AdapterSpec(prefix=prefix, bottleneck=bottleneck))


class Generator(nn.Module):
    """Component vectors [..., D] -> rows [..., features] of one kind of tensor, over sqrt(D)."""

    config: T5Config
    features: int

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c, width = self.config, x.shape[-1]
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        x = nn.gelu(Projection(width, ("embed", "mlp"), init, c.dtype, name="wi")(x))
        x = nn.Dropout(c.dropout_rate, deterministic=deterministic)(x)
        x = Projection(self.features, ("mlp", "joined_kv"), init, c.dtype, name="wo")(x)
        return x / width**0.5


class Hint(nn.Module):
    """Conditioning ids [T, L] -> bottleneck adapters, prefixes, and memory of L positions.

    ``spec`` says sites and sizes; its memory follows from L.
    """

    config: T5Config
    spec: ad.AdapterSpec

    @nn.compact
    def __call__(self, ids: Array, tasks: Array, deterministic: bool = True) -> ad.Adapters:
        c, spec = self.config, self.spec
        bottleneck, prefix = spec.bottleneck, spec.prefix
        assert bottleneck
        assert prefix
        size, joined, mask = bottleneck.sizes[0], c.num_heads * c.head_dim, ids > 0
        encoded = T5(c, name="backbone").encode(ids, deterministic=deterministic)
        encoded *= mask[..., None]

        # A site has one query for each row that is generated for it, kind after kind.
        kinds = {  # rows, and the width of each
            "adapter_down": (size, c.emb_dim),
            "adapter_up": (size, c.emb_dim),
            "adapter_bias_down": (1, size),
            "adapter_bias_up": (1, c.emb_dim),
            "prefix_key": (prefix.length, joined),
            "prefix_value": (prefix.length, joined),
        }
        rows = sum(count for count, _ in kinds.values())
        sites = c.num_encoder_layers + 2 * c.num_decoder_layers
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)
        init = nn.with_logical_partitioning(init, ("layers", "embed"))
        table = self.param("component_embedding", init, (sites * rows, c.emb_dim), jnp.float32)
        table = table.reshape(sites, rows, c.emb_dim)
        encoder, decoder = table[: c.num_encoder_layers], table[c.num_encoder_layers :]
        queries = {"enc_self": encoder, "enc_mlp": encoder}  # of a layer's sites: [N, rows, D]
        queries |= {"dec_self": decoder[::2], "dec_mlp": decoder[::2], "dec_cross": decoder[1::2]}

        attention = Attention(c, name="hyperattn")
        generators = {k: Generator(c, width, name=k) for k, (_, width) in kinds.items()}
        key, value = attention.keys_values(encoded)
        bias = mask_bias(mask[:, None])

        def emit(kind: str, site: str) -> Array:
            """Tensor [N, T, rows, width] of one kind at all layers of a site."""
            names, (count, width) = list(kinds), kinds[kind]
            first = sum(kinds[name][0] for name in names[: names.index(kind)])
            asked = queries[site][:, first : first + count].astype(c.dtype)
            x = asked.reshape(1, -1, c.emb_dim)
            x = attention(x, key, value, bias, deterministic=deterministic)
            x = generators[kind](x, deterministic)
            return jnp.moveaxis(x.reshape(len(ids), len(asked), count, width), 1, 0)

        tree: dict = {ad.MEMORY: {"states": encoded[None], "mask": mask[None]}}
        for site in bottleneck.sites:
            tree[site] = {
                "bottleneck": {
                    "down": emit("adapter_down", site).swapaxes(-1, -2),
                    "up": emit("adapter_up", site),
                    "down_bias": emit("adapter_bias_down", site)[:, :, 0],
                    "up_bias": emit("adapter_bias_up", site)[:, :, 0],
                }
            }
        for site in prefix.sites:
            made = {k: emit(f"prefix_{k}", site) for k in ("key", "value")}
            heads = (c.num_heads, c.head_dim)
            tree[site] = {"prefix": {k: x.reshape(*x.shape[:-1], *heads) for k, x in made.items()}}
        return ad.Adapters(tree, ad.AdapterSpec(None, prefix, bottleneck, ids.shape[1]))
