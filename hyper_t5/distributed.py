"""Many hosts as one run: start together, agree, miss who is gone, hear of preemption, end together.

Values are exchanged through the key-value store of JAX's coordination service, which process 0
serves, and never through the devices: a background thread may do it while they train. With one
process there is no service, and every function here is trivial.

A process that is gone ends the others, each with one line on stderr, and not by JAX's own answer,
which is an abort and a page of text. With H seconds of ``heartbeat`` (30 by default) and a period
P = min(2, H / 6):

- A process that ends by ``leave``, or by an exception that nobody caught, says why; the others
  print it and end with its code, within P.
- Process 0 that is killed is missed at once, by its closed connections; exit code 1.
- Another that is killed, and any that is stopped or cut off, is missed after H to H + 2 P; code 1.
- One that never comes is missed after ``timeout`` seconds (300 by default); code 1.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils

from hyper_t5 import __version__
from hyper_t5.errors import UserError

TIMEOUT = 300.0  # seconds to wait for all processes at the start
HEARTBEAT = 30.0  # seconds of silence after which a process counts as gone
ROOT = "hyper_t5"  # the store is shared with JAX and Orbax: our keys and barriers are under this
ALL_END_TOGETHER = (0, 75)  # codes of a run that is done, or preempted and saved
_DAY_MS = 24 * 3600 * 1000  # a wait that the watch ends if it is in vain
_GO_ON = "run the same command again to go on from the newest checkpoint"
# What a step raises when a process that took part in it is gone.
_PEER_LOST = re.compile("gloo|nccl|peer|connection|barrier|unavailable|cancelled|aborted", re.I)


@dataclasses.dataclass
class _Run:
    """What this process knows of the run that it is a part of."""

    index: int = 0
    count: int = 1
    heartbeat: float = HEARTBEAT
    hosts: list[str] = dataclasses.field(default_factory=list)
    rounds: Counter[str] = dataclasses.field(default_factory=Counter)
    counting: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    ending: threading.Event = dataclasses.field(default_factory=threading.Event)
    leaving: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    answered: float = 0.0  # when process 0 last answered, by the monotonic clock
    jax_sigterm: int = 0  # address of JAX's handler

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
            this package or of JAX, or in their number of devices.
    """
    assert _run.count == 1, "distributed.initialize was called twice"
    found = _given(coordinator_address, process_count, process_index) or _detected(timeout)
    if found is None:
        return
    address, _run.count, _run.index = found
    _run.heartbeat = heartbeat
    _run.hosts = [address.rpartition(":")[0]] + ["not seen yet"] * (_run.count - 1)
    if is_first():
        _check_port(address)
    print(f"waiting for {_run.count} processes at {address}, up to {timeout:.0f} s", flush=True)
    _join(address, timeout)
    atexit.register(_run.ending.set)  # before JAX's own, which may close the connections
    sys.excepthook = _uncaught
    _take_sigterm()
    threading.Thread(target=_beat, daemon=True).start()
    threading.Thread(target=_watch_first, daemon=True).start()
    check_same("the number of processes", _run.count)
    _run.hosts = gather("host", socket.gethostname())
    check_same("the version of hyper_t5", __version__)
    check_same("the version of jax", jax.__version__)
    check_same("the number of devices", jax.local_device_count())
    say(
        f"process 0 of {_run.count}: {jax.local_device_count()} local of {jax.device_count()} "
        f"devices ({jax.devices()[0].device_kind})"
    )


