"""Mixture 'task_files': a user's own task files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from hyper_t5 import pipeline
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import BYTES, make_config, sni_object


def files_config(files: Path | str, **fields: Any) -> ConfigDict:
    return make_config(mixture="task_files", task_files=str(files), **fields)


def test_every_split_has_all_files_and_rows(tmp_path: Path) -> None:
    pairs = [{"input": f"in {i}", "output": [f"out {i}", "or"]} for i in range(5)]
    short = {"instruction": " Do. ", "examples": pairs}
    (tmp_path / "b-short.json").write_text(json.dumps(short))
    (tmp_path / "a.json").write_text(json.dumps(sni_object("a", rows=3, examples=1)))
    for split in ("train", *pipeline.held_out_splits("task_files")):
        config = files_config(tmp_path)
        first, second = pipeline.load_tasks("task_files", config.data, split, BYTES)
        assert (first.name, len(first.rows), len(first.examples)) == ("a", 3, 1)
        assert (second.name, second.instruction, second.examples) == ("b-short", "Do.", ())
        assert second.rows[1].outputs == ("out 1", "or")
        assert len(second.rows) == 5
    config = files_config(tmp_path / "b-*.json")
    config.stage, config.eval.max_rows_per_task = "peft", 2
    [tuned] = pipeline.load_peft_tasks(config, BYTES)
    assert [row.input for row in tuned.rows] == ["in 2", "in 3", "in 4"]
    # A file that changed is read again.
    short["examples"] = pairs[:3]
    (tmp_path / "b-short.json").write_text(json.dumps(short))
    assert len(pipeline.load_peft_tasks(config, BYTES)[0].rows) == 1


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "one" / "task.json", tmp_path / "two" / "task.json"
    for file in (path, other):
        file.parent.mkdir()
        file.write_text(json.dumps({"instruction": "Do.", "examples": [{"input": "x"}]}))
    cases: list[tuple[Path | str, str, str]] = [
        ("", "raise", r"data\.task_files is empty"),
        (tmp_path, "raise", "no such task file"),
        (tmp_path / "*" / "task.json", "raise", "two files are named task"),
        (path, "raise", r"task\.json: examples\[0\] lacks field output"),
        (path, "skip", "field examples holds no usable row"),
    ]
    for files, on_bad_row, message in cases:
        config = files_config(files, on_bad_row=on_bad_row)
        with pytest.raises(UserError, match=message):
            pipeline.load_tasks("task_files", config.data, "test", BYTES)
