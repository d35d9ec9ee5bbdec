"""Robustness: a system that reads its text and one that cannot are told apart, by the real run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from etils import epath

import runs
from hyper_t5 import changes, cli, config, evaluate, model, robustness, workdir
from hyper_t5.errors import UserError
from hyper_t5.files import read_json

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
    """The shipped backbone, trained with the text in front of every input."""
    from hyper_t5.quickstart import shipped_backbone

    folder, made = tmp_path_factory.mktemp("robustness") / "reader", quickstart_config("concat")
    made.backbone.path = str(shipped_backbone())
    workdir.check_resume(folder, made)
    return folder


@pytest.fixture(scope="module")
def deaf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One LoRA for all tasks: it is not told what the task is."""
    folder = tmp_path_factory.mktemp("robustness") / "deaf"
    return runs.untrained_run(quickstart_config("shared_lora"), folder)


def ask(out: Path, *folders: Path) -> Path:
    """The command; where it wrote what it found."""
    words = [word for folder in folders for word in ("--workdir", str(folder))]
    assert cli.main(["robustness", *words, "--out", str(out), "--shots", "0,1", *ARGS]) == 0
    return out


@pytest.fixture(scope="module")
def told(reader: Path, deaf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command finds of both."""
    return ask(tmp_path_factory.mktemp("robustness") / "out", reader, deaf)


def check_deaf(run: dict[str, Any]) -> None:
    assert len(run["verdicts"]) == 3
    assert all(said.startswith("IGNORES its ") for said in run["verdicts"])
    for line in run["askings"].values():
        assert (line["difference"], line["interval"]) == (0, [0, 0])
        assert line["same_answers"] == 100


def test_one_that_reads_and_one_that_cannot_are_told_apart(told: Path) -> None:
    reads, deaf = read_json(told / "robustness.json")["runs"]
    assert reads["system"] == "concat"
    assert reads["verdicts"][0].startswith("reads its conditioning (")
    assert reads["verdicts"][1].startswith("reads its instruction (")
    wrong = reads["askings"]["instruction of another task"]
    assert wrong["quality"] < 20 < 60 < reads["askings"]["unchanged"]["quality"]
    assert wrong["interval"][0] <= wrong["difference"] <= wrong["interval"][1] < 0
    assert wrong["difference"] == pytest.approx(
        wrong["quality"] - reads["askings"]["unchanged"]["quality"]
    )
    check_deaf(deaf)


@pytest.mark.slow
def test_a_hypermodel_whose_output_is_zero_is_found_out(tmp_path: Path) -> None:
    """HyperT5-LoRA as it starts reads the text, and makes nothing of it."""
    run = runs.untrained_run(quickstart_config("hyper_lora"), tmp_path / "zeroed", noise=0)
    (told,) = read_json(ask(tmp_path / "out", run) / "robustness.json")["runs"]
    check_deaf(told)


def test_all_is_asked_and_told(told: Path) -> None:
    made = read_json(told / "robustness.json")
    for run in made["runs"]:
        lines = run["askings"]
        assert list(lines) == ["unchanged", "1 example", "2 examples", *changes.CHANGES]
        assert [lines[name]["shown"] for name in list(lines)[:3]] == [0, 1, 2]
        assert lines["examples of another task"]["base"] == "2 examples"
        assert lines["examples of another task"]["shown"] == 2
        assert {line["tasks"] for line in lines.values()} == {24}
    assert (told / "robustness.png").read_bytes().startswith(b"\x89PNG")


def test_unchanged_is_what_evaluate_says(told: Path, reader: Path) -> None:
    loaded, m, backbone, params = model.load_run(reader, [], on_mesh=True)
    loaded.eval.split = FIELDS["eval.split"]
    loaded.eval.max_rows_per_task = loaded.eval.batch = 2
    report, _ = evaluate.evaluate(loaded, m, backbone, params)
    (split,) = report["splits"].values()
    unchanged = read_json(told / "robustness.json")["runs"][0]["askings"]["unchanged"]
    assert list(unchanged["per_task"].values()) == [
        scores["strict_match"] for scores in split["per_task"].values()
    ]


def test_what_is_not_shown_is_not_asked() -> None:
    """Without an instruction its changes are none, and there is no asking without an example."""
    made = quickstart_config("hyper_lora")
    made.data.use_instruction = False
    made.eval.shots = 4
    asked = {asking.name: asking for asking in robustness.askings(made, robustness.SHOTS)}
    assert not any("instruction" in name for name in asked)
    assert "0 examples" not in asked
    assert asked["examples of another task"].base == "unchanged"
    made.data.variant = "def_pos_2"
    changed = robustness._with_shots(made, 8)
    assert changed.data.variant == "def_pos_8"
    assert robustness._with_shots(made, 0).data.variant == "def"
    made.data.variant = "pos_4"
    assert robustness._with_shots(made, 1).data.variant == "pos_1"


@pytest.mark.parametrize(
    ("difference", "interval", "same", "begins"),
    [
        (-9.0, [-12.0, -6.0], 40, "reads its text (-9.0 with another task's"),
        (-2.0, [-6.0, 2.0], 40, "makes NO USE of its text that these tasks show (-2.0 with"),
        (0.0, [0.0, 0.0], 40, "makes NO USE of its text"),
        (-2.0, None, 40, "makes NO USE of its text that these tasks show (-2.0 with"),
        (0.0, [0.0, 0.0], 100, "IGNORES its text: all answers are the same with another task's"),
        (3.0, [1.0, 5.0], 40, "is MISLED by its text: it is better with another task's"),
    ],
)
def test_verdicts(
    difference: float, interval: list[float] | None, same: float, begins: str
) -> None:
    line = {"difference": difference, "interval": interval, "same_answers": same, "tasks": 24}
    said = robustness.verdict(line, "its text")
    assert said.startswith(begins)
    assert said.endswith(f"24 tasks; {same} % of answers stay the same)")


def test_mistakes(reader: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["robustness", "--workdir", str(reader), "--out", str(tmp_path / "out")]
    assert "split 'unseen' is none" in runs.fails(capsys, *begin, "--gin.eval.split=unseen")
    assert "--shots" in runs.fails(capsys, *begin, "--shots=0,x")
    assert not (tmp_path / "out").exists()


def test_a_metric_that_there_is_not_names_those_there_are() -> None:
    told = {"splits": {"s": {"per_task": {"a": {"rows": 2, "rougeL": 1.0, "examples_shown": 0}}}}}
    rows = [{"split": "s", "mixture": "sni", "prediction": ""}]
    with pytest.raises(UserError, match=r"--metric: task a has no bleu; it has rougeL$"):
        robustness._found(told, rows, "bleu")
    assert robustness._found(told, rows, "").quality == {"s/a": 1.0}


def test_what_reads_the_same_is_asked_once(
    reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen examples are as many as four where four fit."""
    asked: list[int] = []

    class Nothing:
        def rows(self) -> list[Any]:
            return []

    def count(subject: evaluate.Subject, *_: Any) -> Nothing:
        asked.append(subject.config.eval.shots)
        return Nothing()

    def judge(*_: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        row = {"split": "s", "mixture": "synthetic", "prediction": ""}
        scores = {"strict_match": 1.0, "examples_shown": 0}
        return {"splits": {"s": {"per_task": {"a": scores, "b": scores}}}}, [row]

    monkeypatch.setattr(evaluate, "answered", count)
    monkeypatch.setattr(evaluate, "judge", judge)
    subject, _ = evaluate.run_subject(reader)
    subject.config.eval.split = FIELDS["eval.split"]
    found = robustness.ask_all(subject, epath.Path(tmp_path), shots=(0, 8, 16))
    assert {asking.shots for asking in found} == {0, 2, 8, 16}
    assert 8 in asked
    assert 16 not in asked
    assert json.dumps(robustness.report(found))


class Stopped(BaseException):
    """As a kill: nobody catches it."""


def test_a_stopped_run_goes_on(
    told: Path,
    reader: Path,
    deaf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in its third asking, it ends as the other; what was answered is not asked again."""
    out, whole, began = tmp_path / "out", evaluate.answers_of, 0

    def answers(*args: Any) -> Any:
        nonlocal began
        began += 1
        if began == 60:
            raise Stopped
        return whole(*args)

    monkeypatch.setattr(evaluate, "answers_of", answers)
    with pytest.raises(Stopped):
        ask(out, reader, deaf)
    capsys.readouterr()
    ask(out, reader, deaf)
    said = capsys.readouterr().out
    assert said.count("24 of 24 tasks are judged") == 2
    assert said.count("11 of 24 tasks are judged") == 1
    assert (out / "robustness.json").read_bytes() == (told / "robustness.json").read_bytes()
    assert not (out / "answers").exists()
