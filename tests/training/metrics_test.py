"""Metrics on disk and in a bucket, and lines of progress."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from hyper_t5.training import metrics
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket

pytestmark = pytest.mark.smoke


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl as strict JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(workdir: Path) -> list[tuple[str, int, float]]:
    """Read every scalar and session start, in the order of the files."""
    result = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, start = file.read_bytes(), 0
        while start < len(content):
            size = int.from_bytes(content[start : start + 8], "little")
            event = event_pb2.Event.FromString(content[start + 12 : start + 12 + size])
            start += 12 + size + 4
            if event.HasField("session_log"):
                result.append(("start", event.step, float(event.session_log.status)))
            result += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return result


def test_values_are_in_both_files_at_once(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "count": 3})
        assert len(lines(tmp_path / "run")) == 1
        writer.write(2, {"loss": 0.25, "count": np.int64(4)})
        written = lines(tmp_path / "run")
        assert [{k: v for k, v in line.items() if k != "time"} for line in written] == [
            {"step": 1, "loss": 0.5, "count": 3},
            {"step": 2, "loss": 0.25, "count": 4},
        ]
        assert 1.7e9 < written[0]["time"] <= written[1]["time"]
        scalars = [("loss", 1, 0.5), ("count", 1, 3), ("loss", 2, 0.25), ("count", 2, 4)]
        assert events(tmp_path / "run")[1:] == scalars


def test_non_finite_numbers_are_strings(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"a": float("nan"), "b": np.float32("inf"), "c": -float("inf"), "d": 1.0})
    line = lines(tmp_path)[0]
    assert [line[name] for name in "abcd"] == ["NaN", "Infinity", "-Infinity", 1.0]


def test_a_resumed_run_has_each_step_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with metrics.Writer(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed here
    with metrics.Writer(tmp_path, step=20) as writer:
        writer.write(30, {"loss": 31})
    steps = [(line["step"], line["loss"]) for line in lines(tmp_path)]
    assert steps == [(10, 10), (20, 20), (30, 31)]
    assert "metrics.jsonl: dropped 2 lines after step 20" in caplog.text
    assert any(event[:2] == ("start", 21) for event in events(tmp_path))


def test_a_full_disk_is_an_error_at_each_write(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        # As a full disk, for both files; Python ignores the signal.
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            for _ in range(30):  # more than the queue of a writer thread
                with pytest.raises(UserError, match=r"metrics\.jsonl .*: .*; make room there"):
                    writer.write(2, {"loss": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with metrics.Writer(tmp_path, step=1) as writer:  # drops the incomplete line
        writer.write(2, {"loss": 3.0})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 3.0)]


# ------------------------------------------------------------------------------------ in a bucket

RUN = "gs://bucket/run"


@pytest.fixture
def objects() -> Iterator[fake_bucket.Objects]:
    """Serve buckets from a dict."""
    with pytest.MonkeyPatch.context() as patch, fake_bucket.served(patch) as objects:
        yield objects


def download(objects: fake_bucket.Objects, folder: Path) -> Path:
    """Write the run's objects to a folder."""
    for name, content in objects.items():
        file = folder / name.removeprefix(f"{RUN}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder


def test_a_bucket_is_updated_every_half_minute(
    objects: fake_bucket.Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    with metrics.Writer(RUN) as writer:
        assert f"{RUN}/metrics.jsonl" in objects
        writer.write(10, {"loss": 10})
        assert lines(download(objects, tmp_path)) == []
        now[0] += 31
        writer.write(20, {"loss": 20})
        assert [line["step"] for line in lines(download(objects, tmp_path))] == [10, 20]
        writer.write(30, {"loss": 30})
        assert len(lines(download(objects, tmp_path))) == 2
    assert len(lines(download(objects, tmp_path))) == 3
    with metrics.Writer(RUN, step=20) as writer:  # resumed
        writer.write(30, {"loss": 31})
    steps = [(line["step"], line["loss"]) for line in lines(download(objects, tmp_path))]
    assert steps == [(10, 10), (20, 20), (30, 31)]
    logged = events(tmp_path)
    scalars = [event for event in logged if event[0] == "loss"]
    assert scalars == [("loss", step, step) for step in (10, 20, 30)] + [("loss", 30, 31)]
    assert ("start", 21) in [event[:2] for event in logged]


class RefusedError(Exception):
    """Error of a bucket's client, which is no OSError."""


def test_a_bucket_that_refuses(
    objects: fake_bucket.Objects, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuses = [True]
    open_path = fake_bucket.Paths.open

    def maybe_refuse(self: fake_bucket.Paths, path: Any, mode: str) -> Any:
        if refuses[0]:
            raise RefusedError("403 no right to write")
        return open_path(self, path, mode)

    monkeypatch.setattr(fake_bucket.Paths, "open", maybe_refuse)
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.0)
    message = r"could not write gs://bucket/run/metrics.jsonl .*: 403 no right to write; make room"
    with pytest.raises(UserError, match=message):
        metrics.Writer(RUN)
    # During a run it is tried again.
    refuses[0] = False
    with caplog.at_level(logging.WARNING), metrics.Writer(RUN) as writer:
        refuses[0] = True
        writer.write(1, {"loss": 1.0})
        assert "gs://bucket/run: upload failed, will be retried: 403" in caplog.text
        refuses[0] = False
    assert b'"loss": 1.0' in objects[f"{RUN}/metrics.jsonl"]

    def refuse_at_the_end(error: Exception | None) -> None:
        refuses[0] = False
        with metrics.Writer(RUN) as writer:
            refuses[0] = True
            writer.write(2, {"loss": 1.0})
            if error:
                raise error

    with pytest.raises(UserError, match=message):
        refuse_at_the_end(None)
    with pytest.raises(FloatingPointError, match="loss is nan"):
        refuse_at_the_end(FloatingPointError("loss is nan"))


# --------------------------------------------------------------------------------------- progress


def test_progress(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    progress = metrics.Progress(1000, lambda: clock[0])
    assert progress.report(1, {"loss": 2.34567}) == {}
    progress.count(1000, 1000)  # the step that was compiled: not in the rates
    for _ in range(4):
        clock[0] += 0.5
        progress.count(examples=8, tokens=100)
    assert progress.report(600, {"loss": np.float32(2.34567), "accuracy": 0.5}) == {
        "examples_per_second": 16.0,
        "tokens_per_second": 200.0,
        "seconds_per_step": 0.5,
    }
    clock[0] += 4
    progress.count(examples=2, tokens=3)
    progress.report(1000, {"loss": float("nan")})
    assert capsys.readouterr().out.splitlines() == [
        "step 1/1000  loss 2.346",
        "step 600/1000  loss 2.346  accuracy 0.5  16.0 examples/s  200 real tokens/s  ETA 0:03:20",
        "step 1000/1000  loss nan  0.5 examples/s  1 real tokens/s  ETA 0:00:00",
    ]


def test_progress_with_utilisation_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    progress = metrics.Progress(10, lambda: clock[0], lambda seconds: 0.25 / seconds)
    progress.count(1, 1)
    for wait in (0.05, 0.06):
        clock[0] += 0.5
        progress.count(8, 100)
        times = {"seconds_data": wait, "seconds_save": 0.01, "seconds_compute": 0.49 - wait}
        rates = progress.report(5, {"loss": 1.0}, times)
        assert rates["mfu"] == 0.5
        assert rates | times == rates
    line = "step 5/10  loss 1  16.0 examples/s  200 real tokens/s  MFU 50.0%  "
    expected = [f"{line}ETA 0:00:02", f"{line}data wait 12%  ETA 0:00:02"]
    assert capsys.readouterr().out.splitlines() == expected
