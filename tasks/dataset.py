"""The interface of datasets: `Dataset`, a line of the registry, and `TaskSet`, its tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hyper_t5.data.task_rows import TaskData
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.scoring.benchmarks import Benchmark

DEFAULT = Benchmark()


@dataclasses.dataclass(frozen=True)
class TaskSet:
    """The tasks of one split; each is read when it is first used.

    Attributes:
      mixture: the name of their SeqIO Mixture.
      readers: SeqIO Task name -> function that reads the task.
      signature: determines the rows; its ``repr`` is compared, so that changed tasks are registered
        again.
      rates: mixture rate by SeqIO Task name; None is the number of rows.
    """

    mixture: str
    readers: Mapping[str, Callable[[], TaskData]]
    signature: Any
    rates: Mapping[str, float] | None = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One dataset: how its tasks are loaded, its options and its benchmark.

    Attributes:
      load_rows: (``config.data``, split, vocabulary) -> the tasks of the split.
      splits: names of all splits.
      held_out: the splits that evaluation is on.
      options: additional fields of ``config.data``, with their defaults.
      paths: those of ``options`` that name files or folders.
      settings: values of ``config.data`` in its published results.
      benchmark: its metrics.
      vocab_file: the default of ``data.vocab``.
      aliases: other Mixture name -> split.
      parse_name: Mixture name -> (split, implied fields of the config), or None.
    """

    load_rows: Callable[[Any, str, Vocabulary], TaskSet]
    splits: tuple[str, ...] = ("train", "test")
    held_out: tuple[str, ...] = ("test",)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paths: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    benchmark: Benchmark = DEFAULT
    vocab_file: Path | None = None
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    parse_name: Callable[[str], tuple[str, dict[str, Any]] | None] = lambda name: None
