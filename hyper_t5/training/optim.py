"""Learning-rate schedules and optimizers: T5X's Adafactor, and AdamW.

Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) factors second moments by matrix, clips every
update to a root mean square of 1 and scales it by that of its parameter. T5X has one leaf per
layer. Here layers are stacked, `[N, ...]` under a key `layers`, so each of these three operations
is vmapped over the layers; on a whole stack they would mix the layers. A test compares a step with
T5X's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hyper_t5.utils.errors import UserError

STACK_KEY = "layers"
HEADS_KEY = "heads"
BACKBONE_KEY = "backbone"

Path = tuple[Any, ...]  # of a leaf, from `jax.tree_util`


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """Create the learning-rate schedule: step (from 0) -> float32 scalar.

    The rate rises to `learning_rate` in `warmup_steps` equal steps, of which the first is not zero.
    Then it is `constant`, falls to 0 at `total_steps` (`linear`, `cosine`), or is multiplied by
    `sqrt(warmup_steps / step)` (`rsqrt`; T5's pretraining is a `learning_rate` of 0.01 with 10,000
    `warmup_steps`, after the warm-up).

    Args:
      config: section `optimizer` of the config.
      total_steps: steps of the run.

    Raises:
      UserError: the schedule is unknown.
    """
    warmup, start = int(config.warmup_steps), max(int(config.warmup_steps), 1)
    decay_steps = max(total_steps - warmup, 1)
    decays: dict[str, optax.Schedule] = {  # by the steps after the warm-up
        "constant": optax.constant_schedule(1.0),
        "linear": optax.linear_schedule(1.0, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(1.0, decay_steps),
        "rsqrt": lambda after: jnp.sqrt(start / jnp.maximum(after + warmup, start)),
    }
    if config.schedule not in decays:
        known = ", ".join(decays)
        raise UserError(f"optimizer.schedule={config.schedule!r} is unknown; choose from: {known}")
    decay, peak = decays[config.schedule], float(config.learning_rate)

    def rate(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        ramp = jnp.minimum(1, (step + 1) / start)
        after = decay(jnp.maximum(step - warmup, 0))
        return peak * ramp * jnp.maximum(after, 0)  # the last step may round to below zero

    return rate


def has_key(path: Path, key: str) -> bool:
    """Return whether the path of a leaf passes through a key."""
    return key in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def scale_by_path(key: str, factor: float) -> optax.GradientTransformation:
    """Multiply the updates of the leaves whose path passes through a key."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if has_key(path, key) else leaf, updates
        )

    return optax.stateless(scale)


