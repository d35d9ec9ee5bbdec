"""Extractive question answering, from files in the formats of SQuAD or MRQA.

    FOLDER/<name>.train.json, <name>.validation.json                SQuAD (Rajpurkar et al. 2016)
    FOLDER/<name>.train.jsonl[.gz], <name>.validation.jsonl[.gz]    MRQA 2019 (Fisch et al. 2019)

Each name is a task; rates are the number of rows, as in Hyperdecoders (Ivison & Peters 2022). An
input is ``question: ... context: ...`` and its output is a span of the context.

In training, a context longer than ``data.input_length`` becomes several windows, each a row, which
overlap by STRIDE tokens. The output of a window is the first reference inside it, or empty. In
evaluation all references count, and the context is truncated to its first window. (Hyperdecoders
decodes every window and takes the most likely non-empty answer.)
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper_t5.data.task_rows import OnBadRow, TaskData, TaskRow
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks.dataset import TaskSet
from hyper_t5.tasks.rows import read_lines
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import json_object, read_json

SPLITS = ("train", "validation")
HELD_OUT = ("validation",)
STRIDE = 128  # tokens
INSTRUCTION = (
    "Answer the question with words copied from the context. "
    "If the context does not hold the answer, answer nothing."
)


@dataclass(frozen=True)
class Question:
    """A question with its context, references and their spans in the context.

    Attributes:
      source: names it in errors.
      id: unique within the task.
      question: its text.
      context: text with the answer.
      golds: references, one or more; ("",) where there is no answer.
      spans: (start, end) in characters, in the order of the references.
    """

    source: str
    id: str
    question: str
    context: str
    golds: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]


# ------------------------------------------------------------------------------ the mixture


def load_rows(data_config: Any, split: str, vocab: Vocabulary) -> TaskSet:
    """Load the tasks of a split of ``data.qa_dir``.

    Raises:
      UserError: no such folder or split, or no file of the split.
    """
    c = data_config
    files = split_files(c.qa_dir, split)
    length = c.input_length if split == "train" else 0
    readers = {
        f"extractive_qa_{name}_{split}": functools.partial(
            read_task, name, file, vocab, length, c.on_bad_row
        )
        for name, file in files.items()
    }
    signature = (sorted(map(str, files.values())), length, c.on_bad_row)
    return TaskSet(f"extractive_qa_{split}", readers, signature)


def split_files(qa_dir: str, split: str) -> dict[str, Path]:
    """Return the files of a split by task name, in order.

    Raises:
      UserError: names folder or file, and the remedy.
    """
    if split not in SPLITS:
        raise UserError(
            f"extractive_qa: split {split!r} is unknown; the splits are {', '.join(SPLITS)}"
        )
    if not qa_dir:
        raise UserError("data.qa_dir is empty: set the folder that holds NAME.train.json, ...")
    folder = Path(qa_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; data.qa_dir must hold NAME.train.json, ...")
    by_task: dict[str, Path] = {}
    other = []
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)\.(train|validation)\.(json|jsonl|jsonl\.gz)", file.name)
        if match is None:
            other.append(file.name)
        elif match[2] == split:
            if match[1] in by_task:
                raise UserError(f"{file}: {by_task[match[1]].name} is the {split} split of it too")
            by_task[match[1]] = file
    if not by_task:
        raise UserError(f"{folder}: holds no NAME.{split}.json, NAME.{split}.jsonl or .jsonl.gz")
    if other:
        print(f"{folder}: skips {', '.join(other)}: not NAME.SPLIT.json, .jsonl or .jsonl.gz")
    return by_task


def read_task(
    name: str, file: Path, vocab: Vocabulary, window: int = 0, on_bad_row: OnBadRow = "raise"
) -> TaskData:
    """Read one task from one of its files.

    Args:
      name: the task's name.
      file: .json is SQuAD's format, .jsonl and .jsonl.gz are MRQA's.
      vocab: counts the tokens of windows.
      window: length of a row's input in tokens, EOS included; its output is the window's. 0 makes
        one row of a question, with all references as outputs.
      on_bad_row: 'skip' skips bad questions (and lines) and counts them.

    Raises:
      UserError: names file, element and field; no usable row.
    """
    rows: list[TaskRow] = []
    skipped: Counter[str] = Counter()

    def bad(error: UserError) -> None:
        if on_bad_row == "raise":
            raise error
        skipped[file.name] += 1

    for question in _squad(file, bad) if file.suffix == ".json" else _mrqa(file, bad):
        try:
            rows += _rows(question, vocab, window)
        except UserError as error:
            bad(error)
    if not rows:
        raise UserError(f"{file}: holds no usable question; a task needs at least one")
    return TaskData(name, (INSTRUCTION,), (), tuple(rows), "extractive QA", skipped=dict(skipped))


def _rows(question: Question, vocab: Vocabulary, window: int) -> list[TaskRow]:
    head = f"question: {question.question} context: "
    if not window:
        golds = tuple(dict.fromkeys(question.golds))
        return [TaskRow(question.id, head + question.context, golds)]
    used = len(vocab.encode(head)) + 1
    if used >= window:
        raise UserError(
            f"{question.source}: the question alone has {used} tokens with EOS, and "
            f"data.input_length is {window}; raise it, or skip such rows with "
            "data.on_bad_row='skip'"
        )
    rows = []
    for number, (start, end) in enumerate(windows(question.context, window - used, vocab)):
        inside = [question.context[a:b] for a, b in question.spans if start <= a and b <= end]
        name = f"{question.id}-{number}" if number else question.id
        rows.append(
            TaskRow(name, head + question.context[start:end], (inside[0] if inside else "",))
        )
    return rows


def windows(context: str, room: int, vocab: Vocabulary) -> list[tuple[int, int]]:
    """Return (start, end) in characters of windows of whole words with ``room`` tokens.

    Neighbors overlap by up to STRIDE tokens, at most half of ``room``. A word longer than ``room``
    is a window of its own. Tokens are counted word by word, which is exact for bytes and for
    SentencePiece models without pieces that span whitespace, such as T5's.
    """
    words = list(re.finditer(r"\s*(\S+)", context))
    if not words:
        return [(0, 0)]
    sizes = [len(ids) for ids in vocab.encode_batch([word.group() for word in words])]
    spans = []
    first = last = size = 0  # a window of the words [first, last), and its number of tokens
    while last < len(words):
        while last < len(words) and (first == last or size + sizes[last] <= room):
            size += sizes[last]
            last += 1
        spans.append((words[first].start(1), words[last - 1].end()))
        if last < len(words):
            # The next window begins before the word that did not fit, with room for that word.
            most = min(STRIDE, room // 2, room - sizes[last])
            first, size = last, 0
            while size + sizes[first - 1] <= most:
                first -= 1
                size += sizes[first]
    return spans


# -------------------------------------------------------------------------------- formats

# Called with the error of a question or a line: raises it, or counts it.
Bad = Callable[[UserError], None]


def _squad(file: Path, bad: Bad) -> Iterator[Question]:
    for i, article in enumerate(_list(read_json(file), "data", str(file))):
        at = f"{file}: data[{i}]"
        for j, paragraph in enumerate(_list(article, "paragraphs", at)):
            inner = f"{at}.paragraphs[{j}]"
            context = _text(paragraph, "context", inner)
            for k, value in enumerate(_list(paragraph, "qas", inner)):
                try:
                    question = _squad_question(value, context, f"{inner}.qas[{k}]")
                except UserError as error:
                    bad(error)
                else:
                    yield question


def _squad_question(value: Any, context: str, source: str) -> Question:
    golds, spans = [], []
    for number, answer in enumerate(_list(value, "answers", source)):
        gold = _text(answer, "text", f"{source}.answers[{number}]")
        start = answer.get("answer_start")
        if not isinstance(start, int) or start < 0 or context[start:][: len(gold)] != gold:
            raise UserError(
                f"{source}.answers[{number}]: field answer_start must be the position of {gold!r} "
                f"in the context, this is {start!r}"
            )
        golds.append(gold)
        spans.append((start, start + len(gold)))
    if not golds and not value.get("is_impossible"):
        raise UserError(f"{source}: field answers is empty; only is_impossible questions have none")
    name, text = _text(value, "id", source), _text(value, "question", source)
    return Question(source, name, text, context, tuple(golds) or ("",), tuple(spans))


def _mrqa(file: Path, bad: Bad) -> Iterator[Question]:
    for source, line in read_lines(file):
        try:
            value = json_object(line, source)
            if "header" in value:
                continue
            context, questions = _text(value, "context", source), _list(value, "qas", source)
        except UserError as error:
            bad(error)
            continue
        for number, item in enumerate(questions):
            try:
                question = _mrqa_question(item, context, f"{source}: qas[{number}]")
            except UserError as error:
                bad(error)
            else:
                yield question


def _mrqa_question(value: Any, context: str, source: str) -> Question:
    golds = _list(value, "answers", source)
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise UserError(f"{source}: field answers must be a list of texts, one or more")
    spans = []
    for number, answer in enumerate(_list(value, "detected_answers", source)):
        at = f"{source}.detected_answers[{number}]"
        for span in _list(answer, "char_spans", at):
            # Both ends are inclusive.
            match span:
                case [int(start), int(end)] if 0 <= start <= end < len(context):
                    spans.append((start, end + 1))
                case _:
                    raise UserError(
                        f"{at}: field char_spans must hold [first, last] characters of the "
                        f"context, this is {span!r}"
                    )
    name, text = _text(value, "qid", source), _text(value, "question", source)
    return Question(source, name, text, context, tuple(golds), tuple(spans))


def _list(value: Any, field: str, source: str) -> list[Any]:
    elements = _field(value, field, source)
    if not isinstance(elements, list):
        raise UserError(f"{source}: field {field} must be a list")
    return elements


def _text(value: Any, field: str, source: str) -> str:
    text = _field(value, field, source)
    if not isinstance(text, str):
        raise UserError(f"{source}: field {field} must be text")
    return text


def _field(value: Any, field: str, source: str) -> Any:
    if not isinstance(value, Mapping) or field not in value:
        raise UserError(f"{source}: lacks field {field}")
    return value[field]
