"""Training steps to time: random backbones and batches, the code paths of `train`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import hypermodels, model, optim, t5, train

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shapes:
    """T tasks of G examples each, and the lengths of conditioning, input and target."""

    tasks: int
    examples: int
    hyper: int
    inputs: int
    targets: int

    @property
    def rows(self) -> int:
        return self.tasks * self.examples

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.inputs} + {self.targets} tokens, {self.tasks} tasks of "
            f"{self.examples} with {self.hyper} tokens of conditioning each"
        )


def random_batch(shapes: Shapes, vocab_size: int, seed: int = 0) -> Tree:
    """A batch without padding: the shapes are the amount of work. Every row ends in EOS."""
    rng = np.random.default_rng(seed)
    lead = (shapes.tasks, shapes.examples)
    sizes = {
        "hyper_inputs": (shapes.tasks, shapes.hyper),
        "inputs": (*lead, shapes.inputs),
        "targets": (*lead, shapes.targets),
    }
    batch = {k: rng.integers(3, vocab_size, size, np.int32) for k, size in sizes.items()}
    for ids in batch.values():
        ids[..., -1] = 1
    return {**batch, "tasks": np.arange(shapes.tasks, dtype=np.int32)}


def make_config(system: str, shapes: Shapes, **fields: Any) -> ConfigDict:
    """The default config with a system and these lengths; a field's dot is written as ``__``."""
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
    """A system's compiled training step and its state; each call takes one step on ``batch``.

    Attributes:
      batch: may be changed for another of its shapes.
      memory: bytes that the step needs at once: its arguments (parameters, optimizer state, batch),
        results that take no argument's place, and temporary arrays, as the compiler laid them out.
      trained: how many parameters it trains.
    """

    def __init__(self, config: ConfigDict, sizes: t5.T5Config, backbone: Tree, batch: Tree) -> None:
        """``backbone`` are parameters of ``sizes``; they are not changed."""
        m = model.build(config, sizes)
        params = {"backbone": backbone}
        if m.hypermodel is not None:
            made = hypermodels.init_params(m.hypermodel, jax.random.key(0), backbone)
            params["hypermodel"] = made
        trained = {k: params[k] for k in m.choice.trains}
        self._frozen = {k: v for k, v in params.items() if k not in trained}
        # A copy: the step donates what it trains, and other arms share the backbone.
        trained = jax.tree.map(jnp.array, trained)
        optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
        self.trained = model.count(trained)
        self.batch = jax.tree.map(jnp.asarray, batch)
        self._key = jax.random.key(0)
        self._state = train.start_state(optimizer, trained)
        step = train.make_step(m, optimizer, config)
        self._step = step.lower(self._state, self._frozen, self.batch, self._key).compile()
        used: Any = self._step.memory_analysis()
        self.memory = (
            used.argument_size_in_bytes
            + used.output_size_in_bytes
            - used.alias_size_in_bytes
            + used.temp_size_in_bytes
        )

    def __call__(self) -> float:
        """One step; the summed loss."""
        self._state, sums = self._step(self._state, self._frozen, self.batch, self._key)
        return float(jax.block_until_ready((self._state, sums))[1]["loss"])


def random_backbone(sizes: t5.T5Config) -> Tree:
    """Parameters as T5X would initialise them."""
    return jax.jit(t5.init_params, static_argnums=0)(sizes, jax.random.key(0))


def where() -> str:
    """The device that JAX computes on."""
    device = jax.devices()[0]
    return f"JAX {jax.__version__} on {device.platform} ({device.device_kind})"
