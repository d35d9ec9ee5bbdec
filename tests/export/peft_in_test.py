"""PEFT folders saved by `peft`, read with the same effect; and refusal of others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hyper_t5 import adapters as ad
from hyper_t5 import export, t5
from hyper_t5.adapters import Adapters, AdapterSpec
from hyper_t5.export import native, peft_in
from hyper_t5.export.peft_names import modules_of
from hyper_t5.utils.errors import UserError
from tests.support.tiny_peft import (
    DEC_PREFIX,
    GATED,
    TASK,
    TIED,
    WIDE,
    assert_same_effect,
    assert_same_outputs,
    load_model,
    lora,
    patterned,
    random_adapters,
    save_backbone,
)

# Warnings of peft about LoRA biases.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .*invalid shape"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[t5.T5Config, Path]:
    """Config -> its random backbone as a Hugging Face folder."""
    root = tmp_path_factory.mktemp("hf")
    return {config: save_backbone(root / str(i), config) for i, config in enumerate((GATED, TIED))}


def save_with_peft(base: Path, folder: Path, peft_config: Any) -> Any:
    """Save a PeftModel with random weights, and load it again as a user would."""
    import peft
    import torch

    torch.manual_seed(0)
    model: Any = peft.get_peft_model(load_model(base), peft_config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 1.0)
    model.save_pretrained(folder)
    return load_model(base, folder)


Updates = dict[str, tuple[np.ndarray, np.ndarray]]  # module -> of weight [out, in], of output [out]


def our_updates(adapters: Adapters, config: t5.T5Config) -> Updates:
    spec, updates = adapters.spec.lora, {}
    assert spec
    for module, (target, layer) in modules_of(config).items():
        fan_in, fan_out = ad.projection_shape(target, config)
        updates[module] = np.zeros((fan_out, fan_in)), np.zeros(fan_out)
        if target in spec.targets:
            site, _, projection = target.partition(".")
            leaf = {k: v[layer, 0] for k, v in adapters.tree[site][projection].items()}
            scale, bias = spec.scale_of(target), leaf.get("bias", updates[module][1])
            updates[module] = scale * (leaf["a"] @ leaf["b"]).T, scale * bias
    return updates


def peft_updates(model: Any, config: t5.T5Config) -> Updates:
    updates = {}
    for module, (target, _) in modules_of(config).items():
        fan_in, fan_out = ad.projection_shape(target, config)
        layer = model.base_model.model.get_submodule(module)
        delta, bias = np.zeros((fan_out, fan_in)), np.zeros(fan_out)
        if hasattr(layer, "lora_A"):
            up, scale = layer.lora_B["default"], layer.scaling["default"]
            delta = layer.get_delta_weight("default").detach().numpy()
            bias = scale * up.bias.detach().numpy() if up.bias is not None else bias
        updates[module] = delta, bias
    return updates


LORA_CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q", "v"], "r": 3, "lora_alpha": 5},
    "default": {"target_modules": None},
    "regex": {
        "target_modules": r".*decoder\.block\.\d+\.layer\.1\.EncDecAttention\.(q|o)",
        "r": 4,
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_bias": True},
    "bias and alpha of a block": {
        "target_modules": ["q", "wo"],
        "lora_bias": True,
        "alpha_pattern": {r"block\.1\..*": 5},
    },
    "one layer": {
        "target_modules": ["q", "wo"],
        "layers_to_transform": 1,
        "layers_pattern": "block",
    },
    "layers": {
        "target_modules": ["k", "encoder.block.0.layer.0.SelfAttention.o"],
        "layers_to_transform": [0, 2],
    },
    "excluded": {"target_modules": ["q", "v"], "exclude_modules": r"encoder\..*"},
    "excluded by name": {"target_modules": ["q", "v"], "exclude_modules": ["SelfAttention.q"]},
    "patterns": {
        "target_modules": ["q", "o", "wo"],
        "r": 4,
        "lora_alpha": 6,
        # A layer, the end of a name, and an overlap; in alphabetical order, in which PEFT saves.
        "rank_pattern": {
            "SelfAttention.o": 5,
            r"decoder.block.1.layer.0.SelfAttention.q": 7,
            r"decoder\..*": 2,
        },
        "alpha_pattern": {r"block\.2\..*": 9, "wo": 3},
    },
    "rslora patterns": {
        "target_modules": ["q", "v"],
        "use_rslora": True,
        "rank_pattern": {r"encoder\.block\.0\..*q": 3, "EncDecAttention.v": 6},
    },
    "gaussian init": {"target_modules": ["k"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_saved_by_peft(bases: Any, tmp_path: Path, case: str) -> None:
    import peft

    config = TIED if case in ("all-linear", "patterns") else GATED
    peft_config = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **LORA_CASES[case])
    model = save_with_peft(bases[config], tmp_path / "peft", peft_config)
    adapters, content = peft_in.load_peft(tmp_path / "peft", config)
    assert content["base_model_name_or_path"] == str(bases[config])
    ad.check(adapters, config, case)
    ours, theirs = our_updates(adapters, config), peft_updates(model, config)
    for module, (delta, bias) in theirs.items():
        np.testing.assert_allclose(ours[module][0], delta, atol=1e-5, err_msg=module)
        np.testing.assert_allclose(ours[module][1], bias, atol=1e-6, err_msg=module)
    changed = [module for module, (delta, _) in theirs.items() if delta.any()]
    assert 1 <= len(changed) < len(theirs) or case == "all-linear"
    if case == "rslora patterns":
        assert_same_effect(model, config, adapters)


PREFIX_CASES: dict[str, dict[str, Any]] = {
    "natural": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 8},
    "a layer each": {"num_layers": 6},
    "deeper": {"num_layers": 4},
}


@pytest.mark.parametrize("case", PREFIX_CASES)
def test_prefix_saved_by_peft(bases: Any, tmp_path: Path, case: str) -> None:
    import peft

    fields = {"num_virtual_tokens": 4, "num_layers": 3, "token_dim": 16, "num_attention_heads": 2}
    peft_config = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **(fields | PREFIX_CASES[case]))
    model = save_with_peft(bases[GATED], tmp_path / "peft", peft_config)
    adapters, _ = peft_in.load_peft(tmp_path / "peft", GATED)
    assert_same_effect(model, GATED, adapters)
    if case == "natural":
        assert_same_outputs(model, GATED, adapters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spec",
    [patterned(GATED, bias=True), lora("enc_self.query", "enc_self.value"), DEC_PREFIX],
    ids=["patterns", "regex", "prefix"],
)
@pytest.mark.parametrize("config", [GATED, WIDE], ids=["deep", "wide"])
def test_export_and_import_are_inverse(
    tmp_path: Path, spec: AdapterSpec, config: t5.T5Config, dtype: str
) -> None:
    adapters = random_adapters(spec, config)
    export.export_peft(tmp_path / "a", adapters, config, "base", TASK, dtype)
    imported, _ = peft_in.load_peft(tmp_path / "a", config)
    assert imported.spec == spec
    expected = ad.astype(ad.astype(ad.take(adapters, [TASK]), dtype), np.float32)
    jax.tree.map(np.testing.assert_array_equal, imported.tree, expected.tree)


def test_default_fields_of_peft_are_known(tmp_path: Path) -> None:
    """Also those of a new version of PEFT."""
    import peft

    for kind in (peft.LoraConfig, peft.PrefixTuningConfig):
        kind(task_type="SEQ_2_SEQ_LM").save_pretrained(tmp_path)
        peft_in.check_fields(json.loads((tmp_path / export.PEFT_CONFIG).read_text()), tmp_path)


# ----------------------------------------------------------------------------------- refused


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a valid LoRA folder, without torch."""
    adapters = random_adapters(lora("enc_self.query", "dec_self.query"), GATED)
    return export.export_peft(tmp_path / "good", adapters, GATED, "base", TASK)


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        peft_in.load_peft(folder, GATED)
    assert "\n" not in str(error.value)


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / export.PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; .* merge it in peft"),
    ({"use_dora": True}, "use_dora=True scales weights by their norms; merge it in peft"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* replaces whole modules"),
    ({"trainable_token_indices": [3]}, "changes the embedding"),
    ({"invented_in_2031": {"a": 1}}, "invented_in_2031=.* whose effect is not known here"),
    ({"bias": "lora_only"}, "bias='lora_only' trains biases"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the weights"),
    ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' belongs to a T5 with another head"),
    ({"target_modules": ["lm_head"]}, "matches no projection of this T5"),
    ({"target_modules": "(((q"}, "target_modules: .* is not a regex"),
    ({"target_modules": ["q"]}, "lacks .*EncDecAttention.q.lora_A.weight.* requires"),
    (
        {"target_modules": r"encoder\..*SelfAttention\.q"},
        r"holds .*decoder\..*, which .* does not select",
    ),
    ({"r": 10**9}, r"shape \[4, 24\].* require \[1000000000, 24\]"),
    ({"r": "4"}, "rank '4' and alpha 6 must be positive numbers"),
    ({"lora_alpha": 0}, "rank 4 and alpha 0 must be positive numbers"),
    ({"lora_alpha": float("nan")}, "rank 4 and alpha nan must be positive numbers"),
    ({"rank_pattern": {"q": 2.5}}, "rank 2.5 and alpha 6 must be positive numbers"),
    ({"alpha_pattern": {"(q": 2}}, "is not a valid PEFT config"),
    ({"lora_bias": True}, "lacks .*lora_B.bias"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS, ids=[next(iter(f)) for f, _ in FIELDS])
def test_fields_that_cannot_be_expressed(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    edit_config(folder, **fields)
    assert_refused(folder, message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_transformer_submodules": 1}, "only 2 works with a T5"),
        ({"num_layers": 2}, "leaves 1 of the 3 decoder layers without a prefix"),
        ({"num_attention_heads": 4}, "has 4 heads and token_dim 16, this backbone has 2 and 16"),
        ({"token_dim": 24}, "has 2 heads and token_dim 24"),
        ({"num_layers": None}, "is not a valid PEFT config"),
        ({"num_virtual_tokens": 5}, r"shape \[3, 192\].* require \[5, 192\]"),
    ],
)
def test_a_prefix_that_does_not_fit(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    adapters = random_adapters(DEC_PREFIX, GATED)
    folder = export.export_peft(tmp_path / "prefix", adapters, GATED, "base", TASK)
    edit_config(folder, **fields)
    assert_refused(folder, message)


NAME = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight"
PICKLE = b"cos\nsystem\n(S'touch owned'\ntR."


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / export.PEFT_TENSORS)
        change(tensors)
        save_file(tensors, folder / export.PEFT_TENSORS)

    return edit


def set_tensor(array: np.ndarray, name: str = NAME) -> Callable[[Path], None]:
    return edit_tensors(lambda tensors: tensors.update({name: array}))


def replace_by_pickle(folder: Path) -> None:
    (folder / export.PEFT_TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


def replace_by_pipe(folder: Path) -> None:
    (folder / export.PEFT_TENSORS).unlink()
    os.mkfifo(folder / export.PEFT_TENSORS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (set_tensor(np.full((16, 4), np.nan, "f4")), f"{NAME} has non-finite values"),
        (set_tensor(np.full((16, 4), 1e300)), f"{NAME} has non-finite values"),
        (set_tensor(np.ones((4, 16), "f4")), r"has shape \[4, 16\].* require \[16, 4\]"),
        (
            set_tensor(np.ones((4, 16), "f4"), "../../x"),
            r"holds \.\./\.\./x, which .* does not select",
        ),
        (edit_tensors(lambda tensors: tensors.pop(NAME)), f"lacks {NAME}, which adapter_config"),
        (lambda f: os.truncate(f / export.PEFT_TENSORS, 900), "adapter_model.safetensors: "),
        (lambda f: (f / export.PEFT_TENSORS).write_bytes(PICKLE), "adapter_model.safetensors: "),
        (replace_by_pickle, "adapter_model.bin: is a pickle, .* safe_serialization=True"),
        (replace_by_pipe, "adapter_model.safetensors: is no regular file"),
        (
            lambda f: (f / export.PEFT_CONFIG).write_text("[]"),
            "adapter_config.json: .* JSON object",
        ),
    ],
)
def test_a_damaged_folder(
    folder: Path, damage: Callable[[Path], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    damage(folder)
    assert_refused(folder, message)
    assert [p.name for p in folder.parent.iterdir()] == ["good"]  # no pickle was executed


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
)
VALID = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q"],
    "rank_pattern": {"q": 4},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "bias": "none",
    "use_rslora": False,
    "init_lora_weights": True,
    "num_virtual_tokens": 3,
    "num_layers": 6,
    "num_attention_heads": 2,
    "token_dim": 16,
    "num_transformer_submodules": 2,
}


@given(
    fields=st.dictionaries(st.sampled_from(sorted(VALID)), JSON, max_size=3),
    kind=st.sampled_from(["LORA", "PREFIX_TUNING"]),
)
def test_any_invalid_config_is_refused_with_one_line(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], kind: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    save_file({"x": np.zeros(3, np.float32)}, folder / export.PEFT_TENSORS)
    (folder / export.PEFT_CONFIG).write_text(json.dumps(VALID | {"peft_type": kind} | fields))
    assert_refused(folder, ": ")


@given(st.dictionaries(st.sampled_from(["lora", "prefix", "bottleneck", "memory", "x"]), JSON))
def test_any_native_spec_is_read_or_refused(data: dict[str, Any]) -> None:
    spec = AdapterSpec(lora=lora("enc_self.query").lora, prefix=DEC_PREFIX.prefix)
    valid = native.spec_to_json(spec)
    for name in ("lora", "prefix"):
        if isinstance(data.get(name), dict):
            data[name] = valid[name] | dict(zip(valid[name], data[name].values(), strict=False))
    try:
        spec = native.spec_from_json(data)
    except ValueError:
        return
    assert native.spec_from_json(native.spec_to_json(spec)) == spec
