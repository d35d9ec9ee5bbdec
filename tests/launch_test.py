"""launch/tpu_run.sh and gpu_run.sh, offline: a stand-in `gcloud`, whose TPU is this machine.

The stand-in keeps the state of its TPUs in a folder, gives each worker a home folder there, and
runs what comes by ssh as a local process, with the variables that put several of them into one run.
Most tests send a toy in place of the package; the slow ones train.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import procs
import runs

SCRIPTS = ["tpu_run.sh", "tpu_worker.sh", "gpu_run.sh"]
LIMIT = 60.0  # seconds; a busy machine is no failure, a hang is one

# What `gcloud` does with its words, and what it then keeps:
#   cloud.json  {"nodes": {NAME: {"state", "workers", "kind"}}, "requests": {NAME: [state, ...]}}
#   calls       a line of JSON a call
#   refuse      its text is the error of the next creation;  denied: of every call
#   cut         while it is there, ssh loses its connection, as often as gcloud tries
GCLOUD = r"""
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

here = Path(os.environ["FAKE_CLOUD"])
words = [w for w in sys.argv[1:] if not w.startswith("--")]
flags = dict(w[2:].partition("=")[::2] for w in sys.argv[1:] if w.startswith("--"))
with open(here / "calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\n")


def fail(text, code=1):
    print("ERROR: (gcloud." + ".".join(words[:4]) + ")", text, file=sys.stderr)
    sys.exit(code)


def node_of(name):
    if name not in cloud["nodes"]:
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")
    return cloud["nodes"][name]


def save():
    part = here / f"cloud.json.{os.getpid()}"
    part.write_text(json.dumps(cloud))
    part.rename(here / "cloud.json")


def home_of(name, worker):
    return here / "homes" / f"{name}-{worker}"


def make(name, workers, kind):
    cloud["nodes"][name] = {"state": "READY", "workers": workers, "kind": kind}
    for worker in range(workers):
        shutil.rmtree(home_of(name, worker), ignore_errors=True)
        home_of(name, worker).mkdir(parents=True)


def create(name, queued):
    if (here / "refuse").exists():
        text = (here / "refuse").read_text()
        (here / "refuse").unlink()
        fail(text)
    kind = flags.get("accelerator-type", "")
    workers = 2 if "type" in flags else int(kind.rpartition("-")[2]) // 8
    if queued:
        cloud["requests"][name] = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
        for node in [flags["node-id"]] if "node-id" in flags else [
            f"{name}-{i}" for i in range(int(flags["node-count"]))
        ]:
            make(node, workers, kind)
    else:
        make(name, workers, kind)
    save()


