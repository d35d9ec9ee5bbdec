"""Real files of the three benchmarks, cut off at random places: told in one line, or counted."""

from __future__ import annotations

import contextlib
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
from hyper_t5 import data
from hyper_t5.errors import UserError
from hyper_t5.vocab import ByteVocabulary

CUTS = 12  # of each file


def sni(source: Path, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    """A folder with one task, and the config fields that read it."""
    names = (source / "splits" / "default" / "train_tasks_available.txt").read_text().split()
    name = str(rng.choice(names))
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    (folder / "splits" / "default" / "train_tasks.txt").write_text(name)
    file = folder / "tasks" / f"{name}.json"
    shutil.copy(source / "tasks" / file.name, file)
    return file, {"sni_dir": str(folder)}


def p3(source: Path, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    tasks = sorted((source / "data").glob("ag_news_*")) + sorted((source / "data").glob("xsum_*"))
    task = tasks[rng.integers(len(tasks))]
    shutil.copytree(task, folder / task.name)
    [file] = (folder / task.name).glob("*.tfrecord-*")
    return file, {"p3_dir": str(folder), "variant": "pos_2"}


def metaicl(source: Path, folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any]]:
    files = sorted((source / "data").glob("*/*_16384_100_train.jsonl"))
    real = files[rng.integers(len(files))]
    task = real.parent.name
    (folder / "config" / "tasks").mkdir(parents=True)
    (folder / "config" / "one.json").write_text(json.dumps({"train": [task], "test": [task]}))
    shutil.copy(source / "config" / "tasks" / f"{task}.json", folder / "config" / "tasks")
    file = folder / "data" / task / real.name
    file.parent.mkdir(parents=True)
    shutil.copy(real, file)
    return file, {
        "metaicl_dir": str(folder),
        "metaicl_setting": "one",
        "variant": "pos_2",
    }


MAKERS: dict[str, Callable[..., tuple[Path, dict[str, Any]]]] = {
    "sni": sni,
    "p3": p3,
    "metaicl": metaicl,
}


@pytest.mark.parametrize("mixture", MAKERS)
def test_a_real_file_cut_off_anywhere(mixture: str, real_data: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    told = 0
    for number in range(3):
        folder = tmp_path / f"{number}"
        file, fields = MAKERS[mixture](real_data(mixture), folder, rng)
        whole = file.read_bytes()
        config = config_lib.defaults().data
        config.update(fields, empty_targets="keep", cache_dir=str(tmp_path / "cache"))

        def read(config: Any = config) -> int:
            [task] = data.load_tasks(mixture, config, "train", ByteVocabulary())
            return len(task.rows)

        rows = read()
        assert rows > 10
        for at in rng.integers(0, len(whole), CUTS):
            # Elsewhere, for a task that was read stays as it was under its name.
            cut = tmp_path / f"{number}_{at}"
            shutil.copytree(folder, cut)
            part = cut / file.relative_to(folder)
            part.write_bytes(whole[:at])
            config.update({k: str(cut) for k in fields if k.endswith("_dir")})
            config.on_bad_row = "raise"
            with pytest.raises(UserError) as error:
                read()
            assert len(str(error.value).splitlines()) == 1
            assert part.name in str(error.value) or part.parent.name in str(error.value)
            told += 1
            config.on_bad_row = "skip"
            with contextlib.suppress(UserError):  # nothing whole is left
                [task] = data.load_tasks(mixture, config, "train", ByteVocabulary())
                assert len(task.rows) <= rows
                if mixture == "p3":  # what stats.json tells of, and the file has no more
                    assert len(task.rows) + sum(task.skipped.values()) == rows
                elif mixture == "metaicl":
                    assert sum(task.skipped.values()) <= 1, "all lines but the last are whole"
    assert told == 3 * CUTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixture", "tasks", "folder"),
    [("sni_train", 691, "sni"), ("t0_train", 289, "p3"), ("metaicl_hr_to_lr_train", 59, "metaicl")],
)
def test_hundreds_of_tasks_start_at_once(
    mixture: str, tasks: int, folder: str, real_data: Any, shared_dir: Path, tmp_path: Path
) -> None:
    """By the command that shows a mixture: under 60 s on two cores, and 4 GB, imports included."""
    vocab = shared_dir / "data" / "tokenizer" / "spiece.model"
    argv = [
        f"--mixture={mixture}",
        f"--out={tmp_path}",
        "--steps=3",
        "--gin.data.tasks_per_batch=8",
    ]
    argv += [f"--gin.data.{folder}_dir={real_data(folder)}", f"--gin.data.vocab={vocab}"]
    argv += [f"--gin.data.cache_dir={tmp_path}", "--gin.data.on_missing_task=skip"]
    command = [sys.executable, "-m", "hyper_t5", "data", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["tasks"] == tasks
    assert sum(report["speed"]["start_up_seconds"].values()) < 60
    assert report["speed"]["peak_rss_mb"] < 4096
