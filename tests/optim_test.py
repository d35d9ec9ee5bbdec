"""Schedules, Adafactor against T5X and against numpy, AdamW's mask, the heads' own rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from hyper_t5 import optim
from hyper_t5.errors import UserError

pytestmark = pytest.mark.smoke


def section(**changes: Any) -> ConfigDict:
    fields: dict[str, Any] = {
        "name": "adafactor",
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "decay_rate": 0.8,
        "min_dim_size_to_factor": 128,
        "multiply_by_parameter_scale": True,
        "head_learning_rate_scale": 1.0,
        "backbone_learning_rate_scale": 1.0,
        "first_step": 0,
        "hypermodel_step_offset": 0,
        "backbone_step_offset": 0,
    }
    return ConfigDict(fields | changes)


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
    rate = jax.jit(optim.schedule(section(schedule=name, warmup_steps=warmup), 100))
    for step, value in expected.items():
        np.testing.assert_allclose(rate(step), value, rtol=1e-6, atol=1e-9, err_msg=f"step {step}")


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="'step' is not known; choose of: constant, linear"):
        optim.make_optimizer(section(schedule="step"), 10)
    with pytest.raises(UserError, match="'sgd' is not known; choose adafactor or adamw"):
        optim.make_optimizer(section(name="sgd"), 10)


def stack_layers(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """T5X's flat per-layer arrays as our nested tree, layers stacked under `layers`."""
    names = [name.replace("/layers_0/", "/layers/") for name in arrays if "/layers_1/" not in name]
    tree: dict[str, Any] = {}
    for name in names:
        *folders, last = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        if "/layers/" in name:
            both = [arrays[name.replace("/layers/", f"/layers_{i}/")] for i in range(2)]
            node[last] = jnp.asarray(np.stack(both))
        else:
            node[last] = jnp.asarray(arrays[name])
    return tree


def prefixed(arrays: Any, prefix: str, suffix: str = "") -> dict[str, np.ndarray]:
    names = [name for name in arrays.files if name.startswith(prefix) and name.endswith(suffix)]
    return {name[len(prefix) : len(name) - len(suffix)]: arrays[name] for name in names}


def test_adafactor_makes_the_step_of_t5x(shared_dir: Path) -> None:
    golden = shared_dir / "golden_t5x"
    step8, state7 = np.load(golden / "step8.npz"), np.load(golden / "opt_state.npz")

    def slots(arrays: Any, prefix: str) -> optax.FactoredState:
        names = [f"{prefix}step", *(f"{prefix}param_states/" for _ in range(3))]
        trees = [
            stack_layers(prefixed(arrays, name, f"/{slot}"))
            for name, slot in zip(names[1:], ("v_row", "v_col", "v"), strict=True)
        ]
        return optax.FactoredState(jnp.asarray(arrays[names[0]]), *trees)

    params = stack_layers(dict(np.load(golden / "params.npz")))
    grads = stack_layers(prefixed(step8, "grads/"))
    optimizer = optim.adafactor(float(step8["learning_rate"]), min_dim_size_to_factor=32)
    fresh = optimizer.init(params)
    start = (slots(state7, ""), *fresh[1:])
    assert jax.tree.map(jnp.shape, start) == jax.tree.map(jnp.shape, fresh)

    updates, state = jax.jit(optimizer.update)(grads, start, params)
    expected = stack_layers(prefixed(step8, "params_step8/"))
    # The parameters move by a thousandth of their size, so the move itself is compared too.
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
    """Adafactor for one leaf of one layer in float64: learning rate 0.1, T5X's other defaults."""
    param = param.astype(np.float64)
    rows = columns = moments = 0.0
    for step, grad in enumerate(grads):
        keep = 1 - (first + step + 1.0) ** -0.8
        square = grad.astype(np.float64) ** 2 + 1e-30
        if param.ndim == 2 and min(param.shape) >= factor_from:
            rows = keep * rows + (1 - keep) * square.mean(1, keepdims=True)
            columns = keep * columns + (1 - keep) * square.mean(0, keepdims=True)
            root = np.sqrt(rows * columns / rows.mean())
        else:
            moments = keep * moments + (1 - keep) * square
            root = np.sqrt(moments)
        move = grad / root
        move /= max(1.0, np.sqrt((move**2).mean()))
        param = param - 0.1 * max(np.sqrt((param**2).mean()), 1e-3) * move
    return param


