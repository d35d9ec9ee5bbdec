"""Multi-process runs: initialization, exchange, failure detection, exit and preemption."""

from __future__ import annotations

import io
import os
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence

import pytest

from hyper_t5 import __version__
from hyper_t5.parallel import distributed
from hyper_t5.utils.errors import UserError
from tests.support.processes import (
    Process,
    Result,
    free_port,
    join,
    run_processes,
    start_processes,
    wait_for,
)

HEARTBEAT = 4
LOST = HEARTBEAT + 8  # seconds until all have ended on a busy machine

START = f"""
import jax, os, sys, threading, time
from hyper_t5.parallel import distributed as d
HEARTBEAT = {HEARTBEAT}
def start(heartbeat=30, **flags):
    d.initialize(initialization_timeout=60, heartbeat_timeout=heartbeat, **flags)
    return jax.process_index()
"""
# A loop with a collective in each step, until something ends it.
TRAIN = """
i = start(HEARTBEAT)
from jax.experimental import multihost_utils
for step in range(10**6):
    multihost_utils.sync_global_devices("step")
    if step == 3:
        print("trains", flush=True)
    time.sleep(0.02)
"""


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def join_within(seconds: float, processes: Sequence[Process]) -> list[Result]:
    """Wait for processes that must end within some seconds."""
    started = time.monotonic()
    results = join(processes, 60)
    assert time.monotonic() - started < seconds
    return results


