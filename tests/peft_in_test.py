"""Adapters that the real `peft` saved, read by us; and folders that nobody should trust."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import runs
from export_test import (
    DEC_PREFIX,
    GATED,
    TASK,
    TIED,
    WIDE,
    assert_close,
    assert_differs,
    assert_generates,
    backbone,
    load,
    lora,
    our_logits,
    patterned,
    random_adapters,
    their_logits,
)
from hyper_t5 import adapters as ad
from hyper_t5 import cli, export, t5, weights
from hyper_t5.adapters import Adapters, AdapterSpec
from hyper_t5.errors import UserError
from hyper_t5.export import peft_in
from hyper_t5.export.peft_names import kernel_path, modules_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
    # peft, of LoRA's biases when it saves them
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .*invalid shape"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[t5.T5Config, Path]:
    """Configs -> their random backbones as Hugging Face folders."""
    root = tmp_path_factory.mktemp("hf")
    found = {config: root / str(i) for i, config in enumerate((GATED, TIED))}
    for config, folder in found.items():
        weights.save_hf(folder, config, backbone(config))
    return found


def saved_by_peft(base: Path, folder: Path, config: Any) -> Any:
    """A PeftModel of random numbers, saved; loaded again as a user would."""
    import peft
    import torch

    torch.manual_seed(0)
    model: Any = peft.get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "prompt_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 1.0)
    model.save_pretrained(folder)
    return load(base, folder)


def updates(adapters: Adapters, sizes: t5.T5Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """module -> what our LoRA adds to its weight [out, in], and to its output [out]."""
    spec, made = adapters.spec.lora, {}
    assert spec
    for module, (target, layer) in modules_of(sizes).items():
        fan_in, fan_out = ad.projection_shape(target, sizes)
        made[module] = np.zeros((fan_out, fan_in)), np.zeros(fan_out)
        if target in spec.targets:
            site, _, projection = target.partition(".")
            leaf = {k: v[layer, 0] for k, v in adapters.tree[site][projection].items()}
            scale = spec.scale_of(target)
            made[module] = (
                scale * (leaf["a"] @ leaf["b"]).T,
                scale * leaf.get("bias", made[module][1]),
            )
    return made


def their_updates(model: Any, sizes: t5.T5Config) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The same, from a PeftModel's layers."""
    made = {}
    for module, (target, _) in modules_of(sizes).items():
        fan_in, fan_out = ad.projection_shape(target, sizes)
        layer = model.base_model.model.get_submodule(module)
        delta, bias = np.zeros((fan_out, fan_in)), np.zeros(fan_out)
        if hasattr(layer, "lora_A"):
            up, scale = layer.lora_B["default"], layer.scaling["default"]
            delta = layer.get_delta_weight("default").detach().numpy()
            bias = scale * up.bias.detach().numpy() if up.bias is not None else bias
        made[module] = delta, bias
    return made


