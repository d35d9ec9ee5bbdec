"""Reader of the cache of one P3 task, as SeqIO writes it.

    FOLDER/[data/]<task>/info.<split>.json        features and number of shards
    FOLDER/[data/]<task>/stats.<split>.json       number of examples
    FOLDER/[data/]<task>/<split>.tfrecord-00000-of-00001, ...
    FOLDER/[data/]<task>/COMPLETED                written last

All records are validated once, and rows are read from the files on access.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hyper_t5.data import tfrecord
from hyper_t5.data.task_rows import LazyRows, OnBadRow, OnEmpty, TaskData, TaskRow
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import cache_root

HELD_OUT = ("validation",)
DTYPES = {
    "inputs_pretokenized": ("string",),
    "targets_pretokenized": ("string",),
    "idx": ("int32", "int64"),
    "is_correct": ("bool",),
}
TRAIN_FIELDS = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
EVAL_FIELDS = ("inputs_pretokenized", "targets_pretokenized", "idx", "is_correct")
CACHE_VERSION = 1
LOG_FROM = 1_000_000  # records: validating more takes minutes


class CachedTask(NamedTuple):
    """One split of a task, as its metadata describe it.

    Attributes:
      name: P3's.
      split: 'train' or 'validation'.
      folder: folder of its files.
      shards: names of the TFRecord files there, in order.
      missing: names of the shards that are missing.
      examples: number of records in all shards, from stats.<split>.json.
      stamps: size and time of each file of ``shards``.
      features: names of the records' features, from info.<split>.json.
    """

    name: str
    split: str
    folder: str
    shards: tuple[str, ...]
    missing: tuple[str, ...]
    examples: int
    stamps: tuple[tuple[int, int], ...]
    features: frozenset[str]


class Policy(NamedTuple):
    """Treatment of bad data, and the cache folder: fields of ``config.data``."""

    on_bad_row: OnBadRow = "raise"
    empty_targets: OnEmpty = "raise"
    on_missing_task: str = "raise"
    cache_dir: str = ""


class IncompleteTask(UserError):
    """A task lacks files; data.on_missing_task='skip' skips it."""


class _BadRecord(UserError):
    """A record is invalid.

    Attributes:
      field: what it is counted under where it is skipped.
      skip: the policy says to skip it.
    """

    def __init__(self, message: str, field: str, skip: bool) -> None:
        super().__init__(message)
        self.field = field
        self.skip = skip


# ------------------------------------------------------------------------------- metadata


def open_task(folder: Any, name: str, split: str) -> CachedTask:
    """Read a task's metadata; its records are not read.

    Raises:
      IncompleteTask: files are missing.
      UserError: invalid metadata, or shards of two different runs.
    """
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise IncompleteTask(f"{folder}: cannot read ({error.strerror or error})") from None
    info_name, stats_name = f"info.{split}.json", f"stats.{split}.json"
    for required in ("COMPLETED", info_name, stats_name):
        if required not in present:
            hint = "; the job that wrote it was interrupted" if required == "COMPLETED" else ""
            raise IncompleteTask(
                f"{folder}: lacks {required}{hint}; copy the task again, or set "
                "data.on_missing_task='skip'"
            )
    shards, missing = _shard_names(folder, present, split)
    info, stats = (files.read_json(folder / file) for file in (info_name, stats_name))
    features = _features(info, folder / info_name, split)
    if info.get("num_shards") != len(shards) + len(missing):
        raise UserError(
            f"{folder / info_name}: field num_shards is {info.get('num_shards')!r}, but the names "
            f"of the files have {len(shards) + len(missing)}; copy the task again"
        )
    examples = stats.get("examples")
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise UserError(
            f"{folder / stats_name}: field examples must be a number of 1 or more, this is "
            f"{examples!r}"
        )
    stamps = tuple(tfrecord.size_and_time(folder / shard) for shard in shards)
    return CachedTask(name, split, str(folder), shards, missing, examples, stamps, features)


def _shard_names(
    folder: Any, present: Sequence[str], split: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return names of the shards of a split, in order: those present, and those missing."""
    pattern = rf"{split}\.tfrecord-(\d{{5}})-of-(\d{{5}})"
    matches = {file: match for file in present if (match := re.fullmatch(pattern, file))}
    if not matches:
        raise IncompleteTask(
            f"{folder}: lacks {split}.tfrecord-00000-of-...; copy the task again, or set "
            "data.on_missing_task='skip'"
        )
    if len({match[2] for match in matches.values()}) > 1:
        raise UserError(
            f"{folder}: {min(matches)} and {max(matches)} are of two runs; keep the files of one"
        )
    count = next(iter(matches.values()))[2]
    names = [f"{split}.tfrecord-{i:05d}-of-{count}" for i in range(int(count))]
    if beyond := sorted(set(matches) - set(names)):
        raise UserError(f"{folder}: {beyond[0]} has a number that is too high")
    missing = tuple(name for name in names if name not in matches)
    return tuple(name for name in names if name in matches), missing


