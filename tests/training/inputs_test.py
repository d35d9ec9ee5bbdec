"""Inputs of a run: task files, stores, and checkpoints of other runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli, weights
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.training import loop
from tests.support import tiny_runs

TASK = f"tasks/{tiny_runs.TASKS[1]}.json"
TRAIN = "splits/default/train_tasks.txt"
BAD_DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no definition": (
        lambda d: tiny_runs.edit_json(d / TASK, lambda c: c.pop("Definition")),
        f"{TASK}: field Definition is missing",
    ),
    "no output": (
        lambda d: tiny_runs.edit_json(d / TASK, lambda c: c["Instances"][3].pop("output")),
        f"{TASK}, line 42: Instances[3] lacks field output",
    ),
    "truncated": (
        lambda d: os.truncate(d / TASK, 200),
        f"{TASK}, line 15: not valid JSON",
    ),
    "empty split": (
        lambda d: (d / TRAIN).write_text("\n"),
        f"{TRAIN}: the list is empty",
    ),
    "missing task": (
        lambda d: (d / TASK).unlink(),
        f"{TRAIN}: names {tiny_runs.TASKS[1]}, but",
    ),
    "too long": (
        lambda d: tiny_runs.edit_json(
            d / TASK, lambda c: c.update(Definition="much too long " * 50)
        ),
        f"{tiny_runs.TASKS[1]}: the instruction alone is",
    ),
}


@pytest.mark.parametrize(("corrupt", "expected"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_is_refused_in_one_line_and_can_be_fixed(
    make_config: Any,
    sni: Path,
    tmp_path: Path,
    corrupt: Callable[[Path], Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad, run = tmp_path / "sni", tmp_path / "run"
    shutil.copytree(sni, bad)
    corrupt(bad)
    assert expected in tiny_runs.fails(
        capsys, *tiny_runs.command(make_config(data__sni_dir=str(bad)), run)
    )
    assert not list(run.glob("checkpoints/*"))
    # The remedy that the messages name, in the same workdir.
    monkeypatch.setattr(loop, "train", lambda *args, **flags: {})
    fixed = make_config(data__sni_dir=str(bad), data__on_long_instruction="truncate")
    assert cli.main(tiny_runs.command(fixed, run)) == 0


def test_long_instructions_can_be_truncated(make_config: Any, sni: Path, tmp_path: Path) -> None:
    long = tmp_path / "sni"
    shutil.copytree(sni, long)
    for name in tiny_runs.TASKS:
        file = long / "tasks" / f"{name}.json"
        tiny_runs.edit_json(file, lambda c: c.update(Definition="much too long " * 50))
    config = make_config(
        data__sni_dir=str(long), data__on_long_instruction="truncate", train__steps=1
    )
    tiny_runs.run(config, tmp_path / "run")
    assert tiny_runs.lines(tmp_path / "run")[-1]["data/truncated_conditionings"] >= 2


def test_a_packed_run_from_a_store(
    make_config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Build, train from what was built without the source, and refuse what was altered."""
    config = make_config(
        data__pack=True, train__steps=2, train__save_every=2, data__input_length=32
    )
    gin = f"--gin.data.sni_dir={config.data.sni_dir}"
    more = ["--gin.data.vocab=bytes", "--gin.data.max_instances_per_task=0"]
    out = tmp_path / "built"
    assert cli.main(["build", "--mixture=sni", f"--out={out}", "--shards=2", gin, *more]) == 0
    store = out / "hyper_t5" / "sni" / "1.0.0"
    assert str(store) in capsys.readouterr().out
    config.data.store, config.data.sni_dir = str(store), ""
    tiny_runs.run(config, tmp_path / "run")
    metrics_line = tiny_runs.lines(tmp_path / "run")[-1]
    assert metrics_line["data/examples"] > 2 * metrics_line["data/rows"]
    shard = next(store.glob("*-train.tfrecord-00000-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    line = tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path / "again"))
    assert f"{shard.name}: altered" in line
    assert not list((tmp_path / "again").glob("checkpoints/*"))


def test_checkpoints_of_another_model_are_refused(
    make_config: Any, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_runs.untrained_run(make_config(), tmp_path / "made")
    sizes, params, _ = weights.load_backbone(backbone)
    weights.save_native(tmp_path / "bytes", sizes, params, ByteVocabulary())
    wide = tiny_runs.save_backbone(tmp_path / "wide", 0, tiny_runs.replace(emb_dim=20))
    other = tiny_runs.save_backbone(tmp_path / "other", 1)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"adapter__lora_rank": 4},
            "dec_cross.value.a of its hypermodel is (3, 16, 2), this run needs (3, 16, 4)",
        ),
        ({"adapter__lora_bias": True}, "dec_cross.value.bias of its hypermodel is missing"),
        ({"system": "shared_prefix"}, "use the same system, reader and adapter sizes"),
        ({"backbone__path": str(wide)}, "belongs to a backbone with emb_dim=16, but backbone.path"),
        ({"backbone__path": str(other)}, "a backbone of this size with other weights"),
        ({"backbone__path": str(tmp_path / "bytes")}, "belongs to the vocabulary (sentencepiece"),
        ({"hypermodel__path": str(tmp_path)}, "no usable checkpoint at"),
    ]
    for fields, expected in cases:
        config = make_config(**{"hypermodel__path": str(source)} | fields)
        assert expected in tiny_runs.fails(capsys, *tiny_runs.command(config, tmp_path / "run"))
