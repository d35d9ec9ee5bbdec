"""Text-to-LoRA style (Charakorn et al. 2025): one vector of the task's text -> LoRA.

A small MLP combines the vector with an embedding of each layer and of each module; a linear head
per module maps the result to a and b. The heads' weights start at zero and their biases as ordinary
LoRA ("bias-hyperinit"): before training it is one shared LoRA without effect. The published model
has a separate text embedder; here it is the mean of the frozen backbone's encoder states.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.parts import specs
from hyper_t5.hypermodels.parts.heads import dense, layer_norm
from hyper_t5.hypermodels.parts.readers import mean_pool
from hyper_t5.t5 import T5, T5Config

Array = jax.Array
# Widths of Text-to-LoRA: text vector, layer and module embeddings, MLPs, and the heads' input.
TEXT, PLACE, MIXER, WIDE = 64, 32, 512, 512


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build the ``text_to_lora`` system."""
    return TextToLora(sizes, ad.AdapterSpec(lora=specs.lora(config)))


class TextToLora(nn.Module):
    """Conditioning ids [T, L] -> LoRA of T tasks."""

    config: T5Config
    spec: ad.AdapterSpec

    @nn.compact
    def __call__(self, ids: Array, tasks: Array, deterministic: bool = True) -> ad.Adapters:
        c, lora = self.config, self.spec.lora
        assert lora
        encoded = T5(c, name="backbone").encode(ids, deterministic=deterministic)
        pooled = mean_pool(encoded, ids > 0)
        text = layer_norm(c, "norm")(_dense(TEXT, c, "text")(pooled))
        mixer = [_dense(MIXER, c, "mixer_in"), _dense(2 * TEXT, c, "mixer_out")]
        block = [_dense(MIXER, c, "block_in"), _dense(2 * TEXT, c, "block_out")]
        last = _dense(WIDE, c, "last")
        layers = c.num_encoder_layers + c.num_decoder_layers
        layer = self._embedding("layer_embedding", layers)
        module = self._embedding("module_embedding", len(lora.targets))

        tree: dict[str, Any] = {}
        for index, target in enumerate(lora.targets):
            site, _, projection = target.partition(".")
            n, (fan_in, fan_out) = ad.num_layers(site, c), ad.projection_shape(target, c)
            own = layer[:n] if site.startswith("enc") else layer[-n:]
            module_and_layer = jnp.concatenate(
                [own, jnp.broadcast_to(module[index], own.shape)], -1
            )
            x = jnp.concatenate(  # [N, T, TEXT + 2 PLACE]
                [
                    jnp.broadcast_to(text, (n, *text.shape)),
                    jnp.broadcast_to(
                        module_and_layer[:, None], (n, len(ids), module_and_layer.shape[-1])
                    ),
                ],
                -1,
            )
            x = mixer[1](nn.silu(mixer[0](x)))
            x += block[1](nn.silu(block[0](x)))
            x = nn.silu(last(x))
            name, rank = target.replace(".", "_"), lora.rank_of(target)
            start = nn.initializers.normal(fan_in**-0.5)
            a = _head(rank * fan_in, c, start, f"{name}_a")(x)
            b = _head(rank * fan_out, c, nn.initializers.zeros_init(), f"{name}_b")(x)
            leaf = {
                "a": a.reshape(n, len(ids), fan_in, rank),
                "b": b.reshape(n, len(ids), rank, fan_out),
            }
            if lora.bias:
                zeros = nn.initializers.zeros_init()
                leaf["bias"] = _head(fan_out, c, zeros, f"{name}_bias")(x)
            tree.setdefault(site, {})[projection] = leaf
        return ad.Adapters(tree, self.spec)

    def _embedding(self, name: str, rows: int) -> Array:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("layers", None))
        return self.param(name, init, (rows, PLACE), jnp.float32).astype(self.config.dtype)


def _dense(features: int, config: T5Config, name: str) -> nn.Dense:
    return dense(features, config, ("embed", "mlp"), nn.initializers.lecun_normal(), name)


def _head(features: int, config: T5Config, bias: Any, name: str) -> nn.Dense:
    """Return a linear head whose initial output is its bias."""
    zero = nn.initializers.zeros_init()
    return dense(features, config, ("embed", "joined_kv"), zero, name, bias)
