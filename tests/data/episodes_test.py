"""Episode sampler: pure batches, no shown example among the rows, counted cuts."""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hyper_t5 import pipeline
from hyper_t5.data.batch import CONCAT, FUSION, SEPARATE, Layout
from hyper_t5.data.episodes import draw_examples
from hyper_t5.data.task_rows import LazyRows, TaskData, TaskRow
from hyper_t5.data.templates import conditioning_rule
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import (
    BYTES,
    make_config,
    make_sampler,
    shown_inputs,
    task_data,
    texts_at_eos,
)

LAYOUTS = [SEPARATE, CONCAT, FUSION]


# ------------------------------------------------------------------------------- batches


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    tasks = [task_data(name) for name in "abcde"]
    sampler, same, other = (
        make_sampler(tasks),
        make_sampler(copy.deepcopy(tasks)),
        make_sampler(tasks, seed=1),
    )
    batches = [sampler.batch(step) for step in range(6)]
    for step in reversed(range(6)):
        repeated = same.batch(step)
        for key, value in batches[step].items():
            np.testing.assert_array_equal(value, repeated[key])
    assert any(np.any(batches[0][key] != other.batch(0)[key]) for key in batches[0])
    assert any(np.any(batches[0][key] != batches[1][key]) for key in batches[0])
    seeds = [
        make_sampler(tasks[:1], seed=seed, tasks_per_batch=1).batch(0)["inputs"] for seed in (0, 1)
    ]
    assert np.any(seeds[0] != seeds[1])
    content = b"".join(batches[3][key].tobytes() for key in sorted(batches[3]))
    assert hashlib.sha256(content).hexdigest()[:16] == "e43b0587bc5477dd", (
        "the stream of batches has changed"
    )
    stream = pipeline.train_batches(make_sampler(tasks), start_step=4)
    np.testing.assert_array_equal(next(stream)["inputs"], batches[4]["inputs"])
    np.testing.assert_array_equal(next(stream)["inputs"], batches[5]["inputs"])


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_processes_make_parts_of_one_batch(layout: Layout, pack: bool) -> None:
    """The global batch is the same for 1, 2, 4 and 8 processes, at any step after a restart."""
    tasks = [task_data(f"task{i}", rows=5 + i) for i in range(11)]
    fields: Any = {"tasks_per_batch": 8, "pack": pack, "input_length": 40}
    for step in (0, 1, 7, 100_003):
        whole = make_sampler(tasks, layout=layout, **fields).batch(step)
        assert ("input_segments" in whole) == pack
        for count in (2, 4, 8):
            restarted = make_sampler(tasks, layout=layout, **fields)
            parts = [restarted.batch(step, process, count) for process in range(count)]
            assert whole.keys() == parts[0].keys()
            for name, array in whole.items():
                np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array)
    with pytest.raises(UserError, match=r"tasks_per_batch=8 cannot be split .* for 3 processes"):
        make_sampler(tasks, layout=layout, **fields).batch(0, 0, 3)


def test_a_process_reads_only_the_rows_of_its_slots() -> None:
    tasks = [task_data(f"task{i}", rows=40) for i in range(8)]
    read: list[str] = []

    def lazy(task: TaskData) -> TaskData:
        def row(number: int) -> TaskRow:
            read.append(task.name)
            return task.rows[number]

        return replace(task, rows=LazyRows(row, range(len(task.rows))))

    fields: Any = {"tasks_per_batch": 8, "examples_per_task": 2, "shots": (1, 1)}
    sampler = make_sampler([lazy(task) for task in tasks], **fields)
    assert not read, "rows were read at the start"
    whole = make_sampler(tasks, **fields).batch(5)
    part = sampler.batch(5, 1, 4)
    np.testing.assert_array_equal(part["inputs"], whole["inputs"][2:4])
    assert sorted(set(read)) == sorted(tasks[i].name for i in whole["tasks"][2:4])
    assert len(read) <= 2 * 4, "more than the two rows of a slot and one or two skipped ones"


def test_tasks_with_very_many_rows_draw_without_repetition() -> None:
    rows = LazyRows(lambda i: TaskRow(f"{i}", f"{i}", ("x",)), range(10**9))
    task = TaskData("big", ("Say.",), (), rows)
    fields: Any = {"tasks_per_batch": 1, "examples_per_task": 50, "shots": (2, 2)}
    inputs, repeated = (make_sampler([task], **fields).batch(3)["inputs"][0] for _ in range(2))
    np.testing.assert_array_equal(inputs, repeated)
    assert len({tuple(row) for row in inputs}) == 50


