"""Rows of tasks as plain Python objects, and the reader of task files. No TensorFlow here.

A task file has one of two forms: the official JSON of Super-NaturalInstructions (Wang et al. 2022,
https://github.com/allenai/natural-instructions) with "Definition", "Positive Examples" and
"Instances", or the short form
``{"instruction": ..., "examples": [{"input": ..., "output": ...}]}``.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json, read_text
from hyper_t5.utils.overrides import nearest

OnBadRow = Literal["raise", "skip"]
OnEmpty = Literal["raise", "skip", "keep"]
SKIP_HINT = ", or skip such rows with data.on_bad_row='skip'"  # no remedy for a user's task file
Example = tuple[str, str]  # input, output
SNI_FIELDS = {"Definition", "Positive Examples", "Instances"}  # those that are read
SHORT_FIELDS = {"instruction", "examples", "name"}


@dataclass(frozen=True)
class TaskRow:
    """One instance of a task.

    Attributes:
      id: unique within the task.
      input: the backbone's input.
      outputs: every accepted output, one or more.
      options: outputs to choose from, for tasks with a fixed set; they include ``outputs``.
    """

    id: str
    input: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()


class LazyRows(Sequence[TaskRow]):
    """Rows that are read from their source one at a time, on access. A slice is lazy too.

    Args:
      read: returns the row with a given number in the source. Sources are validated when they are
        opened, so this does not handle bad rows.
      numbers: numbers of the rows that belong to the sequence, in order.
    """

    def __init__(self, read: Callable[[int], TaskRow], numbers: range | np.ndarray) -> None:
        self._read = read
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> TaskRow: ...

    @overload
    def __getitem__(self, index: slice) -> LazyRows: ...

    def __getitem__(self, index: int | slice) -> TaskRow | LazyRows:
        if isinstance(index, slice):
            return LazyRows(self._read, self._numbers[index])
        return self._read(int(self._numbers[index]))

    def take(self, indices: np.ndarray) -> LazyRows:
        """Return the rows with these indices, in their order."""
        return LazyRows(self._read, np.asarray(self._numbers)[indices])


def select_rows(rows: Sequence[TaskRow], indices: Sequence[int] | np.ndarray) -> Sequence[TaskRow]:
    """Return the rows with these indices, in their order; lazy rows stay lazy."""
    if isinstance(rows, LazyRows):
        return rows.take(np.asarray(indices, np.int64))
    return tuple(rows[i] for i in indices)


@dataclass(frozen=True)
class TaskData:
    """One task.

    Attributes:
      name: unique within a mixture.
      instructions: alternative wordings; most tasks have one.
      examples: the pool from which conditioning examples are drawn.
      rows: a tuple, or LazyRows.
      category: reported beside the task.
      rate: its weight in a mixture.
      skipped: number of bad rows that were skipped, by field.
      held_out: `text_key` of inputs that training never draws (`pipeline.hold_out`).
    """

    name: str
    instructions: tuple[str, ...]
    examples: tuple[Example, ...]
    rows: Sequence[TaskRow]
    category: str = ""
    rate: float = 1.0
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    held_out: frozenset[str] = frozenset()

    @property
    def instruction(self) -> str:
        """The first wording. Evaluation uses it."""
        return self.instructions[0]


def text_key(text: str) -> str:
    """Return the text with whitespace normalized, for comparing inputs."""
    return " ".join(text.split())


# ---------------------------------------------------------------------------- reading JSON


class _BadRow(UserError):
    """One row of a list in a task file is invalid."""

    def __init__(self, message: str, field: str, index: int) -> None:
        super().__init__(message)
        self.field, self.index = field, index


def read_sni_task(
    path: str | Path,
    on_bad_row: OnBadRow = "raise",
    max_rows: int = 0,
    on_empty: OnEmpty = "raise",
) -> TaskData:
    """Read a task from Super-NaturalInstructions' official JSON. See `parse_sni_task`."""
    raw = read_json(path)
    try:
        return parse_sni_task(raw, Path(path).stem, str(path), on_bad_row, max_rows, on_empty)
    except _BadRow as error:
        line = _line_of(read_text(path), error.field, error.index)
        raise UserError(f"{path}, line {line}: {str(error).removeprefix(f'{path}: ')}") from None


