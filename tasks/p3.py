"""P3 (Sanh et al. 2021, T0) as SeqIO Tasks, from the cache that the hub has (bigscience/P3).

    FOLDER/[data/]<task>/info.<split>.json        features and number of shards
    FOLDER/[data/]<task>/stats.<split>.json       number of examples
    FOLDER/[data/]<task>/<split>.tfrecord-00000-of-00001, ...
    FOLDER/[data/]<task>/COMPLETED                written last

A task is a dataset with one of its prompt templates, and each is a SeqIO Task under its P3 name.
Two Mixtures are made of what the folder has of T0's tasks:

t0_train            all templates of T0's training datasets. The rates are those of t-zero (its
    t0/seqio_tasks/tasks.py): the number of examples; of a dataset with more than 500,000 each of
    its templates has 500,000 / number of templates. Both numbers are those of the folder.
t0_eval_score_eval  the `<task>_score_eval` of T0's held-out datasets that ask what their dataset
    is for, by t-zero's rule, for rank classification: a record is one choice of a row, and a row
    has its choices as `options`, in order.

Text is that of `inputs_pretokenized` and `targets_pretokenized`, which our own vocabulary encodes.

What the hypermodel reads: the prompt with its fields masked, from the file `data.p3_prompts` (see
`read_prompts`), as in HINT (Ivison et al. 2023), or examples of the same template alone, as in
HyperTuning (Phang et al. 2023). No task brings examples to show: they are drawn from its rows. Of
held-out tasks too, for the folder has no training rows of those: see `judged.eval_episodes`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from hyper_t5 import files, records
from hyper_t5.errors import UserError
from hyper_t5.files import cache_root
from hyper_t5.prompts import show_rule
from hyper_t5.taskfile import LazyRows, OnBadRow, OnEmpty, Row, TaskRows
from hyper_t5.tasks.common import register_mixture
from hyper_t5.vocab import Vocabulary

HELD_OUT = ("validation",)
MIXTURE_NAMES = {"t0_train": "train", "t0_eval_score_eval": "validation"}
MOST_EXAMPLES = 500_000  # of a dataset in the mixture, all its templates together
SCORE_EVAL = "_score_eval"

# Datasets as P3's task names begin, from t-zero's t0/datasets.csv: those of T0 (do_train and
# do_eval are BASE), not of T0+ and T0++.
TRAIN_DATASETS = (
    *("glue_mrpc", "glue_qqp", "paws_labeled_final", "kilt_tasks_hotpotqa", "wiki_qa"),
    *("adversarial_qa_dbidaf", "adversarial_qa_dbert", "adversarial_qa_droberta"),
    *("duorc_SelfRC", "duorc_ParaphraseRC", "ropes", "quoref", "cos_e_v1.11", "cosmos_qa"),
    *("dream", "qasc", "quail", "quarel", "quartz", "sciq", "social_i_qa", "wiki_hop_original"),
    *("wiqa", "amazon_polarity", "app_reviews", "imdb", "rotten_tomatoes", "yelp_review_full"),
    *("common_gen", "wiki_bio", "cnn_dailymail_3.0.0", "gigaword", "multi_news", "samsum"),
    *("xsum", "ag_news", "dbpedia_14", "trec"),
)
EVAL_DATASETS = (
    *("super_glue_wsc.fixed", "winogrande_winogrande_xl", "super_glue_cb", "super_glue_rte"),
    *("anli", "super_glue_copa", "story_cloze_2016", "hellaswag", "super_glue_wic"),
)
# Templates of held-out datasets with choices whose metadata (promptsource's `original_task`) say
# that they ask something else; T0 does not evaluate on them.
OTHER_QUESTIONS = (
    *("hellaswag_Open_ended_completion", "hellaswag_how_ends", "story_cloze_2016_Generate_Ending"),
    "hellaswag_Appropriate_continuation_Yes_or_No",
    "hellaswag_Reversed_appropriate_continuation_Yes_or_No",
    "winogrande_winogrande_xl_True_or_False",
)
# Counted among its dataset's templates, and in no mixture of t-zero: its cache is broken.
LEFT_OUT = "gigaword_summarize_"

DTYPES = {
    "inputs_pretokenized": ("string",),
    "targets_pretokenized": ("string",),
    "idx": ("int32", "int64"),
    "is_correct": ("bool",),
}
TRAIN_FIELDS = ("inputs_pretokenized", "targets_pretokenized", "answer_choices")
EVAL_FIELDS = ("inputs_pretokenized", "targets_pretokenized", "idx", "is_correct")
CHECK_VERSION = 1
SAID_FROM = 1_000_000  # records: checking more takes long enough to say so


class CachedTask(NamedTuple):
    """One split of a task, as its files say it is.

    Attributes:
        name: P3's.
        split: 'train' or 'validation'.
        folder: where its files are.
        shards: names of the TFRecord files there, in order.
        missing: names of those that are not there.
        examples: number of records in all of them, by stats.<split>.json.
        stamps: size and time of each file of `shards`.
        features: names of the records' features, by info.<split>.json.
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
    """What to do with bad data, and where to keep what was found out: fields of section data."""

    on_bad_row: OnBadRow = "raise"
    empty_targets: OnEmpty = "raise"
    on_missing_task: str = "raise"
    cache_dir: str = ""


