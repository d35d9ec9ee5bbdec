"""Rank classification: packed options have the scores of separate options."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import adapters as ad
from hyper_t5 import model, runs
from hyper_t5.data import eval_tasks
from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.evaluation import rank_classification
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.inference.engine import padded_length
from hyper_t5.inference.generate import iterate_adapters
from hyper_t5.parallel import sharding
from hyper_t5.runs import Run
from tests.support import tiny_runs

# One to five options of one to fourteen words; one is a prefix of another.
CHOICES = [
    ("a", "b"),
    ("a b c", "a b", "a b c d", "x", "a b"),
    ("z",),
    tuple(" ".join("abcdefghijklmn"[:n]) for n in (14, 1, 7)),
]


def task_of(number: int, rows: int = 6) -> TaskData:
    letters = "abcdefghijklmnopqrstuvwxyz"
    task_rows = [
        TaskRow(f"r{i}", " ".join(letters[number + i :][: 1 + 3 * i % 7]), options[:1], options)
        for i, options in enumerate(CHOICES[i % len(CHOICES)] for i in range(rows))
    ]
    name = f"task{number}"
    return TaskData(name, (f"{name} the letters {letters[number]}.",), (("q r", "q"),), task_rows)


@pytest.fixture(scope="module")
def start(backbone: Path) -> Callable[..., Any]:
    """(config, model, backbone, parameters) of a system, none of them zero."""

    @functools.cache
    def make(system: str, prefix_bias: str = "hf") -> Any:
        fields: dict[str, Any] = {
            "backbone__path": str(backbone),
            "system": system,
            "eval__batch": 4,
            "adapter__bottleneck_sizes": (3,),
        }
        if system == "hint":
            fields |= {"adapter__prefix_sites": ad.ATTENTION_SITES}
        fields["adapter__position_bias"] = "zero" if system == "hint" else prefix_bias
        if system.startswith("task_"):
            fields |= {"stage": "peft", "adapter__task_slots": 2}
        config = tiny_runs.make_config(**fields)
        m, loaded, trained, frozen = runs.init_run(config)
        rng = np.random.default_rng(0)
        noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), trained)
        return config, m, loaded, {**noisy, **frozen}

    return make


def separate_scores(
    m: model.Model, params: Any, task: EvalTask, config: ConfigDict, vocab: Any, number: int
) -> list[list[float]]:
    """Return the log-probability of each (row, option) pair, from a `forward` call of its own."""
    forward = jax.jit(functools.partial(m.forward, params))
    result = []
    for row, options in zip(task.inputs, task.options, strict=True):
        scores = []
        for option in options:
            ids = [*vocab.encode(option), EOS_ID]
            target = np.zeros((1, 1, 16), np.int32)
            target[0, 0, : len(ids)] = ids
            batch = {
                "hyper_inputs": task.hyper_ids[None],
                "tasks": np.full(1, number, np.int32),
                "inputs": row[None, None],
                "targets": target,
            }
            logits, _ = forward(batch)
            rows = np.asarray(logits[0], np.float64)
            each = rows[np.arange(len(ids)), ids] - np.logaddexp.reduce(rows[: len(ids)], -1)
            scores.append(float(np.sum(each)))
        result.append(scores)
    return result


def rank(config: Any, m: Any, loaded: Any, params: Any, task: Any, number: int = 0) -> Any:
    run, adapters = Run("", config, m, loaded, params), None
    if m.emits_per_task:
        [adapters] = iterate_adapters(m, params, [task.hyper_ids], [number])
    return rank_classification.rank_task(run, task, adapters, number)


# The default tier has systems that differ in the parts shared by options: masks, memory, inputs.
QUICK = ("hyper_prefix", "hint", "hyperdecoder", "concat")


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in SYSTEMS]
)
def test_packed_options_score_as_separate_ones(start: Any, system: str) -> None:
    config, m, loaded, params = start(system)
    (task,) = eval_tasks.build_eval_tasks([task_of(1)], loaded.vocab, config, m.system.layout)
    actual = list(rank(config, m, loaded, params, task, 1))
    expected = separate_scores(m, params, task, config, loaded.vocab, 1)
    assert [row.tokens for row in actual] == [
        tuple(len(loaded.vocab.encode(option)) + 1 for option in options)
        for options in task.options
    ]
    for row, scores in zip(actual, expected, strict=True):
        np.testing.assert_allclose(row.log_probs, scores, rtol=1e-5, atol=1e-5)
    assert actual[1].log_probs[1] == pytest.approx(actual[1].log_probs[4], rel=1e-6)
    assert len({score for row in expected for score in row}) > 8


def test_scores_depend_on_the_adapters(start: Any) -> None:
    config, m, loaded, params = start("hyper_prefix")
    tasks = eval_tasks.build_eval_tasks(
        [task_of(1), task_of(1)], loaded.vocab, config, m.system.layout
    )
    first, second = tasks
    second.hyper_ids[:3] = second.hyper_ids[2::-1]
    actual = [list(rank(config, m, loaded, params, t)) for t in (first, second)]
    assert abs(actual[0][0].log_probs[0] - actual[1][0].log_probs[0]) > 1e-3


def test_many_options_take_several_passes_over_one_encoding(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, m, loaded, params = start("hyper_prefix")
    (task,) = eval_tasks.build_eval_tasks([task_of(2)], loaded.vocab, config, m.system.layout)
    whole = list(rank(config, m, loaded, params, task))
    calls = {"encode": 0, "log_probs": 0}

    def counted(name: str, do: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return do(*args)

        return call

    for module, name in [
        (rank_classification, "encode"),
        (rank_classification, "log_probs"),
    ]:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(
        rank_classification,
        "option_passes",
        functools.partial(rank_classification.option_passes, most=8),
    )
    parted = list(rank(config, m, loaded, params, task))
    assert calls == {"encode": 2, "log_probs": 3 + 3}
    for row, other in zip(whole, parted, strict=True):
        assert row.tokens == other.tokens
        np.testing.assert_allclose(row.log_probs, other.log_probs, rtol=1e-5)


def test_passes_keep_order_and_width() -> None:
    options = [[[1] * 5, [2] * 3, [3] * 9, [4]], [], [[5] * 2]]
    passes = list(rank_classification.option_passes(options, most=8))
    assert passes == [[[[1] * 5, [2] * 3], [], [[5] * 2]], [[[3] * 9], [], []], [[[4]], [], []]]
    targets, segments, positions = rank_classification.pack(passes[0], 4)
    assert targets.shape == (4, 16)
    assert targets[0].tolist() == [1] * 5 + [2] * 3 + [0] * 8
    assert segments[0].tolist() == [1] * 5 + [2] * 3 + [0] * 8
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2] + [0] * 8
    assert not targets[1].any()
    assert not segments[3].any()


def test_bucket_lengths_are_multiples_of_the_block() -> None:
    assert not any(
        padded_length(n) % rank_classification.BLOCK
        for n in range(1, 2 * rank_classification.MAX_POSITIONS)
    )


@pytest.mark.parametrize("system", ["hyper_prefix", "hyperdecoder", "hint"])
def test_a_mesh_changes_nothing(start: Any, system: str) -> None:
    config, m, loaded, params = start(system)
    (task,) = eval_tasks.build_eval_tasks([task_of(1)], loaded.vocab, config, m.system.layout)
    alone = list(rank(config, m, loaded, params, task))
    mesh = config.mesh.copy_and_resolve_references()
    mesh.update(data=4, model=2)
    placement = sharding.make_placement(mesh)
    spread = model.build_model(config, loaded.sizes, placement)
    axes = model.logical_axes(spread)
    placed = {
        k: sharding.device_put(v, placement.compute_sharding(axes[k], v)) for k, v in params.items()
    }
    together = list(rank(config, spread, loaded, placed, task))
    for row, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(row.log_probs, other.log_probs, rtol=1e-4)
