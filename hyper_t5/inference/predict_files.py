"""Prediction from file to file: jsonl in, jsonl out, in order, and resumable.

Finished rows are appended to a partial file beside the output, in the order in which they end; a
command that was stopped resumes after them. Only a window of the input is in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hyper_t5 import runs
from hyper_t5.checkpoints.steps import Step
from hyper_t5.inference import predictor as predictor_lib
from hyper_t5.inference.predictor import (
    Adapter,
    GenerationConfig,
    Predictor,
    PredictRow,
    PredictStats,
)
from hyper_t5.utils import files, streams
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.safetensors_io import as_bytes

WINDOW = 64  # batches of rows that are sorted by length together
PROGRESS_SECONDS = 5.0


def predict(
    input: str | Path,
    output: str | Path,
    config: GenerationConfig,
    *,
    backbone: str | Path = "",
    adapters: Sequence[str | Path] = (),
    workdir: str | Path = "",
    tasks: Sequence[str | Path] = (),
    step: Step | None = None,
) -> int:
    """Write the rows of a jsonl file, ``{"input": ...}`` each, with ``"output"`` added, in order.

    With several adapters or tasks each row names its own, by ``"adapter": NAME`` (of a folder) or
    ``"task": NAME`` (of a file, without its suffix).

    Args:
      input: the file to read; ``-`` is stdin. A pipe is copied to a temporary file.
      output: the file to write; ``-`` is stdout, and messages go to stderr.
      config: how to generate.
      backbone: a backbone's folder; with ``workdir``, where the run's backbone is now.
      adapters: native adapter folders made for the backbone.
      workdir: a run, which generates the adapters of ``tasks``.
      tasks: task files, or folders of them.
      step: of the run's checkpoint; None is the newest.

    Returns:
      The number of rows.

    Raises:
      UserError: an invalid row, by its line, before anything is computed; or as the predictor.
    """
    paths = _task_files(tasks) if workdir else [Path(folder) for folder in adapters]
    field, flag = ("task", "--task") if workdir else ("adapter", "--adapter")
    names = [path.stem if workdir else path.resolve().name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{flag}: two are named {twice[0]}; rename one, since rows name theirs")
    if workdir and not names:
        raise UserError("--workdir generates adapters of tasks: add --task FILE; or use --backbone")
    with streams.readable_twice(input) as file, streams.output_path(output) as output:
        rows = _InputRows(file, str(input), field, names)
        return _predict_rows(rows, output, config, backbone, workdir, paths, step)


def _predict_rows(
    rows: _InputRows,
    output: Path,
    config: GenerationConfig,
    backbone: str | Path,
    workdir: str | Path,
    paths: Sequence[Path],
    step: Step | None,
) -> int:
    count, digest = rows.check()
    files.check_writable(output)
    if workdir:
        run = runs.open(workdir, runs.backbone_override(backbone), step=step)
        predictor = Predictor(run.backbone, run)
        loaded = predictor.adapt_all(paths, log=print)
    else:
        predictor, loaded = predictor_lib.load_with(backbone, paths)
    by_name = dict(zip(rows.names, loaded, strict=True))
    if config.on_long == "refuse":
        for window in _windows(rows, by_name, config):
            predictor.encode(window, config, PredictStats(), rows.location)
    header = {"input": digest, "by": _settings_digest(predictor, by_name, config)}
    with _PartialOutput(output, header) as partial:
        _predict_missing(predictor, rows, by_name, config, partial, count)
        if rows.check() != (count, digest):
            raise UserError(f"--input {rows.name}: was changed while it was read; run it again")
        finished = ({**row, "output": partial.done[number]} for number, row in rows)
        files.write_json_lines(output, finished)
        partial.clear()
    return count


def _task_files(paths: Sequence[str | Path]) -> list[Path]:
    """Return the task files, and those in the folders."""
    task_files: list[Path] = []
    for path in map(Path, paths):
        inside = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"--task {path}: holds no .json files")
        task_files += inside
    return task_files


def _predict_missing(
    predictor: Predictor,
    rows: _InputRows,
    adapters: Mapping[str, Adapter],
    config: GenerationConfig,
    partial: _PartialOutput,
    count: int,
) -> None:
    stats, progress = PredictStats(), _Progress(count, len(partial.done))
    for window in _windows(rows, adapters, config, skip=partial.done):
        for number, text in predictor.predict_rows(window, config, stats, rows.location, many=True):
            partial.add(number, text)
            progress.log(stats)
    progress.log(stats, last=True)
    if stats.truncated:
        print(f"predict: {predictor_lib.truncation_message(stats.truncated, count)}", flush=True)


def _windows(
    rows: _InputRows,
    adapters: Mapping[str, Adapter],
    config: GenerationConfig,
    skip: Mapping[int, str] | None = None,
) -> Iterator[list[PredictRow]]:
    """Yield the rows with their adapters, WINDOW batches at a time."""
    remaining = (
        PredictRow(number, row["input"], adapters.get(row.get(rows.field, "")))
        for number, row in rows
        if number not in (skip or {})
    )
    while window := list(itertools.islice(remaining, WINDOW * config.batch)):
        yield window


# ------------------------------------------------------------------------------- input rows


@dataclasses.dataclass(frozen=True)
class _InputRows:
    """The rows of a jsonl file, read again at each iteration: (line number from 0, row).

    Attributes:
      path: of the file.
      name: of the input, for errors.
      field: 'task' or 'adapter'.
      names: the valid values of ``field``; a single one is the default.
    """

    path: Path
    name: str
    field: str
    names: Sequence[str]

    def location(self, number: int) -> str:
        """Return the name of a row in errors."""
        return f"{self.name}:{number + 1}"

    def check(self) -> tuple[int, str]:
        """Return the number of rows and the file's sha256; raise UserError for an invalid row."""
        sha, count = hashlib.sha256(), 0
        for number, line in self._lines():
            sha.update(line)
            count += self._parse(number, line) is not None
        return count, sha.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._lines():
            if (row := self._parse(number, line)) is not None:
                yield number, row

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield lines as bytes: text would also be split at U+2028, which JSON may hold."""
        try:
            with self.path.open("rb") as stream:
                yield from enumerate(stream)
        except OSError as e:
            raise UserError(f"--input {self.name}: {e.strerror}") from None

    def _parse(self, number: int, line: bytes) -> dict[str, Any] | None:
        """Return the row of a line, None for an empty line."""
        if not line.strip():
            return None
        location, names = self.location(number), self.names
        row = files.json_object(line, location)
        if not isinstance(row.get("input"), str):
            raise UserError(f'{location}: needs a field "input" with text')
        if len(names) == 1:
            row.setdefault(self.field, names[0])
        if names and (name := row.get(self.field)) not in names:
            raise UserError(
                f'{location}: field "{self.field}" is {name!r}; with several {self.field}s it '
                f"names one of {', '.join(names)}"
            )
        return row


# ------------------------------------------------------------------------------- partial output


def _settings_digest(
    predictor: Predictor, adapters: Mapping[str, Adapter], config: GenerationConfig
) -> str:
    """Return a digest of everything that determines the outputs beside the input."""
    sha = hashlib.sha256(predictor.backbone.digest.encode())
    settings = dataclasses.asdict(dataclasses.replace(config, batch=1))
    sha.update(json.dumps(settings, sort_keys=True).encode())
    for name, adapter in adapters.items():
        sha.update(json.dumps([name, adapter.meta], sort_keys=True).encode())
        for leaf in jax.tree.leaves((adapter.adapters, adapter.hypermodel)):
            sha.update(as_bytes(np.asarray(leaf)).data)
    return sha.hexdigest()


class _PartialOutput:
    """The file of finished rows: a header, then ``[number, output]`` a line, each flushed.

    An incomplete last line is cut off.

    Attributes:
      path: of the file.
      done: outputs by the numbers of their rows.
    """

    def __init__(self, output: Path, header: Mapping[str, str]) -> None:
        """Open the partial file of ``output`` and read its rows.

        Raises:
          UserError: the file is damaged, locked, or has another header.
        """
        self.path = output.with_name(f"{output.name}.partial")
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if streams.is_stream(output):  # cannot be resumed
            self._folder = tempfile.TemporaryDirectory(prefix="hyper_t5-")
            self.path = Path(self._folder.name) / "partial"
        elif not files.is_local(files.as_path(output)):  # an object of a bucket cannot grow
            key = hashlib.sha256(str(files.as_path(output)).encode()).hexdigest()[:16]
            self.path = files.cache_root() / "predict" / f"{key}.partial"
        self.done: dict[int, str] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        try:
            self._lock()
            self._read(dict(header))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _PartialOutput:
        return self

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process writes this output; wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self, expected: dict[str, str]) -> None:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in complete.splitlines()] or [expected]
            self.done = {int(number): str(text) for number, text in lines}
        except (ValueError, TypeError):
            raise UserError(f"{self.path}: is damaged; delete it to start again") from None
        if header != expected:
            raise UserError(
                f"{self.path}: holds outputs of another input, or of other adapters or settings; "
                "delete it, or use another --output"
            )
        self._file.truncate(len(complete))
        if not complete:
            self._write(expected)
        elif self.done:
            print(f"predict: {len(self.done):,} rows are done already, in {self.path}", flush=True)

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk again; `_write` has raised it
                self._file.close()
        if not self.done:
            with contextlib.suppress(OSError):
                self.path.unlink()
        if self._folder is not None:
            self._folder.cleanup()

    def add(self, number: int, text: str) -> None:
        """Append the output of a row; it survives the process when this returns."""
        self._write([number, text])
        self.done[number] = text

    def _write(self, content: Any) -> None:
        try:
            self._file.write(json.dumps(content).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"cannot write {self.path}: {e.strerror}; free some space and run the command "
                "again to resume"
            ) from None

    def clear(self) -> None:
        """Forget the rows, once they are in the output; the file is then deleted."""
        self.done = {}


class _Progress:
    """Progress lines, every few seconds."""

    def __init__(self, count: int, done: int) -> None:
        self.count, self.done_before = count, done
        self.start = self.last_line = time.monotonic()

    def log(self, stats: PredictStats, last: bool = False) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if not last and now - self.last_line < PROGRESS_SECONDS:
            return
        self.last_line = now
        decode, seconds = stats.decode, max(now - self.start, 1e-9)
        done, speed = self.done_before + decode.rows, decode.rows / seconds
        line = f"predict: row {done:,}/{self.count:,}"
        if decode.rows:
            line += f"  {speed:.1f} rows/s  {decode.tokens / seconds:.0f} tokens/s"
            line += f"  idle {decode.idle:.0%}"
            line += f"  ETA {(self.count - done) / speed:.0f} s" if done < self.count else ""
        print(line, flush=True)
