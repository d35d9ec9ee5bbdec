"""Super-NaturalInstructions as SeqIO Tasks, from the folder of its official release.

    FOLDER/tasks/<task>.json
    FOLDER/splits/default/{train,test}_tasks.txt     one task name a line
    FOLDER/splits/xlingual/{train,test}_tasks.txt    of the cross-lingual track

Each task is a SeqIO Task `sni_<task>` (hyphens become underscores) with the features hyper_inputs,
inputs and targets; all references and the row's id pass through. `sni_train` and `sni_test` are
Mixtures of them, `sni_xlingual_train` and `sni_xlingual_test` those of the cross-lingual track.
What hyper_inputs hold says `data.variant`, as the published results are named: def (the definition
alone), def_pos_1, def_pos_2 (with its first positive examples; '' is as this one), pos_k (k of
them, drawn, alone). As in Tk-Instruct (Wang et al. 2022) every task has the same rate; with
`data.max_instances_per_task` (100 there) set, T0's rule applies: the number of rows, capped.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.prompts import ENCODINGS, ShowRule, example_text, show_rule
from hyper_t5.taskfile import (
    Example,
    Row,
    TaskRows,
    parse_sni_task,
    read_sni_task,
    text_key,
)
from hyper_t5.tasks.common import (
    FEATURES,
    choose_rows,
    register_once,
    row_count,
    seqio,
    seqio_name,
    text_features,
    tf,
)
from hyper_t5.vocab import Vocabulary

DEF_POS_2 = ShowRule(True, 2, 2, True)  # of a Task's hyper_inputs: the published "Def+2Pos"
TaskFile = Path | Mapping[str, Any]

HELD_OUT = ("test",)
XLINGUAL = "xlingual_"
SPLITS = ("train", "test", f"{XLINGUAL}train", f"{XLINGUAL}test")


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers one split of `data_config.sni_dir`; returns the Mixture's name.

    Raises:
        UserError: no such folder or split, an empty split, or a split naming missing tasks.
    """
    files = split_files(
        data_config.sni_dir, split, data_config.get("on_missing_task", "raise") == "skip"
    )
    return register_sni_tasks("sni", split, files, vocab, data_config)


def split_files(sni_dir: str, split: str, skip_missing: bool = False) -> dict[str, Path]:
    """Task files of a split by task name, in the split's order.

    Raises:
        UserError: names the split file, the task and the remedy.
    """
    if not sni_dir:
        raise UserError(
            "data.sni_dir is empty: give the folder that holds tasks/ and splits/ of "
            "Super-NaturalInstructions"
        )
    folder = Path(sni_dir).expanduser()
    track = "xlingual" if split.startswith(XLINGUAL) else "default"
    listing = folder / "splits" / track / f"{split.removeprefix(XLINGUAL)}_tasks.txt"
    try:
        names = listing.read_text(encoding="utf-8").split()
    except OSError:
        raise UserError(
            f"{listing}: no such split file; data.sni_dir must hold tasks/ and splits/default/, "
            f"and the splits are {', '.join(SPLITS)}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{listing}: not UTF-8; it lists one task name a line") from None
    if not names:
        raise UserError(f"{listing}: the list is empty; it needs one task name a line")
    files = {name: folder / "tasks" / f"{name}.json" for name in names}
    missing = [name for name, file in files.items() if not file.is_file()]
    if missing and not skip_missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{listing}: names {missing[0]}{others}, but {files[missing[0]]} is missing; add the "
            "file, take the line out, or set data.on_missing_task='skip'"
        )
    if len(missing) == len(names):
        raise UserError(f"{listing}: none of its {len(names)} tasks is in {folder / 'tasks'}")
    if missing:
        print(f"{listing}: {len(missing)} of {len(names)} tasks have no file and are left out")
    return {name: file for name, file in files.items() if name not in set(missing)}


