"""``predict`` with pipes, devices, links and ``-``; a full disk."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hyper_t5
from hyper_t5 import cli
from hyper_t5.inference import predict_files
from hyper_t5.inference.predictor import Predictor
from hyper_t5.tools import quickstart
from hyper_t5.utils import files, streams
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

ROWS = [{"input": text} for text in ("a b c", "d e", "f")]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_runs.save_backbone(tmp_path_factory.mktemp("streams") / "t5")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with in.jsonl."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.fixture(autouse=True)
def tiny_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace decoding: the output of a row is its input in capitals."""

    def predict_rows(
        self: Predictor, rows: list[predict_files.PredictRow], *args: object, **kwargs: object
    ) -> Iterator[tuple[int, str]]:
        yield from ((row.number, row.text.upper()) for row in rows)

    monkeypatch.setattr(Predictor, "predict_rows", predict_rows)


def argv(backbone: Path, input: str | Path, output: str | Path) -> list[str]:
    return ["predict", f"--backbone={backbone}", f"--input={input}", f"--output={output}"]


def is_complete(text: str) -> bool:
    rows = [json.loads(line) for line in text.splitlines()]
    return rows == [{**row, "output": row["input"].upper()} for row in ROWS]


def through_fifo(file: Path, action: Callable[[], object]) -> str:
    """Run ``action`` while another thread reads a new FIFO; return what it reads."""
    os.mkfifo(file)
    contents: list[str] = []
    reader = threading.Thread(target=lambda: contents.append(file.read_text()), daemon=True)
    reader.start()
    action()
    reader.join(timeout=60)
    assert not reader.is_alive(), "nothing was written to the FIFO"
    return contents[0]


def test_a_fifo_as_output_is_written_to(backbone: Path, folder: Path) -> None:
    fifo = folder / "q"
    command = argv(backbone, folder / "in.jsonl", fifo)
    assert is_complete(through_fifo(fifo, lambda: cli.main(command)))
    assert fifo.is_fifo()
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "q"]


def test_a_device_as_output_is_written_to(backbone: Path, folder: Path) -> None:
    link = folder / "null"
    link.symlink_to("/dev/null")
    assert cli.main(argv(backbone, folder / "in.jsonl", link)) == 0
    assert link.is_symlink()
    assert link.is_char_device()
    link.unlink()
    link.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*null: No space left on device"):
        files.write_text(link, "a" * 10_000)


def test_a_linked_output_is_written_through(backbone: Path, folder: Path) -> None:
    (folder / "data").mkdir()
    link, target = folder / "link", folder / "data" / "target"
    for content in ("old", None):  # the second time the link dangles
        target.unlink(missing_ok=True)
        if content:
            target.write_text(content)
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert cli.main(argv(backbone, folder / "in.jsonl", link)) == 0
        assert link.is_symlink()
        assert is_complete(target.read_text())
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_dash_is_stdin_and_stdout(
    backbone: Path, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with open(folder / "in.jsonl", "rb") as file:
        stdin = os.dup(0)
        try:
            os.dup2(file.fileno(), 0)
            assert cli.main(argv(backbone, "-", "-")) == 0
        finally:
            os.dup2(stdin, 0)
            os.close(stdin)
    out, err = capfd.readouterr()
    assert is_complete(out)
    assert "predict: row 0/3" in err
    assert not Path("-").exists()


@pytest.mark.parametrize("kind", ["fifo", "process substitution"])
def test_an_input_that_can_be_read_once_is_read_whole(
    kind: str, backbone: Path, folder: Path
) -> None:
    content = (folder / "in.jsonl").read_bytes()
    if kind == "fifo":
        fifo = folder / "pipe"
        os.mkfifo(fifo)
        threading.Thread(target=lambda: fifo.write_bytes(content), daemon=True).start()
        path = str(fifo)
    else:
        reader, writer = os.pipe()
        os.write(writer, content)
        os.close(writer)
        path = f"/dev/fd/{reader}"
    assert cli.main(argv(backbone, path, folder / "out.jsonl")) == 0
    assert is_complete((folder / "out.jsonl").read_text())


def test_errors_of_a_pipe_name_the_pipe(
    backbone: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b'{"input": "a"}\n{"inptu": "b"}\n')
    os.close(writer)
    error = tiny_runs.fails(capsys, *argv(backbone, f"/dev/fd/{reader}", folder / "out.jsonl"))
    assert f'/dev/fd/{reader}:2: needs a field "input"' in error


def test_an_input_that_changes_is_an_error(
    backbone: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def predict_rows(
        self: Predictor, rows: object, *args: object, **kwargs: object
    ) -> list[object]:
        (folder / "in.jsonl").write_text('{"input": "a b c"}\n')
        return [(0, "A"), (1, "B"), (2, "C")]

    monkeypatch.setattr(Predictor, "predict_rows", predict_rows)
    error = tiny_runs.fails(capsys, *argv(backbone, folder / "in.jsonl", folder / "out.jsonl"))
    assert "in.jsonl: was changed while it was read" in error
    assert not (folder / "out.jsonl").exists()


def test_predictions_and_tasks_can_be_pipes(tmp_path: Path) -> None:
    row: dict[str, Any] = {"split": "test", "mixture": "sni", "task": "t", "id": "1"}
    row |= {"category": "", "prediction": "a", "references": ["a"], "track": "default"}
    for content, read in [
        (json.dumps(row), lambda path: hyper_t5.scoring.predictions_io.read_predictions(path)),
        ('{"a": 1}', files.read_json),
        ("text", files.read_text),
    ]:
        reader, writer = os.pipe()
        os.write(writer, content.encode())
        os.close(writer)
        assert read(f"/dev/fd/{reader}")


def test_the_first_error_of_a_full_disk_is_the_message(
    backbone: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def predict_rows(
        self: Predictor, rows: object, *args: object, **kwargs: object
    ) -> list[object]:
        return [(0, "A"), (1, "B" * 5000), (2, "C")]

    monkeypatch.setattr(Predictor, "predict_rows", predict_rows)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        error = tiny_runs.fails(capsys, *argv(backbone, folder / "in.jsonl", folder / "out.jsonl"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in error
    assert "free some space and run the command again" in error
    monkeypatch.undo()
    assert (folder / "out.jsonl.partial").read_text().count("\n") == 2


def test_an_adapter_named_by_a_dot_has_its_folders_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "mine").mkdir()
    monkeypatch.chdir(folder / "mine")
    (folder / "in.jsonl").write_text('{"input": "a", "adapter": "mine"}\n')
    with pytest.raises(UserError, match=r"adapter_spec\.json"):  # not: field "adapter" is 'mine'
        predict_files.predict(
            folder / "in.jsonl",
            folder / "out",
            hyper_t5.inference.predictor.GenerationConfig(),
            backbone=quickstart.shipped_backbone(),
            adapters=["."],
        )


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"a"
        raise UserError("bad row")

    with pytest.raises(UserError, match="bad row"):
        files.write_atomic(tmp_path / "a", chunks())
    assert not list(tmp_path.iterdir())
    assert not streams.is_stream(tmp_path / "a")


def test_stdout_that_is_redirected_to_a_file_is_appended_to(tmp_path: Path) -> None:
    code = "from hyper_t5.utils import files\nfiles.write_text('/dev/stdout', 'b\\n')\n"
    out = tmp_path / "out"
    out.write_text("a\n")
    with out.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file, check=True, timeout=120)
    assert out.read_text() == "a\nb\n"


def test_a_linked_folder_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with files.replaced_folder(tmp_path / "link", ()) as new:
        (new / "a").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target" / "a").exists()
