"""HINT and Hyperdecoders against the outputs of their papers' code (reference data, golden)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hyper_t5 import adapters as ad
from hyper_t5 import hypermodels, model, t5, weights
from hyper_t5.adapters import Adapters
from hyper_t5.config import defaults
from hyper_t5.t5.decoding import decode
from hyper_t5.training import losses
from hyper_t5.weights import param_names
from tests.support import param_trees
from tests.support.tiny_model import GOLDEN, off

Tree = dict[str, Any]
logits_of = jax.jit(model.Model.logits, static_argnums=0)
generate_adapters = jax.jit(model.generate_adapters, static_argnums=0)
CLOSE = 1e-5  # relative to the largest number
SIZES = t5.T5Config(
    vocab_size=128,
    emb_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=64,
    num_encoder_layers=2,
    num_decoder_layers=2,
)


def make_model(system: str, sizes: t5.T5Config = SIZES, **fields: Any) -> model.Model:
    """Build a model of a system with these ``adapter`` (or own) fields."""
    config = defaults()
    config.system = system
    for name, value in fields.items():
        own = system in config and name in config[system]
        config[system if own else "adapter"][name] = value
    return model.build_model(config, sizes)


def hint(sizes: t5.T5Config, size: int, length: int) -> model.Model:
    """Build HINT as its code configures it."""
    return make_model(
        "hint",
        sizes,
        bottleneck_sizes=(size,),
        prefix_length=length,
        prefix_sites=ad.ATTENTION_SITES,
        position_bias="zero",
    )


def nested(flat: dict[str, np.ndarray]) -> Tree:
    return traverse_util.unflatten_dict(flat, sep="/")


# ----------------------------------------------------------------------------------------- HINT


@pytest.fixture(scope="module")
def hint_run(shared_dir: Path) -> tuple[model.Model, Tree, dict[str, np.ndarray]]:
    """Load (model, parameters, golden arrays): a variant with a padding mask and a transpose."""
    folder = shared_dir / "golden_hint" / "masked_transposed"
    flat = dict(np.load(folder / "params.npz"))
    own = {k.removeprefix("hyper/"): v for k, v in flat.items() if k.startswith("hyper/")}
    rest = {k: v for k, v in flat.items() if not k.startswith("hyper/")}
    params = {"hypermodel": nested(own), "backbone": param_trees.from_t5x(nested(rest))}
    return hint(SIZES, 4, 3), params, dict(np.load(folder / "golden.npz"))


def hint_batch(golden: dict[str, np.ndarray]) -> Tree:
    return {
        "hyper_inputs": golden["hyper_inputs"],
        "inputs": golden["inputs"][:, None],
        "targets": golden["targets"][:, None],
        "tasks": np.zeros(len(golden["inputs"]), np.int32),
    }


def emitted(m: model.Model, params: Tree, golden: dict[str, np.ndarray]) -> Adapters:
    ids = jnp.asarray(golden["hyper_inputs"])
    adapters = generate_adapters(m, params, ids, jnp.zeros(len(ids), jnp.int32))
    assert adapters is not None
    return adapters


def test_hint_adapters(hint_run: Any) -> None:
    m, params, golden = hint_run
    tree = emitted(m, params, golden).tree
    assert_hint_adapters(tree, golden)
    assert off(tree[ad.MEMORY]["states"][0], golden["instruction_embedding"]) < CLOSE
    assert (tree[ad.MEMORY]["mask"][0] == (golden["hyper_inputs"] > 0)).all()


def assert_hint_adapters(tree: Tree, golden: dict[str, np.ndarray]) -> None:
    # Golden sites: enc 0, enc 1, dec 0 self, dec 0 cross, dec 1 self, dec 1 cross.
    sites = {"enc": [0, 1], "dec_self": [2, 4], "dec_mlp": [2, 4], "dec_cross": [3, 5]}
    leaves = {"down": "adapter_wd", "up": "adapter_wu"}
    leaves |= {"down_bias": "adapter_bd", "up_bias": "adapter_bu"}
    for site in ad.MLP_SITES:
        for leaf, name in leaves.items():
            layers = sites.get(site, sites["enc"])
            expected = golden[name][:, layers].swapaxes(0, 1)
            assert off(tree[site]["bottleneck"][leaf], expected) < CLOSE, (site, leaf)
    for site in ad.ATTENTION_SITES:
        for leaf in ("key", "value"):
            layers = sites.get(site, sites["enc"])
            expected = golden[f"prefix_{leaf}"][:, layers].swapaxes(0, 1)
            assert off(tree[site]["prefix"][leaf], expected) < CLOSE, (site, leaf)


def test_hint_encoder_output_logits_and_loss(hint_run: Any) -> None:
    m, params, golden = hint_run
    real, real_in = golden["targets"] > 0, golden["inputs"] > 0
    logits = logits_of(m, params, hint_batch(golden))
    assert off(np.asarray(logits)[real], golden["logits"][real]) < CLOSE
    sums = losses.token_loss(logits, jnp.asarray(golden["targets"]), jnp.asarray(real), 1e-4)
    assert abs(float(sums["loss"]) / float(golden["loss"]) - 1) < CLOSE
    encode = jax.jit(functools.partial(t5.T5(SIZES).apply, method="encode"))
    adapters = emitted(m, params, golden)
    encoded = encode({"params": params["backbone"]}, golden["inputs"], adapters)
    assert off(np.asarray(encoded)[real_in], golden["encoder_output"][real_in]) < CLOSE


PARTS = {
    "adapters_zeroed": lambda tree: {
        site: {
            k: jax.tree.map(jnp.zeros_like, v) if k == "bottleneck" else v for k, v in part.items()
        }
        for site, part in tree.items()
    },
    "no_prefix": lambda tree: {
        site: {k: v for k, v in part.items() if k != "prefix"} for site, part in tree.items()
    },
    "no_fusion": lambda tree: {site: part for site, part in tree.items() if site != ad.MEMORY},
    "plain_t5": lambda tree: {},
}


@pytest.mark.parametrize("part", PARTS)
def test_hint_without_a_part(hint_run: Any, part: str) -> None:
    m, params, golden = hint_run
    adapters = emitted(m, params, golden)
    tree, real = PARTS[part](adapters.tree), golden["targets"] > 0
    spec = adapters.spec
    if part in ("no_prefix", "plain_t5"):
        spec = ad.AdapterSpec(bottleneck=spec.bottleneck, memory=spec.memory)
    logits = t5.T5(SIZES).apply(
        {"params": params["backbone"]}, golden["inputs"], golden["targets"], Adapters(tree, spec)
    )
    assert off(np.asarray(logits)[real], golden[f"logits_{part}"][real]) < CLOSE


def test_hint_greedy_decoding(hint_run: Any) -> None:
    m, params, golden = hint_run
    adapters = emitted(m, params, golden)
    ids, _ = decode(SIZES, params["backbone"], golden["inputs"], adapters, steps=8)
    np.testing.assert_array_equal(ids, golden["greedy"])


def test_hint_gradients(hint_run: Any, shared_dir: Path) -> None:
    m, params, golden = hint_run
    targets = jnp.asarray(golden["targets"])

    def loss(params: Tree) -> jax.Array:
        logits = m.logits(params, hint_batch(golden))
        return losses.token_loss(logits, targets, targets > 0, 1e-4)["loss"]

    grads = jax.jit(jax.grad(loss))(params)
    backbone = param_names.to_t5x(jax.tree.map(np.asarray, grads["backbone"]))
    flat = traverse_util.flatten_dict(backbone, sep="/")
    own = traverse_util.flatten_dict(grads["hypermodel"], sep="/")
    flat |= {f"hyper/{k}": v for k, v in own.items()}
    expected = dict(np.load(shared_dir / "golden_hint" / "masked_transposed" / "grads.npz"))
    assert flat.keys() == expected.keys()
    for name, gradient in expected.items():
        assert off(flat[name], gradient) < 1e-4, name


COUNTS = {  # golden_hint/counts.json: adapter size, prefix length; numbers of its hypernetwork
    "small": (8, 7, 3_936_256),
    "base": (64, 30, 14_149_632),
    "large": (8, 7, 18_096_128),
    "xl": (512, 30, 224_100_352),
    "xxl": (512, 30, 574_029_824),
}


@pytest.mark.parametrize("size", COUNTS)
def test_hint_parameter_count(size: str) -> None:
    adapter, prefix, expected = COUNTS[size]
    m = hint(t5.preset(size), adapter, prefix)
    assert m.hypermodel is not None
    shapes = model.hypermodel_shapes(m)
    assert model.count_parameters(shapes) == expected


# --------------------------------------------------------------------------------- Hyperdecoders

STACKS = {"encoder": 1, "decoder": 2}  # the MLP's place in a block of each stack
GENERATED = {"down": "weight_down", "up": "weight_up", "down_bias": "bias_down"}
GENERATED["up_bias"] = "bias_up"


def hyperdecoder_params(state: dict[str, np.ndarray]) -> Tree:
    """Convert PyTorch's names to ours."""
    own: Tree = {}
    for stack, index in STACKS.items():
        learned = {}
        for name in ("down", "up"):
            at = f"{stack}.block.{{}}.layer.{index}.adapter_layer.adapter_{name}_manual"
            for leaf, kind in ((name, "weight"), (f"{name}_bias", "bias")):
                layers = np.stack([state[f"{at.format(i)}.{kind}"] for i in (0, 1)])
                learned[leaf] = layers.swapaxes(1, 2) if kind == "weight" else layers
        site = "enc_mlp" if stack == "encoder" else "dec_mlp"
        own[f"{stack}_adapters"] = {f"{site}.bottleneck.{k}": v for k, v in learned.items()}
        if f"{stack}.mlp.0.weight" not in state:
            continue

        def dense(name: str, stack: str = stack) -> Tree:
            return {
                "kernel": state[f"{stack}.{name}.weight"].T,
                "bias": state[f"{stack}.{name}.bias"],
            }

        own[f"{stack}_mlp_in"], own[f"{stack}_mlp_out"] = dense("mlp.0"), dense("mlp.2")
        own[f"{stack}_generator"] = {
            "layer_embedding": state[f"{stack}.param_gen.layer_embed.weight"],
            "hidden": dense("param_gen.decoder.linear1"),
            **{k: dense(f"param_gen.decoder.{v}") for k, v in GENERATED.items()},
        }
    return own


