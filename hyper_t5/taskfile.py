"""Tasks as plain Python rows, and the reader of task files. No TensorFlow here.

Two forms of task file: Super-NaturalInstructions' official JSON (Wang et al. 2022,
https://github.com/allenai/natural-instructions, "Definition", "Positive Examples", "Instances"),
and the short `{"instruction": ..., "examples": [{"input": ..., "output": ...}]}`.
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

from hyper_t5.errors import UserError

OnBadRow = Literal["raise", "skip"]
OnEmpty = Literal["raise", "skip", "keep"]
Example = tuple[str, str]  # input, output


@dataclass(frozen=True)
class Row:
    """One instance: the backbone's input and every accepted output (one or more).

    `options` are the outputs to choose from, for tasks that are a choice; the accepted are of them.
    """

    id: str
    input: str
    outputs: tuple[str, ...]
    options: tuple[str, ...] = ()


class LazyRows(Sequence[Row]):
    """Rows that stay where they are and are read one by one, when asked for.

    `read` gives a row of the source by its number there; `numbers` are those that belong, in order.
    A slice is again lazy. What `read` raises is for the source to say: a bad row is found when the
    source is opened, not here.
    """

    def __init__(self, read: Callable[[int], Row], numbers: range | np.ndarray) -> None:
        self._read = read
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> LazyRows: ...

    def __getitem__(self, index: int | slice) -> Row | LazyRows:
        if isinstance(index, slice):
            return LazyRows(self._read, self._numbers[index])
        return self._read(int(self._numbers[index]))

    def take(self, places: np.ndarray) -> LazyRows:
        """The rows at these places, in their order."""
        return LazyRows(self._read, np.asarray(self._numbers)[places])


def take_rows(rows: Sequence[Row], places: Sequence[int] | np.ndarray) -> Sequence[Row]:
    """The rows at these places, in their order; lazy rows stay lazy."""
    if isinstance(rows, LazyRows):
        return rows.take(np.asarray(places, np.int64))
    return tuple(rows[i] for i in places)


@dataclass(frozen=True)
class TaskRows:
    """One task. `rate` is its weight in a mixture; `skipped` counts bad rows by field."""

    name: str
    instructions: tuple[str, ...]  # alternative wordings; most tasks have one
    examples: tuple[Example, ...]  # the pool that shown examples come from
    rows: Sequence[Row]  # in memory, or LazyRows
    category: str = ""
    rate: float = 1.0
    skipped: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def instruction(self) -> str:
        """The first wording, which evaluation uses."""
        return self.instructions[0]


def text_key(text: str) -> str:
    """Two inputs with equal keys are the same input, however they are spaced."""
    return " ".join(text.split())


# ---------------------------------------------------------------------------- reading JSON


def read_json(path: str | Path) -> dict[str, Any]:
    """A file's one JSON object.

    Raises:
        UserError: unreadable, not UTF-8, not JSON (names the line), or not an object.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the task file ({error.strerror})") from None
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        # Of an escaped surrogate JSON may hold half the pair; text may not.
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path}, line {error.lineno}: not valid JSON ({error.msg}); is the file complete?"
        ) from None
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds half a surrogate pair, which is no character") from None
    except RecursionError:
        raise UserError(f"{path}: JSON nested too deeply for a task file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a task file is one JSON object, this is {_kind(value)}")
    return value


class _BadRow(UserError):
    """What is wrong with one row of a list in a task file."""

    def __init__(self, message: str, field: str, index: int) -> None:
        super().__init__(message)
        self.field, self.index = field, index


def read_sni_task(
    path: str | Path,
    on_bad_row: OnBadRow = "raise",
    max_rows: int = 0,
    on_empty: OnEmpty = "raise",
) -> TaskRows:
    """A Super-NaturalInstructions task from its official JSON file. See `parse_sni_task`."""
    raw = read_json(path)
    try:
        return parse_sni_task(raw, Path(path).stem, str(path), on_bad_row, max_rows, on_empty)
    except _BadRow as error:
        line = _line_of(Path(path).read_text(encoding="utf-8-sig"), error.field, error.index)
        raise UserError(f"{path}, line {line}: {str(error).removeprefix(f'{path}: ')}") from None


def _line_of(text: str, field: str, index: int) -> int:
    """The line on which an element of a top-level list begins, in the text of a JSON object."""
    decoder, gap = json.JSONDecoder(), re.compile(r"[\s,:]*")

    def skip(at: int) -> int:
        found = gap.match(text, at)
        assert found is not None
        return found.end()

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
    where: str = "",
    on_bad_row: OnBadRow = "raise",
    max_rows: int = 0,
    on_empty: OnEmpty = "raise",
) -> TaskRows:
    """A Super-NaturalInstructions task from the parsed JSON.

    Args:
        raw: the JSON object.
        name: the task's name.
        where: what errors call the source; the name by default.
        on_bad_row: 'skip' leaves bad examples and instances out and counts them; a file that is
            wrong as a whole (no Definition, no Instances) raises either way.
        max_rows: keep the first so many instances; 0 keeps all.

    Raises:
        UserError: names file, field and what was found.
    """
    where = where or name
    skipped: Counter[str] = Counter()
    instructions = _definition(raw, where)
    examples = _examples(raw, "Positive Examples", where, on_bad_row, skipped, on_empty)
    checked = _rows(raw, "Instances", where, name, on_bad_row, skipped, on_empty)
    rows = tuple(itertools.islice(checked, max_rows or None))
    if not rows:
        raise UserError(f"{where}: field Instances holds no usable row; a task needs at least one")
    categories = raw.get("Categories")
    category = str(categories[0]) if isinstance(categories, list) and categories else ""
    return TaskRows(name, instructions, examples, rows, category, skipped=dict(skipped))