def ssh(name, worker, command):
    node = node_of(name)
    if node["state"] != "READY":
        fail(f'This TPU has terminal state "{node["state"]}", so it cannot be used anymore.')
    home = home_of(name, worker)
    first = name.rpartition("-")[0] if flags.get("slices") else name
    env = {
        **os.environ,
        "HOME": str(home),
        "LIBTPU_LOCKFILE": str(home / "libtpu_lockfile"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{os.environ['FAKE_PORT']}",
        "JAX_NUM_PROCESSES": str(node["workers"]),
        "JAX_PROCESS_ID": str(worker),
    }
    for attempt in range(10):
        print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
        child = subprocess.Popen(
            ["bash", "-c", command], cwd=home, env=env, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        while child.poll() is None and not (here / "cut").exists():
            time.sleep(0.05)
        if child.returncode is not None:
            sys.exit(child.returncode)
        os.killpg(child.pid, signal.SIGKILL)
        print("Retrying: SSH command error: [ssh] exited with return code [255].", file=sys.stderr)
        (here / "was_cut").touch()
        while (here / "cut").exists() and json.loads((here / "cloud.json").read_text()) == cloud:
            time.sleep(0.05)
        if (here / "cut").exists():
            fail("[ssh] exited with return code [255].", 255)


if words[:2] == ["config", "get-value"]:
    print(os.environ.get("FAKE_" + words[2].rpartition("/")[2].upper(), ""))
    sys.exit()
if (here / "denied").exists():
    fail((here / "denied").read_text())
assert words[:2] == ["compute", "tpus"], words
assert flags["zone"] == "z" and flags["project"] == "p" and "quiet" in flags, flags
cloud = json.loads((here / "cloud.json").read_text())
what, verb, *names = words[2:]
if what == "queued-resources":
    [name] = names
    if verb == "create":
        create(name, queued=True)
    elif name not in cloud["requests"]:
        fail("NOT_FOUND: no such queued resource")
    elif verb == "describe" and "failedData" in flags["format"]:
        print("no capacity was found in time")
    elif verb == "describe":
        states = cloud["requests"][name]
        print(states[0])
        if len(states) > 1:
            del states[0]
            save()
    elif verb == "delete":
        assert "force" in flags
        del cloud["requests"][name]
        cloud["nodes"] = {k: v for k, v in cloud["nodes"].items() if not k.startswith(name)}
        save()
elif verb == "describe":
    node = node_of(names[0])
    print(node["state"], node["workers"], node["kind"], sep="\t")
elif verb == "create":
    create(names[0], queued=False)
elif verb == "start":
    node_of(names[0])["state"] = "READY"
    save()
elif verb == "delete":
    del cloud["nodes"][names[0]]
    save()
elif verb == "scp":
    name, _, path = names[1].partition(":")
    node_of(name)
    shutil.copy(names[0], home_of(name, flags["worker"]) / path)
elif verb == "ssh":
    ssh(names[0], int(flags["worker"]), flags["command"])
else:
    raise AssertionError(words)
"""

# In place of launch/setup.sh, which would install for minutes: an environment that is this one.
SETUP = """#!/usr/bin/env bash
cd "$(dirname "$0")/.." && mkdir -p .venv/bin
echo "setup $*"
printf '#!/bin/sh\\nexec %s "$@"\\n' '{python}' >.venv/bin/python
chmod +x .venv/bin/python
[ ! -e {home}/no_disk ] || {{ echo "No space left on device"; exit 1; }}
"""

# In place of the package. Its commands: show WORD..., exit CODE WORKER [CODE OF THE OTHERS],
# count STEPS FOLDER, preempted.
TOY = """
import json, os, signal, sys, time
from pathlib import Path

me = int(os.environ["JAX_PROCESS_ID"])
print("argv", json.dumps(sys.argv[1:]), "here", Path.cwd().name, flush=True)
verb, *words = sys.argv[1:]
if verb == "show":
    print("worker", me, "of", os.environ["JAX_NUM_PROCESSES"], os.environ.get("MINE"))
    print("without a line's end", end="")
elif verb == "exit":
    if me == int(words[1]):
        print("reason of", me)
        sys.exit(int(words[0]))
    print("waiting for the others", flush=True)
    time.sleep(0.5 if words[2:] else 300)
    sys.exit(int(words[2]))
elif verb == "preempted":
    sys.exit(75)
elif verb == "count":
    kept, asked = Path(words[1], f"step{me}"), []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    first = int(kept.read_text()) if kept.exists() else 0
    print("from step", first, flush=True)
    for step in range(first, int(words[0])):
        time.sleep(0.1)
        print("step", step + 1, flush=True)
        kept.with_suffix(".part").write_text(str(step + 1))
        kept.with_suffix(".part").rename(kept)
        if asked:
            print("saved", step + 1)
            sys.exit(75)
"""


# Runs a command that hears of interrupts: a shell's background jobs, maybe these tests, do not.
# A process between, for code of ours between fork and exec would make JAX warn of the fork.
HEARING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Launch:
    """A launcher that runs, and its output so far."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        folder.mkdir()
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", HEARING, *argv],
                env=env,
                cwd=folder,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait_for(self, text: str, times: int = 1, seconds: float = LIMIT) -> None:
        """Until its output holds the text so many times."""
        deadline = time.monotonic() + seconds
        while (self.out + self.err).count(text) < times:
            assert self.process.poll() is None, f"ended without {text!r}\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no {text!r}\n{self.out}\n{self.err}"
            time.sleep(0.05)

    def end(self, seconds: float = LIMIT) -> int:
        """Its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.out}\n{self.err}") from None


class Pod:
    """A checkout, a stand-in for gcloud, and all that was started through it."""

    def __init__(self, folder: Path, repo: Path, toy: bool = True) -> None:
        self.folder, self.cloud = folder, folder / "cloud"
        self.root = folder / "a checkout"  # the space is on purpose
        self.started: list[Launch] = []
        (self.cloud / "homes").mkdir(parents=True)
        self.set(nodes={}, requests={})
        self._check_out(repo, toy)
        programs = folder / "bin"
        programs.mkdir()
        gcloud = programs / "gcloud"
        gcloud.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {folder}/gcloud.py "$@"\n')
        gcloud.chmod(0o755)
        (folder / "gcloud.py").write_text(GCLOUD)
        self.env = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.cloud),
            "FAKE_PORT": str(free_port()),
            "FAKE_PROJECT": "p",
            "FAKE_ZONE": "z",
        }
        for name in ("CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE", "GIT_DIR", "GIT_INDEX_FILE"):
            self.env.pop(name, None)

    def _check_out(self, repo: Path, toy: bool) -> None:
        shutil.copytree(repo / "launch", self.root / "launch")
        setup = SETUP.format(python=sys.executable, home="$HOME")
        (self.root / "launch" / "setup.sh").write_text(setup)
        (self.root / ".gitignore").write_text("/runs/\n/.venv/\n__pycache__/\n")
        if toy:
            (self.root / "hyper_t5").mkdir()
            (self.root / "hyper_t5" / "__main__.py").write_text(TOY)
        else:
            skip = shutil.ignore_patterns("__pycache__")
            for name in ("hyper_t5", "configs", "tasks"):
                shutil.copytree(repo / name, self.root / name, symlinks=True, ignore=skip)
        self.git("init", "-q")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "all")

    def git(self, *words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        argv = ["git", "-C", str(self.root), *who, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def set(self, **parts: Any) -> None:
        """Changes a part of the cloud's state."""
        file = self.cloud / "cloud.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(state | parts))
        part.rename(file)

    @property
    def nodes(self) -> dict[str, Any]:
        return json.loads((self.cloud / "cloud.json").read_text())["nodes"]

    def calls(self, *words: str) -> list[list[str]]:
        """The calls of gcloud so far that hold all these words."""
        file = self.cloud / "calls"
        made = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in made if all(w in " ".join(call) for w in words)]

    def home(self, worker: int, node: str = "pod") -> Path:
        return self.cloud / "homes" / f"{node}-{worker}"

    def start(self, *words: str, script: str = "tpu_run.sh", **env: str) -> Launch:
        argv = ["bash", str(self.root / "launch" / script), *words]
        made = Launch(argv, self.env | env, self.folder / f"launch{len(self.started)}")
        self.started.append(made)
        return made

    def run(self, *job: str, flags: Sequence[str] = (), **env: str) -> Launch:
        """A launch on `pod`, of two workers, to its end or to where the test goes on."""
        quick = ["--name", "pod", "--poll", "0", "--grace", "1"]
        return self.start(*quick, *flags, *(["--", *job] if job else []), **env)

    def processes(self) -> list[int]:
        """All that jobs have running, by the mark in their environment."""
        mark, found = f"HYPER_T5_RUN={self.cloud}/".encode(), []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and mark in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return sorted(found)  # a job's shell comes before what it started

    def pythons(self, worker: int) -> list[int]:
        """Ids of the job's own process on a worker, not of the shell around it."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                environ = Path(f"/proc/{pid}/environ").read_bytes()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if f"{self.home(worker)}/".encode() in environ and b"hyper_t5\0" in command:
                    found.append(pid)
        return [pid for pid in found if b"bash" not in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def signal_all(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        for launch in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launch.process.pid, signal.SIGKILL)
            launch.process.wait()
        self.signal_all(signal.SIGKILL)
        (self.cloud / "cloud.json").unlink()  # ends those who wait for the cut to be over


@pytest.fixture
def pod(tmp_path: Path, repo_root: Path) -> Iterator[Pod]:
    made = Pod(tmp_path, repo_root)
    yield made
    made.close()


MAKE = ["--accelerator", "v4-16"]
HARD = [
    "a b",
    "(c)",
    'say "hi"',
    "it's",
    "$HOME",
    "a\\b",
    "*",
    "",
    "ü",
    "two\nlines",
    "--gin.x=[1, 'y']",
]


# ---- the scripts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_sound(script: str, repo_root: Path) -> None:
    path = repo_root / "launch" / script
    subprocess.run(["bash", "-n", path], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here")
    checked = subprocess.run(["shellcheck", path], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


# ---- a run ---------------------------------------------------------------------------------------


def test_same_command_runs_on_every_worker_and_its_words_stay_whole(pod: Pod) -> None:
    launch = pod.run("show", *HARD, flags=[*MAKE, "--env", "MINE=a value"])
    assert launch.end() == 0, launch.err
    [first, second, third] = launch.out.splitlines()
    assert first == f"[0] argv {json.dumps(['show', *HARD])} here code"
    assert second == "[0] worker 0 of 2 a value"
    assert third == "[0] without a line's end"
    [logs] = (pod.root / "runs" / "tpu").iterdir()
    other = (logs / "worker-1.log").read_text().splitlines()
    assert other == [first.removeprefix("[0] "), "worker 1 of 2 a value", "without a line's end"]
    assert "setup --extra tpu" in (logs / "prepare-1.log").read_text()
    assert not pod.nodes  # made for this, and deleted
    [create] = pod.calls("tpu-vm create")
    assert {"--version=tpu-ubuntu2204-base", "--accelerator-type=v4-16"} <= set(create)
    assert not list(logs.glob("*.tar.gz"))


def test_what_runs_is_the_commit_or_with_a_flag_the_working_tree(pod: Pod) -> None:
    main = pod.root / "hyper_t5" / "__main__.py"
    main.write_text("from hyper_t5.more import x\nprint('x is', x)\n")
    (main.parent / "more.py").write_text("x = 5\n")  # known to nobody
    refused = pod.run("show", flags=MAKE)
    assert refused.end() == 2
    assert "2 files are not committed, the first:  M hyper_t5/__main__.py" in refused.err
    assert not pod.calls("create")
    before = pod.git("status", "--porcelain")
    taken = pod.run("show", flags=[*MAKE, "--with_changes"])
    assert taken.end() == 0, taken.err
    assert taken.out == "[0] x is 5\n"
    assert pod.git("status", "--porcelain") == before


def test_code_is_replaced_but_not_the_environment(pod: Pod) -> None:
    assert pod.run("show", flags=[*MAKE, "--keep"]).end() == 0
    code = pod.home(0) / "hyper_t5_run" / "code"
    (code / "gone.py").touch()
    (code / ".venv" / "kept").touch()
    again = pod.run("show", flags=["--reuse"])
    assert again.end() == 0, again.err
    assert (code / ".venv" / "kept").exists()
    assert not (code / "gone.py").exists()
    assert len(pod.calls("tpu-vm create")) == 1
    assert "pod" in pod.nodes


# ---- failures ------------------------------------------------------------------------------------


def test_mistake_of_the_user_ends_all_and_is_not_repeated(pod: Pod) -> None:
    launch = pod.run("exit", "75", "0", "2", flags=MAKE)  # it counts more than a preemption
    assert launch.end() == 2
    assert len(pod.calls("tpu_worker.sh start")) == 2
    assert not pod.processes()
    kept = "tpu: pod is kept, and billed; to end it: gcloud compute tpus tpu-vm delete pod"
    assert kept in launch.err


def test_failed_worker_stops_the_others_and_shows_its_log(pod: Pod) -> None:
    launch = pod.run("exit", "7", "1", flags=[*MAKE, "--delete"])
    launch.wait_for("waiting for the others")
    for worker in (0, 1):
        (pod.home(worker) / "libtpu_lockfile").touch()
    start = time.monotonic()
    assert launch.end() == 7
    assert time.monotonic() - start < 30
    assert not pod.processes()
    assert "[1] reason of 1\n" in launch.err
    assert "tpu: worker 1 was the first to fail" in launch.err
    assert not (pod.home(0) / "libtpu_lockfile").exists()
    assert not pod.nodes
    assert len(pod.calls("tpu_worker.sh start")) == 2  # no restart


def test_killed_worker(pod: Pod) -> None:
    launch = pod.run("exit", "0", "9", flags=MAKE)
    launch.wait_for("waiting for the others")
    while not pod.pythons(1):
        time.sleep(0.05)
    for pid in pod.pythons(1):
        os.kill(pid, signal.SIGKILL)
    assert launch.end() == 137
    assert "tpu: worker 1: killed (exit code 137)" in launch.err
    assert not pod.processes()


def test_installation_that_fails_names_the_worker(pod: Pod) -> None:
    assert pod.run("show", flags=[*MAKE, "--keep"]).end() == 0
    (pod.home(1) / "no_disk").touch()
    launch = pod.run("show")
    assert launch.end() == 1
    assert "[1] No space left on device" in launch.err
    assert "error: worker 1 could not be prepared" in launch.err
    assert "argv" not in launch.out


# ---- preemption ----------------------------------------------------------------------------------


def test_preempted_job_goes_on(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "30", str(tmp_path), flags=MAKE)
    launch.wait_for("[0] step 3")
    pod.signal_all(signal.SIGTERM)
    assert launch.end() == 0, launch.err
    assert "tpu: restart 1 of at most 20" in launch.err
    [saved] = re.findall(r"^\[0\] saved (\d+)$", launch.out, re.MULTILINE)
    assert f"[0] from step {saved}\n" in launch.out
    assert launch.out.endswith("[0] step 30\n")
    assert len(pod.calls("tpu-vm create")) == 1


def test_job_whose_machines_restarted_goes_on(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "20", str(tmp_path), flags=MAKE)
    launch.wait_for("[0] step 3")
    pod.signal_all(signal.SIGKILL)
    assert launch.end() == 0, launch.err
    assert "left no exit code: this machine was restarted" in launch.out
    assert re.search(r"\[0\] from step [3-9]", launch.out)


def test_spot_tpu_that_was_taken_away_is_made_again(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "30", str(tmp_path), flags=[*MAKE, "--spot"])
    launch.wait_for("[0] step 3")
    (pod.cloud / "cut").touch()
    pod.set(nodes={"pod": {"state": "PREEMPTED", "workers": 2, "kind": "v4-16"}})
    pod.signal_all(signal.SIGKILL)
    launch.wait_for("pod is PREEMPTED")
    (pod.cloud / "refuse").write_text('There is no more capacity in the zone "z"')
    (pod.cloud / "cut").unlink()
    assert launch.end() == 0, launch.err
    assert "z has none to give now: trying again" in launch.err
    assert re.search(r"\[0\] from step [3-9]", launch.out)
    assert launch.out.endswith("[0] step 30\n")
    assert ["--spot" in call for call in pod.calls("tpu-vm create")] == [True] * 3


def test_restarts_have_a_limit(pod: Pod) -> None:
    launch = pod.run("preempted", flags=[*MAKE, "--restarts", "1"])
    assert launch.end() == 75
    assert launch.out.count("argv") == 2
    assert "restarted 1 times already (--restarts)" in launch.err


# ---- connections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meanwhile", [pytest.param("it goes on", marks=pytest.mark.slow), "it ends"]
)
def test_broken_connection_does_not_start_the_job_twice(
    pod: Pod, tmp_path: Path, meanwhile: str
) -> None:
    launch = pod.run("count", "40", str(tmp_path), flags=MAKE)
    launch.wait_for("[0] step 3")
    (pod.cloud / "cut").touch()
    while not (pod.cloud / "was_cut").exists() or (meanwhile == "it ends" and pod.processes()):
        time.sleep(0.05)
    (pod.cloud / "cut").unlink()
    assert launch.end() == 0, launch.err
    assert launch.out.endswith("[0] step 40\n")
    for worker in (0, 1):
        [run] = (pod.home(worker) / "hyper_t5_run" / "runs").iterdir()
        assert (run / "log").read_text().count("from step") == 1


def test_same_command_line_watches_the_job_that_it_finds(pod: Pod, tmp_path: Path) -> None:
    job = ["count", "60", str(tmp_path)]
    lost = pod.run(*job, flags=MAKE)
    lost.wait_for("[0] step 3")
    os.killpg(lost.process.pid, signal.SIGKILL)
    other = pod.run("count", "61", str(tmp_path))
    assert other.end() == 2
    assert "another job is running here" in other.out
    again = pod.run(*job)
    assert again.end() == 0, again.err
    assert "[0] worker: this very job is running here already: watching it" in again.out
    assert "[0] step 60\n" in again.out
    [run] = (pod.home(1) / "hyper_t5_run" / "runs").iterdir()
    assert (run / "log").read_text().count("argv") == 1


def test_interrupt_ends_the_job_on_all_workers_after_it_saved(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "9999", str(tmp_path), flags=MAKE)
    launch.wait_for("[0] step 3")
    launch.process.send_signal(signal.SIGINT)
    assert launch.end() == 130
    assert "[0] saved " in launch.out
    assert not pod.processes()
    assert "pod is kept, and billed" in launch.err


def test_stop_ends_what_another_terminal_started(pod: Pod, tmp_path: Path) -> None:
    launch = pod.run("count", "9999", str(tmp_path), flags=MAKE)
    launch.wait_for("[0] step 3")
    (pod.home(1) / "libtpu_lockfile").touch()
    stop = pod.run(flags=["--stop"])
    assert stop.end() == 0, stop.err
    assert not pod.processes()
    assert not (pod.home(1) / "libtpu_lockfile").exists()
    assert launch.end() == 143  # ended by hand, so no restart


# ---- making a TPU --------------------------------------------------------------------------------


def test_queued_resource_is_waited_for(pod: Pod) -> None:
    launch = pod.run("show", flags=[*MAKE, "--queued_resource", "--spot"])
    assert launch.end() == 0, launch.err
    seen = [line for line in launch.err.splitlines() if line.startswith("tpu: pod in z: ")]
    states = ["ABSENT", "WAITING_FOR_RESOURCES", "PROVISIONING", "READY"]
    assert seen == [f"tpu: pod in z: {state}" for state in states]
    [create] = pod.calls("queued-resources create")
    assert {"--node-id=pod", "--spot", "--runtime-version=tpu-ubuntu2204-base"} <= set(create)
    assert pod.calls("queued-resources delete", "--force")


@pytest.mark.slow
def test_several_slices_are_one_request(pod: Pod) -> None:
    launch = pod.run("show", flags=["--accelerator", "v4-16", "--slices", "2"])
    assert launch.end() == 0, launch.err
    ran = [(c[3], c[4], c[5]) for c in pod.calls("tpu_worker.sh start")]
    assert sorted(ran) == [("ssh", f"pod-{s}", f"--worker={w}") for s in range(2) for w in range(2)]


def test_states_of_a_tpu_that_is_there(pod: Pod) -> None:
    pod.set(nodes={"pod": {"state": "STOPPED", "workers": 2, "kind": "v4-16"}})
    for worker in (0, 1):
        pod.home(worker).mkdir()
    launch = pod.run("show")
    assert launch.end() == 0, launch.err
    assert pod.calls("tpu-vm start")
    other = pod.run("show", flags=["--accelerator", "v4-32"])
    assert other.end() == 2
    assert "error: pod is a v4-16, not a v4-32" in other.err
    pod.set(nodes={"pod": {"state": "PREEMPTED", "workers": 2, "kind": "v4-16"}})
    gone = pod.run("show")
    assert gone.end() == 2
    assert "no usable TPU pod in z: give --accelerator" in gone.err
    assert "pod" in pod.nodes


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Quota limit 'TPUV4PodPerProjectPerZone' has been exceeded. Limit: 0", "no quota left"),
        ("RESOURCE_EXHAUSTED: There is no more capacity in the zone", "z has none to give now"),
        ("PERMISSION_DENIED: Permission 'tpu.nodes.create' denied", "role TPU Admin"),
        ("INVALID_ARGUMENT: accelerator type is not valid", "gcloud refused"),
    ],
)
def test_refusal_of_a_tpu_is_one_line(pod: Pod, theirs: str, ours: str) -> None:
    (pod.cloud / "refuse").write_text(theirs)
    launch = pod.run("show", flags=MAKE)
    assert launch.end() == 1
    error = launch.err.splitlines()[-1]
    assert error.startswith("tpu: error: ")
    assert ours in error
    assert theirs in error


def test_refusal_of_the_account(pod: Pod) -> None:
    (pod.cloud / "denied").write_text("You do not currently have an active account selected.")
    launch = pod.run("show", flags=MAKE)
    assert launch.end() == 1
    assert "log in first: gcloud auth login" in launch.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "job", "env", "message"),
    [
        (["--name", "Pod"], ["show"], {}, "--name takes the TPU's name"),
        (["--nmae", "pod"], ["show"], {}, "unknown flag --nmae"),
        (["--restarts", "-1"], ["show"], {}, "--restarts takes a whole number, got '-1'"),
        (["--zone"], [], {}, "--zone needs a value"),
        (["--env", "X"], ["show"], {}, "--env takes NAME=VALUE, got 'X'"),
        (MAKE, [], {}, "give the job after --"),
        ([], ["show"], {"FAKE_PROJECT": ""}, "give --project"),
        ([], ["show"], {"FAKE_ZONE": ""}, "give --zone"),
        ([], ["show"], {}, "give --accelerator or --topology to make it"),
        (["train"], ["show"], {}, "'train' is no flag"),
        ([*MAKE, "--reuse"], ["show"], {}, "pod is ABSENT, and --reuse makes none"),
        ([*MAKE, "--topology", "v4:2x2x2"], ["show"], {}, "not both"),
        (["--topology", "v4-2x2x2"], ["show"], {}, "--topology takes KIND:SIZES"),
        (["--keep", "--delete"], ["show"], {}, "--keep or --delete"),
    ],
)
def test_mistakes_are_one_line(
    pod: Pod, flags: list[str], job: list[str], env: dict[str, str], message: str
) -> None:
    launch = pod.run(*job, flags=flags, **env)
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
    launch = pod.run("show", flags=MAKE, PATH=str(few))
    assert launch.end() == 2
    assert launch.err.startswith("tpu: error: gcloud is not on PATH: install it")
    assert launch.err.count("\n") == 1


# ---- a dry run -----------------------------------------------------------------------------------


def test_dry_run_contacts_nothing_and_its_lines_do_the_job(pod: Pod, tmp_path: Path) -> None:
    flags = [*MAKE, "--dry-run", "--logs", str(tmp_path / "my logs"), "--zone=z", "--project=p"]
    dry = pod.run("show", *HARD, flags=flags)
    assert dry.end() == 0, dry.err
    assert not pod.calls()
    lines = [line for line in dry.out.splitlines() if not line.startswith("#")]
    verbs = [shlex.split(line)[3:5] for line in lines[2:]]
    each = [["tpu-vm", "scp"], ["tpu-vm", "ssh"]]
    make, look, end = (["tpu-vm", verb] for verb in ("create", "describe", "delete"))
    assert verbs == [make, look, *each, *each, ["tpu-vm", "ssh"], ["tpu-vm", "ssh"], end]
    done = subprocess.run(
        ["bash", "-e"], input=dry.out, env=pod.env, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"argv {json.dumps(['show', *HARD])} here code") == 2
    assert not pod.nodes


@pytest.mark.parametrize(
    ("size", "workers", "version"),
    [
        ("v3-32", 4, "tpu-ubuntu2204-base"),
        ("v4-8", 1, "tpu-ubuntu2204-base"),
        ("v4:2x2x4", 4, "tpu-ubuntu2204-base"),
        ("v5p-64", 8, "v2-alpha-tpuv5"),
        ("v5e-8", 1, "v2-alpha-tpuv5-lite"),
        ("v5e:4x4", 4, "v2-alpha-tpuv5-lite"),
        ("v6e-64", 16, "v2-alpha-tpuv6e"),
    ],
)
def test_number_of_workers_and_image_by_kind(
    pod: Pod, size: str, workers: int, version: str
) -> None:
    flag = "--topology" if ":" in size else "--accelerator"
    flags = [flag, size, "--dry_run", "--zone", "z", "--project", "p"]
    dry = pod.run("show", flags=flags)
    assert dry.end() == 0
    assert len(re.findall("tpu_worker.sh start RUN", dry.out)) == workers
    assert f"--version={version} " in dry.out


# ---- SLURM ---------------------------------------------------------------------------------------

# Starts so many tasks as SLURM would, waits for all, and ends with the highest code.
SRUN = """#!/bin/bash
echo "$*" >>"$FAKE_CLOUD/srun"
while [[ "$1" == --* ]]; do shift; done
for ((i = 0; i < 2; i++)); do
  SLURM_PROCID=$i JAX_PROCESS_ID=$i JAX_NUM_PROCESSES=2 "$@" & pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid"; got=$?
  ((got > code)) && code=$got
done
exit $code
"""


@pytest.fixture
def cluster(pod: Pod) -> Pod:
    programs = pod.folder / "bin"
    for name, text in {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\necho "$*" >>"$FAKE_CLOUD/scontrol"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    subprocess.run(["bash", str(pod.root / "launch" / "setup.sh")], check=True)
    pod.env |= {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": str(pod.root)}
    return pod


def test_slurm_runs_the_same_command_in_every_task(cluster: Pod) -> None:
    launch = cluster.start("show", *HARD, script="gpu_run.sh")
    assert launch.end() == 0, launch.err
    assert launch.out.count(f"argv {json.dumps(['show', *HARD])} here a checkout") == 2
    assert not (cluster.cloud / "scontrol").exists()


def test_slurm_job_that_was_preempted_goes_back_into_the_queue(cluster: Pod) -> None:
    for done, calls in [("19", "requeue 17\n"), ("20", "requeue 17\n")]:
        launch = cluster.start("preempted", script="gpu_run.sh", SLURM_RESTART_COUNT=done)
        assert launch.end() == 75
        assert (cluster.cloud / "scontrol").read_text() == calls
    assert "restarted 20 times already" in launch.err


@pytest.mark.parametrize(
    ("job", "env", "message"),
    [
        ([], {}, "give the job"),
        (["show"], {"SLURM_JOB_ID": ""}, "there is no allocation"),
        (["show"], {"HYPER_T5_ROOT": "/nowhere"}, "there is no /nowhere/.venv"),
    ],
)
def test_mistakes_with_slurm_are_one_line(
    cluster: Pod, job: list[str], env: dict[str, str], message: str
) -> None:
    launch = cluster.start(*job, script="gpu_run.sh", **env)
    assert launch.end() == 2
    assert launch.err.startswith(f"gpu: error: {message}")
    assert launch.err.count("\n") == 1


# ---- two hosts that train ------------------------------------------------------------------------


@pytest.fixture
def hosts(tmp_path: Path, repo_root: Path) -> Iterator[Pod]:
    """A pod that runs the package itself, four devices a worker."""
    made = Pod(tmp_path / "pod", repo_root, toy=False)
    made.env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": procs.cpu_flags(4)}
    yield made
    made.close()


def job(folder: Path, **fields: Any) -> list[str]:
    """The arguments that train a tiny run over both workers, for longer than any test takes."""
    config = runs.make_config(
        backbone__path=str(runs.save_backbone(folder / "backbone")),
        data__sni_dir=str(runs.save_sni(folder / "sni")),
        data__tasks_per_batch=8,
        mesh__data=-1,
        **{"train__steps": 10**6, "train__save_every": 10**6} | fields,
    )
    return runs.command(config, folder / "run")


@pytest.mark.slow
def test_two_hosts_train_are_preempted_and_go_on(hosts: Pod, tmp_path: Path) -> None:
    launch = hosts.run(*job(tmp_path), flags=[*MAKE, "--grace", "60"])
    launch.wait_for("[0] step 4/", seconds=240)
    assert "[0] process 0 of 2: 4 local of 8 devices" in launch.out
    [one] = hosts.pythons(1)
    os.kill(one, signal.SIGTERM)  # one is told, both save the same step
    launch.wait_for("tpu: restart 1 of at most 20", seconds=120)
    launch.wait_for("to 1000000", times=2, seconds=240)
    [first, second] = re.findall(r"steps (\d+) to 1000000", launch.out)
    assert int(first) == 0 < int(second)
    launch.wait_for(f"[0] step {2 * (int(second) // 2) + 4}/", seconds=120)
    launch.process.send_signal(signal.SIGINT)
    assert launch.end(120) == 130, launch.out + launch.err
    steps = [line["step"] for line in runs.lines(tmp_path / "run")]
    assert steps == sorted(set(steps))
    judged = hosts.run("evaluate", "--workdir", str(tmp_path / "run"))
    assert judged.end(240) == 0, judged.out + judged.err
    [report] = (tmp_path / "run" / "eval").iterdir()
    assert int(report.name) >= steps[-1]
    assert (report / "metrics.json").exists()


@pytest.mark.soak
def test_two_hosts_one_dies_and_the_same_command_goes_on(hosts: Pod, tmp_path: Path) -> None:
    words = job(tmp_path, train__save_every=4)
    mistake = hosts.run(*words, "--gin.train.stepz=3", flags=MAKE)
    assert mistake.end(240) == 2
    assert "[0] hyper-t5: error: " in mistake.out
    launch = hosts.run(*words)
    launch.wait_for("[0] step 12/", seconds=240)
    [one] = hosts.pythons(1)
    os.kill(one, signal.SIGKILL)
    assert launch.end() == 137, launch.out + launch.err
    assert not hosts.processes()
    again = hosts.run(*words, "--gin.train.steps=16")
    assert again.end(240) == 0, again.out + again.err
    [first] = re.findall(r"steps (\d+) to 16", again.out)
    assert int(first) in (4, 8, 12)
