"""``hyper-t5 serve`` as a process: its first lines, SIGTERM, and what a restart finds."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_runs

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

SIZES = ("--max_batch=2", "--max_input=24", "--max_output=8")


def start(*argv: str) -> tuple[subprocess.Popen[str], str, str]:
    """Start a server; return the process, its address and the line with curl."""
    command = [sys.executable, "-m", "hyper_t5", "serve", "--port=0", *SIZES, *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    for line in process.stdout:
        if match := re.search(r"ready after .* at (\S+)/v1", line):
            return process, match[1], next(iter(process.stdout))
    raise AssertionError(f"the server ended with {process.wait()}")


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.mark.slow
def test_sigterm_drains_and_a_restart_finds_the_adapters(served_run: Path) -> None:
    process, url, curl = start(f"--workdir={served_run}")
    body = post(f"{url}/v1/adapters", {"name": "kept", "instruction": "copy the letters"})
    assert not body["cached"]
    # The line that was printed works as it is.
    answer = json.loads(subprocess.check_output([*shlex.split(curl), "-s"]))
    assert answer["model"] == served_run.name
    answers: list[Any] = []
    rows = {"model": "kept", "prompt": ["a b c"] * 32, "max_tokens": 8}
    thread = threading.Thread(target=lambda: answers.append(post(f"{url}/v1/completions", rows)))
    thread.start()
    while not re.search(r"batch_fill 0\.[0-9]*[1-9]", _metrics(url)):
        assert thread.is_alive() or answers
        if answers:
            break
    process.send_signal(signal.SIGTERM)
    thread.join()
    assert len(answers[0]["choices"]) == 32
    assert process.wait(60) == 0
    process, url, _ = start(f"--workdir={served_run}", "--no-warmup")
    try:
        again = post(f"{url}/v1/completions", {"model": "kept", "prompt": "a b c", "max_tokens": 8})
        assert again["choices"][0]["text"] == answers[0]["choices"][0]["text"]
    finally:
        process.kill()
        process.wait()
    process, url, _ = start(f"--workdir={served_run}", "--no-warmup")  # after SIGKILL
    assert post(f"{url}/v1/adapters", {"instruction": "copy the letters"})["cached"]
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
