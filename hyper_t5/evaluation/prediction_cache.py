"""Per-task prediction cache. Makes evaluation resumable.

    FOLDER/<key>.jsonl   {"seconds": ..., "rows": n}, then n rows as in predictions.jsonl

A key is a digest of everything that determines a task's predictions: settings, weights, and the
encoded task. Predictions of another config, checkpoint or dataset are therefore never reused. Files
are atomic, in a bucket too. Process 0 reads and writes, and broadcasts which tasks are complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.parallel import distributed
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

PredictionRow = dict[str, Any]


class PredictionCache:
    """The predictions of several tasks.

    Attributes:
      done: whether each task is complete, the same on every process.
      seconds: the time that the cached predictions took.
    """

    def __init__(
        self, folder: epath.Path | None, keys: Sequence[str], sizes: Sequence[int]
    ) -> None:
        """Read the complete tasks.

        Args:
          folder: of the cache; None keeps predictions in memory only.
          keys: of each task, from `cache_key`.
          sizes: the number of rows of each task.
        """
        self.seconds = 0.0
        self._folder, self._keys = folder, keys
        self._rows: list[list[PredictionRow] | None] = [None] * len(keys)
        if folder is not None and distributed.is_primary():
            self._read(folder, sizes)
        complete = [rows is not None for rows in self._rows]
        self.done: list[bool] = distributed.broadcast("predictions", complete)

    def _read(self, folder: epath.Path, sizes: Sequence[int]) -> None:
        present = _keys_in(folder)
        for i, (key, size) in enumerate(zip(self._keys, sizes, strict=True)):
            if key in present and (content := _read_file(self._file(i), size)):
                self.seconds += content[0]
                self._rows[i] = content[1]
        if count := sum(rows is not None for rows in self._rows):
            print(f"evaluate: {count} of {len(sizes)} tasks are complete, in {folder}")
        if others := len(present - set(self._keys)):
            print(
                f"evaluate: {others} tasks in {folder} are of another config, checkpoint or "
                "dataset; not used",
                flush=True,
            )

    def add(self, index: int, rows: list[PredictionRow], seconds: float) -> None:
        """Write a task's predictions, which outlive this process when this returns."""
        self._rows[index] = rows
        if self._folder is not None and distributed.is_primary():
            header = {"seconds": seconds, "rows": len(rows)}
            files.write_json_lines(self._file(index), [header, *rows])

    def rows(self) -> list[PredictionRow]:
        """Return the predictions of all tasks, in order; complete on process 0 only."""
        return [row for rows in self._rows for row in rows or ()]

    def remove(self) -> None:
        """Delete the cache, once the predictions are written elsewhere."""
        if self._folder is not None and distributed.is_primary() and self._folder.exists():
            with files.as_os_error():
                self._folder.rmtree()

    def _file(self, index: int) -> epath.Path:
        assert self._folder is not None
        return self._folder / f"{self._keys[index]}.jsonl"


def cache_key(settings: Any, task: EvalTask, **more: Any) -> str:
    """Return a digest of the settings, the encoded task, and more about it."""
    sha = hashlib.sha256(json.dumps([settings, more], sort_keys=True).encode())
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        if isinstance(value, np.ndarray):
            sha.update(f"{field.name} {value.shape} {value.dtype}".encode())
            sha.update(np.ascontiguousarray(value).tobytes())
        else:
            sha.update(json.dumps([field.name, value]).encode())
    return sha.hexdigest()[:32]


def _keys_in(folder: epath.Path) -> set[str]:
    try:
        with files.as_os_error():
            listing = list(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None
    return {path.stem for path in listing if path.suffix == ".jsonl"}


def _read_file(file: epath.Path, size: int) -> tuple[float, list[PredictionRow]] | None:
    """Return (seconds, rows) of a file; None, with a message, where it is damaged."""
    try:
        header, *rows = [json.loads(line) for line in files.read_bytes(file).splitlines()]
        if header["rows"] == len(rows) == size and all("prediction" in row for row in rows):
            return float(header["seconds"]), rows
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError):
        pass
    print(f"evaluate: {file} is damaged; its task is predicted again", flush=True)
    return None
