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
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple, NoReturn

import jax
from jax.experimental import multihost_utils

from hyper_t5 import __version__, relay
from hyper_t5.errors import UserError

TIMEOUT = 300.0  # seconds to wait for all processes at the start
HEARTBEAT = 30.0  # seconds of silence after which a process counts as gone
ROOT = "hyper_t5"  # the store is shared with JAX and Orbax: our keys and barriers are under this
ALL_END_TOGETHER = (0, 75)  # codes of a run that is done, or preempted and saved
JOIN_TIMEOUT = 120.0  # seconds from then on until JAX's service is up
PORT_PATIENCE = 5.0  # seconds; an earlier run may be about to let go of its port
METADATA_PERIOD = 5.0  # seconds between two looks at what Google Cloud says of this host
_DAY_MS = 24 * 3600 * 1000  # a wait that the watch ends if it is in vain
_GO_ON = "run the same command again to go on from the newest checkpoint"
# What a step, or a save, raises when a process that took part in it is gone.
_PEER_LOST = re.compile(
    "gloo|nccl|connection (closed|reset)|barrier|coordination|unavailable|cancelled|aborted", re.I
)


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
    beats: threading.Thread | None = None
    relay: subprocess.Popen[str] | None = None
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
    address, count, index = found
    print(f"waiting for {count} processes at {address}, up to {timeout:.0f} s", flush=True)
    me = _Hello(index, count, socket.gethostname(), __version__, jax.__version__)
    hosts = (_meet if index == 0 else _go_to_meet)(address, me, timeout)
    _run.count, _run.index, _run.hosts, _run.heartbeat = count, index, hosts, heartbeat
    _join(address)
    atexit.register(_stop)  # before JAX's own, which closes the connections
    sys.excepthook = _uncaught
    _take_sigterm()
    _run.beats = threading.Thread(target=_beat, daemon=True)
    _run.beats.start()
    threading.Thread(target=_watch_first, daemon=True).start()
    check_same("the number of devices", jax.local_device_count())
    say(
        f"process 0 of {count}: {jax.local_device_count()} local of {jax.device_count()} "
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


class _Hello(NamedTuple):
    """What a process says of itself when it comes."""

    process: int
    processes: int
    host: str
    hyper_t5: str
    jax: str


def _meet(address: str, me: _Hello, timeout: float) -> list[str]:
    """Process 0 waits for all others and tells them that they are complete; returns their hosts.

    JAX's service would abort in whatever is wrong, and cannot say who is missing, so all meet
    before it is started, at the port that it will take.
    """
    came: dict[int, tuple[_Hello, socket.socket]] = {}
    callers: list[socket.socket] = []
    started = said = time.monotonic()
    code, wrong = 0, ""
    with contextlib.closing(_listen(address)) as listener:
        while not wrong and len(came) + 1 < me.processes:
            with contextlib.suppress(OSError, ValueError, TypeError):  # anybody may call
                hello, caller = _receive(listener)
                callers.append(caller)
                code, wrong = 2, _misfit(me, hello, came)
                came[hello.process] = hello, caller
            came = {i: (hello, caller) for i, (hello, caller) in came.items() if not _left(caller)}
            absent = ", ".join(str(i) for i in range(1, me.processes) if i not in came)
            now = time.monotonic()
            if now - said > 30 and absent:
                said = now
                print(f"{len(came) + 1} of {me.processes} are here, without {absent}", flush=True)
            if now - started > timeout and absent and not wrong:
                code = 1
                wrong = (
                    f"process {absent} of {me.processes} did not come to {address} within "
                    f"{timeout:.0f} s; start the same command on every host, each with its own "
                    "index"
                )
    # After the port is closed: who hears this goes on to look for JAX's service there.
    hosts = [me.host] + [came[i][0].host for i in sorted(came)]
    for caller in callers:
        with contextlib.suppress(OSError), caller:
            caller.sendall(json.dumps([code, wrong, hosts]).encode() + b"\n")
    return _met(code, wrong, hosts)


def _go_to_meet(address: str, me: _Hello, timeout: float) -> list[str]:
    """Another process tells process 0 that it is there, and waits; returns all hosts."""
    host, port = _split(address)
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as caller:
                caller.sendall(json.dumps(me).encode() + b"\n")
                caller.settimeout(timeout + 10)
                code, wrong, hosts = json.loads(_read_line(caller))
            return _met(code, wrong, hosts)
        except (OSError, ValueError, TypeError) as error:
            why = _one_line(error)
        if time.monotonic() > until:
            _end(
                1,
                f"process 0 could not be reached at {address} within {timeout:.0f} s ({why}); "
                "start the same command there, and open the port in its firewall",
                tell=False,
            )
        time.sleep(0.2)


def _met(code: int, wrong: str, hosts: list[str]) -> list[str]:
    if not wrong:
        return hosts
    if code == 2:
        raise UserError(wrong)
    _end(code, wrong, tell=False)


def _misfit(me: _Hello, other: _Hello, came: dict[int, tuple[_Hello, socket.socket]]) -> str:
    """What is wrong with one that came, or nothing."""
    pairs = {
        "the number of processes": (me.processes, other.processes),
        "the version of hyper_t5": (me.hyper_t5, other.hyper_t5),
        "the version of jax": (me.jax, other.jax),
    }
    for what, (mine, its) in pairs.items():
        if mine != its:
            return _differs(what, mine, me.host, its, other.process, other.host)
    if other.process in came or other.process == me.process:
        first = came[other.process][0] if other.process in came else me
        return (
            f"two processes have index {other.process}: on {first.host} and on {other.host}; start "
            "each with a --process_index of its own"
        )
    return ""


def _differs(what: str, first: Any, first_host: str, value: Any, index: int, host: str) -> str:
    return (
        f"{what} differs: {first} on process 0 ({first_host}), {value} on process {index} "
        f"({host}); install and start the same on every host"
    )


def _listen(address: str) -> socket.socket:
    """Process 0's port. UserError where it is taken: gRPC would share it with another run."""
    _, port = _split(address)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    until = time.monotonic() + PORT_PATIENCE
    while True:
        try:
            made = socket.create_server(("", port), family=family, dualstack_ipv6=both)
            made.settimeout(0.2)
            return made
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--coordinator_address {address}: port {port} cannot be used on this host "
                    f"({error.strerror}); end what uses it, or name another port on all hosts"
                ) from None
        time.sleep(0.2)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _receive(listener: socket.socket) -> tuple[_Hello, socket.socket]:
    """The next process that comes. OSError, ValueError, TypeError: nobody came, or a stranger."""
    caller, _ = listener.accept()
    caller.settimeout(2)
    hello = _Hello(*json.loads(_read_line(caller)))
    caller.settimeout(None)
    return hello, caller


