"""Changed text: what of a task is another's, what stays, and that all of it is repeatable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hyper_t5 import changes
from hyper_t5.changes import CHANGES
from hyper_t5.errors import UserError
from hyper_t5.taskfile import Row, TaskRows


def make_task(name: str, *wordings: str, rows: int = 4, pool: int = 2) -> TaskRows:
    return TaskRows(
        name=name,
        instructions=wordings or (f"Given a word, say the {name} of it in lower case.",),
        examples=tuple((f"{name} shown {i}", f"{name} out {i}") for i in range(pool)),
        rows=[Row(f"{name}-{i}", f"{name} asked {i}", (f"{name} right {i}",)) for i in range(rows)],
    )


TASKS = [make_task(name) for name in ("end", "start", "plural", "colour", "size")]


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_only_the_text_is_changed(name: str, seed: int) -> None:
    """The rows asked, names, and the part that the change is not of stay as they are."""
    change = CHANGES[name]
    made = change.make(TASKS, seed)
    assert made == change.make(TASKS, seed)
    for new, old in zip(made, TASKS, strict=True):
        assert (new.name, new.rows, new.category) == (old.name, old.rows, old.category)
        assert (new.instruction != old.instruction) == (change.of in ("instruction", "both"))
        assert (new.examples != old.examples) == (change.of in ("examples", "both"))


def test_another_task_is_one_other_task_told_differently() -> None:
    twins = [make_task("a", "Say it."), make_task("b", " Say  it."), make_task("c", "Sing it.")]
    for seed in range(5):
        told = changes.wrong_instruction(twins, seed)
        assert [t.instruction for t in told] == ["Sing it.", "Sing it.", told[2].instruction]
        for old, new in zip(TASKS, changes.wrong_task(TASKS, seed), strict=True):
            (other,) = [t for t in TASKS if t.instruction == new.instruction]
            assert other is not old
            assert new.examples == other.examples
    drawn = {changes.wrong_task(TASKS, seed)[0].instruction for seed in range(10)}
    assert len(drawn) > 1


def test_tasks_that_are_told_alike_still_get_another_one() -> None:
    """Inputs that say their task themselves: no instruction differs, examples do."""
    silent = [make_task(name, "") for name in ("a", "b")]
    assert changes.wrong_examples(silent)[0].examples == silent[1].examples


def test_a_task_alone_is_refused() -> None:
    with pytest.raises(UserError, match=r"task end is alone.*--gin\.eval\.mixture"):
        changes.wrong_task(TASKS[:1])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (changes.truncated, "Say the"),
        (changes.reworded, "Name the plural."),
    ],
)
def test_words(change: Callable[..., Any], expected: str) -> None:
    task = make_task("plural", "Say the plural of it.", "Name the plural.")
    assert change([task], 0)[0].instruction == expected


def test_short_instructions_stay_instructions() -> None:
    """A conditioning of nothing would be refused."""
    assert changes.truncated([make_task("a", "Sing.")])[0].instruction == "Sing."
    assert changes.shuffled([make_task("a", "")])[0].instruction == ""


def test_shuffled_words_are_the_same_words() -> None:
    for old, new in zip(TASKS, changes.shuffled(TASKS, 0), strict=True):
        assert sorted(new.instruction.split()) == sorted(old.instruction.split())


def test_one_wording_is_reworded_by_rule() -> None:
    text = "In this task, you are given a review. Your task is to classify it."
    assert changes.by_rule(text) == (
        "Here is what to do: here, you will see a review. you have to sort it. "
        "Give only the answer."
    )
    assert changes.reworded([make_task("a", text)])[0].instruction == changes.by_rule(text)


def test_settled_tasks_show_what_evaluation_shows() -> None:
    """Rows that are not asked join the pool, at its end: another's examples replace both."""
    (task,) = changes.settle([make_task("a", rows=4, pool=2)], 3)
    assert [row.id for row in task.rows] == ["a-0", "a-1", "a-2"]
    assert task.examples[2:] == (("a asked 3", "a right 3"),)
    (whole,) = changes.settle([make_task("a", rows=4, pool=2)], 0)
    assert (len(whole.rows), len(whole.examples)) == (4, 2)
