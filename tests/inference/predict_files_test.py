"""Prediction from files and from Python; resumption after a kill; adapters of task files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hyper_t5
from hyper_t5 import cli
from hyper_t5.inference import predict_files
from hyper_t5.inference.predictor import Predictor
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

TASKS: dict[str, dict[str, Any]] = {
    "copy": {"instruction": "copy the letters", "examples": [{"input": "a z", "output": "a"}]},
    "swap": {"instruction": "swap the first and last", "examples": []},
    "drop": {"instruction": "drop the first letter"},
}
INPUTS = ["a b c", "d e", "f", "g h i j", "k l", "m n o", "p q", "r s t u v w"]
FLAGS = ("--max-decode-length=4", "--batch=4")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a backbone, and a run on it as if trained."""
    folder = tmp_path_factory.mktemp("predict")
    tiny_runs.save_backbone(folder / "t5")
    lora = {"adapter__lora_targets": ("enc_self.value", "dec_mlp.wo"), "data__shots": (0, 2)}
    config = tiny_runs.make_config(system="hyper_lora", backbone__path=str(folder / "t5"), **lora)
    tiny_runs.untrained_run(config, folder / "run")
    for name, task in TASKS.items():
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Predictor:
    return hyper_t5.load(root / "run")


@pytest.fixture(scope="module")
def folders(root: Path, model: Predictor) -> list[Path]:
    """Save the adapters of TASKS."""
    return [model.adapt(task).save(root / name) for name, task in TASKS.items()]


def write(file: Path, rows: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def rows_of(names: Sequence[str] = tuple(TASKS), field: str = "adapter") -> list[dict[str, Any]]:
    return [{"input": x, field: names[i % len(names)], "id": i} for i, x in enumerate(INPUTS * 2)]


def argv_of(root: Path, folders: Sequence[Path], folder: Path, *flags: str) -> list[str]:
    argv = ["predict", f"--backbone={root / 't5'}", *(f"--adapter={path}" for path in folders)]
    argv += [f"--input={folder / 'in.jsonl'}", f"--output={folder / 'out.jsonl'}"]
    return [*argv, *FLAGS, *flags]


# ----------------------------------------------------------------------------------- from Python


def test_python_and_the_command_predict_the_same(
    root: Path, model: Predictor, folders: list[Path], tmp_path: Path
) -> None:
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    assert cli.main(argv_of(root, folders, tmp_path)) == 0
    written = read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "output"} for row in written] == rows

    adapters = {name: model.adapt(task) for name, task in TASKS.items()}
    texts = [row["input"] for row in rows]
    each = [adapters[row["adapter"]] for row in rows]
    outputs = model.predict(texts, each, max_decode_length=4)
    assert outputs == [row["output"] for row in written]
    for name, adapter in adapters.items():
        alone = model.predict(texts, adapter, max_decode_length=4, batch=3)
        assert [x for x, row in zip(alone, rows, strict=True) if row["adapter"] == name] == [
            row["output"] for row in written if row["adapter"] == name
        ]
    # A task file, a saved folder and a dict are the same task.
    assert model.adapt(root / "tasks" / "copy.json").meta == adapters["copy"].meta
    assert model.predict(texts, model.adapt(folders[0]), max_decode_length=4) == model.predict(
        texts, adapters["copy"], max_decode_length=4
    )
    base = hyper_t5.load(root / "t5")
    plain = base.predict(texts, max_decode_length=4)
    assert plain == model.predict(texts, max_decode_length=4)
    assert plain != model.predict(texts, adapters["swap"], max_decode_length=4)
    assert base.predict(texts, base.adapt(folders[1]), max_decode_length=4) == model.predict(
        texts, adapters["swap"], max_decode_length=4
    )
    assert model.predict([], adapters["copy"]) == []


def test_invalid_arguments_are_refused(root: Path, model: Predictor) -> None:
    adapter = model.adapt(TASKS["copy"])
    for call, expected in [
        (lambda: model.predict("a b", adapter), "use a list of texts"),
        (lambda: model.predict(["a", "b"], [adapter]), "2 inputs and 1 adapters"),
        (lambda: model.predict(["a"], adapter, batch=0), "batch is 0"),
        (
            lambda: model.predict(["a"], adapter, beam_size=2, temperature=1.0),
            "a beam samples nothing",
        ),
        (lambda: model.predict(["a"], adapter, on_long="split"), "on_long is 'split'"),
        (lambda: model.adapt({"examples": []}), "both empty"),
        (
            lambda: hyper_t5.load(root / "t5").adapt(TASKS["copy"]),
            "a hypermodel generates adapters",
        ),
        (lambda: hyper_t5.load(root / "nowhere"), "nowhere: does not exist"),
    ]:
        with pytest.raises(UserError, match=expected):
            call()


