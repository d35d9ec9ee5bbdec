"""Statistics of adapters, against the full matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5.evaluation import adapter_stats as stats
from tests.support import tiny_model

TASKS = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def adapters() -> ad.Adapters:
    """Adapters of every kind at every site; the last prefix positions are masked, by task."""
    adapters = tiny_model.random_adapters(tiny_model.EVERYTHING["zero"], len(TASKS))
    for site in ad.ATTENTION_SITES:
        prefix = adapters.tree[site]["prefix"]
        n, t, p = prefix["key"].shape[:3]
        prefix["mask"] = np.broadcast_to(np.arange(p) < 3 - np.arange(t)[:, None] % 3, (n, t, p))
    return adapters


def full_matrices(adapters: ad.Adapters) -> dict[str, np.ndarray]:
    """Return the matrices [N, T, X, Y] that the adapters add, by site and part."""
    matrices: dict[str, np.ndarray] = {}
    spec = adapters.spec.lora
    assert spec
    for site, parts in adapters.tree.items():
        if site == ad.MEMORY:
            matrices[site] = np.where(parts["mask"][..., None], parts["states"], 0)
            continue
        for part, leaf in parts.items():
            if part == "prefix":
                for name in ("key", "value"):
                    rows = np.where(leaf["mask"][..., None, None], leaf[name], 0)
                    matrices[f"{site}.prefix.{name}"] = rows.reshape(*rows.shape[:3], -1)
            elif part == "bottleneck":
                matrices[f"{site}.bottleneck"] = leaf["down"] @ leaf["up"]
            else:
                product = np.concatenate([leaf["a"] @ leaf["b"], leaf["bias"][:, :, None]], 2)
                matrices[f"{site}.{part}"] = product * (spec.alpha / spec.rank)
    return matrices


def test_statistics_equal_their_definitions(adapters: ad.Adapters) -> None:
    expected, actual = full_matrices(adapters), stats.statistics(adapters, TASKS)
    assert actual["places"].keys() == expected.keys()
    for name, matrices in expected.items():
        values = np.linalg.svd(matrices.astype(float), compute_uv=False)
        p = values / values.sum(-1, keepdims=True)
        ranks = np.exp(-np.sum(np.where(p > 1e-9, p * np.log(np.maximum(p, 1e-9)), 0), -1)).mean(1)
        norms = np.linalg.norm(matrices.astype(float), axis=(2, 3)).mean(1)
        np.testing.assert_allclose(actual["places"][name]["norm"], norms, rtol=1e-5)
        np.testing.assert_allclose(actual["places"][name]["effective_rank"], ranks, rtol=1e-3)
    vectors = np.concatenate(
        [np.moveaxis(m, 1, 0).reshape(len(TASKS), -1) for m in expected.values()], 1
    ).astype(float)
    np.testing.assert_allclose(actual["norms"], np.linalg.norm(vectors, axis=1), rtol=1e-5)
    for name, rows in (
        ("similarity", vectors),
        ("similarity_centred", vectors - vectors.mean(0)),
    ):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(actual[name], unit @ unit.T, atol=1e-5)
    spread = np.square(vectors - vectors.mean(0)).sum() / np.square(vectors).sum()
    assert actual["differing"] == pytest.approx(spread, rel=1e-5)
    assert json.loads(json.dumps(actual)) == actual


def test_a_matrix_of_equal_singular_values_has_its_full_rank() -> None:
    assert stats.effective_rank(np.ones(5)) == pytest.approx(5)
    assert stats.effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert stats.effective_rank(np.zeros(3)) == 0


@pytest.mark.filterwarnings("error")
def test_equal_adapters_do_not_differ(adapters: ad.Adapters) -> None:
    """Equal adapters are those of a hypermodel that ignores its text; zero adapters are equal."""
    same = stats.statistics(ad.take(adapters, [1, 1, 1]), TASKS[:3])
    np.testing.assert_allclose(same["similarity"], 1, atol=1e-5)
    assert same["differing"] == 0
    assert not np.any(same["similarity_centred"])
    zero = stats.statistics(ad.zeros(adapters.spec, tiny_model.CONFIG, 2), TASKS[:2])
    assert zero["norms"] == [0, 0]
    assert not np.any(zero["similarity"])


def test_tasks_are_sampled_evenly_where_memory_is_short() -> None:
    assert stats.sample(9, size=10, largest=30) == [0, 4, 8]
    assert stats.sample(9, size=10, largest=5) == [0, 8]
    assert stats.sample(9, size=10) == list(range(9))
    assert stats.sample(1, size=10) == [0]
