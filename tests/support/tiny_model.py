"""What tests of the core share: tiny backbones, random adapters, the files that T5X wrote."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyper_t5 import adapters as ad
from hyper_t5 import t5
from hyper_t5.adapters import Adapters, AdapterSpec, BottleneckSpec, LoraSpec, PrefixSpec

GOLDEN = Path(__file__).parents[1] / "golden"

# H*K is not D, and the decoder is deeper than the encoder: no axis can stand for another.
CONFIG = t5.T5Config(
    vocab_size=60,
    emb_dim=16,
    num_heads=2,
    head_dim=6,
    mlp_dim=20,
    num_encoder_layers=2,
    num_decoder_layers=3,
)
TIED = dataclasses.replace(CONFIG, mlp_activations=("relu",), logits_via_embedding=True)

SITES = (*ad.ATTENTION_SITES, *ad.MLP_SITES)
EVERY_TARGET = ad.targets_of(SITES, CONFIG)
LORA = AdapterSpec(lora=LoraSpec(EVERY_TARGET, rank=2, alpha=3.0, bias=True))
PREFIX = AdapterSpec(prefix=PrefixSpec(ad.ATTENTION_SITES, 3, "hf"))
BOTTLENECK = BottleneckSpec(ad.MLP_SITES, (3, 4))
# LoRA on every projection, prefixes at every attention, bottlenecks at every MLP, and memory.
EVERYTHING = {
    bias: AdapterSpec(LORA.lora, PrefixSpec(ad.ATTENTION_SITES, 3, bias), BOTTLENECK, memory=4)
    for bias in ad.POSITION_BIASES
}


@functools.cache
def params(config: t5.T5Config = CONFIG) -> dict[str, Any]:
    """Random parameters; do not change them."""
    with jax.ensure_compile_time_eval():  # the first to ask may be a function that is traced
        return jax.jit(functools.partial(t5.init_params, config))(jax.random.key(0))


def random_adapters(spec: AdapterSpec, tasks: int, config: t5.T5Config = CONFIG) -> Adapters:
    """Adapters that move the logits by about their own size; prefixes without mask.

    The first place of the memory is masked.
    """
    rng = np.random.default_rng(1)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        return rng.normal(size=shape, scale=0.3).astype(np.float32)

    def is_leaf(x: Any) -> bool:
        return isinstance(x, tuple)

    shapes = ad.shapes(spec, config, tasks)
    tree = jax.tree.map(leaf, shapes, is_leaf=is_leaf)
    if spec.memory:
        tree[ad.MEMORY]["mask"] = np.broadcast_to(
            np.arange(spec.memory) > 0, (1, tasks, spec.memory)
        )
    return Adapters(tree, spec)


def with_mask(adapters: Adapters, masked: int) -> Adapters:
    """Mask the first slots of the prefixes at every site."""
    tree = {site: dict(leaves) for site, leaves in adapters.tree.items()}
    for leaves in tree.values():
        if "prefix" in leaves:
            key = leaves["prefix"]["key"]
            mask = np.broadcast_to(np.arange(key.shape[2]) >= masked, key.shape[:3])
            leaves["prefix"] = leaves["prefix"] | {"mask": mask}
    return Adapters(tree, adapters.spec)


def map_leaves(adapters: Adapters, function: Callable[[str, Any], Any]) -> Adapters:
    """Replace every leaf by `function(path, copy of the leaf)`."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path), np.array(leaf)), adapters.tree
    )
    return Adapters(tree, adapters.spec)


def ids(rows: int, length: int, shortest: int = 2, seed: int = 0) -> jax.Array:
    """[rows, length] token ids of ragged length: EOS (1) at each end, padding (0) after it."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, CONFIG.vocab_size, (rows, length), dtype=np.int32)
    ends = rng.integers(shortest, length + 1, rows)
    ends[0] = length
    ids[np.arange(rows), ends - 1] = 1
    ids[np.arange(length) >= ends[:, None]] = 0
    return jnp.asarray(ids)


@functools.partial(jax.jit, static_argnames="config")
def logits(
    inputs: Any,
    targets: Any,
    adapters: Adapters | None = None,
    decoder_inputs: Any = None,
    *,
    config: t5.T5Config = CONFIG,
    weights: Any,
) -> jax.Array:
    """Teacher-forced logits [B, L, V]."""
    model, variables = t5.T5(config), {"params": weights}
    return model.apply(variables, inputs, targets, adapters, decoder_inputs)


def off(actual: Any, expected: Any) -> float:
    """Return the largest difference, relative to the largest expected number."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
