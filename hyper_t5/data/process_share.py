"""Division of a global batch into the shares that processes load.

The batch of a step is a function of (seed, step). Share i of n has the slots i * T / n to
(i + 1) * T / n of its T, and a process reads only the rows of its own share. So the batch is the
same for any number of processes, and a run can resume with another number.
"""

from __future__ import annotations

from hyper_t5.utils.errors import UserError


def process_share(total: int, index: int = 0, count: int = 1) -> range:
    """Return the slots of one of `count` shares.

    Raises:
      UserError: `count` does not divide the total.
    """
    assert 0 <= index < count, (index, count)
    if total % count:
        raise UserError(
            f"data.tasks_per_batch={total} cannot be split into equal shares for {count} "
            f"processes; make it a multiple of {count}"
        )
    size = total // count
    return range(index * size, (index + 1) * size)
