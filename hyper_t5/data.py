"""From the config's mixture or text to a stream of training batches.

Batch s is a function of (seed, s) and nothing else: see `episodes.EpisodeSampler` and
`text.TextSampler`. SeqIO (and with it TensorFlow) is imported by `load_tasks` and `make_sampler`,
not by importing this module.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import queue
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

from hyper_t5.episodes import Batch, EpisodeSampler, real_tokens
from hyper_t5.errors import UserError
from hyper_t5.judged import EvalTask, eval_episodes
from hyper_t5.overrides import choose
from hyper_t5.packing import examples_of
from hyper_t5.prompts import LAYOUTS
from hyper_t5.taskfile import Row, TaskRows, text_key
from hyper_t5.text import TextSampler
from hyper_t5.vocab import Vocabulary, load_vocab

__all__ = [
    "LAYOUTS",
    "MIXTURES",
    "Batch",
    "EpisodeSampler",
    "EvalTask",
    "Row",
    "Sampler",
    "TaskRows",
    "TextSampler",
    "eval_episodes",
    "examples_of",
    "find_mixture",
    "held_out_splits",
    "load_judged",
    "load_peft_tasks",
    "load_tasks",
    "make_sampler",
    "mixture_vocab",
    "prefetch",
    "real_tokens",
    "splits_of",
    "train_batches",
]

# data.mixture -> the module of SeqIO Tasks that knows it. Such a module has
# `register(data_config, split, vocab) -> name of a seqio.Mixture`, every Task's source has
# `task_rows() -> TaskRows`; HELD_OUT names the splits to evaluate on. A mixture with a vocabulary
# of its own has its path as VOCAB_FILE, one with SeqIO names of its own what `find_mixture` says.
# Metrics of a mixture's own are in `protocols`.
# A new dataset is one file in tasks/ and one line here.
MIXTURES = {
    "synthetic": "hyper_t5.tasks.synthetic",
    "sni": "hyper_t5.tasks.super_ni",
    "p3": "hyper_t5.tasks.p3",
    "metaicl": "hyper_t5.tasks.metaicl",
    "glue": "hyper_t5.tasks.glue",
    "extractive_qa": "hyper_t5.tasks.extractive_qa",
    "task_files": "hyper_t5.tasks.task_files",
}


class Sampler(Protocol):
    """A source of training batches: `EpisodeSampler` or `text.TextSampler`."""

    stats: Counter[str]
    names: tuple[str, ...]  # of the tasks that a batch's "tasks" [T] index; () for text

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """The global batch of a step, or the part of it that one of several hosts makes."""
        ...


# ----------------------------------------------------------------------- tasks, through SeqIO


def mixture_vocab(data_config: Any) -> Vocabulary:
    """The vocabulary that `data.vocab` names; '' is the embedded suite's own.

    Raises:
        UserError: '' for any other mixture or text, or a missing or damaged file.
    """
    spec = data_config.vocab
    if not spec and data_config.mixture == "synthetic" and data_config.text in ("", "synthetic"):
        spec = str(importlib.import_module(MIXTURES["synthetic"]).VOCAB_FILE)
    return load_vocab(spec, extra_ids=data_config.extra_ids)


def load_tasks(mixture: str, data_config: Any, split: str, vocab: Vocabulary) -> list[TaskRows]:
    """All tasks of one split, ordered by name, with their mixture rates.

    Args:
        mixture: a key of MIXTURES.
        data_config: `config.data`.
        split: 'train', 'test', or another that the mixture has.
        vocab: of the SeqIO Tasks' features; the returned rows are text.

    They come from `data.store` where it is set, and else from SeqIO Tasks over the mixture's files.

    Raises:
        UserError: unknown mixture or split, or bad data; names file and field.
    """
    if data_config.store:
        store = importlib.import_module("hyper_t5.tasks.store")
        return store.load_store_tasks(data_config, mixture, split)
    name = _module(mixture).register(data_config, split, vocab)
    import seqio

    found: Any = seqio.get_mixture_or_task(name)
    tasks = []
    for task in found.tasks:
        # The rows as they are, and not task.get_dataset(): see tasks/super_ni.py, SniSource.
        tasks.append(replace(task.source.task_rows(), rate=float(found.get_rate(task))))
    skipped: Counter[str] = Counter()
    for rows in tasks:
        skipped.update(rows.skipped)
    for field, count in sorted(skipped.items()):
        print(f"{name}: {count} bad rows of {field} skipped (data.on_bad_row='skip')")
    return tasks


def find_mixture(name: str) -> tuple[str, str, dict[str, Any]]:
    """What a name stands for: a key of MIXTURES, a split, and fields of the config to set.

    A key alone is its split 'train'; ``<key>_<split>`` is a split of it. A module of tasks may know
    more names of SeqIO Mixtures: ``MIXTURE_NAMES`` (name -> split), or ``find(name)``, which gives
    a split with the fields that the name implies, or None.

    Raises:
        UserError: unknown; names the nearest.
    """
    if name in MIXTURES:
        return name, "train", {}
    known: dict[str, tuple[str, str]] = {}
    for key in MIXTURES:
        module = _module(key)
        splits = ("train", *getattr(module, "SPLITS", ()), *module.HELD_OUT)
        known |= {f"{key}_{split}": (key, split) for split in splits}
        known |= {n: (key, split) for n, split in getattr(module, "MIXTURE_NAMES", {}).items()}
        if found := getattr(module, "find", lambda _: None)(name):
            return key, found[0], dict(found[1])
    return (*known[choose("mixture", name, [*MIXTURES, *known])], {})


def held_out_splits(mixture: str) -> tuple[str, ...]:
    """The splits of a mixture that evaluation is on."""
    return _module(mixture).HELD_OUT


def splits_of(config: Any) -> dict[str, str]:
    """split -> mixture to evaluate on: `eval.split`, or every held-out split of the mixture."""
    mixture = config.eval.mixture or config.data.mixture
    names = [config.eval.split] if config.eval.split else held_out_splits(mixture)
    return dict.fromkeys(names, mixture)


def load_judged(config: Any, mixture: str, split: str, vocab: Vocabulary) -> list[TaskRows]:
    """The tasks of a split as evaluation asks them, `eval.max_rows_per_task` rows of each.

    In stage 'peft' `data.max_instances_per_task` says how many rows are trained on, and has no say
    in which are judged.
    """
    section = config.data
    if config.stage == "peft":
        section = section.copy_and_resolve_references()
        section.max_instances_per_task = 0
    return load_tasks(mixture, section, split, vocab)


def load_peft_tasks(config: Any, vocab: Vocabulary) -> list[TaskRows]:
    """The tasks that evaluation judges, with rows that it does not: what stage 'peft' trains on.

    Of a task's rows those that have not the text of one of the first `eval.max_rows_per_task`, and
    of these the first `data.max_instances_per_task` (0 = all). Examples to show stay the task's.
    Rates are equal: every task's adapters are its own and are trained as much as another's.

    Raises:
        UserError: as `load_tasks`; every row is judged; or two splits have a task of one name.
    """
    most, limit = config.eval.max_rows_per_task, config.data.max_instances_per_task
    if not most:
        raise UserError(
            "eval.max_rows_per_task=0 judges every row and leaves stage=peft none to train on; "
            "set how many rows a task are judged"
        )
    found: dict[str, TaskRows] = {}
    for split, mixture in splits_of(config).items():
        for task in load_judged(config, mixture, split, vocab):
            judged = {text_key(row.input) for row in task.rows[:most]}
            rows = [row for row in task.rows if text_key(row.input) not in judged]
            if not rows:
                raise UserError(
                    f"task {task.name} of split {split}: all its {len(task.rows)} rows are judged "
                    f"and stage=peft has none to train on; lower eval.max_rows_per_task={most}"
                )
            if task.name in found:
                raise UserError(
                    f"stage=peft: two splits of {mixture} have a task {task.name}, and a task has "
                    "one set of adapters; choose a split with eval.split"
                )
            found[task.name] = replace(task, rows=tuple(rows[: limit or None]), rate=1.0)
    return list(found.values())


def _module(mixture: str) -> Any:
    if mixture not in MIXTURES:
        near = difflib.get_close_matches(mixture, MIXTURES, 1, 0.0)[0]
        raise UserError(
            f"data.mixture={mixture!r} is unknown; known are {', '.join(sorted(MIXTURES))} "
            f"(nearest: {near})"
        )
    return importlib.import_module(MIXTURES[mixture])


# ------------------------------------------------------------------------ streams of batches


def make_sampler(config: Any, vocab: Vocabulary, layout: str = "apart") -> Sampler:
    """The sampler of `config.stage`, in one of LAYOUTS.

    Over `data.text` for 'hyperpretrain', the training tasks of `data.mixture` for 'mtf', and
    `load_peft_tasks` for 'peft'.
    """
    if config.stage == "hyperpretrain":
        chunks = importlib.import_module("hyper_t5.tasks.text").open_chunks(
            config.data, vocab, config.seed
        )
        return TextSampler(chunks, config.data, config.seed, layout)
    if config.stage == "peft":
        tasks = load_peft_tasks(config, vocab)
    else:
        tasks = load_tasks(config.data.mixture, config.data, "train", vocab)
    return EpisodeSampler(tasks, vocab, config.data, config.seed, layout)


def train_batches(
    sampler: Sampler, start_step: int = 0, share: tuple[int, int] = (0, 1), ahead: int = 2
) -> Iterator[Batch]:
    """Batches start_step, start_step + 1, ... without end, made `ahead` of their use.

    Of each only this (share, of shares), as `Sampler.batch` takes them.
    """
    return prefetch((sampler.batch(step, *share) for step in itertools.count(start_step)), ahead)


def prefetch(items: Iterator[Any], ahead: int = 2) -> Iterator[Any]:
    """The same items, made by a background thread; its exception is raised here.

    Closing the iterator (or dropping it) stops the thread.
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
        except BaseException as error:  # raised again where the item was wanted
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
