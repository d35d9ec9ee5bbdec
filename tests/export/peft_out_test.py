"""Exported PEFT folders in `peft` and `transformers`, on the exported backbone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hyper_t5 import adapters as ad
from hyper_t5 import export, t5
from hyper_t5.adapters import Adapters, AdapterSpec, PrefixSpec
from hyper_t5.utils.errors import UserError
from tests.support.tiny_peft import (
    CONFIGS,
    DEC_PREFIX,
    GATED,
    SLOTS,
    TASK,
    TIED,
    assert_close,
    assert_differs,
    assert_same_effect,
    assert_same_outputs,
    backbone,
    base_logits,
    load_model,
    logits,
    lora,
    model_logits,
    patterned,
    random_adapters,
    save_backbone,
)

# Warnings of peft: for every T5 with an untied head when it merges, and for layers without a bias.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

QUERY_VALUE = tuple(f"{site}.{name}" for site in ad.ATTENTION_SITES for name in ("query", "value"))
MIXED = ("enc_self.value", "dec_cross.query", "dec_cross.out", "dec_mlp.wo")


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=list(CONFIGS))
def exported(request: Any, tmp_path_factory: Any) -> tuple[t5.T5Config, Path]:
    """Return a config, and its random backbone as a Hugging Face folder."""
    return request.param, save_backbone(tmp_path_factory.mktemp("hf") / "model", request.param)


def export_to(folder: Path, adapters: Adapters, config: t5.T5Config, base: Any = "base") -> Path:
    return export.export_peft(folder / "adapter", adapters, config, str(base), TASK)


def test_exported_backbone(exported: Any) -> None:
    config, folder = exported
    assert_close(model_logits(load_model(folder)), base_logits(config))


@pytest.mark.parametrize(
    ("exported", "targets", "bias"),
    [
        pytest.param(config, targets, bias, id=f"{name}-{label}")
        for label, targets, bias, names in [
            ("query-value", QUERY_VALUE, False, ("1.1", "1.0")),
            ("everything", ad.SITES, False, ("1.1", "1.0")),
            ("everything-bias", ad.SITES, True, ("1.1", "1.0")),
            ("mixed sites", MIXED, False, CONFIGS),
        ]
        for name, config in CONFIGS.items()
        if name in names
    ],
    indirect=["exported"],
)
def test_lora(exported: Any, tmp_path: Path, targets: Any, bias: bool) -> None:
    config, base = exported
    if targets == ad.SITES:
        targets = ad.targets_of(ad.SITES, config)
    adapters = random_adapters(lora(*targets, bias=bias), config)
    model = load_model(base, export_to(tmp_path, adapters, config, base))
    assert_same_effect(model, config, ad.take(adapters, [TASK]))
    actual, params = model_logits(model), backbone(config)
    assert_differs(actual, logits(config, params, ad.take(adapters, [TASK + 1])))
    if bias:
        with pytest.raises(UserError, match="has a LoRA bias"):
            export.merge_lora(params, adapters, TASK)
        return
    merged = export.merge_lora(params, adapters, TASK)
    assert_close(logits(config, merged, None), actual)
    assert_close(model_logits(model.merge_and_unload()), actual)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_rank_patterns(exported: Any, tmp_path: Path, bias: bool) -> None:
    config, base = exported
    adapters = random_adapters(patterned(config, bias), config)
    folder = export_to(tmp_path, adapters, config, base)
    peft_config = json.loads((folder / export.PEFT_CONFIG).read_text())
    assert sorted(peft_config["rank_pattern"].values()) == [2, 4, 7]
    assert sorted(peft_config["alpha_pattern"].values()) == [2.5, 6, 6]
    model, task = load_model(base, folder), ad.take(adapters, [TASK])
    assert_same_effect(model, config, task)
    if not bias:
        assert_same_outputs(model, config, task)
        merged = export.merge_lora(backbone(config), adapters, TASK)
        assert_close(logits(config, merged, None), model_logits(model))


def test_decoder_prefix(exported: Any, tmp_path: Path) -> None:
    config, base = exported
    adapters = random_adapters(DEC_PREFIX, config, mask=True)
    model = load_model(base, export_to(tmp_path, adapters, config, base))
    task = ad.take(adapters, [TASK])
    assert_same_effect(model, config, task)
    assert_same_outputs(model, config, task)


def test_bfloat16(exported: Any, tmp_path: Path) -> None:
    """PEFT loads it as float32: the effect is that of the rounded adapters."""
    import torch

    config, base = exported
    adapters = random_adapters(patterned(config) if config != TIED else DEC_PREFIX, config)
    folder = export.export_peft(tmp_path / "a", adapters, config, str(base), TASK, "bfloat16")
    stored = load_file(folder / export.PEFT_TENSORS)
    assert {x.dtype.name for x in stored.values()} == {"bfloat16"}
    assert "bfloat16" in (folder / "README.md").read_text()
    model = load_model(base, folder)
    loaded = [p for n, p in model.named_parameters() if "lora_" in n or "prompt_" in n]
    assert {p.dtype for p in loaded} == {torch.float32}
    rounded = ad.astype(ad.take(adapters, [TASK]), jnp.bfloat16)
    assert_same_effect(model, config, ad.astype(rounded, jnp.float32))


# -------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (QUERY_VALUE, ["q", "v"]),
        (ad.targets_of(("enc_mlp", "dec_mlp"), GATED), ["wi_0", "wi_1", "wo"]),
        (ad.targets_of(ad.SITES, GATED), ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]),
        (
            ("enc_self.query", "enc_self.value"),
            r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|v)",
        ),
        (
            (*QUERY_VALUE[:-1], "dec_mlp.wo"),
            r"decoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|v)"
            r"|decoder\.block\.\d+\.layer\.1\.EncDecAttention\.(q)"
            r"|decoder\.block\.\d+\.layer\.2\.DenseReluDense\.(wo)"
            r"|encoder\.block\.\d+\.layer\.0\.SelfAttention\.(q|v)",
        ),
    ],
)
def test_target_modules(tmp_path: Path, targets: Any, expected: Any) -> None:
    folder = export_to(tmp_path, random_adapters(lora(*targets), GATED), GATED)
    config = json.loads((folder / export.PEFT_CONFIG).read_text())
    assert config["target_modules"] == expected
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert "lora_bias" not in config


def test_the_folder_holds_exactly_one_task(tmp_path: Path) -> None:
    adapters = random_adapters(lora("dec_self.out", bias=True), GATED)
    folder = export_to(tmp_path, adapters, GATED, "google/t5-v1_1-small")
    names = {export.PEFT_CONFIG, export.PEFT_TENSORS, "README.md"}
    assert {p.name for p in folder.iterdir()} == names
    assert "google/t5-v1_1-small" in (folder / "README.md").read_text()
    leaf, state = adapters.tree["dec_self"]["out"], load_file(folder / export.PEFT_TENSORS)
    assert len(state) == 3 * GATED.num_decoder_layers
    for i in range(GATED.num_decoder_layers):
        module = f"base_model.model.decoder.block.{i}.layer.0.SelfAttention.o"
        np.testing.assert_array_equal(state[f"{module}.lora_A.weight"], leaf["a"][i, TASK].T)
        np.testing.assert_array_equal(state[f"{module}.lora_B.weight"], leaf["b"][i, TASK].T)
        np.testing.assert_array_equal(state[f"{module}.lora_B.bias"], leaf["bias"][i, TASK])


# ----------------------------------------------------------------------------------- refused


def prefix(*sites: str, bias: str = "hf") -> AdapterSpec:
    return AdapterSpec(prefix=PrefixSpec(sites, SLOTS, bias))


BOTH = AdapterSpec(lora=lora("enc_self.query").lora, prefix=DEC_PREFIX.prefix)
BOTTLENECK = AdapterSpec(bottleneck=ad.BottleneckSpec(("dec_mlp",), (2,)))


@pytest.mark.parametrize(
    ("spec", "mask", "message"),
    [
        (prefix("enc_self", "dec_self"), None, "not at enc_self; train with .*dec_self.* or keep"),
        (prefix("dec_cross"), None, "not at dec_cross; train with .*dec_self.* or keep"),
        (prefix("dec_self", bias="zero"), None, "position_bias='zero'; train with 'hf', or keep"),
        (DEC_PREFIX, [True, False, True], "3 of the prefix slots are masked.* or keep"),
        (BOTH, None, "cannot have LoRA and prefixes active together; emit one of them, or keep"),
        (BOTTLENECK, None, "PEFT has no bottleneck adapters .* or keep"),
        (AdapterSpec(memory=2), None, "PEFT cannot add memory .* or keep"),
    ],
)
def test_what_peft_cannot_express(
    tmp_path: Path, spec: AdapterSpec, mask: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_to(tmp_path, random_adapters(spec, GATED, mask), GATED)
    assert not any(tmp_path.iterdir())


def test_adapters_that_do_not_fit_or_are_not_finite(tmp_path: Path) -> None:
    adapters = random_adapters(lora("enc_self.query"), GATED)
    with pytest.raises(UserError, match=r"task 5 does not exist; the adapters have 3"):
        export.export_peft(tmp_path / "a", adapters, GATED, "base", 5)
    with pytest.raises(UserError, match="this backbone"):
        export_to(tmp_path, adapters, dataclasses.replace(GATED, emb_dim=32))
    leaf = adapters.tree["enc_self"]["query"]
    leaf["b"] = leaf["b"].at[0, TASK, 0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="enc_self/query/b of task 1 has non-finite values"):
        export_to(tmp_path, adapters, GATED)
    assert not any(tmp_path.iterdir())
