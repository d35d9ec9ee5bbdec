"""Validation while training: rows never trained on, no compile after the first, the best step."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline, runs
from hyper_t5.checkpoints import checkpoint
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.training import step as step_lib
from hyper_t5.training import validation
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.toy_tasks import BYTES, make_config, shown_inputs, task_data, texts_at_eos

VALIDATED = {"train__eval_every": 2, "train__eval_tasks": 2, "train__eval_rows": 2}
# Two of three tasks, evenly spaced.
HELD_OUT_TASKS = ("task1_copy", "task2_swap")


@pytest.fixture(scope="module")
def validated(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validated") / "run"
    tiny_runs.run(make_config(**VALIDATED), folder)
    return folder


def scores_of(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of validation, without their time."""
    lines = [line for line in tiny_runs.lines(folder) if "validation/loss" in line]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


# ------------------------------------------------------------------------------- the sample


def test_held_out_rows_are_neither_trained_on_nor_shown() -> None:
    config = make_config(shots=(2, 2), tasks_per_batch=2)
    config.train.update(eval_every=1, eval_tasks=2, eval_rows=3)
    whole = [replace(task_data(name), examples=()) for name in "abc"]
    tasks = pipeline.hold_out(whole, config.train)
    assert [len(task.held_out) for task in tasks] == [3, 3, 0]
    sampler = EpisodeSampler(tasks, BYTES, config.data, 0)
    used: dict[str, set[str]] = {name: set() for name in "abc"}
    for step in range(200):
        batch = sampler.batch(step)
        for slot, index in enumerate(batch["tasks"]):
            inputs = used[sampler.names[index]]
            inputs |= {text for ids in batch["inputs"][slot] for text in texts_at_eos(ids)}
            inputs |= set(shown_inputs(batch["hyper_inputs"][slot]))
    for task in tasks:
        inputs = {row.input for row in task.rows}
        held_out = {row.input for row in task.rows[-3:]} if task.held_out else set()
        assert used[task.name] == inputs - held_out
    evaluated = pipeline.validation_tasks(config, sampler, BYTES)
    assert [[row.input for row in task.rows[:3]] for task in evaluated] == [
        [row.input for row in task.rows[-3:]] for task in tasks[:2]
    ]


def test_too_few_rows_are_refused() -> None:
    config = make_config()
    config.train.update(eval_every=10, eval_rows=500)
    with pytest.raises(UserError, match="no training task has 1000 rows, of which to hold out"):
        pipeline.hold_out([task_data("a")], config.train)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__keep_best": True}, "train.eval_every=0 computes none"),
        ({"train__eval_every": 5, "stage": "hyperpretrain"}, "set train.eval_split to a split"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_runs.make_config(system="concat", **fields)


# ------------------------------------------------------------------------------- the scores


def test_scores_are_written_and_are_those_of_the_parameters(validated: Path) -> None:
    lines = scores_of(validated)
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line.keys() == {"step", "validation/loss", "validation/rougeL"} for line in lines)
    run = runs.open(validated)
    tasks = pipeline.load_tasks("sni", run.config.data, "train", run.backbone.vocab)
    loss = tokens = 0.0
    for task in tasks:
        if task.name in HELD_OUT_TASKS:
            for row in task.rows[-2:]:
                sums = loss_of(run, row.input, row.outputs[0])
                loss, tokens = loss + float(sums["loss"]), tokens + float(sums["tokens"])
    assert lines[-1]["validation/loss"] == pytest.approx(loss / tokens, rel=1e-5)


def loss_of(run: runs.Run, text: str, target: str) -> Any:
    """Compute the sums of one row; the system ignores the conditioning."""
    encode = run.backbone.vocab.encode
    inputs, targets = ([*encode(text), EOS_ID], [*encode(target), EOS_ID])
    batch = {
        "tasks": jnp.zeros(1, jnp.int32),
        "hyper_inputs": jnp.ones((1, 1), jnp.int32),
        "inputs": jnp.asarray([[inputs]]),
        "targets": jnp.asarray([[targets]]),
    }
    return step_lib.loss_sums(run.model, run.params, {}, batch, None, z_loss=0.0)[1]


