"""Runs that move, change the paths of their inputs, or are used at a chosen step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import cli, runs
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.utils.errors import UserError
from tests.support import states, tiny_runs

LORA = {"adapter__lora_targets": ("enc_self.value",), "system": "hyper_lora"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a backbone `t5`, `sni`, and a `run` at steps 2 and 3 of 3."""
    root = tmp_path_factory.mktemp("trained")
    tiny_runs.save_backbone(root / "t5")
    tiny_runs.save_sni(root / "sni")
    paths = {"backbone__path": str(root / "t5"), "data__sni_dir": str(root / "sni")}
    tiny_runs.run(tiny_runs.make_config(train__steps=3, **paths, **LORA), root / "run")
    return root


def train_argv(root: Path, **fields: Any) -> list[str]:
    """Return the command that trains in ROOT/run, with other fields than it was trained with."""
    values = {"backbone__path": str(root / "t5"), "data__sni_dir": str(root / "sni")}
    config = tiny_runs.make_config(**{"train__steps": 3, **values, **LORA, **fields})
    return tiny_runs.command(config, root / "run")


def test_fewer_steps_than_trained_change_nothing(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "a")
    run = tmp_path / "a" / "run"
    before = (run / "config.json").read_bytes()
    argv = train_argv(trained, train__steps=1)
    assert cli.main([*argv[:-1], str(run)]) == 0
    out = capsys.readouterr().out
    assert "done at step 3, so train.steps=1 changes nothing" in out
    assert "3 to 1" not in out
    assert (run / "config.json").read_bytes() == before


# ------------------------------------------------------------------------------- moved runs


@pytest.fixture
def moved(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with backbone and run whose config names them relative to itself."""
    folder = tmp_path / "old"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    config = workdir.load_config(trained / "run")
    config.backbone.path, config.data.sni_dir = "t5", "sni"
    workdir._write_config(workdir.files.as_path(folder / "run"), config)
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_run_with_relative_paths_is_used_from_elsewhere(moved: Path, tmp_path: Path) -> None:
    assert json.loads((moved / "run" / "config.json").read_text())["backbone"]["path"] == "t5"
    assert workdir.load_config(moved / "run").backbone.path == str(moved / "t5")
    assert runs.open(moved / "run").step == 3


def test_a_run_moves_together_with_its_backbone(moved: Path, tmp_path: Path) -> None:
    moved.rename(tmp_path / "new")
    config = workdir.load_config(tmp_path / "new" / "run")
    assert config.backbone.path == str(tmp_path / "new" / "t5")
    assert config.data.sni_dir == str(tmp_path / "new" / "sni")
    file = tmp_path / "new" / "run" / "config.json"
    file.write_text(file.read_text().replace('"t5"', '"edited"'))
    assert workdir.load_config(tmp_path / "new" / "run").backbone.path == "edited"


def test_a_run_takes_the_new_path_of_its_backbone(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (moved / "t5").rename(tmp_path / "bb")
    (tmp_path / "t.json").write_text('{"instruction": "copy"}')
    (tmp_path / "in.jsonl").write_text('{"input": "a b"}\n')
    adapt = ["adapt", f"--workdir={moved / 'run'}", "--task=t.json", "--out=A"]
    assert "t5: does not exist" in tiny_runs.fails(capsys, *adapt)
    assert cli.main([*adapt, "--backbone=bb", "--step=2"]) == 0
    predict = ["predict", f"--workdir={moved / 'run'}", "--task=t.json", "--backbone=bb"]
    predict += ["--input=in.jsonl", "--output=o", "--max-decode-length=2", "--batch=2"]
    assert cli.main(predict) == 0
    tiny_runs.save_backbone(tmp_path / "other", seed=1)
    assert "other weights" in tiny_runs.fails(capsys, *adapt, "--backbone=other")


def test_a_resumed_run_may_name_the_same_inputs_by_other_paths(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "a")
    root = tmp_path / "a"
    assert cli.main(train_argv(root, train__steps=4)) == 0
    assert "resume with backbone.path" in capsys.readouterr().out
    assert checkpoint.latest_step(root / "run") == 4
    tiny_runs.save_backbone(tmp_path / "other", seed=1)
    other = train_argv(root, train__steps=5, backbone__path=str(tmp_path / "other"))
    assert "other weights" in tiny_runs.fails(capsys, *other)
    tiny_runs.save_sni(tmp_path / "rows", rows=5)
    other = train_argv(root, train__steps=5, data__sni_dir=str(tmp_path / "rows"))
    assert "are not the tasks and rows that the run was trained on" in tiny_runs.fails(
        capsys, *other
    )
    other = train_argv(root, train__steps=5, hypermodel__path=str(trained / "run"))
    assert "another config (hypermodel.path" in tiny_runs.fails(capsys, *other)


# ------------------------------------------------------------------------------- a chosen step


def test_a_step_is_chosen(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newest, earlier = runs.open(trained / "run"), runs.open(trained / "run", step=2)
    assert (newest.step, earlier.step) == (3, 2)
    assert newest.checkpoint_digest != earlier.checkpoint_digest
    params = checkpoint.load_subtree(trained / "run" / "checkpoints" / "2", "params/hypermodel")[0]
    states.assert_same(earlier.params["hypermodel"], params)
    with pytest.raises(UserError, match="has no checkpoint of step 1; it has 2, 3"):
        runs.open(trained / "run", step=1)
    step = str(trained / "run" / "checkpoints" / "2")
    with pytest.raises(UserError, match="exported no backbone"):
        runs.backbone_folder(step)
    config = tiny_runs.make_config(
        backbone__path=str(trained / "t5"), hypermodel__path=step, **LORA
    )
    states.assert_same(runs.init_run(config)[2]["hypermodel"], params)


def test_a_step_of_a_run_that_trains_its_backbone_is_a_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_runs.save_backbone(tmp_path / "t5")
    config = tiny_runs.make_config(system="concat", backbone__path=str(tmp_path / "t5"))
    run = tiny_runs.untrained_run(config, tmp_path / "run")
    params = runs.open(run, step=1).params["backbone"]
    for path in (run, run / "checkpoints" / "1"):
        backbone = runs.load_backbone(path, config)
        states.assert_same(backbone.params, params)
        assert backbone.vocab.identity() == tiny_runs.vocabulary().identity()
    assert len(list((tmp_path / "cache" / "hyper_t5" / "backbones").iterdir())) == 1


def test_an_evaluation_that_cannot_write_names_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "eval").touch()
    error = tiny_runs.fails(capsys, "evaluate", f"--workdir={tmp_path / 'run'}")
    assert "cannot write" in error
    assert "pass another folder by --out" in error
