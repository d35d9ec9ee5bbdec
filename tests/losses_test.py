"""Token losses: against the definition, with padding, smoothing and z-loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import losses

pytestmark = pytest.mark.smoke

VOCAB = 11
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, VOCAB), scale=3).astype(np.float32)
TARGETS: Any = RNG.integers(1, VOCAB, (3, 4))
TARGETS[0, 2:] = TARGETS[2] = 0  # a short row, and one of padding alone
REAL: Any = TARGETS > 0
token_loss = jax.jit(losses.token_loss, static_argnums=(3, 4))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(-1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_is_its_definition(z_loss: float, smoothing: float) -> None:
    log_p = log_softmax(LOGITS)
    wanted = np.full((3, 4, VOCAB), smoothing / (VOCAB - 1))
    np.put_along_axis(wanted, TARGETS[..., None], 1 - smoothing, -1)
    # The divergence from the wanted distribution: zero at best, whatever the smoothing.
    entropy = np.sum(wanted * np.log(np.where(wanted > 0, wanted, 1)), -1)
    penalty = z_loss * np.log(np.exp(LOGITS.astype(np.float64)).sum(-1)) ** 2
    expected = (entropy - (wanted * log_p).sum(-1) + penalty)[REAL].sum()
    found = token_loss(LOGITS, TARGETS, REAL, z_loss, smoothing)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["z_loss"], penalty[REAL].sum(), rtol=1e-5)
    assert (found["tokens"], found["rows"]) == (REAL.sum(), 2)


def test_hits_are_counted_by_token_and_by_row() -> None:
    best = LOGITS.argmax(-1)
    targets = np.where(REAL, best, 0)
    assert (targets[REAL] > 0).all()
    found = token_loss(LOGITS, targets, targets > 0)
    assert (found["correct"], found["exact"]) == (REAL.sum(), 2)
    targets[1, 1] = best[1, 1] % (VOCAB - 1) + 1
    found = token_loss(LOGITS, targets, targets > 0)
    assert (found["correct"], found["exact"]) == (REAL.sum() - 1, 1)


def test_padding_has_neither_loss_nor_gradient() -> None:
    poisoned = np.where(REAL[..., None], LOGITS, 50.0).astype(np.float32)
    found, expected = (token_loss(x, TARGETS, REAL) for x in (poisoned, LOGITS))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    grad = jax.jit(jax.grad(lambda x: losses.token_loss(x, TARGETS, REAL)["loss"]))(LOGITS)
    assert np.all(np.asarray(grad)[~REAL] == 0)
    assert np.all(np.any(np.asarray(grad)[REAL] != 0, -1))


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    teacher = RNG.normal(size=LOGITS.shape).astype(np.float32)
    log_p, log_t = log_softmax(LOGITS), log_softmax(teacher)
    expected = np.sum((np.exp(log_t) * (log_t - log_p)).sum(-1)[REAL])
    loss = jax.jit(losses.distillation_loss)
    np.testing.assert_allclose(loss(LOGITS, teacher, REAL), expected, rtol=1e-5)
    assert abs(float(loss(LOGITS, LOGITS + 2.0, REAL))) < 1e-5
    assert not jnp.any(jax.jit(jax.grad(losses.distillation_loss, 1))(LOGITS, teacher, REAL))