def test_a_resumed_run_has_the_same_scores(
    make_config: Any, validated: Path, tmp_path: Path
) -> None:
    part = tiny_runs.part_of(validated, tmp_path / "part", 3)
    tiny_runs.run(make_config(**VALIDATED), part)
    assert tiny_runs.leaves(part, 6) == tiny_runs.leaves(validated, 6)
    assert scores_of(part) == scores_of(validated)


def test_a_chosen_split_is_validated_and_no_row_is_held_out(
    make_config: Any, tmp_path: Path
) -> None:
    tiny_runs.run(make_config(**VALIDATED, train__eval_split="test"), tmp_path / "chosen")
    tiny_runs.run(make_config(), tmp_path / "plain")
    assert len(scores_of(tmp_path / "chosen")) == 3
    assert tiny_runs.leaves(tmp_path / "chosen", 6) == tiny_runs.leaves(tmp_path / "plain", 6)


def test_nothing_is_compiled_after_the_first_validation(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    calls: list[int] = []
    compiled_at: list[int] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def counted(*args: Any) -> Any:
        result = validate(*args)
        calls.append(1)
        compiled_at.append(len(compiled))
        return result

    validate = validation.validate
    monkeypatch.setattr(validation, "validate", counted)
    fields = {"system": "hyper_prefix", "train__eval_rows": 1}
    config = make_config(**VALIDATED | fields)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        tiny_runs.run(config, tmp_path / "run")
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled_at[0] > 0
    assert compiled_at == [compiled_at[0]] * 3


# ------------------------------------------------------------------------------- the best step


def train_with_losses(
    config: Any, folder: Path, losses: dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(losses.values())
    monkeypatch.setattr(validation, "validate", lambda *_: {"loss": next(remaining)})
    tiny_runs.run(config, folder)


def test_the_best_step_is_kept_and_opened_by_name(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**VALIDATED, "train__keep_best": True, "train__keep": 1, "train__save_every": 99}
    folder = tmp_path / "run"
    losses = {2: 3.0, 4: 1.0, 6: 2.0}
    train_with_losses(make_config(**fields), folder, losses, monkeypatch)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps == [4, 6]
    assert checkpoint.best_step(folder) == (4, 1.0)
    assert runs.open(folder, step="best").step == 4
    # A resumed run knows the best so far.
    more = {8: 1.5, 10: math.nan, 12: 0.5}
    train_with_losses(make_config(**fields, train__steps=12), folder, more, monkeypatch)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps == [12]
    assert checkpoint.best_step(folder) == (12, 0.5)


def test_a_resumed_run_does_not_take_a_worse_step_for_the_best(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {**VALIDATED, "train__keep_best": True, "train__keep": 1, "train__save_every": 99}
    folder = tmp_path / "run"
    train_with_losses(make_config(**fields), folder, {2: 3.0, 4: 1.0, 6: 2.0}, monkeypatch)
    config = make_config(**fields | {"train__steps": 10, "train__keep": 0})
    train_with_losses(config, folder, {8: 1.5, 10: 1.2}, monkeypatch)
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps == [4, 6, 10]


def test_best_without_validation_is_one_line(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_runs.untrained_run(make_config(), tmp_path / "run")
    err = tiny_runs.fails(capsys, "evaluate", "--workdir", str(folder), "--step", "best")
    assert "no checkpoint has a validation loss" in err
    assert "train.eval_every" in err


def test_held_out_rows_are_part_of_the_config_of_a_run(make_config: Any, validated: Path) -> None:
    with pytest.raises(UserError, match=r"train\.eval_every: 2 -> 3"):
        tiny_runs.run(make_config(**VALIDATED | {"train__eval_every": 3}), validated)
    assert config_lib.defaults().train.eval_every == 0
    assert np.isfinite([line["validation/loss"] for line in scores_of(validated)]).all()
