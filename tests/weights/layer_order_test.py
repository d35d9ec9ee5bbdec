"""Order of layers: trees of 12 layers, in which every array of layer i is filled with i.

T5 base and larger have 12 to 24 layers per stack. Sorted as strings, layer 10 precedes layer 2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from hyper_t5 import runs, t5, weights
from hyper_t5.parallel import sharding
from hyper_t5.weights import param_names
from tests.support import tiny_runs
from tests.support.param_trees import assert_equal

LAYERS = 12
CONFIG = t5.T5Config(
    vocab_size=8,
    emb_dim=4,
    num_heads=2,
    head_dim=2,
    mlp_dim=4,
    num_encoder_layers=LAYERS,
    num_decoder_layers=LAYERS,
    mlp_activations=("relu",),
    logits_via_embedding=True,
)
# Layout -> arguments of `weights.convert`.
LAYOUTS: dict[str, dict[str, Any]] = {
    "native": {"to": "native"},
    "hf": {"to": "hf"},
    "t5x": {"to": "t5x"},
    "scanned": {"to": "t5x", "scanned": True},
}


def numbered_params() -> dict[str, Any]:
    flat = {}
    for path, shape in param_names.param_shapes(CONFIG).items():
        array = np.full(shape, 100, np.float32)
        if "/layers/" in path:
            array = np.broadcast_to(np.arange(LAYERS).reshape(-1, *[1] * (len(shape) - 1)), shape)
        flat[path] = array.astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


def test_the_tree_in_memory_is_numbered_by_layer() -> None:
    names = param_names.to_t5x(numbered_params())
    for i in range(LAYERS):
        for leaf in jax.tree.leaves(names["encoder"][f"layers_{i}"]):
            assert (leaf == i).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_keep_the_order(tmp_path: Path, layout: str) -> None:
    weights.save_native(tmp_path / "first", CONFIG, numbered_params())
    weights.convert(tmp_path / "first", tmp_path / "there", **LAYOUTS[layout])
    assert_equal(weights.load_backbone(tmp_path / "there")[1], numbered_params())
    weights.convert(tmp_path / "there", tmp_path / "back", "native")
    first, back = (load_file(tmp_path / x / "model.safetensors") for x in ("first", "back"))
    assert_equal(back, first)
    run_config = tiny_runs.make_config(backbone__path="t5", mesh__data=4, mesh__model=2)
    shardings = runs._backbone_shardings(
        run_config, sharding.make_placement(run_config.mesh), CONFIG
    )
    loaded = weights.load_sharded(tmp_path / "there", lambda _: shardings)[1]
    assert_equal(sharding.fetch(loaded), numbered_params())


def test_names_of_hugging_face_are_numbered_by_block(tmp_path: Path) -> None:
    """Read with names written out here, so that reader and writer cannot both be wrong."""
    weights.save_hf(tmp_path / "hf", CONFIG, numbered_params())
    state = load_file(tmp_path / "hf" / "model.safetensors")
    for stack, last in (("encoder", 1), ("decoder", 2)):
        for i in range(LAYERS):
            for name in ("layer.0.SelfAttention.q", f"layer.{last}.DenseReluDense.wo"):
                assert (state[f"{stack}.block.{i}.{name}.weight"] == i).all()


def test_sharded_folders_of_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    weights.save_hf(folder, CONFIG, numbered_params())
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part{i % 3}.safetensors" for i, name in enumerate(sorted(state))}
    for part in set(weight_map.values()):
        save_file({k: v for k, v in state.items() if weight_map[k] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(weights.load_backbone(folder)[1], numbered_params())


@pytest.mark.parametrize("axis", [0, 1])
def test_scanned_checkpoints_of_either_axis(tmp_path: Path, axis: int) -> None:
    flat = {}
    for path, array in traverse_util.flatten_dict(numbered_params(), sep="/").items():
        stack, _, inner = path.partition("/")
        if inner.startswith("relpos_bias"):
            table = np.stack([array] * LAYERS, axis)
            flat[f"{stack}/{stack}/relative_posemb/rel_embedding"] = table
        elif inner.startswith("layers/"):
            flat[path.replace("/layers/", f"/{stack}/")] = np.moveaxis(array, 0, axis)
        else:
            flat[path] = array
    tree = traverse_util.unflatten_dict(jax.tree.map(np.ascontiguousarray, flat), sep="/")
    content = {"version": 3, "optimizer": {"target": tree, "state": {"step": np.int32(4)}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    assert_equal(weights.load_backbone(tmp_path)[1], numbered_params())


def test_inline_checkpoints(tmp_path: Path) -> None:
    target = param_names.to_t5x(numbered_params())
    target = jax.tree.map(np.ascontiguousarray, target)
    content = {"version": 3, "optimizer": {"target": target, "state": {"step": np.int32(4)}}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    assert_equal(weights.load_backbone(tmp_path)[1], numbered_params())
