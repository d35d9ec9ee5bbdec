"""Token losses: against the definition, with padding, smoothing and z-loss."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5.training import losses

pytestmark = pytest.mark.smoke

VOCAB = 11
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 4, VOCAB), scale=3).astype(np.float32)
TARGETS: Any = RNG.integers(1, VOCAB, (3, 4))
TARGETS[0, 2:] = TARGETS[2] = 0  # a short row, and one of padding alone
REAL: Any = TARGETS > 0
token_loss = jax.jit(losses.token_loss, static_argnums=(3, 4))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_loss_equals_its_definition(z_loss: float, smoothing: float) -> None:
    exact = LOGITS.astype(np.float64)
    log_z = np.log(np.exp(exact).sum(-1))
    wanted = np.full((3, 4, VOCAB), smoothing / (VOCAB - 1))
    np.put_along_axis(wanted, TARGETS[..., None], 1 - smoothing, -1)
    # The divergence from the wanted distribution: zero at best, whatever the smoothing.
    entropy = np.sum(wanted * np.log(np.where(wanted > 0, wanted, 1)), -1)
    penalty = z_loss * log_z**2
    expected = (entropy - (wanted * (exact - log_z[..., None])).sum(-1) + penalty)[REAL].sum()
    sums = token_loss(LOGITS, TARGETS, REAL, z_loss, smoothing)
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(sums["z_loss"], penalty[REAL].sum(), rtol=1e-5)
    assert (sums["tokens"], sums["rows"]) == (REAL.sum(), 2)


def test_correct_tokens_and_exact_rows_are_counted() -> None:
    best = LOGITS.argmax(-1)
    targets = np.where(REAL, best, 0)
    assert (targets[REAL] > 0).all()
    sums = token_loss(LOGITS, targets, targets > 0)
    assert (sums["correct"], sums["exact"]) == (REAL.sum(), 2)
    targets[1, 1] = best[1, 1] % (VOCAB - 1) + 1
    sums = token_loss(LOGITS, targets, targets > 0)
    assert (sums["correct"], sums["exact"]) == (REAL.sum() - 1, 1)


def test_padding_has_neither_loss_nor_gradient() -> None:
    changed = np.where(REAL[..., None], LOGITS, 50.0).astype(np.float32)
    sums, expected = (token_loss(x, TARGETS, REAL) for x in (changed, LOGITS))
    jax.tree.map(np.testing.assert_array_equal, sums, expected)
    grad = jax.jit(jax.grad(lambda x: losses.token_loss(x, TARGETS, REAL)["loss"]))(LOGITS)
    assert np.all(np.asarray(grad)[~REAL] == 0)
    assert np.all(np.any(np.asarray(grad)[REAL] != 0, -1))