def test_shapes_dtypes_and_eos() -> None:
    batch = make_sampler([task_data(name) for name in "abcd"]).batch(0)
    assert {key: value.shape for key, value in batch.items()} == {
        "tasks": (3,),
        "hyper_inputs": (3, 160),
        "inputs": (3, 4, 24),
        "targets": (3, 4, 12),
    }
    assert {value.dtype for value in batch.values()} == {np.dtype(np.int32)}
    for key in ("hyper_inputs", "inputs", "targets"):
        for row in batch[key].reshape(-1, batch[key].shape[-1]):
            length = int(np.sum(row != 0))
            assert row[length - 1] == EOS_ID
            assert not row[length:].any()
    names = {BYTES.decode(row)[len("Definition of ")] for row in batch["hyper_inputs"]}
    assert len(names) == 3, "a batch repeats a task although there are enough"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_indices_name_the_task_of_each_slot(layout: Layout) -> None:
    rates = {"d": 2.0, "b": 1.0, "a": 1.0}
    sampler = make_sampler([task_data(name, rate=rate) for name, rate in rates.items()], 0, layout)
    assert sampler.names == ("d", "b", "a")
    drawn = set()
    for step in range(20):
        batch = sampler.batch(step)
        drawn.update(batch["tasks"].tolist())
        for task, rows in zip(batch["tasks"], batch["inputs"], strict=True):
            queries = [BYTES.decode(row).rpartition("\nInput: ")[2] for row in rows]
            assert all(query.startswith(f"{sampler.names[task]} row ") for query in queries)
    assert drawn == {0, 1, 2}


# ------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("examples", [0, 1, 3])
@pytest.mark.parametrize("use_instruction", [True, False])
def test_a_shown_example_is_never_a_row(examples: int, use_instruction: bool) -> None:
    tasks = [task_data("a", 2, examples), task_data("b", 5, examples)]
    # An example that equals a row but for whitespace is the same input.
    tasks[1] = replace(tasks[1], examples=((" b  row 1", "x"), *tasks[1].examples))
    sampler = make_sampler(tasks, tasks_per_batch=2, use_instruction=use_instruction, shots=(0, 3))
    counts = set()
    for step in range(60):
        batch = sampler.batch(step)
        for hyper, inputs in zip(batch["hyper_inputs"], batch["inputs"], strict=True):
            keys = [" ".join(text.split()) for text in shown_inputs(hyper)]
            counts.add(len(keys))
            assert len(set(keys)) == len(keys)
            assert not set(keys) & {BYTES.decode(row) for row in inputs}
            assert use_instruction or keys
    assert counts == ({0, 1, 2, 3} if use_instruction else {1, 2, 3})
    assert sampler.stats["shown_examples"] > 0
    assert (sampler.stats["missing_examples"] > 0) == (examples < 2)


def test_shown_examples_come_from_pool_and_rows_alike() -> None:
    """A pool of few examples alone would be memorized; here it has 2 of 9 candidates."""
    task = task_data("a", rows=8, examples=2)
    rule = conditioning_rule(make_config(shots=(3, 3), use_instruction=False).data)
    counts: Counter[str] = Counter()
    for seed in range(3000):
        shown = draw_examples(task, 3, rule, np.random.default_rng(seed), exclude="a row 0")
        assert len({text for text, _ in shown}) == 3
        counts.update(text for text, _ in shown)
    assert "a row 0" not in counts
    assert len(counts) == 9
    assert max(abs(count / 3000 - 3 / 9) for count in counts.values()) < 0.04


def test_distinct_shown_examples_are_counted() -> None:
    sampler = make_sampler([task_data("a", rows=8)], tasks_per_batch=1, shots=(2, 2))
    sampler.batch(0)
    assert sampler.stats["distinct_examples"] == 2
    for step in range(1, 60):
        sampler.batch(step)
    assert sampler.stats["shown_examples"] == 120
    assert sampler.stats["distinct_examples"] == 3 + 8


def test_shots_are_uniform_and_the_instruction_is_optional() -> None:
    sampler = make_sampler([task_data("a")], tasks_per_batch=1, shots=(1, 2), use_instruction=False)
    texts = [sampler.batch(step)["hyper_inputs"][0] for step in range(400)]
    counts = [len(shown_inputs(ids)) for ids in texts]
    assert 150 < counts.count(1) < 250
    assert counts.count(1) + counts.count(2) == 400
    assert not BYTES.decode(texts[0]).startswith("Definition")


