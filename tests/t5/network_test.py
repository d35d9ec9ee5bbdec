"""The backbone against T5X's outputs; remat, unrolling, bfloat16, dropout and tied logits."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hyper_t5 import t5, weights
from hyper_t5.adapters import AdapterSpec, LoraSpec, PrefixSpec
from hyper_t5.t5 import network
from hyper_t5.training import losses
from hyper_t5.weights import param_names
from tests.support.tiny_model import (
    CONFIG,
    EVERYTHING,
    GOLDEN,
    TIED,
    ids,
    logits,
    off,
    params,
    random_adapters,
)

pytestmark = pytest.mark.smoke

Golden = tuple[t5.T5Config, dict[str, Any], dict[str, jax.Array]]


@pytest.fixture(scope="module")
def golden() -> Golden:
    """Load (sizes, parameters, arrays) that T5X wrote."""
    config, tree, _ = weights.load_backbone(GOLDEN / "checkpoint_7")
    with np.load(GOLDEN / "golden.npz") as arrays:
        return config, tree, {k: jnp.asarray(v) for k, v in arrays.items()}


def flat(tree: Any) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


# ------------------------------------------------------------------------------ T5X's numbers


@functools.partial(jax.jit, static_argnames="config")
def forward(config: t5.T5Config, tree: Any, batch: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Compute (encoder output, logits) from inputs and targets."""
    model, variables = t5.T5(config), {"params": tree}
    inputs, targets = batch["encoder_input_tokens"], batch["decoder_target_tokens"]
    segments = batch.get("encoder_segment_ids"), batch.get("decoder_segment_ids")
    encoded = model.apply(variables, inputs, None, segments[0], method="encode")
    logits = model.apply(
        variables, inputs, targets, input_segments=segments[0], target_segments=segments[1]
    )
    return encoded, logits


@pytest.mark.parametrize("name", ["small", "long", "packed"])
def test_outputs_and_losses_are_t5x(golden: Golden, name: str) -> None:
    config, tree, arrays = golden
    batch = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith(name + "/")}
    encoded, actual = forward(config, tree, batch)
    expected = batch["logits"]
    assert off(actual[:, ::10] if name == "long" else actual, expected) < 1e-5
    if "encoder_output" in batch:
        assert off(encoded, batch["encoder_output"]) < 1e-5

    segments = batch.get("decoder_segment_ids")
    shifted = network.shift_right(batch["decoder_target_tokens"], segments)
    np.testing.assert_array_equal(shifted, batch["decoder_input_tokens"])

    variants = json.loads((GOLDEN / "losses.json").read_text())
    real = batch["decoder_loss_weights"]
    loss = functools.partial(losses.token_loss, actual, batch["decoder_target_tokens"])
    for variant, sums in {
        "default": loss(real),
        "z_loss_0": loss(real, z_loss=0.0),
        "label_smoothing_0.1": loss(real, label_smoothing=0.1),
        "no_weights_key": loss(jnp.ones_like(real)),
    }.items():
        reference = variants[f"{name}/{variant}"]
        for key in ("loss", "z_loss"):
            assert float(sums[key]) == pytest.approx(reference[key], rel=1e-5), (variant, key)
        if "accuracy" in reference:
            accuracy = float(sums["correct"] / sums["tokens"])
            assert accuracy == pytest.approx(reference["accuracy"])


def test_packed_equals_unpacked(golden: Golden) -> None:
    config, tree, arrays = golden
    packed = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith("packed/")}
    _, together = forward(config, tree, packed)
    inputs, targets = packed["encoder_input_tokens"], packed["decoder_target_tokens"]
    segments = packed["encoder_segment_ids"], packed["decoder_segment_ids"]
    apart = {"encoder_input_tokens": np.zeros((3, 16), np.int32)}
    apart["decoder_target_tokens"] = np.zeros((3, 12), np.int32)
    for key, ids_, segment in zip(apart, (inputs, targets), segments, strict=True):
        for row in range(3):
            part = ids_[segment == row + 1]
            apart[key][row, : len(part)] = part
    _, alone = forward(config, tree, apart)
    for row in range(3):
        mine = np.asarray(together)[segments[1] == row + 1]
        assert off(alone[row, : len(mine)], mine) < 1e-5


def test_names_shapes_and_logical_axes_are_t5x(golden: Golden) -> None:
    config, _, _ = golden
    expected = {}
    for path, leaf in json.loads((GOLDEN / "param_tree.json").read_text()).items():
        if match := param_names.LAYER.fullmatch(path):
            depth = getattr(config, f"num_{match[1]}_layers")
            path = f"{match[1]}/layers/{match[3]}"
            leaf = {"shape": [depth, *leaf["shape"]], "axes": ["layers", *leaf["logical_axes"]]}
        expected[path] = (tuple(leaf["shape"]), tuple(leaf.get("axes") or leaf["logical_axes"]))
    shapes = jax.eval_shape(lambda: t5.init_params(config, jax.random.key(0)))
    axes = flat(t5.logical_axes(config))
    assert {k: (v.shape, axes[k]) for k, v in flat(shapes).items()} == expected


# ------------------------------------------------------------------------- ways to compute it


