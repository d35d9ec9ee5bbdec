"""Schedules, Adafactor against T5X and NumPy, weight decay, and the rates of groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.training import optim
from hyper_t5.utils.errors import UserError

pytestmark = pytest.mark.smoke


def make_config(**fields: Any) -> ConfigDict:
    config = config_lib.defaults().optimizer
    config.update({"name": "adafactor", "learning_rate": 0.1, "clip_norm": 0.0} | fields)
    return config


def run(params: Any, grads: list[Any], **fields: Any) -> tuple[Any, Any]:
    """Apply the updates of a config's optimizer; return the parameters and its state."""
    optimizer = optim.make_optimizer(make_config(**fields), 10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, {0: 0.1, 1: 0.1, 99: 0.1}),
        ("constant", 4, {0: 0.025, 3: 0.1, 50: 0.1}),
        ("linear", 20, {0: 0.005, 19: 0.1, 20: 0.1, 60: 0.05, 100: 0.0, 120: 0.0}),
        ("cosine", 20, {19: 0.1, 40: 0.05 * (1 + np.cos(np.pi / 4)), 60: 0.05, 100: 0.0}),
        ("rsqrt", 25, {24: 0.1, 25: 0.1, 100: 0.05, 400: 0.025}),
        ("rsqrt", 0, {0: 0.1, 1: 0.1, 4: 0.05}),
    ],
)
def test_schedule(name: str, warmup: int, expected: dict[int, float]) -> None:
    rate = jax.jit(optim.schedule(make_config(schedule=name, warmup_steps=warmup), 100))
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-9, err_msg=f"step {step}")


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="'step' is unknown; choose from: constant, linear"):
        optim.make_optimizer(make_config(schedule="step"), 10)
    with pytest.raises(UserError, match="'sgd' is unknown; choose adafactor or adamw"):
        optim.make_optimizer(make_config(name="sgd"), 10)


def read_tree(arrays: Any, prefix: str = "", suffix: str = "") -> dict[str, Any]:
    """Convert T5X's flat arrays of two layers to a nested tree, layers stacked under `layers`."""
    tree = {}
    for name in arrays.files:
        if name.startswith(prefix) and name.endswith(suffix) and "/layers_1/" not in name:
            leaf, path = arrays[name], name[len(prefix) : len(name) - len(suffix)]
            if "/layers_0/" in name:
                leaf = np.stack([leaf, arrays[name.replace("/layers_0/", "/layers_1/")]])
            tree[path.replace("/layers_0/", "/layers/")] = jnp.asarray(leaf)
    return traverse_util.unflatten_dict(tree, sep="/")


def test_adafactor_equals_t5x(shared_dir: Path) -> None:
    golden = shared_dir / "golden_t5x"
    step8, state7 = np.load(golden / "step8.npz"), np.load(golden / "opt_state.npz")

    def slots(arrays: Any, prefix: str) -> optax.FactoredState:
        trees = [
            read_tree(arrays, f"{prefix}param_states/", f"/{slot}")
            for slot in ("v_row", "v_col", "v")
        ]
        return optax.FactoredState(jnp.asarray(arrays[f"{prefix}step"]), *trees)

    params = read_tree(np.load(golden / "params.npz"))
    optimizer = optim.adafactor(float(step8["learning_rate"]), min_dim_size_to_factor=32)
    init = optimizer.init(params)
    start = (slots(state7, ""), *init[1:])
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, init)

    updates, state = jax.jit(optimizer.update)(read_tree(step8, "grads/"), start, params)
    expected = read_tree(step8, "params_step8/")
    # Parameters change by a thousandth of their size, so the updates are compared too.
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-7),
        optax.apply_updates(params, updates),
        expected,
    )
    for update, new, old in zip(*map(jax.tree.leaves, (updates, expected, params)), strict=True):
        np.testing.assert_allclose(update, new - old, rtol=0, atol=1e-4 * np.abs(new - old).max())
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, old, rtol=1e-5, atol=0),
        state[0],
        slots(step8, "state_step8/"),
    )


def numpy_adafactor(
    param: np.ndarray, grads: list[np.ndarray], factor_from: int, first: int = 0
) -> np.ndarray:
    """Run Adafactor on a leaf of one layer in float64: learning rate 0.1, T5X's other defaults."""
    param = param.astype(np.float64)
    rows = columns = moments = 0.0
    for step, grad in enumerate(grads):
        decay = 1 - (first + step + 1.0) ** -0.8
        square = grad.astype(np.float64) ** 2 + 1e-30
        if param.ndim == 2 and min(param.shape) >= factor_from:
            rows = decay * rows + (1 - decay) * square.mean(1, keepdims=True)
            columns = decay * columns + (1 - decay) * square.mean(0, keepdims=True)
            root = np.sqrt(rows * columns / rows.mean())
        else:
            moments = decay * moments + (1 - decay) * square
            root = np.sqrt(moments)
        update = grad / root
        update /= max(1.0, np.sqrt((update**2).mean()))
        param = param - 0.1 * max(np.sqrt((param**2).mean()), 1e-3) * update
    return param


