"""Adapter specs from the ``adapter`` section of a config, one function per adapter kind."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5.utils.errors import UserError


def prefix(config: ConfigDict, length: int = 0) -> ad.PrefixSpec:
    """Return prefixes at ``adapter.prefix_sites``, of ``length`` if it is not 0."""
    a = config.adapter
    sites = _sites(config, "prefix_sites")
    return ad.PrefixSpec(sites, length or a.prefix_length, a.position_bias)


def lora(config: ConfigDict) -> ad.LoraSpec:
    """Return LoRA on ``adapter.lora_targets``; ranks and alphas may differ by target."""
    a, targets = config.adapter, _sites(config, "lora_targets")
    ranks = dict.fromkeys(targets, a.lora_rank) | pattern(config, "lora_rank_pattern", int)
    alphas = dict.fromkeys(targets, a.lora_alpha) | pattern(config, "lora_alpha_pattern", float)
    return ad.lora_spec(ranks, alphas, a.lora_bias)


def pattern(config: ConfigDict, field: str, kind: type) -> dict[str, Any]:
    """Parse ``adapter.FIELD``, such as "dec_cross=32,enc_mlp.wo=4,value=8", to {target: number}.

    A key is a target, a site, or a projection's name at every site; the first match of a target
    counts, as in PEFT's ``rank_pattern``.

    Args:
      config: of the run.
      field: its name in the section.
      kind: int or float.

    Raises:
      UserError: a key that matches no target, or no number above 0.
    """
    numbers: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in config.adapter[field].split(","))):
        key, _, text = (x.strip() for x in part.partition("="))
        targets = [t for t in config.adapter.lora_targets if key in (t, *t.split("."))]
        if not targets:
            raise UserError(
                f"adapter.{field}: {key!r} is none of adapter.lora_targets, nor a site or "
                "projection of one; write TARGET=NUMBER,TARGET=NUMBER"
            )
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < 2**16:
            wanted = "whole number" if kind is int else "number"
            raise UserError(f"adapter.{field}: {part!r} gives no {wanted} above 0")
        numbers = dict.fromkeys(targets, number) | numbers
    return numbers


def bottleneck(config: ConfigDict) -> ad.BottleneckSpec:
    """Return bottleneck adapters at ``adapter.bottleneck_sites``, of one size or one each."""
    a = config.adapter
    sites, sizes = _sites(config, "bottleneck_sites"), tuple(a.bottleneck_sizes)
    sizes = sizes * len(sites) if len(sizes) == 1 else sizes
    if len(sizes) != len(sites):
        raise UserError(
            f"adapter.bottleneck_sizes has {len(sizes)} sizes for {len(sites)} sites "
            f"({', '.join(sites)}); set one size, or one for each"
        )
    return ad.BottleneckSpec(sites, sizes, a.bottleneck_activation, a.bottleneck_input)


def task_slots(config: ConfigDict) -> int:
    """Return ``adapter.task_slots``, which a system with adapters for each task requires."""
    if not config.adapter.task_slots:
        raise UserError(
            f"adapter.task_slots=0: {config.system} keeps adapters for each task; set their number"
        )
    return config.adapter.task_slots


def _sites(config: ConfigDict, field: str) -> tuple[str, ...]:
    """Return the sites or targets of ``adapter.FIELD``; UserError where there are none."""
    if not config.adapter[field]:
        raise UserError(
            f"adapter.{field} is empty: {config.system} would emit nothing; list a site"
        )
    return tuple(config.adapter[field])
