"""Files of inputs to files of outputs, after a kill too; kept adapters; five lines of Python."""

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
import runs
from hyper_t5 import cli, predict, serve
from hyper_t5.errors import UserError
from hyper_t5.serve import Model

TASKS: dict[str, dict[str, Any]] = {
    "copy": {"instruction": "copy the letters", "examples": [{"input": "a z", "output": "a"}]},
    "swap": {"instruction": "swap the first and last", "examples": []},
    "drop": {"instruction": "drop the first letter"},
}
INPUTS = ["a b c", "d e", "f", "g h i j", "k l", "m n o", "p q", "r s t u v w"]
FLAGS = ("--max-decode-length=4", "--batch=4")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, and a run on it as if trained."""
    folder = tmp_path_factory.mktemp("predict")
    runs.save_backbone(folder / "t5")
    lora = {"adapter__lora_targets": ("enc_self.value", "dec_mlp.wo"), "data__shots": (0, 2)}
    config = runs.make_config(system="hyper_lora", backbone__path=str(folder / "t5"), **lora)
    runs.untrained_run(config, folder / "run")
    for name, task in TASKS.items():
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(task))
    return folder


@pytest.fixture(scope="module")
def model(root: Path) -> Model:
    return hyper_t5.load(root / "run")


@pytest.fixture(scope="module")
def folders(root: Path, model: Model) -> list[Path]:
    """The adapters of TASKS as folders."""
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


def test_five_lines_say_what_the_command_writes(
    root: Path, model: Model, folders: list[Path], tmp_path: Path
) -> None:
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    assert cli.main(argv_of(root, folders, tmp_path)) == 0
    written = read(tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k != "output"} for row in written] == rows

    adapters = {name: model.adapt(task) for name, task in TASKS.items()}
    texts = [row["input"] for row in rows]
    each = [adapters[row["adapter"]] for row in rows]
    made = model.predict(texts, each, max_decode_length=4)
    assert made == [row["output"] for row in written]
    for name, adapter in adapters.items():
        alone = model.predict(texts, adapter, max_decode_length=4, batch=3)
        assert [x for x, row in zip(alone, rows, strict=True) if row["adapter"] == name] == [
            row["output"] for row in written if row["adapter"] == name
        ]
    # A file, a folder that was saved, and what was read are the same task.
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


def test_what_python_is_given_wrongly_is_told(root: Path, model: Model) -> None:
    adapter = model.adapt(TASKS["copy"])
    for call, expected in [
        (lambda: model.predict("a b", adapter), "give a list of texts"),
        (lambda: model.predict(["a", "b"], [adapter]), "2 inputs and 1 adapters"),
        (lambda: model.predict(["a"], adapter, batch=0), "batch is 0"),
        (lambda: model.predict(["a"], adapter, beam_size=2, temperature=1.0), "a beam draws"),
        (lambda: model.predict(["a"], adapter, on_long="split"), "on_long is 'split'"),
        (lambda: model.adapt({"examples": []}), "both empty"),
        (lambda: hyper_t5.load(root / "t5").adapt(TASKS["copy"]), "a hypermodel makes adapters"),
        (lambda: hyper_t5.load(root / "nowhere"), "nowhere: does not exist"),
    ]:
        with pytest.raises(UserError, match=expected):
            call()


def test_a_long_input_is_cut_and_told_or_refused(
    root: Path,
    model: Model,
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = model.adapt(TASKS["copy"])
    most = adapter.meta["input_length"]
    letters = " ".join("abcdefghij"[i % 10] for i in range(3 * most))
    ids = runs.vocabulary().encode(letters)
    cut = runs.vocabulary().decode(ids[: most - 1])
    with pytest.warns(UserWarning, match="1 of 2 inputs were longer"):
        made = model.predict([letters, cut], adapter, max_decode_length=4)
    assert made[0] == made[1]
    whole = model.predict([letters], adapter, max_decode_length=4, max_input_length=len(ids) + 1)
    with pytest.raises(UserError, match=rf"its input is {len(ids)} tokens and EOS"):
        model.predict([letters], adapter, max_input_length=len(ids), on_long="refuse")
    assert len(whole) == 1

    write(tmp_path / "in.jsonl", [{"input": "a"}, {"input": letters}])
    argv = argv_of(root, folders[:1], tmp_path)
    assert f"in.jsonl:2: its input is {len(ids)} tokens" in runs.fails(
        capsys, *argv, "--on-long=refuse"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    assert cli.main(argv) == 0
    assert "1 of 2 inputs were longer" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field", ["encoding=3", "input_length=-1", "text=[1,2,-3]", "task_number=[]", "text=5"]
)
def test_a_folder_that_says_what_cannot_be_is_told(
    model: Model, folders: list[Path], tmp_path: Path, field: str
) -> None:
    name, _, value = field.partition("=")
    adapter = model.load_adapter(folders[0])
    adapter.meta[name] = json.loads(value)
    adapter.save(tmp_path / "other")
    with pytest.raises(UserError, match=rf"other/adapter_spec\.json: meta\.{name} is"):
        model.adapt(tmp_path / "other")


# ------------------------------------------------------------------------------ what was done stays

KILLED = """
import os, signal, sys
from hyper_t5 import cli, predict

