"""Quickstart, the main job of launch/local_run.sh, with two steps per stage."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hyper_t5 import cli, export, model, weights
from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import checkpoint
from hyper_t5.checkpoints import workdir as workdir_lib
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.tasks import synthetic
from hyper_t5.tools import quickstart
from hyper_t5.utils import plots
from hyper_t5.weights import param_names
from tests.support import tiny_runs

TRAINED = ("shared_prefix", "shared_lora", "hyper_lora", "hyper_prefix")
FIRST = ("hyper_lora_hyperpretrain", "hyper_prefix_hyperpretrain")


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory, patch: pytest.MonkeyPatch
) -> tuple[Path, dict[str, Any], list[str]]:
    """Run the quickstart; return its folder, the results of main and the printed lines."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = tiny_runs.quickstart_steps(folder, patch)
    return folder, results, printed.getvalue().splitlines()


def test_numbers_of_every_arm(done: Any) -> None:
    folder, results, _ = done
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["seeds"] == [0]
    names = ["no adapter", "shared prefix", "shared LoRA", "HyperT5-LoRA", "HyperT5-Prefix"]
    assert list(results["arms"]) == [*names, "text concatenated"]
    suite = synthetic.suite()
    for system, arm in zip(quickstart._choose(()), results["arms"].values(), strict=True):
        [file] = (folder / "seed0" / system / "eval").glob("*/metrics.json")
        report = json.loads(file.read_text())
        assert report["system"] == arm["system"] == system
        for field in ("generated_parameters", "flops"):
            assert arm[field] == report[field]
        before = workdir_lib.training_seconds(folder / "seed0" / f"{system}_hyperpretrain")
        assert (before is not None) == (system in ("hyper_lora", "hyper_prefix"))
        own = report["seconds"]["train"]
        assert (own is None) == (system in ("none", "concat"))
        assert arm["seconds"]["train"] == [own if own is None else own + (before or 0)]
        assert arm["seconds"]["evaluate"] == [report["seconds"]["evaluate"]]
        assert tuple(report["splits"]) == tuple(arm["scores"]) == synthetic.HELD_OUT
        assert arm["trained_parameters"] == report["trained_parameters"]
        for split, content in report["splits"].items():
            assert arm["scores"][split] == [content["overall"][quickstart.METRIC]]
            assert content["tasks"] == len(suite[split])
    counts = {name: arm["trained_parameters"] for name, arm in results["arms"].items()}
    assert counts["no adapter"] == 0
    assert min(count for name, count in counts.items() if name != "no adapter") > 0
    # The shipped backbone solves these tasks only when it reads the text.
    for split in synthetic.HELD_OUT:
        scores = {name: arm["scores"][split][0] for name, arm in results["arms"].items()}
        assert scores["text concatenated"] > 60
        assert scores["no adapter"] < 30


def test_stages_follow_each_other_and_share_the_backbone(done: Any) -> None:
    seed = done[0] / "seed0"
    assert {path.name for path in seed.iterdir()} == {*TRAINED, *FIRST, "none", "concat"}
    for name in (*TRAINED, *FIRST):
        assert checkpoint.latest_step(seed / name) == 2
    for run in seed.iterdir():
        config = config_lib.from_json((run / "config.json").read_text(), str(run))
        assert config.backbone.path == str(quickstart.shipped_backbone())
        second = run.name in ("hyper_lora", "hyper_prefix")
        assert config.hypermodel.path == (f"{run}_hyperpretrain" if second else "")
        assert config.stage == ("hyperpretrain" if run.name in FIRST else "mtf")


def test_a_task_to_an_adapter_to_outputs(done: Any) -> None:
    folder, _, printed = done
    name, task = next(iter(synthetic.suite()["unseen_compositions"].items()))
    assert json.loads((folder / "task.json").read_text()) == task
    rows = [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]
    inputs = [instance["input"] for instance in task["Instances"][:5]]
    assert [row["input"] for row in rows] == inputs
    assert all(row["output"] for row in rows)
    loaded, meta, _ = export.native.load(folder / "adapter")
    assert loaded.spec.prefix is not None
    assert meta["instruction"] == task["Definition"][0]
    start = printed.index(f"== {name}: {task['Definition'][0]}")
    for line, row, instance in zip(printed[start + 1 :], rows, task["Instances"], strict=False):
        expected = f"  {row['input']} -> {row['output']}  (expected {instance['output'][0]})"
        assert line == expected