LORA_CASES: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q", "v"], "r": 3, "lora_alpha": 5},
    "their default": {"target_modules": None},
    "regex": {
        "target_modules": r".*decoder\.block\.\d+\.layer\.1\.EncDecAttention\.(q|o)",
        "r": 4,
        "use_rslora": True,
    },
    "all-linear": {"target_modules": "all-linear", "r": 2, "lora_bias": True},
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
        # By layer, by the end of a name, and one that more than one pattern matches; in the order
        # of the alphabet, which is that of what PEFT saves.
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
    "no such start": {"target_modules": ["k"], "init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("case", LORA_CASES)
def test_lora_that_peft_saved(bases: Any, tmp_path: Path, case: str) -> None:
    import peft

    sizes = TIED if case in ("all-linear", "patterns") else GATED
    settings = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", **LORA_CASES[case])
    model = saved_by_peft(bases[sizes], tmp_path / "peft", settings)
    adapters, said = peft_in.load_peft(tmp_path / "peft", sizes)
    assert said["base_model_name_or_path"] == str(bases[sizes])
    ad.check(adapters, sizes, case)
    ours, theirs = updates(adapters, sizes), their_updates(model, sizes)
    for module, (delta, bias) in theirs.items():
        np.testing.assert_allclose(ours[module][0], delta, atol=1e-5, err_msg=module)
        np.testing.assert_allclose(ours[module][1], bias, atol=1e-6, err_msg=module)
    changed = [module for module, (delta, _) in theirs.items() if delta.any()]
    assert 1 <= len(changed) < len(theirs) or case == "all-linear"
    if case == "rslora patterns":
        expected = our_logits(sizes, backbone(sizes), adapters)
        assert_close(their_logits(model), expected)
        assert_differs(expected, our_logits(sizes, backbone(sizes), None))


PREFIX_CASES: dict[str, dict[str, Any]] = {
    "natural": {},
    "projected": {"prefix_projection": True, "encoder_hidden_size": 8},
    "a layer each": {"num_layers": 6},
    "deeper": {"num_layers": 4},
}


@pytest.mark.parametrize("case", PREFIX_CASES)
def test_prefix_that_peft_saved(bases: Any, tmp_path: Path, case: str) -> None:
    import peft

    how = {"num_virtual_tokens": 4, "num_layers": 3, "token_dim": 16, "num_attention_heads": 2}
    settings = peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", **(how | PREFIX_CASES[case]))
    model = saved_by_peft(bases[GATED], tmp_path / "peft", settings)
    adapters, _ = peft_in.load_peft(tmp_path / "peft", GATED)
    params = backbone(GATED)
    expected = our_logits(GATED, params, adapters)
    assert_close(their_logits(model), expected)
    assert_differs(expected, our_logits(GATED, params, None))
    if case == "natural":
        assert_generates(model, GATED, params, adapters)


# ---------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spec",
    [patterned(GATED, bias=True), lora("enc_self.query", "enc_self.value"), DEC_PREFIX],
    ids=["patterns", "regex", "prefix"],
)
@pytest.mark.parametrize("sizes", [GATED, WIDE], ids=["deep", "wide"])
def test_out_and_in_is_exact(
    tmp_path: Path, spec: AdapterSpec, sizes: t5.T5Config, dtype: str
) -> None:
    adapters = random_adapters(spec, sizes)
    export.export_peft(tmp_path / "a", adapters, sizes, "base", TASK, dtype)
    again, _ = peft_in.load_peft(tmp_path / "a", sizes)
    assert again.spec == spec
    expected = ad.astype(ad.astype(ad.take(adapters, [TASK]), dtype), np.float32)
    jax.tree.map(np.testing.assert_array_equal, again.tree, expected.tree)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A native backbone, and a native adapter for it."""
    root = tmp_path_factory.mktemp("native")
    base = runs.save_backbone(root / "t5")
    sizes, params, identity = weights.load_backbone(base)
    meta = {"backbone": weights.backbone_meta(sizes, identity, params), "encoding": "labelled"}
    adapters = ad.take(random_adapters(patterned(runs.SIZES), runs.SIZES), [0])
    return base, ad.save(root / "adapter", adapters, meta)


def command(capsys: pytest.CaptureFixture[str], adapter: Path, base: Path, *flags: str) -> str:
    capsys.readouterr()
    argv = ["export", f"--adapter={adapter}", f"--backbone={base}", *flags]
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def test_the_command_brings_a_peft_folder_in(
    native: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = native
    out, back = tmp_path / "peft", tmp_path / "back"
    assert command(capsys, folder, base, "--format=peft", f"--out={out}") == f"{out}\n"
    assert command(capsys, out, base, "--format=native", f"--out={back}") == f"{back}\n"
    (before, meta, _), (after, found, _) = ad.load(folder, runs.SIZES), ad.load(back, runs.SIZES)
    assert after.spec == before.spec
    jax.tree.map(np.testing.assert_array_equal, after.tree, before.tree)
    assert found["backbone"] == meta["backbone"]
    assert found["source"] == {"format": "peft", "base_model": str(base)}

    rows, answers = tmp_path / "rows.jsonl", []
    rows.write_text('{"input": "a b c"}\n{"input": "d e"}\n')
    for adapter in (folder, back):
        output = tmp_path / f"{adapter.name}.jsonl"
        argv = [f"--backbone={base}", f"--adapter={adapter}", f"--input={rows}"]
        assert cli.main(["predict", *argv, f"--output={output}", "--max-decode-length=4"]) == 0
        answers.append([json.loads(x)["output"] for x in output.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert any(answers[0])


def test_the_command_merges_and_stores_as_asked(
    native: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = native
    half = ["--dtype=bfloat16", f"--out={tmp_path / 'half'}"]
    command(capsys, folder, base, "--format=native", *half)
    leaves = jax.tree.leaves(ad.load(tmp_path / "half")[0].tree)
    assert {leaf.dtype for leaf in leaves} == {np.dtype(ml_dtypes.bfloat16)}
    command(capsys, folder, base, "--format=peft", f"--out={tmp_path / 'peft'}")
    for name, adapter in (("one", folder), ("two", tmp_path / "peft")):
        command(capsys, adapter, base, "--format=merged", f"--out={tmp_path / name}")
    one, two = (weights.load_backbone(tmp_path / name)[1] for name in ("one", "two"))
    assert weights.digest(one) == weights.digest(two)
    assert weights.digest(one) != weights.digest(weights.load_backbone(base)[1])
    three = ["--format=merged", "--dtype=bfloat16", f"--out={tmp_path / 'three'}"]
    command(capsys, folder, base, *three)
    stored = load_file(tmp_path / "three" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}


# --------------------------------------------------------------------------------- bad folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good LoRA folder; no torch needed."""
    adapters = random_adapters(lora("enc_self.query", "dec_self.query"), GATED)
    return export.export_peft(tmp_path / "good", adapters, GATED, "base", TASK)


