"""Resume: bit-exact, from damaged checkpoints, after signals, and only of the same run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hyper_t5 import cli
from hyper_t5.checkpoints import checkpoint
from hyper_t5.parallel import distributed
from hyper_t5.training import step as step_lib
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

STEPS = 6
DROPOUT = {
    "adamw": {"optimizer__name": "adamw"},
    "adafactor": {"optimizer__name": "adafactor", "optimizer__min_dim_size_to_factor": 8},
}


@pytest.fixture(scope="module")
def unbroken(make_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of STEPS steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    tiny_runs.run(make_config(), folder)
    return folder


@pytest.mark.parametrize("fields", DROPOUT.values(), ids=DROPOUT)
def test_resume_is_bit_exact_and_compiles_once(
    make_config: Any,
    unbroken: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Any] = []

    def remember(*args: Any) -> Any:
        steps.append(make_step(*args))
        return steps[-1]

    make_step = step_lib.make_step
    monkeypatch.setattr(step_lib, "make_step", remember)
    config = make_config(model__dropout_rate=0.3, **fields)
    whole = tmp_path / "whole"
    tiny_runs.run(config, whole)
    assert tiny_runs.leaves(whole, 1) != tiny_runs.leaves(unbroken, 1)  # there is dropout
    for step in (1, 4):
        part = tiny_runs.part_of(whole, tmp_path / f"from{step}", step)
        tiny_runs.run(config, part)
        assert tiny_runs.leaves(part, STEPS) == tiny_runs.leaves(whole, STEPS)
        ours, theirs = tiny_runs.lines(part), tiny_runs.lines(whole)
        assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
        for name in ("step", "loss", "accuracy", "grad_norm", "learning_rate"):
            assert [line[name] for line in ours] == [line[name] for line in theirs]
    # Each run compiled its step ahead, which then takes no other shapes: jit was never called.
    assert [step._cache_size() for step in steps] == [0, 0, 0]


def test_seeds_differ_and_repeat(make_config: Any, unbroken: Path, tmp_path: Path) -> None:
    tiny_runs.run(make_config(train__steps=1), tmp_path / "same")
    tiny_runs.run(make_config(train__steps=1, seed=1), tmp_path / "other")
    first = tiny_runs.leaves(unbroken, 1)
    assert tiny_runs.leaves(tmp_path / "same", 1) == first
    assert tiny_runs.leaves(tmp_path / "other", 1) != first


def test_a_finished_run_changes_nothing(make_config: Any, unbroken: Path) -> None:
    before = tiny_runs.digests(unbroken)
    assert tiny_runs.run(make_config(), unbroken) == {}
    assert tiny_runs.digests(unbroken) == before


def test_resume_with_more_steps(make_config: Any, unbroken: Path, tmp_path: Path) -> None:
    part = tiny_runs.part_of(unbroken, tmp_path / "part", STEPS)
    tiny_runs.run(
        make_config(train__steps=STEPS + 3, train__log_every=2, train__save_every=3), part
    )
    assert checkpoint.latest_step(part) == STEPS + 3
    assert [line["step"] for line in tiny_runs.lines(part)] == [1, 2, 3, 4, 5, 6, 8, 9]


def damage(checkpoints: Path, step: int) -> None:
    """Truncate every file of a checkpoint's state: Orbax writes some numbers twice."""
    for file in (checkpoints / str(step) / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def test_a_truncated_checkpoint_falls_back(
    make_config: Any, unbroken: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = tiny_runs.part_of(unbroken, tmp_path / "part", 4)
    shutil.copytree(unbroken / "checkpoints" / "5", part / "checkpoints" / "5")
    damage(part / "checkpoints", 5)
    tiny_runs.run(make_config(), part)
    assert "checkpoints/5 is damaged" in caplog.text
    assert tiny_runs.leaves(part, STEPS) == tiny_runs.leaves(unbroken, STEPS)
    assert [line["step"] for line in tiny_runs.lines(part)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=[pytest.mark.soak] if name == "adafactor" else [])
        for name, fields in DROPOUT.items()
    ],
)
def test_kill_9_in_mid_save_and_resume(
    make_config: Any, tmp_path: Path, fields: dict[str, Any]
) -> None:
    config = make_config(
        train__steps=60, train__save_every=5, train__keep=3, model__dropout_rate=0.3, **fields
    )
    tiny_runs.run(config, tmp_path / "whole")
    broken, kills = tmp_path / "broken", 0
    argv = [sys.executable, "-m", "hyper_t5", *tiny_runs.command(config, broken)]
    for least in (10, 30):
        with (tmp_path / f"log{least}").open("w") as log:
            child = subprocess.Popen(argv, stdout=log, stderr=log)
            while child.poll() is None:  # until a save is in progress
                saving = (broken / "checkpoints").glob("*.tmp")
                if any(int(p.name.split(".")[0]) >= least for p in saving):
                    child.send_signal(signal.SIGKILL)
                    kills += child.wait() == -signal.SIGKILL
    assert kills == 2
    assert 0 < (checkpoint.latest_step(broken) or 0) < 60
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert tiny_runs.leaves(broken, 60) == tiny_runs.leaves(tmp_path / "whole", 60)
    assert not list((broken / "checkpoints").glob("*.tmp"))
    logged = [line["step"] for line in tiny_runs.lines(broken)]
    assert logged == sorted(set(logged))
    assert logged[-1] == 60


