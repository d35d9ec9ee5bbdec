"""Runs of several real processes: what they exchange, and how all end when one does."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from hyper_t5 import __version__, distributed, relay
from hyper_t5.errors import UserError
from procs import Host, Result, free_port, join, run_hosts, start_hosts, wait_for

HEARTBEAT = 3.0
# From the death of one to the end of all: the silence, two periods, and what a busy machine takes.
SOON = HEARTBEAT + 2 * HEARTBEAT / 6 + 8

START = f"""
import os, sys, threading, time
from hyper_t5 import distributed as d
def start(heartbeat=30, **flags):
    d.initialize(timeout=60, heartbeat=heartbeat, **flags)
    return d.index()
HEARTBEAT = {HEARTBEAT}
"""
# A loop with a collective in each step, until something ends it.
TRAIN = """
i = start(heartbeat=HEARTBEAT)
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


def one_line(result: Result) -> str:
    """The one line on stderr of a process that had to end."""
    assert result.stderr.startswith("hyper-t5: error: "), result
    assert result.stderr.count("\n") == 1, result
    return result.stderr


def ends(hosts: list[Host], within: float) -> list[Result]:
    """How these end, and that they do so soon."""
    started = time.monotonic()
    results = join(hosts, 60)
    assert time.monotonic() - started < within
    return results


# ------------------------------------------------------------------------------------ one process


