"""Episode sampler: from tasks to training batches of ids.

An episode is the conditioning of one task (instruction and/or shown examples) with other rows of
the same task (inputs, targets). Batch s depends on the tasks and on
``np.random.default_rng([seed, s, slot])`` alone: there is no iterator state to save, a resumed run
requests batch s, and a process makes, and reads the rows of, its own slots only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hyper_t5.data import packing
from hyper_t5.data.batch import SEPARATE, Batch, Layout, batch_spec, zeros
from hyper_t5.data.process_share import process_share
from hyper_t5.data.task_rows import Example, TaskData, TaskRow, text_key
from hyper_t5.data.templates import (
    TEMPLATES,
    Conditioning,
    ConditioningRule,
    conditioning_mix,
    cut_example,
    join_chunks,
    join_concat,
    join_conditioning,
)
from hyper_t5.data.vocab import EOS_ID, Vocabulary
from hyper_t5.utils.errors import UserError

CACHED_IDS = 2**25  # ids of encoded texts that are cached: 128 MB, and their texts
COUNTED_EXAMPLES = 2**20
PERMUTED_ROWS = 4096  # of tasks with more rows, indices are drawn one by one instead
PACKING_ROUND = 8  # examples that packing encodes together, per row, before it checks what fits


class EpisodeSampler:
    """Training batches of episodes.

    Each step draws T tasks by their rates (without repetition when rates are equal and there are
    enough tasks); for each a number of shown examples (`templates.conditioning_mix`), those
    examples, and G rows, none with the text of a shown example. Shown examples are drawn
    from the task's pool (Positive Examples of Super-NaturalInstructions) and rows together
    (`draw_examples`). A row's target is drawn from its references, an instruction from the task's
    wordings.

    With ``data.pack`` each of the G rows holds as many examples as fit, until an example fits into
    none of the task's rows or the task has no more. The example that ends an episode is dropped
    from it, so rows of a large task are drawn with a slight bias to short ones.

    Attributes:
      stats: counts over all batches made here: episodes, rows, examples, shown_examples,
        distinct_examples (different ones among them, counted up to COUNTED_EXAMPLES),
        dropped_examples (over the length), missing_examples (the task has too few),
        truncated_conditionings, truncated_inputs, truncated_targets.
      names: of the tasks, which a batch's ``tasks`` index.

    Raises:
      UserError: no tasks, or one without rows; a task without an example to show when no
        instruction is shown; an instruction over ``data.hyper_length`` unless
        ``data.on_long_instruction`` is 'truncate'.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        vocab: Vocabulary,
        data_config: Any,
        seed: int,
        layout: Layout = SEPARATE,
    ) -> None:
        if not tasks:
            raise UserError("data.mixture: the list of training tasks is empty")
        self.stats: Counter[str] = Counter()
        self.names = tuple(task.name for task in tasks)
        self._distinct: set[int] = set()
        self._config = data_config
        self._layout = layout
        self._encode = _CachedEncoder(vocab)
        self._seed = seed % 2**63
        self._template = TEMPLATES[data_config.template]
        self._label = np.array(vocab.encode(self._template.label), np.int32)
        self._rules, self._rule_rates = conditioning_mix(data_config, layout)
        self._tasks = self.tasks = tasks
        rates = np.array([task.rate for task in tasks], np.float64)
        self._rates = rates / rates.sum()
        self._instructions: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in tasks]
        if any(rule.instruction for rule in self._rules):
            texts = iter(
                self._encode(self._template.instruction(i) for t in tasks for i in t.instructions)
            )
            self._instructions = [[next(texts) for _ in t.instructions] for t in tasks]
        for index in range(len(tasks)):
            self._check(index)

    def batch(self, step: int, share_index: int = 0, share_count: int = 1) -> Batch:
        """Return batch ``step``, or the T / share_count slots of one share (`process_share`).

        Names and shapes are those of `batch.batch_spec`.
        """
        c = self._config
        slots = process_share(c.tasks_per_batch, share_index, share_count)
        episodes = [
            self._draw(int(index), np.random.default_rng([self._seed, step, slot + 1]))
            for slot, index in zip(slots, self._draw_tasks(step)[slots.start :], strict=False)
        ]
        self._join_conditionings(episodes)
        batch = zeros(batch_spec(c, self._layout, tasks=len(slots)))
        batch["tasks"][:] = [episode.task for episode in episodes]
        for slot, episode in enumerate(episodes):
            assert episode.conditioning is not None
            ids = [EOS_ID] if self._layout.in_inputs else episode.conditioning.ids
            batch["hyper_inputs"][slot, : len(ids)] = ids
        (self._fill_packed if c.pack else self._fill)(batch, episodes)
        self.stats["episodes"] += len(slots)
        self.stats["rows"] += len(slots) * c.examples_per_task
        return batch

    # ------------------------------------------------------------------------------- drawing

    def _draw_tasks(self, step: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, step, 0])
        count, wanted = len(self._tasks), self._config.tasks_per_batch
        if np.all(self._rates == self._rates[0]) and wanted <= count:
            return rng.choice(count, wanted, replace=False)
        return rng.choice(count, wanted, p=self._rates)

    def _draw(self, index: int, rng: np.random.Generator) -> _Episode:
        instructions, rule = self._instructions[index], self._rules[0]
        if len(self._rules) > 1:
            rule = self._rules[int(rng.choice(len(self._rules), p=self._rule_rates))]
        instruction = instructions[int(rng.integers(len(instructions)))]
        if not rule.instruction:
            instruction = instruction[:0]
        shots = int(rng.integers(rule.fewest, rule.most + 1))
        shown = self._draw_shown(index, shots, rule, rng)
        while True:
            rows = self._draw_rows(index, {text_key(text) for text, _ in shown}, rng)
            first = next(rows, None)
            if first is not None:
                break
            shown.pop()  # a tiny task whose every row is shown
        return _Episode(index, instruction, shown, shots, itertools.chain([first], rows), [])

    def _draw_rows(
        self, index: int, shown_keys: set[str], rng: np.random.Generator
    ) -> Iterator[tuple[TaskRow, str]]:
        """Yield (row, target) in random order, without rows that have the text of a shown one."""
        task = self._tasks[index]
        excluded = shown_keys | task.held_out
        for i in _random_order(len(task.rows), rng):
            row = task.rows[i]
            if text_key(row.input) not in excluded:
                yield row, row.outputs[int(rng.integers(len(row.outputs)))]

    def _draw_shown(
        self, index: int, shots: int, rule: ConditioningRule, rng: np.random.Generator
    ) -> list[Example]:
        # Where the examples alone say the task, one that does not fit is passed over.
        fits = None if rule.instruction else self._fits
        return draw_examples(self._tasks[index], shots, rule, rng, fits)

    def _fits(self, example: Example) -> bool:
        """Return whether an example fits the conditioning as the only one shown."""
        c = self._config
        if c.on_long_examples == "cut_left" or 0 < c.example_length < c.hyper_length:
            return True
        text = "".join(self._template.example(0, example))
        # A token is at least a byte, except the word-start marker: most need no tokenizer.
        return len(text.encode()) + 2 < c.hyper_length or len(self._encode([text])[0]) < (
            c.hyper_length
        )

    # ------------------------------------------------------------------------------- encoding

    def _join_conditionings(self, episodes: list[_Episode]) -> None:
        """Encode the shown examples of all episodes and join them with the instructions."""
        c, stats = self._config, self.stats
        parts = [self._template.example(i, e) for d in episodes for i, e in enumerate(d.shown)]
        if c.example_length:
            flat = self._encode(text for pair in parts for text in pair)
            pairs = zip(flat[::2], flat[1::2], strict=True)
            ids = iter([cut_example(head, tail, c.example_length) for head, tail in pairs])
        else:
            ids = iter(self._encode("".join(pair) for pair in parts))
        for episode in episodes:
            episode.examples = [next(ids) for _ in episode.shown]
            joined = episode.conditioning = join_chunks(
                episode.instruction,
                episode.examples,
                c.hyper_length,
                c.chunks,
                c.on_long_instruction,
                self.names[episode.task],
                self._layout,
                c.on_long_examples,
            )
            stats["missing_examples"] += episode.shots - len(episode.shown)
            if self._layout.in_inputs and c.concat_length:
                continue  # each input has its own conditioning (`concat_row`)
            kept = len(episode.shown) - joined.dropped
            stats["shown_examples"] += kept
            self._count_distinct(episode.task, episode.shown[:kept])
            stats["dropped_examples"] += joined.dropped
            stats["truncated_conditionings"] += joined.truncated

    def _count_distinct(self, task: int, shown: Sequence[Example]) -> None:
        for example in shown:
            if len(self._distinct) < COUNTED_EXAMPLES:
                self._distinct.add(hash((task, example)))
        self.stats["distinct_examples"] = len(self._distinct)

    def _fill(self, batch: Batch, episodes: list[_Episode]) -> None:
        """Write one example per row; a task with fewer rows than G repeats some."""
        count = self._config.examples_per_task
        rows = [list(itertools.islice(episode.rows, count)) for episode in episodes]
        encoded = iter(self._encode_rows(zip(episodes, rows, strict=True)))
        for slot, drawn in enumerate(rows):
            examples = [next(encoded) for _ in drawn]
            for g in range(count):
                example = examples[g % len(examples)]
                batch["inputs"][slot, g, : len(example.ids)] = example.ids
                batch["targets"][slot, g, : len(example.target)] = example.target
                self._count(example)

    def _fill_packed(self, batch: Batch, episodes: list[_Episode]) -> None:
        """Write as many examples per row as fit."""
        c = self._config
        width = self._layout.input_length(c)
        bins = [packing.Bins(c.examples_per_task, width, c.target_length) for _ in episodes]
        filling = dict(enumerate(episodes))
        while filling:
            rows = [
                list(itertools.islice(episode.rows, PACKING_ROUND * c.examples_per_task))
                for episode in filling.values()
            ]
            encoded = iter(self._encode_rows(zip(filling.values(), rows, strict=True)))
            unfilled = {}
            for (slot, episode), drawn in zip(filling.items(), rows, strict=True):
                examples = [next(encoded) for _ in drawn]
                added = bins[slot].extend([(example.ids, example.target) for example in examples])
                for example in examples[:added]:
                    self._count(example)
                if examples and added == len(examples):
                    unfilled[slot] = episode
            filling = unfilled
        for slot, bin_ in enumerate(bins):
            bin_.fill(batch, slot)

    def _encode_rows(
        self, drawn: Iterable[tuple[_Episode, list[tuple[TaskRow, str]]]]
    ) -> list[_EncodedExample]:
        """Return the rows of several episodes as ids, cut to their lengths, EOS at the end."""
        c = self._config
        flat = [(episode, row, target) for episode, rows in drawn for row, target in rows]
        inputs = self._encode(self._template.query(row.input) for _, row, _ in flat)
        targets = self._encode(target for _, _, target in flat)
        encoded = []
        for (episode, _, _), ids, target in zip(flat, inputs, targets, strict=True):
            target_ids, target_cut = _cut(target, c.target_length)
            ids, input_cut = cut_input(ids, len(target), c)
            shown = dropped = 0
            if self._layout.in_inputs:
                row = self._prepend(episode, ids, len(target))
                ids, input_cut = row.ids, input_cut or row.truncated
                if c.concat_length:
                    shown, dropped = len(episode.shown) - row.dropped, row.dropped
            encoded.append(_EncodedExample(ids, target_ids, input_cut, target_cut, shown, dropped))
        return encoded

    def _prepend(self, episode: _Episode, ids: np.ndarray, target_length: int) -> Conditioning:
        """Return an input's ids behind the conditioning (layouts with ``in_inputs``)."""
        assert episode.conditioning is not None
        return concat_row(
            self._config,
            self._layout,
            self._label,
            episode.instruction,
            episode.examples,
            episode.conditioning.ids,
            ids,
            target_length,
        )

    def _count(self, example: _EncodedExample) -> None:
        stats = self.stats
        stats["examples"] += 1
        stats["truncated_inputs"] += example.input_cut
        stats["truncated_targets"] += example.target_cut
        stats["shown_examples"] += example.shown
        stats["dropped_examples"] += example.dropped

    # ------------------------------------------------------------------------------- checks

    def _check(self, index: int) -> None:
        """Raise at the start what would otherwise end the run at some later step."""
        task = self._tasks[index]
        if not len(task.rows) and self._rates[index]:
            raise UserError(f"task {task.name} has no rows to train on; remove it from the mixture")
        for rule in self._rules:
            self._check_rule(index, rule)

    def _check_rule(self, index: int, rule: ConditioningRule) -> None:
        c, task = self._config, self._tasks[index]
        if rule.instruction:
            if c.on_long_instruction == "raise":
                longest = max(self._instructions[index], key=len)
                join_conditioning(longest, [], c.hyper_length, "raise", task.name)
            return
        if not rule.most or not len(task.rows):
            return
        shown = self._draw_shown(index, 1, rule, np.random.default_rng(0))
        keys = {text_key(text) for text, _ in shown}
        if not shown or all(text_key(row.input) in keys | task.held_out for row in task.rows):
            raise UserError(
                f"task {task.name} has no example to show that fits "
                f"data.hyper_length={c.hyper_length} and is not its only input; add Positive "
                "Examples, raise the length, or set data.use_instruction=True"
            )


