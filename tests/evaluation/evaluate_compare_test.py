"""Comparison of evaluations: tables, plots, intervals, paired differences."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hyper_t5.evaluation import tables
from hyper_t5.scoring import text_metrics
from hyper_t5.utils import plots
from tests.support import tiny_runs
from tests.support.evaluations import evaluate_run, report


def test_table_and_plot_of_several_reports(tmp_path: Path) -> None:
    reports = [report("none", 0, "new_words", "new_tasks"), report("concat", 62.5, "new_words")]
    assert tables.aligned(tables.metrics_table(reports)).splitlines() == [
        "system  split      tasks  exact_match  strict_match  rougeL",
        "none    new_words  3      0.0          0.0           0.0",
        "none    new_tasks  3      0.0          0.0           0.0",
        "concat  new_words  3      62.5         62.5          62.5",
    ]
    pictures = []
    low, high = (report("none", score, "new_words") for score in (10, 90))
    for number, shown in enumerate([reports, reports[:1], [low], [high]]):
        path = plots.compare(shown, tmp_path / "new" / f"{number}.png")
        pictures.append(np.asarray(matplotlib.image.imread(path)))
    assert all(picture.std() > 0.05 for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4


def test_table_of_costs() -> None:
    costs = {
        "trained_parameters": 1234567,
        "generated_parameters": 0,
        "flops": {"per_task": 0.0, "per_example": 12.34e6, "concatenated": 2.05e9},
        "seconds": {"train": None, "evaluate": 3.21},
    }
    reports = [report("none", 0, "test"), report("hyper_lora", 0, "test") | costs]
    lines = tables.aligned(tables.cost_table(reports), right=True).splitlines()
    assert lines[0].split()[:3] == ["system", "trained", "emitted"]
    assert lines[2].split() == ["none", *"-" * 7]
    numbers = ["1,234,567", "0", "2,050.0", "12.3", "0.0", "-", "3.2"]
    assert lines[3].split() == ["hyper_lora", *numbers]
    assert len({len(line) for line in lines}) == 1


def test_compare_lists_other_runs(
    run_of: Any, evaluation_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(evaluation_of("none"), run_of("none") / "eval" / "0", dirs_exist_ok=True)
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(report("from a file", 12.5, "test")))
    flags = [f"--compare={run_of('none')}", f"--compare={file}"]
    capsys.readouterr()
    metrics, _ = evaluate_run(run_of("concat"), tmp_path / "out", *flags)
    assert metrics["system"] == "concat"
    out = capsys.readouterr().out
    for start in ("concat       test", "none         test", "from a file  test   3      12.5"):
        assert f"\n{start}" in out
    costs = [line.split() for line in out.splitlines()[-9:-4]]
    assert [line[0] for line in costs[:1] + costs[2:]] == ["system", "concat", "none", "from"]
    assert costs[2][1] == f"{metrics['trained_parameters']:,}"
    assert costs[3][1:3] == ["0", "0"]
    assert costs[4][3:] == ["-"] * 7


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "metrics.json: cannot be read (No such file"),
        ('{"system": ', "metrics.json, line 1: not valid JSON"),
        ("[]", "metrics.json: must be a JSON object"),
        ('{"system": "none"}', "metrics.json: not the metrics of an evaluation"),
        ('{"system": "none", "splits": {"test": 3}}', "metrics.json: not the metrics of"),
        ('{"system": "none", "splits": {}, "flops": 3}', "metrics.json: not the metrics of"),
        (
            '{"system": "none", "splits": {}, "seconds": {"train": "long"}}',
            "metrics.json: not the metrics of",
        ),
    ],
)
def test_an_invalid_report_is_refused_before_the_work(
    run_of: Any,
    content: str | None,
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "metrics.json"
    if content is not None:
        file.write_text(content)
    out = tmp_path / "out"
    argv = ["evaluate", f"--workdir={run_of('none')}", f"--out={out}", f"--compare={file}"]
    assert expected in tiny_runs.fails(capsys, *argv)
    assert not out.exists()


def test_scores_have_intervals_and_differences_are_paired(
    run_of: Any, evaluation_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = evaluation_of("none") / "metrics.json"
    capsys.readouterr()
    metrics, _ = evaluate_run(run_of("hyper_lora"), tmp_path / "out", f"--compare={baseline}")
    split = metrics["splits"]["test"]
    for metric in text_metrics.METRICS:
        low, high = split["intervals"][metric]
        ends = [scores[metric] for scores in split["per_task"].values()]
        # Of two tasks, the interval reaches from the one to the other.
        assert [low, high] == pytest.approx([min(ends), max(ends)])
    out = capsys.readouterr().out
    low, high = split["intervals"]["rougeL"]
    assert f"{split['overall']['rougeL']:.1f} [{low:.1f}, {high:.1f}]" in out
    start = ["hyper_lora", "none", "test", "2"]
    (line,) = [line for line in out.splitlines() if line.split()[:4] == start]
    other = json.loads(baseline.read_text())["splits"]["test"]
    less = split["overall"]["rougeL"] - other["overall"]["rougeL"]
    assert re.search(rf"  {re.escape(f'{less:+.1f}')} \[[-+.\d]+, [-+.\d]+\]$", line)
