"""Multi-process runs on JAX's distributed runtime: initialization, exchange, exit and preemption.

Values are exchanged through the key-value store of JAX's coordination service and never through the
devices, so a background thread can exchange them while the devices train. A run of one process
starts no service, and every function here is trivial.

JAX detects lost processes by heartbeats and aborts the others (SIGABRT, which a shell reports as
exit code 134): at once when process 0 ends, else `heartbeat_timeout` seconds after the last
heartbeat. A process that fails alone waits in JAX's shutdown barrier, which fails on all processes
after `heartbeat_timeout` seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import signal
import socket
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.distributed import global_state  # its key-value store has no public name
from jax.experimental import multihost_utils

from hyper_t5 import __version__
from hyper_t5.utils.errors import UserError

METADATA_PERIOD = 5.0  # seconds between requests to the metadata server of Google Cloud
_NO_LIMIT_MS = 24 * 3600 * 1000  # for barriers: JAX aborts them when a process is lost
Cluster = tuple[str, int, int]  # coordinator address, number of processes, index of this process

_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)
_sigterm = threading.Event()
_jax_sigterm_handler: Callable[[int], None] | None = None


def initialize(
    coordinator_address: str = "",
    process_count: int = 0,
    process_index: int = -1,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 30,
) -> None:
    """Connect the processes of this run; call it before any use of a device.

    A single process starts no service.

    Args:
      coordinator_address: HOST:PORT of process 0; JAX_COORDINATOR_ADDRESS by default. Without
        these three, JAX detects the cluster (TPU VM, SLURM, Open MPI, Kubernetes).
      process_count: number of processes; JAX_NUM_PROCESSES by default.
      process_index: index of this process, from 0; JAX_PROCESS_ID by default.
      initialization_timeout: seconds to wait for all processes; then JAX aborts.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.

    Raises:
      UserError: the arguments are inconsistent, the port is in use, or processes differ in their
        versions of this package or of JAX, or in their number of processes or devices.
    """
    cluster = _configured_cluster(coordinator_address, process_count, process_index)
    cluster = cluster or _detected_cluster(initialization_timeout)
    if cluster is None:
        return
    address, count, index = cluster
    host, _, port = address.rpartition(":")
    if index == 0:
        _check_port(int(port))
    limit = initialization_timeout
    print(f"waiting for {count} processes at {address}, up to {limit} s", flush=True)
    os.environ["no_grpc_proxy"] = host  # noqa: SIM112  an HTTP proxy does not reach the cluster
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=limit,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=heartbeat_timeout,
    )
    _take_sigterm()
    # `jax.process_index()` would initialize the devices, which blocks when process counts differ.
    check_same("the number of processes", count, index)
    check_same("the version of hyper_t5", __version__, index)
    check_same("the version of jax", jax.__version__, index)
    check_same("the number of devices", jax.local_device_count())
    total, kind = jax.device_count(), jax.devices()[0].device_kind
    log(f"process 0 of {count}: {jax.local_device_count()} local of {total} devices ({kind})")


def _configured_cluster(address: str, count: int, index: int) -> Cluster | None:
    """Return the cluster of the flags, or of JAX's environment variables; None for one process."""
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count = count or _environment_int("JAX_NUM_PROCESSES", 0)
    index = index if index >= 0 else _environment_int("JAX_PROCESS_ID", -1)
    flags = {
        "--coordinator_address": address,
        "--process_count": count > 0,
        "--process_index": index >= 0,
    }
    missing = [flag for flag, value in flags.items() if not value]
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
            f"--coordinator_address {address!r} is not HOST:PORT; give the host of process 0 and a "
            "free port, as in 10.0.0.2:8476"
        )
    return (address, count, index) if count > 1 else None


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if text and not text.isdecimal():
        raise UserError(f"environment variable {name}={text!r} is not a whole number; correct it")
    return int(text) if text else default


def _detected_cluster(timeout: int) -> Cluster | None:
    """Return the cluster that JAX detects; None without one, or with a single process."""
    # No public function detects without initializing, which fails where there is no cluster.
    from jax._src.clusters import ClusterEnv

    unset = (None, None, None, None, None)
    address, count, index, *_ = ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout)
    if address is None or count is None or index is None or count < 2:
        return None
    return address, count, index


