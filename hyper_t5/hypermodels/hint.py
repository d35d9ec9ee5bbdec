"""HINT (Ivison et al. 2023): the backbone's own encoder reads the task; everything is trained.

One cross-attention from learned component queries to the encoded instruction computes a vector for
each row of each generated matrix; a small MLP per tensor kind, shared over the network, maps it to
that row. HINT emits bottleneck adapters at every MLP, prefixes at every attention, and the encoded
instruction as decoder memory ("instruction fusion").

Names and counts of parameters are those of allenai/hyper-task-descriptions; a test holds its golden
numbers. Two details of its code are treated as errors: it encodes the instruction without a padding
mask, and reshapes the down matrices where they should be transposed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.parts import specs
from hyper_t5.t5 import T5, T5Config
from hyper_t5.t5.attention import Attention, Projection, mask_bias
from hyper_t5.utils.errors import UserError

Array = jax.Array


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build the ``hint`` system."""
    bottleneck, prefix = specs.bottleneck(config), specs.prefix(config)
    if len(set(bottleneck.sizes)) > 1:
        raise UserError("adapter.bottleneck_sizes: system hint has one size for all sites; set one")
    return Hint(sizes, ad.AdapterSpec(prefix=prefix, bottleneck=bottleneck))


class Generator(nn.Module):
    """Component vectors [..., D] -> rows [..., features] of one tensor kind, divided by sqrt(D)."""

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

    ``spec`` has the sites and sizes; the memory length is L.
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

        # A site has one query per generated row, kind after kind.
        kinds = {  # rows, and their width
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
            """Generate one kind of tensor [N, T, rows, width] for all layers of a site."""
            names, (count, width) = list(kinds), kinds[kind]
            first = sum(kinds[name][0] for name in names[: names.index(kind)])
            site_queries = queries[site][:, first : first + count].astype(c.dtype)
            x = site_queries.reshape(1, -1, c.emb_dim)
            x = attention(x, key, value, bias, deterministic=deterministic)
            x = generators[kind](x, deterministic)
            return jnp.moveaxis(x.reshape(len(ids), len(site_queries), count, width), 1, 0)

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
            emitted = {k: emit(f"prefix_{k}", site) for k in ("key", "value")}
            heads = (c.num_heads, c.head_dim)
            tree[site] = {
                "prefix": {k: x.reshape(*x.shape[:-1], *heads) for k, x in emitted.items()}
            }
        return ad.Adapters(tree, ad.AdapterSpec(None, prefix, bottleneck, ids.shape[1]))
