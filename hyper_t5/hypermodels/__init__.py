"""The systems: what reads the task, what it emits, and what is trained.

A system is one file here and one line in SYSTEMS.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5.hypermodels import cached, fid_icl, hint, hyperdecoder, learned, text_to_lora
from hyper_t5.hypermodels.hyper_t5 import hyper_lora, hyper_prefix
from hyper_t5.sharding import put
from hyper_t5.t5 import T5Config

Tree = dict[str, Any]
BACKBONE, HYPERMODEL = "backbone", "hypermodel"  # the branches of a model's parameters
BOTH = (HYPERMODEL, BACKBONE)


@dataclasses.dataclass(frozen=True)
class System:
    """One way to make a T5 do a task.

    Attributes:
      build: (config, backbone sizes) -> a module from ids [T, L] and task numbers [T] to
        ``Adapters``; None where nothing is emitted. A submodule of it that is named ``backbone``
        has the backbone's parameters.
      trains: which branches of the parameters; the others are frozen.
      layout: how the data gives the conditioning: ``apart`` to the hypermodel, ``parts`` too but
        with an EOS behind each part of it, ``concat`` in front of every input.
      reads: what the ids are: ``task``, the conditioning of T tasks, or ``input``, each of the rows
        themselves (T = B), whose encoding is then in what is emitted.
      options: fields of the system's own, with defaults: the section of its name in a config.
    """

    build: Callable[[ConfigDict, T5Config], nn.Module] | None = None
    trains: tuple[str, ...] = (HYPERMODEL,)
    layout: str = "apart"
    reads: str = "task"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


SYSTEMS: dict[str, System] = {
    # Hypermodels.
    "hyper_prefix": System(hyper_prefix),
    "hyper_lora": System(hyper_lora),
    "hyper_prefix_plus": System(hyper_prefix, BOTH),  # HyperTuning+: trained jointly
    "hyper_lora_plus": System(hyper_lora, BOTH),
    "hint": System(hint.build, BOTH),
    "hyperdecoder": System(
        hyperdecoder.build, layout="concat", reads="input", options=hyperdecoder.OPTIONS
    ),
    "text_to_lora": System(text_to_lora.build),
    # Nothing generated: the task's text as the backbone itself reads it.
    "cached": System(cached.build, ()),
    "fid_icl": System(fid_icl.build, (BACKBONE,), layout="parts"),
    "concat": System(None, (BACKBONE,), layout="concat"),
    # Nothing read: adapters learned for all tasks, or for each, and the backbone as it is.
    **{f"shared_{kind}": System(learned.shared) for kind in learned.KINDS},
    **{f"task_{kind}": System(learned.per_task) for kind in learned.KINDS},
    "none": System(None, ()),
}


def init_params(
    module: nn.Module, rng: jax.Array, backbone: Tree | None = None, where: Tree | None = None
) -> Tree:
    """Fresh parameters of a module's own; those that it says are copies start as the backbone's.

    A module names its copies in ``sources``: {its subtree: the backbone's subtree}. ``where`` are
    shardings; the numbers are the same whatever they are.
    """
    init = functools.partial(_init, module)
    params = jax.jit(init, out_shardings=where)(rng)
    for mine, theirs in getattr(module, "sources", {}).items() if backbone else ():
        if mine in params:
            params[mine] = _copy_where_named(params[mine], _at(backbone or {}, theirs), bool(where))
    return params


def _init(module: nn.Module, rng: jax.Array, boxed: bool = False) -> Tree:
    made = module.init(rng, jnp.ones((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)).get("params", {})
    made = {k: v for k, v in made.items() if k != BACKBONE}
    return made if boxed else nn.unbox(made)


def logical_axes(module: nn.Module) -> Tree:
    """The logical axis names of a module's own parameters, `layers` first where stacked.

    Raises:
        TypeError: a parameter without names.
    """

    def names(path: Any, leaf: Any) -> tuple[str | None, ...]:
        if not isinstance(leaf, nn.Partitioned):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise TypeError(f"{name} has no logical axes: see flax's nn.with_logical_partitioning")
        return leaf.names

    boxed = jax.eval_shape(functools.partial(_init, module, boxed=True), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned)
    )


def _at(tree: Tree, path: str) -> Tree:
    for key in filter(None, path.split("/")):
        tree = tree[key]
    return tree


def _copy_where_named(params: Tree, source: Tree, placed: bool) -> Tree:
    """``params`` with every leaf that ``source`` has under the same path replaced by it."""
    copied = {}
    for key, value in params.items():
        if key not in source:
            copied[key] = value
        elif isinstance(value, dict):
            copied[key] = _copy_where_named(value, source[key], placed)
        elif placed:
            copied[key] = _copy(source[key], value)
        else:
            copied[key] = jnp.asarray(np.asarray(source[key], value.dtype))
    return copied


def _copy(source: Any, like: jax.Array) -> jax.Array:
    """``source``, on the host or on devices, as an array of its own where ``like`` lies."""
    if not isinstance(source, jax.Array):
        return put(source.astype(like.dtype), like.sharding)
    # One buffer must not be both frozen and donated to the training step.
    copy = jax.jit(lambda x: jnp.copy(x).astype(like.dtype), out_shardings=like.sharding)
    return copy(source)
