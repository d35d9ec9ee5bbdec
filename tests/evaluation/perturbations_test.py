"""Perturbations: changed and unchanged parts of a task, and repeatability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.evaluation import perturbations
from hyper_t5.evaluation.perturbations import PERTURBATIONS
from hyper_t5.utils.errors import UserError


def make_task(name: str, *wordings: str, rows: int = 4, pool: int = 2) -> TaskData:
    return TaskData(
        name=name,
        instructions=wordings or (f"Given a word, say the {name} of it in lower case.",),
        examples=tuple((f"{name} shown {i}", f"{name} out {i}") for i in range(pool)),
        rows=[
            TaskRow(f"{name}-{i}", f"{name} in {i}", (f"{name} right {i}",)) for i in range(rows)
        ],
    )


TASKS = [make_task(name) for name in ("end", "start", "plural", "colour", "size")]


@pytest.mark.parametrize("name", PERTURBATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_text_is_changed(name: str, seed: int) -> None:
    """Rows, names and the other part of the conditioning stay the same."""
    change = PERTURBATIONS[name]
    changed = change.apply(TASKS, seed)
    assert changed == change.apply(TASKS, seed)
    for new, old in zip(changed, TASKS, strict=True):
        assert (new.name, new.rows, new.category) == (old.name, old.rows, old.category)
        assert (new.instruction != old.instruction) == (change.of in ("instruction", "both"))
        assert (new.examples != old.examples) == (change.of in ("examples", "both"))


def test_another_task_has_another_instruction() -> None:
    twins = [make_task("a", "Say it."), make_task("b", " Say  it."), make_task("c", "Sing it.")]
    for seed in range(5):
        changed = perturbations.wrong_instruction(twins, seed)
        assert [t.instruction for t in changed] == ["Sing it.", "Sing it.", changed[2].instruction]
        for old, new in zip(TASKS, perturbations.wrong_task(TASKS, seed), strict=True):
            (other,) = [t for t in TASKS if t.instruction == new.instruction]
            assert other is not old
            assert new.examples == other.examples
    drawn = {perturbations.wrong_task(TASKS, seed)[0].instruction for seed in range(10)}
    assert len(drawn) > 1


def test_tasks_with_equal_instructions_are_still_swapped() -> None:
    """Without instructions, the examples differ."""
    silent = [make_task(name, "") for name in ("a", "b")]
    assert perturbations.wrong_examples(silent)[0].examples == silent[1].examples


def test_a_task_alone_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"task end is the only one of its split.*--gin\.eval\.mixture"
    ):
        perturbations.wrong_task(TASKS[:1])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (perturbations.truncate, "Say the"),
        (perturbations.reword, "Name the plural."),
    ],
)
def test_words(change: Callable[..., Any], expected: str) -> None:
    task = make_task("plural", "Say the plural of it.", "Name the plural.")
    assert change([task], 0)[0].instruction == expected


def test_short_instructions_do_not_become_empty() -> None:
    """An empty conditioning is refused."""
    assert perturbations.truncate([make_task("a", "Sing.")])[0].instruction == "Sing."
    assert perturbations.shuffle([make_task("a", "")])[0].instruction == ""


def test_shuffled_words_are_the_same_words() -> None:
    for old, new in zip(TASKS, perturbations.shuffle(TASKS, 0), strict=True):
        assert sorted(new.instruction.split()) == sorted(old.instruction.split())


def test_a_single_wording_is_reworded_by_rules() -> None:
    text = "In this task, you are given a review. Your task is to classify it."
    assert perturbations.reword_text(text) == (
        "Here is what to do: here, you will see a review. you have to sort it. "
        "Give only the answer."
    )
    assert perturbations.reword([make_task("a", text)])[0].instruction == perturbations.reword_text(
        text
    )


def test_rows_beyond_the_evaluated_ones_join_the_pool() -> None:
    (task,) = perturbations.split_pools([make_task("a", rows=4, pool=2)], 3)
    assert [row.id for row in task.rows] == ["a-0", "a-1", "a-2"]
    assert task.examples[2:] == (("a in 3", "a right 3"),)
    (whole,) = perturbations.split_pools([make_task("a", rows=4, pool=2)], 0)
    assert (len(whole.rows), len(whole.examples)) == (4, 2)
