"""The model of a system on a backbone: pure functions of parameters and arrays.

One direction: conditioning ids -> hypermodel -> adapters -> T5. Shapes: T tasks, G rows a task,
B = T*G rows, Lh, Li, Lt the lengths of conditioning, input and target, V the vocabulary.

Parameters are passed along as ``{"backbone": ..., "hypermodel": ...}``, the latter where the system
has any of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from hyper_t5 import hypermodels, t5
from hyper_t5.adapters import Adapters, compose
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL, SYSTEMS, System
from hyper_t5.parallel.sharding import Placement
from hyper_t5.t5.decoding import decode
from hyper_t5.utils.errors import UserError

Array = jax.Array
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Model:
    """The static parts of a model, so that it can be a static argument of ``jax.jit``.

    Attributes:
      sizes: of the backbone.
      system: its registry entry.
      hypermodel: the module that emits adapters; None where none are emitted.
      placement: how parameters lie on a mesh; None: on one device.
      chunks: C; a conditioning is read in C chunks, whose adapters are composed.
    """

    sizes: t5.T5Config
    system: System
    hypermodel: nn.Module | None
    placement: Placement | None = None
    chunks: int = 1

    @property
    def task_slots(self) -> int:
        """The number of tasks that have adapters of their own, by task number; 0 without such."""
        return getattr(self.hypermodel, "task_slots", 0)

    @property
    def emits_per_task(self) -> bool:
        """Whether adapters depend on the task alone, so that they are generated once per task."""
        return self.hypermodel is not None and self.system.conditioned_on == "task"

    def adapters(
        self, params: Tree, ids: Array, tasks: Array, rng: Array | None = None
    ) -> Adapters | None:
        """Generate adapters from conditioning ids [T, C * Lh] and task numbers [T].

        Each of the C chunks is read on its own, and their adapters are composed, weighted by their
        tokens. ``rng`` enables dropout. Returns None where the system emits none.
        """
        if self.hypermodel is None:
            return None
        if self.chunks > 1:
            ids, tasks = ids.reshape(len(ids) * self.chunks, -1), jnp.repeat(tasks, self.chunks)
        adapters = self.hypermodel.apply(
            {"params": {**params.get(HYPERMODEL, {}), BACKBONE: params[BACKBONE]}},
            ids,
            tasks,
            rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        if self.chunks > 1:
            tokens = jnp.sum(ids > 0, 1, dtype=jnp.float32).reshape(-1, self.chunks)
            weights = tokens / jnp.maximum(tokens.sum(1, keepdims=True), 1.0)
            adapters = compose(adapters, weights)
        return self.placement.constrain_adapters(adapters) if self.placement else adapters

    def logits(self, params: Tree, batch: Tree, rng: Array | None = None) -> Array:
        """Return teacher-forced float32 logits [B, Lt, V]; see ``forward``."""
        return self.forward(params, batch, rng)[0]

    def forward(
        self, params: Tree, batch: Tree, rng: Array | None = None
    ) -> tuple[Array, Adapters | None]:
        """Return teacher-forced float32 logits [B, Lt, V] and the adapters they were computed with.

        The hypermodel runs once per task; a system that is conditioned on the input runs it once
        per row and leaves the backbone nothing to encode. ``batch`` is as `data.batch` describes.
        """
        keys = (None, None) if rng is None else jax.random.split(rng)
        names = batch.keys() - {"hyper_inputs", "tasks"}
        rows = {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in names}
        ids, tasks = batch["hyper_inputs"], batch["tasks"]
        if self.system.conditioned_on == "input":
            ids, tasks = rows["inputs"], jnp.repeat(tasks, len(rows["inputs"]) // len(tasks))
            rows["inputs"] = ids[:, :0]
        adapters = self.adapters(params, ids, tasks, keys[0])
        logits = t5.T5(self.sizes).apply(
            {"params": params[BACKBONE]},
            rows.pop("inputs"),
            rows.pop("targets"),
            adapters,
            **rows,  # segments and positions of packed batches
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": keys[1]},
        )
        return logits, adapters


def build_model(
    config: ConfigDict, sizes: t5.T5Config, placement: Placement | None = None
) -> Model:
    """Return the model of ``config.system`` on a backbone of these sizes."""
    system = SYSTEMS[config.system]
    hypermodel = system.build(config, sizes) if system.build else None
    return Model(sizes, system, hypermodel, placement, config.data.chunks)


# ------------------------------------------------------------------------ shapes and shardings


@functools.lru_cache(maxsize=8)
def logical_axes(m: Model) -> Tree:
    """Return {branch: tree} of logical axis names, ``layers`` first where stacked.

    Traced once per model; the result must not be changed.

    Raises:
      TypeError: a parameter without names.
    """
    axes: Tree = {BACKBONE: t5.logical_axes(m.sizes)}
    if m.hypermodel is not None:
        axes[HYPERMODEL] = hypermodels.logical_axes(m.hypermodel)
    return axes


@functools.lru_cache(maxsize=8)
def param_shapes(m: Model, dtype: str = "float32") -> Tree:
    """Return {branch: tree} of parameter shapes; ``dtype`` is that of a frozen backbone."""
    shapes: Tree = {BACKBONE: jax.eval_shape(lambda: t5.init_params(m.sizes, jax.random.key(0)))}
    if BACKBONE not in m.system.trains:
        shapes[BACKBONE] = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes[BACKBONE]
        )
    if m.hypermodel is not None:
        shapes[HYPERMODEL] = hypermodel_shapes(m)
    return shapes


def hypermodel_shapes(m: Model) -> Tree:
    """Return the shapes of the hypermodel's own parameters."""
    init = functools.partial(hypermodels.init_params, m.hypermodel)
    return jax.eval_shape(init, jax.random.key(0))


