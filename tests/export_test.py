"""Exported adapters in the real `peft` and `transformers`, on the exported backbone."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

from hyper_t5 import adapters as adapters_lib
from hyper_t5 import export, names, t5, weights
from hyper_t5.adapters import Adapters, AdapterSpec, LoraSpec, PrefixSpec
from hyper_t5.decoding import decode
from hyper_t5.errors import UserError

# What peft says of every T5 with its own head when it merges, and of T5's layers without bias.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

TASKS, TASK, SLOTS = 3, 1, 3
# H*K is 16 and D is 24; the decoder is deeper. One is a T5 1.1, the other a T5 1.0.
GATED = t5.T5Config(
    vocab_size=96,
    emb_dim=24,
    num_heads=2,
    head_dim=8,
    mlp_dim=40,
    num_encoder_layers=1,
    num_decoder_layers=3,
)
TIED = dataclasses.replace(GATED, mlp_activations=("relu",), logits_via_embedding=True)
# H*K is above D and the encoder is deeper.
WIDE = dataclasses.replace(GATED, num_heads=4, num_encoder_layers=3, num_decoder_layers=2)
SHAPES = {"1.1": GATED, "1.0": TIED, "wide": WIDE}

ATTENTION = adapters_lib.ATTENTION_SITES
EVERYWHERE = (*ATTENTION, *adapters_lib.MLP_SITES)
QUERY_VALUE = tuple(f"{site}.{name}" for site in ATTENTION for name in ("query", "value"))
MIXED = ("enc_self.value", "dec_cross.query", "dec_cross.out", "dec_mlp.wo")
DEC_PREFIX = AdapterSpec(prefix=PrefixSpec(("dec_self",), SLOTS))

INPUTS = np.array([[5, 60, 7, 8, 9, 1], [33, 90, 1, 0, 0, 0]])
TARGETS = np.array([[3, 40, 5, 1], [77, 8, 9, 1]])


def lora(*targets: str, bias: bool = False) -> AdapterSpec:
    return AdapterSpec(lora=LoraSpec(targets, rank=4, alpha=6, bias=bias))


def patterned(config: t5.T5Config, bias: bool = False) -> AdapterSpec:
    """LoRA of other ranks and alphas on some targets, one of them on cross-attention."""
    first = adapters_lib.targets_of(("dec_mlp",), config)[0]
    ranks = {"enc_self.query": 4, "dec_self.out": 4, "dec_cross.key": 2, first: 7}
    alphas = {"enc_self.query": 6.0, "dec_self.out": 2.5, "dec_cross.key": 6.0, first: 6.0}
    return AdapterSpec(lora=adapters_lib.lora_spec(ranks, alphas, bias))


def random_adapters(spec: AdapterSpec, config: t5.T5Config, mask: Any = None) -> Adapters:
    """Three tasks' adapters with values that move the logits by about their own size."""
    rng = np.random.default_rng(1)
    scale = 0.3 if spec.lora else 1.0
    tree = jax.tree.map(
        lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
        adapters_lib.shapes(spec, config, TASKS),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    if mask is not None:
        shape = tree["dec_self"]["prefix"]["key"].shape[:3]
        tree["dec_self"]["prefix"]["mask"] = jnp.broadcast_to(jnp.asarray(mask), shape)
    return Adapters(tree, spec)


@functools.cache
def backbone(config: t5.T5Config) -> Any:
    """Random weights with activations of about unit size."""
    rng = np.random.default_rng(0)
    flat = {}
    for path, shape in names.param_shapes(config).items():
        scale = shape[-2] ** -0.5 if path.endswith("/kernel") else 1.0
        flat[path] = (scale * rng.normal(size=shape)).astype(np.float32)
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config: t5.T5Config, params: Any, adapters: Adapters | None) -> Any:
    return t5.T5(config).apply({"params": params}, INPUTS, TARGETS, adapters)


