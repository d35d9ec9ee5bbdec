"""Backbones in and out of T5X, Hugging Face and native folders."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util
from safetensors.numpy import load_file, save_file

from hyper_t5 import names, t5, tensors, weights
from hyper_t5.errors import UserError
from hyper_t5.vocab import ByteVocabulary, SentencePieceVocabulary, load_vocab

GOLDEN = Path(__file__).parent / "golden"
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


def flat(tree: Any) -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(tree, sep="/").items()}


def assert_same(left: Any, right: Any) -> None:
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for path in left:
        assert left[path].dtype == right[path].dtype, path
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


def random_params(config: t5.T5Config, dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = names.param_shapes(config)
    return traverse_util.unflatten_dict(
        {k: rng.normal(size=s).astype(dtype) for k, s in shapes.items()}, sep="/"
    )


@pytest.fixture
def t5x(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint that a test may damage."""
    return shutil.copytree(T5X, tmp_path / "checkpoint_7")


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return shutil.copytree(HF, tmp_path / "hf")


def edit_hf(folder: Path, **changes: np.ndarray | None) -> None:
    """Replaces, adds or (None) removes tensors; `__` stands for a dot in a name."""
    state = load_file(folder / "model.safetensors")
    for name, array in changes.items():
        state.pop(name.replace("__", "."), None)
        if array is not None:
            state[name.replace("__", ".")] = array
    save_file(state, folder / "model.safetensors")


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("config", [t5.preset("tiny"), T5_1_0], ids=["1.1", "1.0"])
def test_param_shapes_are_those_of_the_model(config: t5.T5Config) -> None:
    tree = jax.eval_shape(lambda: t5.init_params(config, jax.random.key(0)))
    found = traverse_util.flatten_dict(tree, sep="/")
    assert {path: leaf.shape for path, leaf in found.items()} == names.param_shapes(config)


@pytest.mark.parametrize("config", [t5.preset("tiny"), T5_1_0], ids=["1.1", "1.0"])
def test_name_maps_round_trip(config: t5.T5Config) -> None:
    params = random_params(config)
    assert_same(names.from_t5x(names.to_t5x(params)), params)
    state = names.to_hf(params)
    assert all(array.flags.c_contiguous for array in state.values())
    assert_same(names.from_hf(state), params)


def test_from_t5x_refuses_a_gap_in_the_layers() -> None:
    tree = names.to_t5x(random_params(T5_1_0))
    del tree["decoder"]["layers_1"]
    with pytest.raises(UserError, match=r"layers \[0, 2\]"):
        names.from_t5x(tree)


def test_digest_sees_values_and_not_their_storage() -> None:
    params = random_params(T5_1_0, ml_dtypes.bfloat16)
    digest = names.digest(params)
    assert names.digest(names.to_t5x(params)) == digest
    assert names.digest(jax.tree.map(lambda x: x.astype(np.float32), params)) == digest
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][2, 3, 4] += 1
    assert names.digest(params) != digest


# -------------------------------------------------------------------------------------- T5X


def test_t5x_checkpoint_is_read_bit_for_bit() -> None:
    config, params, vocab = weights.load_backbone(T5X)
    assert vocab is None
    wanted = json.loads((GOLDEN / "config.json").read_text())
    for field in ("vocab_size", "emb_dim", "num_heads", "head_dim", "mlp_dim"):
        assert getattr(config, field) == wanted[field]
    assert (config.num_encoder_layers, config.num_decoder_layers) == (2, 2)
    assert config.mlp_activations == ("gelu", "linear")
    assert not config.logits_via_embedding
    with np.load(GOLDEN / "params.npz") as golden:
        assert_same(names.to_t5x(params), traverse_util.unflatten_dict(dict(golden), sep="/"))


def test_t5x_bfloat16_storage() -> None:
    exact = flat(weights.load_backbone(T5X)[1])
    short = flat(weights.load_backbone(T5X, dtype="bfloat16")[1])
    for path, array in short.items():
        assert array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array, exact[path].astype(ml_dtypes.bfloat16))
    with pytest.raises(UserError, match="'float16' is not one of float32, bfloat16"):
        weights.load_backbone(T5X, dtype="float16")


def test_t5x_bfloat16_checkpoint(shared_dir: Path) -> None:
    _, params, _ = weights.load_backbone(shared_dir / "golden_t5x/bfloat16/checkpoint_7")
    exact = flat(weights.load_backbone(T5X)[1])
    for path, array in flat(params).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, exact[path].astype(ml_dtypes.bfloat16))


def inline(tree: dict[str, Any]) -> bytes:
    return serialization.msgpack_serialize({"version": 3, "optimizer": {"target": tree}})


