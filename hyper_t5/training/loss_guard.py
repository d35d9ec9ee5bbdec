"""Detection of bad steps: a loss that is not finite, or far above its running mean.

It runs on the device inside the training step, so the host never waits for it. A bad step leaves
parameters and optimizer state unchanged; the host sees it when it next fetches metrics.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array
State = dict[str, Array]

DECAY = 0.98  # of the running mean: about the last fifty steps
WARM = 50  # steps in the mean before a loss is compared with it


def init() -> State:
    """Create the state before the first step.

    Returns:
      Scalars: ``mean`` (float32), the running mean of the loss per token in nats; ``seen``
      (int32), the steps in it; ``bad_step`` (int32), with 'stop' the first bad step, with 'skip'
      the latest, -1 for none; ``skipped`` (int32), the updates skipped.
    """
    return {
        "mean": jnp.zeros((), jnp.float32),
        "seen": jnp.zeros((), jnp.int32),
        "bad_step": jnp.full((), -1, jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def check_step(
    config: ConfigDict, state: State, loss: Array, tokens: Array, grad_norm: Array, step: Array
) -> tuple[Array, State]:
    """Decide whether the update of a step may be applied.

    A step is bad if its loss or gradient is not finite, or, where ``train.spike`` > 0, if its loss
    per token is more than ``train.spike`` times the running mean. With ``train.on_bad_step='stop'``
    no update is applied from the first bad step on; with 'skip' only that of the bad step is not.

    Args:
      config: ``train.on_bad_step`` and ``train.spike`` are read when the step is traced.
      state: from ``init`` or the step before.
      loss: scalar, sum over the batch in nats.
      tokens: scalar, real tokens in the batch.
      grad_norm: scalar.
      step: int32 scalar, the number of this step.

    Returns:
      Whether the update may be applied (bool scalar), and the state after the step.
    """
    spike, stops = config.train.spike, config.train.on_bad_step == "stop"
    per_token = loss.astype(jnp.float32) / jnp.maximum(tokens, 1)
    finite = jnp.isfinite(per_token) & jnp.isfinite(grad_norm)
    limit = jnp.where(state["seen"] >= WARM, spike * state["mean"], jnp.inf) if spike else jnp.inf
    good = finite & (per_token <= limit)
    stopped = (state["bad_step"] >= 0) & stops

    # With 'skip' a spike enters the mean as the limit that it exceeds: after a lasting rise of the
    # loss the limit follows, and updates are applied again.
    counted = (good if stops else finite) & (tokens > 0) & ~stopped
    seen = state["seen"] + counted
    # Exponential moving average with bias correction, as a step towards the loss.
    weight = (1 - DECAY) / -jnp.expm1(jnp.maximum(seen, 1) * jnp.log(DECAY))
    mean = state["mean"] + weight * (jnp.minimum(per_token, limit) - state["mean"])
    return good & ~stopped, {
        "mean": jnp.where(counted, mean, state["mean"]),
        "seen": seen,
        "bad_step": jnp.where(good | stopped, state["bad_step"], step).astype(jnp.int32),
        "skipped": state["skipped"] + (~good & (not stops)),
    }
