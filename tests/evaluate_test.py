"""Evaluation: what it writes, that its numbers are those of its predictions, and each system's."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from ml_collections import ConfigDict

import runs
from hyper_t5 import adapters as ad
from hyper_t5 import (
    checkpoint,
    cli,
    cost,
    data,
    distributed,
    evaluate,
    model,
    plots,
    protocols,
    scores,
    workdir,
)
from hyper_t5.decoding import decode
from hyper_t5.errors import UserError
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.taskfile import Row, TaskRows
from hyper_t5.tasks import synthetic
from hyper_t5.vocab import EOS_ID


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
    """A workdir of each system as if trained, where it trains anything."""
    root = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(system: str) -> Path:
        folder, fields = root / system, dict[str, Any](adapter__bottleneck_sizes=(3,))
        if system == "hint":
            fields |= {
                "adapter__prefix_sites": ad.ATTENTION_SITES,
                "adapter__position_bias": "zero",
            }
        if system.startswith("task_"):
            fields |= {"stage": "peft", "adapter__task_slots": 2}
        config = make(system=system, **fields)
        if not SYSTEMS[system].trains:
            workdir.check_resume(folder, config)
            return folder
        runs.untrained_run(config, folder)
        if config.adapter.task_slots:  # as in training, and in another order than evaluation's
            params, meta = checkpoint.load_subtree(folder, "params")
            meta["tasks"] = runs.HELD_OUT[::-1]
            checkpoint.save(folder, 2, {"params": params}, meta)
        return folder

    return run


@pytest.fixture(scope="module")
def whole(run_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """(metrics, predictions) of each system."""
    root = tmp_path_factory.mktemp("whole")
    return functools.cache(lambda system: judged(run_of(system), root / system))


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

    keys = ["split", "mixture", "task", "category", "id", "input", "references", "prediction"]
    keys += scores.METRICS
    assert all(list(row) == keys for row in after)
    assert [row["task"] for row in after] == [first] * 6 + [second] * 3
    ids = [row["id"] for row in json.loads((seen / f"tasks/{first}.json").read_text())["Instances"]]
    assert [row["id"] for row in after[:6]] == ids
    for row, (exact, strict) in zip(after[:3], [(100, 100), (100, 0), (0, 0)], strict=True):
        assert (row["exact_match"], row["strict_match"]) == (exact, strict)
    assert after[0]["references"] == ["no", after[0]["prediction"]]
    assert after[2]["rougeL"] == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2

    def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {m: sum(row[m] for row in rows) / len(rows) for m in scores.METRICS}

    split = metrics["splits"]["test"]
    assert list(metrics["splits"]) == ["test"]
    assert (split["tasks"], split["rows"]) == (2, 9)
    assert split["overall"] == pytest.approx(mean(after))  # of rows, not of tasks
    assert split["overall"]["exact_match"] == pytest.approx(100 * 4 / 9)
    for name, rows in {first: after[:6], second: after[6:]}.items():
        told = split["per_task"][name]
        assert {m: told[m] for m in scores.METRICS} == pytest.approx(mean(rows))
        assert told["rows"] == len(rows)
        assert (told["category"], told["examples_shown"]) == (f"Kind of {name}", 1)
    assert (metrics["system"], metrics["workdir"]) == ("hyper_lora", str(run))
    # From the file alone.
    again = protocols.score_predictions(after)["splits"]["test"]
    assert {k: split[k] for k in ("overall", "per_category", "official")}.items() <= again.items()
    official = (tmp_path / "after" / "submission.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in official] == [
        {"id": row["id"], "prediction": row["prediction"]} for row in after
    ]


def test_what_was_generated_is_told(run_of: Any, tmp_path: Path) -> None:
    """How alike the tasks' adapters are: those of a text are its own, a shared one is one."""
    found: dict[str, Any] = {}
    for system in ("hyper_lora", "shared_lora", "hyperdecoder", "none"):
        judged(run_of(system), tmp_path / system)
        file = tmp_path / system / "adapters.json"
        found[system] = json.loads(file.read_text())["test"] if file.exists() else None
    hyper, shared = found["hyper_lora"], found["shared_lora"]
    assert hyper["tasks"] == shared["tasks"] == list(runs.HELD_OUT)
    assert hyper["differing"] > 1e-4
    assert shared["differing"] == 0
    assert found["hyperdecoder"] is found["none"] is None


