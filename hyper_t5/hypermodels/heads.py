"""Heads: features -> adapter tensors, one small MLP per tensor, shared over layers.

Shapes: N layers, T tasks, P features a layer, D width, R rank, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hyper_t5 import adapters as ad
from hyper_t5.t5 import RMSNorm, T5Config

Array = jax.Array
Tree = dict[str, Any]


def dense(
    features: int,
    config: T5Config,
    axes: tuple[str, str],
    kernel_init: Any,
    name: str,
    bias_init: Any = nn.initializers.zeros,
) -> nn.Dense:
    """A dense layer with a bias, both with logical axes: those of the kernel, and its last."""
    return nn.Dense(
        features,
        dtype=config.dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[1:]),
        name=name,
    )


def layer_norm(config: T5Config, name: str) -> nn.LayerNorm:
    """A layer norm with mean and bias, both of its parameters whole on every device."""
    one, zero = (
        nn.with_logical_partitioning(init, ("embed",))
        for init in (nn.initializers.ones, nn.initializers.zeros)
    )
    return nn.LayerNorm(dtype=config.dtype, scale_init=one, bias_init=zero, name=name)


class Head(nn.Module):
    """RMSNorm -> Dense -> gelu -> Dense, the last one starting at ``start`` times fan-in scale.

    ``start=0`` makes what it emits zero at first (LoRA's b: no effect until trained).
    """

    features: int
    config: T5Config
    start: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., features]."""
        width = x.shape[-1]
        last = nn.initializers.zeros_init()
        if self.start:
            last = nn.initializers.variance_scaling(self.start**2, "fan_in", "normal")
        c, first = self.config, nn.initializers.lecun_normal()
        x = RMSNorm(c.dtype, name="norm")(x)
        x = nn.gelu(dense(width, c, ("embed", "mlp"), first, "hidden")(x))
        return dense(self.features, c, ("mlp", "joined_kv"), last, "out")(x)


class LoraHeads(nn.Module):
    """LoRA of every target from per-layer features of its site.

    Each of the P features of a layer emits R/P components: P = 1 is the paper's one query a site
    and layer, P = R gives every component a token of its own. R may differ by target.
    """

    spec: ad.LoraSpec
    config: T5Config

    @nn.compact
    def __call__(self, features: dict[str, Array]) -> Tree:
        """site -> [N, T, P, D]; returns the LoRA part of an adapters tree."""
        c, spec = self.config, self.spec
        tree: Tree = {}
        for target in spec.targets:
            site, _, projection = target.partition(".")
            x = features[site]
            n, t, p, _ = x.shape
            fan_in, fan_out = ad.projection_shape(target, c)
            rank, name = spec.rank_of(target), target.replace(".", "_")
            each = rank // p
            a = Head(each * fan_in, c, 1.0 / fan_in**0.5, name=f"{name}_a")(x)
            b = Head(each * fan_out, c, 0.0, name=f"{name}_b")(x)
            leaf = {
                "a": a.reshape(n, t, rank, fan_in).swapaxes(-1, -2),
                "b": b.reshape(n, t, rank, fan_out),
            }
            if spec.bias:
                leaf["bias"] = jnp.mean(Head(fan_out, c, 0.0, name=f"{name}_bias")(x), 2)
            tree.setdefault(site, {})[projection] = leaf
        return tree


class PrefixHeads(nn.Module):
    """Prefixes from query features: one head a tensor emits a slot's vector for all layers.

    As reported of HyperTuning's appendix C.
    """

    spec: ad.PrefixSpec
    config: T5Config

    @nn.compact
    def __call__(self, features: Array) -> Tree:
        """[T, P, D] -> the prefix part of an adapters tree."""
        c = self.config
        tree: Tree = {}
        for site in self.spec.sites:
            n = ad.num_layers(site, c)
            leaf = {}
            for name in ("key", "value"):
                y = Head(
                    n * c.num_heads * c.head_dim,
                    c,
                    0.0 if name == "value" else 1e-2,
                    name=f"{site}_{name}",
                )(features)
                y = y.reshape(*y.shape[:2], n, c.num_heads, c.head_dim)
                leaf[name] = jnp.moveaxis(y, 2, 0)
            tree[site] = {"prefix": leaf}
        return tree
