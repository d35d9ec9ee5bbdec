"""Extractive question answering as SeqIO Tasks, from files of SQuAD's or MRQA's form.

    FOLDER/<name>.train.json, <name>.validation.json                SQuAD (Rajpurkar et al. 2016)
    FOLDER/<name>.train.jsonl[.gz], <name>.validation.jsonl[.gz]    MRQA 2019 (Fisch et al. 2019)

Each name is a task; they are mixed by their sizes, as in Hyperdecoders (Ivison & Peters 2022). A
row reads `question: ... context: ...` and is answered with words of the context.

In training a context that `data.input_length` does not hold is cut in windows, each a row, of which
neighbours share STRIDE tokens; a window's answer is the first of the golds that lies in it whole,
and nothing where none does. In evaluation all golds are references, and the context is cut at
`data.input_length`: only its first window is read. (Hyperdecoders reads all of them and takes the
likeliest answer that is not empty, for which decoding would have to keep likelihoods.)
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyper_t5.errors import UserError
from hyper_t5.files import json_object
from hyper_t5.taskfile import OnBadRow, Row, TaskRows, read_json
from hyper_t5.tasks.common import read_lines, register_rows
from hyper_t5.vocab import Vocabulary

SPLITS = ("train", "validation")
HELD_OUT = ("validation",)
STRIDE = 128  # tokens
INSTRUCTION = (
    "Answer the question with words copied from the context. "
    "If the context does not hold the answer, answer nothing."
)


@dataclass(frozen=True)
class Question:
    """A question with its context, its golds, and where in the context they stand."""

    where: str  # what errors call it
    id: str
    question: str
    context: str
    golds: tuple[str, ...]  # one or more; ("",) when there is no answer
    spans: tuple[tuple[int, int], ...]  # (start, end) in characters, in the order of the golds


# ------------------------------------------------------------------------------ the mixture


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers one split of `data_config.qa_dir`; returns the Mixture's name.

    Raises:
        UserError: no such folder or split, or no file of the split.
    """
    found = split_files(data_config.get("qa_dir", ""), split)
    length = data_config.input_length if split == "train" else 0
    readers = {
        name: functools.partial(read_task, name, file, vocab, length, data_config.on_bad_row)
        for name, file in found.items()
    }
    signature = (sorted(map(str, found.values())), length, data_config.on_bad_row)
    most = data_config.max_instances_per_task
    return register_rows("extractive_qa", split, readers, signature, vocab, most)


def split_files(qa_dir: str, split: str) -> dict[str, Path]:
    """The files of a split by task name, ordered.

    Raises:
        UserError: names the folder or the file, and the remedy.
    """
    if split not in SPLITS:
        raise UserError(
            f"extractive_qa: split {split!r} is unknown; the splits are {', '.join(SPLITS)}"
        )
    if not qa_dir:
        raise UserError("data.qa_dir is empty: give the folder that holds NAME.train.json, ...")
    folder = Path(qa_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; data.qa_dir must hold NAME.train.json, ...")
    found: dict[str, Path] = {}
    other = []
    for file in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)\.(train|validation)\.(json|jsonl|jsonl\.gz)", file.name)
        if match is None:
            other.append(file.name)
        elif match[2] == split:
            if match[1] in found:
                raise UserError(f"{file}: {found[match[1]].name} is the {split} split of it too")
            found[match[1]] = file
    if not found:
        raise UserError(f"{folder}: holds no NAME.{split}.json, NAME.{split}.jsonl or .jsonl.gz")
    if other:
        print(f"{folder}: not NAME.SPLIT.json, .jsonl or .jsonl.gz, left out: {', '.join(other)}")
    return found


def read_task(
    name: str, file: Path, vocab: Vocabulary, window: int = 0, on_bad_row: OnBadRow = "raise"
) -> TaskRows:
    """One task from one of its files.

    Args:
        name: the task's.
        file: .json is SQuAD's form, .jsonl and .jsonl.gz are MRQA's.
        vocab: counts the tokens of windows.
        window: tokens of a row's input, EOS included, and its outputs are the window's answer; 0
            cuts nothing, and the outputs are all golds.
        on_bad_row: 'skip' leaves bad questions (and lines) out and counts them.

    Raises:
        UserError: names file, place and field; no usable row.
    """
    rows: list[Row] = []
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
    return TaskRows(name, (INSTRUCTION,), (), tuple(rows), "extractive QA", skipped=dict(skipped))


def _rows(question: Question, vocab: Vocabulary, window: int) -> list[Row]:
    head = f"question: {question.question} context: "
    if not window:
        golds = tuple(dict.fromkeys(question.golds))
        return [Row(question.id, head + question.context, golds)]
    used = len(vocab.encode(head)) + 1
    if used >= window:
        raise UserError(
            f"{question.where}: the question alone is {used} tokens with EOS, data.input_length is "
            f"{window}; raise it, or leave such rows out with data.on_bad_row='skip'"
        )
    rows = []
    for number, (start, end) in enumerate(windows(question.context, window - used, vocab)):
        inside = [question.context[a:b] for a, b in question.spans if start <= a and b <= end]
        name = f"{question.id}-{number}" if number else question.id
        rows.append(Row(name, head + question.context[start:end], (inside[0] if inside else "",)))
    return rows


