"""A checkout with the launch scripts, the workers of a fake TPU, and what was launched on them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import processes

LIMIT = 60.0  # seconds; a busy machine is no failure, a hang is one

# Arguments that a shell could break.
HARD = [
    *("a b", "(c)", 'say "hi"', "it's", "$HOME", "a\\b", "*", "", "ü", "two\nlines"),
    "--gin.x=[1, 'y']",
]

# In place of launch/setup.sh, which installs for minutes: an environment that is this one.
SETUP = """#!/usr/bin/env bash
cd "$(dirname "$0")/.." && mkdir -p .venv/bin
echo "setup $*"
printf '#!/bin/sh\\nexec {python} "$@"\\n' >.venv/bin/python
chmod +x .venv/bin/python
[ ! -e "$HOME/no_disk" ] || {{ echo "No space left on device"; exit 1; }}
"""

# In place of the package. Its commands: show WORD..., exit CODE [CODE OF WORKER 1], hang,
# count STEPS FOLDER.
TOY = """
import json, os, signal, sys, time
from pathlib import Path

worker = int(os.environ["JAX_PROCESS_ID"])
print("argv", json.dumps(sys.argv[1:]), "in", Path.cwd().name, flush=True)
verb, *words = sys.argv[1:]
if verb == "show":
    print("worker", worker, "of", os.environ["JAX_NUM_PROCESSES"], os.environ.get("MINE"))
    print("without a line's end", end="")
elif verb == "exit":
    code = int(words[-1] if worker else words[0])
    if len(words) == 2 and worker == 0:
        time.sleep(0.2)
    print("reason of", worker, flush=True)
    if code > 128:
        os.kill(os.getpid(), code - 128)
    sys.exit(code)
elif verb == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("step 3", flush=True)
    time.sleep(600)
elif verb == "count":
    saved, signals = Path(words[1], f"step{worker}"), []
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    first = int(saved.read_text()) if saved.exists() else 0
    print("from step", first, flush=True)
    for step in range(first, int(words[0])):
        time.sleep(0.05)
        print("step", step + 1, flush=True)
        saved.with_suffix(".part").write_text(str(step + 1))
        saved.with_suffix(".part").rename(saved)
        if signals:
            print("saved", step + 1)
            sys.exit(75)
"""

# Background jobs of a shell, perhaps these tests too, ignore SIGINT. This is a process of its own
# because JAX warns of code between fork and exec.
WITH_SIGINT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Launch:
    """A running launch script and its output so far."""

    def __init__(self, argv: Sequence[str], env: dict[str, str], folder: Path) -> None:
        folder.mkdir()
        self._out, self._err = folder / "out", folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", WITH_SIGINT, *argv],
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
        """Wait until the output contains a text this many times."""
        deadline = time.monotonic() + seconds
        while (self.out + self.err).count(text) < times:
            assert self.process.poll() is None, f"ended without {text!r}\n{self.out}\n{self.err}"
            assert time.monotonic() < deadline, f"no {text!r}\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def end(self, seconds: float = LIMIT) -> int:
        """Wait for the end and return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running\n{self.out}\n{self.err}") from None


class Pod:
    """A git checkout, a fake gcloud, and the launches that use them."""

    def __init__(self, folder: Path, repo: Path, toy: bool = True) -> None:
        self.folder, self.cloud = folder, folder / "cloud"
        self.root = folder / "a checkout"  # the space is on purpose
        self.launches: list[Launch] = []
        (self.cloud / "homes").mkdir(parents=True)
        self.set(nodes={}, requests={}, new=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
        self._check_out(repo, toy)
        self.programs = folder / "bin"
        self.programs.mkdir()
        gcloud = repo / "tests" / "support" / "fake_gcloud.py"
        self.add_program("gcloud", f'exec {sys.executable} -S -E "{gcloud}" "$@"')
        self.add_program("hostname", "echo t1v-n-fake-w-$JAX_PROCESS_ID")
        self.env = {
            **os.environ,
            "PATH": f"{self.programs}:{os.environ['PATH']}",
            "FAKE_CLOUD": str(self.cloud),
            "FAKE_PORT": str(processes.free_port()),
        }
        for name in ("GIT_DIR", "GIT_INDEX_FILE"):
            self.env.pop(name, None)

    def add_program(self, name: str, line: str) -> None:
        """Put a program of one line of shell on PATH."""
        (self.programs / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.programs / name).chmod(0o755)

    def _check_out(self, repo: Path, toy: bool) -> None:
        shutil.copytree(repo / "launch", self.root / "launch")
        python = f"{sys.executable} -S -E" if toy else sys.executable
        (self.root / "launch" / "setup.sh").write_text(SETUP.format(python=python))
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
        user = ["-c", "user.name=me", "-c", "user.email=me@here", "-c", "commit.gpgsign=false"]
        argv = ["git", "-C", str(self.root), *user, *words]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout

    def set(self, **parts: Any) -> None:
        """Change parts of the fake cloud's state."""
        file = self.cloud / "cloud.json"
        state = json.loads(file.read_text()) if file.exists() else {}
        part = file.with_suffix(".part")
        part.write_text(json.dumps(state | parts))
        part.rename(file)

    def get(self, part: str) -> dict[str, Any]:
        return json.loads((self.cloud / "cloud.json").read_text())[part]

    def calls(self, text: str) -> list[list[str]]:
        """Return the calls of gcloud so far that contain a text."""
        file = self.cloud / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call for call in map(json.loads, lines) if text in " ".join(call)]

    def home(self, worker: int, node: str = "pod") -> Path:
        return self.cloud / "homes" / f"{node}-{worker}"

    def logs(self, name: str) -> list[str]:
        """Return the texts of a worker's log, such as ``job-0-1/pod/1.log``, in all launches."""
        return [file.read_text() for file in (self.root / "runs" / "tpu").glob(f"*/{name}")]

    def start(self, *words: str, script: str = "tpu_run.sh", **env: str) -> Launch:
        argv = ["bash", str(self.root / "launch" / script), *words]
        folder = self.folder / f"launch{len(self.launches)}"
        self.launches.append(Launch(argv, self.env | env, folder))
        return self.launches[-1]

    def run(self, *job: str, flags: Sequence[str] = (), **env: str) -> Launch:
        """Start a job on `pod`, of two workers."""
        quick = ["--name", "pod", "--zone", "z", "--poll", "0", "--grace", "5"]
        return self.start(*quick, *flags, *(["--", *job] if job else []), **env)

    def processes(self, worker: int | None = None) -> list[int]:
        """Return the ids of a worker's processes, or of all workers', by their environment."""
        mark = f"HYPER_T5_RUN={self.cloud if worker is None else self.home(worker)}/".encode()
        ids = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and mark in (folder / "environ").read_bytes():
                    ids.append(int(folder.name))
        return sorted(ids)  # a job's shell precedes its children

    def job_process(self, worker: int) -> int:
        """Return the id of a worker's Python process, not of the shell around it."""
        for pid in self.processes(worker):
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"hyper_t5\0" in command and b"bash" not in command:
                return pid
        raise AssertionError(f"worker {worker} runs no job")

    def signal_all(self, number: int) -> None:
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def close(self) -> None:
        for launch in self.launches:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launch.process.pid, signal.SIGKILL)
            launch.process.wait()
        self.signal_all(signal.SIGKILL)
        (self.cloud / "cut").unlink(missing_ok=True)  # ends gcloud processes that wait for it
