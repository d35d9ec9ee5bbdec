"""launch/gpu_run.sh with a fake SLURM."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.pod import HARD, Pod

# Starts two tasks, waits for both, and exits with the highest code.
SRUN = """
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 JAX_PROCESS_ID=0 JAX_NUM_PROCESSES=2 "$@" & first=$!
SLURM_PROCID=1 JAX_PROCESS_ID=1 JAX_NUM_PROCESSES=2 "$@"; code=$?
wait $first || code=$?
exit $code
"""


@pytest.fixture
def cluster(tmp_path: Path, repo_root: Path) -> Pod:
    pod = Pod(tmp_path, repo_root)
    pod.add_program("srun", SRUN)
    pod.add_program("scontrol", 'echo "$*" >>"$FAKE_CLOUD/scontrol"')
    subprocess.run(["bash", str(pod.root / "launch" / "setup.sh")], check=True)
    pod.env |= {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(pod.root)}
    return pod


def test_same_command_runs_in_every_task(cluster: Pod) -> None:
    launch = cluster.start("show", *HARD, script="gpu_run.sh")
    assert launch.end() == 0, launch.err
    assert launch.out.count(f"argv {json.dumps(['show', *HARD])} in a checkout") == 2
    assert not (cluster.cloud / "scontrol").exists()


def test_preempted_job_is_requeued_at_most_20_times(cluster: Pod) -> None:
    for restarts, calls in [("19", "requeue 17\n"), ("20", "requeue 17\n")]:
        launch = cluster.start("exit", "75", script="gpu_run.sh", SLURM_RESTART_COUNT=restarts)
        assert launch.end() == 75
        assert (cluster.cloud / "scontrol").read_text() == calls
    assert "restarted 20 times already" in launch.err


@pytest.mark.parametrize(
    ("job", "env", "message"),
    [
        ([], {}, "no job"),
        (["show"], {"SLURM_JOB_ID": ""}, "no allocation"),
        (["show"], {"HYPER_T5_ROOT": "/nowhere"}, "no /nowhere/.venv"),
    ],
)
def test_invalid_input_is_one_line(
    cluster: Pod, job: list[str], env: dict[str, str], message: str
) -> None:
    launch = cluster.start(*job, script="gpu_run.sh", **env)
    assert launch.end() == 2
    assert launch.err.startswith(f"gpu: error: {message}")
    assert launch.err.count("\n") == 1