add = predict._Partial.add

def add_and_die(partial, number, text):
    add(partial, number, text)
    if len(partial.done) == 5:
        os.kill(os.getpid(), signal.SIGKILL)

predict._Partial.add = add_and_die
cli.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_after_the_rows_it_made(
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
    with partial.open("a") as file:  # and the half of a line
        file.write('[15, "a')

    # With other settings or another input they are other rows.
    for change in ("--max-decode-length=3", "--temperature=1.0"):
        assert "holds outputs of another input" in runs.fails(capsys, *argv, change)
    write(killed / "in.jsonl", rows_of()[1:])
    assert "out.jsonl.partial: holds outputs of another" in runs.fails(capsys, *argv)
    write(killed / "in.jsonl", rows_of())
    made: list[int] = []
    answers = Model.answers

    def counted(self: Model, rows: Any, *rest: Any, **named: Any) -> Any:
        made.extend(number for number, _, _ in rows)
        return answers(self, rows, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "answers", counted)
        capsys.readouterr()
        assert cli.main([*argv, "--batch=2"]) == 0
    assert "5 rows are done already" in capsys.readouterr().out
    assert len(made) == len(rows_of()) - 5
    assert (killed / "out.jsonl").read_text() == (whole / "out.jsonl").read_text()
    assert sorted(os.listdir(killed)) == ["in.jsonl", "out.jsonl"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    with predict._Partial(tmp_path / "out", {"input": "x"}) as one:
        one.add(3, "text")
        with (
            pytest.raises(UserError, match="another process writes"),
            predict._Partial(tmp_path / "out", {"input": "x"}),
        ):
            pass
    with predict._Partial(tmp_path / "out", {"input": "x"}) as other:
        assert other.done == {3: "text"}
    with (tmp_path / "out.partial").open("a") as file:
        file.write('[5, "ha')  # as a kill leaves it: not to be joined with what follows
    with predict._Partial(tmp_path / "out", {"input": "x"}) as other:
        other.add(4, "more")
    with predict._Partial(tmp_path / "out", {"input": "x"}) as other:
        assert other.done == {3: "text", 4: "more"}
    (tmp_path / "out.partial").write_text("[]\n[\n")
    with (
        pytest.raises(UserError, match=r"out\.partial: is damaged"),
        predict._Partial(tmp_path / "out", {"input": "x"}),
    ):
        pass


def test_only_a_window_of_the_input_is_encoded_at_a_time(
    root: Path, folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "WINDOW", 1)
    encode, sizes = Model.encode, list[int]()

    def counted(self: Model, rows: Any, *rest: Any) -> Any:
        sizes.append(len(rows))
        return encode(self, rows, *rest)

    monkeypatch.setattr(Model, "encode", counted)
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    assert cli.main(argv_of(root, folders, tmp_path)) == 0
    assert sizes == [4] * 4
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == list(range(len(rows)))


def test_empty_lines_are_passed_over_and_progress_is_told(
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


# ------------------------------------------------------------------------------------ kept adapters


def by_tasks(root: Path, tmp_path: Path, *flags: str) -> list[str]:
    argv = ["predict", f"--workdir={root / 'run'}", f"--task={root / 'tasks'}", *FLAGS]
    return [
        *argv,
        f"--input={tmp_path / 'in.jsonl'}",
        f"--output={tmp_path / 'out.jsonl'}",
        *flags,
    ]


def test_adapters_of_tasks_are_made_once_and_kept(
    root: Path,
    model: Model,
    folders: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "in.jsonl", rows_of(field="task"))
    calls: list[int] = []
    generate = serve._generate

    def counted(run: Any, shown: Any) -> Any:
        calls.append(len(shown))
        return generate(run, shown)

    monkeypatch.setattr(serve, "_generate", counted)
    assert cli.main(by_tasks(root, tmp_path)) == 0
    made = read(tmp_path / "out.jsonl")
    texts = [row["input"] for row in made]
    adapters = [model.adapt(TASKS[row["task"]]) for row in made]
    assert [row["output"] for row in made] == model.predict(texts, adapters, max_decode_length=4)
    calls.clear()

    kept = sorted((root / "run" / "adapters").iterdir())
    assert len(kept) == len(TASKS)
    assert cli.main(by_tasks(root, tmp_path)) == 0
    assert calls == []
    assert read(tmp_path / "out.jsonl") == made

    tensors = kept[1] / "adapter.safetensors"
    os.truncate(tensors, tensors.stat().st_size // 2)
    capsys.readouterr()
    assert cli.main(by_tasks(root, tmp_path)) == 0
    assert f"{kept[1]}" in capsys.readouterr().out
    assert calls == [1]
    assert read(tmp_path / "out.jsonl") == made
    # Another text, or weights, is another adapter.
    other = {**TASKS["copy"], "instruction": "copy them"}
    made_of = model.adapt_all([other, TASKS["copy"]], cache=root / "run" / "adapters")
    assert calls == [1, 1]
    assert len(list((root / "run" / "adapters").iterdir())) == len(TASKS) + 1
    assert made_of[0].meta["instruction"] == "copy them"


def test_tasks_that_are_not_there_are_told(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = write(tmp_path / "in.jsonl", [{"input": "a", "task": "other"}])
    assert "names one of copy, drop, swap" in runs.fails(capsys, *by_tasks(root, tmp_path))
    write(given, [{"input": "a", "task": "copy"}])
    twice = by_tasks(root, tmp_path, f"--task={root / 'tasks' / 'copy.json'}")
    assert "two are named copy" in runs.fails(capsys, *twice)
    (tmp_path / "none").mkdir()
    argv = [x for x in by_tasks(root, tmp_path) if not x.startswith("--task")]
    assert "give --task FILE" in runs.fails(capsys, *argv)
    empty = [*argv, f"--task={tmp_path / 'none'}"]
    assert "holds no .json files" in runs.fails(capsys, *empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "none"]


def test_drawn_outputs_hang_on_the_seed_and_the_line(
    root: Path, folders: list[Path], tmp_path: Path
) -> None:
    rows = rows_of()
    write(tmp_path / "in.jsonl", rows)
    made = []
    for flags in (["--seed=1"], ["--seed=1", "--batch=7"], ["--seed=2"]):
        assert cli.main(argv_of(root, folders, tmp_path, "--temperature=2.0", *flags)) == 0
        made.append([row["output"] for row in read(tmp_path / "out.jsonl")])
    assert made[0] == made[1] != made[2]


def test_many_tasks_to_a_call_are_what_each_is_alone(model: Model) -> None:
    together = model.adapt_all(list(TASKS.values()))
    for adapter, task in zip(together, TASKS.values(), strict=True):
        alone = model.adapt(task)
        assert adapter.meta == alone.meta
        for one, other in zip(*(_leaves(a) for a in (adapter, alone)), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def _leaves(adapter: serve.Adapter) -> list[np.ndarray]:
    return jax.tree.leaves(adapter.adapters)