@pytest.fixture
def prefix_folder(tmp_path: Path) -> Path:
    return export.export_peft(
        tmp_path / "prefix", random_adapters(DEC_PREFIX, GATED), GATED, "base", TASK
    )


def refused(folder: Path, match: str, sizes: t5.T5Config = GATED) -> None:
    with pytest.raises(UserError, match=match) as error:
        peft_in.load_peft(folder, sizes)
    assert "\n" not in str(error.value)


def edit(folder: Path, **fields: Any) -> None:
    file = folder / export.PEFT_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; .* merge it in peft"),
    ({"peft_type": "PROMPT_TUNING"}, "soft tokens in front of the input"),
    ({"peft_type": ["LORA"]}, "peft_type is"),
    ({"use_dora": True}, "use_dora=True scales weights by their norms; merge it in peft"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* replaces whole modules"),
    ({"trainable_token_indices": [3]}, "changes the embedding"),
    ({"invented_in_2031": {"a": 1}}, "invented_in_2031=.* is none of the fields"),
    ({"bias": "lora_only"}, "bias='lora_only' changes biases"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is of models"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is LoRA on weights that it"),
    ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is of a T5 with another head"),
    ({"target_modules": ["q", "lm_head"]}, "has LoRA on lm_head"),
    ({"target_modules": ["q", "shared"]}, "has LoRA on shared"),
    ({"target_modules": ["q_proj"]}, "matches nothing in this T5"),
    ({"target_modules": {"q": 1}}, "must be a pattern or a list of names"),
    ({"target_modules": "(((q"}, "target_modules: .* is no pattern"),
    ({"target_modules": "((.*)*)*x"}, "a pattern in it takes for ever to match"),
    ({"target_modules": ["q"]}, "lacks .*EncDecAttention.q.lora_A.weight.* asks for"),
    ({"target_modules": r"encoder\..*SelfAttention\.q"}, r"holds .*decoder\..* not ask for"),
    ({"r": 10**9}, r"shape \[4, 24\].* make it \[1000000000, 24\]"),
    ({"r": "4"}, "r is '4', not a whole number"),
    ({"r": -4}, "r is -4, not a whole number"),
    ({"lora_alpha": 0}, "lora_alpha is 0, not a number above 0"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number above 0"),
    ({"rank_pattern": {"q": 2.5}}, "rank_pattern must give each pattern a number"),
    ({"rank_pattern": ["q"]}, "rank_pattern must give each pattern a number"),
    ({"alpha_pattern": {"(q": 2}}, "alpha_pattern: .* is no pattern"),
    ({"lora_bias": True}, "lacks .*lora_B.bias"),
    ({"use_rslora": "yes"}, "use_rslora must be true or false"),
    ({"layers_to_transform": ["1"], "target_modules": ["q"]}, "must be whole numbers"),
]


@pytest.mark.parametrize(("fields", "match"), FIELDS, ids=[str(i) for i in range(len(FIELDS))])
def test_what_we_cannot_say_is_refused(
    folder: Path, fields: dict[str, Any], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_in, "_PATTERN_SECONDS", 0.3)
    edit(folder, **fields)
    refused(folder, match)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"num_transformer_submodules": 1}, "only 2 works with a T5"),
        ({"num_layers": 2}, "leaves 1 of this backbone's 3 decoder layers without"),
        ({"num_attention_heads": 4}, "is for attention of 4 heads and 16 numbers"),
        ({"token_dim": 24}, "is for attention of 2 heads and 24 numbers"),
        ({"num_virtual_tokens": 10**8}, "num_virtual_tokens=100000000 is no prefix's length"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is None, not a whole number"),
        ({"num_virtual_tokens": 5}, r"shape \[3, 192\].* make it \[5, 192\]"),
    ],
)
def test_a_prefix_that_does_not_fit_is_refused(
    prefix_folder: Path, fields: dict[str, Any], match: str
) -> None:
    edit(prefix_folder, **fields)
    refused(prefix_folder, match)