@pytest.mark.parametrize("parts", [1, 2])
def test_sigterm_saves_and_resume_is_bit_exact(
    make_config: Any, tmp_path: Path, parts: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(
        train__steps=6,
        train__save_every=100,
        train__microbatches=parts,
        mesh__data=-1,
        data__tasks_per_batch=8 * parts,
    )
    tiny_runs.run(config, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        ask = distributed.preempted

        def preempted(step: int) -> bool:
            if step == 3:
                signal.raise_signal(signal.SIGTERM)
            return ask(step)

        patch.setattr(distributed, "preempted", preempted)
        line = tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path / "a"), code=75)
    assert "preempted; saved at step 3" in line
    assert checkpoint.latest_step(tmp_path / "a") == 3
    assert cli.main(tiny_runs.command(config, tmp_path / "a")) == 0
    assert tiny_runs.leaves(tmp_path / "a", 6) == tiny_runs.leaves(tmp_path / "whole", 6)


def test_sigterm_is_answered_within_two_steps(
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps are slow and no line is due: few steps are dispatched ahead of the one that runs."""
    make_step = step_lib.make_step
    losses: list[Any] = []  # arrays that may not be computed yet
    finished: list[int] = []

    def slow_step(*args: Any) -> Any:
        step = make_step(*args)

        def slow(state: Any, *inputs: Any) -> Any:
            state, sums = step(state, *inputs)
            x = jnp.full((400, 400), sums["loss"])
            x = jax.lax.fori_loop(0, 20, lambda _, x: jnp.tanh(x @ x), x)
            return state, sums | {"loss": sums["loss"] + 1e-9 * x[0, 0]}

        compiled = jax.jit(slow, donate_argnums=0)

        def dispatch(*inputs: Any) -> Any:
            state, sums = compiled(*inputs)
            losses.append(sums["loss"])
            if len(losses) == 8:
                finished.append(sum(loss.is_ready() for loss in losses))
                signal.raise_signal(signal.SIGTERM)
            return state, sums

        lowered = SimpleNamespace(compile=lambda: dispatch)
        return SimpleNamespace(lower=lambda *_: lowered)

    monkeypatch.setattr(step_lib, "make_step", slow_step)
    config = make_config(train__steps=20, train__log_every=20, train__save_every=20, mesh__data=1)
    line = tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path), code=75)
    assert "preempted; saved at step 8" in line
    assert finished[0] >= 8 - 2


def test_a_workdir_of_another_config_is_refused(
    make_config: Any, unbroken: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tiny_runs.digests(unbroken)
    line = tiny_runs.fails(capsys, *tiny_runs.command(make_config(adapter__lora_rank=4), unbroken))
    assert "adapter.lora_rank: 2 -> 4" in line
    assert "another --workdir" in line
    assert tiny_runs.digests(unbroken) == before


def test_resume_with_another_backbone_is_refused(
    make_config: Any, backbone: Path, unbroken: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "t5"
    shutil.copytree(backbone, moved)
    part = tiny_runs.part_of(unbroken, tmp_path / "part", 3)
    config = make_config(backbone__path=str(moved))
    tiny_runs.edit_json(part / "config.json", lambda c: c["backbone"].update(path=str(moved)))
    shutil.rmtree(moved)
    tiny_runs.save_backbone(moved, 1)
    with pytest.raises(UserError, match="with other weights"):
        tiny_runs.run(config, part)
