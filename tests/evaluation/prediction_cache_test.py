"""Prediction cache, local and in a bucket."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.evaluation.prediction_cache import PredictionCache, cache_key
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket

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


@pytest.mark.parametrize("storage", ["local", "bucket"])
def test_added_predictions_are_read_again(storage: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, fake_bucket.served(patch) as objects:
        path = (
            tmp_path / "prediction_cache" if storage == "local" else "gs://b/eval/prediction_cache"
        )
        folder = files.as_path(path)
        keys, sizes = ["aa", "bb", "cc"], [2, 2, 2]
        first = PredictionCache(folder, keys, sizes)
        assert first.done == [False] * 3
        first.add(1, ROWS, 2.5)
        first.add(0, ROWS[::-1], 0.25)
        again = PredictionCache(folder, keys, sizes)
        assert (again.done, again.seconds) == ([True, True, False], 2.75)
        assert again.rows() == first.rows() == [*ROWS[::-1], *ROWS]
        # In another order, with another task, with another number of rows.
        assert PredictionCache(folder, ["cc", "bb"], [2, 2]).done == [False, True]
        assert PredictionCache(folder, keys, [2, 3, 2]).done == [True, False, False]
        again.remove()
        assert not folder.exists()
        assert not objects
        again.remove()
        assert PredictionCache(folder, keys, sizes).done == [False] * 3


def test_without_a_folder_predictions_stay_in_memory() -> None:
    cache = PredictionCache(None, ["", ""], [1, 2])
    cache.add(1, ROWS, 1.0)
    cache.remove()
    assert cache.rows() == ROWS
    assert cache.done == [False, False]


def test_unusable_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = PredictionCache(files.as_path(tmp_path / "file" / "prediction_cache"), ["a"], [2])
    with pytest.raises(UserError, match=r"cannot write .*a\.jsonl"):
        cache.add(0, ROWS, 1.0)
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(UserError, match=r"a\.jsonl: cannot be read"):
        PredictionCache(files.as_path(tmp_path), ["a"], [2])


def test_a_key_depends_on_every_field() -> None:
    original = task()
    keys = {
        cache_key([1], original, split="s"),
        cache_key([2], original, split="s"),
        cache_key([1], original, split="t"),
    }
    for field in dataclasses.fields(original):
        value: Any = getattr(original, field.name)
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
            keys |= {cache_key([1], dataclasses.replace(original, **changed), split="s")}
    assert len(keys) == 3 + len(dataclasses.fields(original)) + 2
    assert cache_key([1], task(), split="s") in keys