class _Incomplete(UserError):
    """A task that is not there, or not whole: data.on_missing_task='skip' leaves it out."""


class _BadRecord(UserError):
    """One record's mistake, and what it is counted under where it is skipped."""

    def __init__(self, message: str, field: str, skip: bool) -> None:
        super().__init__(message)
        self.field = field
        self.skip = skip


# ------------------------------------------------------------------------------ the mixture


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers one split of `data_config.p3_dir`; returns the Mixture's name.

    Records are read when a Task is, not now. A row limit (`data.max_instances_per_task`) limits the
    rate too.

    Raises:
        UserError: no such folder or split, a task that is not whole, or no prompts where
            `data.variant` or `data.use_instruction` asks for instructions.
    """
    policy = Policy(*(data_config.get(*field) for field in Policy._field_defaults.items()))
    prompts = _read_needed_prompts(data_config)
    tasks, templates = find_tasks(data_config.p3_dir, split, policy.on_missing_task == "skip")
    shown = dict.fromkeys(tasks, "")
    if prompts is not None:
        shown = _choose_prompts(prompts, tasks, data_config.p3_prompts, policy)
        tasks = {name: tasks[name] for name in shown}
    read, most = _READERS[split], data_config.max_instances_per_task
    readers = {n: functools.partial(read, task, policy, shown[n]) for n, task in tasks.items()}
    rates = train_rates({name: task.examples for name, task in tasks.items()}, templates)

    def rate(task: Any) -> float:
        if split in HELD_OUT:
            return float(len(task.source.task_rows().rows))
        return min(rates[task.name], most or rates[task.name])

    (mixture,) = (name for name, of in MIXTURE_NAMES.items() if of == split)
    made_from = [(*task[:-1], sorted(task.features), shown[n]) for n, task in tasks.items()]
    signature = (policy, made_from, sorted(templates.items()))
    return register_mixture(mixture, split, readers, signature, vocab, most, rate)


def train_rates(examples: Mapping[str, int], templates: Mapping[str, int]) -> dict[str, float]:
    """The weight of each training task, by t-zero's rule.

    A dataset is as large as the largest of its tasks: some templates leave rows out.

    Args:
        examples: of each task, by name.
        templates: how many templates a dataset has, by its name.
    """
    sizes: Counter[str] = Counter()
    for name, count in examples.items():
        of = dataset_of(name)
        sizes[of] = max(sizes[of], count)
    return {
        name: float(MOST_EXAMPLES // templates[of] if sizes[of] > MOST_EXAMPLES else count)
        for name, count in examples.items()
        for of in [dataset_of(name)]
    }


def dataset_of(name: str, datasets: Sequence[str] = (*TRAIN_DATASETS, *EVAL_DATASETS)) -> str:
    """The dataset that a task's name begins with, or ''."""
    return next((dataset for dataset in datasets if name.startswith(f"{dataset}_")), "")


# ------------------------------------------------------------------------------- the folder