def param_shardings(m: Model) -> Tree:
    """Return {branch: tree} of the shardings of all parameters; trained ones as they are stored."""
    assert m.placement is not None
    axes, shapes = logical_axes(m), param_shapes(m)
    shardings = {True: m.placement.storage_sharding, False: m.placement.compute_sharding}
    return {b: shardings[b in m.system.trains](axes[b], shapes[b]) for b in shapes}


def count_parameters(tree: Tree) -> int:
    """Count the numbers in a parameter tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def trained_parameters(m: Model, params: Tree) -> int:
    """Count the parameters that the system trains."""
    return count_parameters({branch: params[branch] for branch in m.system.trains})


def task_number(m: Model, name: str, trained_tasks: Sequence[str]) -> int:
    """Return the number of a task among those with adapters of their own; 0 without such.

    Raises:
      UserError: the run has no adapters of this task.
    """
    if not m.task_slots:
        return 0
    if name not in trained_tasks:
        raise UserError(
            f"task {name}: {m.system.name} has adapters of the {len(trained_tasks)} tasks that it "
            "was trained on, and this is none of them; train with stage=peft and the same "
            "eval.split"
        )
    return list(trained_tasks).index(name)


# ------------------------------------------------------------------------ compiled functions


@functools.partial(jax.jit, static_argnames="model")
def generate_adapters(model: Model, params: Tree, ids: Array, tasks: Array) -> Adapters | None:
    """Generate adapters from ids [T, Lh] and task numbers [T]; compiled once per shape."""
    return model.adapters(params, ids, tasks)


def resolve_adapters(
    model: Model, params: Tree, adapters: Adapters | None, inputs: Array, tasks: Array
) -> tuple[Adapters | None, Array]:
    """Return the adapters of inputs [B, Li] of tasks [B], and the ids that the backbone encodes.

    A system that is conditioned on the input generates the rows' own adapters, which hold their
    encoding, and leaves no ids.
    """
    if model.system.conditioned_on != "input":
        return adapters, inputs
    return generate_adapters(model, params, inputs, tasks), inputs[:, :0]


def generate_tokens(
    model: Model,
    params: Tree,
    adapters: Adapters | None,
    inputs: Array,
    tasks: Array,
    **options: Any,
) -> Array:
    """Decode inputs [B, Li] with their tasks' adapters; return ids [B, S].

    ``options`` are those of `t5.decoding.decode`. Adapters are generated once for all steps.
    """
    adapters, ids = resolve_adapters(model, params, adapters, inputs, tasks)
    return decode(model.sizes, params[BACKBONE], ids, adapters, **options)[0]
