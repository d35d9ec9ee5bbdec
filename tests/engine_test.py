"""Rows that take each other's places decode as they would alone; few programs, few idle places."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import engine
from hyper_t5.decoding import Sampling, decode, sample
from hyper_t5.errors import UserError
from tiny import CONFIG, EVERYTHING, ids, params, random_adapters

STEPS = engine.CACHE + 8  # longer than the cache is at first
TASKS = 3
ROWS = 40


@functools.cache
def some_rows(tasks: int = TASKS) -> tuple[engine.Row, ...]:
    """Rows of ragged length."""
    given = np.asarray(ids(ROWS, 20))
    task = np.random.default_rng(0).integers(0, tasks, ROWS)
    return tuple(engine.Row(i, int(task[i]), [t for t in row if t]) for i, row in enumerate(given))


@functools.cache
def adapters(bias: str = "hf") -> ad.Adapters:
    return random_adapters(EVERYTHING[bias], TASKS)


def source(given: Any, tasks: tuple[int, ...]) -> tuple[ad.Adapters, Any]:
    return ad.take(adapters(), list(tasks)), given


def run(rows: Any, shape: engine.Layout, steps: int = STEPS, **how: Any) -> dict[int, np.ndarray]:
    made = list(engine.decode_rows(CONFIG, params(), rows, source, shape, steps=steps, **how))
    assert sorted(number for number, _ in made) == sorted(row.number for row in rows)
    return dict(made)


def alone(rows: Any, **how: Any) -> dict[int, np.ndarray]:
    """Each task's rows by ``decode``, padded to one length."""
    found: dict[int, np.ndarray] = {}
    for task in {row.task for row in rows}:
        mine = [row for row in rows if row.task == task]
        block = np.zeros((len(rows), max(len(row.ids) for row in rows)), np.int32)
        for line, row in zip(block, mine, strict=False):
            line[: len(row.ids)] = row.ids
        made, _ = decode(CONFIG, params(), jnp.asarray(block), ad.take(adapters(), [task]), **how)
        found |= {row.number: ids for row, ids in zip(mine, np.asarray(made), strict=False)}
    return found


# --------------------------------------------------------------------------------------- the same


@pytest.mark.parametrize("shape", [(3, 2), (4, 1)])
def test_refilled_rows_of_many_tasks_are_what_each_is_alone(shape: engine.Layout) -> None:
    rows = some_rows()
    expected = alone(rows, steps=STEPS)
    assert len({np.count_nonzero(row) for row in expected.values()}) > 2
    work = engine.Work()
    found = run(rows, shape, work=work)
    for number, row in expected.items():
        np.testing.assert_array_equal(found[number], row)
    assert (work.rows, work.read) == (ROWS, ROWS)
    assert work.tokens == sum(np.count_nonzero(row) for row in expected.values())


def test_a_cache_that_gets_longer_keeps_what_each_step_wrote() -> None:
    moving = engine._empty(CONFIG, places=2, steps=10)
    cache = np.zeros((1, 2, 4, 1, 1), np.float32)
    for step in range(13):
        cache[:, :, step % 4] = step
    moving = dataclasses.replace(moving, self_kv=(cache, -cache), index=jnp.int32(13))
    key, value = engine._lengthened(moving, 10).self_kv
    for step in range(9, 13):
        assert (key[:, :, step % 10] == step).all()
        assert (value[:, :, step % 10] == -step).all()


def test_beams_are_those_of_decode() -> None:
    rows, options = some_rows()[:8], {"steps": 6, "beam_size": 2}
    expected = alone(rows, **options)
    found = run(rows, (2, 2), **options)
    for number, row in expected.items():
        np.testing.assert_array_equal(found[number], row)


def test_what_is_drawn_depends_on_the_row_and_the_seed_alone() -> None:
    rows = some_rows()
    drawn = Sampling(temperature=1.0, top_k=5, seed=3)
    found = run(rows, (3, 2), 12, sampling=drawn)
    other = run(rows[::-1][:9], (4, 1), 12, sampling=drawn)
    for number, row in other.items():
        np.testing.assert_array_equal(found[number], row)
    again = run(rows[:9], (4, 1), 12, sampling=Sampling(temperature=1.0, top_k=5, seed=4))
    assert any((found[number] != row).any() for number, row in again.items())


# --------------------------------------------------------------------------------------- the speed


