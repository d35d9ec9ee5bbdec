"""Evaluation: files, metrics, rank classification, every system, invalid input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hyper_t5 import adapters as ad
from hyper_t5 import cli, flops, model, pipeline, runs
from hyper_t5.checkpoints import workdir
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.data.vocab import EOS_ID
from hyper_t5.evaluation import aggregation, evaluate, tables
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.scoring import text_metrics
from hyper_t5.scoring.benchmarks import Benchmark
from hyper_t5.t5.decoding import decode
from hyper_t5.tasks import MIXTURES, synthetic
from hyper_t5.utils import plots
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.evaluations import edit_task, evaluate_run, report, texts

# ------------------------------------------------------------------------------------ metrics


def test_files_and_numbers(run_of: Any, evaluated: Any, sni: Path, tmp_path: Path) -> None:
    run, seen = run_of("hyper_lora"), tmp_path / "sni"
    _, before = evaluated("hyper_lora")
    assert len(set(texts(before))) == len(before) == 9

    # Other references, so that the same predictions are right, nearly right, or half right.
    shutil.copytree(sni, seen)
    predicted = dict(zip([row["id"] for row in before], texts(before), strict=True))
    first, second = tiny_runs.HELD_OUT

    def set_references(task: dict[str, Any]) -> None:
        rows = task["Instances"]
        rows[0]["output"] = ["no", predicted[rows[0]["id"]]]
        rows[1]["output"] = [predicted[rows[1]["id"]].upper() + "!"]
        rows[2]["output"] = [
            predicted[rows[2]["id"]] + " word" * len(predicted[rows[2]["id"]].split())
        ]

    for name in (first, second):
        edit_task(seen, name, set_references)
    metrics, after = evaluate_run(run, tmp_path / "after", f"--gin.data.sni_dir={seen}")
    assert texts(after) == texts(before)

    keys = ["split", "mixture", "task", "category", "id", "input", "references", "prediction"]
    keys += text_metrics.METRICS
    assert all(list(row) == keys for row in after)
    assert [row["task"] for row in after] == [first] * 6 + [second] * 3
    ids = [row["id"] for row in json.loads((seen / f"tasks/{first}.json").read_text())["Instances"]]
    assert [row["id"] for row in after[:6]] == ids
    for row, (exact, strict) in zip(after[:3], [(100, 100), (100, 0), (0, 0)], strict=True):
        assert (row["exact_match"], row["strict_match"]) == (exact, strict)
    assert after[0]["references"] == ["no", after[0]["prediction"]]
    assert after[2]["rougeL"] == pytest.approx(100 * 2 / 3)  # precision 1, recall 1/2

    def mean(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {m: sum(row[m] for row in rows) / len(rows) for m in text_metrics.METRICS}

    split = metrics["splits"]["test"]
    assert list(metrics["splits"]) == ["test"]
    assert (split["tasks"], split["rows"]) == (2, 9)
    assert split["overall"] == pytest.approx(mean(after))  # of rows, not of tasks
    assert split["overall"]["exact_match"] == pytest.approx(100 * 4 / 9)
    for name, rows in {first: after[:6], second: after[6:]}.items():
        scores = split["per_task"][name]
        assert {m: scores[m] for m in text_metrics.METRICS} == pytest.approx(mean(rows))
        assert scores["rows"] == len(rows)
        assert (scores["category"], scores["examples_shown"]) == (f"Kind of {name}", 1)
    assert (metrics["system"], metrics["workdir"]) == ("hyper_lora", str(run))
    # From the file alone.
    again = aggregation.score_predictions(after)["splits"]["test"]
    assert {k: split[k] for k in ("overall", "per_category", "official")}.items() <= again.items()
    official = (tmp_path / "after" / "submission.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in official] == [
        {"id": row["id"], "prediction": row["prediction"]} for row in after
    ]


def test_adapter_statistics_are_written(evaluation_of: Any) -> None:
    """Adapters of a hypermodel differ between tasks, a shared adapter does not."""
    statistics: dict[str, Any] = {}
    for system in ("hyper_lora", "shared_lora", "hyperdecoder", "none"):
        file = evaluation_of(system) / "adapters.json"
        statistics[system] = json.loads(file.read_text())["test"] if file.exists() else None
    hyper, shared = statistics["hyper_lora"], statistics["shared_lora"]
    assert hyper["tasks"] == shared["tasks"] == list(tiny_runs.HELD_OUT)
    assert hyper["differing"] > 1e-4
    assert shared["differing"] == 0
    assert statistics["hyperdecoder"] is statistics["none"] is None


def test_results_are_in_the_folder_of_the_step(
    run_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("hyper_lora")
    assert cli.main(["evaluate", "--workdir", str(run)]) == 0
    names = ["adapters.json", "metrics.json", "predictions.jsonl", "report.png", "submission.jsonl"]
    assert [path.name for path in sorted((run / "eval" / "1").iterdir())] == names
    out = capsys.readouterr().out
    assert "evaluate test: 2 tasks, 9 rows\n" in out
    assert out.splitlines()[-5:] == [str(run / "eval" / "1" / name) for name in names]


def test_truncation_is_reported(
    run_of: Any, sni: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "sni"
    shutil.copytree(sni, long)
    edit_task(long, tiny_runs.HELD_OUT[0], lambda t: t["Instances"][0].update(input="a b " * 20))
    edit_task(
        long, tiny_runs.HELD_OUT[1], lambda t: t["Positive Examples"][0].update(output="a b " * 20)
    )
    metrics, _ = evaluate_run(run_of("none"), tmp_path / "out", f"--gin.data.sni_dir={long}")
    first, second = (metrics["splits"]["test"]["per_task"][name] for name in tiny_runs.HELD_OUT)
    assert (first["inputs_cut"], second["inputs_cut"]) == (1, 0)
    assert (first["examples_dropped"], second["examples_dropped"]) == (0, 1)
    assert "2 tasks, 9 rows, 1 examples dropped, 1 inputs cut\n" in capsys.readouterr().out


def test_a_mixture_has_metrics_of_its_own(
    run_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = {}

    def own(task: str, rows: Any) -> dict[str, float]:
        seen[task] = [(row["prediction"], row["references"]) for row in rows]
        scores = {"words": 10.0 * len(rows)}
        return scores | {"rare": 5.0} if task == tiny_runs.HELD_OUT[1] else scores

    sni = dataclasses.replace(MIXTURES["sni"], benchmark=Benchmark(task_scores=own))
    monkeypatch.setitem(MIXTURES, "sni", sni)
    metrics, predictions = evaluate_run(run_of("hyper_lora"), tmp_path / "out")
    split = metrics["splits"]["test"]
    for name, rows in seen.items():
        members = [row for row in predictions if row["task"] == name]
        assert rows == [(row["prediction"], row["references"]) for row in members]
        scores = split["per_task"][name]
        assert scores["words"] == 10.0 * len(rows)
        assert ("rare" in scores) == (name == tiny_runs.HELD_OUT[1])
    assert (split["overall"]["words"], split["overall"]["rare"]) == (45, 5)  # means over tasks
    assert "exact_match" in split["overall"]
    head, line = tables.aligned(tables.metrics_table([metrics])).splitlines()
    assert head.split()[-3:] == ["rougeL", "words", "rare"]
    assert line.endswith("  45.0 [30.0, 60.0]  5.0")
    assert f"{head}\n{line}\n" in capsys.readouterr().out
    both = tables.metrics_table([report("older", 1, "test"), metrics])
    assert both[1][-2:] == ["-", "-"]


# ------------------------------------------------------------------------------------ options


@pytest.fixture
def choices(monkeypatch: pytest.MonkeyPatch) -> list[TaskData]:
    """Held-out tasks whose rows have options, in splits of two MetaICL seeds."""
    options = [("a", "b"), ("a b c", "a b", "z"), ("q", "a")]
    tasks = [
        TaskData(
            name,
            (f"{name} the letters.",),
            (("d w", "d"), ("e v", "e")),
            [
                TaskRow(f"{name}-{i}", f"{x} c", (o[0],), o)
                for i, (x, o) in enumerate(zip("xyz", options, strict=True))
            ],
            category="classification",
        )
        for name in tiny_runs.HELD_OUT
    ]
    monkeypatch.setattr(pipeline, "load_eval_tasks", lambda *_: tasks)
    splits = dict.fromkeys(("test_100", "test_13"), "metaicl")
    monkeypatch.setattr(pipeline, "eval_splits", lambda _: splits)
    return tasks


def test_options_are_ranked(run_of: Any, choices: list[TaskData], tmp_path: Path) -> None:
    metrics, predictions = evaluate_run(run_of("hyper_prefix"), tmp_path / "out")
    assert len(predictions) == 2 * 2 * 3
    for row in predictions:
        scored = np.array(row["option_log_probs"]) / row["option_tokens"]
        assert row["prediction"] == row["options"][int(np.argmax(scored))]
        assert all(score < 0 for score in row["option_log_probs"])
    assert [row["options"] for row in predictions[:3]] == [list(r.options) for r in choices[0].rows]
    scores = metrics["over_splits"]["metaicl"]
    assert (scores["seeds"], scores["tasks"]) == (2, 2)
    assert "macro_f1" in metrics["splits"]["test_13"]["per_task"][tiny_runs.HELD_OUT[0]]
    argv = ["score", f"--predictions={tmp_path / 'out' / 'predictions.jsonl'}"]
    assert cli.main([*argv, f"--out={tmp_path / 'again.json'}"]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["over_splits"] == metrics["over_splits"]
    for split, content in again["splits"].items():
        assert content["overall"] == metrics["splits"][split]["overall"]
    assert not (tmp_path / "out" / "submission.jsonl").exists()


def test_a_row_without_options_is_refused_before_any_prediction(
    run_of: Any,
    choices: list[TaskData],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free = dataclasses.replace(choices[1].rows[2], options=())
    last = dataclasses.replace(choices[1], rows=[*choices[1].rows[:2], free])
    tasks = {"test_100": choices, "test_13": [choices[0], last]}
    monkeypatch.setattr(
        pipeline, "load_eval_tasks", lambda config, mixture, split, vocab: tasks[split]
    )
    monkeypatch.setattr(evaluate, "predict_rows", lambda *_: pytest.fail("predicted"))
    argv = ["evaluate", f"--workdir={run_of('none')}", "--gin.eval.method=rank"]
    line = tiny_runs.fails(capsys, *argv, f"--out={tmp_path / 'no'}")
    assert f"row {free.id} of task {last.name} has no options" in line


def test_options_need_not_be_ranked(
    run_of: Any, choices: list[TaskData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of("none")
    _, predictions = evaluate_run(run, tmp_path / "out", "--gin.eval.method=generate")
    assert not any("options" in row for row in predictions)
    free = dataclasses.replace(choices[0].rows[0], options=())
    choices[0] = dataclasses.replace(choices[0], rows=[free, *choices[0].rows[1:]])
    _, predictions = evaluate_run(run, tmp_path / "mixed")
    assert ["options" in row for row in predictions[:6]] == [False] * 3 + [True] * 3
    argv = ["evaluate", f"--workdir={run}", "--gin.eval.method=rank", f"--out={tmp_path / 'no'}"]
    assert f"row {free.id} of task {choices[0].name} has no options" in tiny_runs.fails(
        capsys, *argv
    )
    assert not (tmp_path / "no").exists()


# ------------------------------------------------------------------------------------ systems


@pytest.mark.parametrize("system", tiny_runs.marked(SYSTEMS))
def test_every_system(run_of: Any, evaluated: Any, sni: Path, tmp_path: Path, system: str) -> None:
    run, choice = run_of(system), SYSTEMS[system]
    metrics, predictions = evaluated(system)
    assert metrics["system"] == system
    assert metrics["splits"]["test"]["rows"] == len(predictions) == 9
    assert (metrics["trained_parameters"] > 0) == bool(choice.trains)

    # The conditioning, the adapters and one row, computed here.
    opened = runs.open(run)
    config, m, backbone, params = opened.config, opened.model, opened.backbone, opened.params
    encode, concat = backbone.vocab.encode, choice.layout.in_inputs
    parts = [encode("first the letters."), encode("\nInput: a z\nOutput: a")]
    conditioning = [piece for part in parts for piece in part]
    ends = [*parts[0], EOS_ID, *parts[1]] if choice.layout.eos_after_parts else conditioning
    row = encode("c x")
    if concat:
        row = [*conditioning, *encode("\nInput: "), *row]
    # The shapes of evaluation share its compiled programs; the row is at another index.
    inputs = np.zeros((config.eval.batch, 56 if concat else 16), np.int32)
    inputs[-1, : len(row) + 1] = [*row, EOS_ID]
    if choice.conditioned_on == "input":
        adapters = model.generate_adapters(
            m, params, jnp.asarray(inputs), jnp.zeros(len(inputs), int)
        )
        inputs = inputs[:, :0]
    else:
        hyper = np.zeros((1, config.data.hyper_length), np.int32)
        hyper[0, : len(ends) + 1] = [*ends, EOS_ID]
        adapters = model.generate_adapters(m, params, jnp.asarray(hyper), jnp.ones(1, int))
    assert (adapters is None) == (system in ("none", "concat"))
    ids, _ = decode(
        m.sizes, params["backbone"], jnp.asarray(inputs), adapters, steps=4, beam_size=1
    )
    assert predictions[0]["input"] == "c x"
    assert predictions[0]["prediction"] == backbone.vocab.decode(np.asarray(ids)[-1].tolist())
    emitted = ad.parameters_per_task(adapters) if adapters is not None else 0
    assert metrics["generated_parameters"] == emitted
    assert metrics["flops"] == flops.system_flops(config, backbone.sizes)

    # Another instruction changes the predictions of exactly the systems that read it.
    other = tmp_path / "sni"
    shutil.copytree(sni, other)
    for name in tiny_runs.HELD_OUT:
        edit_task(other, name, lambda task: task.update(Definition=["multiply the animals"]))
    _, reworded = evaluate_run(run, tmp_path / "reworded", f"--gin.data.sni_dir={other}")
    reads = not system.startswith(("shared_", "task_", "none"))
    assert (texts(reworded) != texts(predictions)) == reads


def test_the_batch_size_changes_nothing(run_of: Any, evaluated: Any, tmp_path: Path) -> None:
    _, predictions = evaluate_run(run_of("hyper_prefix"), tmp_path, "--gin.eval.batch=4")
    assert predictions == evaluated("hyper_prefix")[1]


def test_systems_differ(evaluated: Any) -> None:
    names = ("none", "concat", "shared_lora", "hyper_prefix", "hyper_lora", "hyperdecoder")
    assert len({tuple(texts(evaluated(name)[1])) for name in names}) == len(names)


def test_held_out_splits_are_reported_separately(make_config: Any, tmp_path: Path) -> None:
    lengths = {"data__hyper_length": 72, "data__input_length": 8, "data__target_length": 8}
    lengths["eval__max_rows_per_task"] = 2
    config = make_config(system="none", data__mixture="synthetic", **lengths)
    config.eval.batch = 2
    workdir.write_or_check_config(tmp_path / "run", config)
    metrics, predictions = evaluate_run(tmp_path / "run", tmp_path / "out")
    assert tuple(metrics["splits"]) == synthetic.HELD_OUT
    for split, scores in metrics["splits"].items():
        tasks = synthetic.suite()[split]
        assert set(scores["per_task"]) == set(tasks)
        rows = [row for row in predictions if row["split"] == split]
        assert {row["task"] for row in rows} == set(tasks)
        assert scores["rows"] == len(rows) == 2 * len(tasks)
    single, _ = evaluate_run(
        tmp_path / "run", tmp_path / "single", "--gin.eval.split=unseen_wordings"
    )
    assert single["splits"] == {"unseen_wordings": metrics["splits"]["unseen_wordings"]}


# ------------------------------------------------------------------------------------ invalid input


def test_unusable_runs_are_refused(
    make_config: Any, run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluation_error(run: Path, *flags: str) -> str:
        return tiny_runs.fails(capsys, "evaluate", f"--workdir={run}", *flags)

    missing = tmp_path / "missing"
    assert f"{missing}/config.json: No such file" in evaluation_error(missing)
    assert not missing.exists()

    for system in ("hyper_prefix", "shared_lora"):
        run = tmp_path / system
        workdir.write_or_check_config(run, make_config(system=system))
        assert f"no usable checkpoint at {run}" in evaluation_error(run)
        assert not (run / "eval").exists()
    scratch = tmp_path / "scratch"
    workdir.write_or_check_config(scratch, make_config(system="concat", backbone__path=""))
    assert "backbone.path is empty" in evaluation_error(scratch)

    done = run_of("none")
    assert (
        f"no eval/*/metrics.json in it; run `hyper-t5 evaluate --workdir {tmp_path}`"
        in evaluation_error(done, f"--compare={tmp_path}")
    )
    assert "test_tasks.txt" in evaluation_error(done, f"--gin.data.sni_dir={tmp_path}")
    assert "eval.batch expects an integer" in evaluation_error(done, "--gin.eval.batch=many")
    assert "unknown data.mixture 'sn'" in evaluation_error(done, "--mixture=sn")


def test_an_unfinished_run_is_evaluated_at_its_newest_checkpoint(
    make_config: Any, backbone: Path, tmp_path: Path
) -> None:
    for system in ("concat", "shared_lora"):
        run = tmp_path / system
        tiny_runs.run(make_config(system=system, train__steps=4, train__save_every=2), run)
        part = tiny_runs.part_of(run, tmp_path / f"{system}_part", 2)
        assert runs.open(part).config.train.steps == 4
        early_report, early = evaluate_run(part, part / "eval" / "2")
        report, late = evaluate_run(run, run / "eval" / "4")
        assert texts(early) != texts(late)
        # Both folders have the whole metrics.jsonl; its last line has the seconds of training.
        assert early_report["seconds"]["train"] == report["seconds"]["train"]
        assert report["seconds"]["train"] == tiny_runs.lines(run)[-1]["seconds"] > 0
        assert report["seconds"]["evaluate"] > 0
    # A run without a checkpoint is its backbone.
    workdir.write_or_check_config(tmp_path / "concat0", make_config(system="concat"))
    report, start = evaluate_run(tmp_path / "concat0", tmp_path / "start")
    assert report["seconds"]["train"] is None
    assert texts(start) != texts(evaluate_run(tmp_path / "concat", tmp_path / "end")[1])


def test_a_backbone_of_another_size_or_vocabulary(
    run_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = tiny_runs.save_backbone(tmp_path / "wide", 0, tiny_runs.replace(emb_dim=20))
    for system in ("concat", "hyper_lora"):
        argv = ["evaluate", f"--workdir={run_of(system)}", f"--gin.backbone.path={wide}"]
        line = tiny_runs.fails(capsys, *argv)
        assert "belongs to a backbone with emb_dim=16, but backbone.path has emb_dim=20" in line


def test_an_unwritable_folder_keeps_its_content(run_of: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/plot\.png: "):
        plots.compare([report("none", 1, "test")], tmp_path / "file" / "plot.png")
    with pytest.raises(
        UserError, match=r"cannot write .*file/metrics\.json: .*pass another folder by --out"
    ):
        evaluate.evaluate_workdir(run_of("none"), out=tmp_path / "file")
    assert (tmp_path / "file").read_text() == ""