def test_a_long_input_is_truncated_with_a_warning_or_refused(
    root: Path,
    model: Predictor,
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = model.adapt(TASKS["copy"])
    longest = adapter.meta["input_length"]
    letters = " ".join("abcdefghij"[i % 10] for i in range(3 * longest))
    ids = tiny_runs.vocabulary().encode(letters)
    cut = tiny_runs.vocabulary().decode(ids[: longest - 1])
    with pytest.warns(UserWarning, match="1 of 2 inputs were longer"):
        first, second = model.predict([letters, cut], adapter, max_decode_length=4)
    assert first == second
    whole = model.predict([letters], adapter, max_decode_length=4, max_input_length=len(ids) + 1)
    with pytest.raises(UserError, match=rf"its input has {len(ids)} tokens and EOS"):
        model.predict([letters], adapter, max_input_length=len(ids), on_long="refuse")
    assert len(whole) == 1

    write(tmp_path / "in.jsonl", [{"input": "a"}, {"input": letters}])
    argv = argv_of(root, folders[:1], tmp_path)
    assert f"in.jsonl:2: its input has {len(ids)} tokens" in tiny_runs.fails(
        capsys, *argv, "--on-long=refuse"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert cli.main(argv) == 0
    assert "1 of 2 inputs were longer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field", ["encoding=3", "input_length=-1", "text=[1,2,-3]", "task_number=[]", "text=5"]
)
def test_a_folder_with_an_invalid_record_is_refused(
    model: Predictor, folders: list[Path], tmp_path: Path, field: str
) -> None:
    name, _, value = field.partition("=")
    adapter = model.load_adapter(folders[0])
    adapter.meta[name] = json.loads(value)
    adapter.save(tmp_path / "other")
    with pytest.raises(UserError, match=rf"other/adapter_spec\.json: meta\.{name} is"):
        model.adapt(tmp_path / "other")


# ---------------------------------------------------------------------------------- resumption

KILLED = """
import os, signal, sys
from hyper_t5 import cli
from hyper_t5.inference.predict_files import _PartialOutput

add = _PartialOutput.add

def add_and_die(partial, number, text):
    add(partial, number, text)
    if len(partial.done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

_PartialOutput.add = add_and_die
cli.main(sys.argv[1:])
"""


def test_a_killed_command_resumes_after_its_finished_rows(
    root: Path, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        write(folder / "in.jsonl", rows_of())
    assert cli.main(argv_of(root, folders, whole)) == 0
    argv = argv_of(root, folders, killed)
    done = subprocess.run([sys.executable, "-c", KILLED, *argv], capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = killed / "out.jsonl.partial"
    assert sorted(os.listdir(killed)) == ["in.jsonl", "out.jsonl.partial"]
    assert len(partial.read_text().splitlines()) == 6  # a header, and five rows
    with partial.open("a") as file:  # an incomplete line
        file.write('[15, "a')

    # Rows of other settings or of another input are not reused.
    for change in ("--max-decode-length=3", "--temperature=1.0"):
        assert "holds outputs of another input" in tiny_runs.fails(capsys, *argv, change)
    write(killed / "in.jsonl", rows_of()[1:])
    assert "out.jsonl.partial: holds outputs of another" in tiny_runs.fails(capsys, *argv)
    write(killed / "in.jsonl", rows_of())
    numbers: list[int] = []
    predict_rows = Predictor.predict_rows

    def counted(self: Predictor, rows: Any, *rest: Any, **named: Any) -> Any:
        numbers.extend(number for number, _, _ in rows)
        return predict_rows(self, rows, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "predict_rows", counted)
        capsys.readouterr()
        assert cli.main([*argv, "--batch=2"]) == 0
    assert "5 rows are done already" in capsys.readouterr().out
    assert len(numbers) == len(rows_of()) - 5
    assert (killed / "out.jsonl").read_text() == (whole / "out.jsonl").read_text()
    assert sorted(os.listdir(killed)) == ["in.jsonl", "out.jsonl"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with predict_files._PartialOutput(tmp_path / "out", {"input": "x"}) as partial:
        partial.add(3, "text")
        with (
            pytest.raises(UserError, match="another process writes"),
            predict_files._PartialOutput(tmp_path / "out", {"input": "x"}),
        ):
            pass
    with predict_files._PartialOutput(tmp_path / "out", {"input": "x"}) as other:
        assert other.done == {3: "text"}
    with (tmp_path / "out.partial").open("a") as file:
        file.write('[5, "ha')  # as after a kill; the next line does not continue it
    with predict_files._PartialOutput(tmp_path / "out", {"input": "x"}) as other:
        other.add(4, "more")
    with predict_files._PartialOutput(tmp_path / "out", {"input": "x"}) as other:
        assert other.done == {3: "text", 4: "more"}
    (tmp_path / "out.partial").write_text("[]\n[\n")
    with (
        pytest.raises(UserError, match=r"out\.partial: is damaged"),
        predict_files._PartialOutput(tmp_path / "out", {"input": "x"}),
    ):
        pass


def test_only_a_window_of_the_input_is_encoded_at_a_time(
    root: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict_files, "WINDOW", 1)
    encode, sizes = Predictor.encode, list[int]()

    def counted(self: Predictor, rows: Any, *rest: Any) -> Any:
        sizes.append(len(rows))
        return encode(self, rows, *rest)

    monkeypatch.setattr(Predictor, "encode", counted)
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    assert cli.main(argv_of(root, folders, tmp_path)) == 0
    assert sizes == [4] * 4
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(len(rows)))


def test_empty_lines_are_skipped_and_progress_is_printed(
    root: Path, folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.dumps({"input": text}, ensure_ascii=False) for text in ("a\u2028b", "c", "d e")]
    (tmp_path / "in.jsonl").write_text("\ufeff" + "\n\n".join(rows), encoding="utf-8")
    assert cli.main(argv_of(root, folders[:1], tmp_path)) == 0
    assert [row["input"] for row in read(tmp_path / "out.jsonl")] == ["a\u2028b", "c", "d e"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("predict: row 3/3  ")
    assert "rows/s" in line
    assert "tokens/s" in line


# ------------------------------------------------------------------------------ adapters of tasks


def by_tasks(root: Path, tmp_path: Path, *flags: str) -> list[str]:
    argv = ["predict", f"--workdir={root / 'run'}", f"--task={root / 'tasks'}", *FLAGS]
    return [
        *argv,
        f"--input={tmp_path / 'in.jsonl'}",
        f"--output={tmp_path / 'out.jsonl'}",
        *flags,
    ]


def test_tasks_of_a_run_predict_as_from_python(
    root: Path, model: Predictor, tmp_path: Path
) -> None:
    rows = rows_of(field="task")
    write(tmp_path / "in.jsonl", rows)
    assert cli.main(by_tasks(root, tmp_path)) == 0
    outputs = [row["output"] for row in read(tmp_path / "out.jsonl")]
    adapters = {name: model.adapt(task) for name, task in TASKS.items()}
    texts, each = zip(*((row["input"], adapters[row["task"]]) for row in rows), strict=True)
    assert outputs == model.predict(texts, each, max_decode_length=4)


def test_missing_and_ambiguous_tasks_are_refused(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "in.jsonl", [{"input": "a", "task": "other"}])
    assert "names one of copy, drop, swap" in tiny_runs.fails(capsys, *by_tasks(root, tmp_path))
    write(rows, [{"input": "a", "task": "copy"}])
    twice = by_tasks(root, tmp_path, f"--task={root / 'tasks' / 'copy.json'}")
    assert "two are named copy" in tiny_runs.fails(capsys, *twice)
    (tmp_path / "none").mkdir()
    argv = [x for x in by_tasks(root, tmp_path) if not x.startswith("--task")]
    assert "add --task FILE" in tiny_runs.fails(capsys, *argv)
    empty = [*argv, f"--task={tmp_path / 'none'}"]
    assert "holds no .json files" in tiny_runs.fails(capsys, *empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "none"]


def test_samples_depend_on_seed_and_line_only(
    root: Path, folders: list[Path], tmp_path: Path
) -> None:
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    samples = []
    for flags in (["--seed=1"], ["--seed=1", "--batch=7"], ["--seed=2"]):
        assert cli.main(argv_of(root, folders, tmp_path, "--temperature=2.0", *flags)) == 0
        samples.append([row["output"] for row in read(tmp_path / "out.jsonl")])
    assert samples[0] == samples[1] != samples[2]


def test_tasks_of_one_call_equal_separate_calls(model: Predictor) -> None:
    together = model.adapt_all(list(TASKS.values()))
    for adapter, task in zip(together, TASKS.values(), strict=True):
        alone = model.adapt(task)
        assert adapter.meta == alone.meta
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
            adapter.adapters,
            alone.adapters,
        )
