"""Held-out tasks as token ids: the same rows and examples each time, nothing is drawn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyper_t5.data.batch import SEPARATE, Layout
from hyper_t5.data.episodes import concat_row, cut_input
from hyper_t5.data.task_rows import Example, TaskData, TaskRow, text_key
from hyper_t5.data.templates import (
    TEMPLATES,
    conditioning_rule,
    encode_example,
    join_chunks,
)
from hyper_t5.data.vocab import EOS_ID, Vocabulary
from hyper_t5.utils.errors import UserError


@dataclass(frozen=True)
class EvalTask:
    """One held-out task: n rows under one conditioning.

    Attributes:
      name: of the task.
      category: of the task, '' when it has none.
      instruction: the text, whether it is shown or not.
      shown: the examples in the conditioning, as text.
      hyper_ids: [C * Lh] int32, padded; [1] for layouts with ``in_inputs``.
      ids: of the rows [n].
      texts: the rows' inputs [n].
      inputs: [n, Li] int32, padded; wider for layouts with ``in_inputs``.
      references: [n][r] texts.
      options: [n][k] texts to choose from; () where the answer is free.
      dropped: the number of examples that did not fit.
      truncated_instruction: whether the conditioning was cut (``data.on_long_instruction``).
      truncated_inputs: the number of rows whose input was cut.
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


def build_eval_tasks(
    tasks: Sequence[TaskData], vocab: Vocabulary, config: Any, layout: Layout = SEPARATE
) -> list[EvalTask]:
    """Encode every task: its first ``eval.max_rows_per_task`` rows, ``eval.shots`` examples.

    Shown examples are the first of the pool, then rows after the evaluated ones; none has the text
    of an evaluated row.

    Raises:
      UserError: no tasks; a conditioning that is empty, or too long with
        ``data.on_long_instruction='raise'``.
    """
    if not tasks:
        raise UserError("eval.mixture: the list of tasks to evaluate is empty")
    return [_eval_task(task, vocab, config, layout) for task in tasks]


def _eval_task(task: TaskData, vocab: Vocabulary, config: Any, layout: Layout) -> EvalTask:
    c = config.data
    template, rule = TEMPLATES[c.template], conditioning_rule(c, layout)
    rows = tuple(task.rows[: config.eval.max_rows_per_task or None])
    instruction = np.zeros(0, np.int32)
    if rule.instruction:
        instruction = np.array(vocab.encode(template.instruction(task.instruction)), np.int32)
    shots = rule.most if c.variant else config.eval.shots
    # Where the examples alone say the task, one that does not fit is passed over, as in training.
    longest = None
    if not rule.instruction and c.on_long_examples == "drop":
        longest = c.hyper_length - 1
    shown = _shown_examples(task, rows, shots, vocab, c, longest)
    examples = [ids for _, ids in shown]
    conditioning = join_chunks(
        instruction,
        examples,
        c.hyper_length,
        c.chunks,
        c.on_long_instruction,
        task.name,
        layout,
        c.on_long_examples,
    )
    inputs = np.zeros((len(rows), layout.input_length(c)), np.int32)
    label = np.array(vocab.encode(template.label), np.int32)
    truncated, dropped = 0, conditioning.dropped
    # `cut_input` makes room for the longest target of a row.
    targets = [max(row.options or row.outputs, key=len) for row in rows]
    encoded = vocab.encode_batch([template.query(row.input) for row in rows])
    lengths = map(len, vocab.encode_batch(targets)) if c.example_length else itertools.repeat(0)
    for i, (row_ids, target_length) in enumerate(zip(encoded, lengths, strict=False)):
        ids, cut = cut_input(np.array(row_ids, np.int32), target_length, c)
        if layout.in_inputs:
            row = concat_row(
                c, layout, label, instruction, examples, conditioning.ids, ids, target_length
            )
            ids, cut, dropped = row.ids, cut or row.truncated, max(dropped, row.dropped)
        inputs[i, : len(ids)] = ids
        truncated += cut
    hyper_ids = np.zeros(layout.hyper_length(c), np.int32)
    ids = np.array([EOS_ID]) if layout.in_inputs else conditioning.ids
    hyper_ids[: len(ids)] = ids
    return EvalTask(
        name=task.name,
        category=task.category,
        instruction=task.instruction,
        shown=tuple(example for example, _ in shown[: len(shown) - conditioning.dropped]),
        hyper_ids=hyper_ids,
        ids=tuple(row.id for row in rows),
        texts=tuple(row.input for row in rows),
        inputs=inputs,
        references=tuple(row.outputs for row in rows),
        options=tuple(row.options for row in rows),
        dropped=dropped,
        truncated_instruction=conditioning.truncated,
        truncated_inputs=truncated,
    )


def _shown_examples(
    task: TaskData,
    rows: Sequence[TaskRow],
    shots: int,
    vocab: Vocabulary,
    data_config: Any,
    longest: int | None,
) -> list[tuple[Example, np.ndarray]]:
    """Return up to ``shots`` examples with their ids, none with the text of an evaluated row."""
    keys = {text_key(row.input) for row in rows}
    others = ((row.input, row.outputs[0]) for row in task.rows[len(rows) :])
    shown: list[tuple[Example, np.ndarray]] = []
    for example in itertools.chain(task.examples, others):
        if len(shown) == shots:
            break
        if (key := text_key(example[0])) in keys:
            continue
        ids = encode_example(vocab, example, len(shown), data_config)
        if longest is None or len(ids) <= longest:
            keys.add(key)
            shown.append((example, ids))
    return shown
