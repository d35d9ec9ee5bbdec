"""Packed rows: nothing is lost, and everything is computed as with one example a row."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hyper_t5 import config as config_lib
from hyper_t5 import runs, t5
from hyper_t5.data import batch as batch_lib
from hyper_t5.data import packing
from hyper_t5.data.batch import CONCAT, FUSION, SEPARATE, SIDES, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.training import losses
from hyper_t5.training import step as step_lib
from hyper_t5.utils.errors import UserError
from tests.support import tiny_model, tiny_runs

LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), max_size=20)


def packed_batch(tasks: int, rows: int, input_length: int, target_length: int) -> Any:
    """Return an empty packed batch."""
    config = tiny_runs.make_config(backbone__path="x", data__pack=True).data
    config.examples_per_task = rows
    config.input_length, config.target_length = input_length, target_length
    return batch_lib.zeros(batch_lib.batch_spec(config, SEPARATE, tasks=tasks))


def segments(batch: Mapping[str, np.ndarray], slot: int) -> Iterator[tuple[int, int]]:
    """Yield (row, segment) of each example of a task."""
    for row, numbers in enumerate(batch["target_segments"][slot]):
        for segment in range(1, int(numbers.max()) + 1):
            yield row, segment


def unpack(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the examples one a row: inputs [T, E, Li], targets [T, E, Lt], E the most of a task.

    Tasks with fewer have empty rows at the end, which count nothing in the loss.
    """
    examples = [list(segments(batch, slot)) for slot in range(len(batch["inputs"]))]
    most = max(map(len, examples))
    unpacked = {name: batch[name] for name in ("tasks", "hyper_inputs") if name in batch}
    for side in SIDES:
        packed, numbers = batch[f"{side}s"], batch[f"{side}_segments"]
        array = unpacked[f"{side}s"] = np.zeros((len(examples), most, packed.shape[-1]), np.int32)
        for slot, of_task in enumerate(examples):
            for index, (row, segment) in enumerate(of_task):
                ids = packed[slot, row][numbers[slot, row] == segment]
                array[slot, index, : len(ids)] = ids
    return unpacked


@given(LENGTHS, st.integers(1, 3))
def test_packed_examples_are_recovered(lengths: list[tuple[int, int]], rows: int) -> None:
    bins = packing.Bins(rows, 16, 8)
    examples = [
        (np.arange(a, dtype=np.int32) + 100 * i + 2, np.arange(b, dtype=np.int32) + 100 * i + 52)
        for i, (a, b) in enumerate(lengths)
    ]
    added = [example for example in examples if bins.add(*example)]
    batch = packed_batch(1, rows, 16, 8)
    bins.fill(batch, 0)
    assert batch_lib.example_count(batch) == len(added)
    for side in SIDES:
        numbers, positions = batch[f"{side}_segments"], batch[f"{side}_positions"]
        assert ((batch[f"{side}s"] > 0) == (numbers > 0)).all()
        starts = np.diff(numbers, axis=-1, prepend=0) > 0
        assert (positions[starts] == 0).all()
        inside = (numbers > 0) & ~starts
        assert (positions[inside] == np.roll(positions, 1, -1)[inside] + 1).all()
    if added:
        unpacked = unpack(batch)
        assert unpacked["inputs"].shape == (1, len(added), 16)
        pairs = {
            (tuple(x[x > 0]), tuple(y[y > 0]))
            for x, y in zip(unpacked["inputs"][0], unpacked["targets"][0], strict=True)
        }
        assert pairs == {(tuple(x), tuple(y)) for x, y in added}


def random_packed_batch() -> dict[str, np.ndarray]:
    """Return two tasks of two rows with several random examples each, of the tiny vocabulary."""
    rng = np.random.default_rng(0)
    batch = packed_batch(2, 2, 14, 10)
    for task in range(2):
        bins = packing.Bins(2, 14, 10)
        for _ in range(6):
            pair = [rng.integers(2, 60, rng.integers(1, n), dtype=np.int32) for n in (6, 4)]
            bins.add(*(np.append(ids, np.int32(1)) for ids in pair))
        bins.fill(batch, task)
    return batch


@pytest.mark.parametrize("bias", tiny_model.EVERYTHING)
def test_every_adapter_has_the_same_logits_packed(bias: str) -> None:
    batch = random_packed_batch()
    adapters = tiny_model.random_adapters(tiny_model.EVERYTHING[bias], 2)

    def logits(batch: dict[str, np.ndarray]) -> np.ndarray:
        names = batch.keys() - {"tasks", "hyper_inputs"}
        rows = {k: jnp.asarray(batch[k].reshape(-1, batch[k].shape[-1])) for k in names}
        apply = functools.partial(t5.T5(tiny_model.CONFIG).apply, {"params": tiny_model.params()})
        return np.asarray(apply(adapters=adapters, **rows)).reshape(*batch["targets"].shape, -1)

    packed, unpacked = logits(batch), logits(unpack(batch))
    for slot in range(2):
        examples = list(segments(batch, slot))
        assert len(examples) > 3
        for index, (row, segment) in enumerate(examples):
            actual = packed[slot, row][batch["target_segments"][slot, row] == segment]
            expected = unpacked[slot, index][: len(actual)]
            np.testing.assert_allclose(actual, expected, atol=2e-5)


