"""Batches: their layouts, names, shapes and dtypes.

Shapes: T tasks in a batch, G rows a task, Lh, Li, Lt the lengths of conditioning, input and target.
With ``data.chunks`` a conditioning is C chunks of ``data.hyper_length`` ids, and Lh is their sum.

    hyper_inputs [T, Lh]      the conditioning that the hypermodel reads
    inputs       [T, G, Li]   what the backbone encodes
    targets      [T, G, Lt]
    tasks        [T]          indices into the sampler's ``names``

All are int32 ids, EOS at the end of a sequence and 0 as padding. Packed batches (``data.pack``)
have ``input_segments``, ``input_positions``, ``target_segments`` and ``target_positions`` of the
same shapes as the ids; see `packing`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]

IDS = ("hyper_inputs", "inputs", "targets")
SIDES = ("input", "target")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the conditioning of a task is placed.

    Attributes:
      name: as reports and messages write it.
      in_inputs: the conditioning precedes every input; ``hyper_inputs`` hold one EOS. An empty
        conditioning is allowed, since the inputs may say the task.
      eos_after_parts: the instruction and each example end in EOS, so that a reader can tell them
        apart and encode each alone (FiD-ICL, Ye et al. 2023).
    """

    name: str
    in_inputs: bool = False
    eos_after_parts: bool = False

    def hyper_length(self, data_config: Any) -> int:
        """Return the length of a row of ``hyper_inputs``: that of its chunks together."""
        return 1 if self.in_inputs else data_config.hyper_length * data_config.chunks

    def input_length(self, data_config: Any, text: bool = False) -> int:
        """Return the length of a row of ``inputs``: with ``in_inputs`` it holds the conditioning.

        Args:
          data_config: ``config.data``.
          text: chunks of text, to which ``data.concat_length`` does not apply.
        """
        c = data_config
        if not self.in_inputs:
            return c.input_length
        return (0 if text else c.concat_length) or c.hyper_length + c.input_length


SEPARATE = Layout("separate")
FUSION = Layout("fusion", eos_after_parts=True)
CONCAT = Layout("concat", in_inputs=True)


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of one array of a batch."""

    shape: tuple[int, ...]
    dtype: type = np.int32


def batch_spec(
    data_config: Any, layout: Layout, *, text: bool = False, tasks: int = 0
) -> dict[str, ArraySpec]:
    """Return the arrays of a training batch by name.

    Args:
      data_config: ``config.data``.
      layout: of the system.
      text: a batch of text chunks (stage 'hyperpretrain'), which has G = 1 and is never packed.
      tasks: T; 0 is ``data.tasks_per_batch``.
    """
    c = data_config
    t, g = tasks or c.tasks_per_batch, 1 if text else c.examples_per_task
    lengths = {"input": layout.input_length(c, text), "target": c.target_length}
    spec = {"tasks": ArraySpec((t,)), "hyper_inputs": ArraySpec((t, layout.hyper_length(c)))}
    for side, length in lengths.items():
        names = (f"{side}s", f"{side}_segments", f"{side}_positions")
        for name in names if c.pack and not text else names[:1]:
            spec[name] = ArraySpec((t, g, length))
    return spec


def zeros(spec: Mapping[str, ArraySpec]) -> Batch:
    """Return an empty batch of a spec."""
    return {name: np.zeros(s.shape, s.dtype) for name, s in spec.items()}


def real_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Count the ids that are not padding."""
    return sum(int(np.count_nonzero(batch[name])) for name in IDS)


def example_count(batch: Mapping[str, np.ndarray]) -> int:
    """Count the examples of a batch, packed or not."""
    if "target_segments" in batch:
        return int(batch["target_segments"].max(-1).sum())
    return batch["targets"].shape[0] * batch["targets"].shape[1]
