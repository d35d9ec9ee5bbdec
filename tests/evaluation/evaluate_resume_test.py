"""Resumable evaluation: kills, preemption, damaged and foreign caches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from hyper_t5.checkpoints import checkpoint
from hyper_t5.evaluation import evaluate
from hyper_t5.parallel import distributed
from tests.support import tiny_runs
from tests.support.evaluations import edit_task, evaluate_run


class Stopped(BaseException):
    """Stand-in for a kill: nothing catches it."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, tasks: int) -> list[str]:
    """Stop evaluations before they predict more tasks; return the names of the started ones."""
    started: list[str] = []
    original = evaluate.predict_rows

    def predict_rows(run: Any, request: evaluate.EvalRequest, *more: Any) -> Any:
        if len(started) == tasks:
            raise Stopped
        started.append(request.task.name)
        return original(run, request, *more)

    monkeypatch.setattr(evaluate, "predict_rows", predict_rows)
    return started


def cache_files(out: Path) -> list[Path]:
    return sorted((out / "prediction_cache").glob("*.jsonl"))


def metrics_without_seconds(out: Path) -> dict[str, Any]:
    report = json.loads((out / "metrics.json").read_text())
    assert report.pop("seconds")["evaluate"] > 0
    return report


@pytest.fixture(scope="module")
def stopped(run_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an evaluation that was stopped after its first task."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    with pytest.MonkeyPatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(Stopped):
            evaluate_run(run_of("hyper_lora"), out)
    assert len(cache_files(out)) == 1
    assert not (out / "metrics.json").exists()
    return out


@pytest.fixture
def begun(stopped: Path, tmp_path: Path) -> Path:
    """Return a copy of ``stopped`` that a test may change."""
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def test_a_stopped_evaluation_resumes(
    run_of: Any,
    evaluation_of: Any,
    begun: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    complete = evaluation_of("hyper_lora")
    predicted = stopped_after(monkeypatch, 9)
    evaluate_run(run_of("hyper_lora"), begun)
    assert predicted == [tiny_runs.HELD_OUT[1]]
    assert "1 of 2 tasks are complete" in capsys.readouterr().out
    assert not (begun / "prediction_cache").exists()
    resumed, expected = ((out / "predictions.jsonl").read_bytes() for out in (begun, complete))
    assert resumed == expected
    assert metrics_without_seconds(begun) == metrics_without_seconds(complete)


def test_a_stop_before_the_report_repeats_no_prediction(
    run_of: Any, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("hyper_lora")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            evaluate_run(run, begun)
    assert len(cache_files(begun)) == 2
    assert stopped_after(monkeypatch, 0) == []
    metrics, _ = evaluate_run(run, begun)
    assert metrics["splits"]["test"]["rows"] == 9


@pytest.mark.parametrize("size", [0, 1, -3])
def test_a_damaged_file_is_predicted_again(
    run_of: Any, evaluated: Any, begun: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file ends in its header, in a row or between rows; a temporary file is left over."""
    (file,) = cache_files(begun)
    content = file.read_bytes()
    file.write_bytes(content[:size] if size else b"".join(content.splitlines(True)[:-1]))
    (begun / "prediction_cache" / f".{file.name}.123").write_bytes(content[:10])
    capsys.readouterr()
    _, rows = evaluate_run(run_of("hyper_lora"), begun)
    assert f"{file} is damaged; its task is predicted again" in capsys.readouterr().out
    assert rows == evaluated("hyper_lora")[1]
    assert not (begun / "prediction_cache").exists()


@pytest.mark.parametrize("other", ["config", "checkpoint", "data"])
def test_predictions_of_another_evaluation_are_not_used(
    run_of: Any,
    begun: Path,
    sni: Path,
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, flags = run_of("hyper_lora"), []
    if other == "config":
        flags = ["--gin.eval.max_decode_length=3"]
    elif other == "checkpoint":  # of the same step
        shutil.copytree(run, tmp_path / "run")
        run = tmp_path / "run"
        params, meta = checkpoint.load_subtree(run, "params")
        shutil.rmtree(run / "checkpoints")
        for layer in jax.tree.leaves(params):
            layer += 0.5
        checkpoint.save(run, 1, {"params": params}, meta)
    else:
        shutil.copytree(sni, tmp_path / "sni")
        for name in tiny_runs.HELD_OUT:
            edit_task(tmp_path / "sni", name, lambda task: task["Instances"][0].update(input="p q"))
        flags = [f"--gin.data.sni_dir={tmp_path / 'sni'}"]
    predicted = stopped_after(monkeypatch, 9)
    capsys.readouterr()
    evaluate_run(run, begun, *flags)
    assert predicted == list(tiny_runs.HELD_OUT)
    assert "1 tasks in" in (out := capsys.readouterr().out)
    assert "of another config, checkpoint or dataset" in out


def test_a_preempted_evaluation_exits_75_and_resumes(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    polled: list[int] = []

    def preempted(number: int) -> bool:
        polled.append(number)
        return number == 2

    monkeypatch.setattr(distributed, "preempted", preempted)
    argv = ["evaluate", "--workdir", str(run_of("shared_lora")), "--out", str(tmp_path)]
    assert "run it again to resume" in tiny_runs.fails(capsys, *argv, code=75)
    assert polled == [1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["prediction_cache"]
    polled.clear()
    _, predictions = evaluate_run(run_of("shared_lora"), tmp_path)
    assert polled == [1]  # the remaining task
    assert len(predictions) == 9