def decay_mask(params: Any) -> Any:
    """Mark the leaves with weight decay: those with two or more dimensions per layer."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.ndim - has_key(path, STACK_KEY) >= 2, params
    )


def _layer_by_layer(
    moments: optax.GradientTransformation,
    shaping: optax.GradientTransformation,
    step_offset: Callable[[Path], int],
) -> optax.GradientTransformation:
    """Chain two transformations, vmapped over the layers of stacked leaves.

    Leaves are transformed one by one, since stacks differ in depth. The state is optax's, with a
    leading layer axis in the slots of stacked leaves.

    Args:
      moments: its state is an `optax.FactoredState`.
      shaping: it has no state.
      step_offset: by path, what is subtracted from the step count.
    """

    def init_leaf(param: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(moments.init(param)[1:])

    def update_leaf(count: jax.Array, grad: jax.Array, param: jax.Array, *slots: jax.Array) -> Any:
        update, state = moments.update(grad, optax.FactoredState(count, *slots), param)
        update, _ = shaping.update(update, shaping.init(param), param)
        return update, *state[1:]

    def to_trees(like: Any, rows: list[tuple[Any, ...]]) -> list[Any]:
        structure = jax.tree.structure(like)
        return [jax.tree.unflatten(structure, leaves) for leaves in zip(*rows, strict=True)]

    def init(params: Any) -> optax.FactoredState:
        rows = [
            (jax.vmap(init_leaf) if has_key(path, STACK_KEY) else init_leaf)(param)
            for path, param in jax.tree_util.tree_leaves_with_path(params)
        ]
        return optax.FactoredState(jnp.zeros([], jnp.int32), *to_trees(params, rows))

    def update(grads: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, Any]:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        trees = [jax.tree.leaves(tree) for tree in (grads, params, *state[1:])]
        rows = []
        for path, *leaves in zip(paths, *trees, strict=True):
            axes = (None, *[0] * len(leaves))
            transform = jax.vmap(update_leaf, axes) if has_key(path, STACK_KEY) else update_leaf
            rows.append(transform(state.count - step_offset(path), *leaves))
        updates, *slots = to_trees(params, rows)
        return updates, optax.FactoredState(optax.safe_increment(state.count), *slots)

    return optax.GradientTransformation(init, update)


def adafactor(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay_rate: float = 0.8,
    step_offset: int | Callable[[Path], int] = 0,
    clipping_threshold: float = 1.0,
    min_dim_size_to_factor: int = 128,
    epsilon1: float = 1e-30,
    epsilon2: float = 1e-3,
    multiply_by_parameter_scale: bool = True,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Create T5X's Adafactor without momentum; names and defaults are T5X's.

    A leaf is factored if its two largest dimensions (of one layer, for stacked leaves) are both at
    least `min_dim_size_to_factor`. `step_offset`, of all leaves or by path, is subtracted from the
    step count in the decay of the second moments. Weight decay is decoupled, multiplied by the
    learning rate, and skips scales and biases. `update` needs `params`.
    """
    shaping = [optax.clip_by_block_rms(clipping_threshold)]
    if multiply_by_parameter_scale:
        shaping.append(optax.scale_by_param_block_rms(epsilon2))
    moments = optax.scale_by_factored_rms(True, decay_rate, 0, min_dim_size_to_factor, epsilon1)
    offset = step_offset if callable(step_offset) else lambda path: step_offset
    parts = [_layer_by_layer(moments, optax.chain(*shaping), offset)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay, decay_mask))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def make_optimizer(config: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """Create the optimizer of a run: clipping by global norm, Adafactor or AdamW, rate scales.

    The branches `hypermodel` and `backbone` of the trained parameters each have an Adafactor step
    offset, and steps count from `first_step`. With T5X's `first_step` of 1,100,000, an equal offset
    starts the second moments anew (HINT's hypernetwork); an offset of 0 continues slowly, as a T5
    that was trained for as long.

    Args:
      config: section `optimizer` of the config.
      total_steps: steps of the run.

    Raises:
      UserError: a name in the config is unknown.
    """
    rate = schedule(config, total_steps)
    if config.name == "adafactor":
        main = adafactor(
            rate,
            decay_rate=config.decay_rate,
            step_offset=functools.partial(_step_offset, config),
            min_dim_size_to_factor=config.min_dim_size_to_factor,
            multiply_by_parameter_scale=config.multiply_by_parameter_scale,
            weight_decay=config.weight_decay,
        )
    elif config.name == "adamw":
        moments = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
        main = optax.adamw(rate, **moments, weight_decay=config.weight_decay, mask=decay_mask)
    else:
        raise UserError(f"optimizer.name={config.name!r} is unknown; choose adafactor or adamw")
    parts = [main]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.head_learning_rate_scale != 1.0:
        parts.append(scale_by_path(HEADS_KEY, config.head_learning_rate_scale))
    if config.backbone_learning_rate_scale != 1.0:
        parts.append(scale_by_path(BACKBONE_KEY, config.backbone_learning_rate_scale))
    return optax.chain(*parts)


def _step_offset(config: ConfigDict, path: Path) -> int:
    """Return the step offset of a leaf; optax counts from 0, not from `first_step`."""
    group = "backbone" if has_key(path[:1], BACKBONE_KEY) else "hypermodel"
    return config[f"{group}_step_offset"] - config.first_step