@pytest.fixture(scope="module", params=SHAPES.values(), ids=list(SHAPES))
def exported(request: Any, tmp_path_factory: Any) -> tuple[t5.T5Config, Path]:
    """A config and its random backbone as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    weights.save_hf(folder, request.param, backbone(request.param))
    return request.param, folder


def assert_generates(model: Any, config: t5.T5Config, params: Any, adapters: Any) -> None:
    """Greedy outputs are ours, token by token, and not those of the base."""
    import torch

    ids = torch.tensor(INPUTS)
    # transformers 5.23 makes the decoder's cache as deep as the encoder, adapters or not; a prefix
    # brings its own.
    deep = config.num_decoder_layers > config.num_encoder_layers and adapters.spec.lora
    more = {"use_cache": False} if deep else {}
    mask = (ids > 0).long()
    text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **more)
    text = np.pad(text.numpy()[:, 1:], ((0, 0), (0, 7 - text.shape[1])))
    ours, base = (
        np.asarray(decode(config, params, INPUTS, a, steps=6)[0]) for a in (adapters, None)
    )
    np.testing.assert_array_equal(text, ours)
    assert not np.array_equal(ours, base)


def load(folder: Path, adapter: Path | None = None) -> Any:
    import peft
    import transformers

    model: Any = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    return (peft.PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def their_logits(model: Any) -> np.ndarray:
    import torch

    ids = torch.tensor(INPUTS)
    shifted = torch.tensor(np.pad(TARGETS, ((0, 0), (1, 0)))[:, :-1])
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=(ids > 0).long(), decoder_input_ids=shifted)
    return out.logits.numpy()


def assert_close(found: Any, expected: Any) -> None:
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-4 * np.abs(expected).max()


def assert_differs(found: Any, base: Any) -> None:
    assert np.abs(np.asarray(found) - np.asarray(base)).max() > 0.05 * np.abs(base).max()


def export_to(folder: Path, adapters: Adapters, config: t5.T5Config, base: Any = "base") -> Path:
    return export.export_peft(folder / "adapter", adapters, config, str(base), TASK)


# ---------------------------------------------------------------------------- in transformers


def test_exported_backbone_in_transformers(exported: Any) -> None:
    config, folder = exported
    assert_close(their_logits(load(folder)), our_logits(config, backbone(config), None))


@pytest.mark.parametrize(
    ("exported", "targets", "bias"),
    [
        pytest.param(config, targets, bias, id=f"{shape}-{name}")
        for name, targets, bias, shapes in [
            ("query-value", QUERY_VALUE, False, ("1.1", "1.0")),
            ("everything", EVERYWHERE, False, ("1.1", "1.0")),
            ("everything-bias", EVERYWHERE, True, ("1.1", "1.0")),
            ("mixed sites", MIXED, False, SHAPES),
        ]
        for shape, config in SHAPES.items()
        if shape in shapes
    ],
    indirect=["exported"],
)
def test_lora_in_peft(exported: Any, tmp_path: Path, targets: Any, bias: bool) -> None:
    config, base = exported
    if targets == EVERYWHERE:
        targets = adapters_lib.targets_of(EVERYWHERE, config)
    adapters = random_adapters(lora(*targets, bias=bias), config)
    folder = export_to(tmp_path, adapters, config, base)
    theirs = their_logits(load(base, folder))

    params = backbone(config)
    assert_close(theirs, our_logits(config, params, adapters_lib.take(adapters, [TASK])))
    assert_differs(theirs, our_logits(config, params, None))
    assert_differs(theirs, our_logits(config, params, adapters_lib.take(adapters, [TASK + 1])))
    if bias:
        with pytest.raises(UserError, match="has a LoRA bias"):
            export.merge_lora(params, adapters, TASK)
        return
    merged = export.merge_lora(params, adapters, TASK)
    assert_close(our_logits(config, merged, None), theirs)
    assert_close(their_logits(load(base, folder).merge_and_unload()), theirs)


def test_merged_backbone_in_transformers(exported: Any, tmp_path: Path) -> None:
    config, _ = exported
    adapters = random_adapters(lora(*MIXED), config)
    params = backbone(config)
    before = weights.digest(params)
    weights.save_hf(tmp_path / "merged", config, export.merge_lora(params, adapters, TASK))
    assert weights.digest(params) == before
    expected = our_logits(config, params, adapters_lib.take(adapters, [TASK]))
    assert_close(their_logits(load(tmp_path / "merged")), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_rank_patterns_in_peft(exported: Any, tmp_path: Path, bias: bool) -> None:
    config, base = exported
    adapters = random_adapters(patterned(config, bias), config)
    folder = export_to(tmp_path, adapters, config, base)
    said = json.loads((folder / export.PEFT_CONFIG).read_text())
    assert sorted(said["rank_pattern"].values()) == [2, 4, 7]
    assert sorted(said["alpha_pattern"].values()) == [2.5, 6, 6]
    model, params = load(base, folder), backbone(config)
    one = adapters_lib.take(adapters, [TASK])
    theirs = their_logits(model)
    assert_close(theirs, our_logits(config, params, one))
    assert_differs(theirs, our_logits(config, params, None))
    if bias:
        return
    assert_generates(model, config, params, one)
    assert_close(our_logits(config, export.merge_lora(params, adapters, TASK), None), theirs)


def test_bfloat16_in_peft(exported: Any, tmp_path: Path) -> None:
    """PEFT makes float32 of it: the effect is that of the rounded adapters."""
    import torch

    config, base = exported
    spec = patterned(config) if config != TIED else DEC_PREFIX
    adapters = random_adapters(spec, config)
    folder = export.export_peft(tmp_path / "a", adapters, config, str(base), TASK, "bfloat16")
    stored = load_file(folder / export.PEFT_TENSORS)
    assert {x.dtype.name for x in stored.values()} == {"bfloat16"}
    assert "bfloat16" in (folder / "README.md").read_text()
    model = load(base, folder)
    tuned = [p for n, p in model.named_parameters() if "lora_" in n or "prompt_" in n]
    assert {p.dtype for p in tuned} == {torch.float32}
    rounded = adapters_lib.astype(adapters_lib.take(adapters, [TASK]), jnp.bfloat16)
    expected = our_logits(config, backbone(config), adapters_lib.astype(rounded, jnp.float32))
    assert_close(their_logits(model), expected)
    assert_differs(expected, our_logits(config, backbone(config), None))


def test_merging_into_bfloat16_says_what_rounding_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone(WIDE))
    adapters = random_adapters(patterned(WIDE), WIDE)
    small = jax.tree.map(lambda x: x * 0.02, adapters)
    merged = export.merge_lora(params, small, TASK)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"bfloat16"}
    assert "rounding to bfloat16 changes the update of" in capsys.readouterr().out
    exact = export.merge_lora(params, small, TASK, "float32")
    assert capsys.readouterr().out == ""
    path = ("decoder", "layers", "encoder_decoder_attention", "key", "kernel")
    kernel, whole, leaf = params, exact, small.tree["dec_cross"]["key"]
    for name in path:
        kernel, whole = kernel[name], whole[name]
    delta = 3.0 * np.asarray(leaf["a"][:, TASK]) @ np.asarray(leaf["b"][:, TASK])
    np.testing.assert_allclose(whole - kernel.astype(np.float32), delta, atol=1e-6)
    assert np.abs(delta).max() > 1e-4
    weights.save_hf(tmp_path / "hf", WIDE, exact)
    _, again, _ = weights.load_backbone(tmp_path / "hf")
    assert weights.digest(again) == weights.digest(exact)


def test_decoder_prefix_in_peft(exported: Any, tmp_path: Path) -> None:
    config, base = exported
    adapters = random_adapters(DEC_PREFIX, config, mask=True)
    model = load(base, export_to(tmp_path, adapters, config, base))
    theirs, params = their_logits(model), backbone(config)
    one = adapters_lib.take(adapters, [TASK])
    assert_close(theirs, our_logits(config, params, one))
    assert_differs(theirs, our_logits(config, params, None))
    assert_generates(model, config, params, one)


# -------------------------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (QUERY_VALUE, ["q", "v"]),
        (adapters_lib.targets_of(("enc_mlp", "dec_mlp"), GATED), ["wi_0", "wi_1", "wo"]),
        (adapters_lib.targets_of(EVERYWHERE, GATED), ["k", "o", "q", "v", "wi_0", "wi_1", "wo"]),
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


def test_folder_holds_one_task_exactly(tmp_path: Path) -> None:
    adapters = random_adapters(lora("dec_self.out", bias=True), GATED)
    folder = export_to(tmp_path, adapters, GATED, "google/t5-v1_1-small")
    assert {p.name for p in folder.iterdir()} == {
        export.PEFT_CONFIG,
        export.PEFT_TENSORS,
        "README.md",
    }
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


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (prefix("enc_self", "dec_self"), "not at enc_self; train with .*dec_self.* or keep"),
        (prefix("dec_cross"), "not at dec_cross; train with .*dec_self.* or keep"),
        (prefix("dec_self", bias="zero"), "position_bias='zero'; train with 'hf', or keep"),
        (BOTH, "cannot have LoRA and prefixes active together; emit one of them .* or keep"),
    ],
)
def test_what_peft_cannot_say_is_refused(tmp_path: Path, spec: AdapterSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        export_to(tmp_path, random_adapters(spec, GATED), GATED)
    assert not any(tmp_path.iterdir())


def test_masked_prefix_is_refused(tmp_path: Path) -> None:
    adapters = random_adapters(DEC_PREFIX, GATED, mask=[True, False, True])
    with pytest.raises(UserError, match=r"3 of 9 prefix slots are masked.* or keep"):
        export_to(tmp_path, adapters, GATED)


def test_bad_adapters_are_refused(tmp_path: Path) -> None:
    adapters = random_adapters(lora("enc_self.query"), GATED)
    with pytest.raises(UserError, match=r"no task 5; the adapters hold 3"):
        export.export_peft(tmp_path / "a", adapters, GATED, "base", 5)
    with pytest.raises(UserError, match="this backbone"):
        export_to(tmp_path, adapters, dataclasses.replace(GATED, emb_dim=32))
    with pytest.raises(UserError, match="only LoRA is a change of the weights; prefixes"):
        export.merge_lora(backbone(GATED), random_adapters(DEC_PREFIX, GATED))
    wide = random_adapters(lora("enc_self.query"), dataclasses.replace(GATED, emb_dim=32))
    with pytest.raises(UserError, match=r"enc_self\.query gives \[1, 32, 16\]"):
        export.merge_lora(backbone(GATED), wide)
    leaf = adapters.tree["enc_self"]["query"]
    leaf["b"] = leaf["b"].at[0, TASK, 0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="enc_self/query/b of task 1 has non-finite numbers"):
        export_to(tmp_path, adapters, GATED)
    assert not any(tmp_path.iterdir())
