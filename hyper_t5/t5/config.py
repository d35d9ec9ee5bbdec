"""Sizes of T5 models: the T5 1.0 and T5 1.1 presets, and two small ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, with the names of T5X's T5Config. ``dtype`` is the compute dtype."""

    vocab_size: int = 32128
    emb_dim: int = 512
    num_heads: int = 6
    num_encoder_layers: int = 8
    num_decoder_layers: int = 8
    head_dim: int = 64
    mlp_dim: int = 1024
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    dropout_rate: float = 0.0
    logits_via_embedding: bool = False
    dtype: str = "float32"
    remat: str = "none"  # 'none' | 'minimal' (keep matrix products) | 'full' (keep layer inputs)
    scan_unroll: int = 1
    relpos_buckets: int = 32
    relpos_max_distance: int = 128


def _v1_1(emb: int, heads: int, layers: int, mlp: int, **more: Any) -> T5Config:
    return T5Config(
        emb_dim=emb,
        num_heads=heads,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        mlp_dim=mlp,
        **more,
    )


PRESETS = {
    "tiny": _v1_1(64, 4, 2, 128, head_dim=16, vocab_size=512),
    "mini": _v1_1(256, 4, 4, 512, logits_via_embedding=True),  # 14.5 M: for trials on CPUs
    "small": _v1_1(512, 6, 8, 1024),
    "base": _v1_1(768, 12, 12, 2048),
    "large": _v1_1(1024, 16, 24, 2816),
    "xl": _v1_1(2048, 32, 24, 5120),
    "xxl": _v1_1(4096, 64, 24, 10240),
}

_v1_0 = functools.partial(_v1_1, mlp_activations=("relu",), logits_via_embedding=True)

T5_1_0_PRESETS = {
    "tiny": _v1_0(64, 4, 2, 256, head_dim=16, vocab_size=512),
    "small": _v1_0(512, 8, 6, 2048),
    "base": _v1_0(768, 12, 12, 3072),
    "large": _v1_0(1024, 16, 24, 4096),
    "xl": _v1_0(1024, 32, 24, 16384, head_dim=128),
    "xxl": _v1_0(1024, 128, 24, 65536, head_dim=128),
}


def preset(name: str, **overrides: Any) -> T5Config:
    """Return a T5 1.1 size by name; ``t5-small`` and so on name the T5 1.0 sizes."""
    table = T5_1_0_PRESETS if name.startswith("t5-") else PRESETS
    return dataclasses.replace(table[name.removeprefix("t5-")], **overrides)
