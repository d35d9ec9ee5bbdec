"""The comparison of systems: scores and table, and (slow) whole runs in two steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hyper_t5.evaluation import evaluate, report
from hyper_t5.experiments import system_comparison
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.tasks import synthetic
from hyper_t5.tools import quickstart
from tests.support import tiny_runs


def _run(name: str, values: dict[str, float]) -> report.ReportRun:
    tasks = {t: {"rows": 5, "strict_match": v, "rougeL": 1.0} for t, v in values.items()}
    overall = {"strict_match": 0.0, "rougeL": 0.0}  # only the keys are read
    split = {"per_task": tasks, "mixture": "synthetic", "overall": overall}
    metrics = {"system": name, "splits": {"seen": split}}
    rows = [{"split": "seen", "mixture": "synthetic"}]
    return report.ReportRun(name, metrics, rows, {}, [])


def test_means_over_tasks_then_seeds() -> None:
    runs = {
        "hint": [_run("hint", {"a": 10.0, "b": 20.0}), _run("hint", {"a": 20.0, "b": 30.0})],
        "none": [_run("none", {"a": 0.0, "b": 5.0})],
        "concat": [_run("concat", {"a": 12.0, "b": 4.0}), _run("concat", {"a": 12.0, "b": 8.0})],
        "hint+text": [_run("hint", {"a": 16.0, "b": 27.0})],
    }
    scores = system_comparison.scores(runs)
    assert scores["hint"]["seen"] == {
        "metric": "strict_match",
        "mean": 20.0,
        "deviation": 5.0,
        "seeds": [15.0, 25.0],
        # Over both seeds task a has 15 and 12, task b 25 and 6.
        "difference": 11.0,
        "interval": [3.0, 19.0],
    }
    lines = [line.split() for line in system_comparison.table(scores).splitlines()]
    assert lines == [
        ["seen:", "strict_match", "vs", "concat"],
        ["hint", "20.0", "±5.0", "+11.0", "[+3.0,", "+19.0]"],
        ["none", "2.5", "-6.5", "[-12.0,", "-1.0]"],
        ["concat", "9.0", "±1.0"],
        ["hint+text", "21.5", "+12.5", "[+4.0,", "+21.0]"],
        # hint has 15 for task a, 25 for task b.
        ["hint+text,", "seen:", "+1.5", "[+1.0,", "+2.0]", "vs", "hint"],
    ]
    assert (scores["hint+text"]["seen"]["gain"], "gain" in scores["hint"]["seen"]) == (1.5, False)


def test_the_plot_needs_concat(tmp_path: Path) -> None:
    runs = {name: [_run(name, {"a": 1.0, "b": 2.0})] for name in ("none", "concat")}
    results = {"synthetic": system_comparison.scores(runs)}
    plot = system_comparison.plot(results, tmp_path / "study.png")
    assert Path(str(plot)).read_bytes().startswith(b"\x89PNG")
    del results["synthetic"]["concat"]
    assert system_comparison.plot(results, tmp_path / "none.png") is None


def test_entries() -> None:
    default, pretrained = system_comparison.DEFAULT, set(system_comparison.HYPERPRETRAINED)
    assert set(default) - {"start"} == {n for n in SYSTEMS if not n.startswith("task_")}
    untrained = [entry for entry in default if not system_comparison._is_trained(entry)]
    assert set(untrained) == {"start", "cached", "none"}
    assert {"hyper_lora+text", "hint+text"} <= pretrained
    assert not {"concat+text", "none+text", "task_lora+text"} & pretrained


@pytest.mark.slow
def test_a_whole_comparison_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.py"
    file.write_text(tiny_runs.QUICKSTART)
    out, backbone = tmp_path / "out", quickstart.shipped_backbone()
    argv = [
        f"--out={out}",
        f"--config={file}",
        f"--backbone={backbone}",
        "--eval_mixtures",
        "synthetic",
    ]
    argv += ["--seeds", "0", "1", "--systems", "start", "shared_lora", "none", "--gin.eval.batch=1"]
    assert system_comparison.main(argv) == 0
    content = json.loads((out / "study.json").read_text())
    quality = content["quality"]["synthetic"]
    assert {entry: len(splits) for entry, splits in quality.items()} == dict.fromkeys(
        ("start", "shared_lora", "none"), len(synthetic.HELD_OUT)
    )
    first = {entry: splits[synthetic.HELD_OUT[0]] for entry, splits in quality.items()}
    counts = {entry: len(cell["seeds"]) for entry, cell in first.items()}
    assert counts == {"start": 1, "shared_lora": 2, "none": 1}
    # The shipped backbone solves the task with the text in front of the input, and not without.
    assert first["start"]["mean"] > 90 > 10 > first["none"]["mean"]
    assert not (out / "study.png").exists()  # without concat
    page = (out / "report_synthetic" / "report.html").read_text()
    assert "Difference to the concatenated text" in page
    config = json.loads((out / "seed1" / "shared_lora" / "config.json").read_text())
    assert (config["seed"], config["eval"]["batch"]) == (1, 1)
    # A second call trains and evaluates nothing.
    monkeypatch.setattr(quickstart, "train_config", None)
    monkeypatch.setattr(evaluate, "evaluate_workdir", None)
    assert system_comparison.main(argv) == 0
    assert json.loads((out / "study.json").read_text()) == content


@pytest.mark.slow
def test_hyperpretraining_on_text(tmp_path: Path) -> None:
    (file := tmp_path / "config.py").write_text(tiny_runs.QUICKSTART)
    out, backbone = tmp_path / "out", quickstart.shipped_backbone()
    argv = [
        f"--out={out}",
        f"--config={file}",
        f"--backbone={backbone}",
        "--eval_mixtures",
        "synthetic",
    ]
    argv += ["--systems", "hyper_prefix+text", "--text_steps", "1", "--gin.eval.batch=1"]
    assert system_comparison.main(argv) == 0
    content = json.loads((out / "study.json").read_text())
    assert list(content["quality"]["synthetic"]) == ["hyper_prefix+text"]
    first, second = (
        json.loads((out / "seed0" / name / "config.json").read_text())
        for name in ("hyper_prefix_hyperpretrain", "hyper_prefix+text")
    )
    assert (first["stage"], first["train"]["steps"]) == ("hyperpretrain", 1)
    assert (second["stage"], second["train"]["steps"]) == ("mtf", 2)
    assert second["hypermodel"]["path"] == str(out / "seed0" / "hyper_prefix_hyperpretrain")


def test_invalid_arguments_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert system_comparison.main([*argv, "--systems", "himt"]) == 2
    assert "the nearest is 'hint'" in capsys.readouterr().err
    assert system_comparison.main([*argv, "--gin.trian.steps=3"]) == 2
    assert "trian.steps" in capsys.readouterr().err
