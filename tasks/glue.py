"""GLUE (Wang et al. 2019) in the text format of Hyperdecoders, from local files.

    FOLDER/<task>/train.jsonl, validation.jsonl, and test.jsonl if labeled

for any of the tasks in TASKS. A line is a row, ``{"sentence1": ..., "sentence2": ..., "label": 0,
"idx": 7}``, or has the official column names (mnli: premise, hypothesis). Official files of mnli
are accepted: validation_mismatched.jsonl is its validation and validation_matched.jsonl its test
split, as in Hyperdecoders (Ivison & Peters 2022).

An input is ``mnli premise: ... hypothesis: ...``, with the task's name and official columns; the
output is the label's digit, or for stsb the score rounded to 0.2. The instructions are ours:
Hyperdecoders has none. Rates are the number of rows.

`hyper_t5.tools.convert_glue` writes such a folder from files of MetaICL and P3.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5.data.task_rows import OnBadRow, TaskData, TaskRow
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.rows import read_lines
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation",)
# The first existing file of a split is read.
FILES = {
    "train": ("train.jsonl",),
    "validation": ("validation.jsonl", "validation_mismatched.jsonl"),
    "test": ("test.jsonl", "validation_matched.jsonl"),
}


class GlueTask(NamedTuple):
    """Columns, labels and instruction of a task.

    Attributes:
      columns: official names of its one or two sentences.
      answers: official names of labels 0, 1, ...; () where they are scores from 0 to 5.
      instruction: ours.
    """

    columns: tuple[str, ...]
    answers: tuple[str, ...]
    instruction: str


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        "Is the sentence acceptable English? Answer 0 if it is not, 1 if it is.",
    ),
    "sst2": GlueTask(
        ("sentence",),
        ("negative", "positive"),
        "What does the sentence say of the film? Answer 0 for bad, 1 for good.",
    ),
    "mrpc": GlueTask(
        PAIR,
        ("not_equivalent", "equivalent"),
        "Do the two sentences say the same? Answer 0 if they do not, 1 if they do.",
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "Do the two questions ask the same? Answer 0 if they do not, 1 if they do.",
    ),
    "stsb": GlueTask(
        PAIR,
        (),
        "How alike in meaning are the two sentences? Answer with a number from 0.0, not at all, "
        "to 5.0, the same, in steps of 0.2.",
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "Is the hypothesis true if the premise is? Answer 0 for yes, 1 for maybe, 2 for no.",
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        "Does the sentence answer the question? Answer 0 if it does, 1 if it does not.",
    ),
    "rte": GlueTask(
        PAIR,
        ("entailment", "not_entailment"),
        "Does sentence2 follow from sentence1? Answer 0 if it does, 1 if it does not.",
    ),
    "wnli": GlueTask(
        PAIR,
        ("not_entailment", "entailment"),
        "In sentence2 a name stands for a pronoun of sentence1. Is it the right one? "
        "Answer 0 if it is not, 1 if it is.",
    ),
}


# ------------------------------------------------------------------------------ the mixture


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Return the tasks of a split of ``data.glue_dir``.

    Raises:
      UserError: no such folder or split, or a task without its file ('test' leaves those out).
    """
    del vocab
    c = data_config
    files = split_files(c.glue_dir, split, c.on_missing_task == "skip")
    readers = {
        f"glue_{task}_{split}": functools.partial(read_task, task, file, c.on_bad_row)
        for task, file in files.items()
    }
    signature = (sorted(map(str, files.values())), c.on_bad_row)
    return TaskSet(f"glue_{split}", readers, signature)


def split_files(glue_dir: str, split: str, skip_missing: bool = False) -> dict[str, Path]:
    """Return the file of a split by task name, in the order of TASKS.

    Raises:
      UserError: names folder, task and remedy.
    """
    if split not in SPLITS:
        raise UserError(f"glue: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    if not glue_dir:
        raise UserError("data.glue_dir is empty: set the folder that holds cola/, sst2/, ...")
    folder = Path(glue_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; data.glue_dir must hold cola/, sst2/, ...")
    inside = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    tasks = [task for task in TASKS if task in inside]
    if not tasks:
        raise UserError(f"{folder}: holds no folder of a GLUE task ({', '.join(TASKS)})")
    if other := sorted(inside - set(tasks)):
        print(f"{folder}: skips {', '.join(other)}: not a GLUE task")
    candidates = {task: [folder / task / name for name in FILES[split]] for task in tasks}
    paths = {
        task: next(filter(Path.is_file, files))
        for task, files in candidates.items()
        if any(map(Path.is_file, files))
    }
    missing = [files[0] for task, files in candidates.items() if task not in paths]
    if not paths:
        raise UserError(f"{missing[0]}: no such file, nor that of any other task")
    if missing and split != "test" and not skip_missing:
        raise UserError(
            f"{missing[0]}: no such file; add it, remove its folder, or set "
            "data.on_missing_task='skip'"
        )
    if missing:
        print(f"{folder}: {split} skips {', '.join(file.parent.name for file in missing)}: no file")
    return paths


def read_task(task: str, file: Path, on_bad_row: OnBadRow = "raise") -> TaskData:
    """Read one task from one of its files.

    Raises:
      UserError: names file, line and field; no usable row.
    """
    rows: list[TaskRow] = []
    skipped: Counter[str] = Counter()
    for number, (location, line) in enumerate(read_lines(file)):
        try:
            rows.append(_row(files.json_object(line, location), task, number, location))
        except UserError:
            if on_bad_row == "raise":
                raise
            skipped[f"{task}/{file.name}"] += 1
    if not rows:
        raise UserError(f"{file}: holds no usable row; a task needs at least one")
    instruction = TASKS[task].instruction
    return TaskData(task, (instruction,), (), tuple(rows), "GLUE", skipped=dict(skipped))


def _row(value: Mapping[str, Any], task: str, number: int, location: str) -> TaskRow:
    columns = TASKS[task].columns
    parts = [task]
    for column, plain in zip(columns, PAIR, strict=False):
        parts += [f"{column}:", _sentence(value, column, plain, location)]
    if "label" not in value:
        raise UserError(f"{location}: lacks field label")
    answer = _answer(value["label"], task, f"{location}: field label")
    return TaskRow(f"{task}-{value.get('idx', number)}", " ".join(parts), (answer,))


def _sentence(value: Mapping[str, Any], column: str, plain: str, location: str) -> str:
    name = plain if plain in value else column
    if name not in value:
        either = plain if plain == column else f"{plain} or {column}"
        raise UserError(f"{location}: lacks field {either}")
    if not isinstance(value[name], str):
        raise UserError(f"{location}: field {name} must be text")
    return value[name]


def _answer(label: Any, task: str, location: str) -> str:
    """Return the text of a label."""
    number = isinstance(label, int | float) and not isinstance(label, bool)
    count = len(TASKS[task].answers)
    if not count:
        if number and 0 <= label <= 5:
            return f"{round(label * 5) / 5:.1f}"
        raise UserError(f"{location} must be a number from 0 to 5, this is {label!r}")
    if number and label in range(count):
        return str(int(label))
    hint = "; official test files have no labels, remove them" if label == -1 else ""
    raise UserError(
        f"{location} must be a whole number from 0 to {count - 1}, this is {label!r}{hint}"
    )