def test_no_place_waits_for_the_longest_row() -> None:
    """Eight tokens drawn alike, of which one is EOS: most rows end soon, few are long."""
    config = dataclasses.replace(CONFIG, vocab_size=8)
    rows = [engine.Row(i, 0, [2 + i % 6, 1]) for i in range(160)]
    work, options = engine.Work(), dict[str, Any](steps=STEPS, sampling=Sampling(temperature=100.0))
    made = engine.decode_rows(
        config, params(config), rows, lambda x, _: (None, x), (1, 8), work=work, **options
    )
    found = dict(made)
    lengths = np.array([np.count_nonzero(found[i]) for i in range(160)])
    assert lengths.max() > 2.5 * lengths.mean()  # what is judged here is uneven
    batches = lengths.reshape(-1, 8)
    waiting = 1 - lengths.sum() / (8 * batches.max(1).sum())
    assert waiting > 0.4
    assert work.idle < waiting / 2


@pytest.mark.slow
def test_few_programs_for_all_lengths() -> None:
    compiled: Any = engine._encode, engine._steps, engine._insert

    def programs() -> list[int]:
        return [function._cache_size() for function in compiled]

    given = np.asarray(ids(90, 60, shortest=20, seed=4))
    rows = [engine.Row(i, i % 2, [t for t in row if t]) for i, row in enumerate(given)]
    lengths = {len(row.ids) for row in rows}
    assert len(lengths) > 30
    before = programs()
    run(rows, (2, 2), 4)
    padded = {engine.padded_length(n) for n in lengths}
    assert len(padded) <= 4
    # Rows take the places of those of the same length, or of a shorter one.
    most = [len(padded), len(padded), 2 * len(padded)]
    made = np.subtract(programs(), before)
    assert (made <= most).all(), made
    run(rows[7:80], (2, 2), 4)
    again = np.subtract(programs(), before)
    assert (again <= most).all(), again
    assert (again[:2] == made[:2]).all()


def test_padded_lengths_are_few_and_near() -> None:
    made = [engine.padded_length(n) for n in range(1, 2049)]
    assert all(size >= n for n, size in enumerate(made, 1))
    assert all(size <= max(engine.SHORTEST, n * 3 / 2) for n, size in enumerate(made, 1))
    assert len(set(made)) == 15


def test_few_rows_of_a_length_go_with_longer_ones() -> None:
    def told(*lengths: int) -> list[tuple[int, int]]:
        rows = [engine.Row(i, 0, [1] * n) for i, n in enumerate(lengths)]
        return [(length, len(members)) for length, members in engine.by_length(rows, 2)]

    assert told(5, 20) == [(24, 2)]
    assert told(5, 5, 20) == [(16, 2), (24, 1)]
    assert told(5, 500) == [(16, 1), (512, 1)]
    assert told() == []


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
def test_slots_for_all_tasks_and_no_more_places_than_rows(
    tasks: int, rows: int, batch: int, expected: engine.Layout
) -> None:
    assert engine.layout(tasks, rows, batch) == expected


# -------------------------------------------------------------------------------------- the drawing


def drawn(sampling: Sampling, logits: list[float], count: int = 4000) -> np.ndarray:
    """How often each token is drawn."""
    many = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    numbers = jnp.arange(count)
    found = sample(many, sampling, jax.random.key(1), numbers, numbers * 0)
    return np.bincount(np.asarray(found), minlength=len(logits)) / count


LOGITS = [0.0, 2.0, 1.0, -1.0]
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum()


@pytest.mark.parametrize(
    ("sampling", "kept", "temperature"),
    [
        (Sampling(1.0), [0, 1, 2, 3], 1.0),
        (Sampling(2.0), [0, 1, 2, 3], 2.0),
        (Sampling(1.0, top_k=2), [1, 2], 1.0),
        (Sampling(1.0, top_p=PROBS[1] - 0.01), [1], 1.0),
        (Sampling(1.0, top_p=PROBS[1] + 0.01), [1, 2], 1.0),
        # Temperature first, then what is kept: flatter, so that more are needed.
        (Sampling(4.0, top_p=PROBS[1] + 0.01), [0, 1, 2], 4.0),
        (Sampling(), [1], 1.0),
    ],
)
def test_what_is_drawn_from_and_how_often(
    sampling: Sampling, kept: list[int], temperature: float
) -> None:
    scaled = np.exp(np.array(LOGITS) / temperature) * np.isin(range(4), kept)
    np.testing.assert_allclose(drawn(sampling, LOGITS), scaled / scaled.sum(), atol=0.03)


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
def test_settings_that_say_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Sampling(**fields)