def _given(address: str, count: int, index: int) -> tuple[str, int, int] | None:
    """The three flags, each from the environment where it is not given; None: one process."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = count or _from_environment("JAX_NUM_PROCESSES", 0)
    index = index if index >= 0 else _from_environment("JAX_PROCESS_ID", -1)
    missing = [
        flag
        for flag, there in {
            "--coordinator_address": address,
            "--process_count": count > 0,
            "--process_index": index >= 0,
        }.items()
        if not there
    ]
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
            f"--process_index {index} with --process_count {count}: count from 0 to {count - 1}"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator_address {address!r} is not HOST:PORT; give process 0's host and a free "
            "port there, as in 10.0.0.2:8476"
        )
    return (address, count, index) if count > 1 else None


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a whole number; correct it")
    return int(text) if text else default


def _detected(timeout: float) -> tuple[str, int, int] | None:
    """What JAX finds of a cluster: address, count, index; None without one, or with one process."""
    # It has no public name, and the count must be known before the service is started.
    from jax._src.clusters import ClusterEnv

    nothing = (None, None, None, None, None)
    found = ClusterEnv.auto_detect_unset_distributed_params(*nothing, int(timeout))
    address, count, index = found[:3]
    if address is None or count is None or index is None or count < 2:
        return None
    return address, count, index


def _check_port(address: str, patience: float = 5.0) -> None:
    """UserError where process 0 cannot serve at this port; gRPC would share it with another run."""
    port = int(address.rpartition(":")[2])
    until = time.monotonic() + patience  # an earlier run may be about to end
    while True:
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind(("", port))
            except OSError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"--coordinator_address {address}: port {port} cannot be used on this host "
                        f"({error.strerror}); end what uses it, or name another port on all hosts"
                    ) from None
        time.sleep(0.2)


def _join(address: str, timeout: float) -> None:
    """Start JAX's client, and on process 0 its service; ends this process if not all come."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    came = threading.Event()
    missing = f"not all of the {_run.count} processes came to {address} within {timeout:.0f} s"

    def give_up() -> None:
        if not came.wait(timeout):
            _end(
                1,
                f"{missing}; start the same command on every host, each with its own index",
                tell=False,
            )

    if not is_first():
        address = _Relay(address, timeout).address
    threading.Thread(target=give_up, daemon=True).start()
    try:
        jax.distributed.initialize(
            address,
            _run.count,
            _run.index,
            # What JAX does after its own limits is to abort; ours come first.
            initialization_timeout=int(timeout) + 60,
            heartbeat_timeout_seconds=int(3 * _run.heartbeat) + 60,
        )
    except RuntimeError as error:
        _end(1, f"process {_run.index} could not join the others: {_one_line(error)}", tell=False)
    came.set()


class _Relay:
    """A port on this host that leads to process 0's service, for JAX's client of another process.

    A client that sees its connection break aborts. This one sees nothing: the relay notices, says
    so and ends the process. What goes through are a few small messages a second.
    """

    def __init__(self, target: str, timeout: float) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host.strip("[]"), int(port))
        self._waiting: socket.socket | None = self._dial(timeout)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _dial(self, timeout: float) -> socket.socket:
        host, port = self._target
        until = time.monotonic() + timeout
        while True:
            try:
                return socket.create_connection(self._target, timeout=5)
            except OSError as error:
                why = error.strerror or str(error)
            if time.monotonic() > until:
                _end(
                    1,
                    f"process 0 could not be reached at {host}:{port} within {timeout:.0f} s "
                    f"({why}); start the same command there, and open the port in its firewall",
                    tell=False,
                )
            time.sleep(0.2)

    def _accept(self) -> None:
        while True:
            here, _ = self._listener.accept()
            there = self._waiting or self._dial(_run.period)
            self._waiting = None
            hung_up = threading.Event()
            for end in (here, there):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for function in (self._up, self._down):
                threading.Thread(target=function, args=(here, there, hung_up), daemon=True).start()

    def _up(self, here: socket.socket, there: socket.socket, hung_up: threading.Event) -> None:
        _copy(here, there)
        hung_up.set()
        with contextlib.suppress(OSError):
            there.shutdown(socket.SHUT_RDWR)

    def _down(self, here: socket.socket, there: socket.socket, hung_up: threading.Event) -> None:
        _copy(there, here)
        if not hung_up.is_set() and not _run.ending.is_set():
            _end(1, f"{_name(0)} has gone; {_GO_ON}", tell=False)
        with contextlib.suppress(OSError):
            here.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


