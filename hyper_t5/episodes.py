"""Tasks -> episodes -> batches of ids to train on; `judged` has those to judge by.

An episode is one task's conditioning (hyper_inputs: instruction and/or shown examples) with other
rows of the same task (inputs, targets). Batch s is made from the tasks and from
`np.random.default_rng([seed, s, slot])` alone: there is no iterator to save, a resumed run asks for
batch s and gets it, and a host makes, and reads the rows of, its own slots only.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hyper_t5 import packing
from hyper_t5.errors import UserError
from hyper_t5.hosts import slots_of
from hyper_t5.prompts import (
    ENCODINGS,
    LAYOUTS,
    Conditioning,
    cut_example,
    join_asked,
    join_conditioning,
    show_rule,
)
from hyper_t5.taskfile import Example, Row, TaskRows, text_key
from hyper_t5.vocab import EOS_ID, Vocabulary

Batch = dict[str, np.ndarray]
Text = str | tuple[str, str]  # an example up to its output, and the rest, where the first is cut

REMEMBERED = 2**25  # ids of texts that are kept once they are encoded: 128 MB, and their texts
PERMUTED = 4096  # of tasks with more rows, places are drawn one by one instead
ROUND = 8  # examples that packing encodes together, a row, before it looks what still fits


def real_tokens(batch: Batch) -> int:
    """How many ids of a batch are no padding."""
    names = ("hyper_inputs", "inputs", "targets")
    return sum(int(np.count_nonzero(batch[name])) for name in names)


# --------------------------------------------------------------------------------- as ids


class _Encoder:
    """Texts -> ids, many at a time (a tokeniser's threads need long lists), kept while there is
    room for more.
    """

    def __init__(self, vocab: Vocabulary) -> None:
        self._vocab = vocab
        self._kept: dict[str, np.ndarray] = {}
        self._size = 0

    def __call__(self, texts: Iterable[str]) -> list[np.ndarray]:
        """Ids of each text, 1-D int32 without EOS."""
        texts = list(texts)
        kept = self._kept
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        made = {}
        for text, ids in zip(new, self._vocab.encode_batch(new), strict=True):
            made[text] = np.array(ids, np.int32)
            if self._size < REMEMBERED:
                kept[text] = made[text]
                self._size += len(made[text])
        return [kept[text] if text in kept else made[text] for text in texts]


def _cut(ids: np.ndarray, length: int) -> tuple[np.ndarray, bool]:
    """Ids with EOS, at most `length` of them, and whether any were lost."""
    return np.append(ids[: length - 1], np.int32(EOS_ID)), len(ids) > length - 1


def _order(count: int, rng: np.random.Generator) -> Iterator[int]:
    """The places of `count` rows, each once, in random order; of very many without listing all."""
    if count <= PERMUTED:
        yield from rng.permutation(count).tolist()
        return
    seen: set[int] = set()
    while len(seen) < count:
        place = int(rng.integers(count))
        if place not in seen:
            seen.add(place)
            yield place


@dataclass
class _Drawn:
    """An episode as drawn: what is shown, and where the rows to ask for come from."""

    index: int  # of the task
    instruction: np.ndarray  # ids, no EOS
    shown: list[Example]
    shots: int  # how many were wanted
    asked: Iterator[tuple[Row, str]]  # rows with the target that was drawn of each
    examples: list[np.ndarray]  # ids of the shown, once encoded
    conditioning: Conditioning | None = None


class _Asked(NamedTuple):
    """An example that is asked for: its ids, what was cut, and what is shown in it (concat)."""

    ids: np.ndarray
    target: np.ndarray
    cut: bool
    cut_target: bool
    shown: int
    dropped: int


# -------------------------------------------------------------------------------- the sampler


class EpisodeSampler:
    """Training batches of episodes.

    Each step draws T tasks by their rates (without repetition when rates are equal and there are
    enough), for each a number of examples to show as `prompts.show_rule` says, those examples, and
    G rows to ask for, none of which has the text of a shown one. Shown examples come from the
    task's pool (SNI's Positive Examples); when it is short, from other rows. A row's target is one
    of its references, drawn. Of several wordings of the instruction one is drawn.

    With `data.pack` each of the G rows holds as many examples as fit, until one fits into none of
    the task's rows or the task has no more. Rows of a large task are drawn by that rule with a
    slight lead of short ones, as the one that ends an episode is not asked for in it.

    `stats` counts over all batches made here: episodes, rows, examples, shown_examples,
    dropped_examples (over the length), missing_examples (the task has too few),
    truncated_conditionings, truncated_inputs, truncated_targets. `names` are the tasks' in their
    order, which a batch's "tasks" index.

    Raises:
        UserError: no tasks, or one without rows; a task without an example to show when no
            instruction is; an instruction over `data.hyper_length` unless
            `data.on_long_instruction` is 'truncate'.
    """

    def __init__(
        self,
        tasks: Sequence[TaskRows],
        vocab: Vocabulary,
        data_config: Any,
        seed: int,
        layout: str = "apart",
    ) -> None:
        """`layout` is one of LAYOUTS; for "concat" see `_with_text`."""
        assert layout in LAYOUTS, layout
        if not tasks:
            raise UserError("data.mixture: the list of training tasks is empty")
        self.stats: Counter[str] = Counter()
        self.names = tuple(task.name for task in tasks)
        self._config = data_config
        self._vocab = vocab
        self._encode = _Encoder(vocab)
        self._seed = seed % 2**63
        self._layout, self._concat = layout, layout == "concat"
        self._encoding = ENCODINGS[data_config.encoding]
        self._label = np.array(vocab.encode(self._encoding.label), np.int32)
        self._rule = show_rule(data_config, self._concat)
        self._tasks = tasks
        rates = np.array([task.rate for task in tasks], np.float64)
        self._rates = rates / rates.sum()
        self._instructions: list[list[np.ndarray]] = [[np.zeros(0, np.int32)] for _ in tasks]
        if self._rule.instruction:
            texts = iter(
                self._encode(self._encoding.instruction(i) for t in tasks for i in t.instructions)
            )
            self._instructions = [[next(texts) for _ in t.instructions] for t in tasks]
        for index in range(len(tasks)):
            self._check(index)

    @property
    def width(self) -> int:
        """Ids in a row of inputs."""
        return input_width(self._config, self._layout)

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """Batch `step`: hyper_inputs [T, Lh], inputs [T, G, Li], targets [T, G, Lt], tasks [T].

        All int32; tasks are places in `names`. With layout "concat", hyper_inputs are [T, 1] (one
        EOS) and inputs [T, G, `data.concat_length` or Lh + Li]. With `data.pack` also what
        `packing.empty` lists. Of several hosts each makes its part, T / hosts long.
        """
        c = self._config
        slots = slots_of(c.tasks_per_batch, host, hosts)
        drawn = [
            self._draw(int(index), np.random.default_rng([self._seed, step, slot + 1]))
            for slot, index in zip(slots, self._draw_tasks(step)[slots.start :], strict=False)
        ]
        self._condition(drawn)
        long = 1 if self._concat else c.hyper_length
        batch = {
            "tasks": np.array([episode.index for episode in drawn], np.int32),
            "hyper_inputs": np.zeros((len(slots), long), np.int32),
            **packing.empty(len(slots), c.examples_per_task, self.width, c.target_length),
        }
        for slot, episode in enumerate(drawn):
            assert episode.conditioning is not None
            ids = np.array([EOS_ID]) if self._concat else episode.conditioning.ids
            batch["hyper_inputs"][slot, : len(ids)] = ids
        if c.pack:
            self._ask_packed(batch, drawn)
        else:
            batch = {k: v for k, v in batch.items() if not k.endswith(("_segments", "_positions"))}
            self._ask(batch, drawn)
        self.stats["episodes"] += len(slots)
        self.stats["rows"] += len(slots) * c.examples_per_task
        return batch

    # ------------------------------------------------------------------------- what is drawn

    def _draw_tasks(self, step: int) -> np.ndarray:
        rng = np.random.default_rng([self._seed, step, 0])
        number, wanted = len(self._tasks), self._config.tasks_per_batch
        if np.all(self._rates == self._rates[0]) and wanted <= number:
            return rng.choice(number, wanted, replace=False)
        return rng.choice(number, wanted, p=self._rates)

    def _draw(self, index: int, rng: np.random.Generator) -> _Drawn:
        instructions, rule = self._instructions[index], self._rule
        instruction = instructions[int(rng.integers(len(instructions)))]
        shots = int(rng.integers(rule.fewest, rule.most + 1))
        shown = self._draw_shown(index, shots, rng)
        while True:
            asked = self._draw_asked(index, {text_key(text) for text, _ in shown}, rng)
            first = next(asked, None)
            if first is not None:
                break
            shown.pop()  # a tiny task whose every row is shown
        return _Drawn(index, instruction, shown, shots, itertools.chain([first], asked), [])

    def _draw_asked(
        self, index: int, taken: set[str], rng: np.random.Generator
    ) -> Iterator[tuple[Row, str]]:
        """The rows that have not the text of a shown one, in random order, with a target each."""
        rows = self._tasks[index].rows
        for place in _order(len(rows), rng):
            row = rows[place]
            if text_key(row.input) not in taken:
                yield row, row.outputs[int(rng.integers(len(row.outputs)))]

    def _draw_shown(self, index: int, shots: int, rng: np.random.Generator) -> list[Example]:
        """Up to `shots` different examples: the pool's, then other rows, never all rows."""
        task, alone = self._tasks[index], not self._rule.instruction
        count = len(task.examples)
        order = np.arange(count) if self._rule.first else rng.permutation(count)
        pool = (task.examples[i] for i in order)
        shown = list(itertools.islice((e for e in pool if not alone or self._fits(e)), shots))
        if len(shown) == shots:
            return shown
        keys = {text_key(text) for text, _ in shown}
        for place in _order(len(task.rows), rng):
            row = task.rows[place]
            example = (row.input, row.outputs[0])
            if len(shown) == shots:
                return shown
            if (key := text_key(row.input)) not in keys and (not alone or self._fits(example)):
                keys.add(key)
                shown.append(example)
        return shown

    def _fits(self, example: Example) -> bool:
        """Whether an example can be the only example shown: where nothing else says the task."""
        c = self._config
        if c.on_long_examples == "cut_left" or 0 < c.example_length < c.hyper_length:
            return True
        text = "".join(self._encoding.example(0, example))
        # A token is at least a byte, but for the mark of a word's start: most need no tokeniser.
        return len(text.encode()) + 2 < c.hyper_length or len(self._encode([text])[0]) < (
            c.hyper_length
        )

    # ----------------------------------------------------------------------------- as ids

    def _condition(self, drawn: list[_Drawn]) -> None:
        """Encodes what is shown in all episodes, and joins it."""
        c, stats = self._config, self.stats
        parts = [self._encoding.example(i, e) for d in drawn for i, e in enumerate(d.shown)]
        if c.example_length:
            flat = self._encode(text for pair in parts for text in pair)
            pairs = zip(flat[::2], flat[1::2], strict=True)
            ids = iter([cut_example(head, tail, c.example_length) for head, tail in pairs])
        else:
            ids = iter(self._encode("".join(pair) for pair in parts))
        for episode in drawn:
            episode.examples = [next(ids) for _ in episode.shown]
            made = episode.conditioning = join_conditioning(
                episode.instruction,
                episode.examples,
                c.hyper_length,
                c.on_long_instruction,
                self.names[episode.index],
                self._layout,
                c.on_long_examples,
            )
            stats["missing_examples"] += episode.shots - len(episode.shown)
            if self._concat and c.concat_length:
                continue  # each input has its own (`_with_text`)
            stats["shown_examples"] += len(episode.shown) - made.dropped
            stats["dropped_examples"] += made.dropped
            stats["truncated_conditionings"] += made.truncated

    def _ask(self, batch: Batch, drawn: list[_Drawn]) -> None:
        """One example a row; a task with fewer rows than G is asked some again."""
        count = self._config.examples_per_task
        asked = [list(itertools.islice(episode.asked, count)) for episode in drawn]
        encoded = iter(self._rows(zip(drawn, asked, strict=True)))
        for slot, rows in enumerate(asked):
            made = [next(encoded) for _ in rows]
            for g in range(count):
                example = made[g % len(made)]
                batch["inputs"][slot, g, : len(example.ids)] = example.ids
                batch["targets"][slot, g, : len(example.target)] = example.target
                self._count(example)

    def _ask_packed(self, batch: Batch, drawn: list[_Drawn]) -> None:
        """As many examples a row as fit."""
        c = self._config
        bins = [packing.Bins(c.examples_per_task, self.width, c.target_length) for _ in drawn]
        filling = dict(enumerate(drawn))
        while filling:
            asked = [
                list(itertools.islice(episode.asked, ROUND * c.examples_per_task))
                for episode in filling.values()
            ]
            encoded = iter(self._rows(zip(filling.values(), asked, strict=True)))
            still = {}
            for (slot, episode), rows in zip(filling.items(), asked, strict=True):
                made = [next(encoded) for _ in rows]
                added = bins[slot].extend([(example.ids, example.target) for example in made])
                for example in made[:added]:
                    self._count(example)
                if made and added == len(made):
                    still[slot] = episode
            filling = still
        for slot, bin_ in enumerate(bins):
            bin_.fill(batch, slot)

    def _rows(self, asked: Iterable[tuple[_Drawn, list[tuple[Row, str]]]]) -> list[_Asked]:
        """The rows of some episodes, cut to the lengths, EOS at their ends."""
        c = self._config
        flat = [(episode, row, target) for episode, rows in asked for row, target in rows]
        inputs = self._encode(self._encoding.asked(row.input) for _, row, _ in flat)
        targets = self._encode(target for _, _, target in flat)
        made = []
        for (episode, _, _), ids, target in zip(flat, inputs, targets, strict=True):
            end, cut_target = _cut(target, c.target_length)
            ids, cut = cut_input(ids, len(target), c)
            shown = dropped = 0
            if self._concat:
                row = self._with_text(episode, ids, len(target))
                ids, cut = row.ids, cut or row.truncated
                if c.concat_length:
                    shown, dropped = len(episode.shown) - row.dropped, row.dropped
            made.append(_Asked(ids, end, cut, cut_target, shown, dropped))
        return made

    def _with_text(self, episode: _Drawn, ids: np.ndarray, target: int) -> Conditioning:
        """With layout "concat", the conditioning in front of an input's ids."""
        assert episode.conditioning is not None
        return concat_row(
            self._config,
            self._label,
            episode.instruction,
            episode.examples,
            episode.conditioning.ids,
            ids,
            target,
        )

    def _count(self, example: _Asked) -> None:
        stats = self.stats
        stats["examples"] += 1
        stats["truncated_inputs"] += example.cut
        stats["truncated_targets"] += example.cut_target
        stats["shown_examples"] += example.shown
        stats["dropped_examples"] += example.dropped

    # ------------------------------------------------------------------------------ at the start

    def _check(self, index: int) -> None:
        """Raises now what would otherwise end the run at some later step."""
        c, task = self._config, self._tasks[index]
        if not len(task.rows) and self._rates[index]:
            raise UserError(f"task {task.name} has no rows to train on; take it out of the mixture")
        if self._rule.instruction:
            if c.on_long_instruction == "raise":
                longest = max(self._instructions[index], key=len)
                join_conditioning(longest, [], c.hyper_length, "raise", task.name)
            return
        if not self._rule.most or not len(task.rows):
            return
        shown = self._draw_shown(index, 1, np.random.default_rng(0))
        taken = {text_key(text) for text, _ in shown}
        if not shown or all(text_key(row.input) in taken for row in task.rows):
            raise UserError(
                f"task {task.name} has no example to show that fits "
                f"data.hyper_length={c.hyper_length} and is not its only input; add Positive "
                "Examples, raise the length, or set data.use_instruction=True"
            )


