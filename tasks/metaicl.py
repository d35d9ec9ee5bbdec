"""MetaICL (Min et al. 2022), from the folder that its official code writes.

    FOLDER/config/<setting>.json         {"train": [task, ...], "test": [task, ...]}
    FOLDER/config/tasks/<task>.json      {"task_type": "classification", ...}
    FOLDER/data/<task>/<task>_16384_100_train.jsonl          meta-training rows
    FOLDER/data/<task>/<task>_16_<seed>_{train,test}.jsonl   16 demonstrations, and test rows

A line is a row, ``{"task": ..., "input": ..., "output": ..., "options": [...]}``. The layout and
the seven settings (``data.metaicl_setting``) are those of facebookresearch/MetaICL. Tasks have no
instruction; they are specified by demonstrations alone.

Split 'train' has the setting's meta-training tasks, with the number of rows as rate: the official
code concatenates all rows. A task without its 16384 file has the rows of its k-shot files of the
largest k, of all seeds. The splits in HELD_OUT have the target tasks, with the 16 demonstrations of
one seed. The official code evaluates the test file of seed 100 with every seed's demonstrations,
and its build writes the same rows for all seeds; a seed's own test file is read where it exists.

A Task is named like its file, ``metaicl_<task>_16384_100_train`` or
``metaicl_<task>_16_<seed>_test``; Mixtures are ``metaicl_<setting>_<split>``. Rows are read from
the files on access; each line is validated once, when its Task is first read.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5.data.batch import CONCAT
from hyper_t5.data.task_rows import (
    Example,
    OnBadRow,
    OnEmpty,
    TaskData,
    TaskRow,
)
from hyper_t5.data.templates import conditioning_rule
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.rows import BadRow, lazy_rows
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import json_object, read_json

SEEDS = (100, 13, 21, 42, 87)  # of the demonstrations; the paper's results average over them
HELD_OUT = tuple(f"test_{seed}" for seed in SEEDS)
SPLITS = ("train", *HELD_OUT)
SHOTS = 16  # demonstrations in a k-shot file
TRAIN_ROWS = 16384  # the most rows in a meta-training file


# ------------------------------------------------------------------------------ the mixture


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the tasks of one split of a setting of ``data.metaicl_dir``.

    Raises:
      UserError: no such folder, setting or split; a task without its files; or an instruction is
        required, which these tasks do not have.
    """
    del vocab
    c = data_config
    _check_no_instruction(c)
    setting = c.metaicl_setting
    tasks = split_files(c.metaicl_dir, setting, split, c.on_missing_task == "skip")
    options = (c.on_bad_row, c.empty_targets)
    readers = {
        f"metaicl_{task}_{files.name}": functools.partial(read_task, task, files, *options)
        for task, files in tasks.items()
    }
    return TaskSet(f"metaicl_{setting}_{split}", readers, (tasks, options))


def parse_name(name: str) -> tuple[str, dict[str, str]] | None:
    """Return the split of a Mixture of this dataset and the fields that its name implies.

    None if the name is of another dataset. Whether the setting exists is for `load_rows`.
    """
    match = re.fullmatch(rf"metaicl_(.+)_({'|'.join(SPLITS)})", name)
    return match and (match[2], {"data.metaicl_setting": match[1]})


def _check_no_instruction(data_config: Any) -> None:
    variant = data_config.get("variant", "")
    if conditioning_rule(data_config, CONCAT).instruction:
        setting = f"data.variant={variant!r}" if variant else "data.use_instruction=True"
        raise UserError(
            f"{setting} needs an instruction, and MetaICL's tasks have none; set "
            "data.use_instruction=False and the number of demonstrations in data.shots, or "
            f"data.variant='pos_{SHOTS}'"
        )


# ------------------------------------------------------------------------------ which files


