"""An adapter folder as a system: the same adapters for every task.

So an adapter that was tuned elsewhere, or generated from a task's text, is evaluated like any
system: on any mixture, mesh and number of processes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import export, runs
from hyper_t5 import model as model_lib
from hyper_t5.export import native
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, System
from hyper_t5.hypermodels.learned import leaf_name
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import sharding
from hyper_t5.runs import Backbone, Run
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import Override, read_overrides

SYSTEM = System("adapter", "adapter folder", "shared")
Leaf = tuple[str, tuple[int, ...], str]  # name, shape without the task axis, dtype


class FixedAdapter(nn.Module):
    """Conditioning ids [T, L], unread -> T times the adapters of a folder, its parameters."""

    spec: ad.AdapterSpec
    leaves: tuple[Leaf, ...]

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        tree: dict[str, Any] = {}
        for name, shape, dtype in self.leaves:
            axes = ("layers", *(None,) * (len(shape) - 1))
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            leaf = self.param(name, init, shape, jnp.dtype(dtype))
            *parents, last = name.split(".")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = jnp.broadcast_to(leaf[:, None], (shape[0], len(ids), *shape[1:]))
        return ad.Adapters(tree, self.spec)


def open_adapter(
    folder: str | Path, backbone: str | Path, overrides: Any = ()
) -> tuple[Run, ad.Adapters]:
    """Open an adapter folder, native or PEFT's, as a run on a mesh; return its adapters too.

    The config is the default one, with what a native folder records of its inputs and then the
    overrides.

    Raises:
      UserError: the folder is damaged, of several tasks, made for another backbone, or holds more
        than adapters: a text that precedes each input, or a hypermodel.
    """
    local, path = files.local_copy(folder), str(folder)
    loaded = None if export.is_peft(local) else _load_native(local, path)
    config = _config(backbone, loaded[1] if loaded else {}, overrides)
    placement = sharding.make_placement(config.mesh)
    base = runs.load_backbone(backbone, config, config.backbone.dtype, placement)
    if loaded is None:
        adapters, _ = export.load_peft(local, base.sizes)
    else:
        adapters, meta = loaded
        base.check_matches(meta.get("backbone", {}), path)
        ad.check(adapters, base.sizes, path)
    m, own = as_model(adapters, base, placement)
    params = {BACKBONE: base.params, HYPERMODEL: own}
    axes = model_lib.logical_axes(m)
    placed = {
        k: sharding.device_put(v, placement.compute_sharding(axes[k], v)) for k, v in params.items()
    }
    run = Run(path, config, m, base, placed, checkpoint_digest=native.digest(adapters))
    return run, adapters


def as_model(
    adapters: ad.Adapters, backbone: Backbone, placement: sharding.Placement | None = None
) -> tuple[Model, Tree]:
    """Return (model, hypermodel parameters) that emit one task's adapters for every task."""
    own = {
        leaf_name(path): np.asarray(leaf)[:, 0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapters.tree)
    }
    leaves = tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in own.items())
    return Model(backbone.sizes, SYSTEM, FixedAdapter(adapters.spec, leaves), placement), own


def _load_native(folder: Path, path: str) -> tuple[ad.Adapters, dict[str, Any]]:
    adapters, meta, hypermodel = native.load(folder)
    if hypermodel is not None or "text" in meta:
        raise UserError(
            f"{path}: holds more than adapters: its system reads the task's text with every "
            "input; evaluate the run that generated it, with --workdir"
        )
    if adapters.num_tasks != 1:
        raise UserError(
            f"{path}: holds adapters of {adapters.num_tasks} tasks; use a folder of one"
        )
    return adapters, meta


def _config(backbone: str | Path, meta: dict[str, Any], overrides: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.system, config.backbone.path = "none", str(backbone)
    config.data.input_length = meta.get("input_length", config.data.input_length)
    config.data.template = meta.get("encoding", config.data.template)
    config.backbone.dtype = meta.get("backbone", {}).get("dtype", config.backbone.dtype)
    config.data.on_long_instruction = "truncate"  # instructions are not read
    parsed: list[Override] = read_overrides(overrides)
    config_lib.apply(config, parsed)
    config_lib.validate(config)
    return config