def read_task_file(path: str | Path) -> tuple[str, list[Example]]:
    """Instruction and examples of a task file in either form, as `adapt` needs them.

    An SNI file may lack Instances here, but what it has is checked.

    Returns:
        The instruction ('' when the short form has none) and the (input, output) examples.

    Raises:
        UserError: names file and field; also when there is neither instruction nor example.
    """
    return parse_task_file(read_json(path), Path(path).stem, str(path))


def parse_task_file(raw: Mapping[str, Any], name: str, where: str) -> tuple[str, list[Example]]:
    """`read_task_file` of the parsed JSON; `where` is what errors call it."""
    if "Definition" in raw or "Positive Examples" in raw or "Instances" in raw:
        if "Instances" in raw:
            task = parse_sni_task(raw, name, where, on_empty="keep")
            return task.instruction, list(task.examples)
        examples = _examples(raw, "Positive Examples", where, "raise", Counter())
        return _definition(raw, where)[0], list(examples)
    if "instruction" not in raw and "examples" not in raw:
        raise UserError(
            f"{where}: has neither Definition (Super-NaturalInstructions) nor instruction/examples"
        )
    instruction = _instruction(raw, where)
    examples = _examples(raw, "examples", where, "raise", Counter())
    if not instruction and not examples:
        raise UserError(f"{where}: fields instruction and examples are both empty; give one")
    return instruction, list(examples)


def _instruction(raw: Mapping[str, Any], where: str) -> str:
    """Of the short form."""
    instruction = raw.get("instruction", "")
    if not isinstance(instruction, str):
        raise UserError(f"{where}: field instruction must be text, this is {_kind(instruction)}")
    return instruction.strip()


def read_task_rows(
    path: str | Path, on_bad_row: OnBadRow = "raise", on_empty: OnEmpty = "raise"
) -> TaskRows:
    """A task file in either form, as rows to train on and to judge by.

    Of the short form every example is a row, and what is shown is drawn from them.

    Raises:
        UserError: names file and field; also when there is no row.
    """
    raw, where = read_json(path), str(path)
    if "examples" not in raw and "instruction" not in raw:
        return read_sni_task(path, on_bad_row, on_empty=on_empty)
    instruction, name = _instruction(raw, where), Path(path).stem
    skipped: Counter[str] = Counter()
    rows = tuple(_rows(raw, "examples", where, name, on_bad_row, skipped, on_empty))
    if not rows:
        raise UserError(f"{where}: field examples holds no usable row; a task needs at least one")
    return TaskRows(name, (instruction,), (), rows, skipped=dict(skipped))


def task_paths(given: str) -> list[Path]:
    """The task files of `data.task_files`: one, a folder's ``*.json``, or a glob; by name.

    Raises:
        UserError: there are none, or two of one name, which would be one task.
    """
    if not given:
        raise UserError("data.task_files is empty: give a task file, a folder of them, or a glob")
    path = Path(given).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.json"))
    else:  # a name may hold what a glob means otherwise, such as "[1]"
        found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path))))
    if not found:
        raise UserError(f"data.task_files={given}: no such task file, nor a folder or glob of them")
    names = [file.stem for file in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"data.task_files={given}: two files are named {twice[0]}; rename one")
    return found


def _definition(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    if "Definition" not in raw:
        raise UserError(f"{where}: field Definition is missing; it holds the task's instruction")
    value = raw["Definition"]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: field Definition must be text or a list of texts")
    kept = tuple(text.strip() for text in texts if text.strip())
    if not kept:
        raise UserError(f"{where}: field Definition is empty")
    return kept


def _examples(
    raw: Mapping[str, Any],
    field: str,
    where: str,
    on_bad_row: OnBadRow,
    skipped: Counter[str],
    on_empty: OnEmpty = "keep",
) -> tuple[Example, ...]:
    if field not in raw:
        return ()
    rows = _rows(raw, field, where, "", on_bad_row, skipped, on_empty)
    return tuple((row.input, row.outputs[0]) for row in rows)


def _rows(
    raw: Mapping[str, Any],
    field: str,
    where: str,
    name: str,
    on_bad_row: OnBadRow,
    skipped: Counter[str],
    on_empty: OnEmpty,
) -> Iterator[Row]:
    """The rows of a list field; a bad one raises, or is left out and counted under the field."""
    if field not in raw:
        raise UserError(f"{where}: field {field} is missing")
    if not isinstance(raw[field], list):
        raise UserError(f"{where}: field {field} must be a list, this is {_kind(raw[field])}")
    seen: set[str] = set()
    for index, value in enumerate(raw[field]):
        at = f"{where}: {field}[{index}]"
        try:
            row = _row(value, f"{name}-{index}", at)
            if row.id in seen:
                raise UserError(f"{at}: field id is {row.id} again, of an earlier row; ids differ")
        except UserError as error:
            if on_bad_row == "raise":
                raise _BadRow(
                    f"{error}; mend the row, or leave such rows out with data.on_bad_row='skip'",
                    field,
                    index,
                ) from None
            skipped[field] += 1
            continue
        if on_empty != "keep" and not all(text.strip() for text in row.outputs):
            if on_empty == "raise":
                raise _BadRow(
                    f"{at}: field output is empty; mend the row, or set data.empty_targets='keep' "
                    "(nothing is the right answer) or 'skip'",
                    field,
                    index,
                )
            skipped[f"{field}, empty output"] += 1
            continue
        seen.add(row.id)
        yield row


def _row(value: Any, default_id: str, at: str) -> Row:
    """One checked row."""
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
    return Row(str(value.get("id") or default_id), text, tuple(outputs))


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", type(None): "null", bool: "a boolean"}
    return names.get(type(value), "a number")
