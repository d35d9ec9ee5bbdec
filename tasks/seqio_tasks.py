"""Datasets as SeqIO Tasks and Mixtures: one wrapper for every dataset of the registry.

A Task has the features hyper_inputs, inputs and targets; references and the row's id pass through.
``hyper_inputs`` are the conditioning that training reads (`templates`, `episodes.draw_examples`),
with the largest number of examples of ``data.variant`` or ``data.shots``. ``data.template`` sets
the text of all three. Rows are cached before the conditioning is encoded, so a cached Task serves
any ``sequence_length``.

Other modules import `seqio`, `tf` and `tfds` from here, so that TensorFlow is loaded once, quietly.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hyper_t5.data.batch import IDS
from hyper_t5.data.episodes import draw_examples
from hyper_t5.data.task_rows import TaskData, text_key
from hyper_t5.data.templates import (
    TEMPLATES,
    conditioning_rule,
    format_example,
    join_conditioning,
)
from hyper_t5.data.vocab import ByteVocabulary, SentencePieceVocabulary, Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.rows import choose_rows
from hyper_t5.utils.errors import UserError

# TensorFlow's messages about missing GPU libraries and about CPU features.
_NOISE = re.compile(
    r"WARNING: All log messages before absl::InitializeLog"
    r"|[IWE]\d{4} .*\b(port|cudart_stub|cuda_platform|cpu_feature_guard)\.cc:\d+\]"
    r"|To enable the following instructions: "
)


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Remove TensorFlow's load-time messages from stderr; other output is printed at the end.

    C++ code writes them before any setting applies (TF_CPP_MIN_LOG_LEVEL=3 leaves half of them in
    TensorFlow 2.21), so file descriptor 2 is redirected.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed, as in some services
        yield
        return
    failed = True
    with tempfile.TemporaryFile() as captured:
        try:
            os.dup2(captured.fileno(), 2)
            yield
            failed = False
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if failed or not _NOISE.match(line):
                    print(line, file=sys.stderr)


with _without_noise():
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds  # noqa: F401

    # TensorFlow only reads data; on a GPU it would reserve the memory that JAX needs.
    with contextlib.suppress(RuntimeError):  # already running
        tf.config.set_visible_devices([], "GPU")

_signatures: dict[str, str] = {}  # name of a Task or Mixture -> signature
_vocabularies: dict[str, seqio.Vocabulary] = {}


# ------------------------------------------------------------------------------- registration


def register(tasks: TaskSet, data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Register the Tasks of one split and their Mixture; return the Mixture's name.

    Rows are read when a Task is read. Registering equal tasks again has no effect; other tasks of
    the same names replace them.

    Raises:
      UserError: two tasks get one name.
    """
    c = data_config
    fields = ("max_instances_per_task", "variant", "shots", "use_instruction", "template")
    signature = (tasks.signature, split, [c[f] for f in fields], vocab.identity())
    names: dict[str, str] = {}
    for task in tasks.readers:
        name = seqio_name(task)
        if name in names:
            raise UserError(f"{names[name]} and {task}: both become {name}; rename one of them")
        names[name] = task
    for name, task in names.items():
        source = RowsSource(tasks.readers[task], split, c)
        make = functools.partial(_task, name, source, vocab, c)
        register_once(seqio.TaskRegistry, name, signature, make)
    rates = tasks.rates
    rate: Callable[[seqio.Task], float] = _row_count
    if rates is not None:
        by_name = {name: rates[task] for name, task in names.items()}
        rate = lambda task: by_name[task.name]  # noqa: E731
    mixture = seqio_name(tasks.mixture)
    make = functools.partial(seqio.Mixture, mixture, list(names), default_rate=rate)
    register_once(seqio.MixtureRegistry, mixture, (signature, rates, list(names)), make)
    return mixture


def load_tasks(mixture: str) -> list[tuple[TaskData, float]]:
    """Return the tasks of a registered Mixture with their rates.

    Rows are read from the Tasks' sources and not by ``get_dataset``: a tf.data pipeline takes about
    a second to build and read (2 cores, 100 rows), a quarter of an hour for the 756 training tasks
    of Super-NaturalInstructions, while their files are read and encoded in seconds. A test holds
    both to the same ids.
    """
    registered: Any = seqio.get_mixture_or_task(mixture)
    return [(t.source.task_rows(), float(registered.get_rate(t))) for t in registered.tasks]


