"""Dropout: a key per layer, one pattern for all queries, and the hypermodel's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hyper_t5 import adapters as ad
from hyper_t5 import model, t5
from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.t5.attention import Attention
from tests.support import tiny_runs
from tests.support.tiny_model import ids

CONFIG = t5.T5Config(
    vocab_size=8,
    emb_dim=64,
    num_heads=2,
    head_dim=4,
    mlp_dim=8,
    num_encoder_layers=2,
    num_decoder_layers=1,
    dropout_rate=0.5,
)


def test_layers_have_different_patterns() -> None:
    """Layers that add the same constant before dropout reach 0, 1 or 2 times the constant."""
    params = jax.jit(lambda: t5.init_params(CONFIG, jax.random.key(0)))()
    flat = {
        path: jnp.ones_like(x) if path.endswith("scale") else jnp.zeros_like(x)
        for path, x in traverse_util.flatten_dict(params, sep="/").items()
    }
    spec = AdapterSpec(lora=LoraSpec(("enc_mlp.wo",), rank=1, alpha=1.0, bias=True))
    tree = jax.tree.map(
        lambda shape: np.zeros(shape, np.float32),
        ad.shapes(spec, CONFIG, 1),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tree["enc_mlp"]["wo"]["bias"] += 1
    encoded = t5.T5(CONFIG).apply(
        {"params": traverse_util.unflatten_dict(flat, sep="/")},
        np.full((1, 3), 2, np.int32),
        Adapters(tree, spec),
        deterministic=False,
        rngs={"dropout": jax.random.key(0)},
        method="encode",
    )
    levels = np.unique(np.round(np.asarray(encoded), 4))
    assert len(levels[levels > 0]) == 2


def test_queries_share_the_pattern_of_attention() -> None:
    """With uniform probabilities every query then has the same output."""
    attention = Attention(CONFIG)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 64)).astype(np.float32)
    key, value = np.zeros((1, 7, 2, 4), np.float32), rng.normal(size=(1, 7, 2, 4))
    bias = np.zeros((1, 1, 1, 7), np.float32)
    inputs = (x, key, value.astype(np.float32), bias)
    variables = attention.init(jax.random.key(0), *inputs)
    whole = attention.apply(variables, *inputs)
    dropped = attention.apply(
        variables, *inputs, deterministic=False, rngs={"dropout": jax.random.key(1)}
    )
    assert not np.allclose(dropped, whole)
    np.testing.assert_allclose(dropped, np.broadcast_to(dropped[:, :1], dropped.shape), atol=1e-6)


def test_the_hypermodel_has_dropout() -> None:
    config = tiny_runs.make_config(system="hyper_prefix", backbone__path="x")
    sizes = dataclasses.replace(tiny_runs.SIZES, dropout_rate=0.5)
    m = model.build_model(config, sizes)
    rng = np.random.default_rng(0)
    params: Any = jax.tree.map(
        lambda x: rng.normal(size=x.shape, scale=0.1).astype(x.dtype), model.param_shapes(m)
    )
    assert {BACKBONE, HYPERMODEL} <= params.keys()
    text, tasks = ids(2, 9), jnp.zeros(2, jnp.int32)
    first, again, other = (
        jax.tree.leaves(m.adapters(params, text, tasks, key))
        for key in (jax.random.key(0), jax.random.key(0), jax.random.key(1))
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not all(np.allclose(x, y) for x, y in zip(first, other, strict=True))