def register_sni_tasks(
    prefix: str,
    split: str,
    tasks: Mapping[str, TaskFile],
    vocab: Vocabulary,
    data_config: Any,
) -> str:
    """Registers SNI-style tasks as `<prefix>_<task>` and their Mixture `<prefix>_<split>`.

    Files are read when a Task is, not now. Registering again does nothing; registering other
    content under the same names replaces it.

    Args:
        prefix: of the names.
        split: the one SeqIO split that each Task has. Of more than
            `data.max_instances_per_task` rows, 'train'
            keeps a random choice (the same in every run) and any other split the first, which in
            the official files are balanced over labels.
        tasks: by name, a path or the parsed JSON object.
        vocab: of all features.
        data_config: says how rows are checked, how many are kept, and what hyper_inputs hold.

    Returns:
        The Mixture's name.

    Raises:
        UserError: there are no tasks.
    """
    if not tasks:
        raise UserError(f"{prefix}: the {split} split has no tasks")
    c = data_config
    how = (
        split,
        *(c.on_bad_row, c.empty_targets, c.max_instances_per_task, c.variant, c.encoding),
        vocab.identity(),
    )
    names = [seqio_name(prefix, name) for name in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{prefix}: two tasks of the {split} split become {twice}; rename one")
    signatures = [(_content(file), *how) for file in tasks.values()]
    for task_name, signature, (name, file) in zip(names, signatures, tasks.items(), strict=True):
        source = SniSource(name, file, split, c)
        make = functools.partial(_task, task_name, source, vocab)
        register_once(seqio.TaskRegistry, task_name, signature, make)
    rate: Any = row_count if c.max_instances_per_task else 1.0
    mixture = seqio_name(prefix, split)
    mix = functools.partial(seqio.Mixture, mixture, names, default_rate=rate)
    register_once(seqio.MixtureRegistry, mixture, (names, signatures), mix)
    return mixture


class SniSource(seqio.FunctionDataSource):
    """A task's rows, for SeqIO as a dataset and for us as they are.

    `load_tasks` calls `task_rows` and not `get_dataset`: a tf.data pipeline takes about a second to
    build and read (2 cores, 100 rows), which for the official 756 training tasks is a quarter of an
    hour, while reading and encoding all the files takes seconds. A test holds both to the same ids.
    """

    def __init__(self, name: str, file: TaskFile, split: str, data_config: Any) -> None:
        c = data_config
        self.task = name
        self._file = file
        self._split = split
        self._max_instances: int = c.max_instances_per_task
        # Of the first rows only what is kept is read, and checked.
        first = 0 if split.endswith("train") else self._max_instances
        self._how = (c.on_bad_row, first, c.empty_targets)
        self._show = show_rule(c) if c.variant else DEF_POS_2
        self._encoding: str = c.encoding
        self._rows: TaskRows | None = None
        super().__init__(dataset_fn=self._dataset, splits=[split])

    def task_rows(self) -> TaskRows:
        """The task in memory, read at the first call.

        Raises:
            UserError: as `parse_sni_task`.
        """
        if self._rows is None:
            if isinstance(self._file, Path):
                task = read_sni_task(self._file, *self._how)
            else:
                task = parse_sni_task(self._file, self.task, "", *self._how)
            self._rows = choose_rows(task, self._split, self._max_instances)
        return self._rows

    def _dataset(
        self, split: str, shuffle_files: bool = False, seed: int | None = None
    ) -> tf.data.Dataset:
        del split, shuffle_files, seed  # one split; SeqIO shuffles the examples itself
        text = tf.TensorSpec([], tf.string)
        texts = tf.TensorSpec([None], tf.string)
        signature = {
            "id": text,
            "instruction": text,
            "examples": texts,
            "inputs": text,
            "targets": text,
            "references": texts,
        }
        return tf.data.Dataset.from_generator(self._generate, output_signature=signature)

    def _generate(self) -> Iterator[dict[str, Any]]:
        task = self.task_rows()
        encoding = ENCODINGS[self._encoding]
        instruction = encoding.instruction(task.instruction) if self._show.instruction else ""
        for row in task.rows:
            shown = enumerate(self._shown(task, row))
            texts = [example_text(example, i, self._encoding) for i, example in shown]
            yield {
                "id": row.id,
                "instruction": instruction,
                "examples": np.array(texts, dtype=object),
                "inputs": encoding.asked(row.input),
                "targets": row.outputs[0],
                "references": np.array(row.outputs, dtype=object),
            }

    def _shown(self, task: TaskRows, row: Row) -> list[Example]:
        """The examples shown with a row: the task's first, or drawn by the row's id."""
        key = text_key(row.input)
        pool = [example for example in task.examples if text_key(example[0]) != key]
        if not self._show.first:
            rng = np.random.default_rng([42, zlib.crc32(row.id.encode())])
            pool = [pool[i] for i in rng.permutation(len(pool))]
        return pool[: self._show.most]


def _content(file: TaskFile) -> Any:
    """What tells one source from another: a path, or a digest of the object's text."""
    return str(file) if isinstance(file, Path) else zlib.crc32(repr(file).encode())


def _task(name: str, source: SniSource, vocab: Vocabulary) -> seqio.Task:
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            _conditioning,  # after both: `tokenize` takes text only, and a cache knows no lengths
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=text_features(vocab, FEATURES),
        metric_fns=[],
    )


def _conditioning(
    dataset: tf.data.Dataset,
    output_features: Mapping[str, seqio.Feature],
    sequence_length: Mapping[str, int] | None = None,
) -> tf.data.Dataset:
    """hyper_inputs (ids, no EOS yet) from instruction and examples, whole examples dropped to fit.

    The same rule as `prompts.join_conditioning`, in TensorFlow.
    """
    vocabulary = output_features["hyper_inputs"].vocabulary
    limit = (sequence_length or {}).get("hyper_inputs")

    def join(row: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        instruction = vocabulary.encode_tf(row.pop("instruction"))
        examples = tf.map_fn(
            vocabulary.encode_tf,
            row.pop("examples"),
            fn_output_signature=tf.RaggedTensorSpec([None], tf.int32),
        )
        if limit is not None:
            lengths = tf.cast(examples.row_lengths(), tf.int32)
            used = tf.size(instruction) + 1 + tf.cumsum(lengths)
            examples = tf.ragged.boolean_mask(examples, used <= limit)
        row["hyper_inputs"] = tf.concat([instruction, examples.flat_values], axis=0)
        return row

    return dataset.map(join, num_parallel_calls=tf.data.AUTOTUNE)