def input_width(data_config: Any, layout: str) -> int:
    """Ids in a row of inputs: Li, or with layout "concat" room for the text too."""
    c = data_config
    if layout != "concat":
        return c.input_length
    return c.concat_length or c.hyper_length + c.input_length


def cut_input(ids: np.ndarray, target: int, data_config: Any) -> tuple[np.ndarray, bool]:
    """An input's ids with EOS, cut to `data.input_length` and, with `data.example_length`, to what
    the `target` ids of its output leave of that (see `prompts.cut_example`).
    """
    c = data_config
    most = max(0, c.example_length - 2 - target) if c.example_length else len(ids)
    cut, was = _cut(ids[:most], c.input_length)
    return cut, was or len(ids) > most


def concat_row(
    data_config: Any,
    label: np.ndarray,
    instruction: np.ndarray,
    examples: Sequence[np.ndarray],
    conditioning: np.ndarray,
    ids: np.ndarray,
    target: int,
) -> Conditioning:
    """The 'concat' system's input: conditioning, label, the row's input, EOS.

    By default the conditioning is as another system would read it, without its EOS, so that every
    system reads the same episode; of an empty one there is no label either. Only where both parts
    fill their lengths is there no room for the label; then the end of the input goes.

    With `data.concat_length` whatever of instruction, examples and input fits into it: see
    `prompts.join_asked`.
    """
    c = data_config
    if c.concat_length:
        asked = np.concatenate([label, ids]) if len(instruction) or examples else ids
        return join_asked(
            instruction, examples, asked, c.concat_length, target + 1, c.on_long_examples
        )
    front = [conditioning[:-1], label] if len(conditioning) > 1 else []
    joined = np.concatenate([*front, ids]).astype(np.int32)
    length = input_width(c, "concat")
    if len(joined) <= length:
        return Conditioning(joined, 0, False)
    return Conditioning(np.append(joined[: length - 1], np.int32(EOS_ID)), 0, True)
