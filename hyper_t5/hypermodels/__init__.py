"""The registry of systems: one line a system, one file a hypermodel.

A hypermodel is a Flax module from conditioning ids [T, L] and task numbers [T] to the `Adapters` of
T tasks. A submodule of it named ``backbone`` has the backbone's parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5.adapters import ATTENTION_SITES
from hyper_t5.data.batch import CONCAT, FUSION, SEPARATE, Layout
from hyper_t5.hypermodels import cached, fid_icl, hint, hyperdecoder, learned, text_to_lora
from hyper_t5.hypermodels.hypertuning import hyper_lora, hyper_prefix
from hyper_t5.parallel.sharding import device_put
from hyper_t5.t5 import T5Config

Tree = dict[str, Any]
BACKBONE, HYPERMODEL = "backbone", "hypermodel"  # the branches of a model's parameters
BOTH = (HYPERMODEL, BACKBONE)


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """Defaults of a run at toy size (`configs/quickstart.py`).

    Attributes:
      steps: of training.
      learning_rate: its peak.
      in_table: whether the quickstart's table has it without ``--systems``.
      hyperpretrained: whether a stage on raw text precedes it.
      is_backbone: the shipped backbone is the result of this run; the quickstart only evaluates it.
      fields: other fields of the config.
    """

    steps: int = 500
    learning_rate: float = 1e-3
    in_table: bool = False
    hyperpretrained: bool = False
    is_backbone: bool = False
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class System:
    """One way to make a T5 do a task. Compared by identity, so that it can be a static argument.

    Attributes:
      name: the value of ``config.system``.
      title: its name in tables and plots.
      kind: ``generated`` adapters; adapters learned for all tasks (``shared``) or for each
        (``per_task``); ``none``.
      build: (config, backbone sizes) -> the hypermodel; None where no adapters are emitted.
      trains: the branches of the parameters that are trained; the others are frozen.
      layout: where the data places the conditioning.
      conditioned_on: the ``task`` (conditioning ids of T tasks), or each ``input`` (T = B rows,
        whose encoding is then part of the adapters).
      options: fields of the system's own, with defaults: the config section of its name.
      small: defaults at toy size.
    """

    name: str
    title: str
    kind: Literal["generated", "shared", "per_task", "none"] = "none"
    build: Callable[[ConfigDict, T5Config], nn.Module] | None = None
    trains: tuple[str, ...] = ()
    layout: Layout = SEPARATE
    conditioned_on: Literal["task", "input"] = "task"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: SmallRun = SmallRun()


_HYPER = (HYPERMODEL,)
_JOINT = SmallRun(learning_rate=5e-4)  # the backbone is trained too
_SHARED = {  # kind of adapter -> title, toy run
    "prefix": ("shared prefix", SmallRun(300, 1e-2, in_table=True)),
    "lora": ("shared LoRA", SmallRun(300, 1e-2, in_table=True)),
    "bottleneck": ("shared bottleneck", SmallRun(500, 1e-2)),
}
_PER_TASK = {
    "prefix": "prefix per task",
    "lora": "LoRA per task",
    "bottleneck": "bottleneck per task",
}
_PER_TASK_RUN = SmallRun(500, 1e-2, fields={"stage": "peft", "adapter.task_slots": 48})

SYSTEMS: dict[str, System] = {
    system.name: system
    for system in (
        System("none", "no adapter", small=SmallRun(in_table=True)),
        # Adapters learned by gradient descent, for all tasks or for each.
        *(
            System(f"shared_{kind}", title, "shared", learned.shared(kind), _HYPER, small=small)
            for kind, (title, small) in _SHARED.items()
        ),
        *(
            System(
                f"task_{kind}",
                title,
                "per_task",
                learned.per_task(kind),
                _HYPER,
                small=_PER_TASK_RUN,
            )
            for kind, title in _PER_TASK.items()
        ),
        # Hypermodels: HyperTuning (Phang et al. 2022); "+" trains the backbone jointly.
        System(
            "hyper_lora",
            "HyperT5-LoRA",
            "generated",
            hyper_lora,
            _HYPER,
            small=SmallRun(500, 2e-3, in_table=True, hyperpretrained=True),
        ),
        System(
            "hyper_prefix",
            "HyperT5-Prefix",
            "generated",
            hyper_prefix,
            _HYPER,
            small=SmallRun(500, 1e-3, in_table=True, hyperpretrained=True),
        ),
        System("hyper_lora_plus", "HyperTuning+ LoRA", "generated", hyper_lora, BOTH, small=_JOINT),
        System(
            "hyper_prefix_plus",
            "HyperTuning+ prefix",
            "generated",
            hyper_prefix,
            BOTH,
            small=_JOINT,
        ),
        # HINT (Ivison et al. 2023).
        System(
            "hint",
            "HINT",
            "generated",
            hint.build,
            BOTH,
            small=SmallRun(
                learning_rate=5e-4,
                fields={
                    "adapter.prefix_sites": ATTENTION_SITES,
                    "adapter.position_bias": "zero",
                    "adapter.prefix_length": 8,
                },
            ),
        ),
        # Hyperdecoders (Ivison & Peters 2022).
        System(
            "hyperdecoder",
            "Hyperdecoder",
            "generated",
            hyperdecoder.build,
            _HYPER,
            CONCAT,
            "input",
            hyperdecoder.OPTIONS,
            SmallRun(
                fields={
                    "adapter.bottleneck_activation": "relu",
                    "adapter.bottleneck_input": "raw",
                }
            ),
        ),
        # Text-to-LoRA (Charakorn et al. 2025).
        System("text_to_lora", "Text-to-LoRA style", "generated", text_to_lora.build, _HYPER),
        # The backbone itself reads the conditioning; FiD-ICL (Ye et al. 2023).
        System("cached", "cached conditioning", "generated", cached.build),
        System("fid_icl", "FiD-ICL", "generated", fid_icl.build, (BACKBONE,), FUSION, small=_JOINT),
        System(
            "concat",
            "text concatenated",
            trains=(BACKBONE,),
            layout=CONCAT,
            small=SmallRun(
                2000, 1e-2, in_table=True, is_backbone=True, fields={"optimizer.name": "adafactor"}
            ),
        ),
    )
}


def init_params(
    module: nn.Module, rng: jax.Array, backbone: Tree | None = None, shardings: Tree | None = None
) -> Tree:
    """Initialize a hypermodel's own parameters; copies start as the backbone's.

    Args:
      module: names its copies in ``sources``: {its subtree: the backbone's subtree}.
      rng: of random parameters.
      backbone: parameters to copy; None initializes the copies at random too.
      shardings: of the result; the values do not depend on them.
    """
    init = functools.partial(_init, module)
    params = jax.jit(init, out_shardings=shardings)(rng)
    for target, source in getattr(module, "sources", {}).items() if backbone else ():
        if target in params:
            subtree = _subtree(backbone or {}, source)
            params[target] = _copy_matching(params[target], subtree, bool(shardings))
    return params


def _init(module: nn.Module, rng: jax.Array, boxed: bool = False) -> Tree:
    ids, tasks = jnp.ones((1, 4), jnp.int32), jnp.zeros(1, jnp.int32)
    params = module.init(rng, ids, tasks).get("params", {})
    own = {k: v for k, v in params.items() if k != BACKBONE}
    return own if boxed else nn.unbox(own)


def logical_axes(module: nn.Module) -> Tree:
    """Return the logical axis names of a hypermodel's own parameters, `layers` first where stacked.

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


def _subtree(tree: Tree, path: str) -> Tree:
    for key in filter(None, path.split("/")):
        tree = tree[key]
    return tree


def _copy_matching(params: Tree, source: Tree, sharded: bool) -> Tree:
    """Return ``params`` with the leaves of ``source`` at the same paths."""
    copied = {}
    for key, value in params.items():
        if key not in source:
            copied[key] = value
        elif isinstance(value, dict):
            copied[key] = _copy_matching(value, source[key], sharded)
        elif sharded:
            copied[key] = _copy(source[key], value)
        else:
            copied[key] = jnp.asarray(np.asarray(source[key], value.dtype))
    return copied


def _copy(source: Any, like: jax.Array) -> jax.Array:
    """Copy ``source``, on the host or on devices, with the dtype and sharding of ``like``."""
    if not isinstance(source, jax.Array):
        return device_put(source.astype(like.dtype), like.sharding)
    # A buffer must not be both frozen and donated to the training step.
    copy = jax.jit(lambda x: jnp.copy(x).astype(like.dtype), out_shardings=like.sharding)
    return copy(source)
