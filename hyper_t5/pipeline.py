"""From a config to batches: the tasks of a mixture, a sampler, prefetching.

Batch s is a function of (seed, s) alone; see `data.episodes` and `data.text_corpus`. SeqIO, and
with it TensorFlow, is imported by `load_tasks` without ``data.store``, and by `make_sampler` for
text of TensorFlow Datasets; never by this module.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

from hyper_t5.data.batch import SEPARATE, Batch, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import TaskData, text_key
from hyper_t5.data.text_corpus import TextSampler
from hyper_t5.data.vocab import Vocabulary, load_vocab
from hyper_t5.tasks import MIXTURES, Dataset, local_text, store
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose

MAX_SHOWN_ROWS = 64  # rows of a validation task that may be shown as examples


class Sampler(Protocol):
    """A source of training batches: `EpisodeSampler` or `TextSampler`."""

    stats: Counter[str]
    names: tuple[str, ...]  # of the tasks that a batch's "tasks" [T] index; () for text

    def batch(self, step: int, share_index: int = 0, share_count: int = 1) -> Batch:
        """Return the global batch of a step, or the part of it that one process makes."""
        ...


# ------------------------------------------------------------------------------- tasks


def mixture_vocab(data_config: Any) -> Vocabulary:
    """Return the vocabulary of ``data.vocab``, or the mixture's own.

    Raises:
      UserError: neither is set; or a missing or damaged file.
    """
    spec = data_config.vocab
    if not spec and data_config.text in ("", "synthetic") and data_config.mixture in MIXTURES:
        spec = str(MIXTURES[data_config.mixture].vocab_file or "")
    return load_vocab(spec, extra_ids=data_config.extra_ids)


def dataset_of(mixture: str) -> Dataset:
    """Return a registry entry.

    Raises:
      UserError: an unknown mixture; names the nearest.
    """
    return MIXTURES[choose("data.mixture", mixture, MIXTURES)]


def load_tasks(mixture: str, data_config: Any, split: str, vocab: Vocabulary) -> list[TaskData]:
    """Load all tasks of one split with their mixture rates, through SeqIO.

    Args:
      mixture: a key of MIXTURES.
      data_config: ``config.data``; with ``data.store`` the tasks come from that store instead.
      split: one that the dataset has.
      vocab: of the SeqIO Tasks' features; the returned rows are text.

    Raises:
      UserError: unknown mixture or split, or invalid data; names file and field.
    """
    dataset = dataset_of(mixture)
    if data_config.store:
        return store.load_store_tasks(data_config, mixture, dataset, split)
    from hyper_t5.tasks import seqio_tasks  # imports TensorFlow

    tasks = dataset.load_rows(data_config, split, vocab)
    name = seqio_tasks.register(tasks, data_config, split, vocab)
    loaded = [replace(task, rate=rate) for task, rate in seqio_tasks.load_tasks(name)]
    skipped: Counter[str] = Counter()
    for task in loaded:
        skipped.update(task.skipped)
    for field, count in sorted(skipped.items()):
        print(f"{name}: {count} bad rows of {field} skipped (data.on_bad_row='skip')")
    return loaded


def find_mixture(name: str) -> tuple[str, str, dict[str, Any]]:
    """Return (a key of MIXTURES, a split, fields of the config to set) for a name.

    A key alone is its split 'train'; ``<key>_<split>`` is a split of it. A dataset may have other
    names (`Dataset.aliases`, `Dataset.parse_name`).

    Raises:
      UserError: an unknown name; names the nearest.
    """
    if name in MIXTURES:
        return name, "train", {}
    known: dict[str, tuple[str, str]] = {}
    for key, dataset in MIXTURES.items():
        known |= {f"{key}_{split}": (key, split) for split in dataset.splits}
        known |= {alias: (key, split) for alias, split in dataset.aliases.items()}
        if parsed := dataset.parse_name(name):
            return key, parsed[0], dict(parsed[1])
    return (*known[choose("mixture", name, [*MIXTURES, *known])], {})


def held_out_splits(mixture: str) -> tuple[str, ...]:
    """Return the splits of a mixture that evaluation is on."""
    return dataset_of(mixture).held_out


def eval_splits(config: Any) -> dict[str, str]:
    """Return {split: mixture} to evaluate: ``eval.split``, or every held-out split."""
    mixture = config.eval.mixture or config.data.mixture
    names = [config.eval.split] if config.eval.split else held_out_splits(mixture)
    return dict.fromkeys(names, mixture)


def load_eval_tasks(config: Any, mixture: str, split: str, vocab: Vocabulary) -> list[TaskData]:
    """Load the tasks of a held-out split.

    In stage 'peft' ``data.max_instances_per_task`` limits the rows that are trained on, not the
    evaluated ones.
    """
    section = config.data
    if config.stage == "peft":
        section = section.copy_and_resolve_references()
        section.max_instances_per_task = 0
    return load_tasks(mixture, section, split, vocab)


def load_peft_tasks(config: Any, vocab: Vocabulary) -> list[TaskData]:
    """Load the evaluated tasks with the rows that are not evaluated: the data of stage 'peft'.

    A task keeps the rows that have not the text of one of the first ``eval.max_rows_per_task``, and
    of these the first ``data.max_instances_per_task`` (0 = all). Examples to show stay the task's.
    Rates are equal: each task's adapters are trained as much as another's.

    Raises:
      UserError: as `load_tasks`; every row is evaluated; or two splits have a task of one name.
    """
    most, limit = config.eval.max_rows_per_task, config.data.max_instances_per_task
    if not most:
        raise UserError(
            "eval.max_rows_per_task=0 evaluates every row and leaves stage=peft none to train on; "
            "set how many rows a task are evaluated"
        )
    tasks: dict[str, TaskData] = {}
    for split, mixture in eval_splits(config).items():
        for task in load_eval_tasks(config, mixture, split, vocab):
            evaluated = {text_key(row.input) for row in task.rows[:most]}
            rows = [row for row in task.rows if text_key(row.input) not in evaluated]
            if not rows:
                raise UserError(
                    f"task {task.name} of split {split}: all its {len(task.rows)} rows are "
                    "evaluated and stage=peft has none to train on; lower "
                    f"eval.max_rows_per_task={most}"
                )
            if task.name in tasks:
                raise UserError(
                    f"stage=peft: two splits of {mixture} have a task {task.name}, and a task has "
                    "one set of adapters; choose a split with eval.split"
                )
            tasks[task.name] = replace(task, rows=tuple(rows[: limit or None]), rate=1.0)
    return list(tasks.values())


# ------------------------------------------------------------------------------- validation


def hold_out(tasks: Sequence[TaskData], train_config: Any) -> list[TaskData]:
    """Return the tasks, some of them with rows that training never draws: those of validation.

    These are the last ``train.eval_rows`` rows of ``train.eval_tasks`` tasks, which are evenly
    spaced among the tasks with at least twice as many rows. Other rows with the same input are not
    drawn either.

    Raises:
      UserError: no task has that many rows.
    """
    c, result = train_config, list(tasks)
    large = [i for i, task in enumerate(tasks) if len(task.rows) >= 2 * c.eval_rows]
    for index in _spread(large, c.eval_tasks):
        task = tasks[index]
        keys = frozenset(text_key(row.input) for row in task.rows[-c.eval_rows :])
        if text_key(task.rows[0].input) not in keys:
            result[index] = replace(task, held_out=keys)
    if not any(task.held_out for task in result):
        raise UserError(
            f"train.eval_every={c.eval_every}: no training task has {2 * c.eval_rows} rows, of "
            f"which to hold out train.eval_rows={c.eval_rows}; lower it, or validate on another "
            "split with train.eval_split"
        )
    return result


def validation_tasks(config: Any, sampler: Sampler, vocab: Vocabulary) -> list[TaskData]:
    """Return the tasks on which training is validated, the evaluated rows first.

    These are the rows that `hold_out` has set aside, or those of ``train.eval_split``.

    Raises:
      UserError: as `load_tasks`.
    """
    c = config.train
    if c.eval_split:
        mixture = config.eval.mixture or config.data.mixture
        tasks = load_eval_tasks(config, mixture, c.eval_split, vocab)
        return [tasks[i] for i in _spread(range(len(tasks)), c.eval_tasks)]
    assert isinstance(sampler, EpisodeSampler)
    return [_held_out_first(task, c.eval_rows) for task in sampler.tasks if task.held_out]


def _held_out_first(task: TaskData, count: int) -> TaskData:
    """Return a task with its held-out rows, and after them rows that may be shown."""
    others = (row for row in task.rows if text_key(row.input) not in task.held_out)
    shown = itertools.islice(others, MAX_SHOWN_ROWS)
    return replace(task, rows=(*task.rows[-count:], *shown), held_out=frozenset())


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Return at most ``count`` of the indices, evenly spaced."""
    positions = range(min(count, len(indices)))
    return [indices[i * len(indices) // len(positions)] for i in positions]


# ------------------------------------------------------------------------------- batches


def make_sampler(config: Any, vocab: Vocabulary, layout: Layout = SEPARATE) -> Sampler:
    """Return the sampler of ``config.stage``.

    'hyperpretrain' samples ``data.text``, 'mtf' the training tasks of ``data.mixture``, 'peft' the
    tasks of `load_peft_tasks`. Rows for validation are held out (`hold_out`).
    """
    if config.stage == "hyperpretrain":
        source: Any = local_text
        if not config.data.text or config.data.text.startswith(local_text.TFDS_PREFIX):
            from hyper_t5.tasks import text as source  # imports TensorFlow

        chunks = source.open_chunks(config.data, vocab, config.seed)
        return TextSampler(chunks, config.data, config.seed, layout)
    if config.stage == "peft":
        tasks = load_peft_tasks(config, vocab)
    else:
        tasks = load_tasks(config.data.mixture, config.data, "train", vocab)
    if config.train.eval_every and not config.train.eval_split:
        tasks = hold_out(tasks, config.train)
    return EpisodeSampler(tasks, vocab, config.data, config.seed, layout)


def data_digest(tasks: Sequence[TaskData]) -> str:
    """Return a digest of each task's name, number of rows and first row."""
    content = [
        [t.name, len(t.rows), *([t.rows[0].input, t.rows[0].outputs] if t.rows else [])]
        for t in tasks
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def train_batches(
    sampler: Sampler, start_step: int = 0, share: tuple[int, int] = (0, 1), ahead: int = 2
) -> Iterator[Batch]:
    """Yield batches start_step, start_step + 1, ... without end.

    Args:
      sampler: makes a batch by its step.
      start_step: the first.
      share: (index, count) of `Sampler.batch`.
      ahead: how many batches are made before they are used.
    """
    return prefetch((sampler.batch(step, *share) for step in itertools.count(start_step)), ahead)


def prefetch(items: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """Yield the same items, made by a background thread; its exception is raised here.

    Closing the iterator stops the thread.
    """
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(max(1, ahead))
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # raised again by the consumer
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
