"""Heads: features -> adapter tensors, one small MLP per tensor, shared over layers.

Shapes: N layers, T tasks, P features per layer, D width, R rank, H heads, K head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hyper_t5 import adapters as ad
from hyper_t5.t5 import T5Config
from hyper_t5.t5.network import RMSNorm

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
    """Return a dense layer with bias; the logical axis of the bias is the kernel's last."""
    return nn.Dense(
        features,
        dtype=config.dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, axes),
        bias_init=nn.with_logical_partitioning(bias_init, axes[1:]),
        name=name,
    )


def layer_norm(config: T5Config, name: str) -> nn.LayerNorm:
    """Return a layer norm with mean and bias, its parameters replicated."""
    ones, zeros = (
        nn.with_logical_partitioning(init, ("embed",))
        for init in (nn.initializers.ones, nn.initializers.zeros)
    )
    return nn.LayerNorm(dtype=config.dtype, scale_init=ones, bias_init=zeros, name=name)


class Head(nn.Module):
    """RMSNorm -> Dense -> gelu -> Dense, the last one initialized at ``scale`` times fan-in scale.

    With ``scale=0`` the initial output is zero (LoRA's b: no effect until trained).
    """

    features: int
    config: T5Config
    scale: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map [..., D] to [..., features]."""
        width = x.shape[-1]
        last = nn.initializers.zeros_init()
        if self.scale:
            last = nn.initializers.variance_scaling(self.scale**2, "fan_in", "normal")
        c, first = self.config, nn.initializers.lecun_normal()
        x = RMSNorm(c.dtype, name="norm")(x)
        x = nn.gelu(dense(width, c, ("embed", "mlp"), first, "hidden")(x))
        return dense(self.features, c, ("mlp", "joined_kv"), last, "out")(x)


class LoraHeads(nn.Module):
    """LoRA of every target from per-layer features of its site.

    Each of the P features of a layer emits R/P components: P = 1 is the paper's one query per site
    and layer, P = R is one token per component. R may differ by target.
    """

    spec: ad.LoraSpec
    config: T5Config

    @nn.compact
    def __call__(self, features: dict[str, Array]) -> Tree:
        """Map {site: [N, T, P, D]} to the LoRA part of an adapters tree."""
        c, spec = self.config, self.spec
        tree: Tree = {}
        for target in spec.targets:
            site, _, projection = target.partition(".")
            x = features[site]
            n, t, p, _ = x.shape
            fan_in, fan_out = ad.projection_shape(target, c)
            rank, name = spec.rank_of(target), target.replace(".", "_")
            components = rank // p
            a = Head(components * fan_in, c, 1.0 / fan_in**0.5, name=f"{name}_a")(x)
            b = Head(components * fan_out, c, 0.0, name=f"{name}_b")(x)
            leaf = {
                "a": a.reshape(n, t, rank, fan_in).swapaxes(-1, -2),
                "b": b.reshape(n, t, rank, fan_out),
            }
            if spec.bias:
                leaf["bias"] = jnp.mean(Head(fan_out, c, 0.0, name=f"{name}_bias")(x), 2)
            tree.setdefault(site, {})[projection] = leaf
        return tree


class PrefixHeads(nn.Module):
    """Prefixes from query features: one head per tensor emits a slot's vector for all layers.

    As HyperTuning's appendix C is reported.
    """

    spec: ad.PrefixSpec
    config: T5Config

    @nn.compact
    def __call__(self, features: Array) -> Tree:
        """Map [T, P, D] to the prefix part of an adapters tree."""
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