class Files(NamedTuple):
    """Files of one task.

    Attributes:
      name: k, seed and part of the rows.
      rows: read one after another.
      demonstrations: None for training.
      config: file of the task's type; it may be absent.
    """

    name: str
    rows: tuple[Path, ...]
    demonstrations: Path | None
    config: Path


def split_files(
    metaicl_dir: str, setting: str, split: str, skip_missing: bool = False
) -> dict[str, Files]:
    """Return the files of a setting's tasks by name, in the setting's order.

    Raises:
      UserError: names folder, setting, task and remedy.
    """
    if split not in SPLITS:
        raise UserError(f"metaicl: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    if not metaicl_dir:
        raise UserError("data.metaicl_dir is empty: set the folder that holds config/ and data/")
    folder = Path(metaicl_dir).expanduser()
    listing, parts = _setting_tasks(folder, setting)
    tasks = parts[split.partition("_")[0]]
    if both := [task for task in parts["train"] if task in parts["test"]]:
        # As in the official non_nli_to_nli. Test rows are in no training file all the same.
        print(f"{listing}: {', '.join(both)} is a task of train and of test")
    by_task: dict[str, Files] = {}
    missing: list[Path] = []
    for task in tasks:
        files = _task_files(folder, task, split)
        if isinstance(files, Path):
            missing.append(files)
        else:
            by_task[task] = files
    if not by_task:
        raise UserError(
            f"{listing}: none of the {len(tasks)} tasks of {split} has its files in "
            f"{folder / 'data'}; the first missing is {missing[0].relative_to(folder)}"
        )
    if missing and not skip_missing:
        others = f", nor those of {len(missing) - 1} more tasks" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: no such file{others}; add it, remove the task from {listing}, or set "
            "data.on_missing_task='skip'"
        )
    if missing:
        print(f"{listing}: skips {len(missing)} of {len(tasks)} tasks of {split}, without files")
    if few := [task for task, files in by_task.items() if files.name == _K_SHOT]:
        print(
            f"{listing}: {len(few)} of {len(by_task)} tasks have no {TRAIN_ROWS} file and are read "
            f"from their k-shot files: {few[0]}{', ...' if len(few) > 1 else ''}"
        )
    return by_task


def _setting_tasks(folder: Path, setting: str) -> tuple[Path, dict[str, list[str]]]:
    """Return the file of a setting and the tasks that it lists under 'train' and 'test'."""
    known = sorted(path.stem for path in (folder / "config").glob("*.json"))
    if not known:
        raise UserError(
            f"{folder / 'config'}: no such folder, or no setting in it; data.metaicl_dir must hold "
            "config/<setting>.json and data/"
        )
    if setting not in known:
        raise UserError(
            f"data.metaicl_setting={setting!r} is not in {folder / 'config'}; "
            f"the settings there are {', '.join(known)}"
        )
    listing = folder / "config" / f"{setting}.json"
    raw = read_json(listing)
    for part in ("train", "test"):
        tasks = raw.get(part)
        if not isinstance(tasks, list) or not all(isinstance(task, str) and task for task in tasks):
            raise UserError(f"{listing}: field {part} must be a list of tasks' names")
        if not tasks:
            raise UserError(f"{listing}: field {part} is empty; it needs at least one task")
        if twice := [task for task, count in Counter(tasks).items() if count > 1]:
            raise UserError(f"{listing}: field {part} names {twice[0]} twice; remove one")
    return listing, {part: raw[part] for part in ("train", "test")}


_K_SHOT = "k_train"


def _task_files(folder: Path, task: str, split: str) -> Files | Path:
    """Return the files of a task, or the path of the one that is missing."""
    config = folder / "config" / "tasks" / f"{task}.json"
    inside = folder / "data" / task
    if split == "train":
        name = f"{TRAIN_ROWS}_100_train"
        full = inside / f"{task}_{name}.jsonl"
        if full.is_file():
            return Files(name, (full,), None, config)
        few = _k_shot_files(inside, task)
        return Files(_K_SHOT, few, None, config) if few else full
    seed = split.partition("_")[2]
    demonstrations = inside / f"{task}_{SHOTS}_{seed}_train.jsonl"
    own, first = (inside / f"{task}_{SHOTS}_{s}_test.jsonl" for s in (seed, SEEDS[0]))
    rows = own if own.is_file() else first
    for file in (demonstrations, rows):
        if not file.is_file():
            return file
    return Files(f"{SHOTS}_{seed}_test", (rows,), demonstrations, config)


