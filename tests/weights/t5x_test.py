"""T5X checkpoints: golden values, both trees, and refusal of damaged and hostile files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util

from hyper_t5 import t5, weights
from hyper_t5.utils.errors import UserError
from hyper_t5.weights import param_names
from tests.support.param_trees import (
    T5_1_0,
    T5X,
    assert_equal,
    edit_json,
    flatten,
    from_t5x,
    random_params,
)
from tests.support.tiny_model import CONFIG, GOLDEN


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Copy the golden checkpoint, for a test that damages it."""
    return shutil.copytree(T5X, tmp_path / "checkpoint_7")


def save_inline(folder: Path, tree: Any) -> Path:
    """Save a T5X checkpoint with all arrays in its msgpack file."""
    folder.mkdir(exist_ok=True)
    tree = jax.tree.map(np.ascontiguousarray, tree)
    content = {"version": 3, "optimizer": {"target": tree, "state": {"step": np.int32(4)}}}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


def test_golden_checkpoint_bit_for_bit() -> None:
    config, params, vocab = weights.load_backbone(T5X)
    assert vocab is None
    golden = json.loads((GOLDEN / "config.json").read_text())
    for field in ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"):
        assert getattr(config, field) == golden[field]
    assert (config.num_encoder_layers, config.num_decoder_layers) == (2, 2)
    assert config.mlp_activations == ("gelu", "linear")
    assert not config.logits_via_embedding
    with np.load(GOLDEN / "params.npz") as arrays:
        assert_equal(params, from_t5x(traverse_util.unflatten_dict(dict(arrays), sep="/")))


def test_bfloat16_in_memory_and_on_disk(shared_dir: Path) -> None:
    exact = flatten(weights.load_backbone(T5X)[1])
    for path, array in flatten(weights.load_backbone(T5X, dtype="bfloat16")[1]).items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, exact[path].astype(ml_dtypes.bfloat16))
    stored = weights.load_backbone(shared_dir / "golden_t5x/bfloat16/checkpoint_7")[1]
    for path, array in flatten(stored).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, exact[path].astype(ml_dtypes.bfloat16))
    with pytest.raises(UserError, match="'float16' is not one of float32, bfloat16"):
        weights.load_backbone(T5X, dtype="float16")


def test_a_single_file_with_inline_arrays(tmp_path: Path) -> None:
    params = random_params(T5_1_0)
    save_inline(tmp_path, param_names.to_t5x(params))
    file = (tmp_path / "checkpoint").rename(tmp_path / "test_t5.checkpoint_0")
    config, loaded, _ = weights.load_backbone(file)
    assert config == T5_1_0
    assert_equal(loaded, params)


def test_without_dot_files(checkpoint: Path) -> None:
    for file in checkpoint.glob("*/.zarray"):
        file.unlink()
    assert_equal(weights.load_backbone(checkpoint)[1], weights.load_backbone(T5X)[1])


def scanned_tree(config: t5.T5Config, params: Any, table: str, heads_split: bool) -> Any:
    """Build the tree of scalable_t5 without our writer."""
    depth = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    heads = (config.num_heads, config.head_dim)
    flat = {}
    for path, array in flatten(params).items():
        stack, _, inner = path.partition("/")
        if inner.startswith("relpos_bias"):
            tables = np.stack([array] * depth[stack], 1)
            flat[f"{stack}/{stack}/{table}/rel_embedding"] = tables
        elif inner.startswith("layers/"):
            if heads_split and "attention/" in path:
                out = path.endswith("out/kernel")
                rest = (*heads, array.shape[2]) if out else (array.shape[1], *heads)
                array = array.reshape(len(array), *rest)
            flat[path.replace("/layers/", f"/{stack}/")] = np.moveaxis(array, 0, 1)
        else:
            flat[path] = array
    return traverse_util.unflatten_dict(flat, sep="/")


@pytest.mark.parametrize("heads_split", [False, True])
@pytest.mark.parametrize("table", ["relpos_bias", "relative_posemb"])
def test_scanned_trees(tmp_path: Path, table: str, heads_split: bool) -> None:
    params = random_params(CONFIG)
    save_inline(tmp_path / "scanned", scanned_tree(CONFIG, params, table, heads_split))
    config, loaded, _ = weights.load_backbone(tmp_path / "scanned")
    assert config == CONFIG
    assert_equal(loaded, params)