def test_one_process_needs_no_service(no_cluster: None, capsys: pytest.CaptureFixture[str]) -> None:
    distributed.initialize()
    distributed.initialize(process_count=1, process_index=0)
    assert (distributed.index(), distributed.count(), distributed.is_first()) == (0, 1, True)
    distributed.barrier("here")
    assert distributed.gather("x", {"a": (1, None)}) == [{"a": [1, None]}]
    assert distributed.agree("x", "y") == "y"
    distributed.check_same("all", 3)
    distributed.leave(2, "nobody hears it")
    distributed.finish()
    distributed.say("hello")
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("", 2, 0), "--coordinator_address missing"),
        (("", 2, -1), "--coordinator_address and --process_index missing"),
        (("a:1", 0, -1), "--process_count and --process_index missing"),
        (("a:1", 2, -1), "--process_index missing"),
        (("", 0, 1), "--coordinator_address and --process_count missing"),
        (("", 1, 1), "--coordinator_address missing"),
        (("a:1", 2, 2), "--process_index 2 with --process_count 2: count from 0 to 1"),
        (("a:1", 1, 1), "--process_index 1 with --process_count 1"),
        (("a", 2, 0), "'a' is not HOST:PORT"),
        ((":80", 2, 0), "':80' is not HOST:PORT"),
        (("a:b", 2, 0), "'a:b' is not HOST:PORT"),
        (("a:70000", 2, 0), "'a:70000' is not HOST:PORT"),
    ],
)
def test_flags_that_make_no_sense(
    no_cluster: None, flags: tuple[str, int, int], words: str
) -> None:
    with pytest.raises(UserError) as error:
        distributed.initialize(*flags)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_environment_gives_what_flags_do_not(
    no_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:5")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert distributed._given("", 0, -1) == ("host:5", 4, 3)
    assert distributed._given("other:6", 8, 0) == ("other:6", 8, 0)
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='three' is not a whole number"):
        distributed.initialize()


def test_slurm_says_who_we_are(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"JOB_ID": "4096", "STEP_NODELIST": "n[3-4]", "NTASKS": "2", "PROCID": "1"}
    for name, value in (slurm | {"LOCALID": "0"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert distributed._detected(1) == ("n3:61440", 2, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert distributed._detected(1) is None


def test_a_tpu_vm_says_who_we_are(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost,other",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert distributed._detected(5) == ("localhost:8482", 4, 3)


def test_a_port_in_use(no_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "PORT_PATIENCE", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} cannot be used") as error:
            distributed.initialize(f"127.0.0.1:{port}", 2, 0)
    assert "\n" not in str(error.value)
    assert distributed.count() == 1


# ------------------------------------------------------------------------------------- preemption


def test_sigterm_asks_one_process_to_end() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with distributed.catch_sigterm():
        assert not distributed.preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert distributed.preempted(2)
        # The next one is for the system, which ends the process at once.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
    assert not distributed.preempted(3)
    with distributed.catch_sigterm():
        assert not distributed.preempted(4)


def test_only_the_main_thread_sets_handlers() -> None:
    found = []

    def elsewhere() -> None:
        with distributed.catch_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


class Metadata(http.server.BaseHTTPRequestHandler):
    """The server that tells a Google Cloud VM of itself."""

    event = "NONE"

    def do_GET(self) -> None:
        known = {"maintenance-event": self.event, "preempted": "FALSE"}
        text = known.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
        ok = text is not None and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if ok else 403)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Metadata]]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(distributed, "METADATA_PERIOD", 0.05)
    yield Metadata
    Metadata.event = "NONE"
    server.shutdown()
    server.server_close()


def test_host_maintenance_asks_to_end(
    metadata: type[Metadata], capsys: pytest.CaptureFixture[str]
) -> None:
    with distributed.catch_sigterm():
        time.sleep(0.5)
        assert not distributed.preempted(1)
        metadata.event = "TERMINATE_ON_HOST_MAINTENANCE"
        until = time.monotonic() + 30
        while not distributed.preempted(2):
            assert time.monotonic() < until
            time.sleep(0.02)
    assert "maintenance-event=TERMINATE_ON_HOST_MAINTENANCE" in capsys.readouterr().out


PREEMPTED = """
i = start(heartbeat=60)
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
if os.environ.get("SLOW"):
    time.sleep(60)
d.leave(75, "preempted")
print("never here")
"""


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_sigterm_to_one_process_ends_all_at_one_step(who: int) -> None:
    with start_hosts(START + PREEMPTED, devices=1) as hosts:
        for host in hosts:
            wait_for(host, "trains")
        hosts[who].send(signal.SIGTERM)
        results = join(hosts, 60)
    assert [result.code for result in results] == [75, 75]
    [last] = {result.stdout.splitlines()[-1] for result in results}
    assert last.startswith("saves step ")
    assert int(last.split()[-1]) > 3


def test_a_second_sigterm_ends_a_process_at_once() -> None:
    code = START + PREEMPTED.replace('if os.environ.get("SLOW"):', "if i == 1:")
    with start_hosts(code, devices=1) as hosts:
        wait_for(hosts[1], "trains")
        hosts[1].send(signal.SIGTERM)
        wait_for(hosts[1], "saves step")
        hosts[1].send(signal.SIGTERM)
        assert ends(hosts[1:], within=5)[0].code == -signal.SIGTERM


@pytest.mark.slow
def test_sigterm_is_not_swallowed_where_nobody_asks() -> None:
    with start_hosts(START + TRAIN, devices=1) as hosts:
        wait_for(hosts[1], "trains")
        hosts[1].send(signal.SIGTERM)
        first, second = ends(hosts, within=SOON)
    assert second.code == -signal.SIGTERM
    assert first.code == 1
    assert "process 1 (" in one_line(first)


# ----------------------------------------------------------------------------- exchange of values


def test_values_of_all_processes() -> None:
    code = """
i = start()
print(d.gather("all", {"i": i}), d.gather("all", [i]), d.agree("one", i), d.agree("one", i + 5))
d.barrier("here"); d.barrier("here")
from jax.experimental import multihost_utils
found = []
def beside():
    for n in range(50):
        found.append(d.gather("beside", n * (i + 1)))
thread = threading.Thread(target=beside)
thread.start()
for step in range(50):
    multihost_utils.sync_global_devices("step")
thread.join()
print(found == [[n, 2 * n, 3 * n] for n in range(50)])
print(len(d._client().key_value_dir_get("hyper_t5/beside")) <= 2 * d.count())
d.say("only here")
d.finish()
"""
    results = run_hosts(START + code, hosts=3, devices=2)
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 3
    for result in results:
        assert result.stdout.startswith("waiting for 3 processes at 127.0.0.1:")
        assert "\n[{'i': 0}, {'i': 1}, {'i': 2}] [[0], [1], [2]] 0 5\n" in result.stdout
        ours = [line for line in result.stdout.splitlines() if "Gloo" not in line]
        assert ours.count("True") == 2
    assert "process 0 of 3: 2 local of 6 devices (cpu)\n" in results[0].stdout
    assert [result.stdout.count("only here") for result in results] == [1, 0, 0]
    assert [result.stdout.count("devices (cpu)") for result in results] == [1, 0, 0]


def test_flags_do_as_well_as_the_environment() -> None:
    code = """
i = int(os.environ.pop("JAX_PROCESS_ID"))
address, n = os.environ.pop("JAX_COORDINATOR_ADDRESS"), int(os.environ.pop("JAX_NUM_PROCESSES"))
start(coordinator_address=address, process_count=n, process_index=i)
print(d.gather("all", i))
"""
    # Nobody says `finish`, and there is a proxy that the client would go through: both are borne.
    results = run_hosts(
        START + code, devices=1, env={"http_proxy": f"http://127.0.0.1:{free_port()}"}
    )
    assert [result.code for result in results] == [0, 0]
    for result in results:
        assert "[0, 1]\n" in result.stdout


@pytest.mark.parametrize("end", ["d.finish()", ""])
def test_the_end_does_not_cut_a_sign_of_life_in_two(end: str) -> None:
    # A thread inside JAX when the interpreter ends would abort; here it is nearly always inside.
    code = f"""
d._Run.period = property(lambda _: 1e-4)
start()
time.sleep(0.5)
{end}
"""
    results = run_hosts(START + code, hosts=3, devices=1)
    assert [(result.code, result.stderr) for result in results] == [(0, "")] * 3


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
def test_hosts_that_differ(code: str, words: str) -> None:
    code = f"""
if os.environ["JAX_PROCESS_ID"] == "1":
    {code}
try:
    start()
except d.UserError as e:
    d.leave(2, str(e))
    print("hyper-t5: error:", e, file=sys.stderr)
    sys.exit(2)
"""
    for result in run_hosts(START + code, devices=1):
        assert result.code == 2, result
        assert result.stderr.startswith(f"hyper-t5: error: {words}")
        assert "on process 1 (" in result.stderr
        assert result.stderr.count("\n") == 1


# --------------------------------------------------------------------------------- the end of all


@pytest.mark.parametrize(
    ("who", "number"),
    [
        (0, signal.SIGKILL),
        (0, signal.SIGSTOP),
        (1, signal.SIGKILL),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_others(who: int, number: signal.Signals) -> None:
    with start_hosts(START + TRAIN, hosts=3, devices=1) as hosts:
        for host in hosts:
            wait_for(host, "trains")
        hosts[who].send(number)
        at_once = (who, number) == (0, signal.SIGKILL)
        left = [host for i, host in enumerate(hosts) if i != who]
        results = ends(left, within=HEARTBEAT if at_once else SOON)
    said = "has gone" if at_once else "has not been heard of for 3 s"
    for result in results:
        assert result.code == 1
        line = one_line(result)
        assert f"process {who} (" in line
        assert f") {said}; run the same command again" in line


def test_the_relay_keeps_its_side_open() -> None:
    argv = [sys.executable, "-I", "-S", relay.__file__, "127.0.0.1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        argv += [str(server.getsockname()[1]), "30"]
        child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        with child:
            assert child.stdin
            assert child.stdout
            with socket.create_connection(("127.0.0.1", int(child.stdout.readline()))) as here:
                there, _ = server.accept()
                with there:
                    here.sendall(b"to")
                    assert there.recv(9) == b"to"
                    there.sendall(b"fro")
                    assert here.recv(9) == b"fro"
                child.send_signal(signal.SIGTERM)
                assert child.stdout.readline() == "gone\n"
                here.settimeout(0.5)
                with pytest.raises(TimeoutError):
                    here.recv(9)
                child.stdin.close()
                assert child.wait(30) == 0


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_who_leaves_tells_the_others_why(who: int) -> None:
    code = f"""
i = start(heartbeat=60)
if i == {who}:
    d.leave(2, "no\\nsuch file")
d.barrier("never")
"""
    results = run_hosts(START + code, hosts=3, devices=1, timeout=60)
    assert [result.code for result in results] == [2, 2, 2]
    assert results.pop(who).stderr == "hyper-t5: error: no such file\n"
    for result in results:
        assert f"process {who} (" in one_line(result)
        assert result.stderr.endswith(") ended: no such file\n")


@pytest.mark.slow
def test_all_leave_together() -> None:
    code = "i = start(heartbeat=60)\nd.leave(2, 'every host has the same mistake')"
    with start_hosts(START + code, hosts=3, devices=1) as hosts:
        results = join(hosts, 60)
    assert [result.code for result in results] == [2, 2, 2]


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_that_nobody_caught_ends_all(who: int) -> None:
    code = TRAIN.replace("time.sleep(0.02)", f"0 if step < 9 or i != {who} else boom")
    results = run_hosts(START + code, devices=1)
    assert [result.code for result in results] == [1, 1]
    assert "NameError: name 'boom' is not defined" in results[who].stderr
    assert f"process {who} (" in one_line(results[1 - who])
    assert "ended: NameError: name 'boom' is not defined" in results[1 - who].stderr


@pytest.mark.parametrize(
    ("who", "words"), [(0, "process 1 of 2 did not come to"), (1, "could not be reached at")]
)
def test_one_that_never_comes(who: int, words: str) -> None:
    code = START.replace("timeout=60", "timeout=3") + "start()"
    with start_hosts(code, devices=1, only=[who]) as hosts:
        [result] = ends(hosts, within=25)
    assert result.code == 1
    assert "waiting for 2 processes at 127.0.0.1:" in result.stdout
    assert "up to 3 s\n" in result.stdout
    assert words in one_line(result)
    assert "within 3 s" in result.stderr


def test_two_with_one_index() -> None:
    with start_hosts(START + "start()", hosts=3, devices=1, only=[0, 1, 1]) as hosts:
        results = ends(hosts, within=30)
    for result in results:
        assert result.code == 1  # nobody caught it
        assert "UserError: two processes have index 1: on " in result.stderr


def test_who_restarts_while_the_others_wait_and_who_is_none_of_ours() -> None:
    address = f"127.0.0.1:{free_port()}"
    code = START + "start()\nprint(d.gather('all', d.index()))\nd.finish()"
    with start_hosts(code, hosts=3, devices=1, only=[0, 1], address=address) as hosts:
        for host in hosts:
            wait_for(host, "waiting for 3")
        connect_to(address, b"GET / HTTP/1.1\r\n\r\n")
        connect_to(address, b"[1]\n")
        time.sleep(1)
        hosts[1].kill()
        with start_hosts(code, hosts=3, devices=1, only=[1, 2], address=address) as more:
            results = join([hosts[0], *more])
    for result in results:
        assert result.code == 0, result
        assert "[0, 1, 2]\n" in result.stdout


def connect_to(address: str, hello: bytes) -> None:
    """What a scanner of ports does."""
    host, port = address.split(":")
    until = time.monotonic() + 10
    while True:
        with contextlib.suppress(ConnectionRefusedError):
            with socket.create_connection((host, int(port))) as caller:
                caller.sendall(hello)
            return
        assert time.monotonic() < until
        time.sleep(0.05)
