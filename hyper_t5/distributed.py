"""Many hosts as one run: start together, agree, miss who is gone, hear of preemption, end together.

Values are exchanged through the key-value store of JAX's coordination service, which process 0
serves, and never through the devices: a background thread may do it while they train. With one
process there is no service, and every function here is trivial.

A process that is gone ends the others, each with one line on stderr:

- A process that ends by ``leave`` leaves its reason; the others print it and end with its code
  within `_period` (2 s at most) and a half.
- A process that is killed or cut off is missed after ``heartbeat`` seconds (30 by default, plus at
  most two periods); the others end with code 1.
- A process that never comes ends the others after ``timeout`` seconds (300 by default), with 1.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from hyper_t5 import __version__
from hyper_t5.errors import UserError

TIMEOUT = 300.0  # seconds to wait for all processes at the start
HEARTBEAT = 30.0  # seconds of silence after which a process counts as gone
ROOT = "hyper_t5"  # our keys in the store
_DAY_MS = 24 * 3600 * 1000  # a wait that the watch ends if it is in vain


@dataclasses.dataclass
class _Run:
    """What this process knows of the run it is a part of."""

    index: int = 0
    count: int = 1
    address: str = ""
    heartbeat: float = HEARTBEAT
    hosts: list[str] = dataclasses.field(default_factory=lambda: [socket.gethostname()])
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)
    rounds: Counter[str] = dataclasses.field(default_factory=Counter)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def period(self) -> float:
        """Seconds between two signs of life."""
        return min(2.0, self.heartbeat / 6)


_run = _Run()
_sigterm = threading.Event()


# ------------------------------------------------------------------------------------- the start


def initialize(
    coordinator_address: str = "",
    process_count: int = 0,
    process_index: int = -1,
    *,
    timeout: float = TIMEOUT,
    heartbeat: float = HEARTBEAT,
) -> None:
    """Join the other processes of this run; call it before anything that asks for a device.

    What is not given is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID;
    without them from what JAX finds: the metadata of a TPU VM, SLURM, Open MPI, Kubernetes. Where
    that is nothing, or one process, this is a run of one process and no service is started.

    Args:
        coordinator_address: HOST:PORT of process 0, where it serves the others.
        process_count: how many processes there are.
        process_index: which of them this is, from 0.
        timeout: seconds to wait for all to come.
        heartbeat: seconds of silence after which a process counts as gone.

    Raises:
        UserError: flags that make no sense, a port in use, or hosts that differ in the version of
            this package or in their number of devices.
    """
    if _run.count > 1:
        raise RuntimeError("distributed.initialize was called twice")
    found = _given(coordinator_address, process_count, process_index) or _detected(timeout)
    if found is None:
        return
    address, count, index = found
    if index == 0:
        _check_port(address)
    _run.address, _run.count, _run.index, _run.heartbeat = address, count, index, heartbeat
    # The interpreter must know of no handler of ours: JAX takes SIGTERM for its own notifier here.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    print(f"waiting for {count} processes at {address}, up to {timeout:.0f} s", flush=True)
    came = threading.Event()
    threading.Thread(target=_await_all, args=(came, timeout), daemon=True).start()
    jax.distributed.initialize(
        address,
        count,
        index,
        # JAX ends a process by an abort and a wall of text. Ours comes first.
        initialization_timeout=int(timeout) + 30,
        heartbeat_timeout_seconds=int(3 * heartbeat) + 30,
    )
    came.set()
    _run.hosts = gather("host", socket.gethostname())
    threading.Thread(target=_beat, daemon=True).start()
    check_same("the version of hyper_t5", __version__)
    check_same("the version of jax", jax.__version__)
    check_same("the number of devices", len(jax.local_devices()))
    kind = jax.devices()[0].device_kind
    say(
        f"process 0 of {count}: {jax.local_device_count()} local of {jax.device_count()} devices "
        f"({kind})"
    )


def _given(address: str, count: int, index: int) -> tuple[str, int, int] | None:
    """The three flags, each from the environment where it is not given; None: not many."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = count or _from_environment("JAX_NUM_PROCESSES", 0)
    index = index if index >= 0 else _from_environment("JAX_PROCESS_ID", -1)
    named = {"--coordinator_address": address, "--process_count": count > 0}
    named["--process_index"] = index >= 0
    missing = [flag for flag, there in named.items() if not there]
    if len(missing) == 3 or (count == 1 and not address and index <= 0):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing: a run of several processes needs "
            "--coordinator_address HOST:PORT, --process_count N and --process_index I on each; "
            "give all three, or none"
        )
    if index >= count:
        raise UserError(
            f"--process_index {index} is not one of {count} processes; count from 0 to {count - 1}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(
            f"--coordinator_address {address!r} is not HOST:PORT; give process 0's host and a free "
            "port there, as in 10.0.0.2:8476"
        )
    return (address, count, index) if count > 1 else None


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a whole number")
    return int(text)


