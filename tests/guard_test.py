"""Which steps are bad, and what follows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import guard

NAN, INF = float("nan"), float("inf")


@functools.cache
def judge(on_bad_step: str, spike: float) -> Any:
    config = ConfigDict({"train": {"on_bad_step": on_bad_step, "spike": spike}})
    return jax.jit(functools.partial(guard.guard, config))


def run(
    losses: list[float],
    on_bad_step: str = "stop",
    spike: float = 0.0,
    tokens: float = 10.0,
    norms: dict[int, float] | None = None,
) -> tuple[list[int], dict[str, Any]]:
    """Steps 1, 2, ... of these losses per token -> (the steps that were not good, the state)."""
    state, refused = guard.start(), []
    for step, loss in enumerate(losses, 1):
        norm = jnp.float32((norms or {}).get(step, 1.0))
        sums = jnp.float32(loss * tokens), jnp.float32(tokens)
        ok, state = judge(on_bad_step, spike)(state, *sums, norm, jnp.int32(step))
        refused += [] if ok else [step]
    return refused, {name: value.item() for name, value in state.items()}


def decayed(losses: list[float]) -> float:
    """The mean by its definition: the weight of each older loss is 0.98 of the next one's."""
    weights = 0.98 ** np.arange(len(losses))[::-1]
    return float(np.sum(weights * losses) / np.sum(weights))


def test_a_good_run_is_left_alone() -> None:
    losses = [5.0, 4.0, 4.5, 3.0]
    for how in ("stop", "skip"):
        refused, state = run(losses, how, 2.0)
        assert refused == []
        assert state["mean"] == pytest.approx(decayed(losses), rel=1e-6)
        assert {k: state[k] for k in ("seen", "bad_step", "skipped")} == {
            "seen": 4,
            "bad_step": -1,
            "skipped": 0,
        }


def test_the_mean_over_many_steps() -> None:
    losses = [float(x) for x in np.random.default_rng(0).uniform(1, 2, 400)]
    assert run(losses)[1]["mean"] == pytest.approx(decayed(losses), rel=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_stop_holds_from_the_first_bad_step_on(bad: float) -> None:
    refused, state = run([2.0, 2.0, bad, 2.0, bad, 2.0])
    assert refused == [3, 4, 5, 6]
    assert (state["bad_step"], state["seen"], state["skipped"]) == (3, 2, 0)
    assert state["mean"] == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_skip_leaves_out_that_step_alone(bad: float) -> None:
    refused, state = run([2.0, 2.0, bad, 2.0, bad, 2.0], "skip")
    assert refused == [3, 5]
    assert (state["bad_step"], state["seen"], state["skipped"]) == (5, 4, 2)
    assert state["mean"] == pytest.approx(2.0)


def test_a_gradient_that_is_no_number_is_a_bad_step() -> None:
    for bad in (NAN, INF):
        refused, state = run([2.0] * 4, norms={2: bad})
        assert refused == [2, 3, 4]
        assert state["bad_step"] == 2
    assert run([2.0] * 4, "skip", norms={2: NAN})[0] == [2]


def test_a_spike_is_against_the_mean_of_enough_steps() -> None:
    steady = [2.0] * guard.WARM
    assert run([*steady, 6.1, 2.0], spike=3.0)[0] == [guard.WARM + 1, guard.WARM + 2]
    assert run([*steady, 6.1, 2.0], "skip", 3.0)[0] == [guard.WARM + 1]
    assert run([*steady, 5.9], spike=3.0)[0] == []
    assert run([*steady[1:], 600.0], spike=3.0)[0] == []  # too early to say
    assert run([*steady, 600.0])[0] == []  # 0 = off
    # Per token: a batch of more tokens is no spike.
    state = run(steady, spike=3.0)[1]
    device = {k: jnp.asarray(v) for k, v in state.items()}
    args = jnp.float32(1.0), jnp.int32(99)
    ok, _ = judge("stop", 3.0)(device, jnp.float32(2000.0), jnp.float32(1000.0), *args)
    assert ok
    ok, _ = judge("stop", 3.0)(device, jnp.float32(2000.0), jnp.float32(100.0), *args)
    assert not ok


def test_a_loss_that_has_risen_for_good_is_let_through() -> None:
    refused, state = run([2.0] * guard.WARM + [9.0] * 100, "skip", 3.0)
    assert 2 < len(refused) < 60
    assert refused == list(range(guard.WARM + 1, guard.WARM + 1 + len(refused)))
    assert state["skipped"] == len(refused)
    # One alone, however high, hardly moves the mean.
    assert run([*[2.0] * guard.WARM, 1e6], "skip", 3.0)[1]["mean"] < 2.2


def test_a_batch_of_padding_says_nothing() -> None:
    _, state = run([0.0, 0.0], tokens=0.0)
    assert (state["seen"], state["mean"], state["bad_step"]) == (0, 0.0, -1)


def test_the_state_keeps_its_types() -> None:
    """So that a step may be compiled once, and donate it."""
    args = jnp.float32(3.0), jnp.float32(2.0), jnp.float32(1.0), jnp.int32(1)
    for how in ("stop", "skip"):
        made = jax.eval_shape(judge(how, 2.0), guard.start(), *args)
        assert made[1] == jax.eval_shape(guard.start)
        assert (made[0].shape, made[0].dtype) == ((), bool)
