"""A fake `gcloud compute tpus`, whose workers are folders and processes of this machine.

Its state is in the folder FAKE_CLOUD:

- cloud.json: ``{"requests": {NAME: [STATE, ...]}, "nodes": {NAME: STATE}, "new": [STATE, ...]}``;
  a request moves to its next state when it is described, and a new one starts with those of "new"
- calls: one line of JSON per call
- refused, denied: if it exists, the error of every creation, or of every call
- cut: while it exists, ssh has no connection; drop: if it exists, ssh gives up
- homes/NODE-WORKER: the home folder of a worker; each node has two
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

WORKERS = 2

cloud_folder = Path(os.environ["FAKE_CLOUD"])
words = [word for word in sys.argv[1:] if not word.startswith("--")]
flags = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))


def fail(text: str, code: int = 1) -> NoReturn:
    print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {text}", file=sys.stderr)
    sys.exit(code)


def load() -> dict[str, Any]:
    return json.loads((cloud_folder / "cloud.json").read_text())


def save(cloud: dict[str, Any]) -> None:
    part = cloud_folder / f"cloud.json.{os.getpid()}"
    part.write_text(json.dumps(cloud))
    part.rename(cloud_folder / "cloud.json")


def home(node: str, worker: int) -> Path:
    return cloud_folder / "homes" / f"{node}-{worker}"


def request(cloud: dict[str, Any], verb: str, name: str) -> None:
    """Run a command of `gcloud compute tpus queued-resources`."""
    if verb == "create":
        count = int(flags.get("node-count", 1))
        for node in [flags["node-id"]] if count == 1 else [f"{name}-{i}" for i in range(count)]:
            cloud["nodes"][node] = "READY"
            for worker in range(WORKERS):
                shutil.rmtree(home(node, worker), ignore_errors=True)
                home(node, worker).mkdir(parents=True)
        cloud["requests"][name] = cloud["new"]
    elif name not in cloud["requests"]:
        fail(f"NOT_FOUND: Resource 'projects/p/queuedResources/{name}' was not found")
    elif verb == "describe":
        states = cloud["requests"][name]
        print(states[0])
        cloud["requests"][name] = states[1:] or states
    elif verb == "delete":
        assert "force" in flags
        del cloud["requests"][name]
        cloud["nodes"] = {k: v for k, v in cloud["nodes"].items() if not k.startswith(name)}
    save(cloud)


def connect(node: str, worker: int, log: BinaryIO) -> subprocess.Popen:
    print(f"SSH: Attempting to connect to worker {worker}...", file=sys.stderr)
    env = {
        "HOME": str(home(node, worker)),
        "LIBTPU_LOCKFILE": str(home(node, worker) / "libtpu_lockfile"),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{os.environ['FAKE_PORT']}",
        "JAX_NUM_PROCESSES": str(WORKERS),
        "JAX_PROCESS_ID": str(worker),
    }
    return subprocess.Popen(
        ["bash", "-c", flags["command"]],
        cwd=env["HOME"],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def ssh(node: str) -> None:
    """Run the command on all workers, and connect again after a cut, as gcloud does."""
    folder = Path(flags["output-directory"])
    logs = [(folder / f"{worker}.log").open("wb") for worker in range(WORKERS)]
    children = {w: connect(node, w, log) for w, log in enumerate(logs)}
    codes = []
    while children:
        time.sleep(0.02)
        cut, drop = (cloud_folder / "cut").exists(), (cloud_folder / "drop").exists()
        for worker, child in list(children.items()):
            if child.poll() is not None:
                codes.append(child.returncode)
                del children[worker]
            elif cut or drop:
                os.killpg(child.pid, signal.SIGKILL)
        if not (cut or drop):
            continue
        (cloud_folder / "was_cut").touch()
        while cut and (cloud_folder / "cut").exists() and load()["nodes"].get(node) == "READY":
            time.sleep(0.02)
        if drop or (cloud_folder / "cut").exists():
            (cloud_folder / "drop").unlink(missing_ok=True)
            fail("[ssh] exited with return code [255].", 255)
        children = {w: connect(node, w, logs[w]) for w in children}
    sys.exit(max(codes))


def main() -> None:
    with (cloud_folder / "calls").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\n")
    assert words[:2] == ["compute", "tpus"], words
    assert flags["zone"] == "z", flags
    assert "quiet" in flags, flags
    group, verb, *names = words[2:]
    for name in ("denied", "refused"):
        if (cloud_folder / name).exists() and (name == "denied" or verb == "create"):
            fail((cloud_folder / name).read_text())
    cloud = load()
    if group == "queued-resources":
        request(cloud, verb, names[0])
        return
    node = names[-1].partition(":")[0]
    if node not in cloud["nodes"]:
        fail(f"NOT_FOUND: Resource 'projects/p/nodes/{node}' was not found")
    state = cloud["nodes"][node]
    if verb == "describe":
        print(state)
        return
    assert flags["worker"] == "all"
    if state != "READY":
        fail(f'This TPU has terminal state "{state}", so it cannot be used anymore.')
    if verb == "scp":
        for worker in range(WORKERS):
            shutil.copy(names[0], home(node, worker))
    else:
        ssh(node)


main()