def test_adafactor_of_each_layer_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    shapes = {"wide": (3, 4, 6), "tall": (3, 6, 4), "thin": (3, 3, 6), "scale": (3, 5)}
    # Layers of very different size: a mix of them would be far off.
    size = np.array([1e-4, 1.0, 30.0])
    stacked = {k: rng.normal(size=s).T * size for k, s in shapes.items()}
    params: dict[str, Any] = {
        "stack": {"layers": {k: jnp.asarray(v.T, jnp.float32) for k, v in stacked.items()}},
        "table": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32),
        "zero": jnp.zeros((4, 4), jnp.float32),
    }
    grads = [
        jax.tree.map(lambda p, s=s: jnp.asarray(s * rng.normal(size=p.shape), p.dtype), params)
        for s in (1, 10, 0.1)
    ]
    new, state = run(params, grads, min_dim_size_to_factor=4)

    def check(name: str, actual: Any, first: Any, history: list[Any]) -> None:
        expected = numpy_adafactor(np.asarray(first), [np.asarray(g) for g in history], 4)
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-9, err_msg=name)

    for name in ("table", "zero"):
        check(name, new[name], params[name], [g[name] for g in grads])
    for name in shapes:
        leaf, first = new["stack"]["layers"][name], params["stack"]["layers"][name]
        for i in range(3):
            check(name, leaf[i], first[i], [g["stack"]["layers"][name][i] for g in grads])
    factored = jax.tree.map(jnp.shape, state[0][0].v_row["stack"]["layers"])
    assert factored == {"wide": (3, 4), "tall": (3, 4), "thin": (3, 1), "scale": (3, 1)}


def test_each_group_has_its_step_offset() -> None:
    """HINT's two groups: T5X counts from 1,100,000, and the new hypernetwork from 0."""
    rng = np.random.default_rng(0)
    params = {
        k: {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
        for k in ("hypermodel", "backbone")
    }
    grads = [jax.tree.map(lambda p, s=s: p * s + 0.1, params) for s in (3.0, -0.2, 1.0)]
    new, _ = run(params, grads, first_step=1_100_000, hypermodel_step_offset=1_100_000)
    for group, first in (("hypermodel", 0), ("backbone", 1_100_000)):
        history = [np.asarray(g[group]["w"]) for g in grads]
        expected = numpy_adafactor(np.asarray(params[group]["w"]), history, 128, first)
        np.testing.assert_allclose(new[group]["w"], expected, rtol=2e-5, err_msg=group)
        other = numpy_adafactor(np.asarray(params[group]["w"]), history, 128, 1_100_000 - first)
        assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_skips_scales_and_biases(name: str) -> None:
    params = {
        "layers": {"kernel": jnp.ones((2, 3, 3)), "scale": jnp.ones((2, 3))},
        "norm": jnp.ones(3),
        "table": jnp.ones((3, 3)),
    }
    new, _ = run(params, [jax.tree.map(jnp.zeros_like, params)], name=name, weight_decay=0.5)
    change = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new, params)
    np.testing.assert_allclose(change["layers"]["kernel"], 0.05, rtol=1e-6)
    np.testing.assert_allclose(change["table"], 0.05, rtol=1e-6)
    assert change["layers"]["scale"] == change["norm"] == 0


def test_heads_and_backbone_have_their_own_rates_and_gradients_are_clipped() -> None:
    ones = jnp.ones((2, 2))
    params = {
        "hypermodel": {"reader": {"w": ones}, "heads": {"headstrong": {"w": ones}}},
        "backbone": {"backbone_like": ones},
    }
    grads = jax.tree.map(lambda p: 100 * p, params)

    def change(**fields: Any) -> tuple[Any, Any, Any]:
        new, _ = run(params, [grads], name="adamw", eps=1.0, **fields)
        reader, heads = new["hypermodel"]["reader"], new["hypermodel"]["heads"]["headstrong"]
        return reader["w"] - 1, heads["w"] - 1, new["backbone"]["backbone_like"] - 1

    reader, head, backbone = change()
    for scales, expected in (
        ({"head_learning_rate_scale": 5.0}, (reader, 5 * head, backbone)),
        ({"backbone_learning_rate_scale": 0.25}, (reader, head, backbone / 4)),
    ):
        for actual, wanted in zip(change(**scales), expected, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5)
    # Twelve equal gradients of norm 1 are 1/sqrt(12) each; Adam's first update is g / (g + eps).
    g = 12**-0.5
    np.testing.assert_allclose(change(clip_norm=1.0)[0], -0.1 * g / (g + 1), rtol=1e-5)
