"""Judging each step where it is made: a loss that is no number, or far above what it was.

All of it runs on the device, inside the step, so that nothing waits for the host: a bad step
leaves parameters and moments as they were, and the host learns of it when it next fetches numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

Array = jax.Array
State = dict[str, Array]

DECAY = 0.98  # of the running mean: about the last fifty steps
WARM = 50  # steps in the mean before a loss is compared with it


def start() -> State:
    """The state before the first step: all scalars.

    - ``mean`` float32: of the loss per token, in nats; the last steps count most.
    - ``seen`` int32: steps in the mean.
    - ``bad_step`` int32: the bad step: the first with 'stop', the latest with 'skip'; -1 for none.
    - ``skipped`` int32: how many updates were left out by 'skip'.
    """
    return {
        "mean": jnp.zeros((), jnp.float32),
        "seen": jnp.zeros((), jnp.int32),
        "bad_step": jnp.full((), -1, jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def guard(
    config: ConfigDict, state: State, loss: Array, tokens: Array, grad_norm: Array, step: Array
) -> tuple[Array, State]:
    """(whether this step's update may be applied, the state after it).

    A step is bad where its loss or gradient is not finite, or where ``train.spike`` > 0 and the
    loss per token is more than so many times its mean. ``train.on_bad_step`` says what then
    follows: 'stop', after which no update is good any more, until the host has stopped the run; or
    'skip', of that update alone.

    Args:
      config: read for ``train.on_bad_step`` and ``train.spike``, when the step is traced.
      state: as from ``start`` or from the step before.
      loss: sum over the batch, in nats; tokens: real ones in it; grad_norm: scalars.
      step: int32 scalar, the number that ``bad_step`` is to give this step.
    """
    spike, stops = config.train.spike, config.train.on_bad_step == "stop"
    per_token = loss.astype(jnp.float32) / jnp.maximum(tokens, 1)
    finite = jnp.isfinite(per_token) & jnp.isfinite(grad_norm)
    limit = jnp.where(state["seen"] >= WARM, spike * state["mean"], jnp.inf) if spike else jnp.inf
    good = finite & (per_token <= limit)
    stopped = (state["bad_step"] >= 0) & stops

    # With 'skip' a spike counts as the limit it broke: a loss that has risen for good is let
    # through after some steps, for otherwise every step to come would be skipped.
    counted = (good if stops else finite) & (tokens > 0) & ~stopped
    seen = state["seen"] + counted
    # The decayed mean with the bias of its start corrected, written as a step towards the loss.
    weight = (1 - DECAY) / -jnp.expm1(jnp.maximum(seen, 1) * jnp.log(DECAY))
    moved = state["mean"] + weight * (jnp.minimum(per_token, limit) - state["mean"])
    return good & ~stopped, {
        "mean": jnp.where(counted, moved, state["mean"]),
        "seen": seen,
        "bad_step": jnp.where(good | stopped, state["bad_step"], step).astype(jnp.int32),
        "skipped": state["skipped"] + (~good & (not stops)),
    }