def _read_line(caller: socket.socket) -> bytes:
    with caller.makefile("rb") as file:
        return file.readline(2**20)


def _left(caller: socket.socket) -> bool:
    """Whether the other end of a connection is gone."""
    try:
        return caller.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _join(address: str) -> None:
    """Start JAX's client, and on process 0 its service. All processes are there."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # A proxy for the way to the outside is none for the way to the other hosts.
    os.environ["no_grpc_proxy"] = "127.0.0.1," + _split(address)[0]  # noqa: SIM112
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_check_proxy_envs", False)
    failed = "the processes met, and then could not join"
    late = threading.Timer(JOIN_TIMEOUT, lambda: _end(1, failed, tell=False))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            address if is_first() else _relay(address),
            _run.count,
            _run.index,
            # What JAX does after its own limits is to abort; ours come first.
            initialization_timeout=int(JOIN_TIMEOUT) + 60,
            heartbeat_timeout_seconds=int(3 * _run.heartbeat) + 60,
        )
    except RuntimeError as error:
        _end(1, f"{failed}: {_one_line(error)}", tell=False)
    late.cancel()


def _relay(address: str) -> str:
    """The address of a relay on this host that leads to process 0's service; see `relay`.

    JAX's client aborts when its connection breaks. With the relay it sees nothing, and we end.
    """
    host, port = _split(address)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", relay.__file__, host, str(port), str(JOIN_TIMEOUT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C in the terminal is not for it
    )
    # Kept, or its input would be closed when nobody looks, and JAX may not be done with it.
    _run.relay = child
    assert child.stdout is not None
    own = int(child.stdout.readline())
    threading.Thread(target=_watch_relay, args=(child,), daemon=True).start()
    return f"127.0.0.1:{own}"


def _watch_relay(child: subprocess.Popen[str]) -> None:
    """End this process when the relay says that process 0 is gone, or ends itself. A thread."""
    assert child.stdout is not None
    child.stdout.readline()
    if not _run.ending.is_set():
        _end(1, f"{_name(0)} has gone; {_GO_ON}", tell=False)


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
        i = others[0]
        raise UserError(_differs(what, found[0], _run.hosts[0], found[i], i, _run.hosts[i]))


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

    It does not return where there are others, and does nothing where there are none. With code 0
    or 75, which all processes come to together, it waits for them. A message that may come of
    another process's death waits until that is found out, which then is what all say.
    """
    if _run.count == 1:
        return
    if code not in ALL_END_TOGETHER:
        _bide(message)
    if message:
        print("hyper-t5: error:", " ".join(message.split()), file=sys.stderr, flush=True)
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
    _stop()
    jax.distributed.shutdown()
    _run.count, _run.index = 1, 0