def test_adafactor_layer_by_layer_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    shapes = {"wide": (3, 4, 6), "tall": (3, 6, 4), "thin": (3, 3, 6), "scale": (3, 5)}
    # Layers of very different size: mixing them would show at once.
    size = np.array([1e-4, 1.0, 30.0])
    stacked = {k: rng.normal(size=s).T * size for k, s in shapes.items()}
    params: dict[str, Any] = {
        "stack": {"layers": {k: jnp.asarray(v.T, jnp.float32) for k, v in stacked.items()}},
        "table": jnp.asarray(rng.normal(size=(7, 5)), jnp.float32),
        "zero": jnp.zeros((4, 4), jnp.float32),
    }

    def noise(scale: float) -> Any:
        return jax.tree.map(
            lambda p: jnp.asarray(scale * rng.normal(size=p.shape), p.dtype), params
        )

    grads = [noise(scale) for scale in (1, 10, 0.1)]
    optimizer = optim.make_optimizer(section(min_dim_size_to_factor=4), 10)
    state, new = optimizer.init(params), params
    for grad in grads:
        updates, state = jax.jit(optimizer.update)(grad, state, new)
        new = optax.apply_updates(new, updates)

    for name in ("table", "zero"):
        expected = numpy_adafactor(
            np.asarray(params[name]), [np.asarray(g[name]) for g in grads], 4
        )
        np.testing.assert_allclose(new[name], expected, rtol=2e-5, atol=1e-9, err_msg=name)
    for name in shapes:
        first = params["stack"]["layers"][name]
        for i in range(3):
            history = [np.asarray(g["stack"]["layers"][name][i]) for g in grads]
            expected = numpy_adafactor(np.asarray(first[i]), history, 4)
            np.testing.assert_allclose(
                new["stack"]["layers"][name][i], expected, rtol=2e-5, atol=1e-9, err_msg=name
            )
    factored = jax.tree.map(jnp.shape, state[0][0].v_row["stack"]["layers"])
    assert factored == {"wide": (3, 4), "tall": (3, 4), "thin": (3, 1), "scale": (3, 1)}


def test_each_group_has_its_step_offset() -> None:
    """HINT's two groups: T5X counts from 1,100,000, and the fresh hypernetwork starts anew."""
    rng = np.random.default_rng(0)
    params = {
        k: {"w": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
        for k in ("hypermodel", "backbone")
    }
    grads = [jax.tree.map(lambda p, s=s: p * s + 0.1, params) for s in (3.0, -0.2, 1.0)]
    offsets = {"first_step": 1_100_000, "hypermodel_step_offset": 1_100_000}
    optimizer = optim.make_optimizer(section(**offsets), 10)
    state, new = optimizer.init(params), params
    for grad in grads:
        updates, state = jax.jit(optimizer.update)(grad, state, new)
        new = optax.apply_updates(new, updates)
    for group, first in (("hypermodel", 0), ("backbone", 1_100_000)):
        history = [np.asarray(g[group]["w"]) for g in grads]
        expected = numpy_adafactor(np.asarray(params[group]["w"]), history, 128, first)
        np.testing.assert_allclose(new[group]["w"], expected, rtol=2e-5, err_msg=group)
        other = numpy_adafactor(np.asarray(params[group]["w"]), history, 128, 1_100_000 - first)
        assert np.abs(other - expected).max() > 1e-3


def test_weight_decay_spares_scales_and_biases() -> None:
    params = {
        "layers": {"kernel": jnp.ones((2, 3, 3)), "scale": jnp.ones((2, 3))},
        "norm": jnp.ones(3),
        "table": jnp.ones((3, 3)),
    }
    grads = jax.tree.map(jnp.zeros_like, params)
    for name in ("adamw", "adafactor"):
        optimizer = optim.make_optimizer(section(name=name, weight_decay=0.5), 10)
        updates, _ = jax.jit(lambda g, p, o=optimizer: o.update(g, o.init(p), p))(grads, params)
        changed = jax.tree.map(lambda u: float(jnp.abs(u).max()), updates)
        np.testing.assert_allclose(changed["layers"]["kernel"], 0.05, rtol=1e-6)
        np.testing.assert_allclose(changed["table"], 0.05, rtol=1e-6)
        assert changed["layers"]["scale"] == changed["norm"] == 0, name


def test_heads_have_their_own_rate_and_gradients_are_clipped() -> None:
    params = {"reader": {"w": jnp.ones((2, 2))}, "heads": {"headstrong": {"w": jnp.ones((2, 2))}}}
    grads = jax.tree.map(lambda p: 100 * p, params)

    def step(**changes: Any) -> Any:
        optimizer = optim.make_optimizer(section(name="adamw", eps=1.0, **changes), 10)
        return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(grads, params)

    plain, scaled, clipped = step(), step(head_learning_rate_scale=5.0), step(clip_norm=1.0)
    assert jnp.array_equal(scaled["reader"]["w"], plain["reader"]["w"])
    head = scaled["heads"]["headstrong"]["w"]
    np.testing.assert_allclose(head, 5 * plain["heads"]["headstrong"]["w"], rtol=1e-6)
    # Eight equal gradients of norm 1 are 1/sqrt(8) each; Adam's first move is then g / (g + eps).
    one = 8**-0.5
    np.testing.assert_allclose(clipped["reader"]["w"], -0.1 * one / (one + 1), rtol=1e-5)


def test_the_backbone_may_learn_more_slowly() -> None:
    params = {"backbone": {"backbone_like": jnp.ones(2)}, "hypermodel": {"w": jnp.ones(2)}}

    def step(scale: float) -> Any:
        changes = {"name": "adamw", "backbone_learning_rate_scale": scale}
        optimizer = optim.make_optimizer(section(**changes), 10)
        return optimizer.update(params, optimizer.init(params), params)[0]

    plain, scaled = step(1.0), step(0.25)
    moved = plain["backbone"]["backbone_like"]
    np.testing.assert_allclose(scaled["backbone"]["backbone_like"], moved / 4, rtol=1e-6)
    assert jnp.array_equal(scaled["hypermodel"]["w"], plain["hypermodel"]["w"])
