"""A dataset outside the package: the module of docs/data.md, through every command."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli
from hyper_t5.tasks import MIXTURES
from tests.support import tiny_runs

LABELS = ["a b", "z"]


def review_file(name: str) -> dict[str, Any]:
    rows = [{"text": f"{x} {x} c", "label": LABELS[i % 2]} for i, x in enumerate("defghijk")]
    instruction = f"{name} the letters."
    return {"instruction": instruction, "labels": LABELS, "rows": rows[2:], "examples": rows[:2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a backbone, the files in reviews/, and the module reviews.py."""
    folder = tmp_path_factory.mktemp("outside")
    docs = Path(__file__).resolve().parents[2] / "docs" / "data.md"
    section = docs.read_text().split("## Your own dataset")[1]
    (folder / "reviews.py").write_text(section.split("```python\n")[1].split("```")[0])
    for split, names in {"train": ("copy", "swap"), "test": ("first", "last")}.items():
        (folder / "reviews" / split).mkdir(parents=True)
        for name in names:
            content = json.dumps(review_file(name))
            (folder / "reviews" / split / f"{name}.json").write_text(content)
    tiny_runs.save_backbone(folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def registered(folder: Path) -> Iterator[None]:
    """Import the module, as a program that starts with it does; unregister the dataset after."""
    spec = importlib.util.spec_from_file_location("reviews", folder / "reviews.py")
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    del MIXTURES["reviews"]


@pytest.fixture(scope="module")
def run(folder: Path, registered: None) -> Path:
    """Train on the dataset; return the workdir."""
    config = tiny_runs.make_config(
        data__mixture="reviews",
        data__reviews_dir=str(folder / "reviews"),
        backbone__path=str(folder / "backbone"),
    )
    assert cli.main(tiny_runs.command(config, folder / "run")) in (0, None)
    return folder / "run"


def evaluate(run: Path, out: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    assert cli.main(["evaluate", "--workdir", str(run), "--out", str(out), *flags]) in (0, None)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [json.loads(line) for line in lines]


def test_evaluation_from_files_and_from_a_store(run: Path, tmp_path: Path) -> None:
    metrics, predictions = evaluate(run, tmp_path / "files")
    assert {row["task"] for row in predictions} == {"first", "last"}
    assert all(row["options"] == LABELS for row in predictions)
    assert {row["prediction"] for row in predictions} <= set(LABELS)
    correct = [row["prediction"][0] == row["references"][0][0] for row in predictions]
    split = metrics["splits"]["test"]
    assert split["overall"]["initial"] == pytest.approx(100 * sum(correct) / len(correct))
    assert "initial" in split["intervals"]

    build = ["build", "--mixture", "reviews", "--out", str(tmp_path), "--shards", "2"]
    assert cli.main([*build, f"--gin.data.reviews_dir={run.parent / 'reviews'}"]) in (0, None)
    store = tmp_path / "hyper_t5" / "reviews" / "1.0.0"
    # The store replaces the folder.
    fields = (f"--gin.data.store={store}", "--gin.data.reviews_dir=")
    assert evaluate(run, tmp_path / "store", *fields)[1] == predictions


def test_adapt_and_predict(run: Path, tmp_path: Path) -> None:
    task, rows = tmp_path / "task.json", tmp_path / "rows.jsonl"
    task.write_text(json.dumps({"instruction": "first the letters.", "examples": []}))
    rows.write_text('{"input": "d d c"}\n')
    adapter, output = tmp_path / "adapter", tmp_path / "out.jsonl"
    argv = ["--workdir", str(run), "--task", str(task), "--out", str(adapter)]
    assert cli.main(["adapt", *argv]) in (0, None)
    argv = ["--backbone", str(run.parent / "backbone"), "--adapter", str(adapter)]
    argv += ["--input", str(rows), "--output", str(output)]
    assert cli.main(["predict", *argv]) in (0, None)
    assert len(output.read_text().splitlines()) == 1


@pytest.mark.slow
def test_the_module_is_a_command(folder: Path, tmp_path: Path, repo_root: Path) -> None:
    argv = ["data", "--mixture", "reviews_test", "--steps", "2", "--out", str(tmp_path)]
    fields = f"data.reviews_dir = '{folder / 'reviews'}'\ndata.vocab = 'bytes'\n"
    (tmp_path / "reviews.gin").write_text(fields)
    command = [sys.executable, str(folder / "reviews.py"), *argv]
    command += ["--gin_file", str(tmp_path / "reviews.gin")]
    environment = os.environ | {"PYTHONPATH": str(repo_root)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    assert [task["name"] for task in report["by_task"]] == ["first", "last"]
    assert report["compared_with"] == ["train"]