def find_tasks(
    p3_dir: str, split: str, skip_missing: bool = False
) -> tuple[dict[str, CachedTask], dict[str, int]]:
    """T0's tasks in a folder, ordered by name, and how many templates each dataset has there.

    Raises:
        UserError: no such folder or split; none of T0's tasks; one that is not whole, unless
            `skip_missing`: then it is left out, and that is printed.
    """
    if split not in _READERS:
        raise UserError(f"p3: split {split!r} is unknown; the splits are {', '.join(_READERS)}")
    folder, names = _list_folder(p3_dir)
    held_out = split in HELD_OUT
    names = [name for name in names if name.endswith(SCORE_EVAL) == held_out]
    kept = [n for n in names if dataset_of(n, EVAL_DATASETS if held_out else TRAIN_DATASETS)]
    if others := [n for n in names if n not in set(kept) and not dataset_of(n)]:
        print(f"{folder}: {_some(others)}: of no dataset of T0's, left out")
    if asking := [name for name in kept if name.removesuffix(SCORE_EVAL) in OTHER_QUESTIONS]:
        print(f"{folder}: {_some(asking)}: not its dataset's original task, left out")
        kept = [name for name in kept if name not in asking]
    templates = Counter(map(dataset_of, kept))
    tasks, incomplete = {}, []
    for name in kept:
        if name == LEFT_OUT:
            continue
        try:
            tasks[name] = _open_task(folder / name, name, split)
        except _Incomplete as error:
            if not skip_missing:
                raise
            incomplete.append(name)
            why = error
    if not tasks:
        kind = f"a held-out dataset (*{SCORE_EVAL})" if held_out else "a training dataset"
        raise UserError(f"{folder}: holds no task of {kind} of T0's")
    if incomplete:
        print(f"{folder}: {_some(incomplete)}: not whole, left out; the last: {why}")
    return tasks, dict(templates)


def _some(names: Sequence[str], kind: str = "task") -> str:
    return f"{len(names)} {kind}(s), {names[0]}" + (" and others" if len(names) > 1 else "")


def _list_folder(p3_dir: str) -> tuple[Any, list[str]]:
    """The folder that holds the tasks' folders, and their names in order."""
    if not p3_dir:
        raise UserError(
            "data.p3_dir is empty: give the folder of bigscience/P3 that holds data/ or the tasks"
        )
    folder = epath.Path(p3_dir).expanduser()
    try:
        folder = folder / "data" if (folder / "data").is_dir() else folder
        return folder, sorted(path.name for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"data.p3_dir={p3_dir}: cannot read the folder ({reason})") from None


def _open_task(folder: Any, name: str, split: str) -> CachedTask:
    """What the files of a task say of it; the records are not read.

    Raises:
        _Incomplete: files are missing.
        UserError: info or stats are not what SeqIO writes, or shards of two runs are mixed.
    """
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise _Incomplete(f"{folder}: cannot read ({error.strerror or error})") from None
    info_name, stats_name = f"info.{split}.json", f"stats.{split}.json"
    for needed in ("COMPLETED", info_name, stats_name):
        if needed not in present:
            hint = "; the job that wrote it was interrupted" if needed == "COMPLETED" else ""
            raise _Incomplete(
                f"{folder}: lacks {needed}{hint}; copy the task again, or set "
                "data.on_missing_task='skip'"
            )
    shards, missing = _shards(folder, present, split)
    info, stats = (_read_json(folder / file) for file in (info_name, stats_name))
    features = _features(info, folder / info_name, split)
    if info.get("num_shards") != len(shards) + len(missing):
        raise UserError(
            f"{folder / info_name}: field num_shards is {info.get('num_shards')!r}, but the names "
            f"of the files say {len(shards) + len(missing)}; copy the task again"
        )
    examples = stats.get("examples")
    if not isinstance(examples, int) or isinstance(examples, bool) or examples < 1:
        raise UserError(
            f"{folder / stats_name}: field examples must be a number of 1 or more, this is "
            f"{examples!r}"
        )
    stamps = tuple(records.size_and_time(folder / shard) for shard in shards)
    return CachedTask(name, split, str(folder), shards, missing, examples, stamps, features)