def test_t5x_single_file_with_inline_arrays(tmp_path: Path) -> None:
    params = random_params(T5_1_0)
    file = tmp_path / "test_t5.checkpoint_0"
    file.write_bytes(inline(jax.tree.map(np.ascontiguousarray, names.to_t5x(params))))
    config, found, _ = weights.load_backbone(file)
    assert config == T5_1_0
    assert_same(found, params)


def test_t5x_without_dot_files(t5x: Path) -> None:
    for file in t5x.glob("*/.zarray"):
        file.unlink()
    assert_same(weights.load_backbone(t5x)[1], weights.load_backbone(T5X)[1])


def lose_chunk(folder: Path) -> None:
    (folder / "target.decoder.logits_dense.kernel/0.2").unlink()


def cut_chunk(folder: Path) -> None:
    os.truncate(folder / "target.decoder.logits_dense.kernel/0.2", 900)


def lose_array(folder: Path) -> None:
    shutil.rmtree(folder / "target.decoder.logits_dense.kernel")


def other_shape(folder: Path) -> None:
    file = folder / "target.decoder.logits_dense.kernel/.zarray"
    edit_json(file, shape=[32, 500])


@pytest.mark.parametrize("damage", [lose_chunk, cut_chunk, lose_array, other_shape])
def test_t5x_damaged_arrays_are_named(t5x: Path, damage: Any) -> None:
    damage(t5x)
    with pytest.raises(UserError, match=r"logits_dense\.kernel: cannot be read"):
        weights.load_backbone(t5x)


@pytest.mark.parametrize("size", [0, 5000, 32000])
def test_t5x_truncated_msgpack(t5x: Path, size: int) -> None:
    os.truncate(t5x / "checkpoint", size)
    with pytest.raises(UserError, match="checkpoint: is truncated or not a T5X checkpoint"):
        weights.load_backbone(t5x)


def without(tree: dict[str, Any], path: str) -> dict[str, Any]:
    kept = {k: v for k, v in flat(tree).items() if not k.startswith(path)}
    return traverse_util.unflatten_dict(kept, sep="/")


def with_leaf(tree: dict[str, Any], path: str, leaf: Any) -> dict[str, Any]:
    return traverse_util.unflatten_dict({**flat(tree), path: leaf}, sep="/")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: without(t, "decoder/layers_1/mlp/wo"),
            "lacks decoder/layers_1/mlp/wo/kernel",
        ),
        (lambda t: without(t, "decoder/layers_1/"), "and 10 more"),
        (lambda t: without(t, "token_embedder"), "not a T5.*lacks token_embedder/embedding"),
        (
            lambda t: with_leaf(t, "encoder/adapter/kernel", np.ones(3, np.float32)),
            "holds encoder/adapter/kernel, which this T5 does not have",
        ),
        (
            lambda t: with_leaf(t, "decoder/layers_2/mlp/wi/kernel", np.ones((24, 41), "f4")),
            r"decoder/layers_2/mlp/wi/kernel has shape \[24, 41\], expected \[24, 40\]",
        ),
        (
            lambda t: with_leaf(t, "decoder/layers_2/mlp/wi/kernel", np.ones((24, 40), "i4")),
            "holds int32",
        ),
        (
            lambda t: with_leaf(t, "encoder/relpos_bias/rel_embedding", np.ones((3, 32), "f4")),
            "16 columns, which 3 heads .* do not divide",
        ),
        (lambda t: {"a": "PLACEHOLDER://a"}, "a is neither an array nor a zarr placeholder"),
    ],
)
def test_t5x_trees_that_are_no_t5(tmp_path: Path, change: Any, message: str) -> None:
    tree = jax.tree.map(np.ascontiguousarray, names.to_t5x(random_params(T5_1_0)))
    file = tmp_path / "checkpoint"
    file.write_bytes(inline(change(tree)))
    with pytest.raises(UserError, match=message) as error:
        weights.load_backbone(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_t5x_array_outside_of_the_checkpoint(t5x: Path) -> None:
    tree = serialization.msgpack_restore((t5x / "checkpoint").read_bytes())
    leaf = tree["optimizer"]["target"]["token_embedder"]["embedding"]
    leaf["kvstore"]["path"] = "../elsewhere/"
    (t5x / "checkpoint").write_bytes(serialization.msgpack_serialize(tree))
    with pytest.raises(UserError, match="points outside of the checkpoint"):
        weights.load_backbone(t5x)


# ----------------------------------------------------------------------------- Hugging Face


def test_hf_folder_equals_the_t5x_checkpoint() -> None:
    config, params, _ = weights.load_backbone(HF)
    expected, expected_params, _ = weights.load_backbone(T5X)
    assert config == expected
    assert_same(params, expected_params)


def test_our_hf_folder_equals_transformers_own(tmp_path: Path) -> None:
    config, params, _ = weights.load_backbone(T5X)
    weights.save_hf(tmp_path / "hf", config, params)
    ours, theirs = load_file(tmp_path / "hf/model.safetensors"), load_file(HF / "model.safetensors")
    assert ours.keys() == {k for k in theirs if "embed_tokens" not in k}
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("save", [weights.save_hf, weights.save_native])
@pytest.mark.parametrize("config", [t5.preset("tiny"), T5_1_0], ids=["1.1", "1.0"])
def test_folders_round_trip(tmp_path: Path, config: t5.T5Config, save: Any, dtype: str) -> None:
    params = random_params(config, weights.STORAGE_DTYPES[dtype])
    save(tmp_path / "new/model", config, params, ByteVocabulary(7))
    found, found_params, identity = weights.load_backbone(tmp_path / "new/model", dtype=dtype)
    assert found == config
    assert_same(found_params, params)
    assert identity == ByteVocabulary(7).identity()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["model"]


def test_sharded_hf_folder(hf: Path) -> None:
    state = load_file(hf / "model.safetensors")
    (hf / "model.safetensors").unlink()
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(sorted(state))}
    for part in set(weight_map.values()):
        save_file({k: v for k, v in state.items() if weight_map[k] == part}, hf / part)
    index = hf / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same(weights.load_backbone(hf)[1], weights.load_backbone(T5X)[1])
    (hf / "part1.safetensors").unlink()
    with pytest.raises(UserError, match=r"part1\.safetensors: does not exist"):
        weights.load_backbone(hf)
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../x.safetensors"}}))
    with pytest.raises(UserError, match="points outside of the folder"):
        weights.load_backbone(hf)


