"""Tasks in memory -> episodes -> batches of ids, for training and for evaluation.

An episode is one task's conditioning (hyper_inputs: instruction and/or shown examples) with G other
rows of the same task (inputs, targets). Batch s is made from the tasks in memory and from
`np.random.default_rng([seed, s, slot])` alone: there is no iterator to save, a resumed run asks for
batch s and gets it, and a host that wants only its slots computes only those.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.taskfile import (
    INPUT_LABEL,
    LAYOUTS,
    Conditioning,
    Example,
    Row,
    TaskRows,
    example_text,
    join_conditioning,
    text_key,
)
from hyper_t5.vocab import EOS_ID, Vocabulary

Batch = dict[str, np.ndarray]


def real_tokens(batch: Batch) -> int:
    """How many ids of a batch are no padding."""
    return sum(int(np.count_nonzero(x)) for name, x in batch.items() if name != "tasks")


# --------------------------------------------------------------------------------- tokenised


@dataclass
class _Tokens:
    """One task as ids. Every array is 1-D int32; inputs and targets are cut and end in EOS."""

    task: TaskRows
    instructions: list[np.ndarray]  # no EOS
    pool: list[np.ndarray]  # shown examples, no EOS
    pool_keys: np.ndarray  # int: equal for inputs with equal text, over pool and rows
    inputs: list[np.ndarray]
    row_keys: np.ndarray
    cut_inputs: np.ndarray  # bool
    targets: list[list[np.ndarray]]
    cut_targets: list[list[bool]]


def _tokenise(task: TaskRows, vocab: Vocabulary, data_config: Any) -> _Tokens:
    """All texts of a task in one call of the tokeniser (its threads need long lists)."""
    outputs = [text for row in task.rows for text in row.outputs]
    texts = [
        *(text.strip() for text in task.instructions),
        *(example_text(example) for example in task.examples),
        *(row.input for row in task.rows),
        *outputs,
    ]
    ids = iter(vocab.encode_batch(texts))
    instructions = [np.array(next(ids), np.int32) for _ in task.instructions]
    pool = [np.array(next(ids), np.int32) for _ in task.examples]
    inputs = [_cut(next(ids), data_config.input_length) for _ in task.rows]
    targets = [
        [_cut(next(ids), data_config.target_length) for _ in row.outputs] for row in task.rows
    ]
    numbers: dict[str, int] = {}

    def keys(inputs: list[str]) -> np.ndarray:
        found = [numbers.setdefault(text_key(text), len(numbers)) for text in inputs]
        return np.array(found, np.int64)

    row_keys = keys([row.input for row in task.rows])
    pool_keys = keys([example[0] for example in task.examples])
    usable = np.ones(len(pool), bool)
    if len(np.unique(row_keys)) == 1:  # an example equal to the only input can never be shown
        usable &= pool_keys != row_keys[0]
    if not data_config.use_instruction:  # nor, where it must stand alone, one that does not fit
        usable &= np.array([len(ids) for ids in pool], int) < data_config.hyper_length
    pool, pool_keys = [pool[i] for i in np.flatnonzero(usable)], pool_keys[usable]
    return _Tokens(
        task,
        instructions,
        pool,
        pool_keys,
        [cut for cut, _ in inputs],
        row_keys,
        np.array([was for _, was in inputs]),
        [[cut for cut, _ in row] for row in targets],
        [[was for _, was in row] for row in targets],
    )


def _cut(ids: Sequence[int], length: int) -> tuple[np.ndarray, bool]:
    """Ids with EOS, at most `length` of them, and whether any were lost."""
    kept = np.array([*ids[: length - 1], EOS_ID], np.int32)
    return kept, len(ids) > length - 1


# -------------------------------------------------------------------------------- the sampler


class EpisodeSampler:
    """Training batches of episodes.

    Each step draws T tasks by their rates (without repetition when rates are equal and there are
    enough), for each a number of shots in `data.shots`, that many examples to show, and G rows to
    ask for, none of which has the text of a shown one. Shown examples come from the task's pool
    (SNI's Positive Examples); when it is short, from other rows. A row's target is one of its
    references, drawn. Of several wordings of the instruction one is drawn.

    `stats` counts over all batches made: episodes, rows, shown_examples, dropped_examples (over the
    length), missing_examples (the task has too few), truncated_instructions, truncated_inputs,
    truncated_targets. `names` are the tasks' in their order, which a batch's "tasks" index.

    Raises:
        UserError: no tasks; a task without an example to show when no instruction is; an
            instruction over `data.hyper_length` unless `data.on_long_instruction` is 'truncate'.
    """

    def __init__(
        self,
        tasks: Sequence[TaskRows],
        vocab: Vocabulary,
        data_config: Any,
        seed: int,
        layout: str = "apart",
    ) -> None:
        """`layout` is one of LAYOUTS; for "concat" see `_concat_ids`."""
        assert layout in LAYOUTS, layout
        if not tasks:
            raise UserError("data.mixture: the list of training tasks is empty")
        self.stats: Counter[str] = Counter()
        self.names = tuple(task.name for task in tasks)
        self._config = data_config
        self._vocab = vocab
        self._seed = seed % 2**63
        self._layout, self._concat = layout, layout == "concat"
        self._label = np.array(vocab.encode(INPUT_LABEL), np.int32)
        self._shots = _shots(data_config.shots, data_config.use_instruction, self._concat)
        self._tasks = [_tokenise(task, vocab, data_config) for task in tasks]
        self._row_examples: dict[tuple[int, int], np.ndarray] = {}
        rates = np.array([task.rate for task in tasks], np.float64)
        self._rates = rates / rates.sum()
        for index in range(len(tasks)):
            self._check(index)

    def batch(self, step: int) -> Batch:
        """Batch `step`: hyper_inputs [T, Lh], inputs [T, G, Li], targets [T, G, Lt], tasks [T].

        All int32; tasks are places in `names`.
        With layout "concat", hyper_inputs are [T, 1] (one EOS) and inputs [T, G, Lh + Li].
        """
        c = self._config
        count, rows = c.tasks_per_batch, c.examples_per_task
        wide = c.input_length + (c.hyper_length if self._concat else 0)
        drawn = self._draw_tasks(step)
        batch = {
            "tasks": drawn.astype(np.int32),
            "hyper_inputs": np.zeros((count, 1 if self._concat else c.hyper_length), np.int32),
            "inputs": np.zeros((count, rows, wide), np.int32),
            "targets": np.zeros((count, rows, c.target_length), np.int32),
        }
        for slot, index in enumerate(drawn):
            rng = np.random.default_rng([self._seed, step, slot + 1])
            conditioning, asked = self._episode(int(index), rng)
            tokens = self._tasks[index]
            hyper = np.array([EOS_ID], np.int32) if self._concat else conditioning.ids
            batch["hyper_inputs"][slot, : len(hyper)] = hyper
            for g, row in enumerate(asked):
                ids, cut = tokens.inputs[row], bool(tokens.cut_inputs[row])
                if self._concat:
                    ids, cut_again = _concat_ids(conditioning.ids, self._label, ids, wide)
                    cut = cut or cut_again
                choice = int(rng.integers(len(tokens.targets[row])))
                target = tokens.targets[row][choice]
                batch["inputs"][slot, g, : len(ids)] = ids
                batch["targets"][slot, g, : len(target)] = target
                self.stats["truncated_inputs"] += cut
                self.stats["truncated_targets"] += tokens.cut_targets[row][choice]
        self.stats["episodes"] += count
        self.stats["rows"] += count * rows
        return batch

    def _draw_tasks(self, step: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, step, 0])
        number, wanted = len(self._tasks), self._config.tasks_per_batch
        if np.all(self._rates == self._rates[0]) and wanted <= number:
            return rng.choice(number, wanted, replace=False)
        return rng.choice(number, wanted, p=self._rates)

    def _episode(self, index: int, rng: np.random.Generator) -> tuple[Conditioning, np.ndarray]:
        """The conditioning and the G rows to ask for."""
        tokens, c = self._tasks[index], self._config
        instruction = np.zeros(0, np.int32)
        if c.use_instruction:
            instruction = tokens.instructions[int(rng.integers(len(tokens.instructions)))]
        shots = int(rng.integers(self._shots[0], self._shots[1] + 1))
        shown = self._draw_shown(index, shots, rng)
        while True:
            taken = np.isin(tokens.row_keys, [key for _, key in shown])
            free = np.flatnonzero(~taken)
            if len(free):
                break
            shown.pop()  # a tiny task whose every row is shown; the first alone never is all
        rows = c.examples_per_task
        asked = rng.choice(free, rows, replace=len(free) < rows)
        conditioning = join_conditioning(
            instruction,
            [ids for ids, _ in shown],
            c.hyper_length,
            c.get("on_long_instruction", "raise"),
            tokens.task.name,
            self._layout,
        )
        self.stats["shown_examples"] += len(shown) - conditioning.dropped
        self.stats["dropped_examples"] += conditioning.dropped
        self.stats["missing_examples"] += shots - len(shown)
        self.stats["truncated_instructions"] += conditioning.truncated
        return conditioning, asked

    def _draw_shown(
        self, index: int, shots: int, rng: np.random.Generator
    ) -> list[tuple[np.ndarray, int]]:
        """Up to `shots` different examples as (ids, key): the pool's, then other rows."""
        tokens, alone = self._tasks[index], not self._config.use_instruction
        order = rng.permutation(len(tokens.pool))[:shots]
        shown = [(tokens.pool[i], int(tokens.pool_keys[i])) for i in order]
        if len(shown) < shots and len(np.unique(tokens.row_keys)) > 1:
            keys = {key for _, key in shown}
            for row in rng.permutation(len(tokens.row_keys)):
                key = int(tokens.row_keys[row])
                if len(shown) == shots:
                    break
                ids = self._row_example(index, int(row)) if key not in keys else None
                if ids is None or (alone and len(ids) >= self._config.hyper_length):
                    continue
                keys.add(key)
                shown.append((ids, key))
        return shown

    def _row_example(self, index: int, row: int) -> np.ndarray:
        """A row written as a shown example; encoded when first needed."""
        if (index, row) not in self._row_examples:
            found = self._tasks[index].task.rows[row]
            text = example_text((found.input, found.outputs[0]))
            self._row_examples[index, row] = np.array(self._vocab.encode(text), np.int32)
        return self._row_examples[index, row]

    def _check(self, index: int) -> None:
        """Raises now what would otherwise end the run at some later step."""
        c, tokens = self._config, self._tasks[index]
        if c.use_instruction:
            if c.get("on_long_instruction", "raise") == "raise":
                longest = max(tokens.instructions, key=len)
                join_conditioning(longest, [], c.hyper_length, "raise", tokens.task.name)
        elif self._shots[1] and not self._draw_shown(index, 1, np.random.default_rng(0)):
            raise UserError(
                f"task {tokens.task.name} has no example to show that fits "
                f"data.hyper_length={c.hyper_length} and is not its only input; add Positive "
                "Examples, raise the length, or set data.use_instruction=True"
            )


def _shots(shots: Sequence[int], use_instruction: bool, concat: bool) -> tuple[int, int]:
    """(fewest, most) examples shown; at least one where nothing else says the task."""
    fewest, most = int(shots[0]), int(shots[1])
    if not 0 <= fewest <= most:
        raise UserError(
            f"data.shots={tuple(shots)} must be (fewest, most) with 0 <= fewest <= most"
        )
    if concat and most == 0:
        return 0, 0
    if not use_instruction and most == 0:
        raise UserError(
            "data.shots=(0, 0) with data.use_instruction=False leaves nothing to condition on"
        )
    return (fewest if use_instruction else max(fewest, 1)), most


def _concat_ids(
    conditioning: np.ndarray, label: np.ndarray, ids: np.ndarray, length: int
) -> tuple[np.ndarray, bool]:
    """The 'concat' system's input: conditioning, "Input:", the row's input, EOS.

    The conditioning loses its EOS and nothing else, so that every system reads the same episode.
    Of an empty one there is no label either.
    Only where both parts fill their lengths is there no room for the label; then the end of the
    input goes, which is the second value.
    """
    joined = np.concatenate([conditioning[:-1], label if len(conditioning) > 1 else [], ids])
    joined = joined.astype(np.int32)
    if len(joined) <= length:
        return joined, False
    return np.append(joined[: length - 1], np.int32(EOS_ID)), True


# ------------------------------------------------------------------------------- evaluation


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
    asked = task.rows[: config.eval.max_rows_per_task or None]
    # Where it must stand alone an example that does not fit is passed over, as in training.
    longest = None if c.use_instruction else c.hyper_length - 1
    shown = _eval_shown(task, asked, config.eval.shots, vocab, longest)
    conditioning = join_conditioning(
        vocab.encode(task.instruction.strip()) if c.use_instruction else [],
        [ids for _, ids in shown],
        c.hyper_length,
        c.get("on_long_instruction", "raise"),
        task.name,
        layout,
    )
    wide = c.input_length + (c.hyper_length if concat else 0)
    label = np.array(vocab.encode(INPUT_LABEL), np.int32)
    inputs = np.zeros((len(asked), wide), np.int32)
    truncated = 0
    for i, encoded in enumerate(vocab.encode_batch([row.input for row in asked])):
        ids, cut = _cut(encoded, c.input_length)
        if concat:
            ids, cut_again = _concat_ids(conditioning.ids, label, ids, wide)
            cut = cut or cut_again
        inputs[i, : len(ids)] = ids
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
        dropped=conditioning.dropped,
        truncated_instruction=conditioning.truncated,
        truncated_inputs=truncated,
    )


def _eval_shown(
    task: TaskRows, asked: Sequence[Row], shots: int, vocab: Vocabulary, longest: int | None
) -> list[tuple[Example, list[int]]]:
    """Up to `shots` examples with their ids, none with the text of an asked row."""
    taken = {text_key(row.input) for row in asked}
    others = ((row.input, row.outputs[0]) for row in task.rows[len(asked) :])
    shown: list[tuple[Example, list[int]]] = []
    for example in itertools.chain(task.examples, others):
        if len(shown) == shots:
            break
        key = text_key(example[0])
        ids = vocab.encode(example_text(example)) if key not in taken else None
        if ids is not None and (longest is None or len(ids) <= longest):
            taken.add(key)
            shown.append((example, ids))
    return shown