def test_a_position_table_per_layer(tmp_path: Path) -> None:
    tree = scanned_tree(CONFIG, random_params(CONFIG), "relative_posemb", True)
    tree["decoder"]["decoder"]["relative_posemb"]["rel_embedding"][0, 1, 0] += 1
    save_inline(tmp_path / "umt5", tree)
    with pytest.raises(UserError, match="differs between layers, as in UMT5"):
        weights.convert(tmp_path / "umt5", tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()


HEAD = "target.decoder.logits_dense.kernel"


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / HEAD / "0.2").unlink(),
        lambda f: os.truncate(f / HEAD / "0.2", 900),
        lambda f: shutil.rmtree(f / HEAD),
        lambda f: edit_json(f / HEAD / ".zarray", shape=[32, 500]),
    ],
    ids=["missing chunk", "truncated chunk", "missing array", "other shape"],
)
def test_damaged_arrays(checkpoint: Path, damage: Callable[[Path], Any]) -> None:
    damage(checkpoint)
    with pytest.raises(UserError, match=r"logits_dense\.kernel: cannot be read"):
        weights.load_backbone(checkpoint)


@pytest.mark.parametrize("size", [0, 5000, 32000])
def test_truncated_msgpack(checkpoint: Path, size: int) -> None:
    os.truncate(checkpoint / "checkpoint", size)
    with pytest.raises(UserError, match="checkpoint: is truncated or not a T5X checkpoint"):
        weights.load_backbone(checkpoint)


def remove(path: str) -> Callable[[dict[str, Any]], Any]:
    return lambda flat: [flat.pop(name) for name in list(flat) if name.startswith(path)]


def replace(path: str, leaf: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda flat: flat.update({path: leaf})


WI = "decoder/layers_2/mlp/wi/kernel"
TABLE = "encoder/relpos_bias/rel_embedding"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("decoder/layers_1/mlp/wo"), "lacks decoder/layers_1/mlp/wo/kernel"),
        (remove("decoder/layers_1/"), "and 10 more"),
        (remove("token_embedder"), "lacks the matrix token_embedder/embedding"),
        (
            replace("encoder/adapter/kernel", np.ones(3, "f4")),
            "holds encoder/adapter/kernel, which this T5 does not have",
        ),
        (replace(WI, np.ones((24, 41), "f4")), r"wi/kernel has shape \[24, 41\], expected \[24, 4"),
        (replace(WI, np.ones((24, 40), "i4")), "has dtype int32"),
        (replace(TABLE, np.ones((3, 32), "f4")), "16 columns, not a multiple of the 3 heads"),
        (replace("a", np.ones(3, "f4")), "holds a, which"),
        (
            lambda flat: flat.update({WI.replace("_2", "_999999999999"): flat.pop(WI)}),
            r"declares 1000000000001 layers, but holds \d+ arrays",
        ),
    ],
)
def test_trees_that_are_not_a_t5(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    flat = flatten(param_names.to_t5x(random_params(T5_1_0)))
    change(flat)
    save_inline(tmp_path, traverse_util.unflatten_dict(flat, sep="/"))
    with pytest.raises(UserError, match=message) as error:
        weights.load_backbone(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x["kvstore"].update(path="/etc/"), "points outside of the checkpoint"),
        (lambda x: x["kvstore"].update(path="a/../../b/"), "points outside of the checkpoint"),
        (lambda x: x["metadata"].update(shape=[10**7, 10**6]), r"has shape .*, expected "),
        (lambda x: x["metadata"].update(shape=["a"]), "neither an array nor a zarr specification"),
        (lambda x: x.update(dtype="object"), "has dtype object, not floating point"),
        (lambda x: x.update(driver="python"), "has the driver 'python'; only zarr is supported"),
    ],
)
def test_hostile_specifications(
    checkpoint: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    file = checkpoint / "checkpoint"
    tree = serialization.msgpack_restore(file.read_bytes())
    change(tree["optimizer"]["target"]["token_embedder"]["embedding"])
    file.write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(UserError, match=message):
        weights.load_backbone(checkpoint)
