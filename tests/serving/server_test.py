"""``hyper-t5 serve`` as a process: its first lines, SIGTERM, and what a restart finds."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_runs

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

SIZES = ("--max_batch=2", "--max_input=24", "--max_output=8")


@contextlib.contextmanager
def started(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Start a server; yield the process, its address and the line with curl."""
    command = [sys.executable, "-m", "hyper_t5", "serve", "--port=0", *SIZES, *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            lines = iter(process.stdout.readline, "")
            ready = next(line for line in lines if line.startswith("serve: ready"))
            yield process, re.findall(r"at (\S+)/v1", ready)[0], next(lines)
        finally:
            process.kill()


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.mark.slow
def test_sigterm_drains_and_a_restart_finds_the_adapters(served_run: Path) -> None:
    rows = {"model": "drained", "prompt": ["a b c"] * 32, "max_tokens": 8}
    answers: list[Any] = []
    with started(f"--workdir={served_run}") as (process, url, curl):
        post(f"{url}/v1/adapters", {"name": "drained", "instruction": "drain"})
        # The line that was printed works as it is.
        answer = json.loads(subprocess.check_output([*shlex.split(curl), "-s"]))
        assert answer["model"] == served_run.name
        send = threading.Thread(target=lambda: answers.append(post(f"{url}/v1/completions", rows)))
        send.start()
        while not answers and "batch_fill 0.0" in _metrics(url):
            assert send.is_alive()
        process.send_signal(signal.SIGTERM)
        send.join()
        assert len(answers[0]["choices"]) == 32
        assert process.wait(60) == 0
    row = rows | {"prompt": "a b c"}
    with started(f"--workdir={served_run}", "--no-warmup") as (_, url, _):  # and is killed
        again = post(f"{url}/v1/completions", row)
        assert again["choices"][0]["text"] == answers[0]["choices"][0]["text"]
    with started(f"--workdir={served_run}", "--no-warmup") as (process, url, _):
        assert post(f"{url}/v1/adapters", {"instruction": "drain"})["cached"]
        process.terminate()
        assert process.wait(60) == 0


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics") as response:
        return str(response.read())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "pass --workdir of a run, or --backbone"),
        (["--backbone=t5", "--adapter=folder"], "--adapter folder: write NAME=FOLDER"),
        (["--workdir=missing"], "missing"),
    ],
)
def test_invalid_flags_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in tiny_runs.fails(capsys, "serve", *argv)


def test_a_port_in_use_is_one_line(served_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        argv = ["serve", f"--workdir={served_run}", f"--port={port}"]
        assert f"cannot listen at 127.0.0.1:{port}" in tiny_runs.fails(capsys, *argv)
