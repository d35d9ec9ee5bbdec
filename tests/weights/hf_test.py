"""Hugging Face folders: golden values, every published family in transformers, and refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyper_t5 import weights
from hyper_t5.utils.errors import UserError
from tests.support.param_trees import HF, T5X, assert_equal, edit_json, random_params
from tests.support.tiny_model import CONFIG, TIED

TENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Copy the golden folder, for a test that damages it."""
    return shutil.copytree(HF, tmp_path / "hf")


def test_golden_folder_equals_the_t5x_checkpoint(tmp_path: Path) -> None:
    config, params, _ = weights.load_backbone(HF)
    expected_config, expected, _ = weights.load_backbone(T5X)
    assert config == expected_config
    assert_equal(params, expected)
    weights.save_hf(tmp_path / "hf", config, params)
    ours, theirs = load_file(tmp_path / "hf" / TENSORS), load_file(HF / TENSORS)
    assert_equal(ours, {k: v for k, v in theirs.items() if "embed_tokens" not in k})


@pytest.mark.parametrize("family", ["t5_1_0", "t5_1_1", "mt5", "byt5"])
def test_transformers_folders(tmp_path: Path, family: str) -> None:
    """Through our formats and back into transformers, with equal logits."""
    import torch
    import transformers

    config = dataclasses.replace(
        TIED if family == "t5_1_0" else CONFIG,
        num_encoder_layers=3,
        num_decoder_layers=1 if family == "byt5" else 3,
    )
    weights.save_hf(tmp_path / "start", config, random_params(config))
    model_type = "mt5" if family == "mt5" else "t5"
    edit_json(tmp_path / "start/config.json", model_type=model_type)
    classes = {"t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration"}
    model = getattr(transformers, classes[model_type]).from_pretrained(tmp_path / "start")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    weights.convert(tmp_path / "theirs", tmp_path / "checkpoint_5", "t5x")
    weights.convert(tmp_path / "checkpoint_5", tmp_path / "ours", "hf")
    load = transformers.T5ForConditionalGeneration.from_pretrained
    ids = torch.tensor([[5, 7, 9, 1]])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).logits
        actual = load(tmp_path / "ours")(input_ids=ids, labels=ids).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot in a name."""
    state = load_file(folder / TENSORS)
    for key, array in changes.items():
        name = key.replace("__", ".")
        state.pop(name, None)
        if array is not None:
            state[name] = array
    save_file(state, folder / TENSORS)


def test_a_head_that_transformers_5_left_out(folder: Path) -> None:
    """An untied model whose head equals the embedding, and the flags of its config."""
    edit_tensors(folder, lm_head__weight=None)
    with pytest.raises(UserError, match=r"lacks lm_head\.weight"):
        weights.load_backbone(folder)
    edit_json(folder / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    config, params, _ = weights.load_backbone(folder)
    assert not config.logits_via_embedding
    kernel = params["decoder"]["logits_dense"]["kernel"]
    np.testing.assert_array_equal(kernel, params["token_embedder"]["embedding"].T)
    shared = load_file(folder / TENSORS)["shared.weight"]
    others = dict.fromkeys(("encoder__embed_tokens__weight", "decoder__embed_tokens__weight"))
    edit_tensors(folder, shared__weight=None, lm_head__weight=shared, **others)
    assert_equal(weights.load_backbone(folder)[1], params)


@pytest.mark.parametrize(
    ("config", "aliases"),
    [
        (CONFIG, ("shared", "encoder.embed_tokens", "decoder.embed_tokens")),
        (TIED, ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")),
    ],
    ids=["1.1", "1.0"],
)
def test_any_alias_of_the_embedding(tmp_path: Path, config: Any, aliases: Any) -> None:
    """Any one of the names is enough, and all that are stored are equal."""
    params = random_params(config)
    weights.save_hf(tmp_path / "t5", config, params)
    state = load_file(tmp_path / "t5" / TENSORS)
    shared = state.pop("shared.weight")
    for alias in aliases:
        save_file(state | {f"{alias}.weight": shared}, tmp_path / "t5" / TENSORS)
        assert_equal(weights.load_backbone(tmp_path / "t5")[1], params)
        for other in set(aliases) - {alias}:
            pair = {f"{alias}.weight": shared, f"{other}.weight": shared + 1}
            save_file(state | pair, tmp_path / "t5" / TENSORS)
            with pytest.raises(UserError, match=r"weight differs from .*\.weight"):
                weights.load_backbone(tmp_path / "t5")


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["1.1", "1.0"])
def test_save_model_of_safetensors(tmp_path: Path, config: Any) -> None:
    import transformers
    from safetensors.torch import save_model

    params = random_params(config)
    weights.save_hf(tmp_path / "t5", config, params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "t5")
    save_model(model, str(tmp_path / "t5" / TENSORS))
    assert "shared.weight" not in load_file(tmp_path / "t5" / TENSORS)
    assert_equal(weights.load_backbone(tmp_path / "t5")[1], params)


WRONG = np.ones((3, 5), np.float32)
WO = "decoder__block__1__layer__2__DenseReluDense__wo__weight"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({WO: None}, {}, "lacks decoder.block.1.layer.2.DenseReluDense.wo.weight"),
        ({"adapter__weight": WRONG}, {}, "holds adapter.weight, which this T5 does not have"),
        ({WO: WRONG}, {}, r"DenseReluDense.wo.weight has shape \[3, 5\], expected \[32, 64\]"),
        ({WO: np.ones((64, 32), "f4")}, {}, r"has shape \[64, 32\], .* it is transposed"),
        ({"encoder__embed_tokens__weight": WRONG}, {}, "embed_tokens.weight differs from shared"),
        ({}, {"d_model": 64}, r"has shape \[512, 32\], expected \[512, 64\]"),
        ({}, {"num_layers": 1}, "which this T5 does not have"),
        ({}, {"num_layers": 10**12}, r"declares \d+ layers"),
        ({}, {"vocab_size": 10**12}, r"has shape .*, expected \[10+, 32\]"),
        ({}, {"d_ff": "64"}, "config.json: d_ff must be a positive integer, not '64'"),
        ({}, {"model_type": "umt5"}, "model_type is 'umt5'"),
        ({}, {"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'"),
        ({}, {"layer_norm_epsilon": 1e-5}, "layer_norm_epsilon is 1e-05, and only 1e-06"),
        ({}, {"eos_token_id": 2}, "config.json: eos_token_id is 2, and only 1 is supported"),
        ({}, {"pad_token_id": 3}, "pad_token_id is 3"),
        ({}, {"decoder_start_token_id": 2}, "decoder_start_token_id is 2"),
        ({}, {"dense_act_fn": "silu"}, "dense_act_fn is 'silu', and only 'gelu_new'"),
        ({}, {"is_gated_act": False}, "is_gated_act is False"),
        ({}, {"is_encoder_decoder": False}, "is_encoder_decoder is False"),
        ({}, {"is_decoder": True}, "is_decoder is True"),
        ({}, {"tie_encoder_decoder": True}, "tie_encoder_decoder is True, which is not supported"),
        ({}, {"quantization_config": {"bits": 8}}, "quantization_config is .*not supported"),
        ({}, {"pruned_heads": {"0": [1]}}, "pruned_heads is .*not supported"),
    ],
)
def test_folders_that_do_not_fit(
    folder: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    edit_tensors(folder, **tensors)
    edit_json(folder / "config.json", **config)
    with pytest.raises(UserError, match=message) as error:
        weights.load_backbone(folder)
    assert str(folder) in str(error.value)


def test_ids_of_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 1, "num_beams": 4}')
    weights.load_backbone(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is 2"):
        weights.load_backbone(folder)


@pytest.mark.parametrize("size", [0, 5, 5000, 335_960])
def test_truncated_safetensors(folder: Path, size: int) -> None:
    os.truncate(folder / TENSORS, size)
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated"):
        weights.load_backbone(folder)


def test_pickles_are_not_loaded(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle and is not loaded"):
        weights.load_backbone(folder)


def test_shards_and_their_index(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / TENSORS)
    (folder / TENSORS).unlink()
    weight_map = {name: f"part{i % 2}.safetensors" for i, name in enumerate(sorted(state))}
    for part in ("part0.safetensors", "part1.safetensors"):
        save_file({k: v for k, v in state.items() if weight_map[k] == part}, folder / part)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(weights.load_backbone(folder)[1], weights.load_backbone(T5X)[1])
    assert weight_map["shared.weight"] == "part1.safetensors"
    shutil.copy(folder / "part0.safetensors", tmp_path)
    outside = "is not a safetensors file in this folder"
    cases = {
        "part0.safetensors": "part0.safetensors: lacks shared.weight",
        "missing.safetensors": "missing.safetensors: does not exist",
        "weights.pkl": outside,
        "../part0.safetensors": outside,
        f"{tmp_path}/part0.safetensors": outside,
    }
    for file, message in cases.items():
        edit_json(folder / INDEX, weight_map={**weight_map, "shared.weight": file})
        with pytest.raises(UserError, match=message):
            weights.load_backbone(folder)
    del weight_map["shared.weight"]
    edit_json(folder / INDEX, weight_map=weight_map)
    with pytest.raises(UserError, match=r"part1\.safetensors: also holds shared\.weight"):
        weights.load_backbone(folder)