def draw_examples(
    task: TaskData,
    shots: int,
    rule: ConditioningRule,
    rng: np.random.Generator,
    fits: Callable[[Example], bool] | None = None,
    exclude: str | None = None,
) -> list[Example]:
    """Return up to ``shots`` different examples, none with the input ``exclude``.

    With ``rule.first`` the task's pool is read in its order, then rows are drawn. Otherwise pool
    and rows are drawn from together, without replacement and all equally likely, as in HyperTuning
    and MetaICL: a pool of a few examples alone would be memorized. One row is never shown, and no
    row that is held out.

    Args:
      task: one task.
      shots: the number of examples.
      rule: of ``data.variant`` or ``data.shots``.
      rng: for the draws.
      fits: examples for which it is False are passed over.
      exclude: the `text_key` of an input that must not be shown.
    """
    shown: list[Example] = []
    keys, rows_left = {exclude, *task.held_out}, len(task.rows) - len(task.held_out) - 1
    for example, is_row in _candidates(task, rule.first, rng):
        if len(shown) == shots:
            break
        key = text_key(example[0])
        if key in keys or (is_row and rows_left <= 0) or (fits is not None and not fits(example)):
            continue
        keys.add(key)
        shown.append(example)
        rows_left -= is_row
    return shown


def _candidates(
    task: TaskData, first: bool, rng: np.random.Generator
) -> Iterator[tuple[Example, bool]]:
    """Yield (example, whether it is a row) in the order in which they are considered."""
    pool, rows = task.examples, task.rows
    skipped = len(pool) if first else 0
    yield from ((example, False) for example in pool[:skipped])
    for i in _random_order(len(pool) - skipped + len(rows), rng):
        index = i + skipped
        if index < len(pool):
            yield pool[index], False
        else:
            row = rows[index - len(pool)]
            yield (row.input, row.outputs[0]), True


