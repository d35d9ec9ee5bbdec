"""What is written of a run, and the line it prints."""

from __future__ import annotations

import io
import json
import logging
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

import bucket
from hyper_t5 import metrics
from hyper_t5.errors import UserError

pytestmark = pytest.mark.smoke


def lines(workdir: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def board(workdir: Path) -> list[tuple[str, int, float]]:
    """Every scalar event, in the order of the files."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, place = file.read_bytes(), 0
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + size])
            place += 12 + size + 4
            if event.HasField("session_log"):
                found.append(("purge", event.step, float(event.session_log.status)))
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return found


def test_values_arrive_in_both_places(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "count": 3})
        writer.write(2, {"loss": 0.25, "count": np.int64(4)})
    found = lines(tmp_path / "run")
    assert [{k: v for k, v in line.items() if k != "time"} for line in found] == [
        {"step": 1, "loss": 0.5, "count": 3},
        {"step": 2, "loss": 0.25, "count": 4},
    ]
    assert 1.7e9 < found[0]["time"] <= found[1]["time"]
    scalars = [event for event in board(tmp_path / "run") if event[0] != "purge"]
    assert scalars == [("loss", 1, 0.5), ("count", 1, 3), ("loss", 2, 0.25), ("count", 2, 4)]


def test_a_line_is_on_the_disk_at_once(tmp_path: Path) -> None:
    writer = metrics.Writer(tmp_path)
    writer.write(1, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1
    writer.close()


def test_numbers_that_are_not_finite_stay_visible(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": -float("inf"), "d": 1.0})
    line = lines(tmp_path)[0]
    assert [line[name] for name in "abcd"] == ["NaN", "Infinity", "-Infinity", 1.0]


def test_each_step_stands_there_once_after_a_resume(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    with metrics.Writer(tmp_path, step=20) as writer:
        writer.write(30, {"loss": 31})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (10, 10),
        (20, 20),
        (30, 31),
    ]
    assert any(event[:2] == ("purge", 21) for event in board(tmp_path))


def test_a_full_disk_is_one_clear_error_and_no_wait(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        # As a full disk, for both files; Python ignores the signal that comes with it.
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, before[1]))
        try:
            for _ in range(30):  # more than a queue in front of a dead thread would hold
                with pytest.raises(UserError, match=r"metrics\.jsonl .*: .*; make room there"):
                    writer.write(2, {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with metrics.Writer(tmp_path, step=1) as writer:  # the half line is dropped
        writer.write(2, {"loss": 3.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 3.0)]


# ------------------------------------------------------------------------------------ in a bucket

RUN = "gs://bucket/run"


@pytest.fixture
def objects() -> Iterator[bucket.Objects]:
    """What is in every gs:// bucket."""
    with pytest.MonkeyPatch.context() as patch, bucket.served(patch) as objects:
        yield objects


def at(objects: bucket.Objects, folder: Path) -> Path:
    """The run's objects as files of a folder."""
    for name, content in objects.items():
        place = folder / name.removeprefix(f"{RUN}/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


def test_a_run_in_a_bucket(objects: bucket.Objects, tmp_path: Path) -> None:
    with metrics.Writer(RUN) as writer:
        assert objects.keys() >= {f"{RUN}/metrics.jsonl"}  # it can be written: known at once
        for step in (10, 20, 30):
            writer.write(step, {"loss": step})
    with metrics.Writer(RUN, step=20) as writer:
        writer.write(30, {"loss": 31})
    found = at(objects, tmp_path)
    steps = [(line["step"], line["loss"]) for line in lines(found)]
    assert steps == [(10, 10), (20, 20), (30, 31)]
    events = board(found)
    assert [e for e in events if e[0] == "loss"] == [("loss", s, s) for s in (10, 20, 30)] + [
        ("loss", 30, 31)
    ]
    assert ("purge", 21) in [event[:2] for event in events]


def test_a_bucket_has_what_is_half_a_minute_old(
    objects: bucket.Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with metrics.Writer(RUN) as writer:
        writer.write(1, {"loss": 1.0})
        assert lines(at(objects, tmp_path)) == []
        now[0] += 31
        writer.write(2, {"loss": 2.0})
        assert [line["step"] for line in lines(at(objects, tmp_path))] == [1, 2]
        writer.write(3, {"loss": 3.0})
        assert len(lines(at(objects, tmp_path))) == 2
    assert len(lines(at(objects, tmp_path))) == 3


class Refusal(Exception):
    """Of a bucket's client, which is no OSError."""


def test_a_bucket_that_takes_nothing(
    objects: bucket.Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    down = [True]
    real = bucket.Paths.open

    def fail(self: bucket.Paths, path: Any, mode: str) -> Any:
        if down[0]:
            raise Refusal("403 no right to write")
        return real(self, path, mode)

    monkeypatch.setattr(bucket.Paths, "open", fail)
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    message = r"could not write gs://bucket/run/metrics.jsonl .*: 403 no right to write; make room"
    with pytest.raises(UserError, match=message):
        metrics.Writer(RUN)
    # A while in the middle of a run is no harm.
    down[0] = False
    with caplog.at_level(logging.WARNING), metrics.Writer(RUN) as writer:
        down[0] = True
        writer.write(1, {"loss": 1.0})
        assert "gs://bucket/run: not reached, will be tried again: 403" in caplog.text
        down[0] = False
    assert b'"loss": 1.0' in objects[f"{RUN}/metrics.jsonl"]

    def end(error: Exception | None) -> None:
        down[0] = False
        with metrics.Writer(RUN) as writer:
            down[0] = True
            writer.write(2, {"loss": 1.0})
            if error:
                raise error

    with pytest.raises(UserError, match=message):
        end(None)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        end(FloatingPointError("loss is nan"))


# --------------------------------------------------------------------------------------- progress


def test_progress() -> None:
    stream, clock = io.StringIO(), [100.0]
    progress = metrics.Progress(1000, stream, lambda: clock[0])
    assert progress.report(1, {"loss": 2.34567}) == {}
    progress.count(1000, 1000)  # the step that compiled: not in the rates
    for _ in range(4):
        clock[0] += 0.5
        progress.count(examples=8, tokens=100)
    rates = progress.report(600, {"loss": np.float32(2.34567), "accuracy": 0.5})
    assert rates == {
        "examples_per_second": 16.0,
        "tokens_per_second": 200.0,
        "seconds_per_step": 0.5,
    }
    clock[0] += 4
    progress.count(examples=2, tokens=3)
    progress.report(1000, {"loss": float("nan")})
    assert stream.getvalue().splitlines() == [
        "step 1/1000  loss 2.346",
        "step 600/1000  loss 2.346  accuracy 0.5  16.0 examples/s  200 real tokens/s  ETA 0:03:20",
        "step 1000/1000  loss nan  0.5 examples/s  1 real tokens/s  ETA 0:00:00",
    ]


def test_progress_with_utilisation_and_times() -> None:
    stream, clock = io.StringIO(), [100.0]
    progress = metrics.Progress(10, stream, lambda: clock[0], lambda seconds: 0.25 / seconds)
    assert progress.report(0, {}, {}) == {}
    progress.count(1, 1)
    for wait in (0.05, 0.06):
        clock[0] += 0.5
        progress.count(8, 100)
        times = {"seconds_data": wait, "seconds_save": 0.01, "seconds_compute": 0.49 - wait}
        rates = progress.report(5, {"loss": 1.0}, times)
        assert rates["mfu"] == 0.5
        assert rates | times == rates
    assert stream.getvalue().splitlines()[1:] == [
        "step 5/10  loss 1  16.0 examples/s  200 real tokens/s  MFU 50.0%  ETA 0:00:02",
        "step 5/10  loss 1  16.0 examples/s  200 real tokens/s  MFU 50.0%  data wait 12%  "
        "ETA 0:00:02",
    ]


def test_progress_prints_to_what_stdout_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    progress = metrics.Progress(2)
    progress.report(1, {"loss": 1.0})
    assert capsys.readouterr().out == "step 1/2  loss 1\n"


def test_peak_memory_is_this_process_s_own() -> None:
    """A child's does not begin with what its parent has taken."""
    held = np.ones(40_000_000)  # 320 MB
    assert metrics.peak_memory_mb() > 320
    code = "from hyper_t5 import metrics; print(metrics.peak_memory_mb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 0 < float(done.stdout) < 320
    del held