def _detected(timeout: float) -> tuple[str, int, int] | None:
    """What JAX finds of a cluster: address, count, index; None without one, or with one process."""
    # The detection has no public name of its own, and we must know the count before we start.
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, int(timeout)
    )
    address, count, index = found[:3]
    if address is None or count is None or index is None or count < 2:
        return None
    return address, count, index


def _check_port(address: str) -> None:
    """UserError where process 0 cannot serve at this port; gRPC would share it with another run."""
    port = int(address.rpartition(":")[2])
    with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"--coordinator_address {address}: port {port} cannot be used on this host "
                f"({error.strerror}); end what uses it, or name another port on all hosts"
            ) from None


def _await_all(came: threading.Event, timeout: float) -> None:
    if not came.wait(timeout):
        _end(
            1,
            f"not all of the {_run.count} processes came to {_run.address} within {timeout:.0f} s; "
            "start the same command on every host, and see that they can reach that address",
        )


# ----------------------------------------------------------------------------- exchange of values


def is_first() -> bool:
    """Whether this is process 0: the one that writes what is written once."""
    return _run.index == 0


def count() -> int:
    """How many processes the run has; asks no device."""
    return _run.count


def index() -> int:
    """Which process this is; asks no device."""
    return _run.index


def say(text: str) -> None:
    """Print a line, at once, on process 0 alone."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Wait until every process has come here. See `gather` for the name."""
    if _run.count > 1:
        _client().wait_at_barrier(f"{ROOT}/{_next(name)}", _DAY_MS)


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, by process; each is small and can be written as JSON.

    All processes call it with one name, and again and again if they like: calls are counted by
    name. Calls under one name come from one thread; other names may be used beside it.
    """
    if _run.count == 1:
        return [json.loads(json.dumps(value))]
    key = f"{ROOT}/{_next(name)}"
    _client().key_value_set(f"{key}/{_run.index}", json.dumps(value))
    _client().wait_at_barrier(key, _DAY_MS)
    pairs = _client().key_value_dir_get(f"{key}/")
    made = {int(path.rpartition("/")[2]): json.loads(text) for path, text in pairs}
    # Everyone came to this call, so everyone has read what the call before it left.
    _client().key_value_delete(f"{ROOT}/{_before(name)}/{_run.index}")
    return [made[i] for i in range(_run.count)]


def agree(name: str, value: Any) -> Any:
    """The value of process 0, on every process; else as `gather`."""
    return gather(name, value if is_first() else None)[0]


def check_same(what: str, value: Any) -> None:
    """UserError, on every process, that names the processes where a value differs from 0's."""
    found = gather(f"same/{what}", value)
    if others := [i for i, other in enumerate(found) if other != found[0]]:
        i = others[0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{what} differs: {found[0]} on process 0 ({_run.hosts[0]}), {found[i]} on process {i} "
            f"({_run.hosts[i]}){more}; install and start the same on every host"
        )


def _next(name: str) -> str:
    with _run.lock:
        _run.rounds[name] += 1
        return f"{name}/{_run.rounds[name]}"


def _before(name: str) -> str:
    with _run.lock:
        return f"{name}/{_run.rounds[name] - 1}"


def _client() -> Any:
    # No public name leads to the store; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


# ------------------------------------------------------------------------------- the end of others


def leave(code: int, message: str) -> None:
    """End this process, and with it the others, who print the message and end with the same code.

    It does not return where there are others, and does nothing where there are none. It prints
    nothing: the caller knows what to say.
    """
    if _run.count == 1:
        return
    _run.ending.set()
    with contextlib.suppress(Exception):
        text = json.dumps([code, " ".join(message.split())])
        _client().key_value_set(f"{ROOT}/end/{_run.index}", text, allow_overwrite=True)
        _wait_for_readers()
    _exit(code)


