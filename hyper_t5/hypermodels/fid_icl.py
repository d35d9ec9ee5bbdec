"""FiD-ICL (Ye et al. 2023): fusion instead of generation.

The backbone encodes the instruction and each shown example separately; its decoder then attends to
all of them beside the encoded input. Only the backbone is trained. The published model has examples
only and a marker before the query; here the instruction is one more part, and the input is
unchanged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.t5 import T5, T5Config


def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """Build the ``fid_icl`` system."""
    return FidIcl(sizes)


class FidIcl(nn.Module):
    """Conditioning ids [T, L], an EOS after each part -> memory of L positions; no parameters."""

    config: T5Config

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        ends = (ids == EOS_ID).astype(jnp.int32)
        parts = jnp.cumsum(ends, -1) - ends  # T5's positions are relative: parts need not move
        states = T5(self.config, name="backbone").encode(
            ids, segments=parts, deterministic=deterministic
        )
        tree = {ad.MEMORY: {"states": states[None], "mask": (ids > 0)[None]}}
        return ad.Adapters(tree, ad.AdapterSpec(memory=ids.shape[1]))