def test_one_process(no_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    distributed.initialize()
    distributed.initialize(process_count=1, process_index=0)
    assert distributed.is_primary()
    distributed.barrier("barrier")
    assert distributed.gather("x", {"a": (1, None)}) == [{"a": [1, None]}]
    assert distributed.broadcast("x", "y") == "y"
    distributed.check_same("x", 3)
    distributed.abort(2, 0.0)
    distributed.log("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("", 2, 0), "--coordinator_address missing"),
        (("a:1", 0, -1), "--process_count and --process_index missing"),
        (("", 0, 1), "--coordinator_address and --process_count missing"),
        (("", 1, 1), "--coordinator_address missing"),
        (("a:1", 2, 2), "--process_index 2 with --process_count 2: count from 0 to 1"),
        (("a:1", 1, 1), "--process_index 1 with --process_count 1"),
        ((":80", 2, 0), "':80' is not HOST:PORT"),
        (("a:b", 2, 0), "'a:b' is not HOST:PORT"),
        (("a:70000", 2, 0), "'a:70000' is not HOST:PORT"),
    ],
)
def test_inconsistent_flags(no_cluster: None, flags: tuple[str, int, int], words: str) -> None:
    with pytest.raises(UserError) as error:
        distributed.initialize(*flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_flags_override_the_environment(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:5")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert distributed._configured_cluster("", 0, -1) == ("host:5", 4, 3)
    assert distributed._configured_cluster("other:6", 8, 0) == ("other:6", 8, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='three' is not a whole number"):
        distributed.initialize()


SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "n[3-4]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
TPU_VM = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,other",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("variables", "cluster"),
    [
        (SLURM, ("n3:61440", 2, 1)),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (OPEN_MPI, ("10.96.0.1:62624", 2, 1)),
        (TPU_VM, ("localhost:8482", 4, 3)),
    ],
)
def test_clusters_are_detected(
    no_cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    cluster: distributed.Cluster | None,
) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", variables is TPU_VM)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert distributed._detected_cluster(5) == cluster


def test_a_port_in_use(no_cluster: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used") as error:
            distributed.initialize(f"127.0.0.1:{port}", 2, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_missing_process_ends_the_others(index: int) -> None:
    code = START.replace("timeout=60", "timeout=3") + "start()"
    with start_processes(code, devices=1, indices=[index]) as processes:
        [result] = join_within(25, processes)
    assert result.code != 0
    assert "waiting for 2 processes at 127.0.0.1:" in result.stdout
    assert "up to 3 s\n" in result.stdout
    assert "DEADLINE_EXCEEDED" in result.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("d.__version__ += '.1'", f"the version of hyper_t5 differs: {__version__} on process 0 ("),
        (
            "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'",
            "the number of devices differs: 1 on process 0 (",
        ),
        ("os.environ['JAX_NUM_PROCESSES'] = '3'", "the number of processes differs: 2 on process "),
    ],
)
def test_processes_that_differ_end_with_one_line(code: str, words: str) -> None:
    code = f"""
if os.environ["JAX_PROCESS_ID"] == "1":
    {code}
try:
    start()
except d.UserError as e:
    print("hyper-t5: error:", e, file=sys.stderr)
    sys.exit(2)
"""
    for result in run_processes(START + code, devices=1):
        assert result.code == 2, result
        assert result.stderr.startswith(f"hyper-t5: error: {words}")
        assert "on process 1 (" in result.stderr
        assert result.stderr.count("\n") == 1


def test_exchange_also_in_a_thread_while_devices_compute() -> None:
    """In a run that flags configure, on hosts whose HTTP proxy does not reach the cluster."""
    code = """
address, n = os.environ.pop("JAX_COORDINATOR_ADDRESS"), int(os.environ.pop("JAX_NUM_PROCESSES"))
i = int(os.environ.pop("JAX_PROCESS_ID"))
assert start(coordinator_address=address, process_count=n, process_index=i) == i
print(d.gather("all", {"i": i}), d.gather("all", [i]), d.broadcast("x", i), d.broadcast("x", i + 5))
d.barrier("y"); d.barrier("y")
from jax.experimental import multihost_utils
values = []
def exchange():
    for n in range(50):
        values.append(d.gather("thread", n * (i + 1)))
thread = threading.Thread(target=exchange)
thread.start()
for step in range(50):
    multihost_utils.sync_global_devices("step")
thread.join()
print(values == [[n, 2 * n, 3 * n] for n in range(50)])
print(len(d.global_state.client.key_value_dir_get("hyper_t5/thread")) <= 2 * jax.process_count())
d.log("process 0 alone")
"""
    proxy = {"http_proxy": f"http://127.0.0.1:{free_port()}"}
    results = run_processes(START + code, count=3, devices=2, env=proxy)
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 3
    for result in results:
        assert result.stdout.startswith("waiting for 3 processes at 127.0.0.1:")
        assert "\n[{'i': 0}, {'i': 1}, {'i': 2}] [[0], [1], [2]] 0 5\n" in result.stdout
        assert result.stdout.splitlines().count("True") == 2
    assert "process 0 of 3: 2 local of 6 devices (cpu)\n" in results[0].stdout
    assert [result.stdout.count("process 0 alone") for result in results] == [1, 0, 0]


@pytest.mark.parametrize(
    ("lost", "number"),
    [
        (0, signal.SIGKILL),
        (0, signal.SIGSTOP),
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_others(lost: int, number: signal.Signals) -> None:
    with start_processes(START + TRAIN, count=3, devices=1) as processes:
        for process in processes:
            wait_for(process, "trains")
        processes[lost].send_signal(number)
        at_once = (lost, number) == (0, signal.SIGKILL)
        others = [process for i, process in enumerate(processes) if i != lost]
        results = join_within(HEARTBEAT if at_once else LOST, others)
    assert all(result.code != 0 for result in results)


@pytest.mark.parametrize("failed", [[0], pytest.param([1], marks=pytest.mark.slow), [0, 1]])
def test_failed_processes_keep_their_exit_code_and_end_the_others(failed: list[int]) -> None:
    """Even if a thread of a failed process waits for the others."""
    code = f"""
i = start(HEARTBEAT)
if i in {failed}:
    threading.Thread(target=d.barrier, args=["thread"]).start()
    time.sleep(i / 2)
    print("hyper-t5: error: no such file", file=sys.stderr)
    d.abort(2, HEARTBEAT / 2)
    sys.exit(2)
d.barrier("never")
"""
    with start_processes(START + code, devices=1) as processes:
        wait_for(processes[failed[0]], "no such file")
        results = join_within(LOST, processes)
    for index, result in enumerate(results):
        if index in failed:
            assert (result.code, result.stderr) == (2, "hyper-t5: error: no such file\n")
        else:
            assert result.code not in (0, 2)


@pytest.mark.parametrize("failed", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_uncaught_exception_ends_all_processes(failed: int) -> None:
    code = TRAIN.replace("time.sleep(0.02)", f"0 if step < 9 or i != {failed} else boom")
    with start_processes(START + code, devices=1) as processes:
        wait_for(processes[failed], "NameError: name 'boom' is not defined")
        results = join_within(LOST, processes)
    assert all(result.code != 0 for result in results)


PREEMPTED = """
i = start()
from jax.experimental import multihost_utils
with d.catch_sigterm():
    for step in range(10**6):
        multihost_utils.sync_global_devices("step")
        if step == 3:
            print("trains", flush=True)
        time.sleep(0.02)
        if d.preempted(step):
            break
    print("saves step", step, flush=True)
    time.sleep(float(os.environ.get("SAVE_SECONDS", 0)))
sys.exit(75)
"""


@pytest.mark.parametrize("receiver", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_sigterm_to_one_process_ends_all_at_one_step(receiver: int) -> None:
    with start_processes(START + PREEMPTED, devices=1) as processes:
        for process in processes:
            wait_for(process, "trains")
        processes[receiver].send_signal(signal.SIGTERM)
        results = join(processes, 60)
    assert [result.code for result in results] == [75, 75]
    [last] = {result.stdout.splitlines()[-1] for result in results}
    assert last.startswith("saves step ")
    assert int(last.split()[-1]) > 3


def test_a_second_sigterm_ends_a_process_at_once() -> None:
    slow = {"SAVE_SECONDS": "60"}
    with start_processes(START + PREEMPTED, devices=1, env=slow) as processes:
        wait_for(processes[1], "trains")
        processes[1].send_signal(signal.SIGTERM)
        wait_for(processes[1], "saves step")
        processes[1].send_signal(signal.SIGTERM)
        [result] = join_within(2, processes[1:])
    assert result.code == -signal.SIGTERM


def test_sigterm_outside_the_step_loop_ends_a_process_at_once() -> None:
    with start_processes(START + TRAIN, devices=1) as processes:
        wait_for(processes[1], "trains")
        processes[1].send_signal(signal.SIGTERM)
        [second] = join_within(2, processes[1:])
        [first] = join_within(LOST, processes[:1])
    assert second.code == -signal.SIGTERM
    assert first.code != 0


def test_sigterm_preempts_a_single_process() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with distributed.catch_sigterm():
        assert not distributed.preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.preempted(2)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(signal.SIGTERM) is before
    assert not distributed.preempted(3)
    with distributed.catch_sigterm():
        assert not distributed.preempted(4)
    handlers = []  # another thread cannot set any
    catch = distributed.catch_sigterm()(lambda: handlers.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=catch)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_host_maintenance_preempts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [b"NONE", b"NONE", b"TERMINATE_ON_HOST_MAINTENANCE"]

    def urlopen(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        assert request.full_url == "http://server/computeMetadata/v1/instance/maintenance-event"
        assert request.headers == {"Metadata-flavor": "Google"}
        assert not distributed.preempted(1)
        return io.BytesIO(events.pop(0))

    monkeypatch.setenv("GCE_METADATA_IP", "server")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(distributed, "METADATA_PERIOD", 0.05)
    with distributed.catch_sigterm():
        deadline = time.monotonic() + 30
        while not distributed.preempted(2):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not events
    assert "host maintenance announced" in capsys.readouterr().out
