"""MetaICL (Min et al. 2022) as SeqIO Tasks, from the folder that its official code makes.

    FOLDER/config/<setting>.json         {"train": [task, ...], "test": [task, ...]}
    FOLDER/config/tasks/<task>.json      {"task_type": "classification", ...}
    FOLDER/data/<task>/<task>_16384_100_train.jsonl          what meta-training reads
    FOLDER/data/<task>/<task>_16_<seed>_{train,test}.jsonl   16 demonstrations, and what is asked

one row a line, `{"task": ..., "input": ..., "output": ..., "options": [...]}`; the layout is that
of https://github.com/facebookresearch/MetaICL, whose seven settings `data.metaicl_setting` names.
A task has no instruction: it is said by the rows that are shown.

'train' has the setting's meta-training tasks, mixed by the number of their rows, as the official
code does by putting all rows in one list. A task without its 16384 file has the rows of its k-shot
files of the largest k there is, all seeds together. The splits in HELD_OUT have the target tasks,
each with the 16 demonstrations of one seed. The official code asks the rows of seed 100's test file
with every seed's demonstrations, and the build writes the same rows for all of them; a seed's own
file is read where there is one.

A Task is named like its file, `metaicl_<task>_16384_100_train` or `metaicl_<task>_16_<seed>_test`;
the Mixtures are `metaicl_<setting>_<split>`.

Rows stay on disk. Each line is checked once, when a Task is first read, and read again when drawn.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5.errors import UserError
from hyper_t5.files import json_object
from hyper_t5.prompts import ENCODINGS, example_text, show_rule
from hyper_t5.taskfile import (
    Example,
    OnBadRow,
    OnEmpty,
    Row,
    TaskRows,
    read_json,
    text_key,
)
from hyper_t5.tasks.common import (
    BadRow,
    RowsSource,
    lazy_rows,
    register_once,
    row_count,
    rows_task,
    seqio,
    seqio_name,
)
from hyper_t5.vocab import Vocabulary

SEEDS = (100, 13, 21, 42, 87)  # of the demonstrations, as the paper's results are averaged
HELD_OUT = tuple(f"test_{seed}" for seed in SEEDS)
SPLITS = ("train", *HELD_OUT)
SHOTS = 16  # demonstrations in a k-shot file
TRAIN_ROWS = 16384  # at most, in a meta-training file


# ------------------------------------------------------------------------------ the mixture


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers one split of a setting of `data_config.metaicl_dir`; returns the Mixture's name.

    Raises:
        UserError: no such folder, setting or split; a task without its files; or an instruction is
            to be shown, which these tasks have not.
    """
    c = data_config
    _check_no_instruction(c)
    setting = c.metaicl_setting
    found = split_files(c.metaicl_dir, setting, split, c.on_missing_task == "skip")
    signatures: dict[str, Any] = {}
    for task, files in found.items():
        name = seqio_name("metaicl", f"{task}_{files.name}")
        if name in signatures:
            raise UserError(
                f"setting {setting}: two tasks of {split} become {name}; rename one of them"
            )
        how = (c.on_bad_row, c.empty_targets, c.max_instances_per_task, c.encoding)
        signatures[name] = (files, *how, vocab.identity())
        read = functools.partial(read_task, task, files, c.on_bad_row, c.empty_targets)
        source = _Source(read, split, c.max_instances_per_task, c.encoding)
        make = functools.partial(rows_task, name, source, vocab)
        register_once(seqio.TaskRegistry, name, signatures[name], make)
    mixture = seqio_name("metaicl", f"{setting}_{split}")
    mix = functools.partial(seqio.Mixture, mixture, list(signatures), default_rate=row_count)
    register_once(seqio.MixtureRegistry, mixture, signatures, mix)
    return mixture


def find(name: str) -> tuple[str, dict[str, str]] | None:
    """The split of a Mixture of this family and the fields of the config that its name implies.

    None if the name is none of this family's. Whether there is such a setting says `register`.
    """
    match = re.fullmatch(rf"metaicl_(.+)_({'|'.join(SPLITS)})", name)
    return match and (match[2], {"data.metaicl_setting": match[1]})