def test_peft_folder_and_its_backbone(done: Any) -> None:
    folder = done[0]
    config = json.loads((folder / "adapter_peft" / export.PEFT_CONFIG).read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == str(folder / "backbone_hf")
    assert (folder / "adapter_peft" / export.PEFT_TENSORS).stat().st_size > 1000
    ours, theirs = (
        weights.load_backbone(path)[1]
        for path in (quickstart.shipped_backbone(), folder / "backbone_hf")
    )
    assert param_names.digest(ours) == param_names.digest(theirs)
    assert (folder / "backbone_hf" / "spiece.model").is_file()


def test_the_last_lines_are_the_table_and_the_paths(done: Any) -> None:
    folder, results, printed = done
    table = quickstart.summary(results).splitlines()
    start = printed.index(table[0])
    assert printed[start : start + len(table)] == table
    assert printed[start + len(table) :] == [
        "",
        f"plot: {folder / 'results.png'}",
        f"plot of costs: {folder / 'costs.png'}",
        f"numbers: {folder / 'results.json'}",
        f"report of the first seed: {folder / 'report' / 'report.html'}",
        f"adapter: {folder / 'adapter'}",
        f"PEFT adapter: {folder / 'adapter_peft'}",
        f"its backbone in Hugging Face's layout: {folder / 'backbone_hf'}",
    ]
    for plot in ("results.png", "costs.png"):
        assert np.asarray(matplotlib.image.imread(folder / plot)).std() > 0.05


def test_summary_has_means_spread_share_of_concat_and_costs() -> None:
    first, second = synthetic.HELD_OUT
    arms: dict[str, Any] = {
        "HyperT5-LoRA": {
            "trained_parameters": 1_234_567,
            "generated_parameters": 4321,
            "flops": {"per_task": 60.54e6, "per_example": 10.44e6, "concatenated": 53e6},
            "seconds": {"train": [100.0, 140.0], "evaluate": [7.2, 7.0]},
            "scores": {first: [40.0, 60.0], second: [0.0, 0.0]},
        },
        "text concatenated": {
            "trained_parameters": 700_000,
            "generated_parameters": 0,
            "flops": {"per_task": 0.0, "per_example": 53e6, "concatenated": 53e6},
            "seconds": {"train": [None, None], "evaluate": [8.0, 8.0]},
            "scores": {first: [80.0, 80.0], second: [100.0, 90.0]},
        },
    }
    head, below, lora, concat = quickstart.summary({"arms": arms}).splitlines()
    assert [head.split("  ")[0], below.split("  ")[0]] == ["exact match, %", "(of concatenated)"]
    assert [name in below for name in ("compositions", "wordings")] == [True, True]
    numbers = ["1,234,567", "4,321", "50.0", "±10.0", "(62%)", "0.0", "±0.0", "(0%)"]
    assert lora.split() == ["HyperT5-LoRA", *numbers, "53.0", "10.4", "60.5", "120", "7"]
    numbers = ["700,000", "0", "80.0", "±0.0", "(100%)", "95.0", "±5.0", "(100%)"]
    assert concat.split()[2:] == [*numbers, "53.0", "53.0", "0.0", "-", "8"]
    assert len({len(line) for line in (head, below, lora, concat)}) == 1
    alone = {name: {**arm, "scores": {first: [40.0], second: [1.0]}} for name, arm in arms.items()}
    assert "±" not in quickstart.summary({"arms": alone})
    del alone["text concatenated"]
    assert "(" not in quickstart.summary({"arms": alone})


def test_the_table_is_not_too_wide() -> None:
    scores = {split: [100.0] for split in synthetic.HELD_OUT}
    flops = dict.fromkeys(("per_task", "per_example", "concatenated"), 1e8)
    seconds = {"train": [300.0], "evaluate": [10.0]}
    arm = {"flops": flops, "seconds": seconds, "scores": scores}
    arm |= dict.fromkeys(("trained_parameters", "generated_parameters"), 9_999_999)
    table = quickstart.summary({"arms": dict.fromkeys((s.title for s in SYSTEMS.values()), arm)})
    assert len(table.splitlines()[0]) <= 115


def picture_of(points: dict[str, tuple[float, float]], path: Path) -> bytes:
    plots.quality_by_cost(points, path)
    return path.read_bytes()


def test_points_of_quality_and_cost(tmp_path: Path) -> None:
    first, second = synthetic.HELD_OUT
    flops = {"per_task": 3e6, "per_example": 10e6, "concatenated": 99e6}
    arms = {"HINT": {"flops": flops, "scores": {first: [40.0, 60.0], second: [1.0, 2.0]}}}
    assert quickstart._points(arms) == {"HINT": (10.0, 50.0)}
    points = {"a": (10.0, 0.0), "b": (11.0, 0.0), "c": (10.5, 99.0), "d": (60.0, 99.0)}
    pictures = {
        picture_of(shown, tmp_path / "costs.png")
        for shown in (points, points | {"d": (60.0, 50.0)}, points | {"e": (12.0, 0.0)})
    }
    named = {name.upper(): point for name, point in points.items()}
    pictures.add(picture_of(named, tmp_path / "costs.png"))
    assert len(pictures) == 4


# ------------------------------------------------------------------------------------- systems


@pytest.mark.parametrize("system", SYSTEMS)
def test_settings_of_every_system(system: str) -> None:
    config = config_lib.load(f"configs/quickstart.py:system={system}", ["backbone.path=somewhere"])
    config_lib.validate(config)
    m = model.build_model(config, config_lib.t5_config(config))
    assert config.stage == ("peft" if m.task_slots else "mtf")


@pytest.mark.slow
def test_selected_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.py").write_text(tiny_runs.QUICKSTART)
    monkeypatch.setattr(quickstart, "CONFIG", str(tmp_path / "config.py"))
    chosen, out = ("cached", "hyperdecoder", "task_lora"), tmp_path / "out"
    assert cli.main(["quickstart", f"--out={out}", "--systems", *chosen, "cached"]) == 0
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert [arm["system"] for arm in arms.values()] == list(chosen)
    assert list(arms) == ["cached conditioning", "Hyperdecoder", "LoRA per task"]
    assert {path.name for path in (out / "seed0").iterdir()} == set(chosen)
    assert [checkpoint.latest_step(out / "seed0" / name) for name in chosen] == [None, 2, 2]
    tasks = checkpoint.read_meta(out / "seed0" / "task_lora")["tasks"]
    assert len(tasks) == sum(len(synthetic.suite()[split]) for split in synthetic.HELD_OUT)
    # The frozen backbone reads the text in its input; the adapters are close to zero.
    assert min(split[0] for split in arms["Hyperdecoder"]["scores"].values()) > 60
    assert not (out / "adapter").exists()


def test_all_selects_every_system() -> None:
    assert quickstart._choose(["hint", "all"]) == list(SYSTEMS)
    assert quickstart._choose(["hint", "concat", "hint"]) == ["hint", "concat"]
    assert len({system.title for system in SYSTEMS.values()}) == len(SYSTEMS)


@pytest.mark.slow
def test_a_second_start_trains_nothing_again(
    done: Any, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results, _ = done
    checkpoints = sorted(folder.rglob("COMMITTED.json"))
    before = [path.stat().st_mtime_ns for path in checkpoints]
    again = tiny_runs.quickstart_steps(folder, patch)
    for arm in (*again["arms"].values(), *results["arms"].values()):
        del arm["seconds"]["evaluate"]
    assert {**again, "minutes": 0} == {**results, "minutes": 0}
    assert sorted(folder.rglob("COMMITTED.json")) == checkpoints
    assert [path.stat().st_mtime_ns for path in checkpoints] == before


def test_invalid_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quickstart", f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'no'}: does not exist" in err
    assert err.count("\n") == 1
    assert "unknown --systems 'hnt', the nearest is 'hint'; known: all, none" in tiny_runs.fails(
        capsys, "quickstart", f"--out={tmp_path / 'out'}", "--systems", "none", "hnt"
    )
