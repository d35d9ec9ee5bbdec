"""Learned adapters: the baselines that generate nothing.

LoRA, prefix tuning or bottleneck adapters (Hu et al. 2021; Li & Liang 2021; He et al. 2022) as a
module that ignores its conditioning: one set for all tasks, or one for each task, so that a single
run tunes the adapters of many tasks side by side. They are initialized as in PEFT;
`training.peft_init` has other starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels.parts import specs
from hyper_t5.t5 import T5Config

KINDS: dict[str, Callable[[ConfigDict], ad.AdapterSpec]] = {
    "lora": lambda config: ad.AdapterSpec(lora=specs.lora(config)),
    "prefix": lambda config: ad.AdapterSpec(prefix=specs.prefix(config)),
    "bottleneck": lambda config: ad.AdapterSpec(bottleneck=specs.bottleneck(config)),
}


def shared(kind: str) -> Callable[[ConfigDict, T5Config], nn.Module]:
    """Return the builder of one set of adapters of a kind for every task."""
    return lambda config, sizes: Learned(sizes, KINDS[kind](config))


def per_task(kind: str) -> Callable[[ConfigDict, T5Config], nn.Module]:
    """Return the builder of a set for each of ``adapter.task_slots`` tasks: ordinary tuning."""

    def build(config: ConfigDict, sizes: T5Config) -> nn.Module:
        spec = KINDS[kind](config)
        masked = bool(spec.prefix and config.adapter.prefix_mask)
        return Learned(sizes, spec, specs.task_slots(config), masked)

    return build


def leaf_name(path: tuple[Any, ...]) -> str:
    """Return the parameter name of a leaf by its path in an adapters tree: ``enc_self.query.a``."""
    return ".".join(str(key.key) for key in path)


class Learned(nn.Module):
    """Conditioning ids [T, L], unread, and task numbers [T] -> the adapters of T tasks.

    Each leaf of the adapters is a parameter, [N, slots, ...] or, for all tasks, [N, ...]. With
    ``masked`` the masks of prefixes are parameters too, 1 and 0, which have no gradient.
    """

    config: T5Config
    spec: ad.AdapterSpec
    task_slots: int = 0  # 0 is one set for all tasks
    masked: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        slots = (self.task_slots,) * bool(self.task_slots)

        def leaf(path: tuple, shape: tuple[int, ...]) -> jax.Array:
            name = leaf_name(path)
            axes = ("layers", *(None,) * (len(shape) - 2 + len(slots)))
            init = _initializer(name.rpartition(".")[2], shape, len(slots))
            init = nn.with_logical_partitioning(init, axes)
            param = self.param(name, init, (shape[0], *slots, *shape[2:]))
            param = param > 0 if name.endswith("prefix.mask") else param
            return param[:, tasks] if slots else jnp.broadcast_to(param[:, None], shape)

        shapes = ad.shapes(self.spec, self.config, ids.shape[0])
        for site in self.spec.prefix.sites if self.spec.prefix and self.masked else ():
            shapes[site]["prefix"]["mask"] = shapes[site]["prefix"]["key"][:3]
        tree = jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: type(x) is tuple)
        return ad.Adapters(tree, self.spec)


def _initializer(name: str, shape: tuple[int, ...], slots: int) -> nn.initializers.Initializer:
    """Return the initializer of a leaf: LoRA without effect, bottleneck adapters with hardly any.

    As in PEFT, LoRA's a is Kaiming-uniform with slope sqrt(5), i.e. uniform within 1/sqrt(inputs),
    and a prefix is N(0, 1).
    """
    if name in ("b", "bias", "down_bias", "up_bias"):
        return nn.initializers.zeros_init()
    if name in ("down", "up"):  # Hyperdecoders' learned adapters: Xavier with a gain of 1e-4
        axes = tuple(range(1 + slots))
        return nn.initializers.variance_scaling(1e-8, "fan_avg", "uniform", batch_axis=axes)
    if name == "mask":
        return nn.initializers.ones_init()
    return _kaiming_uniform if name == "a" else nn.initializers.normal(1.0)


def _kaiming_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
