"""Names, shapes and digest of parameters. t5_test and hf_test compare them with golden files."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from hyper_t5 import t5
from hyper_t5.weights import param_names
from tests.support.param_trees import T5_1_0, assert_equal, from_hf, from_t5x, random_params

CONFIGS = pytest.mark.parametrize("config", [t5.preset("tiny"), T5_1_0], ids=["1.1", "1.0"])


@CONFIGS
def test_param_shapes_are_those_of_the_model(config: t5.T5Config) -> None:
    tree = jax.eval_shape(lambda: t5.init_params(config, jax.random.key(0)))
    shapes = {k: leaf.shape for k, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
    assert shapes == param_names.param_shapes(config)


@CONFIGS
def test_names_are_invertible(config: t5.T5Config) -> None:
    params = random_params(config)
    tree = param_names.to_t5x(params)
    assert_equal(from_t5x(tree), params)
    flat = traverse_util.flatten_dict(tree, sep="/")
    assert {path: leaf.shape for path, leaf in flat.items()} == param_names.layer_shapes(config)
    state = {
        param_names.hf_name(path): leaf.T if param_names.hf_transposed(path) else leaf
        for path, leaf in flat.items()
    }
    assert len(state) == len(flat)
    assert_equal(from_hf(state, config), params)


def test_digest_is_of_values_not_of_their_storage() -> None:
    params = random_params(T5_1_0, ml_dtypes.bfloat16)
    digest = param_names.digest(params)
    assert digest == "7450d0b4e9a34c7f690119907517551943d933dd6d794934db90135a4fde37fa"
    assert param_names.digest(param_names.to_t5x(params)) == digest
    assert param_names.digest(jax.tree.map(lambda x: x.astype(np.float32), params)) == digest
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][2, 3, 4] += 1
    assert param_names.digest(params) != digest
