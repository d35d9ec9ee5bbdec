"""Rank classification: packed beside each other, options score as each scores alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from hyper_t5 import adapters as ad
from hyper_t5 import data, model, ranking, sharding
from hyper_t5.engine import padded_length
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.judged import EvalTask
from hyper_t5.taskfile import Row, TaskRows
from hyper_t5.vocab import EOS_ID

# Of one to fourteen words, of one to five options, one of them the beginning of another.
CHOICES = [
    ("a", "b"),
    ("a b c", "a b", "a b c d", "x", "a b"),
    ("z",),
    tuple(" ".join("abcdefghijklmn"[:n]) for n in (14, 1, 7)),
]


def task_of(number: int, rows: int = 6) -> TaskRows:
    letters = "abcdefghijklmnopqrstuvwxyz"
    made = [
        Row(f"r{i}", " ".join(letters[number + i :][: 1 + 3 * i % 7]), options[:1], options)
        for i, options in enumerate(CHOICES[i % len(CHOICES)] for i in range(rows))
    ]
    name = f"task{number}"
    return TaskRows(name, (f"{name} the letters {letters[number]}.",), (("q r", "q"),), made)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


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
        config = runs.make_config(**fields)
        m, loaded, trained, frozen = model.start(config)
        rng = np.random.default_rng(0)
        noisy = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), trained)
        return config, m, loaded, {**noisy, **frozen}

    return make


def anew(
    m: model.Model, params: Any, task: EvalTask, config: ConfigDict, vocab: Any, number: int
) -> list[list[float]]:
    """Every (row, option) pair by itself, conditioning, adapters and all, through `forward`."""
    forward = jax.jit(functools.partial(m.forward, params))
    found = []
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
            made = np.asarray(logits[0], np.float64)
            each = made[np.arange(len(ids)), ids] - np.logaddexp.reduce(made[: len(ids)], -1)
            scores.append(float(np.sum(each)))
        found.append(scores)
    return found


# By default those that differ in what options share: a mask of prefixes, memory, what reads inputs.
QUICK = ("hyper_prefix", "hint", "hyperdecoder", "concat")


@pytest.mark.parametrize(
    "system", [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in SYSTEMS]
)
def test_options_score_as_each_would_alone(start: Any, system: str) -> None:
    config, m, loaded, params = start(system)
    (task,) = data.eval_episodes([task_of(1)], loaded.vocab, config, m.choice.layout)
    found = list(ranking.rank_task(m, params, task, config, loaded.vocab, 1))
    expected = anew(m, params, task, config, loaded.vocab, 1)
    assert [row.tokens for row in found] == [
        tuple(len(loaded.vocab.encode(option)) + 1 for option in options)
        for options in task.options
    ]
    for row, scores in zip(found, expected, strict=True):
        np.testing.assert_allclose(row.log_probs, scores, rtol=1e-5, atol=1e-5)
    assert found[1].log_probs[1] == pytest.approx(found[1].log_probs[4], rel=1e-6)
    assert len({score for row in expected for score in row}) > 8


def test_another_tasks_adapters_score_otherwise(start: Any) -> None:
    config, m, loaded, params = start("hyper_prefix")
    tasks = data.eval_episodes([task_of(1), task_of(1)], loaded.vocab, config, m.choice.layout)
    first, second = tasks
    second.hyper_ids[:3] = second.hyper_ids[2::-1]
    found = [list(ranking.rank_task(m, params, t, config, loaded.vocab)) for t in (first, second)]
    assert abs(found[0][0].log_probs[0] - found[1][0].log_probs[0]) > 1e-3


def test_many_options_take_several_passes_over_one_encoding(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, m, loaded, params = start("hyper_prefix")
    (task,) = data.eval_episodes([task_of(2)], loaded.vocab, config, m.choice.layout)
    whole = list(ranking.rank_task(m, params, task, config, loaded.vocab))
    calls = {"encode": 0, "log_probs": 0, "generate": 0}

    def counted(name: str, do: Any) -> Any:
        def call(*args: Any) -> Any:
            calls[name] += 1
            return do(*args)

        return call

    for module, name in [(ranking, "encode"), (ranking, "log_probs"), (model, "generate")]:
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(ranking, "passes", functools.partial(ranking.passes, most=8))
    parted = list(ranking.rank_task(m, params, task, config, loaded.vocab))
    assert calls == {"encode": 2, "log_probs": 3 + 3, "generate": 1}
    for one, other in zip(whole, parted, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-5)


def test_passes_keep_order_and_their_width() -> None:
    options = [[[1] * 5, [2] * 3, [3] * 9, [4]], [], [[5] * 2]]
    made = list(ranking.passes(options, most=8))
    assert made == [[[[1] * 5, [2] * 3], [], [[5] * 2]], [[[3] * 9], [], []], [[[4]], [], []]]
    targets, segments, positions = ranking.pack(made[0], 4)
    assert targets.shape == (4, 16)
    assert targets[0].tolist() == [1] * 5 + [2] * 3 + [0] * 8
    assert segments[0].tolist() == [1] * 5 + [2] * 3 + [0] * 8
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2] + [0] * 8
    assert not targets[1].any()
    assert not segments[3].any()


def test_every_padded_length_is_of_whole_blocks() -> None:
    assert not any(padded_length(n) % ranking.BLOCK for n in range(1, 2 * ranking.MOST))


@pytest.mark.parametrize("system", ["hyper_prefix", "hyperdecoder", "hint"])
def test_a_mesh_changes_nothing(start: Any, system: str) -> None:
    config, m, loaded, params = start(system)
    (task,) = data.eval_episodes([task_of(1)], loaded.vocab, config, m.choice.layout)
    alone = list(ranking.rank_task(m, params, task, config, loaded.vocab))
    mesh = config.mesh.copy_and_resolve_references()
    mesh.update(data=4, model=2)
    placement = sharding.make_placement(mesh)
    spread = model.build(config, loaded.sizes, placement)
    axes = model.logical_axes(spread)
    placed = {k: sharding.put(v, placement.computed(axes[k], v)) for k, v in params.items()}
    together = list(ranking.rank_task(spread, placed, task, config, loaded.vocab))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4)
