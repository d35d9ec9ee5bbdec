"""Token losses. They return sums and counts; the mean is taken once, over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def token_loss(
    logits: Array,
    targets: Array,
    weights: Array,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
    segments: Array | None = None,
) -> dict[str, Array]:
    """Compute cross-entropy with z-loss, as T5X's ``compute_weighted_cross_entropy``.

    Args:
      logits: [B, L, V] float32.
      targets: [B, L] token ids.
      weights: [B, L], 0 where padding.
      z_loss: factor of ``log(Z)^2``, which keeps the softmax normalizer near 1.
      label_smoothing: probability mass spread over the other tokens.
      segments: [B, L], of packed rows: 1, 2, ... for the examples of each row, 0 for padding.

    Returns:
      Sums over the batch, in nats or counts: ``loss`` (with z-loss), ``z_loss``, ``correct`` and
      ``tokens`` (tokens), ``exact`` (examples whose every token is the argmax) and ``rows``
      (examples).
    """
    vocab = logits.shape[-1]
    weights = weights.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    # A comparison with iota fuses into the reduction; the gradient of a gather is a scatter.
    is_target = jnp.arange(vocab) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
    nll = log_z - target_logit
    if label_smoothing:
        low = label_smoothing / (vocab - 1)
        high = 1.0 - label_smoothing
        entropy = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low + 1e-20))
        total_nll = vocab * log_z - jnp.sum(logits, -1)  # summed over the vocabulary
        nll = high * nll + low * (total_nll - nll) - entropy
    penalty = z_loss * jnp.square(log_z)
    real = weights > 0
    correct = (jnp.argmax(logits, -1) == targets) & real
    wrong = real & ~correct
    if segments is None:
        examples, inexact = jnp.sum(jnp.any(real, -1)), jnp.sum(jnp.any(wrong, -1))
    else:
        rows = jnp.arange(len(targets))[:, None]
        by_segment = jnp.zeros((len(targets), targets.shape[1] + 1), bool)
        examples = jnp.sum(by_segment.at[rows, segments].max(real)[:, 1:])
        inexact = jnp.sum(by_segment.at[rows, segments].max(wrong)[:, 1:])
    return {
        "loss": jnp.sum((nll + penalty) * weights),
        "z_loss": jnp.sum(penalty * weights),
        "correct": jnp.sum(correct),
        "tokens": jnp.sum(weights),
        "exact": examples - inexact,
        "rows": examples,
    }
