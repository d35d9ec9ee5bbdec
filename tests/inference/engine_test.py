"""Decoding engine: outputs equal those of separate decoding; few compiles, few idle slots."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5.inference import engine
from hyper_t5.t5.decoding import Sampling, decode, sample
from hyper_t5.utils.errors import UserError
from tests.support.tiny_model import CONFIG, EVERYTHING, ids, params, random_adapters

STEPS = engine.CACHE + 8  # longer than the cache is at first
TASKS = 3
ROWS = 40


@functools.cache
def some_rows(tasks: int = TASKS) -> tuple[engine.DecodeRow, ...]:
    """Rows of ragged length."""
    padded = np.asarray(ids(ROWS, 20))
    task = np.random.default_rng(0).integers(0, tasks, ROWS)
    return tuple(
        engine.DecodeRow(i, int(task[i]), [t for t in row if t]) for i, row in enumerate(padded)
    )


@functools.cache
def adapters(bias: str = "hf") -> ad.Adapters:
    return random_adapters(EVERYTHING[bias], TASKS)


def source(block: Any, tasks: tuple[int, ...]) -> tuple[ad.Adapters, Any]:
    return ad.take(adapters(), list(tasks)), block


def run(
    rows: Any, layout: engine.BatchLayout, steps: int = STEPS, **options: Any
) -> dict[int, np.ndarray]:
    """Decode rows with the engine; return the ids by row number."""
    pairs = list(engine.decode_rows(CONFIG, params(), rows, source, layout, steps=steps, **options))
    assert sorted(number for number, _ in pairs) == sorted(row.number for row in rows)
    return dict(pairs)


def decode_separately(rows: Any, **options: Any) -> dict[int, np.ndarray]:
    """Decode each task's rows with ``decode``, padded to one length."""
    outputs: dict[int, np.ndarray] = {}
    for task in {row.task for row in rows}:
        mine = [row for row in rows if row.task == task]
        block = np.zeros((len(rows), max(len(row.ids) for row in rows)), np.int32)
        for line, row in zip(block, mine, strict=False):
            line[: len(row.ids)] = row.ids
        task_adapters = ad.take(adapters(), [task])
        decoded, _ = decode(CONFIG, params(), jnp.asarray(block), task_adapters, **options)
        outputs |= {row.number: ids for row, ids in zip(mine, np.asarray(decoded), strict=False)}
    return outputs


# ---------------------------------------------------------------------------------------- outputs


@pytest.mark.parametrize("layout", [(3, 2), (4, 1)])
def test_continuous_batching_equals_separate_decoding(layout: engine.BatchLayout) -> None:
    rows = some_rows()
    expected = decode_separately(rows, steps=STEPS)
    assert len({np.count_nonzero(row) for row in expected.values()}) > 2
    stats = engine.DecodeStats()
    actual = run(rows, layout, stats=stats)
    for number, row in expected.items():
        np.testing.assert_array_equal(actual[number], row)
    assert stats.rows == ROWS
    assert stats.tokens == sum(np.count_nonzero(row) for row in expected.values())


def test_a_longer_cache_keeps_the_last_steps() -> None:
    state = engine._empty(CONFIG, slots=2, steps=10)
    cache = np.zeros((1, 2, 4, 1, 1), np.float32)
    for step in range(13):
        cache[:, :, step % 4] = step
    state = dataclasses.replace(state, self_kv=(cache, -cache), index=jnp.int32(13))
    key, value = engine._grow_cache(state, 10).self_kv
    for step in range(9, 13):
        assert (key[:, :, step % 10] == step).all()
        assert (value[:, :, step % 10] == -step).all()


def test_beams_equal_those_of_decode() -> None:
    rows, options = some_rows()[:8], {"steps": 6, "beam_size": 2}
    expected = decode_separately(rows, **options)
    actual = run(rows, (2, 2), **options)
    for number, row in expected.items():
        np.testing.assert_array_equal(actual[number], row)


def test_samples_depend_on_row_and_seed_only() -> None:
    rows = some_rows()
    sampling = Sampling(temperature=1.0, top_k=5, seed=3)
    actual = run(rows, (3, 2), sampling=sampling)
    other = run(rows[::-1][:9], (4, 1), sampling=sampling)
    for number, row in other.items():
        np.testing.assert_array_equal(actual[number], row)
    again = run(rows[:9], (4, 1), sampling=Sampling(temperature=1.0, top_k=5, seed=4))
    assert any((actual[number] != row).any() for number, row in again.items())
    twins = [dataclasses.replace(rows[0], number=100 + i) for i in range(8)]
    samples = run(twins, (4, 1), sampling=sampling)
    assert len({row.tobytes() for row in samples.values()}) == 8


# ------------------------------------------------------------------------------------------ speed


