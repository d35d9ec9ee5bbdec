"""Robustness: verdicts, conditions and resumption, on the shipped backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from hyper_t5 import cli, config, runs
from hyper_t5.checkpoints import workdir
from hyper_t5.evaluation import evaluate, perturbations, robustness, tables
from hyper_t5.runs import Run
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json
from tests.support import tiny_runs

FIELDS = {
    "eval.split": "unseen_wordings",
    "eval.max_rows_per_task": "2",
    "eval.batch": "2",
    "mesh.data": "1",
}
ARGS = [f"--gin.{field}={value}" for field, value in FIELDS.items()]


def quickstart_config(system: str) -> Any:
    return config.load(f"configs/quickstart.py:system={system}", [])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the shipped backbone, trained with the text before every input."""
    from hyper_t5.tools.quickstart import shipped_backbone

    folder, config = tmp_path_factory.mktemp("robustness") / "reader", quickstart_config("concat")
    config.backbone.path = str(shipped_backbone())
    workdir.write_or_check_config(folder, config)
    return folder


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with one LoRA for all tasks, which cannot read its text."""
    folder = tmp_path_factory.mktemp("robustness") / "blind"
    return tiny_runs.untrained_run(quickstart_config("shared_lora"), folder)


def measure(out: Path, *folders: Path) -> Path:
    """Run ``hyper-t5 robustness``; return its output folder."""
    words = [word for folder in folders for word in ("--workdir", str(folder))]
    assert cli.main(["robustness", *words, "--out", str(out), "--shots", "0,1", *ARGS]) == 0
    return out


@pytest.fixture(scope="module")
def results(reader: Path, blind: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of the command for both runs."""
    return measure(tmp_path_factory.mktemp("robustness") / "out", reader, blind)


def check_ignores_text(run: dict[str, Any]) -> None:
    assert len(run["verdicts"]) == 3
    assert all(verdict.startswith("IGNORES its ") for verdict in run["verdicts"])
    for line in run["conditions"].values():
        assert (line["difference"], line["interval"]) == (0, [0, 0])
        assert line["same_predictions"] == 100


def test_verdicts_separate_a_reader_from_a_blind_run(results: Path) -> None:
    reads, blind = read_json(results / "robustness.json")["runs"]
    assert reads["system"] == "concat"
    assert reads["verdicts"][0].startswith("reads its conditioning (")
    assert reads["verdicts"][1].startswith("reads its instruction (")
    wrong = reads["conditions"]["instruction of another task"]
    assert wrong["quality"] < 20 < 60 < reads["conditions"]["unchanged"]["quality"]
    assert wrong["interval"][0] <= wrong["difference"] <= wrong["interval"][1] < 0
    assert wrong["difference"] == pytest.approx(
        wrong["quality"] - reads["conditions"]["unchanged"]["quality"]
    )
    check_ignores_text(blind)


@pytest.mark.slow
def test_a_hypermodel_with_zero_output_ignores_its_text(tmp_path: Path) -> None:
    """HyperT5-LoRA at initialization reads the text, but its adapters are zero."""
    run = tiny_runs.untrained_run(quickstart_config("hyper_lora"), tmp_path / "zeroed", noise=0)
    (report,) = read_json(measure(tmp_path / "out", run) / "robustness.json")["runs"]
    check_ignores_text(report)