def _stop() -> None:
    """No more signs of life. A thread that is inside JAX when the interpreter ends would abort."""
    _run.ending.set()
    if _run.beats:
        _run.beats.join(5)


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
    _bide(str(error))
    sys.__excepthook__(kind, error, trace)
    code = 130 if issubclass(kind, KeyboardInterrupt) else 1
    leave(code, f"{kind.__name__}: {_one_line(error)}")


def _bide(message: str) -> None:
    """Where an error may come of a lost process, give the watch time to name it and to end us."""
    if _PEER_LOST.search(message):
        time.sleep(_run.heartbeat + 3 * _run.period)


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

    A spot VM that is taken away gets a SIGTERM from its shutdown, as do all programs (see
    https://docs.cloud.google.com/compute/docs/instances/spot). Host maintenance is only announced
    in the metadata of a Google Cloud VM, so there a thread looks for it and sends the signal:
    https://docs.cloud.google.com/compute/docs/metadata/getting-live-migration-notice.

    Does nothing outside the main thread, which alone may set handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        _sigterm.set()
        if _run.jax_sigterm:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(_run.jax_sigterm)(number)

    before = signal.signal(signal.SIGTERM, note)
    left = threading.Event()
    if "GCE_METADATA_IP" in os.environ or jax.default_backend() == "tpu":
        threading.Thread(target=_watch_metadata, args=(left,), daemon=True).start()
    try:
        yield
    finally:
        left.set()
        signal.signal(signal.SIGTERM, before)
        _sigterm.clear()  # whoever runs next in this process was not asked


def preempted(step: int) -> bool:
    """Whether to save after this step and end: the same answer on every process for a step.

    Ask once a step, with steps that rise by one. It is a look at a flag; one process that got a
    SIGTERM inside `catch_sigterm` is enough, and the others hear of it within a second or two.
    """
    if _run.count == 1:
        return _sigterm.is_set()
    return multihost_utils.reached_preemption_sync_point(step)


def _watch_metadata(left: threading.Event) -> None:
    """Send this process a SIGTERM when its host says that it is about to stop. A thread."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    ends = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
    while not left.wait(METADATA_PERIOD):
        for name, value in ends.items():
            url = f"http://{host}/computeMetadata/v1/instance/{name}"
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as reply:
                if reply.read().decode().strip() == value and not left.is_set():
                    print(f"this host says {name}={value}: saving, then ending", flush=True)
                    os.kill(os.getpid(), signal.SIGTERM)
                    return


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