def test_results_lie_beside_the_checkpoint_they_are_of(
    run_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("hyper_lora")
    assert cli.main(["evaluate", "--workdir", str(run)]) == 0
    made = ["adapters.json", "metrics.json", "predictions.jsonl", "report.png", "submission.jsonl"]
    assert [path.name for path in sorted((run / "eval" / "1").iterdir())] == made
    out = capsys.readouterr().out
    assert "evaluate test: 2 tasks, 9 rows\n" in out
    assert out.splitlines()[-5:] == [str(run / "eval" / "1" / name) for name in made]


@pytest.mark.parametrize(("mixture", "name"), [("", "7"), ("sni", "7"), ("p3", "7-p3")])
def test_another_mixture_replaces_no_results(make: Any, mixture: str, name: str) -> None:
    assert evaluate._place_name(make(eval__mixture=mixture), 7) == name


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


def test_metrics_of_a_mixtures_own(
    run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def own(task: str, rows: Any) -> dict[str, float]:
        seen[task] = [(row["prediction"], row["references"]) for row in rows]
        made = {"words": 10.0 * len(rows)}
        return made | {"rare": 5.0} if task == runs.HELD_OUT[1] else made

    monkeypatch.setitem(protocols.PROTOCOLS, "sni", protocols.Protocol(task=own))
    metrics, predictions = judged(run_of("hyper_lora"), tmp_path / "out")
    split = metrics["splits"]["test"]
    for name, rows in seen.items():
        made = [row for row in predictions if row["task"] == name]
        assert rows == [(row["prediction"], row["references"]) for row in made]
        told = split["per_task"][name]
        assert told["words"] == 10.0 * len(rows)
        assert ("rare" in told) == (name == runs.HELD_OUT[1])
    assert (split["overall"]["words"], split["overall"]["rare"]) == (45, 5)  # means over tasks
    assert "exact_match" in split["overall"]
    head, line = evaluate.table([metrics]).splitlines()
    assert head.split()[-3:] == ["rougeL", "words", "rare"]
    assert line.endswith("  45.0 [30.0, 60.0]  5.0")
    assert f"{head}\n{line}\n" in capsys.readouterr().out
    both = evaluate.table([report("older", 1, "test"), metrics]).splitlines()
    assert both[1].split()[-2:] == ["-", "-"]


# ------------------------------------------------------------------------------------ options


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[TaskRows]:
    """Held-out tasks that are a choice, under five seeds' splits of MetaICL."""
    options = [("a", "b"), ("a b c", "a b", "z"), ("q", "a")]
    tasks = [
        TaskRows(
            name,
            (f"{name} the letters.",),
            (("d w", "d"), ("e v", "e")),
            [
                Row(f"{name}-{i}", f"{x} c", (o[0],), o)
                for i, (x, o) in enumerate(zip("xyz", options, strict=True))
            ],
            category="classification",
        )
        for name in runs.HELD_OUT
    ]
    monkeypatch.setattr(data, "load_judged", lambda *_: tasks)
    splits = dict.fromkeys(("test_100", "test_13"), "metaicl")
    monkeypatch.setattr(data, "splits_of", lambda _: splits)
    return tasks


def test_options_are_ranked(run_of: Any, choices: list[TaskRows], tmp_path: Path) -> None:
    metrics, predictions = judged(run_of("hyper_prefix"), tmp_path / "out")
    assert len(predictions) == 2 * 2 * 3
    for row in predictions:
        scored = np.array(row["option_log_probs"]) / row["option_tokens"]
        assert row["prediction"] == row["options"][int(np.argmax(scored))]
        assert all(score < 0 for score in row["option_log_probs"])
    assert [row["options"] for row in predictions[:3]] == [list(r.options) for r in choices[0].rows]
    told = metrics["over_splits"]["metaicl"]
    assert (told["seeds"], told["tasks"]) == (2, 2)
    assert "macro_f1" in metrics["splits"]["test_13"]["per_task"][runs.HELD_OUT[0]]
    argv = ["score", f"--predictions={tmp_path / 'out' / 'predictions.jsonl'}"]
    assert cli.main([*argv, f"--out={tmp_path / 'again.json'}"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["over_splits"] == metrics["over_splits"]
    for split, made in again["splits"].items():
        assert made["overall"] == metrics["splits"][split]["overall"]
    assert not (tmp_path / "out" / "submission.jsonl").exists()


def test_a_row_without_options_is_told_before_any_split_is_judged(
    run_of: Any,
    choices: list[TaskRows],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = dataclasses.replace(choices[1].rows[2], options=())
    last = dataclasses.replace(choices[1], rows=[*choices[1].rows[:2], free])
    tasks = {"test_100": choices, "test_13": [choices[0], last]}
    monkeypatch.setattr(data, "load_judged", lambda config, mixture, split, vocab: tasks[split])
    monkeypatch.setattr(evaluate, "answers_of", lambda *_: pytest.fail("it was judged"))
    argv = ["evaluate", f"--workdir={run_of('none')}", "--gin.eval.how=rank"]
    said = runs.fails(capsys, *argv, f"--out={tmp_path / 'no'}")
    assert f"row {free.id} of task {last.name} has no options" in said


def test_options_need_not_be_ranked(
    run_of: Any, choices: list[TaskRows], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("none")
    _, predictions = judged(run, tmp_path / "out", "--gin.eval.how=generate")
    assert not any("options" in row for row in predictions)
    free = dataclasses.replace(choices[0].rows[0], options=())
    choices[0] = dataclasses.replace(choices[0], rows=[free, *choices[0].rows[1:]])
    _, predictions = judged(run, tmp_path / "mixed")
    assert ["options" in row for row in predictions[:6]] == [False] * 3 + [True] * 3
    argv = ["evaluate", f"--workdir={run}", "--gin.eval.how=rank", f"--out={tmp_path / 'no'}"]
    assert f"row {free.id} of task {choices[0].name} has no options" in runs.fails(capsys, *argv)
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------ systems


@pytest.mark.parametrize("system", runs.marked(SYSTEMS))
def test_every_system(run_of: Any, whole: Any, sni: Path, tmp_path: Path, system: str) -> None:
    run, choice = run_of(system), SYSTEMS[system]
    metrics, predictions = whole(system)
    assert metrics["system"] == system
    assert metrics["splits"]["test"]["rows"] == len(predictions) == 9
    assert (metrics["trained_parameters"] > 0) == bool(choice.trains)

    # By hand: the conditioning, the adapters, one row.
    config, m, backbone, params = model.load_run(run)
    encode, concat = backbone.vocab.encode, choice.layout == "concat"
    parts = [encode("first the letters."), encode("\nInput: a z\nOutput: a")]
    conditioning = [piece for part in parts for piece in part]
    ends = [*parts[0], EOS_ID, *parts[1]] if choice.layout == "parts" else conditioning
    row = encode("c x")
    if concat:
        row = [*conditioning, *encode("\nInput: "), *row]
    # Of the shapes that evaluation compiled for, and elsewhere in them.
    inputs = np.zeros((config.eval.batch, 56 if concat else 16), np.int32)
    inputs[-1, : len(row) + 1] = [*row, EOS_ID]
    if choice.reads == "input":
        adapters = model.generate(m, params, jnp.asarray(inputs), jnp.zeros(len(inputs), int))
        inputs = inputs[:, :0]
    else:
        hyper = np.zeros((1, config.data.hyper_length), np.int32)
        hyper[0, : len(ends) + 1] = [*ends, EOS_ID]
        adapters = model.generate(m, params, jnp.asarray(hyper), jnp.ones(1, int))
    assert (adapters is None) == (system in ("none", "concat"))
    ids, _ = decode(
        m.sizes, params["backbone"], jnp.asarray(inputs), adapters, steps=4, beam_size=1
    )
    assert predictions[0]["input"] == "c x"
    assert predictions[0]["prediction"] == backbone.vocab.decode(np.asarray(ids)[-1].tolist())
    emitted = ad.parameters_per_task(adapters) if adapters is not None else 0
    assert metrics["generated_parameters"] == emitted
    assert metrics["flops"] == cost.flops(config, backbone.sizes)

    # Another instruction is for those who read it, and for nobody else.
    other = tmp_path / "sni"
    shutil.copytree(sni, other)
    for name in runs.HELD_OUT:
        edit(other, name, lambda task: task.update(Definition=["multiply the animals"]))
    _, reworded = judged(run, tmp_path / "reworded", f"--gin.data.sni_dir={other}")
    reads = not system.startswith(("shared_", "task_", "none"))
    assert (texts(reworded) != texts(predictions)) == reads


def test_the_batch_size_changes_nothing(run_of: Any, tmp_path: Path) -> None:
    run = run_of("hyper_prefix")
    _, predictions = judged(run, tmp_path / "whole")
    assert judged(run, tmp_path / "smaller", "--gin.eval.batch=4")[1] == predictions


def test_a_preempted_evaluation_is_to_be_started_again(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def preempted(number: int) -> bool:
        asked.append(number)
        return number == 2

    monkeypatch.setattr(distributed, "preempted", preempted)
    argv = ["evaluate", "--workdir", str(run_of("shared_lora")), "--out", str(tmp_path)]
    assert "evaluate again" in runs.fails(capsys, *argv, code=75)
    assert asked == [1, 2]
    assert [place.name for place in tmp_path.iterdir()] == ["answers"]
    asked.clear()
    _, predictions = judged(run_of("shared_lora"), tmp_path)
    assert asked == [1]  # the one that is left
    assert len(predictions) == 9


def test_systems_differ(whole: Any) -> None:
    names = ("none", "concat", "shared_lora", "hyper_prefix", "hyper_lora", "hyperdecoder")
    found = {name: texts(whole(name)[1]) for name in names}
    assert len({tuple(made) for made in found.values()}) == len(names)


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
    overall = dict.fromkeys(scores.METRICS, score)
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


def test_table_of_costs() -> None:
    costs = {
        "trained_parameters": 1234567,
        "generated_parameters": 0,
        "flops": {"per_task": 0.0, "per_example": 12.34e6, "concatenated": 2.05e9},
        "seconds": {"train": None, "evaluate": 3.21},
    }
    reports = [report("none", 0, "test"), report("hyper_lora", 0, "test") | costs]
    lines = evaluate.cost_table(reports).splitlines()
    assert lines[0].split()[:3] == ["system", "trained", "emitted"]
    assert lines[2].split() == ["none", *"-" * 7]
    numbers = ["1,234,567", "0", "2,050.0", "12.3", "0.0", "-", "3.2"]
    assert lines[3].split() == ["hyper_lora", *numbers]
    assert len({len(line) for line in lines}) == 1


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
    costs = [line.split() for line in out.splitlines()[-9:-4]]
    assert [line[0] for line in costs[:1] + costs[2:]] == ["system", "concat", "none", "from"]
    assert costs[2][1] == f"{metrics['trained_parameters']:,}"
    assert costs[3][1:3] == ["0", "0"]
    assert costs[4][3:] == ["-"] * 7


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "metrics.json: cannot be read (No such file"),
        ('{"system": ', "metrics.json, line 1: is not valid JSON"),
        ("[]", "metrics.json: must hold a JSON object"),
        ('{"system": "none"}', "metrics.json: not the metrics of an evaluation"),
        ('{"system": "none", "splits": {"test": 3}}', "metrics.json: not the metrics of"),
        ('{"system": "none", "splits": {}, "flops": 3}', "metrics.json: not the metrics of"),
        (
            '{"system": "none", "splits": {}, "seconds": {"train": "long"}}',
            "metrics.json: not the metrics of",
        ),
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
        told_early, early = judged(part, part / "eval" / "2")
        told, late = judged(run, run / "eval" / "4")
        assert texts(early) != texts(late)
        # Both have all of its metrics.jsonl, whose last line has the seconds of them all.
        assert told_early["seconds"]["train"] == told["seconds"]["train"]
        assert told["seconds"]["train"] == runs.lines(run)[-1]["seconds"] > 0
        assert told["seconds"]["evaluate"] > 0
    # One that trained nothing yet is its backbone.
    workdir.check_resume(tmp_path / "concat0", make(system="concat"))
    told, start = judged(tmp_path / "concat0", tmp_path / "start")
    assert told["seconds"]["train"] is None
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
    with pytest.raises(UserError, match=r"cannot write .*file/answers/"):
        evaluate.evaluate_workdir(run_of("none"), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""


# ------------------------------------------------------------------------------------ going on


class Stopped(BaseException):
    """As a kill: nobody catches it."""


def stopped_after(monkeypatch: pytest.MonkeyPatch, tasks: int) -> list[str]:
    """Evaluations stop before they answer more tasks; the names of those that they began."""
    begun: list[str] = []
    whole = evaluate.answers_of

    def answers(m: Any, params: Any, one: evaluate.Asked, *more: Any) -> Any:
        if len(begun) == tasks:
            raise Stopped
        begun.append(one.task.name)
        return whole(m, params, one, *more)

    monkeypatch.setattr(evaluate, "answers_of", answers)
    return begun


def kept(out: Path) -> list[Path]:
    return sorted((out / "answers").glob("*.jsonl"))


def but_seconds(out: Path) -> dict[str, Any]:
    report = json.loads((out / "metrics.json").read_text())
    assert report.pop("seconds")["evaluate"] > 0
    return report


@pytest.fixture
def begun(run_of: Any, whole: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place where an evaluation of a system was stopped after its first task."""
    made = tmp_path / "out"
    whole("hyper_lora")
    with monkeypatch.context() as patch:
        stopped_after(patch, 1)
        with pytest.raises(Stopped):
            judged(run_of("hyper_lora"), made)
    assert len(kept(made)) == 1
    assert not (made / "metrics.json").exists()
    return made


def test_a_stopped_evaluation_goes_on(
    run_of: Any,
    begun: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_of("hyper_lora")
    judged(run, tmp_path / "whole")
    asked = stopped_after(monkeypatch, 9)
    judged(run, begun)
    assert asked == [runs.HELD_OUT[1]]
    assert "1 of 2 tasks are judged" in capsys.readouterr().out
    assert not (begun / "answers").exists()
    one, other = ((out / "predictions.jsonl").read_bytes() for out in (begun, tmp_path / "whole"))
    assert one == other
    assert but_seconds(begun) == but_seconds(tmp_path / "whole")


def test_stopped_before_the_report_nothing_is_asked_again(
    run_of: Any, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("hyper_lora")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "judge", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            judged(run, begun)
    assert len(kept(begun)) == 2
    assert stopped_after(monkeypatch, 0) == []
    metrics, _ = judged(run, begun)
    assert metrics["splits"]["test"]["rows"] == 9


@pytest.mark.parametrize("size", [0, 1, -3])
def test_what_is_torn_is_asked_again(
    run_of: Any, whole: Any, begun: Path, size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """An end cut off, in the header, in a row, or between rows; and what a kill left of a file."""
    (file,) = kept(begun)
    content = file.read_bytes()
    file.write_bytes(content[:size] if size else b"".join(content.splitlines(True)[:-1]))
    (begun / "answers" / f".{file.name}.123").write_bytes(content[:10])
    capsys.readouterr()
    _, rows = judged(run_of("hyper_lora"), begun)
    assert f"{file} is damaged; its task is asked again" in capsys.readouterr().out
    assert rows == whole("hyper_lora")[1]
    assert not (begun / "answers").exists()


@pytest.mark.parametrize("other", ["config", "checkpoint", "data"])
def test_what_is_of_another_evaluation_is_not_used(
    run_of: Any,
    begun: Path,
    sni: Path,
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, flags = run_of("hyper_lora"), []
    if other == "config":
        flags = ["--gin.eval.max_decode_length=3"]
    elif other == "checkpoint":  # of the same step
        shutil.copytree(run, tmp_path / "run")
        run = tmp_path / "run"
        params, meta = checkpoint.load_subtree(run, "params")
        shutil.rmtree(run / "checkpoints")
        for layer in jax.tree.leaves(params):
            layer += 0.5
        checkpoint.save(run, 1, {"params": params}, meta)
    else:
        shutil.copytree(sni, tmp_path / "sni")
        for name in runs.HELD_OUT:
            edit(tmp_path / "sni", name, lambda task: task["Instances"][0].update(input="p q"))
        flags = [f"--gin.data.sni_dir={tmp_path / 'sni'}"]
    asked = stopped_after(monkeypatch, 9)
    capsys.readouterr()
    judged(run, begun, *flags)
    assert asked == list(runs.HELD_OUT)
    assert "1 tasks in" in (out := capsys.readouterr().out)
    assert "are of another config, checkpoint or data; not used" in out


# ------------------------------------------------------------------------------------ intervals


def test_scores_have_intervals_and_differences_are_paired(
    run_of: Any, whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(run_of("none"), tmp_path / "none")
    capsys.readouterr()
    metrics, _ = judged(
        run_of("hyper_lora"), tmp_path / "out", f"--compare={tmp_path / 'none' / 'metrics.json'}"
    )
    split = metrics["splits"]["test"]
    for metric in scores.METRICS:
        low, high = split["intervals"][metric]
        ends = [told[metric] for told in split["per_task"].values()]
        # Of two tasks it has nearly all draws between both and either one alone.
        assert [low, high] == pytest.approx([min(ends), max(ends)])
    out = capsys.readouterr().out
    low, high = split["intervals"]["rougeL"]
    assert f"{split['overall']['rougeL']:.1f} [{low:.1f}, {high:.1f}]" in out
    start = ["hyper_lora", "none", "test", "2"]
    (line,) = [line for line in out.splitlines() if line.split()[:4] == start]
    other = json.loads((tmp_path / "none" / "metrics.json").read_text())["splits"]["test"]
    less = split["overall"]["rougeL"] - other["overall"]["rougeL"]
    assert re.search(rf"  {re.escape(f'{less:+.1f}')} \[[-+.\d]+, [-+.\d]+\]$", line)
