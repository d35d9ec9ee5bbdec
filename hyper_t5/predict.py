"""Outputs of a file of inputs: jsonl in, jsonl out, in order, and resumable.

What is done is kept in a partial file beside the output, in the order in which rows end; a run that
was stopped, however it was, goes on after that. Only a window of the input is in memory at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from hyper_t5 import files, serve
from hyper_t5.errors import UserError
from hyper_t5.serve import Adapter, Model, Options
from hyper_t5.tensors import as_bytes

WINDOW = 64  # batches of rows that are sorted by length together
ADAPTERS = "adapters"  # in a workdir: what was made of tasks, each under its digest
SECONDS = 5.0  # between two lines of progress


def predict(
    input: str | Path,
    output: str | Path,
    options: Options,
    *,
    backbone: str | Path = "",
    adapters: Sequence[str | Path] = (),
    workdir: str | Path = "",
    tasks: Sequence[str | Path] = (),
) -> int:
    """Write the rows of a jsonl file, ``{"input": ...}`` each, with ``"output"`` added, in order.

    Args:
      backbone, adapters: a folder, and native adapter folders made for it; or
      workdir, tasks: a run, and task files, or folders of them, whose adapters are made by it and
        kept in its folder.

    With several adapters or tasks each row says by ``"adapter": NAME`` (a folder's) or
    ``"task": NAME`` (a file's, without its ending) which it is for. Returns the number of rows.

    Raises:
      UserError: a bad row, told with its line before anything is computed; and see ``serve``.
    """
    places = _tasks_of(tasks) if workdir else [Path(folder) for folder in adapters]
    field, flag = ("task", "--task") if workdir else ("adapter", "--adapter")
    names = [path.stem if workdir else path.name for path in places]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{flag}: two are named {twice[0]}; rename one, since rows name theirs")
    if workdir and not names:
        raise UserError("--workdir makes adapters of tasks: give --task FILE; or else --backbone")
    rows = _Rows(Path(input), field, names)
    count, digest = rows.check()
    files.check_writable(Path(output))
    if workdir:
        model = serve.load_run(workdir)
        made = model.adapt_all(places, cache=_cache_of(workdir))
    else:
        model, made = serve.load_with(backbone, places)
    chosen = dict(zip(names, made, strict=True))
    if options.on_long == "refuse":
        _check_lengths(model, rows, chosen, options)
    header = {"input": digest, "by": _settings(model, chosen, options)}
    with _Partial(Path(output), header) as partial:
        _answer(model, rows, chosen, options, partial, count)
        finished = ({**row, "output": partial.done[number]} for number, row in rows)
        files.write_json_lines(output, finished)
        partial.remove()
    return count


def _tasks_of(places: Sequence[str | Path]) -> list[Path]:
    """The files given, and those in the folders given."""
    found: list[Path] = []
    for place in map(Path, places):
        inside = sorted(place.glob("*.json")) if place.is_dir() else [place]
        if not inside:
            raise UserError(f"--task {place}: holds no .json files")
        found += inside
    return found


def _cache_of(workdir: str | Path) -> Path:
    """The run's own folder, or this machine's where that lies in a bucket."""
    there = files.as_path(workdir)
    return (Path(there) if files.is_local(there) else files.cache_root()) / ADAPTERS


def _answer(
    model: Model,
    rows: _Rows,
    adapters: Mapping[str, Adapter],
    options: Options,
    partial: _Partial,
    count: int,
) -> None:
    report, progress = serve.Report(), _Progress(count, len(partial.done))
    left = ((number, row) for number, row in rows if number not in partial.done)
    for window in _windows(left, options):
        asked = [
            (number, row["input"], adapters.get(row.get(rows.field))) for number, row in window
        ]
        for number, text in model.answers(asked, options, report, rows.where, many=True):
            partial.add(number, text)
            progress.tell(report)
    progress.tell(report, last=True)
    if report.cut:
        print(f"predict: {serve.cut_message(report.cut, count)}", flush=True)


def _windows(rows: Iterator[Any], options: Options) -> Iterator[list[Any]]:
    while window := list(itertools.islice(rows, WINDOW * options.batch)):
        yield window


def _check_lengths(
    model: Model, rows: _Rows, adapters: Mapping[str, Adapter], options: Options
) -> None:
    """UserError for the first input that is too long."""
    for window in _windows(iter(rows), options):
        asked = [
            (number, row["input"], adapters.get(row.get(rows.field))) for number, row in window
        ]
        model.encode(asked, options, serve.Report(), rows.where)


# ----------------------------------------------------------------------------------------- the rows


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a jsonl file, read anew each time: (number of the line from 0, row).

    ``names``: what ``field`` of a row may say; the only one is filled in where it does not.
    """

    path: Path
    field: str
    names: Sequence[str]

    def where(self, number: int) -> str:
        """What errors call a row."""
        return f"{self.path}:{number + 1}"

    def check(self) -> tuple[int, str]:
        """(how many, sha256 of the file); UserError for the first bad row."""
        made, count = hashlib.sha256(), 0
        for number, line in self._lines():
            made.update(line)
            count += self._row(number, line) is not None
        return count, made.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._lines():
            if (row := self._row(number, line)) is not None:
                yield number, row

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines as bytes: text would also be cut at characters that JSON may hold, as U+2028."""
        try:
            with self.path.open("rb") as stream:
                yield from enumerate(stream)
        except OSError as e:
            raise UserError(f"--input {self.path}: {e.strerror}") from None

    def _row(self, number: int, line: bytes) -> dict[str, Any] | None:
        """None for an empty line."""
        where, names = self.where(number), self.names
        if not line.strip():
            return None
        row = files.json_object(line, where)
        if not isinstance(row.get("input"), str):
            raise UserError(f'{where}: needs a field "input" with text')
        if len(names) == 1:
            row.setdefault(self.field, names[0])
        if names and (name := row.get(self.field)) not in names:
            raise UserError(
                f'{where}: field "{self.field}" is {name!r}; with several {self.field}s it names '
                f"one of {', '.join(names)}"
            )
        return row


# ------------------------------------------------------------------------------------ what is done


def _settings(model: Model, adapters: Mapping[str, Adapter], options: Options) -> str:
    """A digest of what decides the outputs, beside the input."""
    made = hashlib.sha256(model.meta["digest"].encode())
    asked = dataclasses.asdict(dataclasses.replace(options, batch=1))
    made.update(json.dumps(asked, sort_keys=True).encode())
    for name, adapter in adapters.items():
        made.update(json.dumps([name, adapter.meta], sort_keys=True).encode())
        for leaf in jax.tree.leaves((adapter.adapters, adapter.hypermodel)):
            made.update(as_bytes(np.asarray(leaf)).data)
    return made.hexdigest()


class _Partial:
    """The file of what is done: a header, then ``[number, output]`` a line, each flushed.

    ``done``: outputs by the numbers of their rows. A last line that is not whole is cut off.
    """

    def __init__(self, output: Path, header: Mapping[str, str]) -> None:
        self.path = output.with_name(f"{output.name}.partial")
        if not files.is_local(files.as_path(output)):  # an object of a bucket cannot grow
            key = hashlib.sha256(str(files.as_path(output)).encode()).hexdigest()[:16]
            self.path = files.cache_root() / "predict" / f"{key}.partial"
        self.header = dict(header)
        self.done: dict[int, str] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Partial:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b")
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}") from None
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        return self

    def _take(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path}: another process writes this output; wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        try:
            header, *lines = [json.loads(line) for line in whole.splitlines()] or [self.header]
            self.done = {int(number): str(text) for number, text in lines}
        except (ValueError, TypeError):
            raise UserError(f"{self.path}: is damaged; delete it to begin anew") from None
        if header != self.header:
            raise UserError(
                f"{self.path}: holds outputs of another input, or of other adapters or settings; "
                "delete it, or give another --output"
            )
        self._file.truncate(len(whole))
        if not whole:
            self._write(self.header)
        elif self.done:
            print(f"predict: {len(self.done):,} rows are done already, in {self.path}", flush=True)

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()
        if not self.done:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def add(self, number: int, text: str) -> None:
        """A row's output; it is with the system when this returns, and survives the process."""
        self._write([number, text])
        self.done[number] = text

    def _write(self, content: Any) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(content).encode() + b"\n")
            self._file.flush()
        except OSError as e:
            raise UserError(
                f"cannot write {self.path}: {e.strerror}; make room and run it again to go on"
            ) from None

    def remove(self) -> None:
        """When all is where it belongs."""
        self.done = {}


class _Progress:
    """Lines that tell how far it is, every few seconds."""

    def __init__(self, count: int, done: int) -> None:
        self.count, self.before = count, done
        self.began = self.told = time.monotonic()

    def tell(self, report: serve.Report, last: bool = False) -> None:
        """A line, if it is time for one."""
        now = time.monotonic()
        if not last and now - self.told < SECONDS:
            return
        self.told = now
        work, seconds = report.work, max(now - self.began, 1e-9)
        done, speed = self.before + work.rows, work.rows / seconds
        line = f"predict: row {done:,}/{self.count:,}"
        if work.rows:
            line += f"  {speed:.1f} rows/s  {work.tokens / seconds:.0f} tokens/s"
            line += f"  idle {work.idle:.0%}"
            line += f"  ETA {(self.count - done) / speed:.0f} s" if done < self.count else ""
        print(line, flush=True)