def test_hf_head_that_transformers_5_left_out(hf: Path) -> None:
    """An untied model whose head has the embedding's values, and what its flags then say."""
    edit_hf(hf, lm_head__weight=None)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        weights.load_backbone(hf)
    edit_json(hf / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    config, params, _ = weights.load_backbone(hf)
    assert not config.logits_via_embedding
    kernel = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(kernel, params["token_embedder"]["embedding"].T)


WRONG = np.ones((3, 5), np.float32)
HF_WO = "decoder__block__1__layer__2__DenseReluDense__wo__weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({HF_WO: None}, {}, "lacks decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        ({"adapter__weight": WRONG}, {}, "holds adapter.weight, which this T5 does not have"),
        ({HF_WO: WRONG}, {}, r"DenseReluDense.wo.weight has shape \[3, 5\], expected \[32, 64\]"),
        ({"encoder__embed_tokens__weight": WRONG}, {}, "embed_tokens.weight differs from shared"),
        ({}, {"d_model": 64}, r"has shape \[512, 32\], expected \[512, 64\]"),
        ({}, {"num_layers": 1}, "which this T5 does not have"),
        ({}, {"d_ff": "64"}, "config.json: d_ff must be a positive whole number, not '64'"),
        ({}, {"model_type": "umt5"}, "model_type is 'umt5'"),
        ({}, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({}, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05"),
    ],
)
def test_hf_folders_that_do_not_fit(
    hf: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    edit_hf(hf, **tensors)
    edit_json(hf / "config.json", **config)
    with pytest.raises(UserError, match=message) as error:
        weights.load_backbone(hf)
    assert str(hf) in str(error.value)


@pytest.mark.parametrize("size", [0, 5, 5000, 335_960])
def test_truncated_safetensors(hf: Path, size: int) -> None:
    os.truncate(hf / "model.safetensors", size)
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated"):
        weights.load_backbone(hf)


def test_pickles_are_not_opened(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle and is not opened"):
        weights.load_backbone(hf)


# ---------------------------------------------------------------------------- other folders


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no T5 weights"),
        ({"config.json": "{}"}, "describes no T5"),
        ({"config.json": '{\n"format": oops}'}, "config.json, line 2: is not valid JSON"),
        ({"config.json": "[]"}, "must hold a JSON object"),
        ({"_METADATA": "", "checkpoint": ""}, "is an Orbax checkpoint"),
        ({"checkpoint_20/checkpoint": "", "checkpoint_7/checkpoint": ""}, "give one.*_20"),
        ({"config.json": '{"format": "hyper_t5.backbone"}'}, 'lacks the object "model"'),
        (
            {"config.json": '{"format": "hyper_t5.backbone", "model": {"depth": 3}}'},
            "model.depth is no field",
        ),
        (
            {"config.json": '{"format": "hyper_t5.backbone", "model": {"emb_dim": "3"}}'},
            "model.emb_dim must be int, not '3'",
        ),
        (
            {"config.json": '{"format": "hyper_t5.backbone", "model": {}}'},
            "model.safetensors: does not exist",
        ),
    ],
)
def test_folders_without_a_backbone(tmp_path: Path, content: dict[str, str], message: str) -> None:
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        weights.load_backbone(tmp_path)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: does not exist"):
        weights.load_backbone(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file; give the folder"):
        weights.load_backbone(HF / "model.safetensors")


def test_native_wrong_shape(tmp_path: Path) -> None:
    weights.save_native(tmp_path / "b", T5_1_0, random_params(T5_1_0))
    state = load_file(tmp_path / "b/model.safetensors")
    state["encoder/layers/mlp/wo/kernel"] = np.ones((1, 40, 25), np.float32)
    save_file(state, tmp_path / "b/model.safetensors")
    message = r"encoder/layers/mlp/wo/kernel has shape \[1, 40, 25\], expected \[1, 40, 24\]"
    with pytest.raises(UserError, match=message):
        weights.load_backbone(tmp_path / "b")


# ---------------------------------------------------------------------------------- writing


def test_params_of_another_config_are_not_written(tmp_path: Path) -> None:
    other = dataclasses.replace(T5_1_0, mlp_dim=41)
    for save in (weights.save_native, weights.save_hf):
        with pytest.raises(UserError, match="mlp/wi/kernel has shape"):
            save(tmp_path / "new", other, random_params(T5_1_0))
        with pytest.raises(UserError, match=r"has 309 ids, but model\.vocab_size is 300"):
            save(tmp_path / "new", T5_1_0, random_params(T5_1_0), ByteVocabulary(50))
    assert not (tmp_path / "new").exists()


def test_a_folder_with_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"already holds thesis\.tex"):
        weights.save_native(tmp_path, T5_1_0, random_params(T5_1_0))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_keeps_the_earlier_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = random_params(T5_1_0)
    weights.save_native(tmp_path / "b", T5_1_0, params)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors.SafetensorsWriter, "write", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        weights.save_native(tmp_path / "b", T5_1_0, jax.tree.map(lambda x: x + 1, params))
    assert_same(weights.load_backbone(tmp_path / "b")[1], params)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    params = random_params(T5_1_0)
    weights.save_native(tmp_path / "b", T5_1_0, jax.tree.map(lambda x: x + 1, params))
    weights.save_native(tmp_path / "b", T5_1_0, params)
    assert_same(weights.load_backbone(tmp_path / "b")[1], params)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


# ----------------------------------------------------------------------------- compatibility


def test_sentencepiece_model_travels_with_the_weights(tmp_path: Path) -> None:
    # SeqIO ships a small model; to import it would take TensorFlow's four seconds.
    spec = importlib.util.find_spec("seqio")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "test_data/sentencepiece"
    vocab = SentencePieceVocabulary(folder / "sentencepiece.model", 10)
    for save in (weights.save_native, weights.save_hf):
        save(tmp_path / save.__name__, T5_1_0, random_params(T5_1_0), vocab)
        _, _, identity = weights.load_backbone(tmp_path / save.__name__)
        assert identity is not None
        again = load_vocab(identity, tmp_path / save.__name__)
        assert again.identity()["sha256"] == vocab.identity()["sha256"]
        assert again.size == vocab.size


def test_check_compatible() -> None:
    params = random_params(T5_1_0)
    vocab = ByteVocabulary(3).identity()
    meta = weights.backbone_meta(T5_1_0, vocab, params)
    assert meta == json.loads(json.dumps(meta))
    runtime = dataclasses.replace(T5_1_0, dtype="bfloat16", remat="full", dropout_rate=0.1)
    weights.check_compatible(runtime, vocab, meta, digest=names.digest(params))
    weights.check_compatible(T5_1_0, None, meta)

    other = dataclasses.replace(T5_1_0, emb_dim=48, mlp_activations=("gelu", "linear"))
    with pytest.raises(UserError, match=r"w/1: .*emb_dim=24.*has emb_dim=48"):
        weights.check_compatible(other, vocab, meta, where="w/1")
    with pytest.raises(UserError, match=r"bytes, extra_ids=3.*has \(bytes, extra_ids=4\)"):
        weights.check_compatible(T5_1_0, ByteVocabulary(4).identity(), meta)
    with pytest.raises(UserError, match="other weights"):
        weights.check_compatible(T5_1_0, vocab, meta, digest="0" * 64)
    with pytest.raises(UserError, match="does not say which backbone"):
        weights.check_compatible(T5_1_0, vocab, {})
