"""Evaluation: what it writes, that its numbers are those of its predictions, and each system's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import runs
from ml_collections import ConfigDict

from hyper_t5 import cli, evaluate, model, plots, workdir
from hyper_t5.decoding import decode
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.tasks import synthetic
from hyper_t5.vocab import EOS_ID

# What a system's outputs depend on besides the input.
READS_THE_TASK = {"hyper_prefix", "hyper_lora", "concat"}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_backbone(tmp_path_factory.mktemp("backbone") / "t5")


@pytest.fixture(scope="module")
def sni(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two held-out tasks, one of six rows and one of three."""
    folder = runs.save_sni(tmp_path_factory.mktemp("sni") / "official")
    edit(folder, runs.HELD_OUT[1], lambda task: task["Instances"].__delitem__(slice(3, None)))
    return folder


@pytest.fixture(scope="module")
def make(backbone: Path, sni: Path) -> Callable[..., ConfigDict]:
    def make_config(**fields: Any) -> ConfigDict:
        here = {"backbone__path": str(backbone), "data__sni_dir": str(sni)}
        return runs.make_config(**here | fields)

    return make_config


@pytest.fixture(scope="module")
def run_of(make: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A workdir of each system as if trained; `none` trains nothing."""
    root, made = tmp_path_factory.mktemp("runs"), set()

    def run(system: str) -> Path:
        folder = root / system
        if system not in made:
            config = make(system=system)
            if system == "none":
                workdir.check_resume(folder, config)
            else:
                runs.untrained_run(config, folder)
            made.add(system)
        return folder

    return run


def edit(sni: Path, task: str, change: Callable[[dict[str, Any]], Any]) -> None:
    file = sni / "tasks" / f"{task}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def judged(run: Path, out: Path, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, predictions) that the command leaves in a folder."""
    assert cli.main(["evaluate", "--workdir", str(run), "--out", str(out), *flags]) == 0
    lines = (out / "predictions.jsonl").read_text().splitlines()
    return json.loads((out / "metrics.json").read_text()), [json.loads(line) for line in lines]


def texts(predictions: list[dict[str, Any]]) -> list[str]:
    return [row["prediction"] for row in predictions]


# ------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "strict", "rouge"),
    [
        ("b a", ["b a"], 100, 100, 100),
        ("B, a!", ["b a"], 100, 0, 100),
        (" b a\n", ["b a"], 100, 100, 100),
        ("a c", ["x", "a c"], 100, 100, 100),  # the best of the references
        ("a b c", ["a c d"], 0, 0, 100 * 2 / 3),  # a and c: precision and recall are 2/3
        ("a", ["a b c"], 0, 0, 50),  # precision 1, recall 1/3
        ("c a", ["a c"], 0, 0, 50),  # the order counts
        ("running cats", ["runs cat"], 0, 0, 100),  # the stems are equal
        ("", ["a"], 0, 0, 0),
        ("", [""], 100, 100, 0),  # as rouge-score has it
    ],
)
def test_score(
    prediction: str, references: list[str], exact: float, strict: float, rouge: float
) -> None:
    found = evaluate.score(prediction, references, evaluate.rouge_scorer())
    assert found == pytest.approx({"exact_match": exact, "strict_match": strict, "rougeL": rouge})


def test_files_and_numbers(run_of: Any, sni: Path, tmp_path: Path) -> None:
    run, seen = run_of("hyper_lora"), tmp_path / "sni"
    _, before = judged(run, tmp_path / "before")
    assert len(set(texts(before))) == len(before) == 9

    # Other references, so that the same predictions are right, nearly right, or half right.
    shutil.copytree(sni, seen)
    made = dict(zip([row["id"] for row in before], texts(before), strict=True))
    first, second = runs.HELD_OUT

    def answer(task: dict[str, Any]) -> None:
        rows = task["Instances"]
        rows[0]["output"] = ["no", made[rows[0]["id"]]]
        rows[1]["output"] = [made[rows[1]["id"]].upper() + "!"]
        rows[2]["output"] = [made[rows[2]["id"]] + " word" * len(made[rows[2]["id"]].split())]

    for name in (first, second):
        edit(seen, name, answer)
    metrics, after = judged(run, tmp_path / "after", f"--gin.data.sni_dir={seen}")
    assert texts(after) == texts(before)

    keys = ["split", "task", "id", "input", "references", "prediction", *evaluate.METRICS]
    assert all(list(row) == keys for row in after)
    assert [row["task"] for row in after] == [first] * 6 + [second] * 3
    ids = [row["id"] for row in json.loads((seen / f"tasks/{first}.json").read_text())["Instances"]]
    assert [row["id"] for row in after[:6]] == ids
    for row, (exact, strict) in zip(after[:3], [(100, 100), (100, 0), (0, 0)], strict=True):
        assert (row["exact_match"], row["strict_match"]) == (exact, strict)
    assert after[0]["references"] == ["no", after[0]["prediction"]]
    assert after[2]["rougeL"] == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2

    def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {m: sum(row[m] for row in rows) / len(rows) for m in evaluate.METRICS}

    split = metrics["splits"]["test"]
    assert list(metrics["splits"]) == ["test"]
    assert (split["tasks"], split["rows"]) == (2, 9)
    assert split["overall"] == pytest.approx(mean(after))  # of rows, not of tasks
    assert split["overall"]["exact_match"] == pytest.approx(100 * 4 / 9)
    for name, rows in {first: after[:6], second: after[6:]}.items():
        told = split["per_task"][name]
        assert {m: told[m] for m in evaluate.METRICS} == pytest.approx(mean(rows))
        assert told["rows"] == len(rows)
        assert (told["category"], told["examples_shown"]) == (f"Kind of {name}", 1)
    assert (metrics["system"], metrics["workdir"]) == ("hyper_lora", str(run))