def _features(info: Mapping[str, Any], file: Any, split: str) -> frozenset[str]:
    """Return the names of the features, with the types of those that are read checked."""
    features = info.get("features")
    if not isinstance(features, dict):
        raise UserError(f"{file}: lacks field features, an object")
    for name in EVAL_FIELDS if split in HELD_OUT else EVAL_FIELDS[:2]:
        if name not in features:
            raise UserError(f"{file}: features lacks {name}; is this a cache of P3?")
        dtype = features[name].get("dtype") if isinstance(features[name], dict) else None
        if dtype not in DTYPES[name]:
            raise UserError(
                f"{file}: features.{name} has dtype {dtype!r}; it must be {DTYPES[name][0]}"
            )
    return frozenset(features)


# ------------------------------------------------------------------------------- records


class _Records(NamedTuple):
    """The readable records of a task, numbered across its shards."""

    files: tuple[str, ...]
    indexes: tuple[tfrecord.Index, ...]
    starts: np.ndarray  # [files + 1] int64: number of the first record of each file, and the total

    def read(self, number: int) -> bytes:
        shard, record = self._locate(number)
        index = self.indexes[shard]
        return tfrecord.read(
            self.files[shard], int(index.offsets[record]), int(index.lengths[record])
        )

    def source(self, number: int) -> str:
        """Name a record in errors."""
        shard, record = self._locate(number)
        return f"{self.files[shard]}, record {record}"

    def _locate(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        return shard, number - int(self.starts[shard])


def _open_records(task: CachedTask, policy: Policy) -> tuple[_Records, Counter[str]]:
    """Index a task's records, all checked for damage, and count those that are skipped.

    With 'skip', readable and skipped records add up to the task's own number.

    Raises:
      UserError: a file is missing or damaged, or the number of records is not the task's.
    """
    if task.missing and policy.on_bad_row == "raise":
        raise UserError(
            f"{task.folder}/{task.missing[0]}: missing; copy the task again, or set "
            "data.on_bad_row='skip'"
        )
    paths = tuple(f"{task.folder}/{shard}" for shard in task.shards)
    indexes = tuple(tfrecord.index(path, policy.cache_dir, policy.on_bad_row) for path in paths)
    skipped: Counter[str] = Counter()
    damaged_files = list(task.missing)
    for shard, index in zip(task.shards, indexes, strict=True):
        for reason, count in index.skipped.items():
            if reason == tfrecord.DAMAGED:
                skipped[reason] += count
            else:
                damaged_files.append(f"{shard}: {reason}")
    starts = np.cumsum([0] + [len(index.offsets) for index in indexes], dtype=np.int64)
    lost = task.examples - int(starts[-1]) - sum(skipped.values())
    if lost < 0 or (lost and policy.on_bad_row == "raise"):
        raise UserError(
            f"{task.folder}/stats.{task.split}.json: field examples is {task.examples}, but the "
            f"task's files hold {task.examples - lost} records; copy the task again"
        )
    if lost or damaged_files:
        cause = "; ".join(damaged_files) or "the end of a file"
        skipped[f"{task.name}, lost with {cause}"] = lost
    return _Records(paths, indexes, starts), skipped


def _parse(raw: bytes, names: Collection[str], source: str, policy: Policy) -> dict[str, Any]:
    try:
        return dict(tfrecord.parse_example(raw, names))
    except ValueError as error:
        raise _bad(source, "record", f"is no tf.train.Example ({error})", policy) from None


def _bad(source: str, field: str, problem: str, policy: Policy) -> _BadRecord:
    skip = policy.on_bad_row == "skip"
    message = f"{source}: field {field} {problem}; fix it, or set data.on_bad_row='skip'"
    return _BadRecord(message, field, skip)


def _text(features: Mapping[str, Any], field: str, source: str, policy: Policy) -> str:
    """Return the text of a feature that must hold one."""
    values = features[field]
    if not isinstance(values, list) or len(values) != 1:
        kind = f"holds {len(values)} {'texts' if isinstance(values, list) else 'numbers'}"
        raise _bad(source, field, f"{kind}; it must hold one text", policy)
    try:
        return str(values[0], "utf-8")
    except UnicodeDecodeError:
        raise _bad(source, field, "is not UTF-8", policy) from None


def _target(features: Mapping[str, Any], source: str, policy: Policy) -> str:
    """Return the output without surrounding whitespace, as T0 compares it."""
    field = "targets_pretokenized"
    text = _text(features, field, source, policy).strip()
    if not text and policy.empty_targets != "keep":
        raise _BadRecord(
            f"{source}: field {field} is empty; fix it, or set data.empty_targets='keep' (the "
            "empty output is correct) or 'skip'",
            f"{field}, empty output",
            policy.empty_targets == "skip",
        )
    return text


# ------------------------------------------------------------------------------ training tasks


def read_train_task(
    task: CachedTask, policy: Policy, category: str = "", instruction: str = ""
) -> TaskData:
    """Validate all records of a training task and return it with lazy rows.

    ``options`` of a row are its ``answer_choices``, where the target is one of them.

    Raises:
      UserError: names file, record and field; no usable row.
    """
    records, skipped = _open_records(task, policy)
    bad: list[int] = []
    for file, index, start in zip(records.files, records.indexes, records.starts, strict=False):
        bad_in_file, counts = _check_shard(task, file, index, policy)
        bad += [int(start) + number for number in bad_in_file]
        skipped.update(counts)
    total = int(records.starts[-1])
    numbers: range | np.ndarray = range(total)
    if bad:
        numbers = np.delete(np.arange(total), bad)
    if not len(numbers):
        raise UserError(f"{task.folder}: holds no usable row; a task needs at least one")

    def read(number: int) -> TaskRow:
        source = records.source(number)
        return _train_row(task, records.read(number), source, f"{task.name}-{number}", policy)

    rows = LazyRows(read, numbers)
    return TaskData(task.name, (instruction,), (), rows, category, skipped=dict(skipped))


def _check_shard(
    task: CachedTask, file: str, index: tfrecord.Index, policy: Policy
) -> tuple[list[int], Counter[str]]:
    """Return numbers of a file's records to skip, and their count by field.

    The result is cached: validating all of P3 takes an hour.
    """
    choices = "answer_choices" in task.features
    key = [CACHE_VERSION, index.sha256, len(index.offsets), choices, *policy[:2]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    entry = cache_root(policy.cache_dir) / "p3" / name
    if (cached := _load_check(entry, key)) is not None:
        return cached
    if len(index.offsets) >= LOG_FROM:
        print(f"{file}: validating {len(index.offsets)} records, once", flush=True)
    bad: list[int] = []
    counts: Counter[str] = Counter()
    for number, (offset, length) in enumerate(zip(*index[:2], strict=True)):
        raw = tfrecord.read(file, int(offset), int(length))
        try:
            _train_row(task, raw, f"{file}, record {number}", "", policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            bad.append(number)
            counts[error.field] += 1
    with contextlib.suppress(UserError):  # tfrecord.index reports a cache that is not writable
        files.write_json(entry, {"key": key, "bad": bad, "counted": counts})
    return bad, counts


def _load_check(entry: Any, key: list[Any]) -> tuple[list[int], Counter[str]] | None:
    """Return a cached check, or None where it is absent or damaged."""
    try:
        cached = files.read_json(entry)
        bad, counts = cached["bad"], Counter(cached["counted"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    return (bad, counts) if cached.get("key") == key and counts.total() == len(bad) else None


def _train_row(task: CachedTask, raw: bytes, source: str, row_id: str, policy: Policy) -> TaskRow:
    features = _parse(raw, TRAIN_FIELDS, source, policy)
    text = _text(features, "inputs_pretokenized", source, policy)
    target = _target(features, source, policy)
    choices = features["answer_choices"] if "answer_choices" in task.features else []
    if not isinstance(choices, list):
        raise _bad(source, "answer_choices", "holds numbers; it must hold texts", policy)
    try:
        options = tuple(dict.fromkeys(str(choice, "utf-8").strip() for choice in choices))
    except UnicodeDecodeError:
        raise _bad(source, "answer_choices", "is not UTF-8", policy) from None
    return TaskRow(row_id, text, (target,), options if target in options else ())


# ------------------------------------------------------------------------------ held-out tasks


class _Choice(NamedTuple):
    """One record of a ``_score_eval`` task."""

    row: int  # idx[0]
    number: int  # idx[1]
    input: str
    target: str
    correct: bool


def read_eval_task(
    task: CachedTask, policy: Policy, category: str = "", instruction: str = ""
) -> TaskData:
    """Return a held-out task: a row has the choices of its records and those that are correct.

    Rows are ordered by idx[0]; their records may be anywhere in the files. With 'skip', a row that
    lacks a choice is skipped as a whole, and skipped records are counted. No record shows that a
    row lost its last choices, so where records are lost only rows with the most choices are kept:
    in T0's held-out tasks all rows have the same number.

    Raises:
      UserError: names file, record and field; no usable row; with 'skip', so many records are lost
        that all rows may lack a choice.
    """
    records, skipped = _open_records(task, policy)
    rows: dict[int, dict[int, int]] = {}  # idx[0] -> idx[1] -> number of the record
    inputs: dict[int, int] = {}  # idx[0] -> hash of its input
    answered: set[int] = set()
    for number in range(int(records.starts[-1])):
        source = records.source(number)
        try:
            choice = _choice(records.read(number), source, policy)
            choices = rows.setdefault(choice.row, {})
            if choice.number in choices:
                idx = f"[{choice.row}, {choice.number}]"
                raise _bad(source, "idx", f"is {idx}, as in an earlier record", policy)
            if inputs.setdefault(choice.row, hash(choice.input)) != hash(choice.input):
                problem = f"is not that of the other choices of row {choice.row}"
                raise _bad(source, "inputs_pretokenized", problem, policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            skipped[error.field] += 1
            continue
        choices[choice.number] = number
        if choice.correct:
            answered.add(choice.row)
    complete = _complete_rows(task, rows, answered, skipped, policy)

    def read(index: int) -> TaskRow:
        row, numbers = complete[index]
        parts = [_choice(records.read(n), records.source(n), policy) for n in numbers]
        correct = tuple(part.target for part in parts if part.correct)
        options = tuple(part.target for part in parts)
        return TaskRow(f"{task.name}-{row}", parts[0].input, correct, options)

    lazy = LazyRows(read, range(len(complete)))
    return TaskData(task.name, (instruction,), (), lazy, category, skipped=dict(skipped))


def _complete_rows(
    task: CachedTask,
    rows: Mapping[int, Mapping[int, int]],
    answered: Collection[int],
    skipped: Counter[str],
    policy: Policy,
) -> list[tuple[int, list[int]]]:
    """Return (idx[0], numbers of its records by idx[1]) of the complete rows, in order."""
    complete: list[tuple[int, list[int]]] = []
    lossy = bool(skipped)
    most = max(map(len, rows.values()), default=0) if lossy else 0
    for row, choices in sorted(rows.items()):
        source = f"{task.folder}, row {row} of its {task.split} files"
        gap = next((i for i in range(len(choices)) if i not in choices), None)
        try:
            if gap is not None:
                raise _bad(source, "idx", f"has no choice {gap}", policy)
            if len(choices) < most:
                raise _bad(source, "idx", "may lack choices that are lost", policy)
            if row not in answered:
                raise _bad(source, "is_correct", "is set in no choice", policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            skipped[error.field] += len(choices)
            continue
        complete.append((row, [choices[i] for i in range(len(choices))]))
    if not complete:
        raise UserError(f"{task.folder}: holds no usable row; a task needs at least one")
    # If each of these rows had one more choice, the task would have at least so many records.
    if lossy and len(complete) * (most + 1) <= task.examples:
        raise UserError(
            f"{task.folder}: of {task.examples} records only {len(complete) * most} are in "
            "complete rows, too few to infer the number of choices; copy the task again"
        )
    return complete


def _choice(raw: bytes, source: str, policy: Policy) -> _Choice:
    features = _parse(raw, EVAL_FIELDS, source, policy)
    text = _text(features, "inputs_pretokenized", source, policy)
    target = _target(features, source, policy)
    idx = features["idx"]
    if not _is_int64(idx) or len(idx) != 2 or min(idx) < 0:
        raise _bad(source, "idx", "must hold two numbers from 0, row and choice", policy)
    correct = features["is_correct"]
    if not _is_int64(correct) or len(correct) != 1 or correct[0] not in (0, 1):
        raise _bad(source, "is_correct", "must hold 0 or 1", policy)
    return _Choice(int(idx[0]), int(idx[1]), text, target, bool(correct[0]))


def _is_int64(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype == np.int64