def test_every_reference_and_wording_is_drawn() -> None:
    tasks = [task_data("a", instructions=("One.", "Two."))]
    sampler = make_sampler(tasks, tasks_per_batch=1, shots=(0, 0))
    batches = [sampler.batch(step) for step in range(40)]
    assert {BYTES.decode(b["hyper_inputs"][0]) for b in batches} == {"One.", "Two."}
    targets = {BYTES.decode(row) for b in batches for row in b["targets"][0]}
    assert targets == {f"{letter}{i}" for letter in "ab" for i in range(8)}


def test_tasks_are_drawn_by_their_rates() -> None:
    tasks = [task_data("a", rate=3.0), task_data("b", rate=1.0)]
    sampler = make_sampler(tasks, tasks_per_batch=1, shots=(0, 0))
    drawn = [sampler.names[sampler.batch(step)["tasks"][0]] for step in range(400)]
    assert 260 < drawn.count("a") < 340


# ------------------------------------------------------------------------------- conditioning


def kind_of(ids: np.ndarray) -> str:
    """Return what a conditioning of template 'labelled' shows."""
    instruction, shown = not BYTES.decode(ids).startswith("\nInput: "), shown_inputs(ids)
    return "both" if instruction and shown else "instruction" if instruction else "examples"


def test_conditioning_is_mixed_by_rates_for_each_episode() -> None:
    tasks = [task_data(name) for name in "abc"]
    fields: dict[str, Any] = {"conditioning": "instruction=1,examples=2,both=1", "shots": (0, 3)}
    sampler = make_sampler(tasks, **fields)
    counts: Counter[str] = Counter()
    shots: Counter[int] = Counter()
    for step in range(200):
        for ids in sampler.batch(step)["hyper_inputs"]:
            kind = kind_of(ids)
            counts[kind] += 1
            shots[len(shown_inputs(ids))] += kind != "instruction"
    assert 270 < counts["examples"] < 330  # of 600, half of which are expected
    assert 120 < counts["instruction"] < 180
    assert 120 < counts["both"] < 180
    assert not shots[0]
    assert all(shots[count] > 100 for count in (1, 2, 3))
    # A function of seed, step and slot: another sampler has the same batch, in shares too.
    again = make_sampler(tasks, **fields)
    for step in (7, 3):
        whole = sampler.batch(step)
        parts = [again.batch(step, share, 3) for share in range(3)]
        assert all(np.array_equal(whole[k], np.concatenate([p[k] for p in parts])) for k in whole)


def test_one_kind_of_conditioning_is_that_rule() -> None:
    tasks = [task_data("a")]
    mixed = make_sampler(tasks, tasks_per_batch=1, shots=(0, 2), conditioning="examples=1")
    plain = make_sampler(tasks, tasks_per_batch=1, shots=(0, 2), use_instruction=False)
    assert all(
        np.array_equal(mixed.batch(step)["hyper_inputs"], plain.batch(step)["hyper_inputs"])
        for step in range(20)
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"conditioning": "exmples=1"}, "data.conditioning.*examples"),
        ({"conditioning": "examples"}, "'examples' is not KIND=RATE"),
        ({"conditioning": "both=0"}, "'both=0' is not KIND=RATE"),
        ({"conditioning": "both=1,both=2"}, "'both=2' is not KIND=RATE"),
        ({"conditioning": "both=1", "shots": (0, 0)}, "raise the second number of data.shots"),
        ({"conditioning": "both=1", "variant": "def"}, "set data.variant to ''"),
    ],
)
def test_conditioning_that_cannot_be_drawn_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_sampler([task_data("a")], tasks_per_batch=1, **fields)


# ------------------------------------------------------------------------------- lengths


def test_cuts_are_counted_and_keep_eos() -> None:
    sampler = make_sampler([task_data("a")], tasks_per_batch=1, input_length=4, target_length=2)
    batch = sampler.batch(0)
    start = BYTES.encode("a row 0")[:3]
    assert batch["inputs"].tolist() == [[[*start, EOS_ID]] * 4]
    starts = [[*BYTES.encode(letter), EOS_ID] for letter in "ab"]
    assert all(target in starts for target in batch["targets"][0].tolist())
    assert sampler.stats["truncated_inputs"] == sampler.stats["truncated_targets"] == 4
    tasks = [task_data("a")]
    fields: dict[str, Any] = {"tasks_per_batch": 1, "shots": (2, 2)}
    sampler = make_sampler(tasks, hyper_length=50, **fields)
    [ids], [whole] = (s.batch(0)["hyper_inputs"] for s in (sampler, make_sampler(tasks, **fields)))
    assert (sampler.stats["shown_examples"], sampler.stats["dropped_examples"]) == (1, 1)
    length = int(np.sum(ids > 0))
    assert ids[length - 1] == EOS_ID
    np.testing.assert_array_equal(ids[: length - 1], whole[: length - 1])
    assert len(shown_inputs(ids)) == 1


