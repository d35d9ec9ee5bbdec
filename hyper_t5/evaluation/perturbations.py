"""Perturbations of a task's conditioning, to measure how much of it a model reads.

A perturbation is a pure function of tasks and a seed: the evaluated rows are unchanged, their
conditioning differs. `PERTURBATIONS` has them by name.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence

from hyper_t5.data.task_rows import TaskData, text_key
from hyper_t5.utils.errors import UserError

Tasks = Sequence[TaskData]
POOL = 64  # examples of a task to show: more than any conditioning holds


def split_pools(tasks: Tasks, rows: int) -> list[TaskData]:
    """Return tasks with their evaluated rows only (the first ``rows``, 0 for all).

    The other rows join the pool of examples. Evaluation shows a task's own rows where its pool is
    too small; with other rows gone, a task with another's examples shows none of its own.
    """
    result = []
    for task in tasks:
        evaluated, rest = (task.rows[:rows], task.rows[rows:]) if rows else (task.rows, ())
        more = ((row.input, row.outputs[0]) for row in rest)
        pool = tuple(itertools.islice(itertools.chain(task.examples, more), POOL))
        result.append(dataclasses.replace(task, rows=evaluated, examples=pool))
    return result


# ------------------------------------------------------------------------ instructions


def reword(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Use the task's second wording, or `reword_text` where it has one only."""
    del seed
    return [
        _with_instruction(
            t, t.instructions[1] if len(t.instructions) > 1 else reword_text(t.instruction)
        )
        for t in tasks
    ]


PHRASES = {  # of instructions -> phrases of the same meaning
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


def reword_text(text: str) -> str:
    """Replace common phrases and frame the whole."""
    for phrase, other in PHRASES.items():
        text = re.sub(phrase, other, text, flags=re.IGNORECASE)
    return f"Here is what to do: {text}".rstrip() + " Give only the answer."


def truncate(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Keep the first half of the words, at least one."""
    del seed
    halves = []
    for task in tasks:
        words = task.instruction.split()
        halves.append(_with_instruction(task, " ".join(words[: max(1, len(words) // 2)])))
    return halves


def shuffle(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Put the words in random order."""
    result = []
    for task in tasks:
        words = task.instruction.split()
        random.Random(f"{seed}/{task.name}").shuffle(words)
        result.append(_with_instruction(task, " ".join(words)))
    return result


def wrong_instruction(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Use another task's instruction."""
    return [_with_instruction(t, o.instruction) for t, o in _with_others(tasks, seed)]


# ------------------------------------------------------------------------ examples


def wrong_examples(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Use another task's examples."""
    return [dataclasses.replace(t, examples=o.examples) for t, o in _with_others(tasks, seed)]


def wrong_task(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Use instruction and examples of one other task."""
    return [
        dataclasses.replace(t, instructions=o.instructions, examples=o.examples)
        for t, o in _with_others(tasks, seed)
    ]


def _with_instruction(task: TaskData, text: str) -> TaskData:
    return dataclasses.replace(task, instructions=(text,))


def _with_others(tasks: Tasks, seed: int) -> list[tuple[TaskData, TaskData]]:
    """Pair each task with another: in random order the next one with another instruction.

    Raises:
      UserError: there is one task only.
    """
    if len(tasks) < 2:
        raise UserError(
            f"task {tasks[0].name} is the only one of its split: robustness swaps texts of tasks "
            "and needs two; evaluate a mixture that has more (--gin.eval.mixture)"
        )
    order = list(range(len(tasks)))
    random.Random(f"{seed}/others").shuffle(order)
    others = {}
    for position, index in enumerate(order):
        following = [tasks[i] for i in (*order[position + 1 :], *order[:position])]
        key = text_key(tasks[index].instruction)
        others[index] = next((t for t in following if text_key(t.instruction) != key), following[0])
    return [(task, others[index]) for index, task in enumerate(tasks)]


# ------------------------------------------------------------------------ registry


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """A function of all tasks and a seed, and the part of the conditioning that it changes."""

    apply: Callable[[Tasks, int], list[TaskData]]
    of: str  # instruction, examples, or both


def identity(tasks: Tasks, seed: int = 0) -> list[TaskData]:
    """Change nothing."""
    del seed
    return list(tasks)


PERTURBATIONS: Mapping[str, Perturbation] = {
    "instruction reworded": Perturbation(reword, "instruction"),
    "instruction truncated to half": Perturbation(truncate, "instruction"),
    "instruction's words shuffled": Perturbation(shuffle, "instruction"),
    "instruction of another task": Perturbation(wrong_instruction, "instruction"),
    "examples of another task": Perturbation(wrong_examples, "examples"),
    "all text of another task": Perturbation(wrong_task, "both"),
}
