"""What an evaluation keeps, here and in a bucket; evaluate_test and pod_test stop whole ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bucket
from hyper_t5 import files
from hyper_t5.answers import Answers, key_of
from hyper_t5.errors import UserError
from hyper_t5.judged import EvalTask

ROWS: list[dict[str, Any]] = [
    {"id": "1", "prediction": "a\u2028b \u00e9\n"},
    {"id": "2", "option_log_probs": [-0.1]},
]
ROWS[1]["prediction"] = ""


def task() -> EvalTask:
    ids = np.array([[5, 6, 0]], np.int32)
    texts: dict[str, Any] = {
        "name": "t",
        "category": "c",
        "instruction": "do it",
        "ids": ("1",),
        "texts": ("x",),
    }
    rest: dict[str, Any] = {"shown": (("p", "q"),), "references": (("y",),), "options": ((),)}
    rest |= {"dropped": 0, "truncated_instruction": False, "truncated_inputs": 0}
    return EvalTask(**texts, hyper_ids=ids[0], inputs=ids, **rest)


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_what_is_added_is_there_the_next_time(where: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, bucket.served(patch) as objects:
        place = files.as_path(tmp_path / "answers" if where == "here" else "gs://b/eval/answers")
        keys, sizes = ["aa", "bb", "cc"], [2, 2, 2]
        first = Answers(place, keys, sizes)
        assert first.done == [False] * 3
        first.add(1, ROWS, 2.5)
        first.add(0, ROWS[::-1], 0.25)
        again = Answers(place, keys, sizes)
        assert (again.done, again.seconds) == ([True, True, False], 2.75)
        assert again.rows() == first.rows() == [*ROWS[::-1], *ROWS]
        # In another order, with another task, with another number of rows.
        assert Answers(place, ["cc", "bb"], [2, 2]).done == [False, True]
        assert Answers(place, keys, [2, 3, 2]).done == [True, False, False]
        again.remove()
        assert not place.exists()
        assert not objects
        again.remove()
        assert Answers(place, keys, sizes).done == [False] * 3


def test_nothing_is_kept_without_a_folder() -> None:
    kept = Answers(None, ["", ""], [1, 2])
    kept.add(1, ROWS, 1.0)
    kept.remove()
    assert kept.rows() == ROWS
    assert kept.done == [False, False]


def test_a_folder_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Answers(files.as_path(tmp_path / "file" / "answers"), ["a"], [2])
    with pytest.raises(UserError, match=r"cannot write .*a\.jsonl"):
        kept.add(0, ROWS, 1.0)
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        Answers(files.as_path(tmp_path), ["a"], [2])


def test_a_key_is_of_all_that_decides_the_answers() -> None:
    one = task()
    keys = {key_of([1], one, split="s"), key_of([2], one, split="s"), key_of([1], one, split="t")}
    for field in dataclasses.fields(one):
        value: Any = getattr(one, field.name)
        others: list[Any] = [(*value, *value)] if isinstance(value, tuple) else []
        if isinstance(value, np.ndarray):
            others = [value + 1, value[..., :-1]]
        elif isinstance(value, str):
            others = [value + "x"]
        elif isinstance(value, int):
            others = [value + 1]
        assert others
        for other in others:
            changed: dict[str, Any] = {field.name: other}
            keys |= {key_of([1], dataclasses.replace(one, **changed), split="s")}
    assert len(keys) == 3 + len(dataclasses.fields(one)) + 2
    assert key_of([1], task(), split="s") in keys
