"""Learning-rate schedules and optimizers: Adafactor with T5X's numbers, and AdamW.

T5 was trained with the Adafactor of T5X, so a run that goes on from a T5 checkpoint wants the same
one: second moments factored by matrix, every update clipped to a root mean square of 1 and scaled
by that of its parameter. T5X keeps one leaf a layer. Ours are stacked, `[N, ...]` under a key
`layers`, so each of these three steps is done layer by layer there; on the whole stack they would
mix the layers and give other numbers.

Sources: Shazeer & Stern 2018 (arXiv:1804.04235) for Adafactor; T5X's numbers are kept by a test
against a step that T5X made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from hyper_t5.errors import UserError

STACK_KEY = "layers"
HEADS_KEY = "heads"
BACKBONE_KEY = "backbone"

Path = tuple[Any, ...]  # of a leaf, as `jax.tree_util` gives it

SCHEDULES = ("constant", "linear", "cosine", "rsqrt")


def schedule(config: ConfigDict, total_steps: int) -> optax.Schedule:
    """The learning rate of a step (counted from 0), as a float32 scalar.

    `learning_rate` is the peak. It is reached in `warmup_steps` even steps, of which the first is
    not zero, and then kept (`constant`), led to 0 at `total_steps` (`linear`, `cosine`), or
    multiplied by `sqrt(warmup_steps / step)` (`rsqrt`; T5's pretraining is a peak of 0.01 with
    10,000 warm-up steps, after the warm-up).

    `config` is the `optimizer` section. Raises UserError when the schedule is not known.
    """
    peak, warmup = float(config.learning_rate), int(config.warmup_steps)
    if config.schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise UserError(f"optimizer.schedule={config.schedule!r} is not known; choose of: {known}")

    def rate(count: jax.Array | int) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        ramp = jnp.minimum(1, (step + 1) / max(warmup, 1))
        left = 1 - jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0, 1)
        decay = {
            "constant": jnp.ones_like(left),
            "linear": left,
            "cosine": 0.5 * (1 - jnp.cos(jnp.pi * left)),
            "rsqrt": jnp.sqrt(max(warmup, 1) / jnp.maximum(step, max(warmup, 1))),
        }
        return peak * ramp * decay[config.schedule]

    return rate


def has_key(path: tuple[Any, ...], key: str) -> bool:
    """Whether a leaf's path, as `jax.tree_util` gives it, passes through `key`."""
    return key in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def scale_by_path(key: str, factor: float) -> optax.GradientTransformation:
    """Multiply the updates of the leaves whose path has the key `key`; the others are untouched."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * factor if has_key(path, key) else leaf, updates
        )

    return optax.stateless(scale)


def decay_mask(params: Any) -> Any:
    """True for each leaf that is a matrix or more in each layer: weight decay spares the rest."""

    def decayed(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim - has_key(path, STACK_KEY) >= 2

    return jax.tree_util.tree_map_with_path(decayed, params)


def _layer_by_layer(
    moments: optax.GradientTransformation,
    shaping: optax.GradientTransformation,
    step_offset: Callable[[Path], int],
) -> optax.GradientTransformation:
    """`moments` (whose state is an `optax.FactoredState`), then `shaping` (which has no state).

    Each leaf is given to them by itself, under `vmap` over its layers where it is stacked: stacks
    differ in depth, so one `vmap` over the whole tree would not do. The state has optax's shape,
    with a leading layer axis in the slots of stacked leaves.
    """

    def init_leaf(param: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(moments.init(param)[1:])

    def update_leaf(count: jax.Array, grad: jax.Array, param: jax.Array, *slots: jax.Array) -> Any:
        update, state = moments.update(grad, optax.FactoredState(count, *slots), param)
        update, _ = shaping.update(update, shaping.init(param), param)
        return update, *state[1:]

    def columns(like: Any, rows: list[tuple[Any, ...]]) -> list[Any]:
        structure = jax.tree.structure(like)
        return [jax.tree.unflatten(structure, column) for column in zip(*rows, strict=True)]

    def init(params: Any) -> optax.FactoredState:
        rows = [
            (jax.vmap(init_leaf) if has_key(path, STACK_KEY) else init_leaf)(param)
            for path, param in jax.tree_util.tree_leaves_with_path(params)
        ]
        return optax.FactoredState(jnp.zeros([], jnp.int32), *columns(params, rows))

    def update(grads: Any, state: optax.FactoredState, params: Any = None) -> tuple[Any, Any]:
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        trees = [jax.tree.leaves(tree) for tree in (grads, params, *state[1:])]
        rows = []
        for path, *arrays in zip(paths, *trees, strict=True):
            axes = (None, *[0] * len(arrays))
            leaf = jax.vmap(update_leaf, axes) if has_key(path, STACK_KEY) else update_leaf
            rows.append(leaf(state.count - step_offset(path), *arrays))
        updates, *slots = columns(params, rows)
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
    """T5X's Adafactor without momentum: names and defaults are T5X's, and so are the numbers.

    A leaf is factored when its two largest dimensions (of one layer, for stacked leaves) are both
    at least `min_dim_size_to_factor`. `step_offset`, of all leaves or of each by its path, is
    subtracted from the count of steps in the decay of the second moments, as T5X's. Weight decay is
    decoupled, times the learning rate, and spares scales and biases. `update` needs `params`.
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
    """The optimizer of a run: clip by global norm (0 is off), Adafactor or AdamW, own rates.

    The groups are the branches `hypermodel` and `backbone` of what is trained. Each has its own
    Adafactor step offset, counted from `first_step` on: with T5X's 1,100,000 for both, a group
    whose offset is as much starts its second moments anew (HINT's fresh hypernetwork), one of 0
    goes on slowly, as from a T5 that was trained for so long.

    `config` is the `optimizer` section. Raises UserError when a name in it is not known.
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
        raise UserError(f"optimizer.name={config.name!r} is not known; choose adafactor or adamw")
    parts = [main]
    if config.clip_norm:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.head_learning_rate_scale != 1.0:
        parts.append(scale_by_path(HEADS_KEY, config.head_learning_rate_scale))
    if config.backbone_learning_rate_scale != 1.0:
        parts.append(scale_by_path(BACKBONE_KEY, config.backbone_learning_rate_scale))
    return optax.chain(*parts)


def _step_offset(config: ConfigDict, path: Path) -> int:
    """What a leaf's group subtracts from the count, which here starts at 0, not `first_step`."""
    group = "backbone" if has_key(path[:1], BACKBONE_KEY) else "hypermodel"
    return config[f"{group}_step_offset"] - config.first_step
