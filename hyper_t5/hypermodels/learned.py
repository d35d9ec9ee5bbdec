"""Adapters that are parameters: the baselines that generate nothing.

Ordinary LoRA, prefix tuning or bottleneck adapters (Hu et al. 2021; Li & Liang 2021; He et al.
2022) in the shape of a hypermodel that ignores what it reads: one set for all tasks, or, with
``slots``, one for each task, so that a single run tunes the adapters of many tasks side by side.
They start at random as PEFT's do; `tuning` has other starts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.hypermodels import specs
from hyper_t5.t5 import T5Config

KINDS: dict[str, Callable[[ConfigDict], ad.AdapterSpec]] = {
    "lora": lambda config: ad.AdapterSpec(lora=specs.lora(config)),
    "prefix": lambda config: ad.AdapterSpec(prefix=specs.prefix(config)),
    "bottleneck": lambda config: ad.AdapterSpec(bottleneck=specs.bottleneck(config)),
}


def shared(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """``shared_KIND``: one set of adapters for every task."""
    return Learned(sizes, KINDS[config.system.removeprefix("shared_")](config))


def per_task(config: ConfigDict, sizes: T5Config) -> nn.Module:
    """``task_KIND``: ordinary tuning, a set for each of ``adapter.task_slots`` tasks."""
    spec = KINDS[config.system.removeprefix("task_")](config)
    masked = bool(spec.prefix and config.adapter.prefix_mask)
    return Learned(sizes, spec, specs.task_slots(config), masked)


def leaf_name(path: tuple[Any, ...]) -> str:
    """The parameter of an adapters' leaf, by its path in their tree: ``enc_self.query.a``."""
    return ".".join(str(key.key) for key in path)


class Learned(nn.Module):
    """Conditioning ids [T, L], unread, and task numbers [T] -> the adapters of T tasks.

    A parameter is a leaf of theirs, [N, slots, ...] or, for all tasks, [N, ...]. ``masked``: so are
    the masks of prefixes, as 1 and 0; they have no gradient and stay as they start.
    """

    config: T5Config
    spec: ad.AdapterSpec
    task_slots: int = 0  # 0: one set for all tasks
    masked: bool = False

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        slots = (self.task_slots,) * bool(self.task_slots)

        def leaf(path: tuple, shape: tuple[int, ...]) -> jax.Array:
            name = leaf_name(path)
            axes = ("layers", *(None,) * (len(shape) - 2 + len(slots)))
            start = _start(name.rpartition(".")[2], shape, len(slots))
            init = nn.with_logical_partitioning(start, axes)
            made = self.param(name, init, (shape[0], *slots, *shape[2:]))
            made = made > 0 if name.endswith("prefix.mask") else made
            return made[:, tasks] if slots else jnp.broadcast_to(made[:, None], shape)

        shapes = ad.shapes(self.spec, self.config, ids.shape[0])
        for site in self.spec.prefix.sites if self.spec.prefix and self.masked else ():
            shapes[site]["prefix"]["mask"] = shapes[site]["prefix"]["key"][:3]
        tree = jax.tree_util.tree_map_with_path(leaf, shapes, is_leaf=lambda x: type(x) is tuple)
        return ad.Adapters(tree, self.spec)


def _start(name: str, shape: tuple[int, ...], slots: int) -> nn.initializers.Initializer:
    """How a leaf starts: LoRA without effect, bottleneck adapters with hardly any.

    PEFT: LoRA's a is Kaiming-uniform with slope sqrt(5), which is 1/sqrt(inputs) either way; a
    prefix is an embedding's, N(0, 1).
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
