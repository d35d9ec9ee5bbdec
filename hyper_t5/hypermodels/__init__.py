"""The systems: what reads the task, what it emits, and what is trained.

A system is one file here and one line in SYSTEMS.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.errors import UserError
from hyper_t5.hypermodels.hyper_t5 import HyperT5
from hyper_t5.hypermodels.learned import Learned
from hyper_t5.t5 import T5Config

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class System:
    """One way to make a T5 do a task.

    Attributes:
      build: (config, backbone sizes) -> a module from conditioning ids [T, L] to ``Adapters``;
        None where nothing is emitted.
      trains: ``"hypermodel"`` (the backbone is frozen), ``"backbone"``, or nothing.
      concat: the conditioning text stands in front of every input instead of going to a hypermodel.
    """

    build: Callable[[ConfigDict, T5Config], nn.Module] | None = None
    trains: str = "hypermodel"
    concat: bool = False


def _places(config: ConfigDict, field: str) -> tuple[str, ...]:
    """Where ``adapter.FIELD`` says that adapters go; UserError for nowhere."""
    if not config.adapter[field]:
        raise UserError(
            f"adapter.{field} is empty: {config.system} would emit nothing; name a place"
        )
    return tuple(config.adapter[field])


def _prefix_spec(config: ConfigDict, length: int) -> ad.AdapterSpec:
    sites = _places(config, "prefix_sites")
    return ad.AdapterSpec(prefix=ad.PrefixSpec(sites, length, config.adapter.position_bias))


def _lora_spec(config: ConfigDict) -> ad.AdapterSpec:
    a = config.adapter
    targets = _places(config, "lora_targets")
    return ad.AdapterSpec(lora=ad.LoraSpec(targets, a.lora_rank, a.lora_alpha, a.lora_bias))


def _hyper_prefix(config: ConfigDict, sizes: T5Config) -> nn.Module:
    h = config.hypermodel
    length = config.adapter.prefix_length
    if h.reader == "layerwise":
        if "dec_self" in config.adapter.prefix_sites:
            raise UserError(
                "adapter.prefix_sites: hypermodel.reader=layerwise has no keys and values for "
                "dec_self; leave it out, or set hypermodel.reader to decoder_queries"
            )
        length = h.gist_tokens or config.data.hyper_length
    return HyperT5(sizes, _prefix_spec(config, length), h.reader, h.gist_tokens)


def _hyper_lora(config: ConfigDict, sizes: T5Config) -> nn.Module:
    h = config.hypermodel
    rank, gists = config.adapter.lora_rank, 0
    if h.reader == "layerwise":
        gists = h.gist_tokens or rank
        if rank % gists:
            raise UserError(
                f"adapter.lora_rank={rank} is no multiple of hypermodel.gist_tokens="
                f"{gists}: each of them emits as many components; set the latter to 0"
            )
    return HyperT5(sizes, _lora_spec(config), h.reader, gists)


def _shared_prefix(config: ConfigDict, sizes: T5Config) -> nn.Module:
    return Learned(sizes, _prefix_spec(config, config.adapter.prefix_length))


def _shared_lora(config: ConfigDict, sizes: T5Config) -> nn.Module:
    return Learned(sizes, _lora_spec(config))


SYSTEMS: dict[str, System] = {
    "hyper_prefix": System(_hyper_prefix),
    "hyper_lora": System(_hyper_lora),
    "shared_prefix": System(_shared_prefix),
    "shared_lora": System(_shared_lora),
    "concat": System(trains="backbone", concat=True),
    "none": System(trains=""),
}


def init_params(module: nn.Module, rng: jax.Array, backbone: Tree | None = None) -> Tree:
    """Fresh parameters; those that the module says are copies start as the backbone's.

    A module names its copies in ``sources``: {its subtree: the backbone's subtree}.
    """
    ids = jnp.ones((1, 4), jnp.int32)
    params = nn.unbox(jax.jit(module.init)(rng, ids)["params"])
    for mine, theirs in getattr(module, "sources", {}).items() if backbone else ():
        if mine in params:
            params[mine] = _copy_where_named(params[mine], _at(backbone or {}, theirs))
    return params


def _at(tree: Tree, path: str) -> Tree:
    for key in filter(None, path.split("/")):
        tree = tree[key]
    return tree


def _copy_where_named(params: Tree, source: Tree) -> Tree:
    """``params`` with every leaf that ``source`` has under the same path replaced by it."""
    copied = {}
    for key, value in params.items():
        if key not in source:
            copied[key] = value
        elif isinstance(value, dict):
            copied[key] = _copy_where_named(value, source[key])
        else:
            copied[key] = jnp.asarray(source[key], value.dtype)
    return copied
