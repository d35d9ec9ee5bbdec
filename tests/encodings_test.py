"""Text files with a byte order mark, CRLF, another encoding, or huge numbers, in every reader."""

from __future__ import annotations

import codecs
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import workdir
from hyper_t5.data import task_rows, text_corpus
from hyper_t5.scoring import gpt2_bpe, predictions_io
from hyper_t5.t5.decoding import Sampling
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import read_overrides
from tests.support import tiny_runs
from tests.support.toy_tasks import sni_object

super_ni = pytest.importorskip("hyper_t5.tasks.super_ni")
pytestmark = pytest.mark.smoke

ROW: dict[str, Any] = {"split": "test", "mixture": "m", "task": "t", "id": "é", "category": "c"}
ROW |= {"prediction": "é", "references": ["é"], "track": "default"}


def _read_tsv(file: Path) -> Any:
    doc_tables = pytest.importorskip("hyper_t5.experiments.doc_tables")  # not in the wheel
    return list(doc_tables.read_tsv(file, _Cells))


def _sni_split(file: Path) -> Any:
    folder = tiny_runs.save_sni(file.parent / "sni")
    listing = folder / "splits" / "default" / "test_tasks.txt"
    listing.write_bytes(file.read_bytes())
    for name in ("é1", "é2"):
        (folder / "tasks" / f"{name}.json").write_text(json.dumps(tiny_runs.sni_task("task1_copy")))
    return list(super_ni.split_files(str(folder), "test"))


def _workdir(file: Path) -> Any:
    folder = file.parent / "run"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(file.read_bytes())
    return workdir.load_config(folder).data.text


class _Cells(tuple):
    _fields = ("a", "b")

    def __new__(cls, *cells: str) -> Any:
        return tuple.__new__(cls, cells)


# Input, its text, and the expected result.
READERS: dict[str, tuple[Callable[[Path], Any], str, Any]] = {
    "t.json": (task_rows.read_task_file, '{\n"instruction": "é"\n}\n', ("é", [])),
    "sni.json": (
        lambda file: task_rows.read_task_data(file).instruction,
        json.dumps(sni_object("é"), indent=1, ensure_ascii=False),
        "Definition of é.",
    ),
    "tasks.txt": (_sni_split, "é1\né2\n", ["é1", "é2"]),
    "a.gin": (
        lambda file: read_overrides(gin_files=[file])[0][:2],
        "data.text = é\n",
        ("data.text", "é"),
    ),
    "config.json": (_workdir, '{"data": {"text": "é"}}\n', "é"),
    "mine.py": (
        lambda file: config_lib.load(str(file)).data.text,
        "from hyper_t5 import config\ndef get_config(arg):\n"
        "    c = config.defaults()\n    c.data.text = 'é'\n    return c\n",
        "é",
    ),
    "p.jsonl": (
        lambda file: [row["id"] for row in predictions_io.read_predictions(file)],
        json.dumps(ROW, ensure_ascii=False) + "\n",
        ["é"],
    ),
    "d.jsonl": (lambda file: list(text_corpus.read_documents(file)), '{"text": "é"}\n', ["é"]),
    "d.txt": (lambda file: list(text_corpus.read_documents(file)), "é\na\n", ["é\na\n"]),
    "any.json": (files.read_json, '{"a": "é"}\n', {"a": "é"}),
    "any.txt": (files.read_text, "é\n", "é\n"),
    "t.tsv": (_read_tsv, "a\tb\né\tc\n", [("é", "c")]),
}
JSON = [name for name in READERS if name.endswith(".json") and name != "sni.json"]


@pytest.mark.parametrize("name", READERS)
def test_a_byte_order_mark_and_crlf_change_nothing(name: str, tmp_path: Path) -> None:
    read, text, expected = READERS[name]
    for content in (text, "\ufeff" + text, "\ufeff" + text.replace("\n", "\r\n")):
        folder = tmp_path / str(len(content))
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content.encode())
        assert read(folder / name) == expected
        if (folder / "sni").exists():
            (folder / "sni").rename(folder / f"sni{len(list(folder.iterdir()))}")


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("mine.py", "t.tsv")])
def test_another_encoding_is_named(name: str, tmp_path: Path) -> None:
    read, text, _ = READERS[name]
    for content in (text.encode("latin-1"), codecs.BOM_UTF16_LE + text.encode("utf-16-le")):
        folder = tmp_path / str(len(content))
        folder.mkdir()
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=r"not UTF-8; save (it|the file) as UTF-8"):
            read(folder / name)


@pytest.mark.parametrize("name", [*JSON, "p.jsonl", "d.jsonl"])
def test_a_number_of_thousands_of_digits_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_text('{"a": ' + "1" * 6000 + "}\n")
    with pytest.raises(UserError, match="a number of thousands of digits"):
        READERS[name][0](file)


@pytest.mark.parametrize("number", ["99999999999999999999", str(2**32), "9" * 6000])
def test_huge_seeds_are_refused(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="seed is"):
        Sampling(seed=int(number[:40]))
    for argv in (
        ["train", "--config=configs/quickstart.py", "--workdir=w", f"--gin.seed={number}"],
        ["predict", "--backbone=b", "--input=i", "--output=o", f"--seed={number}"],
        ["robustness", "--workdir=w", "--out=o", f"--seed={number}"],
        ["quickstart", f"--seeds={number}"],
    ):
        error = tiny_runs.fails(capsys, *argv)
        assert "seed" in error
        assert len(error) < 300


@pytest.mark.parametrize("field", ["train.steps", "optimizer.learning_rate", "data.shots"])
def test_huge_numbers_of_fields_are_refused(field: str) -> None:
    for number in ("1" * 25, "1" * 400, "1" * 6000):
        with pytest.raises(UserError, match=f"{field} expects") as error:
            config_lib.load("configs/quickstart.py", [f"{field}={number}"])
        assert len(str(error.value)) < 200


def test_decoded_text_is_printed_where_stdout_is_ascii(tmp_path: Path) -> None:
    code = (
        "from hyper_t5.utils.errors import UserError, handle_errors\n"
        "@handle_errors('x')\n"
        "def main():\n"
        "    print('caf\\u00e9 \\u2028')\n"
        "    raise UserError('\\u00e9')\n"
        "raise SystemExit(main())\n"
    )
    for settings in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        environment = {"PATH": "/usr/bin", "PYTHONCOERCECLOCALE": "0", **settings}
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=environment, timeout=120
        )
        assert (run.returncode, run.stdout) == (2, b"caf\\xe9 \\u2028\n"), run.stderr
        assert run.stderr == b"x: error: \\xe9\n"


def test_gpt2_merges_may_have_a_byte_order_mark(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")  # an extra
    merges = [f"{chr(97 + i % 26)} {chr(97 + i // 26)}" for i in range(3)]
    for mark in ("", "\ufeff"):
        (tmp_path / "merges.txt").write_text(mark + "#version: 0.2\n" + "\n".join(merges) + "\n")
        assert isinstance(gpt2_bpe.Gpt2Tokenizer(tmp_path / "merges.txt"), gpt2_bpe.Gpt2Tokenizer)
