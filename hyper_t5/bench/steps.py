"""Training steps to time: random backbones and batches, the same step as `train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import hypermodels, model, t5
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.hypermodels import BACKBONE, HYPERMODEL
from hyper_t5.training import optim
from hyper_t5.training import step as step_lib

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """T tasks of G examples each, and the lengths of conditioning, input and target."""

    tasks: int
    examples: int
    hyper: int
    inputs: int
    targets: int

    def __str__(self) -> str:
        return (
            f"{self.tasks * self.examples} rows of {self.inputs} + {self.targets} tokens without "
            f"padding, {self.tasks} tasks with {self.hyper} tokens of conditioning each"
        )


def random_backbone(sizes: t5.T5Config) -> Tree:
    """Initialize backbone parameters as T5X does."""
    return jax.jit(t5.init_params, static_argnums=0)(sizes, jax.random.key(0))


def random_params(m: model.Model, backbone: Tree) -> Tree:
    """Join a backbone with fresh parameters of the hypermodel, if the system has one."""
    if m.hypermodel is None:
        return {BACKBONE: backbone}
    params = hypermodels.init_params(m.hypermodel, jax.random.key(0), backbone)
    return {BACKBONE: backbone, HYPERMODEL: params}


def random_ids(vocab_size: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Draw token ids without padding; every row ends in EOS."""
    ids = np.random.default_rng(seed).integers(EOS_ID + 1, vocab_size, shape, np.int32)
    ids[..., -1] = EOS_ID
    return ids


def random_batch(shapes: Shapes, vocab_size: int) -> Tree:
    """Draw a training batch without padding."""
    lead = (shapes.tasks, shapes.examples)
    return {
        "hyper_inputs": random_ids(vocab_size, shapes.tasks, shapes.hyper),
        "inputs": random_ids(vocab_size, *lead, shapes.inputs, seed=1),
        "targets": random_ids(vocab_size, *lead, shapes.targets, seed=2),
        "tasks": np.arange(shapes.tasks, dtype=np.int32),
    }


def make_config(system: str, shapes: Shapes, **fields: Any) -> ConfigDict:
    """Make the default config of a system at these shapes; ``a__b`` sets the field ``a.b``."""
    config = config_lib.defaults()
    config.system = system
    config.data.hyper_length = shapes.hyper
    config.data.input_length, config.data.target_length = shapes.inputs, shapes.targets
    config.data.tasks_per_batch, config.data.examples_per_task = shapes.tasks, shapes.examples
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    return config


class TrainingStep:
    """Compiled training step of a system with its state; a call takes one step.

    Attributes:
      memory: bytes that the compiler laid out for the step: arguments (parameters, optimizer state,
        batch), results that do not alias an argument, and temporary arrays.
      trained: number of trained parameters.
    """

    def __init__(self, config: ConfigDict, sizes: t5.T5Config, backbone: Tree, batch: Tree) -> None:
        m = model.build_model(config, sizes)
        params = random_params(m, backbone)
        # A copy: the step donates what it trains, and other arms share the backbone.
        trained = jax.tree.map(jnp.array, {k: params.pop(k) for k in m.system.trains})
        self.trained = model.count_parameters(trained)
        self._frozen, self._batch = params, jax.tree.map(jnp.asarray, batch)
        self._key = jax.random.key(0)
        optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
        self._state = step_lib.init_state(optimizer, trained)
        step = step_lib.make_step(m, optimizer, config)
        self._step = step.lower(self._state, self._frozen, self._batch, self._key).compile()
        used: Any = self._step.memory_analysis()
        results = used.output_size_in_bytes - used.alias_size_in_bytes
        self.memory = used.argument_size_in_bytes + results + used.temp_size_in_bytes

    def __call__(self, batch: Tree | None = None) -> float:
        """Take a step on a batch, by default the one it was compiled for; return the loss."""
        batch = self._batch if batch is None else batch
        self._state, sums = self._step(self._state, self._frozen, batch, self._key)
        return float(jax.block_until_ready((self._state, sums))[1]["loss"])
