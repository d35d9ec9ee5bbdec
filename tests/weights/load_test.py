"""Loading of backbones: detection, round trips in memory, vocabularies, and placement on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyper_t5 import hypermodels, runs, t5, weights
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.parallel import sharding
from hyper_t5.utils import safetensors_io
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.param_trees import HF, T5_1_0, assert_equal, random_params
from tests.support.tiny_model import CONFIG


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("save", [weights.save_hf, weights.save_native])
@pytest.mark.parametrize("config", [t5.preset("tiny"), T5_1_0], ids=["1.1", "1.0"])
def test_saved_folders(tmp_path: Path, config: t5.T5Config, save: Any, dtype: str) -> None:
    params = random_params(config, weights.STORAGE_DTYPES[dtype])
    save(tmp_path / "new/model", config, params, ByteVocabulary(7))
    loaded_config, loaded, identity = weights.load_backbone(tmp_path / "new/model", dtype=dtype)
    assert loaded_config == config
    assert_equal(loaded, params)
    assert identity == ByteVocabulary(7).identity()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no T5 weights"),
        ({"config.json": "{}"}, "holds no T5 weights"),
        ({"config.json": '{\n"format": oops}'}, "config.json, line 2: .*valid JSON"),
        ({"_METADATA": "", "checkpoint": ""}, "is an Orbax checkpoint"),
        (
            {"snapshots/0a1/config.json": "{}", "refs/main": "0a1"},
            "use a snapshot .*/snapshots/0a1$",
        ),
        ({"models--t5/snapshots/0a1/config.json": "{}"}, "is a cache .*--t5/snapshots/0a1$"),
        ({"checkpoint_20/checkpoint": "", "checkpoint_7/checkpoint": ""}, "use one.*_20"),
        ({"config.json": '{"format": "hyper_t5.backbone"}'}, 'lacks the object "model"'),
        (
            {"config.json": '{"format": "hyper_t5.backbone", "model": {"depth": 3}}'},
            "config.json: model: .*'depth'",
        ),
        (
            {"config.json": '{"format": "hyper_t5.backbone", "model": {}}'},
            "model.safetensors: does not exist",
        ),
    ],
)
def test_folders_without_a_backbone(tmp_path: Path, content: dict[str, str], message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        weights.load_backbone(tmp_path)


def test_paths_that_are_not_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        weights.load_backbone(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file; use its folder"):
        weights.load_backbone(HF / "model.safetensors")


def test_native_shapes(tmp_path: Path) -> None:
    weights.save_native(tmp_path / "t5", T5_1_0, random_params(T5_1_0))
    file, path = tmp_path / "t5/model.safetensors", "encoder/layers/mlp/wo/kernel"
    for shape, message in (((1, 40, 25), "use config and weights"), ((1, 24, 40), "transposed")):
        save_file(load_file(file) | {path: np.ones(shape, np.float32)}, file)
        with pytest.raises(UserError, match=rf"{path} has shape .*\[1, 40, 24\].*{message}"):
            weights.load_backbone(tmp_path / "t5")


def count_reads(read: Callable[..., Any], files: list[str]) -> Callable[..., Any]:
    def counted(self: Any, *args: Any) -> Any:
        files.append(self.file)
        return read(self, *args)

    return counted


@pytest.mark.parametrize("layout", ["t5x", "scanned", "hf", "native"])
def test_load_sharded(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, digest and shardings equal those of a tree in memory; each array is read once."""
    run_config = tiny_runs.make_config(backbone__path="t5", mesh__data=4, mesh__model=2)
    placement = sharding.make_placement(run_config.mesh)
    config = dataclasses.replace(CONFIG, num_heads=2, head_dim=8, vocab_size=64)
    params = random_params(config)
    weights.save_native(tmp_path / "first", config, params)
    to, scanned = ("t5x", True) if layout == "scanned" else (layout, False)
    weights.convert(tmp_path / "first", tmp_path / "t5", to, scanned=scanned)
    shardings = runs._backbone_shardings(run_config, placement, config)
    files: list[str] = []
    monkeypatch.setattr(
        safetensors_io.Tensor, "read", count_reads(safetensors_io.Tensor.read, files)
    )
    loaded_config, loaded, _, digest = weights.load_sharded(
        tmp_path / "t5", lambda _: shardings, dtype="bfloat16"
    )
    assert loaded_config == config
    expected = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    assert digest == weights.digest(expected)
    assert_equal(sharding.fetch(loaded), expected)
    put = sharding.device_put(expected, shardings)
    for leaf, other in zip(jax.tree.leaves(loaded), jax.tree.leaves(put), strict=True):
        assert leaf.sharding == other.sharding
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(loaded))
    if layout != "scanned":
        assert len(files) == len(weights.open_source(tmp_path / "t5").tensors)


def test_a_run_on_a_mesh_starts_as_on_one_device(tmp_path: Path) -> None:
    """The hypermodel's copy of the backbone is its own, because training donates it."""
    folder = tiny_runs.save_backbone(tmp_path / "t5")
    config = tiny_runs.make_config(backbone__path=str(folder), mesh__data=4, mesh__model=2)
    config.hypermodel.init = "backbone"
    mesh = runs.init_run(config, sharding.make_placement(config.mesh))
    single = runs.init_run(config)
    assert mesh[1].known_digest == single[1].digest
    assert runs.checkpoint_meta(config, mesh[1]) == runs.checkpoint_meta(config, single[1])
    for leaf, other in zip(jax.tree.leaves(mesh[2:]), jax.tree.leaves(single[2:]), strict=True):
        np.testing.assert_array_equal(sharding.fetch(leaf), other)
    assert hypermodels.HYPERMODEL in mesh[2]
    assert hypermodels.BACKBONE in mesh[3]
    frozen = jax.tree.leaves(mesh[3])
    before = [np.asarray(leaf) for leaf in frozen]
    for leaf in jax.tree.leaves(mesh[2]):
        leaf.delete()
    for leaf, values in zip(frozen, before, strict=True):
        np.testing.assert_array_equal(leaf, values)