def windows(context: str, room: int, vocab: Vocabulary) -> list[tuple[int, int]]:
    """Where the windows of a text start and end, in characters: whole words of `room` tokens.

    Neighbours share up to STRIDE tokens, or half of `room` where that is less. A word over `room`
    is a window of its own. Tokens are counted word by word, which is exact for bytes and for
    SentencePiece models whose pieces do not reach over white space, as T5's do not.
    """
    words = list(re.finditer(r"\s*(\S+)", context))
    if not words:
        return [(0, 0)]
    sizes = [len(ids) for ids in vocab.encode_batch([word.group() for word in words])]
    found = []
    first = last = size = 0  # a window of the words [first, last), and its tokens
    while last < len(words):
        while last < len(words) and (first == last or size + sizes[last] <= room):
            size += sizes[last]
            last += 1
        found.append((words[first].start(1), words[last - 1].end()))
        if last < len(words):
            # The next one begins before the word that did not fit, and so that it fits there.
            most = min(STRIDE, room // 2, room - sizes[last])
            first, size = last, 0
            while size + sizes[first - 1] <= most:
                first -= 1
                size += sizes[first]
    return found


# -------------------------------------------------------------------------------- two forms

# Takes the error of a question or a line: raises it, or counts it.
Bad = Callable[[UserError], None]


def _squad(file: Path, bad: Bad) -> Iterator[Question]:
    for i, article in enumerate(_list(read_json(file), "data", str(file))):
        at = f"{file}: data[{i}]"
        for j, paragraph in enumerate(_list(article, "paragraphs", at)):
            there = f"{at}.paragraphs[{j}]"
            context = _text(paragraph, "context", there)
            for k, value in enumerate(_list(paragraph, "qas", there)):
                try:
                    question = _squad_question(value, context, f"{there}.qas[{k}]")
                except UserError as error:
                    bad(error)
                else:
                    yield question


def _squad_question(value: Any, context: str, where: str) -> Question:
    golds, spans = [], []
    for number, answer in enumerate(_list(value, "answers", where)):
        gold = _text(answer, "text", f"{where}.answers[{number}]")
        start = answer.get("answer_start")
        if not isinstance(start, int) or start < 0 or context[start:][: len(gold)] != gold:
            raise UserError(
                f"{where}.answers[{number}]: field answer_start must be where {gold!r} starts in "
                f"the context, this is {start!r}"
            )
        golds.append(gold)
        spans.append((start, start + len(gold)))
    if not golds and not value.get("is_impossible"):
        raise UserError(f"{where}: field answers is empty; only is_impossible questions have none")
    name, text = _text(value, "id", where), _text(value, "question", where)
    return Question(where, name, text, context, tuple(golds) or ("",), tuple(spans))


def _mrqa(file: Path, bad: Bad) -> Iterator[Question]:
    for where, line in read_lines(file):
        try:
            value = json_object(line, where)
            if "header" in value:
                continue
            context, found = _text(value, "context", where), _list(value, "qas", where)
        except UserError as error:
            bad(error)
            continue
        for number, item in enumerate(found):
            try:
                question = _mrqa_question(item, context, f"{where}: qas[{number}]")
            except UserError as error:
                bad(error)
            else:
                yield question


def _mrqa_question(value: Any, context: str, where: str) -> Question:
    golds = _list(value, "answers", where)
    if not golds or not all(isinstance(gold, str) for gold in golds):
        raise UserError(f"{where}: field answers must be a list of texts, one or more")
    spans = []
    for number, answer in enumerate(_list(value, "detected_answers", where)):
        there = f"{where}.detected_answers[{number}]"
        for span in _list(answer, "char_spans", there):
            # Both ends are inclusive.
            match span:
                case [int(start), int(end)] if 0 <= start <= end < len(context):
                    spans.append((start, end + 1))
                case _:
                    raise UserError(
                        f"{there}: field char_spans must hold [first, last] characters of the "
                        f"context, this is {span!r}"
                    )
    name, text = _text(value, "qid", where), _text(value, "question", where)
    return Question(where, name, text, context, tuple(golds), tuple(spans))


def _list(value: Any, field: str, where: str) -> list[Any]:
    found = _field(value, field, where)
    if not isinstance(found, list):
        raise UserError(f"{where}: field {field} must be a list")
    return found


def _text(value: Any, field: str, where: str) -> str:
    found = _field(value, field, where)
    if not isinstance(found, str):
        raise UserError(f"{where}: field {field} must be text")
    return found


def _field(value: Any, field: str, where: str) -> Any:
    if not isinstance(value, Mapping) or field not in value:
        raise UserError(f"{where}: lacks field {field}")
    return value[field]
