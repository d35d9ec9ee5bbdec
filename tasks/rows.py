"""Lazy rows of text files: validated when a task is read, and read again on access."""

from __future__ import annotations

import gzip
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hyper_t5.data.task_rows import LazyRows, OnBadRow, OnEmpty, TaskData, TaskRow, select_rows
from hyper_t5.utils.errors import UserError


class BadRow(UserError):
    """An invalid row, and the field that it is counted under where it is skipped."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (source, line) of each line of a text file, plain or .gz, that is not blank.

    Raises:
      UserError: it cannot be read, or is a damaged .gz.
    """
    number = 0
    try:
        with gzip.open(file) if file.name.endswith(".gz") else open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{file}, line {number}", line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}, after line {number}: damaged or truncated .gz ({error})"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def choose_rows(task: TaskData, split: str, most: int) -> TaskData:
    """Return a task with at most ``most`` of its rows, in order; 0 keeps all. Lazy rows stay lazy.

    'train' (of any track) keeps a random choice, the same in every run because it depends on the
    task's name only; any other split keeps the first rows.
    """
    if not most or len(task.rows) <= most:
        return task
    if not split.endswith("train"):
        return replace(task, rows=task.rows[:most])
    rng = np.random.default_rng([42, zlib.crc32(task.name.encode())])
    chosen = np.sort(rng.permutation(len(task.rows))[:most])
    return replace(task, rows=select_rows(task.rows, chosen))


def lazy_rows(
    files: Sequence[Path],
    parse: Callable[[bytes, int, str], TaskRow],
    on_bad_row: OnBadRow = "raise",
    on_empty: OnEmpty = "raise",
) -> tuple[LazyRows, Counter[str]]:
    """Check all rows of text files, one a line; return them lazily and the skipped counts by field.

    A row costs 32 bytes of memory. No file stays open, so there may be thousands.

    Args:
      files: read one after another. Blank lines are skipped.
      parse: (line, its number across all files from 1, its source) -> row; raises BadRow.
      on_bad_row: 'skip' skips bad rows and counts them by field.
      on_empty: whether a row with a blank output is refused, skipped or kept.

    Raises:
      UserError: a bad row or blank output that is to be raised; a file that cannot be read. Later,
        from a row: its file has changed.
    """
    index = array("q")  # file, offset, size and line, of each row
    stamps: list[tuple[int, int]] = []
    first_lines: list[int] = []  # the number of lines before each file
    skipped: Counter[str] = Counter()
    count = 0
    for file_number, file in enumerate(files):
        stamps.append(_stamp(file))
        first_lines.append(count)
        offset = 0
        for line_number, line in enumerate(_lines(file), 1):
            count += 1
            offset += len(line)
            if not line.strip():
                continue
            source = f"{file}, line {line_number}"
            if reason := _reason_to_skip(parse, line, count, source, on_bad_row, on_empty):
                skipped[reason] += 1
            else:
                index.extend((file_number, offset - len(line), len(line), line_number))
    table = np.frombuffer(index, np.int64).reshape(-1, 4) if index else np.zeros((0, 4), np.int64)

    def read(row: int) -> TaskRow:
        file_number, offset, size, line_number = table[row].tolist()
        file = files[file_number]
        line = _read_at(file, offset, size, stamps[file_number])
        return parse(line, first_lines[file_number] + line_number, f"{file}, line {line_number}")

    return LazyRows(read, range(len(table))), skipped


def _reason_to_skip(
    parse: Callable[[bytes, int, str], TaskRow],
    line: bytes,
    number: int,
    source: str,
    on_bad_row: OnBadRow,
    on_empty: OnEmpty,
) -> str:
    """Return the field for which a line is skipped, '' where it is kept."""
    try:
        row = parse(line, number, source)
    except BadRow as error:
        if on_bad_row == "raise":
            raise UserError(
                f"{error}; fix the row, or skip such rows with data.on_bad_row='skip'"
            ) from None
        return error.field
    if on_empty == "keep" or all(text.strip() for text in row.outputs):
        return ""
    if on_empty == "raise":
        raise UserError(
            f"{source}: field output is empty; fix the row, or set data.empty_targets='keep' "
            "(the empty output is correct) or 'skip'"
        )
    return "empty output"


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _stamp(file: Path) -> tuple[int, int]:
    """Return size and modification time, by which a changed file is detected."""
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    return stat.st_size, stat.st_mtime_ns


def _read_at(file: Path, offset: int, size: int, stamp: tuple[int, int]) -> bytes:
    if _stamp(file) != stamp:
        raise UserError(f"{file}: has changed since this run began; start the run again")
    try:
        with open(file, "rb", buffering=0) as raw:
            return os.pread(raw.fileno(), size, offset)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
