"""Steps that are not finite, and full disks: earlier checkpoints stay, and the message says why."""

from __future__ import annotations

import functools
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import cli
from hyper_t5.checkpoints import checkpoint
from hyper_t5.training import loss_guard
from hyper_t5.training import replay as replay_lib
from tests.support import tiny_runs


def test_non_finite_steps_stop_the_run(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The update is finite, the loss after it is not: LoRA's scale is 4, and 4e38 is infinite.
    config = make_config(optimizer__learning_rate=1e38, train__log_every=4, train__save_every=1)
    line = tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path / "a"), code=1)
    assert re.search(r" at step 2 on task\d.*the checkpoints before it are good", line)
    assert checkpoint.latest_step(tmp_path / "a") == 1
    last = tiny_runs.lines(tmp_path / "a")[-1]
    assert last["step"] == 2
    assert {last["loss"], last["grad_norm"]} & {"NaN", "Infinity"}

    # The first bad step is named, though the log is written at the fourth.
    config = make_config(optimizer__learning_rate=1e38, train__log_every=4, train__save_every=4)
    assert " at step 2 on " in tiny_runs.fails(
        capsys, *tiny_runs.command(config, tmp_path / "b"), code=1
    )
    assert [line["step"] for line in tiny_runs.lines(tmp_path / "b")] == [4]
    assert checkpoint.latest_step(tmp_path / "b") is None

    # The batch of that step is saved, and the state before it, which equals that of the first run
    # after one step. Its folder is a workdir, in which the run fails again.
    replay = replay_lib.load_replay(tmp_path / "b" / "replay" / "2")
    assert (replay.step, len(replay.tasks)) == (2, config.data.tasks_per_batch)
    assert set(replay.tasks) <= set(tiny_runs.TASKS)
    assert not np.isfinite([replay.loss, replay.grad_norm]).all()
    assert replay.state is not None
    state = Path(replay.state)
    assert tiny_runs.leaves(state, 1) == tiny_runs.leaves(tmp_path / "a", 1)
    argv = tiny_runs.command(config, tmp_path / "b")
    argv[argv.index("--workdir") + 1] = str(state)
    assert " at step 2 on " in tiny_runs.fails(capsys, *argv, "--gin.train.steps=2", code=1)

    # The loss is finite, the update is not.
    config = make_config(optimizer__learning_rate=1e38, optimizer__weight_decay=100.0)
    line = tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path / "c"), code=1)
    assert "a parameter or a moment is not finite at step 1" in line
    assert np.isfinite(tiny_runs.lines(tmp_path / "c")[0]["loss"])
    assert checkpoint.latest_step(tmp_path / "c") is None


def test_bad_steps_can_be_skipped(make_config: Any, tmp_path: Path) -> None:
    plain = make_config(optimizer__name="adafactor", train__steps=3, train__save_every=1)
    tiny_runs.run(plain, tmp_path / "plain")
    # With a threshold of half the running mean, every loss is a spike.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_guard, "WARM", 2)
        config = make_config(
            optimizer__name="adafactor",
            train__steps=3,
            train__save_every=1,
            train__spike=0.5,
            train__on_bad_step="skip",
        )
        last = tiny_runs.run(config, tmp_path / "skips")
    assert last["skipped"] == 1
    before, after = (tiny_runs.leaves(tmp_path / "skips", step) for step in (2, 3))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"step", "guard/bad_step", "guard/mean", "guard/seen", "guard/skipped"}
    # Earlier steps equal those of a run without a guard, up to rounding of two programs.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    for part in ("params", "opt_state"):
        skipping, plain_run = (
            checkpoint.load_subtree(tmp_path / name / "checkpoints" / "2", part)[0]
            for name in ("skips", "plain")
        )
        jax.tree.map(close, skipping, plain_run)


@pytest.fixture
def little_space() -> Iterator[Callable[[], None]]:
    """Return a function that limits files to 12 kB, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's own
def test_no_space_keeps_the_previous_checkpoint(
    make_config: Any,
    tmp_path: Path,
    little_space: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config(system="concat", train__steps=4)
    whole, run = tmp_path / "whole", tmp_path / "run"
    tiny_runs.run(config, whole)
    save, limit = checkpoint.Checkpointer.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_until_full(self: Any, step: int, *args: Any) -> None:
        if step == 3:
            self.wait()
            little_space()
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpointer, "save", save_until_full)
        line = tiny_runs.fails(capsys, *tiny_runs.command(config, run))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert f"could not save checkpoint {run}/checkpoints/3" in line
    assert "earlier checkpoints are kept" in line
    # TensorStore may still be at it when the folder is removed; the next start removes it then.
    left = {p.name for p in (run / "checkpoints").iterdir()}
    assert left - {"3.tmp"} == {"1", "2"}
    assert tiny_runs.leaves(run, 2) == tiny_runs.leaves(whole, 2)

    assert cli.main(tiny_runs.command(config, run)) == 0
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert tiny_runs.leaves(run, 4) == tiny_runs.leaves(whole, 4)
    assert tiny_runs.digests(run / "backbone") == tiny_runs.digests(whole / "backbone")
