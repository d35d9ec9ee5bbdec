"""Changes of what a task's text says, for asking how much of it a model reads.

A change is a pure function of tasks and a seed: the rows asked stay as they are, the text that is
shown with them differs. `CHANGES` has them by name, each with what it takes from the task.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence

from hyper_t5.errors import UserError
from hyper_t5.taskfile import TaskRows, text_key

Tasks = Sequence[TaskRows]
POOL = 64  # examples of a task that may be shown: more than any conditioning holds


def settle(tasks: Tasks, rows: int) -> list[TaskRows]:
    """Tasks of their asked rows alone (the first ``rows``, 0 for all); the others may be shown.

    Evaluation shows a task's own rows where its pool is too small. Here they join the pool, so that
    a task which is given another's examples gets nothing of its own.
    """
    made = []
    for task in tasks:
        asked, rest = (task.rows[:rows], task.rows[rows:]) if rows else (task.rows, ())
        more = ((row.input, row.outputs[0]) for row in rest)
        pool = tuple(itertools.islice(itertools.chain(task.examples, more), POOL))
        made.append(dataclasses.replace(task, rows=asked, examples=pool))
    return made


# ---------------------------------------------------------------------------------- of instructions


def reworded(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """The source's next wording, or where it has but one, `by_rule`."""
    del seed
    return [
        _instructed(t, t.instructions[1] if len(t.instructions) > 1 else by_rule(t.instruction))
        for t in tasks
    ]


RULES = {  # openings and phrases of instructions -> others that ask the same
    r"\byour task is to\b": "you have to",
    r"\byou are given\b": "you will see",
    r"\byou will be given\b": "you are shown",
    r"\bin this task\b": "here",
    r"\byou need to\b": "you must",
    r"\byou should\b": "you are to",
    r"\bgiven\b": "from",
    r"\bgenerate\b": "write",
    r"\bdetermine\b": "find out",
    r"\bclassify\b": "sort",
}


def by_rule(text: str) -> str:
    """A plain rewording: common phrases replaced, and a frame around the whole."""
    for phrase, other in RULES.items():
        text = re.sub(phrase, other, text, flags=re.IGNORECASE)
    return f"Here is what to do: {text}".rstrip() + " Give only the answer."


def truncated(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """The first half of the words, one at least."""
    del seed
    halves = []
    for task in tasks:
        words = task.instruction.split()
        halves.append(_instructed(task, " ".join(words[: max(1, len(words) // 2)])))
    return halves


def shuffled(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """The same words in a random order."""
    made = []
    for task in tasks:
        words = task.instruction.split()
        random.Random(f"{seed}/{task.name}").shuffle(words)
        made.append(_instructed(task, " ".join(words)))
    return made


def wrong_instruction(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """Another task's."""
    return [_instructed(t, o.instruction) for t, o in _with_others(tasks, seed)]


# ------------------------------------------------------------------------------------- of examples


def wrong_examples(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """Another task's."""
    return [dataclasses.replace(t, examples=o.examples) for t, o in _with_others(tasks, seed)]


def wrong_task(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """Instruction and examples of one other task."""
    return [
        dataclasses.replace(t, instructions=o.instructions, examples=o.examples)
        for t, o in _with_others(tasks, seed)
    ]


def _instructed(task: TaskRows, text: str) -> TaskRows:
    return dataclasses.replace(task, instructions=(text,))


def _with_others(tasks: Tasks, seed: int) -> list[tuple[TaskRows, TaskRows]]:
    """Each task with another: in a random order the next that is told differently, or the next.

    Raises:
        UserError: there is one task alone.
    """
    if len(tasks) < 2:
        raise UserError(
            f"task {tasks[0].name} is alone in its split: robustness gives tasks the text of "
            "others, and needs two; judge a mixture that has more (--gin.eval.mixture)"
        )
    order = list(range(len(tasks)))
    random.Random(f"{seed}/others").shuffle(order)
    made = {}
    for at, place in enumerate(order):
        following = [tasks[p] for p in (*order[at + 1 :], *order[:at])]
        told = text_key(tasks[place].instruction)
        made[place] = next((t for t in following if text_key(t.instruction) != told), following[0])
    return [(task, made[place]) for place, task in enumerate(tasks)]


# -------------------------------------------------------------------------------------- by name


@dataclasses.dataclass(frozen=True)
class Change:
    """What is done to all tasks, and which part of the text it concerns."""

    make: Callable[[Tasks, int], list[TaskRows]]
    of: str  # instruction, examples, or both


def same(tasks: Tasks, seed: int = 0) -> list[TaskRows]:
    """No change."""
    del seed
    return list(tasks)


CHANGES: Mapping[str, Change] = {
    "instruction reworded": Change(reworded, "instruction"),
    "instruction truncated to half": Change(truncated, "instruction"),
    "instruction's words shuffled": Change(shuffled, "instruction"),
    "instruction of another task": Change(wrong_instruction, "instruction"),
    "examples of another task": Change(wrong_examples, "examples"),
    "all text of another task": Change(wrong_task, "both"),
}