def _k_shot_files(inside: Path, task: str) -> tuple[Path, ...]:
    """Return the training files of the largest k, one for each seed."""
    pattern = re.compile(rf"{re.escape(task)}_(\d+)_(\d+)_train\.jsonl")
    by_k: dict[int, list[tuple[int, Path]]] = {}
    for path in inside.iterdir() if inside.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and path.is_file():
            by_k.setdefault(int(match[1]), []).append((int(match[2]), path))
    return tuple(path for _, path in sorted(by_k[max(by_k)])) if by_k else ()


# ------------------------------------------------------------------------------ one task


def read_task(
    task: str, files: Files, on_bad_row: OnBadRow = "raise", on_empty: OnEmpty = "raise"
) -> TaskData:
    """Read one task: its demonstrations in memory, its rows lazy; all are validated.

    With 'skip', fewer demonstrations than SHOTS are accepted with a message, but not none.

    Raises:
      UserError: names file, line and field; too few demonstrations; no usable row.
    """
    parse = functools.partial(_parse, task)
    examples: tuple[Example, ...] = ()
    skipped: Counter[str] = Counter()
    if files.demonstrations is not None:
        demonstrations, bad = lazy_rows([files.demonstrations], parse, on_bad_row, on_empty)
        examples = tuple((row.input, row.outputs[0]) for row in demonstrations)
        skipped += bad
        _check_count(files.demonstrations, len(examples), on_bad_row)
    rows, bad = lazy_rows(files.rows, parse, on_bad_row, on_empty)
    if not rows:
        raise UserError(f"{files.rows[0]}: holds no usable row; a task needs at least one")
    category = _category(files.config)
    return TaskData(task, ("",), examples, rows, category, skipped=dict(skipped + bad))


def _check_count(file: Path, count: int, on_bad_row: OnBadRow) -> None:
    if count == SHOTS:
        return
    problem = f"{file}: holds {count} demonstrations and not {SHOTS}"
    if on_bad_row == "raise" or not count:
        fewer = ", or accept fewer with data.on_bad_row='skip'" if count else ""
        raise UserError(f"{problem}; add the missing ones{fewer}")
    print(problem)


def _category(config: Path) -> str:
    """Return a task's type: 'classification', 'multi-choice', 'free-form', or '' if unknown."""
    if not config.is_file():
        return ""
    category = read_json(config).get("task_type", "")
    if not isinstance(category, str):
        raise UserError(f"{config}: field task_type must be text")
    return category


def _parse(task: str, line: bytes, number: int, source: str) -> TaskRow:
    """Parse a line as the row with id ``<task>-<number>``."""
    try:
        value = json_object(line, source)
    except UserError as error:
        hint = "" if line.endswith(b"\n") else "; the file ends here, is it complete?"
        raise BadRow(f"{error}{hint}", "JSON") from None
    for field in ("task", "input", "output", "options"):
        if field not in value:
            raise BadRow(f"{source}: lacks field {field}", field)
        if field != "options" and not isinstance(value[field], str):
            raise BadRow(f"{source}: field {field} must be text", field)
    if value["task"] != task:
        raise BadRow(f"{source}: field task is {value['task'][:60]!r}, not {task}", "task")
    options, output = value["options"], value["output"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise BadRow(f"{source}: field options must be a list of texts", "options")
    if options and output not in options:
        raise BadRow(f"{source}: field options lacks the output {output[:60]!r}", "options")
    return TaskRow(f"{task}-{number}", value["input"], (output,), tuple(options))
