"""Hosts as local processes: N of them on the CPU over gloo, with limits on their time.

A test starts them, waits for a line in their output, and then kills or signals one. What fails is
shown with the output of all.
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

TIMEOUT = 120.0  # seconds; a busy machine is no failure, a hang is one


class Result(NamedTuple):
    """How a process ended."""

    code: int  # -9: killed by signal 9
    stdout: str
    stderr: str


class Host:
    """One running process and its output so far, which goes to files: a pipe could fill up."""

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: Path | None, folder: Path, name: str
    ) -> None:
        self.name = name
        self._out, self._err = folder / f"{name}.out", folder / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # A session of its own, so that what it starts can be killed with it.
            self.process = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
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

    def send(self, number: int) -> None:
        """Send a signal to the process alone, not to what it started."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Kill it and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        """All of its output, for a failure's message."""
        code = self.process.poll()
        return f"--- {self.name} (code {code})\n{self.stdout}--- its stderr\n{self.stderr}"


@contextlib.contextmanager
def start_hosts(
    code: str | Sequence[str],
    hosts: int = 2,
    devices: int = 4,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    only: Sequence[int] | None = None,
    address: str = "",
) -> Iterator[list[Host]]:
    """Start the processes of one run; what is left of them at the end is killed.

    Args:
        code: Python source, or the arguments of the interpreter (``["-m", "hyper_t5", ...]``).
        hosts: how many processes the run has.
        devices: CPU devices of each.
        env: more variables; an empty value takes one away.
        cwd: the folder to run in.
        only: the processes to start, where some shall be missing.
        address: the coordinator's; by default a free port of this machine.
    """
    argv = ["-c", code] if isinstance(code, str) else list(code)
    address = address or f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder:
        started: list[Host] = []
        try:
            for i in range(hosts) if only is None else only:
                given = _environment(devices, address, hosts, i) | dict(env or {})
                given = {name: value for name, value in given.items() if value}
                name = f"{len(started)} as process {i}"
                full = [sys.executable, "-u", *argv]
                started.append(Host(full, given, cwd, Path(folder), name))
            yield started
        except BaseException as error:
            error.add_note("\n".join(host.log() for host in started))
            raise
        finally:
            for host in started:
                host.kill()


def run_hosts(
    code: str | Sequence[str],
    hosts: int = 2,
    devices: int = 4,
    timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> list[Result]:
    """Run them to their end, however that is; see `start_hosts`. TimeoutError when one hangs."""
    with start_hosts(code, hosts, devices, env, cwd) as started:
        return join(started, timeout)


def join(started: Sequence[Host], timeout: float = TIMEOUT) -> list[Result]:
    """Wait until all have ended. TimeoutError, with their output, when one has not."""
    until = time.monotonic() + timeout
    for host in started:
        try:
            host.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{host.name} did not end within {timeout} s") from None
    return [Result(host.process.returncode, host.stdout, host.stderr) for host in started]


def wait_for(host: Host, text: str, timeout: float = TIMEOUT) -> None:
    """Wait until the output of a process, either stream, holds a text. TimeoutError if not."""
    until = time.monotonic() + timeout
    while text not in host.stdout + host.stderr:
        if host.process.poll() is not None and text not in host.stdout + host.stderr:
            raise AssertionError(f"{host.name} ended without {text!r}")
        if time.monotonic() > until:
            raise TimeoutError(f"{host.name} did not write {text!r} within {timeout} s")
        time.sleep(0.02)


def free_port() -> int:
    """A port that nobody uses now."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_flags(devices: int) -> str:
    """XLA_FLAGS of a process of this many CPU devices whose programs run once or twice.

    Most of a test's time goes into compiling. With JAX_DISABLE_MOST_OPTIMIZATIONS, which conftest
    sets, and all of these flags it is a quarter of that, and the code slower.
    """
    flags = [
        f"--xla_force_host_platform_device_count={devices}",
        # Eight devices on two cores may keep each other waiting; XLA would take that for a hang and
        # end the process after 40 s.
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
    if metadata.version("jaxlib").startswith("0.10."):  # later ones know no such flag, and abort
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


def _environment(devices: int, address: str, hosts: int, index: int) -> dict[str, str]:
    """This process's own, with the compile cache that conftest chose, and the place in the run."""
    return dict(os.environ) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": cpu_flags(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(hosts),
        "JAX_PROCESS_ID": str(index),
    }