# ----------------------------------------------------------------------------- exchange of values


def is_first() -> bool:
    """Whether this is process 0: the one that writes what is written once. Asks no device."""
    return _run.index == 0


def index() -> int:
    """Which process this is. Asks no device."""
    return _run.index


def count() -> int:
    """How many processes the run has. Asks no device."""
    return _run.count


def say(text: str) -> None:
    """Print a line, at once, on process 0 alone."""
    if is_first():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Wait until every process has come here. See `gather` for the name."""
    if _run.count > 1:
        _client().wait_at_barrier(f"{ROOT}/{name}/{_next(name)}", _DAY_MS)


def gather(name: str, value: Any) -> list[Any]:
    """The values of all processes, by process; each is small and can be written as JSON.

    All processes call it with one name, and again and again if they like: calls are counted by
    name. Calls with one name come from one thread; other threads use other names.
    """
    text = json.dumps(value)
    if _run.count == 1:
        return [json.loads(text)]
    number = _next(name)
    key = f"{ROOT}/{name}/{number}"
    _client().key_value_set(f"{key}/{_run.index}", text)
    _client().wait_at_barrier(key, _DAY_MS)
    made = {i: json.loads(text) for i, text in _by_process(f"{name}/{number}").items()}
    # All have come to this call, so all have read what the call before it left.
    if number > 1:
        _client().key_value_delete(f"{ROOT}/{name}/{number - 1}/{_run.index}")
    return [made[i] for i in sorted(made)]


def agree(name: str, value: Any) -> Any:
    """The value of process 0, on every process; else as `gather`."""
    return gather(name, value if is_first() else None)[0]


def check_same(what: str, value: Any) -> None:
    """UserError, on every process, that names a process where a value differs from process 0's."""
    found = gather(f"same/{what}", value)
    if others := [i for i, other in enumerate(found) if other != found[0]]:
        more = f" and on {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"{what} differs: {found[0]} on {_name(0)}, {found[others[0]]} on {_name(others[0])}"
            f"{more}; install and start the same on every host"
        )


def _next(name: str) -> int:
    with _run.counting:
        _run.rounds[name] += 1
        return _run.rounds[name]


def _by_process(kind: str) -> dict[int, str]:
    """What is in the store under a name, by the number that ends the key."""
    pairs = _client().key_value_dir_get(f"{ROOT}/{kind}/")
    return {int(key.rpartition("/")[2]): text for key, text in pairs}


def _client() -> Any:
    # No public name leads to the store; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def _name(process: int) -> str:
    return f"process {process} ({_run.hosts[process]})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -------------------------------------------------------------------------------- the end together


def leave(code: int, message: str) -> None:
    """End this process and with it the others, who print the message and end with the same code.

    It does not return where there are others, and does nothing where there are none. It prints
    nothing here: the caller knows what to say. With code 0 or 75, which all processes come to
    together, it waits for them.
    """
    if _run.count == 1:
        return
    if code in ALL_END_TOGETHER:
        finish()
        sys.stdout.flush()
        os._exit(code)
    _end(code, f"{_name(_run.index)} ended: {' '.join(message.split())}", show=False)


def finish() -> None:
    """The orderly end: wait for the others, then leave the service. Only the exit follows."""
    if _run.count == 1:
        return
    barrier("finish")
    _run.ending.set()
    jax.distributed.shutdown()
    _run.count, _run.index = 1, 0


