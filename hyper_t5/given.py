"""An adapter folder as a system: the same adapters, whatever task is asked.

So one tuned elsewhere, or generated for a task's text, is evaluated like any system of ours: on any
mixture, mesh and number of hosts.
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
from hyper_t5 import export, files, model, sharding, weights
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.hypermodels.learned import leaf_name
from hyper_t5.overrides import Override, read_overrides

SYSTEM = "shared_lora"  # whose place it takes: nothing is read, all tasks have the same
Leaf = tuple[str, tuple[int, ...], str]  # name, shape without the task's axis, dtype


class Given(nn.Module):
    """Conditioning ids [T, L], unread -> T times the adapters of a folder, its parameters."""

    spec: ad.AdapterSpec
    leaves: tuple[Leaf, ...]

    @nn.compact
    def __call__(self, ids: jax.Array, tasks: jax.Array, deterministic: bool = True) -> ad.Adapters:
        tree: dict[str, Any] = {}
        for name, shape, dtype in self.leaves:
            axes = ("layers", *(None,) * (len(shape) - 1))
            start = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
            leaf = self.param(name, start, shape, jnp.dtype(dtype))
            *parents, last = name.split(".")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = jnp.broadcast_to(leaf[:, None], (shape[0], len(ids), *shape[1:]))
        return ad.Adapters(tree, self.spec)


def load(
    folder: str | Path, backbone: str | Path, overrides: Any = ()
) -> tuple[ConfigDict, model.Model, model.Backbone, model.Tree, ad.Adapters]:
    """(config, model, backbone, parameters, the adapters) of a folder, native or PEFT's, on a mesh.

    The config is the default one, with what a native folder says of its inputs and then the
    overrides.

    Raises:
        UserError: the folder is damaged, of several tasks, made for another backbone, or no
            adapters alone: a text in front of each input, or a hypermodel of the inputs.
    """
    there, where = files.local_copy(folder), str(folder)
    native = None if export.is_peft(there) else _native(there, where)
    config = _config(backbone, native[1] if native else {}, overrides)
    placement = sharding.make_placement(config.mesh)
    base = model.load_backbone(backbone, config, config.backbone.dtype, placement)
    if native is None:
        found, _ = export.load_peft(there, base.sizes)
    else:
        found, meta = native
        made_for, identity = meta.get("backbone", {}), base.vocab.identity()
        weights.check_compatible(base.sizes, identity, made_for, digest=base.digest, where=where)
        ad.check(found, base.sizes, where)
    m, own = as_system(found, base, placement)
    params = {BACKBONE: base.params, HYPERMODEL: own}
    axes = model.logical_axes(m)
    placed = {k: sharding.put(v, placement.computed(axes[k], v)) for k, v in params.items()}
    return config, m, base, placed, found


def as_system(
    found: ad.Adapters, base: model.Backbone, placement: sharding.Placement | None = None
) -> tuple[model.Model, model.Tree]:
    """(model, parameters of its hypermodel) that gives every task the adapters of one."""
    own = {
        leaf_name(path): np.asarray(leaf)[:, 0]
        for path, leaf in jax.tree_util.tree_leaves_with_path(found.tree)
    }
    leaves = tuple((name, leaf.shape, str(leaf.dtype)) for name, leaf in own.items())
    return model.Model(base.sizes, SYSTEM, Given(found.spec, leaves), placement), own


def _native(folder: Path, where: str) -> tuple[ad.Adapters, dict[str, Any]]:
    found, meta, hypermodel = ad.load(folder)
    if hypermodel is not None or "text" in meta:
        raise UserError(
            f"{where}: is no adapter alone: its system reads the task's text with every input; "
            "evaluate the run that made it, with --workdir"
        )
    if found.num_tasks != 1:
        raise UserError(
            f"{where}: holds adapters of {found.num_tasks} tasks; give the folder of one"
        )
    return found, meta


def _config(backbone: str | Path, meta: dict[str, Any], overrides: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.system, config.backbone.path = "none", str(backbone)
    config.data.input_length = meta.get("input_length", config.data.input_length)
    config.data.encoding = meta.get("encoding", config.data.encoding)
    config.backbone.dtype = meta.get("backbone", {}).get("dtype", config.backbone.dtype)
    config.data.on_long_instruction = "truncate"  # nobody reads it
    given: list[Override] = read_overrides(overrides)
    config_lib.apply(config, given)
    config_lib.validate(config)
    return config