def _check_port(port: int) -> None:
    """Raise UserError when a port is in use: gRPC would share it with the other run."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise UserError(
            f"--coordinator_address: port {port} cannot be used on this host ({error.strerror}); "
            "end the process that uses it, or give another port to all processes"
        ) from None


def is_primary() -> bool:
    """Return whether this is process 0, which writes the files that a run writes once."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def log(text: str) -> None:
    """Print a line on process 0, without buffering."""
    if is_primary():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Wait for all processes; see `gather` for the name."""
    gather(name, None)


def broadcast(name: str, value: Any) -> Any:
    """Return the value of process 0 on every process; see `gather` for the arguments."""
    return gather(name, value if is_primary() else None)[0]


def gather(name: str, value: Any, index: int | None = None) -> list[Any]:
    """Return the values of all processes, by index, as JSON represents them.

    Args:
      name: the same on all processes. Calls are counted by name, so two threads use two names.
      value: a small value that JSON can represent.
      index: index of this process; `jax.process_index()` by default.
    """
    text = json.dumps(value)
    if not jax.distributed.is_initialized():
        return [json.loads(text)]
    client: Any = global_state.client
    index = jax.process_index() if index is None else index
    call = next(_calls[name])
    key = f"hyper_t5/{name}/{call}"
    client.key_value_set(f"{key}/{index}", text)
    client.wait_at_barrier(key, _NO_LIMIT_MS)
    texts = {int(k.rpartition("/")[2]): text for k, text in client.key_value_dir_get(f"{key}/")}
    # Every process has entered this call, so every process has read the values of the last one.
    if call > 0:
        client.key_value_delete(f"hyper_t5/{name}/{call - 1}/{index}")
    return [json.loads(texts[i]) for i in sorted(texts)]


def check_same(name: str, value: Any, index: int | None = None) -> None:
    """Raise UserError on every process when a value differs; see `gather` for the arguments."""
    values = gather(f"same/{name}", [value, socket.gethostname()], index)
    first, first_host = values[0]
    for i, (other, host) in enumerate(values):
        if other != first:
            raise UserError(
                f"{name} differs: {first} on process 0 ({first_host}), {other} on process {i} "
                f"({host}); install and start the same on every process"
            )


def abort(code: int, timeout: float) -> None:
    """End this process with a code after `timeout` seconds, unless it exits before.

    A process exits through JAX's shutdown barrier, where processes that fail alike meet. A process
    that fails alone would be aborted there after `heartbeat_timeout`; give a shorter timeout.
    """
    if jax.distributed.is_initialized():
        timer = threading.Timer(timeout, os._exit, [code])
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def catch_sigterm() -> Iterator[None]:
    """Turn SIGTERM into a preemption notice for `preempted`; a second SIGTERM ends the process.

    Spot VMs receive SIGTERM when they are preempted. Host maintenance is announced in a VM's
    metadata, which a thread polls and turns into SIGTERM:
    https://docs.cloud.google.com/compute/docs/metadata/getting-live-migration-notice.
    Does nothing outside the main thread, the only one that can set signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def notify(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        _sigterm.set()
        if _jax_sigterm_handler:
            _jax_sigterm_handler(number)

    previous = signal.signal(signal.SIGTERM, notify)
    done = threading.Event()
    if "GCE_METADATA_IP" in os.environ or jax.default_backend() == "tpu":
        threading.Thread(target=_watch_metadata, args=(done,), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.signal(signal.SIGTERM, previous)
        _sigterm.clear()


def preempted(step: int) -> bool:
    """Return whether to save after this step and exit: the same step on every process.

    Call it once per step, with consecutive steps, inside `catch_sigterm`. A SIGTERM to any one
    process reaches all within about two seconds.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return _sigterm.is_set()


def _take_sigterm() -> None:
    """Restore the default action of SIGTERM, and keep the handler that JAX installed.

    JAX's handler swallows SIGTERM where `preempted` is not called. It is a C function, unknown to
    Python's `signal`.
    """
    global _jax_sigterm_handler
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _jax_sigterm_handler = libc.signal(signal.SIGTERM, None)


def _watch_metadata(done: threading.Event) -> None:
    """Send SIGTERM to this process when the metadata server announces host maintenance."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/maintenance-event"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    while not done.wait(METADATA_PERIOD):
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5) as reply:
            if reply.read() == b"TERMINATE_ON_HOST_MAINTENANCE" and not done.is_set():
                print("host maintenance announced: saving, then exiting", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
