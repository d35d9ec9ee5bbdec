"""Packing: several examples of one task in each row, so that little is padding.

As T5X packs (seqio's ``pack_or_pad``), except that a row holds examples of one task only, because
its adapters are the task's. Segments are numbered 1, 2, ... in a row, 0 is padding; positions start
at 0 in each segment. T5 needs them for prefixes alone: its own position biases are by distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hyper_t5.data.batch import SIDES


class Bins:
    """Rows of ``input_length`` and ``target_length`` ids that are filled first fit."""

    def __init__(self, rows: int, input_length: int, target_length: int) -> None:
        self._room = np.array([[input_length, target_length]] * rows)
        self._examples: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(rows)]

    def add(self, ids: np.ndarray, target: np.ndarray) -> bool:
        """Put an example into the first row with room for it; return False where none has."""
        size = np.array([len(ids), len(target)])
        fits = np.flatnonzero(np.all(self._room >= size, axis=1))
        if not len(fits):
            return False
        self._room[fits[0]] -= size
        self._examples[fits[0]].append((ids, target))
        return True

    def extend(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
        """Add examples up to the first that fits nowhere; return how many were added."""
        return next((i for i, pair in enumerate(examples) if not self.add(*pair)), len(examples))

    def fill(self, batch: Mapping[str, np.ndarray], slot: int) -> None:
        """Write the rows into a batch (`batch.batch_spec`), at task slot ``slot``."""
        for row, examples in enumerate(self._examples):
            for side, parts in zip(SIDES, zip(*examples, strict=True), strict=False):
                write_row(batch, side, (slot, row), parts)


def write_row(
    batch: Mapping[str, np.ndarray], side: str, at: tuple[int, int], parts: Sequence[np.ndarray]
) -> None:
    """Write one row of ids with its segments and positions."""
    ids = np.concatenate(parts)
    n = len(ids)
    batch[f"{side}s"][at][:n] = ids
    lengths = [len(part) for part in parts]
    batch[f"{side}_segments"][at][:n] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    batch[f"{side}_positions"][at][:n] = np.concatenate([np.arange(n) for n in lengths])