def test_results_lie_beside_the_checkpoint_they_are_of(
    run_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("hyper_lora")
    assert cli.main(["evaluate", "--workdir", str(run)]) == 0
    made = ["metrics.json", "predictions.jsonl", "report.png"]
    assert [path.name for path in sorted((run / "eval" / "1").iterdir())] == made
    out = capsys.readouterr().out
    assert "evaluate test: 2 tasks, 9 rows\n" in out
    assert out.splitlines()[-3:] == [str(run / "eval" / "1" / name) for name in made]


def test_what_did_not_fit_is_told(
    run_of: Any, sni: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "sni"
    shutil.copytree(sni, long)
    edit(long, runs.HELD_OUT[0], lambda t: t["Instances"][0].update(input="a b " * 20))
    edit(long, runs.HELD_OUT[1], lambda t: t["Positive Examples"][0].update(output="a b " * 20))
    metrics, _ = judged(run_of("none"), tmp_path / "out", f"--gin.data.sni_dir={long}")
    first, second = (metrics["splits"]["test"]["per_task"][name] for name in runs.HELD_OUT)
    assert (first["inputs_cut"], second["inputs_cut"]) == (1, 0)
    assert (first["examples_dropped"], second["examples_dropped"]) == (0, 1)
    assert "2 tasks, 9 rows, 1 examples dropped, 1 inputs cut\n" in capsys.readouterr().out


# ------------------------------------------------------------------------------------ systems


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system(run_of: Any, sni: Path, tmp_path: Path, system: str) -> None:
    run = run_of(system)
    metrics, predictions = judged(run, tmp_path / "whole")
    assert metrics["system"] == system
    assert metrics["splits"]["test"]["rows"] == len(predictions) == 9
    assert (metrics["trained_parameters"] > 0) == (system != "none")

    # By hand: the conditioning, the adapters, one row.
    config, m, backbone, params = model.load_run(run)
    encode = backbone.vocab.encode
    shown = "\nInput: a z\nOutput: a"
    conditioning = [*encode("first the letters."), *encode(shown)]
    row = encode("c x")
    if system == "concat":
        row = [*conditioning, *encode("\nInput: "), *row]
    hyper = np.zeros((1, config.data.hyper_length), np.int32)
    hyper[0, : len(conditioning) + 1] = [*conditioning, EOS_ID]
    adapters = model.generate(m, params, jnp.asarray(hyper))
    assert (adapters is None) == (system in ("none", "concat"))
    # Of the shapes that evaluation compiled for, and elsewhere in them.
    inputs = np.zeros((config.eval.batch, 56 if system == "concat" else 16), np.int32)
    inputs[-1, : len(row) + 1] = [*row, EOS_ID]
    ids, _ = decode(
        m.sizes, params["backbone"], jnp.asarray(inputs), adapters, steps=4, beam_size=1
    )
    assert predictions[0]["input"] == "c x"
    assert predictions[0]["prediction"] == backbone.vocab.decode(np.asarray(ids)[-1].tolist())

    # Another instruction is for those who read it, and for nobody else.
    other = tmp_path / "sni"
    shutil.copytree(sni, other)
    for name in runs.HELD_OUT:
        edit(other, name, lambda task: task.update(Definition=["multiply the animals"]))
    _, reworded = judged(run, tmp_path / "reworded", f"--gin.data.sni_dir={other}")
    assert (texts(reworded) != texts(predictions)) == (system in READS_THE_TASK)


def test_the_batch_size_changes_nothing(run_of: Any, tmp_path: Path) -> None:
    run = run_of("hyper_prefix")
    _, predictions = judged(run, tmp_path / "whole")
    assert judged(run, tmp_path / "smaller", "--gin.eval.batch=4")[1] == predictions


def test_systems_differ(run_of: Any, tmp_path: Path) -> None:
    found = {name: texts(judged(run_of(name), tmp_path / name)[1]) for name in SYSTEMS}
    assert len({tuple(made) for made in found.values()}) == len(SYSTEMS)


def test_held_out_splits_are_reported_apart(make: Any, tmp_path: Path) -> None:
    lengths = {"data__hyper_length": 72, "data__input_length": 8, "data__target_length": 8}
    config = make(system="none", data__mixture="synthetic", eval__max_rows_per_task=2, **lengths)
    config.eval.batch = 2
    workdir.check_resume(tmp_path / "run", config)
    metrics, predictions = judged(tmp_path / "run", tmp_path / "out")
    assert tuple(metrics["splits"]) == synthetic.HELD_OUT
    for split, told in metrics["splits"].items():
        tasks = synthetic.suite()[split]
        assert set(told["per_task"]) == set(tasks)
        rows = [row for row in predictions if row["split"] == split]
        assert {row["task"] for row in rows} == set(tasks)
        assert told["rows"] == len(rows) == 2 * len(tasks)
    one, _ = judged(tmp_path / "run", tmp_path / "one", "--gin.eval.split=unseen_wordings")
    assert one["splits"] == {"unseen_wordings": metrics["splits"]["unseen_wordings"]}


# ------------------------------------------------------------------------------------ compare


def report(name: str, score: float, *splits: str) -> dict[str, Any]:
    overall = dict.fromkeys(evaluate.METRICS, score)
    return {"system": name, "splits": {s: {"tasks": 3, "overall": overall} for s in splits}}


def test_table_and_plot_of_several(tmp_path: Path) -> None:
    reports = [report("none", 0, "new_words", "new_tasks"), report("concat", 62.5, "new_words")]
    assert evaluate.table(reports).splitlines() == [
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


def test_compare_puts_other_runs_beside(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(run_of("none"), run_of("none") / "eval" / "0")
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(report("from a file", 12.5, "test")))
    flags = [f"--compare={run_of('none')}", f"--compare={file}"]
    capsys.readouterr()
    metrics, _ = judged(run_of("concat"), tmp_path / "out", *flags)
    assert metrics["system"] == "concat"
    out = capsys.readouterr().out
    for start in ("concat       test", "none         test", "from a file  test   3      12.5"):
        assert f"\n{start}" in out


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "metrics.json: cannot be read (No such file"),
        ('{"system": ', "metrics.json, line 1: is not valid JSON"),
        ("[]", "metrics.json: must hold a JSON object"),
        ('{"system": "none"}', "metrics.json: not the metrics of an evaluation"),
        ('{"system": "none", "splits": {"test": 3}}', "metrics.json: not the metrics of"),
    ],
)
def test_a_bad_report_is_told_before_the_work(
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
    assert expected in runs.fails(capsys, *argv)
    assert not out.exists()


# ------------------------------------------------------------------------------------ mistakes


def test_runs_that_cannot_be_judged(
    make: Any, run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(run: Path, *flags: str) -> str:
        return runs.fails(capsys, "evaluate", f"--workdir={run}", *flags)

    missing = tmp_path / "missing"
    assert f"{missing}/config.json: No such file" in judge(missing)
    assert not missing.exists()

    for system in ("hyper_prefix", "shared_lora"):
        run = tmp_path / system
        workdir.check_resume(run, make(system=system))  # as a run that was stopped at once
        assert f"no usable checkpoint at {run}" in judge(run)
        assert not (run / "eval").exists()
    scratch = tmp_path / "scratch"
    workdir.check_resume(scratch, make(system="concat", backbone__path=""))
    assert "backbone.path is empty" in judge(scratch)

    done = run_of("none")
    assert f"no eval/*/metrics.json in it; run `hyper-t5 evaluate --workdir {tmp_path}`" in judge(
        done, f"--compare={tmp_path}"
    )
    assert "test_tasks.txt" in judge(done, f"--gin.data.sni_dir={tmp_path}")
    assert "eval.batch expects an integer" in judge(done, "--gin.eval.batch=many")
    assert "'sn' is unknown" in judge(done, "--mixture=sn")


def test_a_run_that_has_not_ended_is_judged_by_its_newest_checkpoint(
    make: Any, backbone: Path, tmp_path: Path
) -> None:
    for system in ("concat", "shared_lora"):
        run = tmp_path / system
        runs.run(make(system=system, train__steps=4, train__save_every=2), run)
        part = runs.part_of(run, tmp_path / f"{system}_part", 2)
        assert model.load_run(part)[0].train.steps == 4
        _, early = judged(part, part / "eval" / "2")
        _, late = judged(run, run / "eval" / "4")
        assert texts(early) != texts(late)
    # One that trained nothing yet is its backbone.
    workdir.check_resume(tmp_path / "concat0", make(system="concat"))
    _, start = judged(tmp_path / "concat0", tmp_path / "start")
    assert texts(start) != texts(judged(tmp_path / "concat", tmp_path / "end")[1])


def test_a_backbone_of_another_size_or_vocabulary(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = runs.save_backbone(tmp_path / "wide", 0, runs.replace(emb_dim=20))
    for system in ("concat", "hyper_lora"):
        argv = ["evaluate", f"--workdir={run_of(system)}", f"--gin.backbone.path={wide}"]
        line = runs.fails(capsys, *argv)
        assert "was made for a backbone with emb_dim=16, but backbone.path has emb_dim=20" in line


def test_no_space_loses_no_earlier_results(run_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/plot\.png: "):
        plots.compare([report("none", 1, "test")], tmp_path / "file" / "plot.png")
    with pytest.raises(UserError, match=r"cannot write .*file/predictions\.jsonl: "):
        evaluate.evaluate_workdir(run_of("none"), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
