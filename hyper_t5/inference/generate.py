"""Generation of adapters for many tasks, in few calls of the hypermodel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from hyper_t5.adapters import Adapters
from hyper_t5.model import Model, Tree, generate_adapters
from hyper_t5.parallel import sharding

TASKS_PER_CALL = 16


def iterate_adapters(
    model: Model,
    params: Tree,
    hyper_ids: Sequence[np.ndarray],
    task_numbers: Sequence[int],
    tasks_per_call: int = TASKS_PER_CALL,
) -> Iterator[Adapters]:
    """Yield each task's adapters [N, 1, ...], numpy arrays on the host.

    Calls have a few shapes only: the number of tasks is padded to a power of two, and on a mesh to
    a multiple of the parts of a batch. Every process of a run must iterate alike.

    Args:
      model: one that emits adapters per task.
      params: of all branches.
      hyper_ids: the conditioning of each task, [Lh] int32, all of one length.
      task_numbers: `model.task_number` of each task.
      tasks_per_call: the largest T of a call.
    """
    placement = model.placement
    for start in range(0, len(hyper_ids), tasks_per_call):
        ids = np.stack(hyper_ids[start : start + tasks_per_call])
        numbers = np.asarray(task_numbers[start : start + tasks_per_call], np.int32)
        count = len(ids)
        size = 1 << (count - 1).bit_length()
        if placement:
            size = -(-size // placement.batch_shards) * placement.batch_shards
        fill = np.zeros(size - count, np.int64)  # repeats the first task
        index = np.concatenate([np.arange(count), fill])
        batch = ids[index], numbers[index]
        if placement:
            batch = sharding.device_put(batch, (placement.batch_sharding,) * 2)
        adapters = generate_adapters(model, params, *batch)
        assert adapters is not None
        tree = sharding.fetch(adapters.tree)
        for i in range(count):
            yield Adapters(jax.tree.map(lambda x, i=i: x[:, i : i + 1], tree), adapters.spec)
