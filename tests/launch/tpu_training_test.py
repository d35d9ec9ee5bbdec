"""launch/tpu_run.sh with a fake gcloud, whose two workers train."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import processes, tiny_runs
from tests.support.pod import Pod

CREATE = ["--accelerator", "v4-16"]


@pytest.fixture
def trainers(tmp_path: Path, repo_root: Path) -> Iterator[Pod]:
    """Yield a pod that runs the package itself, with four devices a worker."""
    pod = Pod(tmp_path / "pod", repo_root, toy=False)
    pod.env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": processes.cpu_flags(4)}
    yield pod
    pod.close()


def training(folder: Path, **fields: Any) -> list[str]:
    """Return the arguments of a tiny run over both workers that lasts longer than any test."""
    config = tiny_runs.make_config(
        backbone__path=str(tiny_runs.save_backbone(folder / "backbone")),
        data__sni_dir=str(tiny_runs.save_sni(folder / "sni")),
        data__tasks_per_batch=8,
        mesh__data=-1,
        **{"train__steps": 10**6, "train__save_every": 10**6} | fields,
    )
    return tiny_runs.command(config, folder / "run")


@pytest.mark.slow
def test_preempted_training_resumes_on_two_workers(trainers: Pod, tmp_path: Path) -> None:
    launch = trainers.run(*training(tmp_path), flags=[*CREATE, "--grace", "60"])
    launch.wait_for("[0] step 4/", seconds=240)
    assert "[0] process 0 of 2: 4 local of 8 devices" in launch.out
    os.kill(trainers.job_process(1), signal.SIGTERM)  # both save the same step
    launch.wait_for("tpu: restart 1 of at most 20", seconds=120)
    launch.wait_for("to 1000000", times=2, seconds=240)
    [first, second] = re.findall(r"steps (\d+) to 1000000", launch.out)
    assert int(first) == 0 < int(second)
    launch.wait_for(f"[0] step {2 * (int(second) // 2) + 4}/", seconds=120)
    launch.process.send_signal(signal.SIGINT)
    assert launch.end(120) == 130, launch.out + launch.err
    steps = [line["step"] for line in tiny_runs.lines(tmp_path / "run")]
    assert steps == sorted(set(steps))
    evaluation = trainers.run("evaluate", "--workdir", str(tmp_path / "run"))
    assert evaluation.end(240) == 0, evaluation.out + evaluation.err
    [report] = (tmp_path / "run" / "eval").iterdir()
    assert int(report.name) >= steps[-1]
    assert (report / "metrics.json").exists()


@pytest.mark.soak
def test_killed_worker_ends_the_run_and_the_same_command_resumes(
    trainers: Pod, tmp_path: Path
) -> None:
    words = training(tmp_path, train__save_every=4)
    invalid = trainers.run(*words, "--gin.train.stepz=3", flags=CREATE)
    assert invalid.end(240) == 2
    assert "[0] hyper-t5: error: " in invalid.out
    launch = trainers.run(*words)
    launch.wait_for("[0] step 12/", seconds=240)
    os.kill(trainers.job_process(1), signal.SIGKILL)
    assert launch.end(120) == 137, launch.out + launch.err
    assert "[1] worker 1 (t1v-n-fake-w-1): the job ended with code 137 (killed)" in launch.err
    assert not trainers.processes()
    again = trainers.run(*words, "--gin.train.steps=16")
    assert again.end(240) == 0, again.out + again.err
    [first] = re.findall(r"steps (\d+) to 16", again.out)
    assert int(first) in (4, 8, 12)
