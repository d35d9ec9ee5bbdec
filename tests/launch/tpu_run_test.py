"""launch/tpu_run.sh and tpu_worker.sh with a fake gcloud and a toy in place of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pod import HARD, Pod

CREATE = ["--accelerator", "v4-16"]
REMINDER = "tpu: pod is kept and billed; to delete it: gcloud compute tpus queued-resources delete"
RESUME = "run the same command again to resume from the newest checkpoint"


@pytest.fixture
def pod(tmp_path: Path, repo_root: Path) -> Iterator[Pod]:
    pod = Pod(tmp_path, repo_root)
    yield pod
    pod.close()


# ---- a run ---------------------------------------------------------------------------------------


def test_same_command_runs_on_every_worker_with_its_arguments_unchanged(pod: Pod) -> None:
    launch = pod.run("show", *HARD, flags=[*CREATE, "--env", "MINE=a value"])
    assert launch.end() == 0, launch.err
    arguments = f"argv {json.dumps(['show', *HARD])} in code"
    printed = ["setup --extra tpu", arguments, "worker 0 of 2 a value", "without a line's end"]
    assert launch.out.splitlines() == [f"[0] {line}" for line in printed]
    [log] = pod.logs("job-0-1/pod/1.log")
    assert log.splitlines()[:-1] == [arguments, "worker 1 of 2 a value", "without a line's end"]
    states = re.findall(r"^tpu: pod: (\w+)$", launch.err, re.MULTILINE)
    assert states == ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    [create] = pod.calls("queued-resources create")
    assert {"--node-id=pod", "--accelerator-type=v4-16"} <= set(create)
    assert pod.calls("queued-resources delete pod --force")
    assert "kept" not in launch.err


def test_several_slices_are_one_request(pod: Pod) -> None:
    pod.set(requests={"pod": ["SUSPENDED"]})  # what remains of an earlier one
    size = ["--topology=v5e:4x4", "--slices=2", "--spot", "--create_flag=--reserved"]
    launch = pod.run("show", flags=[*size, "--connect_flag=--internal-ip", "--keep"])
    assert launch.end() == 0, launch.err
    [create] = pod.calls("queued-resources create")
    assert {"--node-count=2", "--type=v5litepod", "--topology=4x4", "--spot"} <= set(create)
    assert {"--reserved", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)
    assert all("--internal-ip" in call for call in pod.calls("tpu-vm s"))
    assert len(pod.logs("job-0-1/pod-[01]/[01].log")) == 4
    assert launch.out.count("argv") == 1
    assert REMINDER in launch.err


def test_code_is_the_commit_or_with_a_flag_the_working_tree(pod: Pod) -> None:
    main = pod.root / "hyper_t5" / "__main__.py"
    main.write_text("from hyper_t5.more import x\nprint('x is', x)\n")
    (main.parent / "more.py").write_text("x = 5\n")  # untracked
    refused = pod.run("show", flags=CREATE)
    assert refused.end() == 2
    assert "uncommitted files, the first:  M hyper_t5/__main__.py" in refused.err
    assert not pod.calls("create")
    before = pod.git("status", "--porcelain")
    accepted = pod.run("show", flags=[*CREATE, "--with_changes"])
    assert accepted.end() == 0, accepted.err
    assert accepted.out.endswith("[0] x is 5\n")
    assert pod.git("status", "--porcelain") == before


def test_existing_tpu_gets_new_code_and_keeps_its_environment(pod: Pod) -> None:
    assert pod.run("show", flags=[*CREATE, "--keep"]).end() == 0
    code = pod.home(0) / "hyper_t5_run" / "code"
    (code / "stale.py").touch()
    (code / ".venv" / "installed").touch()
    second = pod.run("show")
    assert second.end() == 0, second.err
    assert (code / ".venv" / "installed").exists()
    assert not (code / "stale.py").exists()
    assert len(pod.calls("queued-resources create")) == 1
    assert "pod" in pod.get("nodes")
    (pod.home(1) / "no_disk").touch()
    failed = pod.run("show")
    assert failed.end() == 1
    assert "[1] No space left on device\n" in failed.err
    assert "tpu: error: worker pod/1 failed first, with code 1; logs: " in failed.err
    assert "argv" not in failed.out


# ---- failures ------------------------------------------------------------------------------------


def test_worker_reports_how_the_job_ended(pod: Pod) -> None:
    home = pod.home(0)
    (home / "hyper_t5_run").mkdir(parents=True)
    worker = ["bash", str(pod.root / "launch" / "tpu_worker.sh")]
    env = pod.env | {"HOME": str(home), "JAX_PROCESS_ID": "3"}
    pod.git("archive", "--format=tar.gz", f"--output={home}/code.tar.gz", "HEAD")
    subprocess.run([*worker, "prepare", str(home / "code.tar.gz")], env=env, check=True)
    for code, report in {
        0: "",
        1: f" ended with code 1 (failed); see its error, or the first worker that failed; {RESUME}",
        2: " ended with code 2 (invalid input); correct what its error names",
        75: " was preempted (code 75); it resumes from the newest checkpoint",
        134: " ended with code 134 (aborted); another worker may have been lost: "
        f"see the first worker that failed; {RESUME}",
        137: f" ended with code 137 (killed); the machine may be out of memory; {RESUME}",
    }.items():
        words = [*worker, "start", f"run{code}", "job", "exit", str(code)]
        ended = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60)
        assert ended.returncode == code, ended.stderr
        *lines, marker = ended.stdout.splitlines()
        reports = [line for line in lines if line.startswith("worker ")]
        assert reports == ([f"worker 3 (t1v-n-fake-w-3): the job{report}"] if report else [])
        assert marker.startswith(f"@@exit {code} ")


def test_first_failure_gives_the_exit_code(pod: Pod) -> None:
    launch = pod.run("exit", "134", "7", flags=[*CREATE, "--delete"])
    assert launch.end() == 7
    assert "[1] reason of 1\n" in launch.err
    assert "[1] worker 1 (t1v-n-fake-w-1): the job ended with code 7 (failed)" in launch.err
    assert "tpu: error: worker pod/1 failed first, with code 7; logs: " in launch.err
    assert "[0] worker 0 (t1v-n-fake-w-0): the job ended with code 134 (aborted)" in launch.out
    assert not pod.get("nodes")
    assert len(pod.calls("tpu_worker.sh start")) == 1  # no restart


def test_invalid_input_outranks_preemption(pod: Pod) -> None:
    launch = pod.run("exit", "2", "75", flags=CREATE)  # worker 1 ends first
    assert launch.end() == 2
    assert "[0] worker 0 (t1v-n-fake-w-0): the job ended with code 2 (invalid input)" in launch.out
    assert len(pod.calls("tpu_worker.sh start")) == 1
    assert REMINDER in launch.err


# ---- preemption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_preempted_job_resumes(pod: Pod, tmp_path: Path, number: int) -> None:
    launch = pod.run("count", "30", str(tmp_path), flags=CREATE)
    launch.wait_for("[0] step 3")
    pod.signal_all(number)  # SIGKILL: the machines restart
    assert launch.end() == 0, launch.err
    assert "tpu: restart 1 of at most 20, from the newest checkpoint" in launch.err
    [first] = re.findall(r"^\[0\] from step ([1-9]\d*)$", launch.out, re.MULTILINE)
    assert (f"[0] saved {first}\n" in launch.out) == (number == signal.SIGTERM)
    restarted = "the machine was restarted during the job" in launch.out
    assert restarted == (number == signal.SIGKILL)
    assert launch.out.endswith("[0] step 30\n")
    assert len(pod.calls("queued-resources create")) == 1


def test_preempted_spot_tpu_is_created_again(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "30", str(tmp_path), flags=[*CREATE, "--spot"])
    launch.wait_for("[0] step 3")
    pod.set(nodes={"pod": "PREEMPTED"}, requests={"pod": ["SUSPENDING", "SUSPENDED"]})
    (pod.cloud / "cut").touch()
    pod.signal_all(signal.SIGKILL)
    launch.wait_for("tpu: preempted")
    (pod.cloud / "cut").unlink()
    assert launch.end() == 0, launch.err
    assert re.search(r"\[0\] from step [3-9]", launch.out)
    assert launch.out.endswith("[0] step 30\n")
    assert ["--spot" in call for call in pod.calls("queued-resources create")] == [True, True]


def test_restarts_have_a_limit(pod: Pod) -> None:
    launch = pod.run("exit", "75", flags=[*CREATE, "--restarts", "1"])
    assert launch.end() == 75
    assert launch.out.count("argv") == 2


# ---- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize("event", ["cut", "drop"])
def test_broken_connection_does_not_start_the_job_twice(
    pod: Pod, tmp_path: Path, event: str
) -> None:
    """A cut outlasts the job, and gcloud connects again; after a drop, the script does."""
    launch = pod.run("count", "20", str(tmp_path), flags=CREATE)
    launch.wait_for("[0] step 3")
    (pod.cloud / event).touch()
    while not (pod.cloud / "was_cut").exists() or (event == "cut" and pod.processes()):
        time.sleep(0.02)
    (pod.cloud / "cut").unlink(missing_ok=True)
    assert launch.end() == 0, launch.err
    assert launch.out.endswith("[0] step 20\n")
    assert ("; connecting again" in launch.err) == (event == "drop")
    for worker in (0, 1):
        [run] = (pod.home(worker) / "hyper_t5_run" / "runs").iterdir()
        assert (run / "log").read_text().count("from step") == 1


def test_same_command_attaches_to_the_running_job(pod: Pod, tmp_path: Path) -> None:
    job = ["count", "100", str(tmp_path)]
    lost = pod.run(*job, flags=CREATE)
    lost.wait_for("[0] step 3")
    os.killpg(lost.process.pid, signal.SIGKILL)
    other = pod.run("count", "101", str(tmp_path))
    assert other.end() == 2
    assert "another job is running" in other.out
    again = pod.run(*job)
    assert again.end() == 0, again.err
    assert ": this job is already running; attaching to it\n" in again.out
    assert again.out.endswith("[0] step 100\n")
    [run] = (pod.home(1) / "hyper_t5_run" / "runs").iterdir()
    assert (run / "log").read_text().count("argv") == 1


def test_interrupt_stops_the_job_after_a_checkpoint(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "9999", str(tmp_path), flags=CREATE)
    launch.wait_for("[0] step 3")
    launch.process.send_signal(signal.SIGINT)
    assert launch.end() == 130
    assert "[0] saved " in launch.out
    assert not pod.processes()
    assert REMINDER in launch.err


@pytest.mark.parametrize(("verb", "grace"), [("count", "5"), ("hang", "0")])
def test_stop_from_another_terminal(pod: Pod, tmp_path: Path, verb: str, grace: str) -> None:
    launch = pod.run(verb, "9999", str(tmp_path), flags=CREATE)
    launch.wait_for("[0] step 3")
    (pod.home(1) / "libtpu_lockfile").touch()
    stop = pod.run(flags=["--stop", "--grace", grace])
    assert stop.end() == 0, stop.err
    assert not pod.processes()
    assert not (pod.home(1) / "libtpu_lockfile").exists()
    assert launch.end() == 143
    assert "the job was stopped (code 143)" in launch.out


# ---- errors before a run -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "create_flags"),
    [
        ("v3-32", ["--accelerator-type=v3-32", "--runtime-version=tpu-ubuntu2204-base"]),
        ("v5p-64", ["--accelerator-type=v5p-64", "--runtime-version=v2-alpha-tpuv5"]),
        ("v5e-8", ["--accelerator-type=v5litepod-8", "--runtime-version=v2-alpha-tpuv5-lite"]),
        ("v6e-64", ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"]),
    ],
)
def test_refused_creation_is_one_line(pod: Pod, size: str, create_flags: list[str]) -> None:
    (pod.cloud / "refused").write_text("Quota limit 'TPUV4PodPerProjectPerZone'\nwas exceeded.")
    launch = pod.run("show", flags=["--accelerator", size])
    assert launch.end() == 1
    error = launch.err.splitlines()[-1]
    assert error.startswith("tpu: error: ")
    assert "Quota limit 'TPUV4PodPerProjectPerZone' was exceeded." in error
    [create] = pod.calls("queued-resources create")
    assert set(create_flags) <= set(create)


def test_failed_request_and_denied_access(pod: Pod) -> None:
    pod.set(new=["FAILED"])
    failed = pod.run("show", flags=CREATE)
    assert failed.end() == 1
    assert "the request failed; see: gcloud compute tpus queued-resources describe" in failed.err
    (pod.cloud / "denied").write_text("You do not currently have an active account selected.")
    denied = pod.run("show", flags=CREATE)
    assert denied.end() == 1
    assert "active account" in denied.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "job", "message"),
    [
        (["--name", "Pod"], ["show"], "--name takes lower-case letters"),
        (["--nmae", "pod"], ["show"], "unknown flag --nmae"),
        (["train"], ["show"], "unknown flag train"),
        (["--restarts", "-1"], ["show"], "--restarts takes a whole number, got '-1'"),
        (["--zone"], [], "--zone needs a value"),
        (CREATE, [], "no job; write it after --"),
        ([], ["show"], "no usable TPU named pod; use --accelerator or --topology"),
    ],
)
def test_invalid_input_is_one_line(
    pod: Pod, flags: list[str], job: list[str], message: str
) -> None:
    launch = pod.run(*job, flags=flags)
    assert launch.end() == 2
    error = launch.err.splitlines()[-1]
    assert error.startswith("tpu: error: ")
    assert message in error
    assert not pod.calls("create")


def test_missing_gcloud_is_one_line(pod: Pod, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("bash", "dirname", "date", "git"):
        (few / name).symlink_to(str(shutil.which(name)))
    launch = pod.run("show", flags=CREATE, PATH=str(few))
    assert launch.end() == 2
    assert launch.err.startswith("tpu: error: gcloud is not on PATH; install it")
    assert launch.err.count("\n") == 1