def _beat() -> None:
    """Show that this process lives; end it when one has said that all shall end. A thread."""
    heard = dict.fromkeys(range(1, _run.count), time.monotonic())
    seen: dict[int, str] = {}
    number = 0
    while not _run.ending.wait(_run.period):
        number += 1
        try:
            _client().key_value_set(f"{ROOT}/beat/{_run.index}", str(number), allow_overwrite=True)
            ended = _by_process("end")
            beats = _by_process("beat")
        except Exception:  # its errors have no class of their own
            if not _run.ending.is_set():
                _end(1, f"{_name(0)} no longer serves; {_GO_ON}", tell=False)
            return
        now = _run.answered = time.monotonic()
        if ended:
            code, line = json.loads(ended[min(ended)])
            _end(code, line)
        heard |= {i: now for i, beat in beats.items() if seen.get(i) != beat}
        seen = beats
        silent = [i for i in range(1, _run.count) if now - heard[i] > _run.heartbeat]
        if is_first() and silent:
            _end(1, _silence(silent[0]), absent=silent)


def _watch_first() -> None:
    """End this process when process 0 is silent: a call to a host cut off may hang. A thread."""
    _run.answered = time.monotonic()
    while not _run.ending.wait(_run.period):
        if time.monotonic() - _run.answered > _run.heartbeat:
            _end(1, _silence(0), tell=False)


def _silence(process: int) -> str:
    return f"{_name(process)} has not been heard of for {_run.heartbeat:.0f} s; {_GO_ON}"


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The interpreter's last word on an exception; without it the others would wait for us."""
    if issubclass(kind, RuntimeError | ValueError) and _PEER_LOST.search(str(error)):
        # Perhaps not our fault: give the watch the time to find who is gone, and to end us.
        time.sleep(_run.heartbeat + 3 * _run.period)
    sys.__excepthook__(kind, error, trace)
    code = 130 if issubclass(kind, KeyboardInterrupt) else 1
    leave(code, f"{kind.__name__}: {_one_line(error)}")


def _end(
    code: int,
    line: str,
    *,
    show: bool = True,
    tell: bool = True,
    absent: Sequence[int] = (),
) -> NoReturn:
    """Leave with one line on stderr, from whatever thread: the main one may never come back."""
    _run.leaving.acquire()  # never released: a second thread that comes here waits for the end
    _run.ending.set()
    if show:
        print("hyper-t5: error:", line, file=sys.stderr, flush=True)
    if tell:
        teller = threading.Thread(target=_tell, args=(code, line, set(absent)), daemon=True)
        teller.start()
        teller.join(2 * _run.period + 1)  # process 0 may be what does not answer
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _tell(code: int, line: str, absent: set[int]) -> None:
    """Let the others know; process 0 serves the store, so it stays until they have read it."""
    with contextlib.suppress(Exception):
        text = json.dumps([code, line])
        _client().key_value_set(f"{ROOT}/end/{_run.index}", text, allow_overwrite=True)
        _client().key_value_set(f"{ROOT}/gone/{_run.index}", "", allow_overwrite=True)
        others = set(range(1, _run.count)) - absent
        while is_first() and not others <= _by_process("gone").keys():
            time.sleep(0.05)


# -------------------------------------------------------------------------------------- preemption


@contextlib.contextmanager
def catch_sigterm() -> Iterator[None]:
    """Inside, SIGTERM asks the run to save and end (see `preempted`); a second ends it at once.

    Does nothing outside the main thread, which alone may set handlers.
    """
    _sigterm.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        _sigterm.set()
        if _run.jax_sigterm:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(_run.jax_sigterm)(number)

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def preempted(step: int) -> bool:
    """Whether to save after this step and end: the same answer on every process for a step.

    Ask once a step, with steps that rise by one. It is a look at a flag; one process that got a
    SIGTERM inside `catch_sigterm` is enough, and the others hear of it within a second or two.
    """
    if _run.count == 1:
        return _sigterm.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def _take_sigterm() -> None:
    """Take SIGTERM back from JAX, whose handler would swallow it where nobody asks `preempted`.

    The handler is C code that Python does not know of, and the notice to all processes hangs on
    it, so its address is kept for `catch_sigterm`.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    before = libc.signal(signal.SIGTERM, None)
    _run.jax_sigterm = before if before not in (None, 1) else 0  # 1 is SIG_IGN
