"""Cached conditioning (ours; no published system has it for T5): the backbone reads the task.

The frozen backbone encodes the conditioning text once per task: each layer's keys and values are
encoder prefixes, and the encoding is decoder memory. There is nothing to train. It differs from
concatenation only in that the text does not attend to the input, and so is the baseline that a
hypermodel must beat.

Trained, or compressed to P gist tokens, it is ``hyper_prefix`` with ``hypermodel.reader=layerwise``
(and ``hypermodel.gist_tokens=P``): the same reading by a trainable copy.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.parts.readers import read_layers
from hyper_t5.t5 import T5, T5Config


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build the ``cached`` system."""
    return Cached(sizes, config.adapter.position_bias)


class Cached(nn.Module):
    """Conditioning ids [T, L] -> prefixes and memory of L positions; has no parameters."""

    config: T5Config
    position_bias: str = "hf"

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        backbone = T5(self.config, name="backbone")
        features = read_layers(backbone.token_embedder, backbone.encoder, ids, None, deterministic)
        mask = jnp.broadcast_to(features.mask, (features.key.shape[0], *features.mask.shape))
        tree = {
            "enc_self": {"prefix": {"key": features.key, "value": features.value, "mask": mask}},
            ad.MEMORY: {"states": features.output[None], "mask": features.mask[None]},
        }
        prefix = ad.PrefixSpec(("enc_self",), ids.shape[1], self.position_bias)
        return ad.Adapters(tree, ad.AdapterSpec(prefix=prefix, memory=ids.shape[1]))