def word_tasks() -> list[TaskData]:
    """Return four tasks whose examples differ in length, of words of the embedded suite."""
    letters = "abcdefghijklmnopqrstuvwxyz"

    def row(i: int, index: int) -> TaskRow:
        text = " ".join(letters[(i + j) % 26] for j in range(1 + (i * 5 + index) % 4))
        return TaskRow(f"{i}", text, (text[-1] if i % 2 else f"{text[0]} {text[-1]}",))

    return [
        TaskData(name, (f"{name} the letters.",), (), tuple(row(i, index) for i in range(12)))
        for index, name in enumerate(("copy", "swap", "last", "first"))
    ]


SYSTEMS: dict[str, dict[str, Any]] = {
    "hyper_prefix": {
        "hypermodel__reader": "decoder_queries",
        "adapter__prefix_sites": ("enc_self", "dec_self", "dec_cross"),
    },
    "hyper_lora_plus": {},
    "hint": {},
    "fid_icl": {},
    "concat": {"data__variant": "def_pos_1"},
    "shared_bottleneck": {},
}


@pytest.mark.parametrize("system", tiny_runs.marked(SYSTEMS))
def test_losses_and_gradients_are_the_same_packed(system: str) -> None:
    lengths: Any = {"data__pack": True, "data__input_length": 24, "data__target_length": 12}
    config = tiny_runs.make_config(
        system=system, backbone__path="elsewhere", **lengths, **SYSTEMS[system]
    )
    config.backbone.path = ""  # random
    m, backbone, trained, frozen = runs.init_run(config)
    sampler = EpisodeSampler(word_tasks(), backbone.vocab, config.data, 0, m.system.layout)
    batch = sampler.batch(0)
    unpacked = unpack(batch)
    assert batch["inputs"].shape[1] == 2
    assert unpacked["inputs"].shape[1] > 4, "nothing was packed"

    def gradient(batch: Any) -> Any:
        def loss(trained: Any) -> Any:
            return step_lib.loss_sums(m, trained, frozen, batch, None)

        return jax.jit(jax.grad(loss, has_aux=True))(trained)

    (actual, sums), (expected, expected_sums) = gradient(batch), gradient(unpacked)
    assert sums["tokens"] > 0
    for name in sums:
        np.testing.assert_allclose(sums[name], expected_sums[name], rtol=1e-5, err_msg=name)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * largest)


def test_exact_match_is_counted_by_example() -> None:
    """Of three examples in a packed row the second has a wrong token."""
    targets = jnp.array([[5, 1, 6, 1, 7, 1, 0]])
    segments = jnp.array([[1, 1, 2, 2, 3, 3, 0]])
    likeliest = jnp.array([[5, 1, 9, 1, 7, 1, 4]])
    logits = 20.0 * jax.nn.one_hot(likeliest, 10)
    sums = losses.token_loss(logits, targets, targets > 0, segments=segments)
    assert (int(sums["rows"]), int(sums["exact"]), int(sums["correct"])) == (3, 2, 5)


def test_rows_are_full_and_hold_no_shown_example() -> None:
    config = tiny_runs.make_config(backbone__path="x", data__pack=True, data__input_length=24).data
    vocab = tiny_runs.vocabulary()
    sampler = EpisodeSampler(word_tasks(), vocab, config, 0)
    for step in range(20):
        batch = sampler.batch(step)
        for ids, inputs in zip(batch["hyper_inputs"], unpack(batch)["inputs"], strict=True):
            conditioning = vocab.decode(ids.tolist()) + "\n"
            texts = [text for row in inputs if (text := vocab.decode(row[row > 0].tolist()))]
            assert len(texts) == len(set(texts)), "a repeated row"
            assert not any(f"Input: {text}\n" in conditioning for text in texts)
    assert sampler.stats["examples"] > 2.5 * sampler.stats["rows"]


@pytest.mark.parametrize("layout", [SEPARATE, CONCAT, FUSION])
def test_only_examples_in_the_batch_are_counted(layout: Layout) -> None:
    fields: dict[str, Any] = {"data__pack": True, "data__target_length": 2, "data__input_length": 5}
    config = tiny_runs.make_config(backbone__path="x", **fields).data
    if layout.in_inputs:
        config.concat_length = 30
    sampler = EpisodeSampler(word_tasks(), tiny_runs.vocabulary(), config, 0, layout)
    examples = sum(batch_lib.example_count(sampler.batch(step)) for step in range(10))
    stats = sampler.stats
    assert stats["examples"] == examples
    assert 0 < stats["truncated_targets"] < examples
    assert stats["shown_examples"] <= 2 * examples


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "hyperdecoder"}, "has adapters for each example"),
        ({"stage": "hyperpretrain"}, "is for tasks"),
    ],
)
def test_packing_is_refused_where_it_cannot_be(fields: dict[str, Any], message: str) -> None:
    config = tiny_runs.make_config(backbone__path="x", **fields)
    config.data.pack = True
    with pytest.raises(UserError, match=f"data.pack=True.*{message}"):
        config_lib.validate(config)