def register_once(registry: Any, name: str, signature: Any, make: Callable[[], Any]) -> None:
    """Add ``make()`` under ``name``, unless it is registered from the same signature.

    SeqIO's registries are global and refuse a second entry, but a process may register twice
    (train, then evaluate), or the same name from another folder.
    """
    described = repr(signature)
    if name in registry.names():
        if _signatures.get(name) == described:
            return
        registry.remove(name)
    registry.add_provider(name, make())
    _signatures[name] = described


def seqio_name(name: str) -> str:
    """Replace the characters that SeqIO refuses in names, hyphens mostly."""
    return re.sub(r"[^\w.:]", "_", name)


def seqio_vocab(vocab: Vocabulary) -> seqio.Vocabulary:
    """Return SeqIO's vocabulary with the same ids: one object each, since Mixtures compare them."""
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
    """Return output features that are token ids ending in EOS."""
    return {name: seqio.Feature(seqio_vocab(vocab), add_eos=True) for name in names}


def _row_count(task: seqio.Task) -> float:
    return float(len(task.source.task_rows().rows))


# ------------------------------------------------------------------------------- Tasks


class RowsSource(seqio.FunctionDataSource):
    """The rows of one task, for SeqIO as a dataset of texts and for training as `TaskData`."""

    def __init__(self, read: Callable[[], TaskData], split: str, data_config: Any) -> None:
        self._read = read
        self._split = split
        self._data_config = data_config
        self._task: TaskData | None = None
        super().__init__(dataset_fn=self._dataset, splits=[split])

    def task_rows(self) -> TaskData:
        """Return the task, read at the first call, with at most ``max_instances_per_task`` rows.

        Raises:
          UserError: the file is invalid.
        """
        if self._task is None:
            self._task = choose_rows(
                self._read(), self._split, self._data_config.max_instances_per_task
            )
        return self._task

    def _dataset(
        self, split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split; SeqIO shuffles the examples itself
        text, texts = tf.TensorSpec([], tf.string), tf.TensorSpec([None], tf.string)
        signature = dict.fromkeys(("id", "instruction", "inputs", "targets"), text)
        signature |= dict.fromkeys(("examples", "references"), texts)
        return tf.data.Dataset.from_generator(self._generate, output_signature=signature)

    def _generate(self) -> Iterator[dict[str, Any]]:
        c = self._data_config
        task, rule, template = self.task_rows(), conditioning_rule(c), TEMPLATES[c.template]
        # Training draws examples; evaluation shows the first ones.
        rule = rule._replace(first=rule.first or not self._split.endswith("train"))
        instruction = template.instruction(task.instruction) if rule.instruction else ""
        for row in task.rows:
            rng = np.random.default_rng([42, zlib.crc32(row.id.encode())])
            shown = draw_examples(task, rule.most, rule, rng, exclude=text_key(row.input))
            texts = [format_example(e, i, c.template) for i, e in enumerate(shown)]
            yield {
                "id": row.id,
                "instruction": instruction,
                "examples": np.array(texts, dtype=object),
                "inputs": template.query(row.input),
                "targets": row.outputs[0],
                "references": np.array(row.outputs, dtype=object),
            }


def _task(name: str, source: RowsSource, vocab: Vocabulary, data_config: Any) -> seqio.Task:
    options = vocab, data_config.on_long_examples
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            functools.partial(_encode_conditioning, options=options),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=text_features(vocab, IDS),
        metric_fns=[],
    )


def _encode_conditioning(
    dataset: tf.data.Dataset,
    sequence_length: Mapping[str, int] | None = None,
    *,
    options: tuple[Vocabulary, Any],
) -> tf.data.Dataset:
    """Add hyper_inputs (ids without EOS) of instruction and examples, by `join_conditioning`."""
    vocab, on_long_examples = options
    limit = (sequence_length or {}).get("hyper_inputs") or 2**30

    def join(instruction: bytes, examples: Sequence[bytes]) -> np.ndarray:
        parts = [vocab.encode(text.decode()) for text in (instruction, *examples)]
        if not any(parts):
            return np.zeros(0, np.int32)
        joined = join_conditioning(
            parts[0], parts[1:], limit, "truncate", on_long_examples=on_long_examples
        )
        return joined.ids[:-1]

    def encode(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        texts = [row.pop("instruction"), row.pop("examples")]
        row["hyper_inputs"] = tf.ensure_shape(tf.numpy_function(join, texts, tf.int32), [None])
        return row

    return dataset.map(encode, num_parallel_calls=tf.data.AUTOTUNE)
