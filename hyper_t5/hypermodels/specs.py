"""The ``adapter`` section of a config -> what a system emits. One maker for each adapter kind."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.errors import UserError


def prefix(config: ConfigDict, length: int = 0) -> ad.PrefixSpec:
    """Prefixes at ``adapter.prefix_sites``, of ``length`` or else ``adapter.prefix_length``."""
    a = config.adapter
    sites = _places(config, "prefix_sites")
    return ad.PrefixSpec(sites, length or a.prefix_length, a.position_bias)


def lora(config: ConfigDict) -> ad.LoraSpec:
    """LoRA on ``adapter.lora_targets``, of ranks and alphas that may differ by target."""
    a, targets = config.adapter, _places(config, "lora_targets")
    ranks = dict.fromkeys(targets, a.lora_rank) | pattern(config, "lora_rank_pattern", int)
    alphas = dict.fromkeys(targets, a.lora_alpha) | pattern(config, "lora_alpha_pattern", float)
    return ad.lora_spec(ranks, alphas, a.lora_bias)


def pattern(config: ConfigDict, field: str, kind: type) -> dict[str, Any]:
    """target -> number of ``adapter.FIELD``, such as "dec_cross=32,enc_mlp.wo=4,value=8".

    A place is a target, a site, or a projection's name at every site; the first one that a target
    belongs to counts, as in PEFT's ``rank_pattern``.

    Raises:
        UserError: a place that is no target's, or no number above 0.
    """
    made: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in config.adapter[field].split(","))):
        place, _, text = (x.strip() for x in part.partition("="))
        meant = [t for t in config.adapter.lora_targets if place in (t, *t.split("."))]
        if not meant:
            raise UserError(
                f"adapter.{field}: {place!r} is none of adapter.lora_targets, nor a site or "
                "projection of one; it is written PLACE=NUMBER,PLACE=NUMBER"
            )
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < 2**16:
            wanted = "whole number" if kind is int else "number"
            raise UserError(f"adapter.{field}: {part!r} gives no {wanted} above 0")
        made = dict.fromkeys(meant, number) | made
    return made


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
