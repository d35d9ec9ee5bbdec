"""Cached conditioning (ours; no published system has it for T5): the backbone reads the task.

What the frozen backbone computes while it encodes the conditioning text, computed once a task: each
layer's keys and values are encoder prefixes, and the encoding is memory for its decoder. There is
nothing to train. It differs from the text in front of the input only in that the text does not see
the input, and so bounds what a hypermodel must beat.

Trained, or compressed to P gist tokens, it is ``hyper_prefix`` with ``hypermodel.reader=layerwise``
(and ``hypermodel.gist_tokens=P``): the same reading by a copy that may learn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.readers import read_layers
from hyper_t5.t5 import T5, T5Config


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """``cached``."""
    return Cached(sizes, config.adapter.position_bias)


class Cached(nn.Module):
    """Conditioning ids [T, L] -> prefixes and memory of L positions; has no parameters."""

    config: T5Config
    position_bias: str = "hf"

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        backbone = T5(self.config, name="backbone")
        seen = read_layers(backbone.token_embedder, backbone.encoder, ids, None, deterministic)
        mask = jnp.broadcast_to(seen.mask, (seen.key.shape[0], *seen.mask.shape))
        tree = {
            "enc_self": {"prefix": {"key": seen.key, "value": seen.value, "mask": mask}},
            ad.MEMORY: {"states": seen.output[None], "mask": seen.mask[None]},
        }
        prefix = ad.PrefixSpec(("enc_self",), ids.shape[1], self.position_bias)
        return ad.Adapters(tree, ad.AdapterSpec(prefix=prefix, memory=ids.shape[1]))
