"""The main job of launch/local_run.sh, whole, with two steps a stage: everything that it leaves."""

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
import runs

from hyper_t5 import adapters, checkpoint, cli, export, quickstart, weights
from hyper_t5 import config as config_lib
from hyper_t5.tasks import synthetic

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
    """The folder, what main returned, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = runs.quickstart_steps(folder, patch)
    return folder, results, printed.getvalue().splitlines()


def test_numbers_of_every_arm(done: Any) -> None:
    folder, results, _ = done
    assert json.loads((folder / "results.json").read_text()) == results
    assert results["seeds"] == [0]
    assert tuple(results["arms"]) == tuple(quickstart.ARMS)
    suite = synthetic.suite()
    for name, (argument, _) in quickstart.ARMS.items():
        system, arm = argument.removeprefix("system="), results["arms"][name]
        [file] = (folder / "seed0" / system / "eval").glob("*/metrics.json")
        report = json.loads(file.read_text())
        assert report["system"] == system
        assert tuple(report["splits"]) == tuple(arm["scores"]) == synthetic.HELD_OUT
        assert arm["trained_parameters"] == report["trained_parameters"]
        for split, told in report["splits"].items():
            assert arm["scores"][split] == [told["overall"][quickstart.METRIC]]
            assert told["tasks"] == len(suite[split])
    counts = {name: arm["trained_parameters"] for name, arm in results["arms"].items()}
    assert counts["no adapter"] == 0
    assert min(count for name, count in counts.items() if name != "no adapter") > 0
    # The shipped backbone can do these tasks when it reads the text, and only then.
    for split in synthetic.HELD_OUT:
        scores = {name: arm["scores"][split][0] for name, arm in results["arms"].items()}
        assert scores["text concatenated"] > 60
        assert scores["no adapter"] < 30


def test_stages_hand_over_and_baselines_share_the_backbone(done: Any) -> None:
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
    asked = [instance["input"] for instance in task["Instances"][:5]]
    assert [row["input"] for row in rows] == asked
    assert all(row["output"] for row in rows)
    loaded, meta = adapters.load(folder / "adapter")
    assert loaded.spec.prefix is not None
    assert meta["instruction"] == task["Definition"][0]
    told = printed.index(f"== {name}: {task['Definition'][0]}")
    for line, row, instance in zip(printed[told + 1 :], rows, task["Instances"], strict=False):
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
    assert weights.digest(ours) == weights.digest(theirs)
    assert (folder / "backbone_hf" / "spiece.model").is_file()


def test_it_ends_with_the_table_and_where_things_are(done: Any) -> None:
    folder, results, printed = done
    table = quickstart.summary(results).splitlines()
    start = printed.index(table[0])
    assert printed[start : start + len(table)] == table
    assert printed[start + len(table) :] == [
        "",
        f"plot: {folder / 'results.png'}",
        f"numbers: {folder / 'results.json'}",
        f"adapter: {folder / 'adapter'}",
        f"PEFT adapter: {folder / 'adapter_peft'}",
        f"its backbone in Hugging Face's layout: {folder / 'backbone_hf'}",
    ]
    assert np.asarray(matplotlib.image.imread(folder / "results.png")).std() > 0.05


def test_summary_has_means_spread_and_share_of_concat() -> None:
    first, second = synthetic.HELD_OUT
    arms = {
        "HyperT5-LoRA": {
            "trained_parameters": 1_234_567,
            "scores": {first: [40.0, 60.0], second: [0.0, 0.0]},
        },
        "text concatenated": {
            "trained_parameters": 700_000,
            "scores": {first: [80.0, 80.0], second: [100.0, 90.0]},
        },
    }
    head, lora, concat = quickstart.summary({"arms": arms}).splitlines()
    assert head.split("  ")[0] == "exact match, %"
    assert [name in head for name in ("unseen compositions", "unseen wordings")] == [True, True]
    assert lora.split() == [
        "HyperT5-LoRA",
        "1,234,567",
        "50.0",
        "±10.0",
        "62%",
        "0.0",
        "±0.0",
        "0%",
    ]
    assert concat.split()[2:] == ["700,000", "80.0", "±0.0", "100%", "95.0", "±5.0", "100%"]
    assert len(head) == len(lora) == len(concat)
    alone = {name: {**arm, "scores": {first: [40.0]}} for name, arm in arms.items()}
    assert "±" not in quickstart.summary({"arms": alone})


@pytest.mark.slow
def test_a_second_start_trains_nothing_again(
    done: Any, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results, _ = done
    checkpoints = sorted(folder.rglob("COMMITTED.json"))
    before = [path.stat().st_mtime_ns for path in checkpoints]
    again = runs.quickstart_steps(folder, patch)
    assert {**again, "minutes": 0} == {**results, "minutes": 0}
    assert sorted(folder.rglob("COMMITTED.json")) == checkpoints
    assert [path.stat().st_mtime_ns for path in checkpoints] == before


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["quickstart", f"--out={tmp_path / 'out'}", f"--backbone={tmp_path / 'no'}"]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'no'}: does not exist" in err
    assert err.count("\n") == 1
