"""Tiny T5s in our network and in transformers, and adapters for both: used by tests of export."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hyper_t5 import adapters as ad
from hyper_t5 import t5, weights
from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec, PrefixSpec
from hyper_t5.t5.decoding import decode
from hyper_t5.weights import param_names

TASKS, TASK, SLOTS = 3, 1, 3
# T5 1.1 and T5 1.0: H*K is 16 and D is 24; the decoder is deeper than the encoder.
GATED = t5.T5Config(
    vocab_size=96,
    emb_dim=24,
    num_heads=2,
    head_dim=8,
    mlp_dim=40,
    num_encoder_layers=1,
    num_decoder_layers=3,
)
TIED = dataclasses.replace(GATED, mlp_activations=("relu",), logits_via_embedding=True)
# H*K is above D, and the encoder is deeper.
WIDE = dataclasses.replace(GATED, num_heads=4, num_encoder_layers=3, num_decoder_layers=2)
CONFIGS = {"1.1": GATED, "1.0": TIED, "wide": WIDE}

DEC_PREFIX = AdapterSpec(prefix=PrefixSpec(("dec_self",), SLOTS))
INPUTS = np.array([[5, 60, 7, 8, 9, 1], [33, 90, 1, 0, 0, 0]])
TARGETS = np.array([[3, 40, 5, 1], [77, 8, 9, 1]])


def lora(*targets: str, bias: bool = False) -> AdapterSpec:
    return AdapterSpec(lora=LoraSpec(targets, rank=4, alpha=6, bias=bias))


def patterned(config: t5.T5Config, bias: bool = False) -> AdapterSpec:
    """Return LoRA with different ranks and alphas, also at cross-attention."""
    wi = ad.targets_of(("dec_mlp",), config)[0]
    ranks = {"enc_self.query": 4, "dec_self.out": 4, "dec_cross.key": 2, wi: 7}
    alphas = {"enc_self.query": 6.0, "dec_self.out": 2.5, "dec_cross.key": 6.0, wi: 6.0}
    return AdapterSpec(lora=ad.lora_spec(ranks, alphas, bias))


def random_adapters(spec: AdapterSpec, config: t5.T5Config, mask: Any = None) -> Adapters:
    """Create adapters of three tasks that change the logits by about their own size."""
    rng = np.random.default_rng(1)
    scale = 0.3 if spec.lora else 1.0
    tree = jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        ad.shapes(spec, config, TASKS),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    if mask is not None:
        shape = tree["dec_self"]["prefix"]["key"].shape[:3]
        tree["dec_self"]["prefix"]["mask"] = jnp.broadcast_to(jnp.asarray(mask), shape)
    return Adapters(tree, spec)


@functools.cache
def backbone(config: t5.T5Config) -> Any:
    """Create random weights with activations of about unit size."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in param_names.param_shapes(config).items():
        scale = shape[-2] ** -0.5 if path.endswith("/kernel") else 1.0
        flat[path] = (scale * rng.normal(size=shape)).astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def save_backbone(folder: Path, config: t5.T5Config) -> Path:
    """Save `backbone(config)` as a Hugging Face folder."""
    weights.save_hf(folder, config, backbone(config))
    return folder


@functools.partial(jax.jit, static_argnums=0)
def logits(config: t5.T5Config, params: Any, adapters: Adapters | None) -> Any:
    return t5.T5(config).apply({"params": params}, INPUTS, TARGETS, adapters)


@functools.cache
def base_logits(config: t5.T5Config) -> np.ndarray:
    return np.asarray(logits(config, backbone(config), None))


@functools.cache
def base_outputs(config: t5.T5Config) -> np.ndarray:
    return np.asarray(decode(config, backbone(config), INPUTS, None, steps=6)[0])


def load_model(base: Path, adapter: Path | None = None) -> Any:
    """Load a transformers model, or a PeftModel."""
    import peft
    import transformers

    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(base)
    return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def model_logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.tensor(INPUTS)
    shifted = torch.tensor(np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=shifted)
    return out.logits.numpy()


def assert_close(actual: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.abs(np.asarray(actual) - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_differs(actual: Any, base: Any) -> None:
    assert np.abs(np.asarray(actual) - np.asarray(base)).max() > 0.05 * np.abs(base).max()


def assert_same_effect(model: Any, config: t5.T5Config, adapters: Adapters) -> None:
    """Check that the logits of a PeftModel equal ours, and differ from those of the base."""
    actual = model_logits(model)
    assert_close(actual, logits(config, backbone(config), adapters))
    assert_differs(actual, base_logits(config))


def assert_same_outputs(model: Any, config: t5.T5Config, adapters: Adapters) -> None:
    """Check that the greedy outputs of a PeftModel equal ours, and differ from the base's."""
    import torch

    ids = torch.tensor(INPUTS)
    # transformers 5.23 gives the decoder's cache the depth of the encoder; a prefix has its own.
    no_cache = config.num_decoder_layers > config.num_encoder_layers and adapters.spec.lora
    options = {"use_cache": False} if no_cache else {}
    mask = (ids > 0).long()
    actual = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **options)
    actual = np.pad(actual.numpy()[:, 1:], ((0, 0), (0, 7 - actual.shape[1])))
    expected = np.asarray(decode(config, backbone(config), INPUTS, adapters, steps=6)[0])
    np.testing.assert_array_equal(actual, expected)
    assert not np.array_equal(expected, base_outputs(config))
