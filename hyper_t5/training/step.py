"""The training step: loss, gradient, update, and what is wrapped around them.

Frozen is structural: ``loss(trained, frozen, batch, rng)`` is differentiated by its first argument
only, so frozen weights have no gradient, no optimizer state, and no place in the checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hyper_t5 import adapters
from hyper_t5 import model as model_lib
from hyper_t5.model import Model, Tree
from hyper_t5.parallel import sharding
from hyper_t5.training import loss_guard, losses

Array = jax.Array
State = dict[str, Any]  # {"params", "opt_state", "step", "guard"}: the content of a checkpoint
Gradient = Callable[[Tree, Tree, Tree, Array], tuple[Tree, Tree]]


def make_step(
    m: Model,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    shardings: Any = None,
) -> jax.stages.Wrapped:
    """Return the jitted training step: (state, frozen, batch, key) -> (state, sums).

    Args:
      m: the model.
      optimizer: of the trained parameters.
      config: of the run.
      shardings: of the state (`state_shardings`), before and after a step; None on one device. The
        sums are replicated.
    """
    gradient = microbatched(m, make_gradient(m, config, shardings), config.train.microbatches)

    def step(state: State, frozen: Tree, batch: Tree, key: Array) -> tuple[State, Tree]:
        rng = jax.random.fold_in(key, state["step"])
        grads, sums = gradient(_gather(m, state["params"]), frozen, batch, rng)
        # Gradients of the sum; the mean is over the tokens of the whole batch.
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums["tokens"], 1.0), grads)
        sums["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return guard_update(config, state, {"params": params, "opt_state": opt_state}, sums)

    if m.placement is None:
        return jax.jit(step, donate_argnums=0)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, m.placement.replicated))


def loss_sums(
    m: Model,
    trained: Tree,
    frozen: Tree,
    batch: Tree,
    rng: Array | None,
    z_loss: float = 1e-4,
    label_smoothing: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Return the summed loss of a batch, and its sums and counts (`losses.token_loss`).

    ``emitted`` counts the tasks with adapters (or rows, where each has its own), ``adapter_norm``
    is the sum of their norms.
    """
    logits, emitted = m.forward({**frozen, **trained}, batch, rng)
    rows = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items() if k.startswith("target")}
    targets, segments = rows["targets"], rows.get("target_segments")
    sums = losses.token_loss(logits, targets, targets > 0, z_loss, label_smoothing, segments)
    if emitted is not None:
        norms = jax.lax.stop_gradient(adapters.norms(emitted))
        sums |= {"adapter_norm": jnp.sum(norms), "emitted": jnp.float32(emitted.num_tasks)}
    return sums["loss"], sums


def make_gradient(m: Model, config: ConfigDict, shardings: Any = None) -> Gradient:
    """Return (trained, frozen, batch, rng) -> (gradients of the summed loss, sums)."""
    use_dropout = m.sizes.dropout_rate > 0
    options = config.train.z_loss, config.train.label_smoothing

    def gradient(trained: Tree, frozen: Tree, batch: Tree, rng: Array) -> tuple[Tree, Tree]:
        def loss(trained: Tree) -> tuple[Array, Tree]:
            return loss_sums(m, trained, frozen, batch, rng if use_dropout else None, *options)

        grads, sums = jax.grad(loss, has_aux=True)(trained)
        if shardings is not None:  # reduce-scatter: no device needs the whole gradient
            grads = jax.lax.with_sharding_constraint(grads, shardings["params"])
        return grads, sums

    return gradient


def microbatched(m: Model, gradient: Gradient, parts: int) -> Gradient:
    """Return ``gradient`` as a sum over ``parts`` microbatches of a batch's tasks."""
    if parts == 1:
        return gradient

    def accumulated(trained: Tree, frozen: Tree, batch: Tree, rng: Array) -> tuple[Tree, Tree]:
        split = jax.tree.map(functools.partial(_split, m, parts), batch)

        def add(total: Any, part: tuple[Tree, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(trained, frozen, *part)), None

        first = (jax.tree.map(lambda x: x[0], split), jax.random.fold_in(rng, 0))
        shapes = jax.eval_shape(lambda part: gradient(trained, frozen, *part), first)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(parts))
        total, _ = jax.lax.scan(add, zero, (split, rngs))
        return total

    return accumulated


def guard_update(config: ConfigDict, state: State, new: State, sums: Tree) -> tuple[State, Tree]:
    """Return the state after a step: ``new``, or where the step was bad the state before it.

    The choice is part of the compiled update. With ``train.on_bad_step='stop'`` the step number
    stays too, so that the host finds the state from before the bad step.
    """
    number = state["step"] + 1
    good, guard = loss_guard.check_step(
        config, state["guard"], sums["loss"], sums["tokens"], sums["grad_norm"], number
    )
    chosen = {k: jax.tree.map(functools.partial(jnp.where, good), new[k], state[k]) for k in new}
    stop = ~good & (config.train.on_bad_step == "stop")
    sums |= {"bad_step": guard["bad_step"], "skipped": guard["skipped"]}
    return {**chosen, "step": jnp.where(stop, state["step"], number), "guard": guard}, sums


def state_shardings(m: Model, optimizer: optax.GradientTransformation, params: Tree) -> Any:
    """Return the shardings of a training state, from (the shapes of) the trained parameters."""
    placement = m.placement
    assert placement is not None
    shardings = model_lib.param_shardings(m)
    trained = {branch: shardings[branch] for branch in params}
    opt_shapes = jax.eval_shape(optimizer.init, params)
    return {
        "params": trained,
        "opt_state": sharding.state_sharding(opt_shapes, params, trained, placement),
        "step": placement.replicated,
        "guard": jax.tree.map(lambda _: placement.replicated, jax.eval_shape(loss_guard.init)),
    }


def init_state(
    optimizer: optax.GradientTransformation, trained: Tree, shardings: Any = None
) -> State:
    """Return the state at step 0; ``shardings`` from `state_shardings`, None on one device."""
    init = jax.jit(optimizer.init, out_shardings=shardings and shardings["opt_state"])
    state: State = {
        "params": trained,
        "opt_state": init(trained),
        "step": jnp.zeros((), jnp.int32),
        "guard": loss_guard.init(),
    }
    return sharding.device_put(state, shardings) if shardings else state


def _gather(m: Model, params: Tree) -> Tree:
    """Return trained parameters as a step computes with them: not sharded over `data`."""
    if m.placement is None:
        return params
    axes = model_lib.logical_axes(m)
    shardings = {k: m.placement.compute_sharding(axes[k], v) for k, v in params.items()}
    return jax.lax.with_sharding_constraint(params, shardings)


def _split(m: Model, parts: int, x: Array) -> Array:
    """[T, ...] -> [parts, T / parts, ...]; each device's tasks are split, and none moves."""
    x = jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    if m.placement is None:
        return x
    return jax.lax.with_sharding_constraint(x, m.placement.microbatch_sharding)
