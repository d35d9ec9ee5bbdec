"""Which part of a global batch a host makes.

The batch of a step is a function of (seed, step), cut in equal parts: host h of H makes slots
h * T / H to (h + 1) * T / H of its T and reads what these need. So it is the same batch for any
number of hosts, and a run may go on with another number.
"""

from __future__ import annotations

from hyper_t5.errors import UserError


def slots_of(total: int, host: int = 0, hosts: int = 1) -> range:
    """The slots that one host of several makes.

    Raises:
        UserError: they cannot be cut in equal parts.
    """
    assert 0 <= host < hosts, (host, hosts)
    if total % hosts:
        raise UserError(
            f"data.tasks_per_batch={total} cannot be cut in equal parts for {hosts} hosts; make it "
            f"a multiple of {hosts}"
        )
    each = total // hosts
    return range(host * each, (host + 1) * each)
