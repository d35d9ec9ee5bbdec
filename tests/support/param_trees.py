"""Parameter trees for tests: random ones, and conversion of T5X's and Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5 import t5
from hyper_t5.weights import param_names
from hyper_t5.weights.load import open_source
from tests.support.tiny_model import GOLDEN

T5X = GOLDEN / "checkpoint_7"
HF = GOLDEN / "hf_model"
# T5 1.0 with unequal depths and H*K != D.
T5_1_0 = t5.T5Config(
    vocab_size=300,
    emb_dim=24,
    num_heads=2,
    head_dim=8,
    mlp_dim=40,
    num_encoder_layers=1,
    num_decoder_layers=3,
    mlp_activations=("relu",),
    logits_via_embedding=True,
)


def random_params(config: t5.T5Config, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = param_names.param_shapes(config)
    return traverse_util.unflatten_dict(
        {path: rng.normal(size=shape).astype(dtype) for path, shape in shapes.items()}, sep="/"
    )


def flatten(tree: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def assert_equal(actual: Any, expected: Any) -> None:
    """Compare names, dtypes and values."""
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for path in expected:
        assert actual[path].dtype == expected[path].dtype, path
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def stored_arrays(folder: Path) -> dict[str, np.ndarray]:
    """Read every array of a folder in its stored dtype, under T5X's per-layer path."""
    return {path: tensor.read() for path, tensor in open_source(folder).tensors.items()}


def from_t5x(tree: Any) -> dict[str, Any]:
    """Convert T5X's per-layer tree into our stacked tree; inverse of `param_names.to_t5x`."""
    flat: dict[str, np.ndarray] = {}
    stacked: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in flatten(tree).items():
        name, layer = param_names.stacked_path(path)
        if layer is None:
            flat[name] = leaf
        else:
            stacked.setdefault(name, {})[layer] = leaf
    flat |= {
        name: np.stack([layers[i] for i in sorted(layers)]) for name, layers in stacked.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def from_hf(state: Mapping[str, np.ndarray], config: t5.T5Config) -> dict[str, Any]:
    """Convert a Hugging Face state dict into our stacked tree."""
    flat = {}
    for path in param_names.layer_shapes(config):
        array = state[param_names.hf_name(path)]
        flat[path] = array.T if param_names.hf_transposed(path) else array
    return from_t5x(traverse_util.unflatten_dict(flat, sep="/"))


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
