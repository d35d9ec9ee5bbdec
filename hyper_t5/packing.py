"""Several examples of one task in each row, so that padding costs nothing.

As T5X packs (seqio's `pack_or_pad`), except that a row holds examples of one task only, because
its adapters are the task's. Segments are numbered 1, 2, ... in a row, 0 is padding; positions start
at 0 in each segment. T5 needs them for prefixes alone: its own position biases are by distance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

SIDES = ("input", "target")


class Bins:
    """Rows of `input_length` and `target_length` ids that examples are put into, first fit."""

    def __init__(self, rows: int, input_length: int, target_length: int) -> None:
        self._room = np.array([[input_length, target_length]] * rows)
        self._held: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(rows)]

    def add(self, ids: np.ndarray, target: np.ndarray) -> bool:
        """Puts an example into the first row with room for it; False where none has."""
        size = np.array([len(ids), len(target)])
        fits = np.flatnonzero(np.all(self._room >= size, axis=1))
        if not len(fits):
            return False
        self._room[fits[0]] -= size
        self._held[fits[0]].append((ids, target))
        return True

    def extend(self, examples: Sequence[tuple[np.ndarray, np.ndarray]]) -> int:
        """Adds examples up to the first that fits nowhere; how many."""
        return next((i for i, pair in enumerate(examples) if not self.add(*pair)), len(examples))

    def fill(self, batch: Mapping[str, np.ndarray], slot: int) -> None:
        """Writes the rows into arrays as `empty` makes them, at [slot]."""
        for row, examples in enumerate(self._held):
            for side, parts in zip(SIDES, zip(*examples, strict=True), strict=False):
                write_row(batch, side, (slot, row), parts)


def write_row(
    batch: Mapping[str, np.ndarray], side: str, at: tuple[int, int], parts: Sequence[np.ndarray]
) -> None:
    """One row of ids with its segments and positions."""
    ids = np.concatenate(parts)
    n = len(ids)
    batch[f"{side}s"][at][:n] = ids
    lengths = [len(part) for part in parts]
    batch[f"{side}_segments"][at][:n] = np.repeat(np.arange(1, len(parts) + 1), lengths)
    batch[f"{side}_positions"][at][:n] = np.concatenate([np.arange(n) for n in lengths])


def empty(tasks: int, rows: int, input_length: int, target_length: int) -> dict[str, np.ndarray]:
    """Zeros for a packed batch: inputs, input_segments, input_positions [T, G, Li], targets ..."""
    made = {}
    for side, length in zip(SIDES, (input_length, target_length), strict=True):
        for name in (f"{side}s", f"{side}_segments", f"{side}_positions"):
            made[name] = np.zeros((tasks, rows, length), np.int32)
    return made


def unpack(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same examples, one a row: inputs [T, E, Li], targets [T, E, Lt], E the most of a task.

    Tasks with fewer have empty rows at the end, which count nothing in the loss.
    """
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for slot in range(len(batch["inputs"])):
        rows.append(
            [
                tuple(
                    batch[f"{side}s"][slot, row][batch[f"{side}_segments"][slot, row] == segment]
                    for side in SIDES
                )
                for row in range(batch["inputs"].shape[1])
                for segment in range(1, int(batch["target_segments"][slot, row].max()) + 1)
            ]
        )
    most = max(len(examples) for examples in rows)
    made = {name: batch[name] for name in ("tasks", "hyper_inputs") if name in batch}
    for index, side in enumerate(SIDES):
        length = batch[f"{side}s"].shape[-1]
        made[f"{side}s"] = np.zeros((len(rows), most, length), np.int32)
        for slot, examples in enumerate(rows):
            for row, example in enumerate(examples):
                made[f"{side}s"][slot, row, : len(example[index])] = example[index]
    return made


def examples_of(batch: Mapping[str, np.ndarray]) -> int:
    """How many examples a batch asks for."""
    if "target_segments" in batch:
        return int(batch["target_segments"].max(-1).sum())
    return batch["targets"].shape[0] * batch["targets"].shape[1]