def _shards(
    folder: Any, present: Sequence[str], split: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the TFRecord files of a split, in order: those present, and those that are not."""
    pattern = rf"{split}\.tfrecord-(\d{{5}})-of-(\d{{5}})"
    found = {file: match for file in present if (match := re.fullmatch(pattern, file))}
    if not found:
        raise _Incomplete(
            f"{folder}: lacks {split}.tfrecord-00000-of-...; copy the task again, or set "
            "data.on_missing_task='skip'"
        )
    if len({match[2] for match in found.values()}) > 1:
        raise UserError(
            f"{folder}: {min(found)} and {max(found)} are of two runs; keep the files of one"
        )
    count = next(iter(found.values()))[2]
    names = [f"{split}.tfrecord-{i:05d}-of-{count}" for i in range(int(count))]
    if beyond := sorted(set(found) - set(names)):
        raise UserError(f"{folder}: {beyond[0]} has a number that is too high")
    missing = tuple(name for name in names if name not in found)
    return tuple(name for name in names if name in found), missing


def _read_json(file: Any) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes().decode())
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{file}: not a JSON file of SeqIO's") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: must hold one JSON object")
    return value


def _features(info: Mapping[str, Any], file: Any, split: str) -> frozenset[str]:
    """The names under `features`; those that we read must be there, and of the right type."""
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


# ------------------------------------------------------------------------------- the records


class _Shards(NamedTuple):
    """The records of a task that can be read, numbered through all its files."""

    files: tuple[str, ...]
    indexes: tuple[records.Index, ...]
    starts: np.ndarray  # [files + 1] int64: the number of the first record of each, and of all

    def read(self, number: int) -> bytes:
        shard, place = self._find(number)
        index = self.indexes[shard]
        return records.read(self.files[shard], int(index.offsets[place]), int(index.lengths[place]))

    def where(self, number: int) -> str:
        shard, place = self._find(number)
        return f"{self.files[shard]}, record {place}"

    def _find(self, number: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.starts, number, "right")) - 1
        return shard, number - int(self.starts[shard])


def _open_shards(task: CachedTask, policy: Policy) -> tuple[_Shards, Counter[str]]:
    """Where a task's records are, all checked for damage, and what was skipped.

    With 'skip', records that can be read and those that are counted add up to the number that the
    task says it has.

    Raises:
        UserError: a file is missing or damaged, or holds not as many records as it should.
    """
    stats = f"{task.folder}/stats.{task.split}.json"
    if task.missing and policy.on_bad_row == "raise":
        raise UserError(
            f"{task.folder}/{task.missing[0]}: missing; copy the task again, or set "
            "data.on_bad_row='skip'"
        )
    paths = tuple(f"{task.folder}/{shard}" for shard in task.shards)
    indexes = tuple(records.index(path, policy.cache_dir, policy.on_bad_row) for path in paths)
    skipped: Counter[str] = Counter()
    gone = list(task.missing)
    for shard, index in zip(task.shards, indexes, strict=True):
        for wrong, count in index.skipped.items():
            if wrong == records.DAMAGED:
                skipped[wrong] += count
            else:
                gone.append(f"{shard}: {wrong}")
    starts = np.cumsum([0] + [len(index.offsets) for index in indexes], dtype=np.int64)
    lost = task.examples - int(starts[-1]) - sum(skipped.values())
    if lost < 0 or (lost and policy.on_bad_row == "raise"):
        raise UserError(
            f"{stats}: field examples is {task.examples}, but the task's files hold "
            f"{task.examples - lost} records; copy the task again"
        )
    if lost or gone:
        skipped[f"{task.name}, lost with {'; '.join(gone) or 'the end of a file'}"] = lost
    return _Shards(paths, indexes, starts), skipped


def _parse(raw: bytes, names: Collection[str], where: str, policy: Policy) -> dict[str, Any]:
    try:
        return dict(records.parse_example(raw, names))
    except ValueError as error:
        raise _bad(where, "record", f"is no tf.train.Example ({error})", policy) from None


def _bad(where: str, field: str, wrong: str, policy: Policy) -> _BadRecord:
    """A mistake in a record, with its remedy."""
    skip = policy.on_bad_row == "skip"
    message = f"{where}: field {field} {wrong}; mend it, or set data.on_bad_row='skip'"
    return _BadRecord(message, field, skip)


def _text(found: Mapping[str, Any], field: str, where: str, policy: Policy) -> str:
    """The one text of a feature."""
    values = found[field]
    if not isinstance(values, list) or len(values) != 1:
        kind = f"holds {len(values)} {'texts' if isinstance(values, list) else 'numbers'}"
        raise _bad(where, field, f"{kind}; it must hold one text", policy)
    try:
        return str(values[0], "utf-8")
    except UnicodeDecodeError:
        raise _bad(where, field, "is not UTF-8", policy) from None


def _target(found: Mapping[str, Any], where: str, policy: Policy) -> str:
    """The output, without white space around it, as T0 compares it."""
    field = "targets_pretokenized"
    text = _text(found, field, where, policy).strip()
    if not text and policy.empty_targets != "keep":
        raise _BadRecord(
            f"{where}: field {field} is empty; mend it, or set data.empty_targets='keep' (nothing "
            "is the right answer) or 'skip'",
            f"{field}, empty output",
            policy.empty_targets == "skip",
        )
    return text


# ------------------------------------------------------------------------------ training tasks


def read_train_task(task: CachedTask, policy: Policy, instruction: str = "") -> TaskRows:
    """A training task; all its records are checked, and its rows stay in the files.

    A row's `options` are its `answer_choices`, where it has them and its target is one.

    Raises:
        UserError: names file, record and field; no usable row.
    """
    shards, skipped = _open_shards(task, policy)
    bad: list[int] = []
    for file, index, start in zip(shards.files, shards.indexes, shards.starts, strict=False):
        wrong, counted = _check_shard(task, file, index, policy)
        bad += [int(start) + number for number in wrong]
        skipped.update(counted)
    total = int(shards.starts[-1])
    numbers: range | np.ndarray = range(total)
    if bad:
        numbers = np.delete(np.arange(total), bad)
    if not len(numbers):
        raise UserError(f"{task.folder}: holds no usable row; a task needs at least one")

    def read(number: int) -> Row:
        where = shards.where(number)
        return _train_row(task, shards.read(number), where, f"{task.name}-{number}", policy)

    rows = LazyRows(read, numbers)
    category = dataset_of(task.name)
    return TaskRows(task.name, (instruction,), (), rows, category, skipped=dict(skipped))


def _check_shard(
    task: CachedTask, file: str, index: records.Index, policy: Policy
) -> tuple[list[int], Counter[str]]:
    """Numbers in a file of the records that are skipped, and how many of each kind.

    What was found is kept: the records of all of P3 take an hour to check.
    """
    choices = "answer_choices" in task.features
    key = [CHECK_VERSION, index.sha256, len(index.offsets), choices, *policy[:2]]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    entry = cache_root(policy.cache_dir) / "p3" / name
    if (kept := _load_check(entry, key)) is not None:
        return kept
    if len(index.offsets) >= SAID_FROM:
        print(f"{file}: checking {len(index.offsets)} records, once", flush=True)
    bad: list[int] = []
    counted: Counter[str] = Counter()
    for number, (offset, length) in enumerate(zip(*index[:2], strict=True)):
        raw = records.read(file, int(offset), int(length))
        try:
            _train_row(task, raw, f"{file}, record {number}", "", policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            bad.append(number)
            counted[error.field] += 1
    # That the folder cannot be written has been said, by records.index.
    with contextlib.suppress(UserError):
        files.write_json(entry, {"key": key, "bad": bad, "counted": counted})
    return bad, counted


def _load_check(entry: Any, key: list[Any]) -> tuple[list[int], Counter[str]] | None:
    """What is kept, or None where nothing is, or it is damaged."""
    try:
        kept = files.read_json(entry)
        bad, counted = kept["bad"], Counter(kept["counted"])
    except (UserError, KeyError, TypeError, ValueError):
        return None
    whole = kept.get("key") == key and counted.total() == len(bad)
    return (bad, counted) if whole else None


def _train_row(task: CachedTask, raw: bytes, where: str, row_id: str, policy: Policy) -> Row:
    found = _parse(raw, TRAIN_FIELDS, where, policy)
    text = _text(found, "inputs_pretokenized", where, policy)
    target = _target(found, where, policy)
    choices = found["answer_choices"] if "answer_choices" in task.features else []
    if not isinstance(choices, list):
        raise _bad(where, "answer_choices", "holds numbers; it must hold texts", policy)
    try:
        options = tuple(dict.fromkeys(str(choice, "utf-8").strip() for choice in choices))
    except UnicodeDecodeError:
        raise _bad(where, "answer_choices", "is not UTF-8", policy) from None
    return Row(row_id, text, (target,), options if target in options else ())


# ------------------------------------------------------------------------------ held-out tasks


class _Choice(NamedTuple):
    """One record of a `_score_eval` task."""

    row: int  # idx[0]
    place: int  # idx[1]
    input: str
    target: str
    correct: bool


def read_eval_task(task: CachedTask, policy: Policy, instruction: str = "") -> TaskRows:
    """A held-out task: a row has the choices of its records, in order, and those that are correct.

    Rows are in the order of their idx; wherever in the files its records are, a row has them all.
    With 'skip' a row that lacks a choice is left out whole; what is skipped is counted in records,
    as the task's own number is. That a row's last choices are lost shows in no record, so where any
    is lost only rows with the most choices are kept: T0's held-out tasks have as many in each row.

    Raises:
        UserError: names file, record and field; no usable row; with 'skip', so much is lost that
            all rows may lack a choice.
    """
    shards, skipped = _open_shards(task, policy)
    rows: dict[int, dict[int, int]] = {}  # idx[0] -> idx[1] -> number of the record
    first: dict[int, int] = {}  # idx[0] -> hash of its input
    answered: set[int] = set()
    for number in range(int(shards.starts[-1])):
        where = shards.where(number)
        try:
            choice = _choice(shards.read(number), where, policy)
            places = rows.setdefault(choice.row, {})
            if choice.place in places:
                at = f"[{choice.row}, {choice.place}]"
                raise _bad(where, "idx", f"is {at}, as in an earlier record", policy)
            if first.setdefault(choice.row, hash(choice.input)) != hash(choice.input):
                wrong = f"is not that of the other choices of row {choice.row}"
                raise _bad(where, "inputs_pretokenized", wrong, policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            skipped[error.field] += 1
            continue
        places[choice.place] = number
        if choice.correct:
            answered.add(choice.row)
    kept = _whole_rows(task, rows, answered, skipped, policy)

    def read(place: int) -> Row:
        row, numbers = kept[place]
        parts = [_choice(shards.read(n), shards.where(n), policy) for n in numbers]
        right = tuple(part.target for part in parts if part.correct)
        options = tuple(part.target for part in parts)
        return Row(f"{task.name}-{row}", parts[0].input, right, options)

    lazy = LazyRows(read, range(len(kept)))
    category = dataset_of(task.name)
    return TaskRows(task.name, (instruction,), (), lazy, category, skipped=dict(skipped))


def _whole_rows(
    task: CachedTask,
    rows: Mapping[int, Mapping[int, int]],
    answered: Collection[int],
    skipped: Counter[str],
    policy: Policy,
) -> list[tuple[int, list[int]]]:
    """(idx[0], numbers of its records by idx[1]) of the rows that are whole, in order."""
    kept: list[tuple[int, list[int]]] = []
    lossy = bool(skipped)
    most = max(map(len, rows.values()), default=0) if lossy else 0
    for row, places in sorted(rows.items()):
        where = f"{task.folder}, row {row} of its {task.split} files"
        gap = next((i for i in range(len(places)) if i not in places), None)
        try:
            if gap is not None:
                raise _bad(where, "idx", f"has no choice {gap}", policy)
            if len(places) < most:
                raise _bad(where, "idx", "may lack choices that are lost", policy)
            if row not in answered:
                raise _bad(where, "is_correct", "is set in no choice", policy)
        except _BadRecord as error:
            if not error.skip:
                raise
            skipped[error.field] += len(places)
            continue
        kept.append((row, [places[i] for i in range(len(places))]))
    if not kept:
        raise UserError(f"{task.folder}: holds no usable row; a task needs at least one")
    # Had each of these a choice more, there would be so many records at least.
    if lossy and len(kept) * (most + 1) <= task.examples:
        raise UserError(
            f"{task.folder}: of {task.examples} records only {len(kept) * most} are in rows that "
            "lack none, too few to tell how many choices a row has; copy the task again"
        )
    return kept


def _choice(raw: bytes, where: str, policy: Policy) -> _Choice:
    found = _parse(raw, EVAL_FIELDS, where, policy)
    text = _text(found, "inputs_pretokenized", where, policy)
    target = _target(found, where, policy)
    idx = found["idx"]
    if not _are_whole(idx) or len(idx) != 2 or min(idx) < 0:
        raise _bad(where, "idx", "must hold two numbers from 0, row and choice", policy)
    correct = found["is_correct"]
    if not _are_whole(correct) or len(correct) != 1 or correct[0] not in (0, 1):
        raise _bad(where, "is_correct", "must hold 0 or 1", policy)
    return _Choice(int(idx[0]), int(idx[1]), text, target, bool(correct[0]))


def _are_whole(values: Any) -> bool:
    return isinstance(values, np.ndarray) and values.dtype == np.int64


_READERS: dict[str, Callable[[CachedTask, Policy, str], TaskRows]] = {
    "train": read_train_task,
    "validation": read_eval_task,
}


# ------------------------------------------------------------------------------- the prompts


def _read_needed_prompts(data_config: Any) -> dict[str, str] | None:
    """The prompts, or None where examples are shown alone."""
    if not show_rule(data_config, concat=True).instruction:
        return None
    if not data_config.p3_prompts:
        variant = data_config.get("variant", "")
        asked = f"data.variant={variant!r}" if variant else "data.use_instruction=True"
        alone = "data.variant='pos_16'" if variant else "data.use_instruction=False"
        raise UserError(
            f"p3: {asked} asks for instructions, and data.p3_prompts is empty; give a file of "
            f"prompts with their fields masked, or set {alone} to show examples alone"
        )
    return read_prompts(data_config.p3_prompts)


def read_prompts(file: str) -> dict[str, str]:
    """Prompts with their fields masked, by the task's name in lower case.

    The format is that of HINT's all_edited_prompts.txt (allenai/hyper-task-descriptions): entries
    `dataset |||| template |||| text`, of one or more lines, and between them lines of asterisks. A
    field is a name in brackets and becomes `[MASK]`; as in HINT one with a space in it stays, and
    of two entries of a name the later counts (its own file has such).

    Raises:
        UserError: names file and line.
    """
    try:
        raw = epath.Path(file).expanduser().read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"data.p3_prompts={file}: cannot read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}, line {line}: not UTF-8") from None
    found: dict[str, str] = {}
    again: list[str] = []
    for line, entry in _entries(raw):
        parts = [part.strip() for part in entry.split("||||", 2)]
        if len(parts) < 3 or not all(parts):
            raise UserError(
                f"{file}, line {line}: an entry must be 'dataset |||| template |||| text', and end "
                "in a line of asterisks"
            )
        name = re.sub(r"[^\w.]+", "_", f"{parts[0]}_{parts[1]}").lower()
        text = re.sub(r"\[[A-Za-z0-9_]+\]", "[MASK]", parts[2])
        if found.get(name, text) != text:
            again.append(name)
        found[name] = text
    if again:
        print(f"{file}: {_some(again, 'name')}: given twice, the later counts")
    return found


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """(line it begins on, text) of each entry that is not blank."""
    begin, lines = 1, list[str]()
    for number, line in enumerate([*text.split("\n"), "*" * 10], 1):
        if not re.fullmatch(r"\s*\*{10,}\s*", line):
            lines.append(line)
            continue
        if any(map(str.strip, lines)):
            yield begin, "\n".join(lines)
        begin, lines = number + 1, []


def prompt_of(prompts: Mapping[str, str], task: str) -> str | None:
    """A task's prompt. All three rounds of ANLI have the same, given for the first."""
    name = task.removesuffix(SCORE_EVAL).lower()
    first_round = re.sub(r"^(anli_.*)_r[23]$", r"\1_r1", name)
    return prompts.get(name, prompts.get(first_round))


def _choose_prompts(
    prompts: Mapping[str, str], tasks: Collection[str], file: str, policy: Policy
) -> dict[str, str]:
    """The prompt of each task; those without one raise, or are left out."""
    found = {task: prompt_of(prompts, task) for task in tasks}
    missing = [task for task, prompt in found.items() if prompt is None]
    if missing and (policy.on_missing_task == "raise" or len(missing) == len(found)):
        raise UserError(
            f"{file}: has no prompt of {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; add it, or set data.on_missing_task='skip'"
        )
    if missing:
        print(f"{file}: {_some(missing)}: without a prompt, left out")
    return {task: prompt for task, prompt in found.items() if prompt is not None}
