"""Held-out tasks as ids: fixed rows and examples, in every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hyper_t5.data.batch import CONCAT, FUSION
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.templates import format_example
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import BYTES, make_config, task_data, texts_at_eos


def test_rows_and_examples_are_the_first_ones() -> None:
    # The first example is also an evaluated row: another one is shown in its place.
    task = task_data("a", examples=1, category="k")
    task = replace(task, examples=(("a row 1", "x"), *task.examples))
    config = make_config()
    [separate] = build_eval_tasks([task], BYTES, config)
    assert (separate.name, separate.category, separate.instruction) == (
        "a",
        "k",
        "Definition of a.",
    )
    assert separate.ids == tuple(f"a-row-{i}" for i in range(5))
    assert separate.shown == (("a shown 0", "s0"), ("a row 5", "a5"))
    assert separate.references[2] == ("a2", "b2")
    assert [BYTES.decode(row) for row in separate.inputs] == list(separate.texts)
    texts = ["Definition of a.", *map(format_example, separate.shown)]
    assert BYTES.decode(separate.hyper_ids) == "".join(texts)
    assert separate.hyper_ids.shape == (160,)

    [concat] = build_eval_tasks([task], BYTES, config, CONCAT)
    assert (concat.hyper_ids.tolist(), concat.inputs.shape) == ([EOS_ID], (5, 184))
    assert BYTES.decode(concat.inputs[0]) == "".join(texts) + "\nInput: a row 0"

    [fusion] = build_eval_tasks([task], BYTES, config, FUSION)
    assert texts_at_eos(fusion.hyper_ids) == texts
    np.testing.assert_array_equal(fusion.inputs, separate.inputs)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match="list of tasks to evaluate is empty"):
        build_eval_tasks([], BYTES, make_config())
