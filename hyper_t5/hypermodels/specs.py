"""The ``adapter`` section of a config -> what a system emits. One maker for each adapter kind."""

from __future__ import annotations

from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.errors import UserError


def prefix(config: ConfigDict, length: int = 0) -> ad.PrefixSpec:
    """Prefixes at ``adapter.prefix_sites``, of ``length`` or else ``adapter.prefix_length``."""
    a = config.adapter
    sites = _places(config, "prefix_sites")
    return ad.PrefixSpec(sites, length or a.prefix_length, a.position_bias)


def lora(config: ConfigDict) -> ad.LoraSpec:
    """LoRA on ``adapter.lora_targets``."""
    a = config.adapter
    targets = _places(config, "lora_targets")
    return ad.LoraSpec(targets, a.lora_rank, a.lora_alpha, a.lora_bias)


def bottleneck(config: ConfigDict) -> ad.BottleneckSpec:
    """Bottleneck adapters at ``adapter.bottleneck_sites``; a single size is for all of them."""
    a = config.adapter
    sites, sizes = _places(config, "bottleneck_sites"), tuple(a.bottleneck_sizes)
    sizes = sizes * len(sites) if len(sizes) == 1 else sizes
    if len(sizes) != len(sites):
        raise UserError(
            f"adapter.bottleneck_sizes has {len(sizes)} sizes for {len(sites)} places "
            f"({', '.join(sites)}); give one size, or one for each"
        )
    return ad.BottleneckSpec(sites, sizes, a.bottleneck_activation, a.bottleneck_input)


def task_slots(config: ConfigDict) -> int:
    """``adapter.task_slots``, which a system with adapters of its own for each task needs."""
    if not config.adapter.task_slots:
        raise UserError(
            f"adapter.task_slots=0: {config.system} keeps adapters for each task; say for how many"
        )
    return config.adapter.task_slots


def _places(config: ConfigDict, field: str) -> tuple[str, ...]:
    """Where ``adapter.FIELD`` says that adapters go; UserError for nowhere."""
    if not config.adapter[field]:
        raise UserError(
            f"adapter.{field} is empty: {config.system} would emit nothing; name a place"
        )
    return tuple(config.adapter[field])