@pytest.fixture(scope="module")
def hyperdecoder_run(shared_dir: Path) -> tuple[Tree, dict[str, np.ndarray]]:
    """Load (parameters, golden arrays)."""
    folder = shared_dir / "golden_hyperdecoder"
    state = dict(np.load(folder / "params.npz"))
    own = hyperdecoder_params(state | dict(np.load(folder / "extra_params_generated_encoder.npz")))
    plain = {k: v for k, v in state.items() if not any(w in k for w in ("adapter", "mlp", "param"))}
    params = {"hypermodel": own, "backbone": param_trees.from_hf(plain, SIZES)}
    return params, dict(np.load(folder / "golden.npz"))


def hyperdecoder(sizes: t5.T5Config = SIZES, **fields: Any) -> model.Model:
    """Build the model of the golden files, with changes."""
    fields = {"bottleneck_activation": "relu", "bottleneck_input": "raw", **fields}
    return make_model("hyperdecoder", sizes, bottleneck_sizes=(4, 4), generator_size=6, **fields)


def own_params(m: model.Model, params: Tree) -> Tree:
    """Select the parameters of this model; the golden file has those of all variants."""
    fresh = model.hypermodel_shapes(m)
    own = {k: params["hypermodel"][k] for k in fresh}
    assert jax.tree.map(np.shape, own) == jax.tree.map(np.shape, fresh)
    return {**params, "hypermodel": own}