LONG = task_data("a", instructions=("x" * 160,))


@pytest.mark.parametrize(
    ("tasks", "fields", "message"),
    [
        ([], {}, "list of training tasks is empty"),
        (
            [task_data("a")],
            {"shots": (0, 0), "use_instruction": False},
            "leaves nothing to condition on",
        ),
        ([task_data("a")], {"shots": (2, 1)}, "fewest, most"),
        ([task_data("a", 1, 0)], {"use_instruction": False}, "task a has no example to show"),
        (
            [task_data("a")],
            {"use_instruction": False, "hyper_length": 20},
            "task a has no example to show",
        ),
        ([task_data("b"), LONG], {}, r"a: the instruction alone .* data\.hyper_length"),
    ],
)
def test_impossible_episodes_are_refused_at_the_start(
    tasks: list[TaskData], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_sampler(tasks, **fields)


def test_long_instructions_are_truncated_on_request() -> None:
    sampler = make_sampler([LONG], on_long_instruction="truncate")
    sampler.batch(0)
    assert sampler.stats["truncated_conditionings"] == 3


# ------------------------------------------------------------------------------- layouts


def test_layout_concat_prepends_the_same_conditioning() -> None:
    tasks = [task_data(name) for name in "abcd"]
    separate, concat = make_sampler(tasks), make_sampler(tasks, layout=CONCAT)
    for step in range(5):
        batch, joined = separate.batch(step), concat.batch(step)
        assert joined["hyper_inputs"].tolist() == [[EOS_ID]] * 3
        assert joined["inputs"].shape == (3, 4, 160 + 24)
        np.testing.assert_array_equal(batch["targets"], joined["targets"])
        for slot in range(3):
            text = BYTES.decode(batch["hyper_inputs"][slot])
            for row, whole in zip(batch["inputs"][slot], joined["inputs"][slot], strict=True):
                assert BYTES.decode(whole) == f"{text}\nInput: {BYTES.decode(row)}"
    full = make_sampler(
        [task_data("a")], layout=CONCAT, hyper_length=17, input_length=8, shots=(0, 0)
    )
    assert (full.batch(0)["inputs"][..., -1] == EOS_ID).all()
    assert full.stats["truncated_inputs"] == 12


@pytest.mark.parametrize("use_instruction", [True, False])
def test_layout_fusion_ends_every_part_in_eos(use_instruction: bool) -> None:
    tasks = [task_data(name) for name in "abcd"]
    fields: dict[str, Any] = {"use_instruction": use_instruction, "shots": (0, 3)}
    separate, fusion = (make_sampler(tasks, layout=x, **fields) for x in (SEPARATE, FUSION))
    counts = set()
    for step in range(10):
        batch, ended = separate.batch(step), fusion.batch(step)
        for key in ("tasks", "inputs", "targets"):
            np.testing.assert_array_equal(batch[key], ended[key])
        assert ended["hyper_inputs"].shape == batch["hyper_inputs"].shape
        for ids, ended_ids in zip(batch["hyper_inputs"], ended["hyper_inputs"], strict=True):
            texts = texts_at_eos(ended_ids)
            assert texts[0].startswith("Definition") == use_instruction
            assert all(text.startswith("\nInput: ") for text in texts[use_instruction:])
            assert "".join(texts) == BYTES.decode(ids)
            counts.add(len(texts) - use_instruction)
    assert counts == ({0, 1, 2, 3} if use_instruction else {1, 2, 3})
    assert fusion.stats == separate.stats


def test_the_sampler_is_faster_than_training() -> None:
    sampler = make_sampler([task_data(str(i), 100) for i in range(50)], tasks_per_batch=8)
    start = time.perf_counter()
    for step in range(50):
        sampler.batch(step)
    # 10,000 episodes/s on a quiet core; a training step needs a few hundred.
    assert 400 / (time.perf_counter() - start) > 500
