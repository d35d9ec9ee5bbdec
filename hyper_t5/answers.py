"""The answers that an evaluation has so far: a file for each task, so that the next one goes on.

    FOLDER/<digest>.jsonl   {"seconds": ..., "rows": n}, then n rows as predictions.jsonl has them

A file's name is a digest of all that decides its answers: the settings, the weights, and the task
as it is asked. So what another config, checkpoint or data left there is never taken for this one's.
A file is there whole or not, in a bucket too. Process 0 reads and writes, and says what is done.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from hyper_t5 import distributed, files
from hyper_t5.errors import UserError
from hyper_t5.judged import EvalTask

Row = dict[str, Any]


class Answers:
    """What is done of some tasks.

    Attributes:
        done: whether each task is, the same on every process.
        seconds: that those took which were done before.
    """

    def __init__(
        self, folder: epath.Path | None, keys: Sequence[str], sizes: Sequence[int]
    ) -> None:
        """``keys``: of each task, as `key_of` makes them; ``sizes``: its number of rows.

        ``folder`` None keeps nothing.
        """
        self.seconds = 0.0
        self._folder, self._keys = folder, keys
        self._rows: list[list[Row] | None] = [None] * len(keys)
        if folder is not None and distributed.is_first():
            self._read(sizes)
        self.done: list[bool] = distributed.agree("answers", [r is not None for r in self._rows])

    def _read(self, sizes: Sequence[int]) -> None:
        present = _names(self._folder)
        for i, (key, size) in enumerate(zip(self._keys, sizes, strict=True)):
            if key in present and (found := _read(self._file(i), size)):
                self.seconds += found[0]
                self._rows[i] = found[1]
        if count := sum(rows is not None for rows in self._rows):
            print(f"evaluate: {count} of {len(sizes)} tasks are judged, in {self._folder}")
        if others := len(present - set(self._keys)):
            print(
                f"evaluate: {others} tasks in {self._folder} are of another config, checkpoint or "
                "data; not used",
                flush=True,
            )

    def add(self, number: int, rows: list[Row], seconds: float) -> None:
        """A task's rows, which outlive this process when this returns."""
        self._rows[number] = rows
        if self._folder is not None and distributed.is_first():
            header = {"seconds": seconds, "rows": len(rows)}
            files.write_json_lines(self._file(number), [header, *rows])

    def rows(self) -> list[Row]:
        """Of all tasks, in their order. On process 0; others lack what was done before."""
        return [row for rows in self._rows for row in rows or ()]

    def remove(self) -> None:
        """When all is where it belongs: what is kept, and what others left beside it."""
        if self._folder is not None and distributed.is_first() and self._folder.exists():
            with files.as_os_error():
                self._folder.rmtree()

    def _file(self, number: int) -> epath.Path:
        assert self._folder is not None
        return self._folder / f"{self._keys[number]}.jsonl"


def key_of(settings: Any, task: EvalTask, **more: Any) -> str:
    """A digest of the settings, of all that a task is asked with, and of more about it."""
    made = hashlib.sha256(json.dumps([settings, more], sort_keys=True).encode())
    for field in dataclasses.fields(task):
        value = getattr(task, field.name)
        if isinstance(value, np.ndarray):
            made.update(f"{field.name} {value.shape} {value.dtype}".encode())
            made.update(np.ascontiguousarray(value).tobytes())
        else:
            made.update(json.dumps([field.name, value]).encode())
    return made.hexdigest()[:32]


def _names(folder: epath.Path | None) -> set[str]:
    try:
        with files.as_os_error():
            if folder is None or not folder.exists():
                return set()
            return {path.stem for path in folder.iterdir() if path.suffix == ".jsonl"}
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None


def _read(file: epath.Path, size: int) -> tuple[float, list[Row]] | None:
    """(seconds, rows) of a file; None, and that is said, where it is not whole."""
    try:
        header, *rows = [json.loads(line) for line in files.read_bytes(file).splitlines()]
        if header["rows"] == len(rows) == size and all("prediction" in row for row in rows):
            return float(header["seconds"]), rows
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError):
        pass
    print(f"evaluate: {file} is damaged; its task is asked again", flush=True)
    return None
