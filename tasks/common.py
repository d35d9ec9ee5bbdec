"""What every file of SeqIO Tasks here shares: names, vocabularies, registration that may repeat.

`seqio`, `tf` and `tfds` are imported from here: TensorFlow is loaded in one place, and quietly.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import re
import sys
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.taskfile import LazyRows, OnBadRow, OnEmpty, Row, TaskRows, take_rows
from hyper_t5.vocab import ByteVocabulary, SentencePieceVocabulary, Vocabulary

# What TensorFlow says of its search for a GPU, which it is not to have, and of its own speed.
_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog"
    r"|[IWE]\d{4} .*\b(port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc:\d+\]"
    r"|To enable the following instructions: "
)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Keeps TensorFlow's remarks off stderr; whatever else is written there comes out at the end.

    They come from C++ while it is loaded, before any setting counts: TF_CPP_MIN_LOG_LEVEL=3 leaves
    half of them (TensorFlow 2.21). So they are caught where they arrive, at file descriptor 2.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed, as in some services
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as caught:
        try:
            os.dup2(caught.fileno(), 2)
            yield
            failed = False
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if failed or not _NOISE.match(line):
                    print(line, file=sys.stderr)


with _without_noise():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds  # noqa: F401

    # It reads data here and computes nothing: left alone it would take the GPU's memory from JAX.
    with contextlib.suppress(RuntimeError):  # whoever calls us has it running already
        tf.config.set_visible_devices([], "GPU")


def tfds_build(argv: Sequence[str]) -> None:
    """Runs `tfds build` with its flags; argv[0] is the program's name.

    TFDS's own command (4.9.10) wants the package mlcroissant, whatever it is asked to do, for
    another of its commands; this does not.
    """
    from absl import app
    from tensorflow_datasets.scripts.cli import build, cli_utils

    parse = cli_utils.make_flags_parser(build.Args, description="tfds build")
    app.run(lambda args: args.execute(), list(argv), flags_parser=parse)


FEATURES = ("hyper_inputs", "inputs", "targets")
_signatures: dict[str, str] = {}  # name of a Task or Mixture -> what it was registered from
_vocabularies: dict[str, seqio.Vocabulary] = {}


def seqio_name(prefix: str, name: str) -> str:
    """`prefix_name` with the characters that SeqIO refuses (hyphens, mostly) replaced."""
    return re.sub(r"[^\w.:]", "_", f"{prefix}_{name}")


def seqio_vocab(vocab: Vocabulary) -> seqio.Vocabulary:
    """SeqIO's vocabulary with the same ids. One object an identity: mixtures compare them."""
    key = json.dumps(vocab.identity(), sort_keys=True)
    if key not in _vocabularies:
        if isinstance(vocab, ByteVocabulary):
            _vocabularies[key] = seqio.ByteVocabulary(vocab.extra_ids)
        elif isinstance(vocab, SentencePieceVocabulary):
            _vocabularies[key] = seqio.SentencePieceVocabulary(
                str(vocab.model_file), vocab.extra_ids
            )
        else:
            raise TypeError(f"no SeqIO vocabulary for {type(vocab).__name__}")
    return _vocabularies[key]


def text_features(vocab: Vocabulary, names: Sequence[str]) -> dict[str, seqio.Feature]:
    """Output features that are token ids ending in EOS."""
    return {name: seqio.Feature(seqio_vocab(vocab), add_eos=True) for name in names}


def register_once(registry: Any, name: str, signature: Any, make: Callable[[], Any]) -> None:
    """Adds `make()` under `name`, unless it is there already, registered from the same things.

    SeqIO's registries are global and refuse a second entry. A process may well ask twice (train,
    then evaluate), or ask for the same name in another folder (tests): the latter replaces.

    Args:
        registry: seqio.TaskRegistry or seqio.MixtureRegistry.
        name: the entry's name.
        signature: anything with a stable repr that says what the entry is made from.
        make: builds the Task or Mixture.
    """
    described = repr(signature)
    if name in registry.names():
        if _signatures.get(name) == described:
            return
        registry.remove(name)
    registry.add_provider(name, make())
    _signatures[name] = described