def _line_of(text: str, field: str, index: int) -> int:
    """Return the line on which element ``index`` of a top-level list begins."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        match = gap.match(text, at)
        assert match is not None
        return match.end()

    at, name = text.index("{") + 1, ""
    while name != field:
        name, at = decoder.raw_decode(text, skip(at))
        if name != field:
            _, at = decoder.raw_decode(text, skip(at))
    at = text.index("[", at) + 1
    for _ in range(index):
        _, at = decoder.raw_decode(text, skip(at))
    return text.count("\n", 0, skip(at)) + 1


def parse_sni_task(
    raw: Mapping[str, Any],
    name: str,
    source: str = "",
    on_bad_row: OnBadRow = "raise",
    max_rows: int = 0,
    on_empty: OnEmpty = "raise",
) -> TaskData:
    """Convert the parsed JSON of a Super-NaturalInstructions task.

    Args:
      raw: the JSON object.
      name: the task's name.
      source: name of the source in errors; ``name`` by default.
      on_bad_row: 'skip' drops bad examples and instances and counts them. A missing Definition or
        Instances raises either way.
      max_rows: number of instances to keep, from the first; 0 keeps all.
      on_empty: policy for rows whose output is empty.

    Raises:
      UserError: names file and field.
    """
    source = source or name
    skipped: Counter[str] = Counter()
    instructions = _definition(raw, source)
    examples = _examples(raw, "Positive Examples", source, on_bad_row, skipped, on_empty)
    valid_rows = _rows(raw, "Instances", source, name, on_bad_row, skipped, on_empty)
    rows = tuple(itertools.islice(valid_rows, max_rows or None))
    if not rows:
        raise UserError(f"{source}: field Instances holds no usable row; a task needs at least one")
    categories = raw.get("Categories")
    category = str(categories[0]) if isinstance(categories, list) and categories else ""
    return TaskData(name, instructions, examples, rows, category, skipped=dict(skipped))


def read_task_file(path: str | Path) -> tuple[str, list[Example]]:
    """Read instruction and examples from a task file in either form.

    An SNI file may lack Instances here; all that it has is validated.

    Returns:
      The instruction ('' where the short form has none) and the (input, output) examples.

    Raises:
      UserError: names file and field; also where there is neither instruction nor example.
    """
    return parse_task_file(read_json(path), Path(path).stem, str(path))


def parse_task_file(raw: Mapping[str, Any], name: str, source: str) -> tuple[str, list[Example]]:
    """Convert the parsed JSON as `read_task_file` does; ``source`` names it in errors."""
    try:
        return _parse_task_file(raw, name, source)
    except _BadRow as error:
        raise UserError(str(error).replace(SKIP_HINT, "")) from None


def _parse_task_file(raw: Mapping[str, Any], name: str, source: str) -> tuple[str, list[Example]]:
    if is_sni_form(raw, source):
        if "Instances" in raw:
            task = parse_sni_task(raw, name, source, on_empty="keep")
            return task.instruction, list(task.examples)
        examples = _examples(raw, "Positive Examples", source, "raise", Counter())
        return _definition(raw, source)[0], list(examples)
    instruction = _instruction(raw, source)
    examples = _examples(raw, "examples", source, "raise", Counter())
    if not instruction and not examples:
        raise UserError(f"{source}: fields instruction and examples are both empty; set one")
    return instruction, list(examples)


def is_sni_form(raw: Mapping[str, Any], source: str) -> bool:
    """Return whether a task file has Super-NaturalInstructions' form, not the short one.

    Raises:
      UserError: fields of both or of neither, or an unknown field of the short form.
    """
    sni, short = (sorted(raw.keys() & form) for form in (SNI_FIELDS, SHORT_FIELDS - {"name"}))
    if sni and short:
        raise UserError(
            f"{source}: field {short[0]} belongs to the short form, field {sni[0]} to "
            "Super-NaturalInstructions'; use one form"
        )
    if not sni and not short:
        raise UserError(
            f"{source}: has neither Definition (Super-NaturalInstructions) nor instruction/examples"
        )
    if short and (unknown := sorted(raw.keys() - SHORT_FIELDS)):
        raise UserError(
            f"{source}: unknown field {unknown[0]}, the nearest is "
            f"{nearest(unknown[0], SHORT_FIELDS)}; rename or remove it"
        )
    return bool(sni)


def _instruction(raw: Mapping[str, Any], source: str) -> str:
    """Return the instruction of the short form."""
    instruction = raw.get("instruction", "")
    if not isinstance(instruction, str):
        raise UserError(f"{source}: field instruction must be text, this is {_kind(instruction)}")
    return instruction.strip()


def read_task_data(
    path: str | Path, on_bad_row: OnBadRow = "raise", on_empty: OnEmpty = "raise"
) -> TaskData:
    """Read a task file in either form, as rows to train and evaluate on.

    In the short form every example is a row, and conditioning examples are drawn from the rows.

    Raises:
      UserError: names file and field; also where there is no row.
    """
    raw, source = read_json(path), str(path)
    if is_sni_form(raw, source):
        return read_sni_task(path, on_bad_row, on_empty=on_empty)
    instruction, name = _instruction(raw, source), Path(path).stem
    skipped: Counter[str] = Counter()
    rows = tuple(_rows(raw, "examples", source, name, on_bad_row, skipped, on_empty))
    if not rows:
        raise UserError(f"{source}: field examples holds no usable row; a task needs at least one")
    return TaskData(name, (instruction,), (), rows, skipped=dict(skipped))


def task_paths(spec: str) -> list[Path]:
    """Return the task files of ``data.task_files``, sorted by name.

    Args:
      spec: a task file, a folder (its ``*.json``), or a glob.

    Raises:
      UserError: there are none, or two have one name, which is the task's name.
    """
    if not spec:
        raise UserError("data.task_files is empty: set a task file, a folder of them, or a glob")
    path = Path(spec).expanduser()
    if path.is_dir():
        paths = sorted(path.glob("*.json"))
    else:  # a file's name may look like a glob, such as "[1]"
        paths = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
    if not paths:
        raise UserError(f"data.task_files={spec}: no such task file, nor a folder or glob of them")
    names = [file.stem for file in paths]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.task_files={spec}: two files are named {duplicates[0]}; rename one")
    return paths


def _definition(raw: Mapping[str, Any], source: str) -> tuple[str, ...]:
    if "Definition" not in raw:
        raise UserError(f"{source}: field Definition is missing; it holds the task's instruction")
    value = raw["Definition"]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{source}: field Definition must be text or a list of texts")
    wordings = tuple(text.strip() for text in texts if text.strip())
    if not wordings:
        raise UserError(f"{source}: field Definition is empty")
    return wordings


def _examples(
    raw: Mapping[str, Any],
    field: str,
    source: str,
    on_bad_row: OnBadRow,
    skipped: Counter[str],
    on_empty: OnEmpty = "keep",
) -> tuple[Example, ...]:
    if field not in raw:
        return ()
    rows = _rows(raw, field, source, "", on_bad_row, skipped, on_empty)
    return tuple((row.input, row.outputs[0]) for row in rows)


def _rows(
    raw: Mapping[str, Any],
    field: str,
    source: str,
    name: str,
    on_bad_row: OnBadRow,
    skipped: Counter[str],
    on_empty: OnEmpty,
) -> Iterator[TaskRow]:
    """Iterate over the rows of a list field; a bad one raises, or is skipped and counted."""
    if field not in raw:
        raise UserError(f"{source}: field {field} is missing")
    if not isinstance(raw[field], list):
        raise UserError(f"{source}: field {field} must be a list, this is {_kind(raw[field])}")
    seen: set[str] = set()
    for index, value in enumerate(raw[field]):
        at = f"{source}: {field}[{index}]"
        try:
            row = _row(value, f"{name}-{index}", at)
            if row.id in seen:
                raise UserError(
                    f"{at}: field id is {row.id}, as in an earlier row; ids must differ"
                )
        except UserError as error:
            if on_bad_row == "raise":
                raise _BadRow(
                    f"{error}; fix the row{SKIP_HINT}",
                    field,
                    index,
                ) from None
            skipped[field] += 1
            continue
        if on_empty != "keep" and not all(text.strip() for text in row.outputs):
            if on_empty == "raise":
                raise _BadRow(
                    f"{at}: field output is empty; fix the row, or set data.empty_targets='keep' "
                    "(the empty output is correct) or 'skip'",
                    field,
                    index,
                )
            skipped[f"{field}, empty output"] += 1
            continue
        seen.add(row.id)
        yield row


def _row(value: Any, default_id: str, at: str) -> TaskRow:
    """Validate one row."""
    if not isinstance(value, dict):
        raise UserError(f"{at} must be an object with input and output, this is {_kind(value)}")
    for key in ("input", "output"):
        if key not in value:
            raise UserError(f"{at} lacks field {key}")
    text, outputs = value["input"], value["output"]
    if not isinstance(text, str):
        raise UserError(f"{at}: field input must be text, this is {_kind(text)}")
    outputs = [outputs] if isinstance(outputs, str) else outputs
    if not isinstance(outputs, list) or not all(isinstance(text, str) for text in outputs):
        raise UserError(f"{at}: field output must be text or a list of texts")
    if not outputs:
        raise UserError(f"{at}: field output is an empty list; it needs at least one reference")
    return TaskRow(str(value.get("id") or default_id), text, tuple(outputs))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