def gradient(config: t5.T5Config) -> Any:
    """Return a function of parameters -> gradient of the loss, with adapters."""
    inputs, targets = ids(2, 6), ids(2, 5, seed=1)
    lora = LoraSpec(("enc_self.query",), rank=2, alpha=3.0)
    adapters = random_adapters(AdapterSpec(lora, PrefixSpec(("dec_self",), 2)), 2)

    def loss(tree: Any) -> jax.Array:
        logits = t5.T5(config).apply({"params": tree}, inputs, targets, adapters)
        return losses.token_loss(logits, targets, targets > 0)["loss"]

    return jax.grad(loss)


def test_remat_does_not_change_gradients() -> None:
    gradients, products = {}, {}
    for remat in ("none", "minimal", "full"):
        config = dataclasses.replace(CONFIG, remat=remat)
        traced = jax.jit(gradient(config)).trace(params())
        products[remat] = str(traced.jaxpr).count("dot_general")
        gradients[remat] = flat(traced.lower().compile()(params()))
    # 'minimal' recomputes attention's products, 'full' all of a layer's.
    assert products["none"] < products["minimal"] < products["full"]
    for remat in ("minimal", "full"):
        for path, expected in gradients["none"].items():
            assert off(gradients[remat][path], expected) < 1e-5, (remat, path)


def test_scanned_equals_unrolled() -> None:
    arguments = ids(2, 6), ids(2, 5, seed=1), random_adapters(EVERYTHING["hf"], 2)
    outputs, loops = [], []
    for unroll in (1, CONFIG.num_decoder_layers):
        config = dataclasses.replace(CONFIG, scan_unroll=unroll)
        lowered = logits.lower(*arguments, config=config, weights=params())
        loops.append(lowered.as_text().count("stablehlo.while"))
        outputs.append(lowered.compile()(*arguments, weights=params()))
    assert loops == [2, 0]
    assert off(outputs[1], outputs[0]) < 1e-5


def test_bfloat16_computes_in_bfloat16_and_ends_in_float32() -> None:
    arguments = ids(2, 6), ids(2, 5, seed=1), random_adapters(EVERYTHING["hf"], 2)
    exact = logits(*arguments, weights=params())
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    actual = logits(*arguments, config=config, weights=params())
    assert actual.dtype == jnp.float32
    assert 1e-4 < off(actual, exact) < 0.05  # 8 bits of mantissa: about 0.4% a rounding
    encode = functools.partial(t5.T5(config).apply, method="encode")
    assert jax.eval_shape(encode, {"params": params()}, arguments[0]).dtype == jnp.bfloat16


def test_dropout_needs_a_key_and_changes_the_result() -> None:
    config = dataclasses.replace(CONFIG, dropout_rate=0.3, remat="full")
    run = jax.jit(functools.partial(t5.T5(config).apply, deterministic=False))
    batch = ids(2, 6), ids(2, 5, seed=1)
    first, second, again = (
        run({"params": params()}, *batch, rngs={"dropout": jax.random.key(key)})
        for key in (0, 1, 0)
    )
    assert off(second, first) > 0.1
    np.testing.assert_array_equal(again, first)
    same = logits(*batch, config=config, weights=params())
    np.testing.assert_array_equal(same, logits(*batch, weights=params()))


# --------------------------------------------------------------------------------- 1.0 and sizes


def test_queries_start_smaller_by_the_root_of_the_head_size() -> None:
    """T5X folds the scale of attention into the query kernel's initialization."""
    config = dataclasses.replace(CONFIG, emb_dim=64, num_heads=8, head_dim=16)
    kernels = t5.init_params(config, jax.random.key(0))["encoder"]["layers"]["attention"]
    ratio = np.std(kernels["query"]["kernel"]) / np.std(kernels["key"]["kernel"])
    assert ratio == pytest.approx(16**-0.5, rel=0.05)


def test_tied_logits_are_the_embeddings_scaled() -> None:
    tied, untied = dict(params(TIED)), dataclasses.replace(TIED, logits_via_embedding=False)
    assert "logits_dense" not in tied["decoder"]
    assert tied["encoder"]["layers"]["mlp"].keys() == {"wi", "wo"}
    table = tied["token_embedder"]["embedding"]
    kernel = table.T / np.sqrt(TIED.emb_dim)
    copy = tied | {"decoder": tied["decoder"] | {"logits_dense": {"kernel": kernel}}}
    batch = ids(2, 6), ids(2, 5, seed=1)
    actual = logits(*batch, config=TIED, weights=tied)
    assert off(actual, logits(*batch, config=untied, weights=copy)) < 1e-6


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # The published checkpoints, as counted in Hugging Face's hub.
        ("small", 76_961_152),
        ("base", 247_577_856),
        ("large", 783_150_080),
        ("xl", 2_849_757_184),
        ("xxl", 11_135_332_352),
        ("t5-small", 60_506_624),
        ("t5-base", 222_903_552),
        ("t5-large", 737_668_096),
        ("t5-xl", 2_851_598_336),
        ("t5-xxl", 11_307_321_344),
    ],
)
def test_presets_have_the_published_sizes(name: str, count: int) -> None:
    config = t5.preset(name)
    shapes = jax.eval_shape(lambda: t5.init_params(config, jax.random.key(0)))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes)) == count