def cut_input(ids: np.ndarray, target_length: int, data_config: Any) -> tuple[np.ndarray, bool]:
    """Return an input's ids with EOS, at most ``data.input_length``, and whether it was cut.

    With ``data.example_length`` input and target share that length; see `templates.cut_example`.
    """
    c = data_config
    most = max(0, c.example_length - 2 - target_length) if c.example_length else len(ids)
    cut, was_cut = _cut(ids[:most], c.input_length)
    return cut, was_cut or len(ids) > most


def concat_row(
    data_config: Any,
    layout: Layout,
    label: np.ndarray,
    instruction: np.ndarray,
    examples: Sequence[np.ndarray],
    conditioning: np.ndarray,
    ids: np.ndarray,
    target_length: int,
) -> Conditioning:
    """Return one input of a layout with ``in_inputs``: conditioning, label, input, EOS.

    By default the conditioning is what another system would read, without its EOS, so that every
    system reads the same episode; an empty one has no label either. Only where both parts fill
    their lengths is there no room for the label; then the end of the input is cut.

    With ``data.concat_length`` as much of instruction, examples and input as fits is kept; see
    `templates.join_concat`.
    """
    c = data_config
    if c.concat_length:
        query = np.concatenate([label, ids]) if len(instruction) or examples else ids
        return join_concat(
            instruction, examples, query, c.concat_length, target_length + 1, c.on_long_examples
        )
    front = [conditioning[:-1], label] if len(conditioning) > 1 else []
    joined = np.concatenate([*front, ids]).astype(np.int32)
    length = layout.input_length(c)
    if len(joined) <= length:
        return Conditioning(joined, 0, False)
    return Conditioning(np.append(joined[: length - 1], np.int32(EOS_ID)), 0, True)