def hyperdecoder_batch(golden: dict[str, np.ndarray]) -> Tree:
    rows = len(golden["input_ids"])
    return {
        "hyper_inputs": np.ones((rows, 1), np.int32),
        "inputs": golden["input_ids"][:, None],
        "targets": golden["labels"][:, None],
        "tasks": np.zeros(rows, np.int32),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "logits": {},
    "logits_adapter_norm_input": {"bottleneck_input": "normed"},
    "logits_no_mlp": {"pooled_mlp": False},
    "logits_decoder_manual": {"decoder": "learned"},
    "logits_decoder_none": {"decoder": "none"},
    "logits_plain_t5": {"encoder": "none", "decoder": "none"},
    "generated_encoder__logits": {"encoder": "generated"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_hyperdecoder_logits(hyperdecoder_run: Any, name: str) -> None:
    params, golden = hyperdecoder_run
    m, real = hyperdecoder(**VARIANTS[name]), golden["labels"] > 0
    logits = np.asarray(logits_of(m, own_params(m, params), hyperdecoder_batch(golden)))
    assert off(logits[real], golden[name][real]) < CLOSE


def test_hyperdecoder_adapters(hyperdecoder_run: Any) -> None:
    params, golden = hyperdecoder_run
    m, ids = hyperdecoder(), jnp.asarray(golden["input_ids"])
    tasks = jnp.zeros(len(ids), jnp.int32)
    adapters = generate_adapters(m, own_params(m, params), ids, tasks)
    assert adapters is not None
    assert_hyperdecoder_adapters(adapters.tree, golden)
    real = golden["attention_mask"] > 0
    actual = np.asarray(adapters.tree[ad.MEMORY]["states"][0])[real]
    assert off(actual, golden["encoder_output"][real]) < CLOSE


def assert_hyperdecoder_adapters(tree: Tree, golden: dict[str, np.ndarray]) -> None:
    for layer in (0, 1):
        for leaf in GENERATED:
            kind, _, bias = leaf.partition("_")
            expected = golden[f"layer_{layer}_adapter_{kind}_{bias or 'weight'}"]
            actual = tree["dec_mlp"]["bottleneck"][leaf][layer]
            assert off(actual, expected) < CLOSE, (layer, leaf)


def test_hyperdecoder_greedy_decoding(hyperdecoder_run: Any) -> None:
    params, golden = hyperdecoder_run
    m, ids = hyperdecoder(), jnp.asarray(golden["input_ids"])
    tasks = jnp.zeros(len(ids), jnp.int32)
    tokens = model.generate_tokens(m, own_params(m, params), None, ids, tasks, steps=8)
    np.testing.assert_array_equal(tokens, golden["greedy"])


def test_hyperdecoder_gradients(hyperdecoder_run: Any, shared_dir: Path) -> None:
    params, golden = hyperdecoder_run
    m, targets = hyperdecoder(), jnp.asarray(golden["labels"])
    params, vocab = own_params(m, params), SIZES.vocab_size

    def loss(own: Tree) -> jax.Array:
        logits = m.logits({**params, "hypermodel": own}, hyperdecoder_batch(golden))
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        smooth = 0.9 * nll - 0.1 / vocab * jnp.sum(log_p, -1)
        return jnp.sum(smooth * (targets > 0))

    value, grads = jax.jit(jax.value_and_grad(loss))(params["hypermodel"])
    assert abs(float(value) / float(golden["loss_label_smoothed_sum"]) - 1) < CLOSE
    expected = dict(np.load(shared_dir / "golden_hyperdecoder" / "grads.npz"))
    # The decoder's learned adapters have none in this variant.
    zero = {
        k: np.zeros_like(expected[k.replace("decoder", "encoder").replace("layer.2", "layer.1")])
        for k in np.load(shared_dir / "golden_hyperdecoder" / "params.npz")
        if k.startswith("decoder") and "adapter" in k
    }
    ours = hyperdecoder_params(zero | expected)
    for name, branch in grads.items():
        for path, gradient in traverse_util.flatten_dict(branch, sep="/").items():
            wanted = traverse_util.flatten_dict(ours[name], sep="/")[path]
            assert off(gradient, wanted) < 1e-4, (name, path)


@pytest.mark.parametrize(
    ("size", "adapters", "generator", "expected"),
    [("large", (64, 64), 128, 22_452_400), ("base", (512, 36), 72, 14_785_236)],
)
def test_hyperdecoder_parameter_count(
    size: str, adapters: tuple[int, ...], generator: int, expected: int
) -> None:
    m = make_model(
        "hyperdecoder", t5.preset(size), bottleneck_sizes=adapters, generator_size=generator
    )
    shapes = model.hypermodel_shapes(m)
    assert model.count_parameters(shapes) == expected


def test_hyperdecoder_init_scale(shared_dir: Path) -> None:
    m = hyperdecoder()
    assert m.hypermodel is not None
    own = hypermodels.init_params(m.hypermodel, jax.random.key(0))
    raw = json.loads((shared_dir / "golden_hyperdecoder" / "config.json").read_text())
    official = raw["official_init_mean_std_absmax"]
    for leaf, name in GENERATED.items():
        _, std, most = official[f"decoder.param_gen.decoder.{name}.weight"]
        kernel = np.asarray(own["decoder_generator"][leaf]["kernel"])
        assert 0.7 < kernel.std() / std < 1.4, leaf
        assert 0.85 < np.abs(kernel).max() / most < 1.2, leaf
    for leaf, name in (("down", "down"), ("up", "up")):
        at = f"encoder.block.0.layer.1.adapter_layer.adapter_{name}_manual.weight"
        learned = np.asarray(own["encoder_adapters"][f"enc_mlp.bottleneck.{leaf}"])
        assert 0.8 < np.abs(learned).max() / official[at][2] < 1.2, leaf


# ------------------------------------------------------------------ without the reference data


@functools.cache
def committed() -> tuple[t5.T5Config, Tree, dict[str, np.ndarray]]:
    """Load (sizes, T5X's backbone, arrays of both systems); see tests/golden/README.md."""
    sizes, backbone, _ = weights.load_backbone(GOLDEN / "checkpoint_7")
    return sizes, backbone, dict(np.load(GOLDEN / "hypermodels.npz"))


def committed_run(system: str) -> tuple[model.Model, Tree, dict[str, np.ndarray]]:
    """Return (model, parameters, golden arrays) of a system."""
    sizes, backbone, arrays = committed()

    def part(kind: str) -> dict[str, np.ndarray]:
        prefix = f"{system}/{kind}/"
        return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

    if system == "hint":
        m, own = hint(sizes, 4, 3), nested(part("params"))
    else:
        m, own = hyperdecoder(sizes=sizes), hyperdecoder_params(part("params"))
    return m, own_params(m, {"hypermodel": own, "backbone": backbone}), part("golden")


@pytest.mark.parametrize("system", ["hint", "hyperdecoder"])
def test_committed_adapters_of_official_encoder_outputs(
    system: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, params, golden = committed_run(system)
    ids = jnp.asarray(golden["hyper_inputs"])
    monkeypatch.setattr(t5.T5, "encode", lambda *_, **__: jnp.asarray(golden["states"]))
    adapters = m.adapters(params, ids, jnp.zeros(len(ids), jnp.int32))
    assert adapters is not None
    check = assert_hint_adapters if system == "hint" else assert_hyperdecoder_adapters
    check(adapters.tree, golden)


@pytest.mark.parametrize("system", ["hint", "hyperdecoder"])
def test_committed_logits_and_gradients(system: str) -> None:
    m, params, golden = committed_run(system)
    logits, norms = logits_and_gradient_norms(m, params, golden["hyper_inputs"])
    assert off(logits, golden["logits"]) < CLOSE
    np.testing.assert_allclose(norms, golden["gradient_norms"], rtol=1e-4)


def logits_and_gradient_norms(
    m: model.Model, params: Tree, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return every 16th logit of fixed rows, and the norm of each gradient of the hypermodel."""
    rows = np.random.default_rng(0).integers(2, m.sizes.vocab_size, (len(ids), 1, 6))
    inputs = rows if m.system.conditioned_on == "task" else ids[:, None]
    batch = {"hyper_inputs": ids, "inputs": inputs, "targets": rows}
    batch = {k: np.asarray(v, np.int32) for k, v in batch.items()}
    batch["tasks"] = np.zeros(len(ids), np.int32)

    def loss(own: Tree) -> tuple[jax.Array, jax.Array]:
        logits = m.logits({**params, "hypermodel": own}, batch)
        targets = jnp.asarray(batch["targets"][:, 0])
        return losses.token_loss(logits, targets, targets > 0, 0.0)["loss"], logits

    grads, logits = jax.jit(jax.grad(loss, has_aux=True))(params["hypermodel"])
    norms = [np.linalg.norm(np.ravel(gradient)) for gradient in jax.tree.leaves(grads)]
    return np.asarray(logits)[..., ::16], np.array(norms)
