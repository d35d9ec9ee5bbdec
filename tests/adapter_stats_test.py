"""Statistics of adapters against the matrices themselves, made whole."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import pytest

import tiny
from hyper_t5 import adapter_stats as stats
from hyper_t5 import adapters as ad

TASKS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def adapters() -> ad.Adapters:
    """Of every kind at every place; of a prefix the last positions are masked, by the task."""
    made = tiny.random_adapters(tiny.EVERYTHING["zero"], len(TASKS))
    for site in ad.ATTENTION_SITES:
        prefix = made.tree[site]["prefix"]
        n, t, p = prefix["key"].shape[:3]
        prefix["mask"] = np.broadcast_to(np.arange(p) < 3 - np.arange(t)[:, None] % 3, (n, t, p))
    return made


def whole(adapters: ad.Adapters) -> dict[str, np.ndarray]:
    """Each place's matrices [N, T, X, Y], by the definitions in words."""
    made: dict[str, np.ndarray] = {}
    spec = adapters.spec.lora
    assert spec
    for site, parts in adapters.tree.items():
        if site == ad.MEMORY:
            made[site] = np.where(parts["mask"][..., None], parts["states"], 0)
            continue
        for part, leaf in parts.items():
            if part == "prefix":
                for name in ("key", "value"):
                    rows = np.where(leaf["mask"][..., None, None], leaf[name], 0)
                    made[f"{site}.prefix.{name}"] = rows.reshape(*rows.shape[:3], -1)
            elif part == "bottleneck":
                made[f"{site}.bottleneck"] = leaf["down"] @ leaf["up"]
            else:
                product = np.concatenate([leaf["a"] @ leaf["b"], leaf["bias"][:, :, None]], 2)
                made[f"{site}.{part}"] = product * (spec.alpha / spec.rank)
    return made


def test_numbers_of_every_kind(adapters: ad.Adapters) -> None:
    expected, found = whole(adapters), stats.statistics(adapters, TASKS)
    assert found["places"].keys() == expected.keys()
    for place, matrices in expected.items():
        values = np.linalg.svd(matrices.astype(float), compute_uv=False)
        p = values / values.sum(-1, keepdims=True)
        ranks = np.exp(-np.sum(np.where(p > 1e-9, p * np.log(np.maximum(p, 1e-9)), 0), -1)).mean(1)
        norms = np.linalg.norm(matrices.astype(float), axis=(2, 3)).mean(1)
        np.testing.assert_allclose(found["places"][place]["norm"], norms, rtol=1e-5)
        np.testing.assert_allclose(found["places"][place]["effective_rank"], ranks, rtol=1e-3)
    vectors = np.concatenate(
        [np.moveaxis(m, 1, 0).reshape(len(TASKS), -1) for m in expected.values()], 1
    ).astype(float)
    np.testing.assert_allclose(found["norms"], np.linalg.norm(vectors, axis=1), rtol=1e-5)
    for name, rows in (
        ("similarity", vectors),
        ("similarity_centred", vectors - vectors.mean(0)),
    ):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(found[name], unit @ unit.T, atol=1e-5)
    spread = np.square(vectors - vectors.mean(0)).sum() / np.square(vectors).sum()
    assert found["differing"] == pytest.approx(spread, rel=1e-5)
    assert json.loads(json.dumps(found)) == found


def test_a_matrix_of_equal_singular_values_has_its_full_rank() -> None:
    assert stats.effective_rank(np.ones(5)) == pytest.approx(5)
    assert stats.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert stats.effective_rank(np.zeros(3)) == 0


@pytest.mark.filterwarnings("error")
def test_equal_adapters_differ_in_nothing(adapters: ad.Adapters) -> None:
    """As those of a hypermodel that ignores its text; and adapters that are nothing."""
    same = stats.statistics(ad.take(adapters, [1, 1, 1]), TASKS[:3])
    np.testing.assert_allclose(same["similarity"], 1, atol=1e-5)
    assert same["differing"] == 0
    assert not np.any(same["similarity_centred"])
    nothing = stats.statistics(ad.zeros(adapters.spec, tiny.CONFIG, 2), TASKS[:2])
    assert nothing["norms"] == [0, 0]
    assert not np.any(nothing["similarity"])


def test_tasks_are_chosen_evenly_where_memory_is_short(adapters: ad.Adapters) -> None:
    asked: list[int] = []

    def generate(task: int) -> Any:
        asked.append(task)
        return ad.take(adapters, [task % len(TASKS)])

    names = [f"task {i}" for i in range(9)]
    size = sum(x.nbytes for x in jax.tree.leaves(generate(0)))
    asked.clear()
    few = stats.of_tasks(generate, names, largest=3 * size)
    assert asked == [0, 4, 8]
    assert few["tasks"] == ["task 0", "task 4", "task 8"]
    everything = stats.of_tasks(generate, names)
    assert everything["tasks"] == names
    np.testing.assert_allclose(everything["similarity"][4][8], few["similarity"][1][2], atol=1e-5)