@dataclass
class _Episode:
    """One drawn episode: the shown examples, and an iterator over the rows to learn from."""

    task: int  # its index
    instruction: np.ndarray  # ids without EOS
    shown: list[Example]
    shots: int  # how many were requested
    rows: Iterator[tuple[TaskRow, str]]  # with the target drawn for each
    examples: list[np.ndarray]  # ids of the shown examples, once encoded
    conditioning: Conditioning | None = None


class _EncodedExample(NamedTuple):
    """One row as ids, whether it was cut, and the examples shown in it (``in_inputs``)."""

    ids: np.ndarray
    target: np.ndarray
    input_cut: bool
    target_cut: bool
    shown: int
    dropped: int


class _CachedEncoder:
    """Tokenizer with a cache; it encodes many texts per call, as its threads need long lists."""

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._cache: dict[str, np.ndarray] = {}
        self._size = 0

    def __call__(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Return the ids of each text, 1-D int32 without EOS."""
        texts = list(texts)
        cache = self._cache
        missing = [text for text in dict.fromkeys(texts) if text not in cache]
        encoded = {}
        for text, ids in zip(missing, self._vocab.encode_batch(missing), strict=True):
            encoded[text] = np.array(ids, np.int32)
            if self._size < CACHED_IDS:
                cache[text] = encoded[text]
                self._size += len(encoded[text])
        return [cache[text] if text in cache else encoded[text] for text in texts]


def _cut(ids: np.ndarray, length: int) -> tuple[np.ndarray, bool]:
    """Return at most ``length`` ids, EOS included, and whether any were cut."""
    return np.append(ids[: length - 1], np.int32(EOS_ID)), len(ids) > length - 1


def _random_order(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Yield each of ``count`` indices once, in random order, without listing very many."""
    if count <= PERMUTED_ROWS:
        yield from rng.permutation(count).tolist()
        return
    seen: set[int] = set()
    while len(seen) < count:
        index = int(rng.integers(count))
        if index not in seen:
            seen.add(index)
            yield index