def test_every_condition_is_evaluated(results: Path) -> None:
    for run in read_json(results / "robustness.json")["runs"]:
        lines = run["conditions"]
        assert list(lines) == ["unchanged", "1 example", "2 examples", *perturbations.PERTURBATIONS]
        assert [lines[name]["shown"] for name in list(lines)[:3]] == [0, 1, 2]
        assert lines["examples of another task"]["base"] == "2 examples"
        assert lines["examples of another task"]["shown"] == 2
        assert {line["tasks"] for line in lines.values()} == {24}
    assert (results / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_the_unperturbed_condition_equals_evaluate(results: Path, reader: Path) -> None:
    run = runs.open(reader, on_mesh=True)
    run.config.eval.split = FIELDS["eval.split"]
    run.config.eval.max_rows_per_task = run.config.eval.batch = 2
    report, _ = evaluate.evaluate(run)
    (split,) = report["splits"].values()
    unchanged = read_json(results / "robustness.json")["runs"][0]["conditions"]["unchanged"]
    assert list(unchanged["per_task"].values()) == [
        scores["strict_match"] for scores in split["per_task"].values()
    ]


def test_conditions_follow_the_config() -> None:
    """Without an instruction, it is not perturbed and at least one example is shown."""
    settings = quickstart_config("hyper_lora")
    settings.data.use_instruction = False
    settings.eval.shots = 4
    by_name = {
        condition.name: condition for condition in robustness.conditions(settings, robustness.SHOTS)
    }
    assert not any("instruction" in name for name in by_name)
    assert "0 examples" not in by_name
    assert by_name["examples of another task"].base == "unchanged"
    settings.data.variant = "def_pos_2"
    variant = robustness._with_shots(settings, 8)
    assert variant.data.variant == "def_pos_8"
    assert robustness._with_shots(settings, 0).data.variant == "def"
    settings.data.variant = "pos_4"
    assert robustness._with_shots(settings, 1).data.variant == "pos_1"


@pytest.mark.parametrize(
    ("difference", "interval", "same", "begins"),
    [
        (-9.0, [-12.0, -6.0], 40, "reads its text (-9.0 with another task's"),
        (-2.0, [-6.0, 2.0], 40, "shows NO EFFECT of its text on these tasks (-2.0 with"),
        (0.0, [0.0, 0.0], 40, "shows NO EFFECT of its text"),
        (-2.0, None, 40, "shows NO EFFECT of its text on these tasks (-2.0 with"),
        (
            0.0,
            [0.0, 0.0],
            100,
            "IGNORES its text: all predictions are the same with another task's",
        ),
        (3.0, [1.0, 5.0], 40, "is MISLED by its text: it is better with another task's"),
    ],
)
def test_verdicts(
    difference: float, interval: list[float] | None, same: float, begins: str
) -> None:
    line = {"difference": difference, "interval": interval, "same_predictions": same, "tasks": 24}
    verdict = tables.verdict(line, "its text")
    assert verdict.startswith(begins)
    assert verdict.endswith(f"24 tasks; {same} % of predictions are the same)")


def test_invalid_input(reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["robustness", "--workdir", str(reader), "--out", str(tmp_path / "out")]
    assert "split 'unseen' is unknown" in tiny_runs.fails(capsys, *begin, "--gin.eval.split=unseen")
    assert "--shots" in tiny_runs.fails(capsys, *begin, "--shots=0,x")
    assert not (tmp_path / "out").exists()


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    report = {"splits": {"s": {"per_task": {"a": {"rows": 2, "rougeL": 1.0, "examples_shown": 0}}}}}
    rows = [{"split": "s", "mixture": "sni", "prediction": ""}]
    with pytest.raises(UserError, match=r"--metric: task a has no bleu; it has rougeL$"):
        robustness._result(report, rows, "bleu")
    assert robustness._result(report, rows, "").quality == {"s/a": 1.0}


def test_equal_conditions_are_evaluated_once(
    reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight and sixteen examples are the same conditioning where at most four fit."""
    evaluated: list[int] = []

    def count(run: Run, *_: Any) -> dict[int, Any]:
        evaluated.append(run.config.eval.shots)
        return {}

    def score(*_: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        row = {"split": "s", "mixture": "synthetic", "prediction": ""}
        scores = {"strict_match": 1.0, "examples_shown": 0}
        return {"splits": {"s": {"per_task": {"a": scores, "b": scores}}}}, [row]

    monkeypatch.setattr(evaluate, "predict", count)
    monkeypatch.setattr(evaluate, "score", score)
    run = runs.open(reader)
    run.config.eval.split = FIELDS["eval.split"]
    results = robustness.evaluate_conditions(run, epath.Path(tmp_path), shots=(0, 8, 16))
    assert {condition.shots for condition in results} == {0, 2, 8, 16}
    assert 8 in evaluated
    assert 16 not in evaluated
    assert json.dumps(robustness.report(results))


class Stopped(BaseException):
    """Stand-in for a kill: nothing catches it."""


def test_a_stopped_command_resumes(
    results: Path,
    reader: Path,
    blind: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command is stopped in its third condition; the second start repeats no prediction."""
    out, original, started = tmp_path / "out", evaluate.predict_rows, 0

    def predict_rows(*args: Any) -> Any:
        nonlocal started
        started += 1
        if started == 60:
            raise Stopped
        return original(*args)

    monkeypatch.setattr(evaluate, "predict_rows", predict_rows)
    with pytest.raises(Stopped):
        measure(out, reader, blind)
    capsys.readouterr()
    measure(out, reader, blind)
    printed = capsys.readouterr().out
    assert printed.count("24 of 24 tasks are complete") == 2
    assert printed.count("11 of 24 tasks are complete") == 1
    assert (out / "robustness.json").read_bytes() == (results / "robustness.json").read_bytes()
    assert not (out / "prediction_cache").exists()