def finish() -> None:
    """The orderly end of a run: wait for the others, then leave the service."""
    if _run.count == 1:
        return
    barrier("finish")
    _run.ending.set()
    jax.distributed.shutdown()
    _run.count, _run.index = 1, 0


def _beat() -> None:
    """Show that this process lives, and end it when another does not: a thread of each process."""
    heard = [time.monotonic()] * _run.count
    seen: dict[int, str] = {}
    answered = [time.monotonic()]
    threading.Thread(target=_watch_service, args=(answered,), daemon=True).start()
    number = 0
    while not _run.ending.wait(_run.period):
        number += 1
        try:
            _client().key_value_set(f"{ROOT}/beat/{_run.index}", str(number), allow_overwrite=True)
            ended = _by_process("end")
            beats = _by_process("beat") if is_first() else {}
        except Exception:  # the service's errors have no class of their own
            if not _run.ending.is_set():
                _end(1, _missed(0, "has gone"))
            return
        answered[0] = time.monotonic()
        for i, text in ended.items():
            code, message = json.loads(text)
            _end(code, message if i == 0 and not message else _told(i, message))
        for i, beat in beats.items():
            if seen.get(i) != beat:
                seen[i], heard[i] = beat, answered[0]
        silent = [i for i in range(1, _run.count) if answered[0] - heard[i] > _run.heartbeat]
        if is_first() and silent:
            text = _missed(silent[0], f"has not been heard of for {_run.heartbeat:.0f} s")
            leave_text = json.dumps([1, text])
            _client().key_value_set(f"{ROOT}/end/0", leave_text, allow_overwrite=True)
            _end(1, text)


def _watch_service(answered: list[float]) -> None:
    """End this process when process 0 no longer answers: a call to a lost host may hang."""
    while not _run.ending.wait(_run.period):
        if time.monotonic() - answered[0] > _run.heartbeat:
            _end(1, _missed(0, f"has not been heard of for {_run.heartbeat:.0f} s"))


def _by_process(kind: str) -> dict[int, str]:
    pairs = _client().key_value_dir_get(f"{ROOT}/{kind}/")
    return {int(path.rpartition("/")[2]): text for path, text in pairs}


def _told(process: int, message: str) -> str:
    if message.startswith("process "):
        return message
    return f"process {process} ({_run.hosts[process]}) ended: {message}"


def _missed(process: int, what: str) -> str:
    return (
        f"process {process} ({_run.hosts[process]}) {what}; ending: run the same command again to "
        "go on from the newest checkpoint"
    )


def _wait_for_readers() -> None:
    """Process 0 serves the store, so it stays until the others have read why it ends."""
    key = f"{ROOT}/gone/{_run.index}"
    _client().key_value_set(key, "", allow_overwrite=True)
    until = time.monotonic() + 2 * _run.period + 1
    while is_first() and time.monotonic() < until:
        if len(_by_process("gone")) == _run.count:
            break
        time.sleep(0.05)


def _end(code: int, message: str) -> NoReturn:
    """Print one line and leave, from whatever thread: the main one may never come back."""
    _run.ending.set()
    print("hyper-t5: error:", message, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        _wait_for_readers()
    _exit(code)


def _exit(code: int) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


# -------------------------------------------------------------------------------------- preemption


@contextlib.contextmanager
def catch_sigterm() -> Iterator[None]:
    """Inside, SIGTERM asks this run to save and end; a second one ends it at once.

    With several processes JAX takes the signal: one process that got it is enough for all of them
    to agree on a step. Outside the main thread, which alone may set handlers, this does nothing.
    """
    _sigterm.clear()
    if _run.count > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: Any) -> None:
        _sigterm.set()
        signal.signal(number, signal.SIG_DFL)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def preempted(step: int) -> bool:
    """Whether to save after this step and end; the same answer on every process.

    Ask once a step, with steps that rise by one. On Cloud TPU a maintenance event and the end of a
    spot VM arrive as SIGTERM too.
    """
    if _run.count == 1:
        return _sigterm.is_set()
    return multihost_utils.reached_preemption_sync_point(step)
