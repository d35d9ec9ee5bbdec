"""Official files of the benchmarks, truncated at random places, and start-up with all of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline
from hyper_t5.data.vocab import ByteVocabulary
from tests.support.toy_tasks import result_or_error

CUTS = 12  # of each file

# (source, folder, rng) -> a file of one task copied to the folder, and the fields that read it.
CopyTask = Callable[[Path, Path, np.random.Generator], tuple[Path, dict[str, Any]]]


def copy_sni(source: Path, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    names = (source / "splits" / "default" / "train_tasks_available.txt").read_text().split()
    name = str(rng.choice(names))
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "train_tasks.txt").write_text(name)
    file = folder / "tasks" / f"{name}.json"
    shutil.copy(source / "tasks" / file.name, file)
    return file, {"sni_dir": str(folder)}


def copy_p3(source: Path, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    tasks = sorted((source / "data").glob("ag_news_*")) + sorted((source / "data").glob("xsum_*"))
    task = tasks[rng.integers(len(tasks))]
    shutil.copytree(task, folder / task.name)
    [file] = (folder / task.name).glob("*.tfrecord-*")
    return file, {"p3_dir": str(folder), "variant": "pos_2"}


def copy_metaicl(
    source: Path, folder: Path, rng: np.random.Generator
) -> tuple[Path, dict[str, Any]]:
    files = sorted((source / "data").glob("*/*_16384_100_train.jsonl"))
    official = files[rng.integers(len(files))]
    task = official.parent.name
    (folder / "config" / "tasks").mkdir(parents=True)
    (folder / "config" / "one.json").write_text(json.dumps({"train": [task], "test": [task]}))
    shutil.copy(source / "config" / "tasks" / f"{task}.json", folder / "config" / "tasks")
    file = folder / "data" / task / official.name
    file.parent.mkdir(parents=True)
    shutil.copy(official, file)
    return file, {"metaicl_dir": str(folder), "metaicl_setting": "one", "variant": "pos_2"}


@pytest.mark.parametrize(
    ("mixture", "copy_task"), [("sni", copy_sni), ("p3", copy_p3), ("metaicl", copy_metaicl)]
)
def test_a_truncated_file_is_refused_or_its_rows_counted(
    mixture: str, copy_task: CopyTask, real_data: Any, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number in range(3):
        folder = tmp_path / f"{number}"
        file, fields = copy_task(real_data(mixture), folder, rng)
        whole = file.read_bytes()
        config = config_lib.defaults().data
        config.update(fields, empty_targets="keep", cache_dir=str(tmp_path / "cache"))

        def load(config: Any = config) -> Any:
            [task] = pipeline.load_tasks(mixture, config, "train", ByteVocabulary())
            return task

        rows = len(load().rows)
        assert rows > 10
        for at in rng.integers(0, len(whole), CUTS):
            # In another folder, because a registered task is not read again.
            copy = tmp_path / f"{number}_{at}"
            shutil.copytree(folder, copy)
            truncated = copy / file.relative_to(folder)
            truncated.write_bytes(whole[:at])
            config.update({name: str(copy) for name in fields if name.endswith("_dir")})
            config.on_bad_row = "raise"
            _, message = result_or_error(load)
            assert truncated.name in message or truncated.parent.name in message
            config.on_bad_row = "skip"
            task, message = result_or_error(load)
            if task is not None:
                lost = sum(task.skipped.values())
                assert len(task.rows) <= rows
                if mixture == "p3":  # stats.json has the number of records
                    assert len(task.rows) + lost == rows
                elif mixture == "metaicl":  # only the last line is incomplete
                    assert lost <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixture", "tasks", "folder"),
    [("sni_train", 691, "sni"), ("t0_train", 289, "p3"), ("metaicl_hr_to_lr_train", 59, "metaicl")],
)
def test_hundreds_of_tasks_start_within_a_minute(
    mixture: str, tasks: int, folder: str, real_data: Any, shared_dir: Path, tmp_path: Path
) -> None:
    """On two cores, in less than 4 GB; imports, which no dataset changes, are not counted."""
    vocab = shared_dir / "data" / "tokenizer" / "spiece.model"
    argv = [f"--mixture={mixture}", f"--out={tmp_path}", "--steps=3"]
    argv += ["--gin.data.tasks_per_batch=8", "--gin.data.on_missing_task=skip"]
    argv += [f"--gin.data.{folder}_dir={real_data(folder)}", f"--gin.data.vocab={vocab}"]
    argv += [f"--gin.data.cache_dir={tmp_path}"]
    command = [sys.executable, "-m", "hyper_t5", "data", *argv]
    process = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["tasks"] == tasks
    seconds = report["speed"]["start_up_seconds"]
    assert seconds["read"] + seconds["sampler"] < 60
    assert report["speed"]["peak_rss_mb"] < 4096