# ------------------------------------------------------------------------------ rows of a file


def read_lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """(place, line) of each line of a text file, plain or .gz, that is not blank.

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
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


# ------------------------------------------------------------------------- rows left on disk


class BadRow(UserError):
    """What is wrong with one row, and the field that it is counted under where it is skipped."""

    def __init__(self, message: str, field: str) -> None:
        super().__init__(message)
        self.field = field


def lazy_rows(
    files: Sequence[Path],
    parse: Callable[[bytes, int, str], Row],
    on_bad_row: OnBadRow = "raise",
    on_empty: OnEmpty = "raise",
) -> tuple[LazyRows, Counter[str]]:
    """The rows of text files, one a line: all checked now, each read again when asked for.

    What is kept of a row is 32 bytes. No file stays open, so there may be thousands.

    Args:
        files: read one after the other. Blank lines are passed over.
        parse: line, its number (counted through all files, from 1) and its place -> row; raises
            BadRow.
        on_bad_row: 'skip' leaves bad rows out and counts them by field.
        on_empty: what becomes of a row with an output of nothing but white space.

    Returns:
        The rows, and how many were left out, by field.

    Raises:
        UserError: a bad row or empty output that is to be raised; a file that cannot be read. From
            a row, later: its file changed meanwhile.
    """
    kept = array("q")  # file, offset, size and line, of each row
    stamps: list[tuple[int, int]] = []
    firsts: list[int] = []  # how many lines there are before each file
    skipped: Counter[str] = Counter()
    count = 0
    for which, file in enumerate(files):
        stamps.append(_stamp(file))
        firsts.append(count)
        offset = 0
        for line_number, line in enumerate(_lines(file), 1):
            count += 1
            offset += len(line)
            if not line.strip():
                continue
            where = f"{file}, line {line_number}"
            why = _why_not(parse, line, count, where, on_bad_row, on_empty)
            if why:
                skipped[why] += 1
            else:
                kept.extend((which, offset - len(line), len(line), line_number))
    table = np.frombuffer(kept, np.int64).reshape(-1, 4) if kept else np.zeros((0, 4), np.int64)

    def read(index: int) -> Row:
        which, offset, size, line_number = table[index].tolist()
        line = _read_at(files[which], offset, size, stamps[which])
        return parse(line, firsts[which] + line_number, f"{files[which]}, line {line_number}")

    return LazyRows(read, range(len(table))), skipped


def _why_not(
    parse: Callable[[bytes, int, str], Row],
    line: bytes,
    number: int,
    where: str,
    on_bad_row: OnBadRow,
    on_empty: OnEmpty,
) -> str:
    """What a line is skipped for, '' where it is kept."""
    try:
        row = parse(line, number, where)
    except BadRow as error:
        if on_bad_row == "raise":
            raise UserError(
                f"{error}; mend the row, or leave such rows out with data.on_bad_row='skip'"
            ) from None
        return error.field
    if on_empty == "keep" or all(text.strip() for text in row.outputs):
        return ""
    if on_empty == "raise":
        raise UserError(
            f"{where}: field output is empty; mend the row, or set data.empty_targets='keep' "
            "(nothing is the right answer) or 'skip'"
        )
    return "empty output"


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with open(file, "rb") as lines:
            yield from lines
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


def _stamp(file: Path) -> tuple[int, int]:
    """What tells whether a file is still the same: its size and when it was written."""
    try:
        found = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None
    return found.st_size, found.st_mtime_ns


def _read_at(file: Path, offset: int, size: int, stamp: tuple[int, int]) -> bytes:
    if _stamp(file) != stamp:
        raise UserError(f"{file}: has changed since this run began; start the run again")
    try:
        with open(file, "rb", buffering=0) as raw:
            return os.pread(raw.fileno(), size, offset)
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


# ------------------------------------------------------------------- tasks that are rows alone


def register_rows(
    prefix: str,
    split: str,
    readers: Mapping[str, Callable[[], TaskRows]],
    signature: Any,
    vocab: Vocabulary,
    max_instances: int = 0,
) -> str:
    """Registers tasks without shown examples of their own as `<prefix>_<task>_<split>`.

    The Mixture `<prefix>_<split>` has them by the number of their rows. Rows are read when a Task
    is, not now. Registering from the same things again does nothing, from others replaces.

    Args:
        prefix: of the names.
        split: the one SeqIO split that each Task has.
        readers: read a task's rows, by its name.
        signature: what the readers read from, as `register_once` takes it.
        vocab: of all features.
        max_instances: rows a task, 0 keeps all; which ones says `choose_rows`.

    Returns:
        The Mixture's name.
    """
    named = {seqio_name(prefix, f"{task}_{split}"): read for task, read in readers.items()}
    signature = (signature, sorted(readers))
    mixture = seqio_name(prefix, split)
    return register_mixture(mixture, split, named, signature, vocab, max_instances)


def row_count(task: seqio.Task) -> float:
    """How many rows a Task has, as its weight in a Mixture."""
    return float(len(task.source.task_rows().rows))


def register_mixture(
    mixture: str,
    split: str,
    readers: Mapping[str, Callable[[], TaskRows]],
    signature: Any,
    vocab: Vocabulary,
    max_instances: int = 0,
    rate: Callable[[seqio.Task], float] = row_count,
) -> str:
    """As `register_rows`, with names that are SeqIO's as they are: of the Mixture, and of each Task
    (the keys of `readers`). `rate` gives a Task's weight; what it goes by is of the signature.
    """
    signature = (signature, split, max_instances, vocab.identity())
    for name, read in readers.items():
        make = functools.partial(rows_task, name, RowsSource(read, split, max_instances), vocab)
        register_once(seqio.TaskRegistry, name, signature, make)
    mix = functools.partial(seqio.Mixture, mixture, list(readers), default_rate=rate)
    register_once(seqio.MixtureRegistry, mixture, (signature, list(readers)), mix)
    return mixture


def choose_rows(task: TaskRows, split: str, most: int) -> TaskRows:
    """A task with at most `most` of its rows, in their order; 0 keeps all.

    'train' (of any track) keeps a random choice, the same in every run because it follows from the
    task's name; any other split the first. Lazy rows stay lazy.
    """
    if not most or len(task.rows) <= most:
        return task
    if not split.endswith("train"):
        return replace(task, rows=task.rows[:most])
    rng = np.random.default_rng([42, zlib.crc32(task.name.encode())])
    chosen = np.sort(rng.permutation(len(task.rows))[:most])
    return replace(task, rows=take_rows(task.rows, chosen))


class RowsSource(seqio.FunctionDataSource):
    """A task's rows, for SeqIO as a dataset and for us as they are (see super_ni.SniSource).

    Of more than `max_instances` rows it has those that `choose_rows` keeps.
    """

    def __init__(self, read: Callable[[], TaskRows], split: str, max_instances: int) -> None:
        self._read = read
        self._split = split
        self._max_instances = max_instances
        self._rows: TaskRows | None = None
        super().__init__(dataset_fn=self._dataset, splits=[split])

    def task_rows(self) -> TaskRows:
        """The task in memory, read at the first call.

        Raises:
            UserError: what is wrong with its file.
        """
        if self._rows is None:
            self._rows = choose_rows(self._read(), self._split, self._max_instances)
        return self._rows

    def _dataset(
        self, split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split; SeqIO shuffles the examples itself
        text = tf.TensorSpec([], tf.string)
        names = ("id", *FEATURES)
        signature = dict.fromkeys(names, text) | {"references": tf.TensorSpec([None], tf.string)}
        return tf.data.Dataset.from_generator(self._generate, output_signature=signature)

    def _generate(self) -> Iterator[dict[str, Any]]:
        task = self.task_rows()
        for row in task.rows:
            yield {
                "id": row.id,
                "hyper_inputs": task.instruction,
                "inputs": row.input,
                "targets": row.outputs[0],
                "references": np.array(row.outputs, dtype=object),
            }


def rows_task(name: str, source: RowsSource, vocab: Vocabulary) -> seqio.Task:
    """The Task over a source: text -> ids, cached there where asked for, cut, EOS."""
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=text_features(vocab, FEATURES),
        metric_fns=[],
    )