def test_no_slot_waits_for_the_longest_row() -> None:
    """One of eight equally likely tokens is EOS: most rows end soon, few are long."""
    config = dataclasses.replace(CONFIG, vocab_size=8)
    rows = [engine.DecodeRow(i, 0, [2 + i % 6, 1]) for i in range(160)]
    stats, options = (
        engine.DecodeStats(),
        dict[str, Any](steps=STEPS, sampling=Sampling(temperature=100.0)),
    )
    outputs = engine.decode_rows(
        config, params(config), rows, lambda x, _: (None, x), (1, 8), stats=stats, **options
    )
    by_number = dict(outputs)
    lengths = np.array([np.count_nonzero(by_number[i]) for i in range(160)])
    assert lengths.max() > 2.5 * lengths.mean()  # uneven lengths
    batches = lengths.reshape(-1, 8)
    waiting = 1 - lengths.sum() / (8 * batches.max(1).sum())
    assert waiting > 0.4
    assert stats.idle < waiting / 2


@pytest.mark.slow
def test_all_lengths_share_few_programs() -> None:
    compiled: Any = engine.encode_rows, engine._steps, engine._insert

    def programs() -> list[int]:
        return [function._cache_size() for function in compiled]

    block = np.asarray(ids(90, 60, shortest=20, seed=4))
    rows = [engine.DecodeRow(i, i % 2, [t for t in row if t]) for i, row in enumerate(block)]
    lengths = {len(row.ids) for row in rows}
    assert len(lengths) > 30
    before = programs()
    run(rows, (2, 2), 4)
    padded = {engine.padded_length(n) for n in lengths}
    assert len(padded) <= 4
    # Rows replace rows of the same or of a shorter length.
    most = [len(padded), len(padded), 2 * len(padded)]
    first = np.subtract(programs(), before)
    assert (first <= most).all(), first
    run(rows[7:80], (2, 2), 4)
    again = np.subtract(programs(), before)
    assert (again <= most).all(), again
    assert (again[:2] == first[:2]).all()


def test_bucket_lengths_are_few_and_close() -> None:
    sizes = [engine.padded_length(n) for n in range(1, 2049)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert all(size <= max(engine.SHORTEST, n * 3 / 2) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 15


def test_few_rows_of_a_length_join_the_next_bucket() -> None:
    def buckets(*lengths: int) -> list[tuple[int, int]]:
        rows = [engine.DecodeRow(i, 0, [1] * n) for i, n in enumerate(lengths)]
        return [(length, len(members)) for length, members in engine.by_length(rows, 2)]

    assert buckets(5, 20) == [(24, 2)]
    assert buckets(5, 5, 20) == [(16, 2), (24, 1)]
    assert buckets(5, 500) == [(16, 1), (512, 1)]
    assert buckets() == []


@pytest.mark.parametrize(
    ("tasks", "rows", "batch", "expected"),
    [
        (1, 100, 32, (1, 32)),
        (1, 3, 32, (1, 4)),
        (3, 100, 32, (4, 8)),
        (3, 100, 6, (3, 2)),
        (8, 100, 32, (8, 4)),
        (20, 100, 32, (32, 1)),
        (1000, 5000, 32, (32, 1)),
    ],
)
def test_layout_has_a_slot_for_each_task_and_at_most_one_per_row(
    tasks: int, rows: int, batch: int, expected: engine.BatchLayout
) -> None:
    assert engine.choose_layout(tasks, rows, batch) == expected


# --------------------------------------------------------------------------------------- sampling


def frequencies(sampling: Sampling, logits: list[float], count: int = 4000) -> np.ndarray:
    """Return how often each token is sampled, by many rows for some steps each."""
    many = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    steps = count // 20
    rows, step = jnp.arange(count) // steps, jnp.arange(count) % steps
    tokens = sample(many, sampling, jax.random.key(1), rows, step)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


LOGITS = [0.0, 2.0, 1.0, -1.0]
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum()


@pytest.mark.parametrize(
    ("sampling", "candidates", "temperature"),
    [
        (Sampling(1.0), [0, 1, 2, 3], 1.0),
        (Sampling(2.0), [0, 1, 2, 3], 2.0),
        (Sampling(1.0, top_k=2), [1, 2], 1.0),
        (Sampling(1.0, top_p=PROBS[1] - 0.01), [1], 1.0),
        (Sampling(1.0, top_p=PROBS[1] + 0.01), [1, 2], 1.0),
        # Temperature comes before top_p: a flatter distribution needs more candidates.
        (Sampling(4.0, top_p=PROBS[1] + 0.01), [0, 1, 2], 4.0),
        (Sampling(), [1], 1.0),
    ],
)
def test_sampling_frequencies(
    sampling: Sampling, candidates: list[int], temperature: float
) -> None:
    scaled = np.exp(np.array(LOGITS) / temperature) * np.isin(range(4), candidates)
    np.testing.assert_allclose(frequencies(sampling, LOGITS), scaled / scaled.sum(), atol=0.03)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1.0, "top_k": 2, "top_p": 0.5},
        {"temperature": 1.0, "top_p": 1.5},
        {"top_k": 3},
    ],
)
def test_invalid_sampling_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Sampling(**fields)
