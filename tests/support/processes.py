"""Multi-process runs on the CPU over gloo: start, wait for output, signal, and collect results.

A failure is shown with the output of all processes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 300.0  # seconds; far above what a busy machine needs


class Result(NamedTuple):
    """Exit code (-9: killed by signal 9) and output of a process."""

    code: int
    stdout: str
    stderr: str


class Process:
    """A running process. Its output goes to files, as a pipe could fill up."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], folder: Path, name: str
    ) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # In a session of its own, so that it can be killed with its children.
            self.popen = subprocess.Popen(
                argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, not to its children."""
        self.popen.send_signal(number)

    def kill(self) -> None:
        """Kill the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def log(self) -> str:
        """Format all output, for the message of a failure."""
        code = self.popen.poll()
        return f"--- {self.name} (code {code})\n{self.stdout}--- its stderr\n{self.stderr}"


@contextlib.contextmanager
def start_processes(
    code: str | Sequence[str],
    count: int = 2,
    devices: int = 4,
    env: Mapping[str, str] | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[list[Process]]:
    """Start the processes of a run; kill those that are left at the end.

    Args:
      code: Python source, or the arguments of the interpreter (``["-m", "hyper_t5", ...]``).
      count: number of processes of the run.
      devices: CPU devices of each.
      env: additional variables; an empty value removes one.
      indices: the processes to start; by default all.
    """
    argv = ["-c", code] if isinstance(code, str) else list(code)
    address = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        started: list[Process] = []
        try:
            for index in range(count) if indices is None else indices:
                variables = _environment(devices, address, count, index) | dict(env or {})
                variables = {name: value for name, value in variables.items() if value}
                name = f"process {index}"
                command = [sys.executable, "-u", *argv]
                started.append(Process(command, variables, Path(folder), name))
            yield started
        except BaseException as error:
            error.add_note("\n".join(process.log() for process in started))
            raise
        finally:
            for process in started:
                process.kill()


def run_processes(
    code: str | Sequence[str],
    count: int = 2,
    devices: int = 4,
    timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None,
) -> list[Result]:
    """Run processes to their end; see `start_processes`. Raises TimeoutError when one hangs."""
    with start_processes(code, count, devices, env) as started:
        return join(started, timeout)


def join(started: Sequence[Process], timeout: float = TIMEOUT) -> list[Result]:
    """Wait until all have ended. Raises TimeoutError when one has not."""
    deadline = time.monotonic() + timeout
    for process in started:
        try:
            process.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{process.name} did not end within {timeout} s") from None
    return [Result(p.popen.returncode, p.stdout, p.stderr) for p in started]


def wait_for(process: Process, text: str, timeout: float = TIMEOUT) -> None:
    """Wait until the output of a process, on either stream, contains a text."""
    deadline = time.monotonic() + timeout
    while text not in process.stdout + process.stderr:
        if process.popen.poll() is not None and text not in process.stdout + process.stderr:
            raise AssertionError(f"{process.name} ended without {text!r}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"{process.name} did not write {text!r} within {timeout} s")
        time.sleep(0.02)


def free_port() -> int:
    """Return a port that is not in use."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_flags(devices: int) -> str:
    """Return XLA_FLAGS of a process whose programs run once or twice, on this many CPU devices.

    Most of a test's time is compilation. With JAX_DISABLE_MOST_OPTIMIZATIONS, which conftest sets,
    and these flags it takes a quarter of the time; the compiled code is slower.
    """
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        # Eight devices on two cores may wait long for each other; XLA would end the process after
        # 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if metadata.version("jaxlib").startswith("0.10."):  # later versions abort on this flag
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def _environment(devices: int, address: str, count: int, index: int) -> dict[str, str]:
    """Return this process's variables, with those of a process of the run."""
    return dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_flags(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