def tensors(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    file = folder / export.PEFT_TENSORS
    content = load_file(file)
    change(content)
    save_file(content, file)


NAME = "base_model.model.encoder.block.0.layer.0.SelfAttention.q.lora_B.weight"


def spoil(folder: Path, kind: str) -> None:
    file, config = folder / export.PEFT_TENSORS, folder / export.PEFT_CONFIG
    match kind:
        case "nan":
            tensors(folder, lambda x: x.update({NAME: x[NAME] * np.nan}))
        case "beyond float32":
            tensors(folder, lambda x: x.update({NAME: np.full((16, 4), 1e300)}))
        case "integers":
            tensors(folder, lambda x: x.update({NAME: np.ones((16, 4), np.int64)}))
        case "missing":
            tensors(folder, lambda x: x.pop(NAME))
        case "extra":
            tensors(folder, lambda x: x.update({"../../x": x[NAME]}))
        case "transposed":
            tensors(folder, lambda x: x.update({NAME: x[NAME].T.copy()}))
        case "truncated":
            os.truncate(file, file.stat().st_size - 3)
        case "huge header":
            file.write_bytes((2**60).to_bytes(8, "little") + b"{}")
        case "pickle":
            file.unlink()
            (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        case "pickle under our name":
            file.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
        case "pipe":
            file.unlink()
            os.mkfifo(file)
        case "device":
            config.unlink()
            config.symlink_to("/dev/zero")
        case "large config":
            config.write_text("{" + " " * 2**24 + "}")
        case "no object":
            config.write_text("[]")
        case "both":
            (folder / ad.SPEC_FILE).write_text("{}")


SPOILT = {
    "nan": f"{NAME} has non-finite numbers",
    "beyond float32": f"{NAME} has non-finite numbers",
    "integers": f"{NAME} holds",
    "missing": f"lacks {NAME}, which adapter_config.json asks for",
    "extra": r"holds \.\./\.\./x, which adapter_config.json does not ask for",
    "transposed": r"has shape \[4, 16\].* make it \[16, 4\]",
    "truncated": "adapter_model.safetensors: ",
    "huge header": "adapter_model.safetensors: ",
    "pickle": "adapter_model.bin: is a pickle, .* never opened here; .* safe_serialization=True",
    "pickle under our name": "adapter_model.safetensors: ",
    "pipe": "adapter_model.safetensors: is no regular file",
    "device": "adapter_config.json: is no regular file",
    "large config": "adapter_config.json: has 16,777,218 bytes",
    "no object": "adapter_config.json: must hold a JSON object",
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_folder_is_named(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    spoil(folder, kind)
    refused(folder, SPOILT[kind])
    assert [p.name for p in folder.parent.iterdir()] == ["good"]  # nothing ran


def test_the_command_leaves_nothing_behind(
    native: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = native
    out = f"--out={tmp_path / 'out'}"
    argv = ["export", f"--adapter={folder}", f"--backbone={base}", out]
    # Made for another backbone.
    for form in ("native", "merged", "peft"):
        assert "which adapter_config.json asks for" in runs.fails(capsys, *argv, f"--format={form}")
    spoil(folder, "both")
    assert "holds both" in runs.fails(capsys, *argv, "--format=native")
    # An encoding or backbone that a folder only claims.
    loaded, meta, _ = ad.load(adapter)
    changes: list[tuple[dict[str, Any], str]] = [
        ({"encoding": "../x"}, "encoding '../x' is none of"),
        ({"backbone": 3}, "does not say which backbone"),
        ({"backbone": meta["backbone"] | {"dtype": "float128"}}, "float128"),
    ]
    for change, said in changes:
        bad = ad.save(tmp_path / "bad", loaded, meta | change)
        argv[1] = f"--adapter={bad}"
        assert said in runs.fails(capsys, *argv, "--format=peft")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "good"]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = (
    SCALARS
    | st.lists(SCALARS, max_size=3)
    | st.dictionaries(st.text(max_size=5), SCALARS, max_size=3)
)
GOOD = {
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
    fields=st.dictionaries(st.sampled_from(sorted(GOOD)), JSON, max_size=3),
    kind=st.sampled_from(["LORA", "PREFIX_TUNING"]),
)
def test_any_config_is_read_or_refused_in_a_line(
    tmp_path_factory: pytest.TempPathFactory, fields: dict[str, Any], kind: str
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any"
    folder.mkdir(exist_ok=True)
    save_file({"x": np.zeros(3, np.float32)}, folder / export.PEFT_TENSORS)
    (folder / export.PEFT_CONFIG).write_text(json.dumps(GOOD | {"peft_type": kind} | fields))
    refused(folder, ": ")


@given(st.dictionaries(st.sampled_from(["lora", "prefix", "bottleneck", "memory", "x"]), JSON))
def test_any_spec_is_read_or_refused(data: dict[str, Any]) -> None:
    whole = AdapterSpec(lora=lora("enc_self.query").lora, prefix=DEC_PREFIX.prefix).to_dict()
    for name in ("lora", "prefix"):
        if isinstance(data.get(name), dict):
            data[name] = whole[name] | dict(zip(whole[name], data[name].values(), strict=False))
    try:
        spec = AdapterSpec.from_dict(data)
    except ValueError:
        return
    assert AdapterSpec.from_dict(spec.to_dict()) == spec


def test_what_peft_writes_by_default_is_not_refused(tmp_path: Path) -> None:
    """Nor may it be with a new version of PEFT."""
    import peft

    for kind in (peft.LoraConfig, peft.PrefixTuningConfig):
        config = kind(task_type="SEQ_2_SEQ_LM")
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / export.PEFT_CONFIG).read_text())
        peft_in._refuse_unknown(written, tmp_path)


def test_modules_are_those_of_the_backbone() -> None:
    for sizes in (GATED, TIED, WIDE):
        for target, layer in modules_of(sizes).values():
            assert layer < ad.num_layers(target, sizes)
            assert kernel_path(target).endswith("/kernel")
