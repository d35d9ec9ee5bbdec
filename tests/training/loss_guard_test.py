"""Which steps are bad, and which updates are then applied."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5.training import loss_guard
from hyper_t5.training.loss_guard import WARM

NAN, INF = float("nan"), float("inf")


@functools.cache
def check_step(on_bad_step: str, spike: float) -> Any:
    config = ConfigDict({"train": {"on_bad_step": on_bad_step, "spike": spike}})
    return jax.jit(functools.partial(loss_guard.check_step, config))


def run(
    losses: list[float],
    on_bad_step: str = "stop",
    spike: float = 0.0,
    tokens: float = 10.0,
    norms: dict[int, float] | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """Run steps 1, 2, ... of these losses per token; return the refused ones and the state."""
    state, refused = loss_guard.init(), []
    for step, loss in enumerate(losses, 1):
        norm = jnp.float32((norms or {}).get(step, 1.0))
        sums = jnp.float32(loss * tokens), jnp.float32(tokens)
        ok, state = check_step(on_bad_step, spike)(state, *sums, norm, jnp.int32(step))
        refused += [] if ok else [step]
    return refused, {name: value.item() for name, value in state.items()}


def decayed_mean(losses: list[float]) -> float:
    """Compute the mean by its definition: each older weight is 0.98 of the next."""
    weights = 0.98 ** np.arange(len(losses))[::-1]
    return float(np.sum(weights * losses) / np.sum(weights))


@pytest.mark.parametrize("on_bad_step", ["stop", "skip"])
def test_good_steps_enter_the_mean(on_bad_step: str) -> None:
    losses = [float(x) for x in np.random.default_rng(0).uniform(1, 2, 300)]
    for steps in (4, 300):
        refused, state = run(losses[:steps], on_bad_step, 2.0)
        assert refused == []
        assert state.pop("mean") == pytest.approx(decayed_mean(losses[:steps]), rel=1e-5)
        assert state == {"seen": steps, "bad_step": -1, "skipped": 0}
    # A batch of padding does not.
    state = run([0.0, 0.0], on_bad_step, tokens=0.0)[1]
    assert (state["seen"], state["mean"], state["bad_step"]) == (0, 0.0, -1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_step_stops_or_is_skipped(bad: float) -> None:
    losses = [2.0, 2.0, bad, 2.0, bad, 2.0]
    refused, state = run(losses)
    assert refused == [3, 4, 5, 6]
    assert (state["bad_step"], state["seen"], state["skipped"]) == (3, 2, 0)
    assert state["mean"] == pytest.approx(2.0)
    refused, state = run(losses, "skip")
    assert refused == [3, 5]
    assert (state["bad_step"], state["seen"], state["skipped"]) == (5, 4, 2)
    assert state["mean"] == pytest.approx(2.0)
    # The gradient alone.
    refused, state = run([2.0] * 4, norms={2: bad})
    assert (refused, state["bad_step"]) == ([2, 3, 4], 2)
    assert run([2.0] * 4, "skip", norms={2: bad})[0] == [2]


def test_a_spike_is_relative_to_the_mean_of_enough_steps() -> None:
    steady = [2.0] * WARM
    assert run([*steady, 6.1, 2.0], spike=3.0)[0] == [WARM + 1, WARM + 2]
    assert run([*steady, 6.1, 2.0], "skip", 3.0)[0] == [WARM + 1]
    assert run([*steady, 5.9], spike=3.0)[0] == []
    assert run([*steady[1:], 600.0], spike=3.0)[0] == []  # too few steps
    assert run([*steady, 600.0])[0] == []  # 0 is off
    # Per token: the same loss of more tokens is no spike.
    state = {k: jnp.asarray(v) for k, v in run(steady, spike=3.0)[1].items()}
    for tokens, expected in ((1000.0, True), (100.0, False)):
        sums = jnp.float32(2000.0), jnp.float32(tokens), jnp.float32(1.0)
        assert check_step("stop", 3.0)(state, *sums, jnp.int32(99))[0] == expected


def test_the_limit_follows_a_lasting_rise() -> None:
    refused, state = run([2.0] * WARM + [9.0] * 100, "skip", 3.0)
    assert 2 < len(refused) < 60
    assert refused == list(range(WARM + 1, WARM + 1 + len(refused)))
    assert state["skipped"] == len(refused)
    # A single spike, however high, hardly moves the mean.
    assert run([*[2.0] * WARM, 1e6], "skip", 3.0)[1]["mean"] < 2.2


def test_the_state_keeps_its_types() -> None:
    """A step is compiled once, and may donate the state."""
    args = jnp.float32(3.0), jnp.float32(2.0), jnp.float32(1.0), jnp.int32(1)
    for on_bad_step in ("stop", "skip"):
        ok, state = jax.eval_shape(check_step(on_bad_step, 2.0), loss_guard.init(), *args)
        assert state == jax.eval_shape(loss_guard.init)
        assert (ok.shape, ok.dtype) == ((), bool)
