"""One adapter learned for all tasks: the baseline that conditions on nothing.

Ordinary LoRA or prefix tuning (Hu et al. 2021; Li & Liang 2021) over the training mixture, in the
shape of a hypermodel that ignores what it reads.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from hyper_t5 import adapters as ad
from hyper_t5.t5 import T5Config


class Learned(nn.Module):
    """Conditioning ids [T, L], unread -> the same adapters for each of the T tasks."""

    config: T5Config
    spec: ad.AdapterSpec

    @nn.compact
    def __call__(self, ids: jax.Array, deterministic: bool = True) -> ad.Adapters:
        def leaf(path: tuple, shape: tuple[int, ...]) -> jax.Array:
            names = [str(key.key) for key in path]
            if names[-1] in ("b", "bias"):  # LoRA without effect at first
                init = nn.initializers.zeros_init()
            else:
                init = nn.initializers.normal(shape[-2] ** -0.5 if names[-1] == "a" else 1.0)
            axes = ("layers", *(None,) * (len(shape) - 2))
            one = (shape[0], *shape[2:])
            value = self.param(".".join(names), nn.with_logical_partitioning(init, axes), one)
            return jnp.broadcast_to(value[:, None], shape)

        shapes = ad.shapes(self.spec, self.config, ids.shape[0])
        tree = jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: type(x) is tuple)
        return ad.Adapters(tree, self.spec)