def _check_no_instruction(data_config: Any) -> None:
    variant = data_config.get("variant", "")
    if show_rule(data_config, concat=True).instruction:
        what = f"data.variant={variant!r} shows" if variant else "data.use_instruction=True shows"
        raise UserError(
            f"{what} an instruction and MetaICL's tasks have none; set data.use_instruction=False "
            f"and how many demonstrations in data.shots, or data.variant='pos_{SHOTS}'"
        )


# ------------------------------------------------------------------------------ which files


class Files(NamedTuple):
    """What one task is read from."""

    name: str  # of the rows: k, seed and part
    rows: tuple[Path, ...]
    demonstrations: Path | None
    config: Path  # of the task; there may be none


def split_files(
    metaicl_dir: str, setting: str, split: str, skip_missing: bool = False
) -> dict[str, Files]:
    """The files of a setting's tasks by name, in the setting's order.

    Raises:
        UserError: names folder, setting, task and remedy.
    """
    if split not in SPLITS:
        raise UserError(f"metaicl: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    if not metaicl_dir:
        raise UserError("data.metaicl_dir is empty: give the folder that holds config/ and data/")
    folder = Path(metaicl_dir).expanduser()
    listing, parts = _setting_tasks(folder, setting)
    tasks = parts[split.partition("_")[0]]
    if both := [task for task in parts["train"] if task in parts["test"]]:
        # As the official non_nli_to_nli has it. What is asked is in no train file all the same.
        print(f"{listing}: {', '.join(both)} is a task of train and of test")
    kept: dict[str, Files] = {}
    missing: list[Path] = []
    for task in tasks:
        files = _task_files(folder, task, split)
        if isinstance(files, Path):
            missing.append(files)
        else:
            kept[task] = files
    if not kept:
        raise UserError(
            f"{listing}: none of the {len(tasks)} tasks of {split} has its files in "
            f"{folder / 'data'}; {missing[0].relative_to(folder)} would be the first"
        )
    if missing and not skip_missing:
        others = f", nor those of {len(missing) - 1} more tasks" if len(missing) > 1 else ""
        raise UserError(
            f"{missing[0]}: no such file{others}; add it, take the task out of {listing}, or set "
            "data.on_missing_task='skip'"
        )
    if missing:
        print(f"{listing}: {len(missing)} of {len(tasks)} tasks of {split} have no file, left out")
    if few := [task for task, files in kept.items() if files.name == _FEW]:
        print(
            f"{listing}: {len(few)} of {len(kept)} tasks have no {TRAIN_ROWS} file and are read "
            f"from their k-shot files: {few[0]}{', ...' if len(few) > 1 else ''}"
        )
    return kept


def _setting_tasks(folder: Path, setting: str) -> tuple[Path, dict[str, list[str]]]:
    """The file of a setting, and the tasks that it lists under 'train' and 'test'."""
    known = sorted(path.stem for path in (folder / "config").glob("*.json"))
    if not known:
        raise UserError(
            f"{folder / 'config'}: no such folder, or no setting in it; data.metaicl_dir must hold "
            "config/<setting>.json and data/"
        )
    if setting not in known:
        raise UserError(
            f"data.metaicl_setting={setting!r} is not in {folder / 'config'}; "
            f"there are {', '.join(known)}"
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
            raise UserError(f"{listing}: field {part} names {twice[0]} twice; take one out")
    return listing, {part: raw[part] for part in ("train", "test")}


_FEW = "k_train"


def _task_files(folder: Path, task: str, split: str) -> Files | Path:
    """The files of a task, or the one that is missing."""
    config = folder / "config" / "tasks" / f"{task}.json"
    inside = folder / "data" / task
    if split == "train":
        name = f"{TRAIN_ROWS}_100_train"
        whole = inside / f"{task}_{name}.jsonl"
        if whole.is_file():
            return Files(name, (whole,), None, config)
        few = _k_shot_files(inside, task)
        return Files(_FEW, few, None, config) if few else whole
    seed = split.partition("_")[2]
    demonstrations = inside / f"{task}_{SHOTS}_{seed}_train.jsonl"
    own, first = (inside / f"{task}_{SHOTS}_{s}_test.jsonl" for s in (seed, SEEDS[0]))
    rows = own if own.is_file() else first
    for file in (demonstrations, rows):
        if not file.is_file():
            return file
    return Files(f"{SHOTS}_{seed}_test", (rows,), demonstrations, config)


def _k_shot_files(inside: Path, task: str) -> tuple[Path, ...]:
    """The train files of the largest k there is, one a seed."""
    pattern = re.compile(rf"{re.escape(task)}_(\d+)_(\d+)_train\.jsonl")
    found: dict[int, list[tuple[int, Path]]] = {}
    for path in inside.iterdir() if inside.is_dir() else ():
        if (match := pattern.fullmatch(path.name)) and path.is_file():
            found.setdefault(int(match[1]), []).append((int(match[2]), path))
    return tuple(path for _, path in sorted(found[max(found)])) if found else ()


# ------------------------------------------------------------------------------ one task


def read_task(
    task: str, files: Files, on_bad_row: OnBadRow = "raise", on_empty: OnEmpty = "raise"
) -> TaskRows:
    """One task: its demonstrations in memory, its rows on disk, all of them checked.

    With `on_bad_row` 'skip', fewer demonstrations than SHOTS are told and taken, but not none.

    Raises:
        UserError: names file, line and field; too few demonstrations; no usable row.
    """
    parse = functools.partial(_parse, task)
    examples: tuple[Example, ...] = ()
    skipped: Counter[str] = Counter()
    if files.demonstrations is not None:
        shown, bad = lazy_rows([files.demonstrations], parse, on_bad_row, on_empty)
        examples = tuple((row.input, row.outputs[0]) for row in shown)
        skipped += bad
        _check_count(files.demonstrations, len(examples), on_bad_row)
    rows, bad = lazy_rows(files.rows, parse, on_bad_row, on_empty)
    if not rows:
        raise UserError(f"{files.rows[0]}: holds no usable row; a task needs at least one")
    category = _category(files.config)
    return TaskRows(task, ("",), examples, rows, category, skipped=dict(skipped + bad))


def _check_count(file: Path, count: int, on_bad_row: OnBadRow) -> None:
    if count == SHOTS:
        return
    said = f"{file}: holds {count} demonstrations and not {SHOTS}"
    if on_bad_row == "raise" or not count:
        few = "make it whole, or take what there is with data.on_bad_row='skip'"
        raise UserError(f"{said}; {few if count else 'make it whole'}")
    print(said)


def _category(config: Path) -> str:
    """A task's type: 'classification', 'multi-choice' or 'free-form'; '' where nothing says it."""
    if not config.is_file():
        return ""
    category = read_json(config).get("task_type", "")
    if not isinstance(category, str):
        raise UserError(f"{config}: field task_type must be text")
    return category


def _parse(task: str, line: bytes, number: int, where: str) -> Row:
    """The row of a line; its id is `<task>-<number>`."""
    try:
        value = json_object(line, where)
    except UserError as error:
        hint = "" if line.endswith(b"\n") else "; the file ends here, is it complete?"
        raise BadRow(f"{error}{hint}", "JSON") from None
    for field in ("task", "input", "output", "options"):
        if field not in value:
            raise BadRow(f"{where}: lacks field {field}", field)
        if field != "options" and not isinstance(value[field], str):
            raise BadRow(f"{where}: field {field} must be text", field)
    if value["task"] != task:
        raise BadRow(f"{where}: field task is {value['task'][:60]!r}, not {task}", "task")
    options, output = value["options"], value["output"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise BadRow(f"{where}: field options must be a list of texts", "options")
    if options and output not in options:
        raise BadRow(f"{where}: field options lacks the output {output[:60]!r}", "options")
    return Row(f"{task}-{number}", value["input"], (output,), tuple(options))


# ------------------------------------------------------------------------------ SeqIO Tasks


class _Source(RowsSource):
    """For SeqIO, hyper_inputs are the demonstrations and both they and inputs in `data.encoding`.

    In 'train' hyper_inputs are empty: there the sampler of episodes draws what is shown.
    """

    def __init__(
        self, read: Callable[[], TaskRows], split: str, max_instances: int, encoding: str
    ) -> None:
        self._encoding = encoding
        super().__init__(read, split, max_instances)

    def _generate(self) -> Iterator[dict[str, Any]]:
        examples, asked = self.task_rows().examples, ENCODINGS[self._encoding].asked
        for row in super()._generate():
            key = text_key(row["inputs"])
            others = (example for example in examples if text_key(example[0]) != key)
            shown = "".join(example_text(e, i, self._encoding) for i, e in enumerate(others))
            yield {**row, "hyper_inputs": shown, "inputs": asked(row["inputs"])}
