"""The train step: microbatches, dropout keys, normalization and padding."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax

from hyper_t5 import runs
from hyper_t5.training import step as step_lib


def random_batch(rng: np.random.Generator, tasks: int = 4, rows: int = 2) -> dict[str, np.ndarray]:
    """Rows of very different lengths, so that a mean of means is not the mean."""
    batch = {"tasks": np.arange(tasks, dtype=np.int32)}
    for name, shape in {
        "hyper_inputs": (tasks, 12),
        "inputs": (tasks, rows, 10),
        "targets": (tasks, rows, 8),
    }.items():
        ids = rng.integers(3, 800, shape)
        lengths = rng.integers(1, shape[-1] + 1, shape[:-1])
        batch[name] = np.where(np.arange(shape[-1]) < lengths[..., None], ids, 0).astype(np.int32)
    return batch


def test_microbatches_equal_the_whole_batch(make_config: Any) -> None:
    results = {}
    batch = random_batch(np.random.default_rng(0))
    for parts in (1, 2, 4):
        config = make_config(train__microbatches=parts, data__tasks_per_batch=4)
        m, _, trained, frozen = runs.init_run(config)
        optimizer = optax.sgd(1.0)  # the change of the parameters is the gradient
        state = step_lib.init_state(optimizer, trained)
        before = jax.tree.map(np.array, trained)
        state, sums = step_lib.make_step(m, optimizer, config)(
            state, frozen, batch, jax.random.key(0)
        )
        change = jax.tree.map(lambda a, b: np.asarray(a) - b, state["params"], before)
        results[parts] = (jax.device_get(sums), change)

    def assert_close(part: Any, whole: Any) -> None:
        # Sums in another order: a leaf's small numbers are as far off as its large ones. A mean of
        # the parts' means would be off by a tenth.
        np.testing.assert_allclose(part, whole, rtol=0, atol=1e-4 * np.abs(whole).max())

    for parts in (2, 4):
        jax.tree.map(assert_close, results[parts], results[1])


def test_gradients_are_divided_by_the_number_of_tokens(make_config: Any) -> None:
    """Checked with SGD, because Adam and Adafactor do not depend on the scale of gradients."""
    config = make_config(data__tasks_per_batch=4)
    m, _, trained, frozen = runs.init_run(config)
    batch = random_batch(np.random.default_rng(0))
    before = jax.tree.map(np.array, trained)

    def loss(trained: Any) -> Any:
        return step_lib.loss_sums(m, trained, frozen, batch, None, config.train.z_loss)[0]

    expected = jax.tree.map(lambda g: -g / (batch["targets"] > 0).sum(), jax.grad(loss)(trained))
    state = step_lib.init_state(optax.sgd(1.0), trained)
    state, _ = step_lib.make_step(m, optax.sgd(1.0), config)(
        state, frozen, batch, jax.random.key(0)
    )
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, state["params"], before)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), change, expected
    )


def test_dropout_differs_from_step_to_step(make_config: Any) -> None:
    config = make_config(data__tasks_per_batch=4, model__dropout_rate=0.5)
    m, _, trained, frozen = runs.init_run(config)
    batch = random_batch(np.random.default_rng(0))
    step = step_lib.make_step(m, optax.sgd(0.0), config)
    state, losses = step_lib.init_state(optax.sgd(0.0), trained), []
    for _ in range(2):
        state, sums = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(sums["loss"]))
    assert losses[0] != losses[1]


def test_dropout_differs_between_microbatches(make_config: Any) -> None:
    m, *_ = runs.init_run(make_config())

    def gradient(trained: Any, frozen: Any, batch: Any, rng: jax.Array) -> Any:
        draw = jax.random.uniform(rng)
        return {}, {"sum": draw, "squares": draw**2}

    accumulated = step_lib.microbatched(m, gradient, 4)
    batch = {"tasks": np.zeros(4, np.int32)}
    _, sums = accumulated({}, {}, batch, jax.random.key(0))
    assert sums["squares"] / 4 - (sums["sum"] / 4) ** 2 > 1e-3  # 0 if all draws are the same


def test_padding_alone_has_loss_zero(make_config: Any) -> None:
    config = make_config(data__tasks_per_batch=4)
    m, _, trained, frozen = runs.init_run(config)
    batch = random_batch(np.random.default_rng(0))
    batch["targets"][:] = 0
    state = step_lib.init_state(optax.sgd(1.0), trained)
    before = jax.tree.map(np.array, trained)
    state, sums = step_lib.make_step(m, optax.sgd(1.0), config)(
        state, frozen, batch, jax.random.key(0)
    )
    assert [float(sums[name]) for name in ("loss", "tokens", "grad_norm")] == [0, 0, 0]
    jax.tree.map(np.testing.assert_array_equal, state["params"], before)
