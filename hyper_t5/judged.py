"""Held-out tasks as evaluation asks them: the same rows and examples each time, nothing drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyper_t5.episodes import concat_row, cut_input, input_width
from hyper_t5.errors import UserError
from hyper_t5.prompts import ENCODINGS, LAYOUTS, encode_example, join_conditioning, show_rule
from hyper_t5.taskfile import Example, Row, TaskRows, text_key
from hyper_t5.vocab import EOS_ID, Vocabulary


@dataclass(frozen=True)
class EvalTask:
    """One held-out task, ready to judge: n rows under one conditioning.

    Attributes:
        name: the task's.
        category: of the task, '' when it has none.
        instruction: the text, whether it is shown or not.
        shown: the examples that the conditioning holds, as text.
        hyper_ids: [Lh] int32, padded; [1] with layout "concat".
        ids: of the rows [n].
        texts: the rows' inputs [n].
        inputs: [n, Li] int32, padded; [n, Lh + Li] with layout "concat".
        references: [n][r] texts.
        options: [n][k] texts to choose from; () where the answer is free.
        dropped: examples that did not fit.
        truncated_instruction: whether the conditioning was cut (data.on_long_instruction).
        truncated_inputs: rows whose input was cut.
    """

    name: str
    category: str
    instruction: str
    shown: tuple[Example, ...]
    hyper_ids: np.ndarray
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    inputs: np.ndarray
    references: tuple[tuple[str, ...], ...]
    options: tuple[tuple[str, ...], ...]
    dropped: int
    truncated_instruction: bool
    truncated_inputs: int


def eval_episodes(
    tasks: Sequence[TaskRows], vocab: Vocabulary, config: Any, layout: str = "apart"
) -> list[EvalTask]:
    """Every task with its first `eval.max_rows_per_task` rows and `eval.shots` shown examples.

    Nothing is drawn. Shown examples are the first of the pool, then rows beyond the asked ones,
    that have not the text of an asked row; the asked rows stay the official ones. `layout` is one
    of LAYOUTS, as in training.

    Raises:
        UserError: no tasks; a conditioning that is empty, or over-long with
            `data.on_long_instruction='raise'`.
    """
    assert layout in LAYOUTS, layout
    if not tasks:
        raise UserError("eval.mixture: the list of tasks to evaluate is empty")
    return [_eval_task(task, vocab, config, layout) for task in tasks]


def _eval_task(task: TaskRows, vocab: Vocabulary, config: Any, layout: str) -> EvalTask:
    c, concat = config.data, layout == "concat"
    encoding, rule = ENCODINGS[c.encoding], show_rule(c, concat)
    asked = tuple(task.rows[: config.eval.max_rows_per_task or None])
    instruction = np.zeros(0, np.int32)
    if rule.instruction:
        instruction = np.array(vocab.encode(encoding.instruction(task.instruction)), np.int32)
    shots = rule.most if c.variant else config.eval.shots
    # Where it must stand alone an example that does not fit is passed over, as in training.
    longest = None
    if not rule.instruction and c.on_long_examples == "drop":
        longest = c.hyper_length - 1
    shown = _eval_shown(task, asked, shots, vocab, c, longest)
    examples = [ids for _, ids in shown]
    conditioning = join_conditioning(
        instruction,
        examples,
        c.hyper_length,
        c.on_long_instruction,
        task.name,
        layout,
        c.on_long_examples,
    )
    inputs = np.zeros((len(asked), input_width(c, layout)), np.int32)
    label = np.array(vocab.encode(encoding.label), np.int32)
    truncated, dropped = 0, conditioning.dropped
    # As of the longest target there is, for which a row is shortened in `cut_input`.
    targets = [max(row.options or row.outputs, key=len) for row in asked]
    encoded = vocab.encode_batch([encoding.asked(row.input) for row in asked])
    sizes = map(len, vocab.encode_batch(targets)) if c.example_length else itertools.repeat(0)
    for i, (ids, target) in enumerate(zip(encoded, sizes, strict=False)):
        made, cut = cut_input(np.array(ids, np.int32), target, c)
        if concat:
            row = concat_row(c, label, instruction, examples, conditioning.ids, made, target)
            made, cut, dropped = row.ids, cut or row.truncated, max(dropped, row.dropped)
        inputs[i, : len(made)] = made
        truncated += cut
    hyper = np.array([EOS_ID], np.int32) if concat else conditioning.ids
    hyper_ids = np.zeros(1 if concat else c.hyper_length, np.int32)
    hyper_ids[: len(hyper)] = hyper
    return EvalTask(
        name=task.name,
        category=task.category,
        instruction=task.instruction,
        shown=tuple(example for example, _ in shown[: len(shown) - conditioning.dropped]),
        hyper_ids=hyper_ids,
        ids=tuple(row.id for row in asked),
        texts=tuple(row.input for row in asked),
        inputs=inputs,
        references=tuple(row.outputs for row in asked),
        options=tuple(row.options for row in asked),
        dropped=dropped,
        truncated_instruction=conditioning.truncated,
        truncated_inputs=truncated,
    )


def _eval_shown(
    task: TaskRows,
    asked: Sequence[Row],
    shots: int,
    vocab: Vocabulary,
    data_config: Any,
    longest: int | None,
) -> list[tuple[Example, np.ndarray]]:
    """Up to `shots` examples with their ids, none with the text of an asked row."""
    taken = {text_key(row.input) for row in asked}
    others = ((row.input, row.outputs[0]) for row in task.rows[len(asked) :])
    shown: list[tuple[Example, np.ndarray]] = []
    for example in itertools.chain(task.examples, others):
        if len(shown) == shots:
            break
        if (key := text_key(example[0])) in taken:
            continue
        ids = encode_example(vocab, example, len(shown), data_config)
        if longest is None or len(ids) <= longest:
            taken.add(key)
            shown.append((example, ids))
    return shown
