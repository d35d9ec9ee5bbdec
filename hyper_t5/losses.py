"""Token losses. Functions return sums and counts; the mean is taken once over the global batch."""

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
    """Cross-entropy with z-loss, as T5X's ``compute_weighted_cross_entropy``.

    Args:
      logits [B, L, V] float32; targets [B, L]; weights [B, L], 0 where padding.
      z_loss: factor of ``log(Z)^2``, which keeps the softmax normaliser near 1.
      segments [B, L]: of packed rows, 1, 2, ... for the examples of each row.
    Returns: sums over the batch: ``loss`` (with z-loss), ``z_loss``, ``correct``, ``tokens``,
      ``exact`` (examples whose every token is the likeliest) and ``rows`` (examples). All in nats
      or counts.
    """
    vocab = logits.shape[-1]
    weights = weights.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    # A comparison with iota fuses into the reduction; a gather's gradient would be a scatter.
    is_target = jnp.arange(vocab) == targets[..., None]
    at_target = jnp.sum(jnp.where(is_target, logits, 0.0), -1)
    nll = log_z - at_target
    if label_smoothing:
        low = label_smoothing / (vocab - 1)
        high = 1.0 - label_smoothing
        entropy = -(high * jnp.log(high) + (vocab - 1) * low * jnp.log(low + 1e-20))
        total = vocab * log_z - jnp.sum(logits, -1)  # sum over the vocabulary of -log p
        nll = high * nll + low * (total - nll) - entropy
    penalty = z_loss * jnp.square(log_z)
    hit = (jnp.argmax(logits, -1) == targets) & (weights > 0)
    real = weights > 0
    wrong = real & ~hit
    if segments is None:
        examples, missed = jnp.sum(jnp.any(real, -1)), jnp.sum(jnp.any(wrong, -1))
    else:
        rows = jnp.arange(len(targets))[:, None]
        place = jnp.zeros((len(targets), targets.shape[1] + 1), bool)  # 0 is padding
        examples = jnp.sum(place.at[rows, segments].max(real)[:, 1:])
        missed = jnp.sum(place.at[rows, segments].max(wrong)[:, 1:])
    return {
        "loss": jnp.sum((nll + penalty) * weights),
        "z_loss": jnp.sum(penalty * weights),
        "correct": jnp.sum(hit),
        "tokens": jnp.sum(weights),
        "exact": examples - missed,
        "rows": examples,
    }


def distillation_loss(logits: Array, teacher_logits: Array, weights: Array) -> Array:
    """Sum over real tokens of KL(teacher || student), logits [B, L, V], weights [B, L]."""
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits))
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - jax.nn.log_softmax(logits)), -1)
    return jnp.sum(divergence * weights)
