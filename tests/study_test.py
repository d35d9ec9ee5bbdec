"""The study of all systems with one budget: its table, and, slowly, that it makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import runs
from hyper_t5 import evaluate, quickstart, report, study
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.tasks import synthetic


def _run(name: str, values: dict[str, float]) -> report.Run:
    tasks = {t: {"rows": 5, "strict_match": v, "rougeL": 1.0} for t, v in values.items()}
    overall = {"strict_match": 0.0, "rougeL": 0.0}  # only which there are is read
    split = {"per_task": tasks, "mixture": "synthetic", "overall": overall}
    found = {"system": name, "splits": {"seen": split}}
    rows = [{"split": "seen", "mixture": "synthetic"}]
    return report.Run(name, found, rows, {}, [])


def test_means_over_tasks_then_seeds() -> None:
    made = {
        "hint": [_run("hint", {"a": 10.0, "b": 20.0}), _run("hint", {"a": 20.0, "b": 30.0})],
        "none": [_run("none", {"a": 0.0, "b": 5.0})],
        "concat": [_run("concat", {"a": 12.0, "b": 4.0}), _run("concat", {"a": 12.0, "b": 8.0})],
        "hint+text": [_run("hint", {"a": 16.0, "b": 27.0})],
    }
    scores = study._scores(made)
    assert scores["hint"]["seen"] == {
        "metric": "strict_match",
        "mean": 20.0,
        "deviation": 5.0,
        "seeds": [15.0, 25.0],
        # of both seeds: a 15 against 12, b 25 against 6, in whatever draw
        "difference": 11.0,
        "interval": [3.0, 19.0],
    }
    lines = [line.split() for line in study.table(scores).splitlines()]
    assert lines == [
        ["seen:", "strict_match", "less", "concat"],
        ["hint", "20.0", "±5.0", "+11.0", "[+3.0,", "+19.0]"],
        ["none", "2.5", "-6.5", "[-12.0,", "-1.0]"],
        ["concat", "9.0", "±1.0"],
        ["hint+text", "21.5", "+12.5", "[+4.0,", "+21.0]"],
        # to a 15, b 25 of the one without
        ["hint+text,", "seen:", "+1.5", "[+1.0,", "+2.0]", "to", "hint"],
    ]
    assert (scores["hint+text"]["seen"]["gain"], "gain" in scores["hint"]["seen"]) == (1.5, False)


def test_its_plot_needs_the_one_that_all_are_compared_with(tmp_path: Path) -> None:
    made = {name: [_run(name, {"a": 1.0, "b": 2.0})] for name in ("none", "concat")}
    found = {"synthetic": study._scores(made)}
    plot = study._plot(found, tmp_path / "study.png")
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    del found["synthetic"]["concat"]
    assert study._plot(found, tmp_path / "none.png") is None


def test_arms() -> None:
    assert set(study.DEFAULT) - {"start"} == {n for n in SYSTEMS if not n.startswith("task_")}
    assert [arm for arm in study.DEFAULT if not study._trains(arm)] == ["start", "cached", "none"]
    assert {"hyper_lora+text", "hint+text"} <= set(study.HYPERPRETRAINED)
    assert not {"concat+text", "none+text", "task_lora+text"} & set(study.HYPERPRETRAINED)


@pytest.mark.slow
def test_all_of_it_in_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.py"
    file.write_text(runs.QUICKSTART)
    out, backbone = tmp_path / "out", quickstart.shipped_backbone()
    argv = [f"--out={out}", f"--config={file}", f"--backbone={backbone}", "--judge", "synthetic"]
    argv += ["--seeds", "0", "1", "--systems", "start", "shared_lora", "none", "--gin.eval.batch=1"]
    assert study.command(argv) == 0
    made = json.loads((out / "study.json").read_text())
    found = made["quality"]["synthetic"]
    assert {arm: len(splits) for arm, splits in found.items()} == dict.fromkeys(
        ("start", "shared_lora", "none"), len(synthetic.HELD_OUT)
    )
    counts = {arm: len(splits[synthetic.HELD_OUT[0]]["seeds"]) for arm, splits in found.items()}
    assert counts == {"start": 1, "shared_lora": 2, "none": 1}
    # The text in front of the shipped backbone is right, nothing in front of it is not.
    start, none = (found[arm][synthetic.HELD_OUT[0]]["mean"] for arm in ("start", "none"))
    assert start > 90 > 10 > none
    assert not (out / "study.png").exists()  # there is no concat to compare with
    page = (out / "report_synthetic" / "report.html").read_text()
    assert "Gap to the text in front of every input" in page
    config = json.loads((out / "seed1" / "shared_lora" / "config.json").read_text())
    assert (config["seed"], config["eval"]["batch"]) == (1, 1)
    # A second call makes nothing again.
    monkeypatch.setattr(quickstart, "train_config", None)
    monkeypatch.setattr(evaluate, "evaluate_workdir", None)
    assert study.command(argv) == 0
    assert json.loads((out / "study.json").read_text()) == made


@pytest.mark.slow
def test_one_that_reads_text_before(tmp_path: Path) -> None:
    (file := tmp_path / "config.py").write_text(runs.QUICKSTART)
    out, backbone = tmp_path / "out", quickstart.shipped_backbone()
    argv = [f"--out={out}", f"--config={file}", f"--backbone={backbone}", "--judge", "synthetic"]
    argv += ["--systems", "hyper_prefix+text", "--text_steps", "1", "--gin.eval.batch=1"]
    assert study.command(argv) == 0
    made = json.loads((out / "study.json").read_text())
    assert list(made["quality"]["synthetic"]) == ["hyper_prefix+text"]
    first, second = (
        json.loads((out / "seed0" / name / "config.json").read_text())
        for name in ("hyper_prefix_hyperpretrain", "hyper_prefix+text")
    )
    assert (first["stage"], first["train"]["steps"]) == ("hyperpretrain", 1)
    assert (second["stage"], second["train"]["steps"]) == ("mtf", 2)
    assert second["hypermodel"]["path"] == str(out / "seed0" / "hyper_prefix_hyperpretrain")


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert study.command([*argv, "--systems", "himt"]) == 2
    assert "the nearest is 'hint'" in capsys.readouterr().err
    assert study.command([*argv, "--gin.trian.steps=3"]) == 2
    assert "trian.steps" in capsys.readouterr().err
