"""Reading and atomic writing of local files, and copies of a bucket's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from hyper_t5 import runs, weights
from hyper_t5.data import text_corpus, tfrecord
from hyper_t5.data.vocab import load_vocab
from hyper_t5.utils import files, plots, safetensors_io
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket, tiny_runs


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[fake_bucket.Objects]:
    """Objects of all gs:// buckets; their copies go to a cache of this test."""
    with pytest.MonkeyPatch.context() as patch, fake_bucket.served(patch) as objects:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield objects


# ------------------------------------------------------------------------------------ reading


def test_text_with_a_byte_order_mark_and_any_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffé\r\n\nb\r\n".encode())
    assert files.read_text(file) == "é\n\nb\n"
    file.write_bytes(b'\xef\xbb\xbf{\r\n"a": 1}\r\n')
    assert files.read_json(file) == {"a": 1}
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8"):
        files.read_text(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.json: cannot be read \(No such file"),
        (b"\xff", r"a\.json, line 1: not UTF-8"),
        (b'{\n"a": oops}', r"a\.json, line 2: not valid JSON"),
        (b"", r"a\.json, line 1: not valid JSON"),
        (b"[1]", r"a\.json: must be a JSON object"),
        (b'{"a": "\\ud83d"}', r"a\.json: holds half a surrogate pair"),
        (b"[" * 100_000, r"a\.json: not valid JSON \(.*nested too deeply\)"),
        (b'{"a": ' + b"1" * 5000 + b"}", r"a\.json: not valid JSON \(a number of thousands"),
    ],
)
def test_bad_json(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_json(file)
    assert files.json_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
READERS: dict[str, Callable[[Path], Any]] = {
    "a.json": files.read_json,
    "a.txt": files.read_text,
    "rows.jsonl": lambda file: list(text_corpus.read_documents(file, on_bad_row="skip")),
    "c4.jsonl.gz": lambda file: list(text_corpus.read_documents(file)),
    "text.txt": lambda file: list(text_corpus.read_documents(file)),
    "a.tfrecord": lambda file: tfrecord.scan(file, on_bad_row="skip"),
    "spiece.model": lambda file: load_vocab(str(file)),
    "model.safetensors": safetensors_io.open_safetensors,
    "checkpoint": weights.load_backbone,
}


@pytest.mark.parametrize("name", READERS)
def test_git_lfs_pointers(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{name}: is a Git LFS pointer, .* run `git lfs pull`"):
        READERS[name](tmp_path / name)


# ------------------------------------------------------------------------------------ writing


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.jsonl"
    files.write_json_lines(file, [{"a": "é"}, {}])
    assert file.read_bytes() == '{"a": "é"}\n{}\n'.encode()

    def no_space() -> Iterator[bytes]:
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*a\.jsonl: No space left"):
        files.write_atomic(file, no_space())
    assert [child.name for child in file.parent.iterdir()] == ["a.jsonl"]
    assert file.read_bytes().endswith(b"{}\n")
    with pytest.raises(UserError, match=r"cannot write .*a\.jsonl/b: "):
        files.write_text(file / "b", "")


def test_check_writable(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "a")
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*new: is a folder"):
        files.check_writable(tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*file/a: "):
        files.check_writable(tmp_path / "file" / "a")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    with files.replaced_folder(target, ("a", "b")) as folder:
        (folder / "a").write_text("1")
    assert target.stat().st_mode == tmp_path.joinpath("new").stat().st_mode
    with files.replaced_folder(target, ("a", "b")) as folder:
        (folder / "b").write_text("2")
    assert [file.name for file in target.iterdir()] == ["b"]
    with pytest.raises(UserError, match="cannot be written"), files.replaced_folder(target, "b"):
        raise OSError(28, "No space left on device")
    assert (target / "b").read_text() == "2"
    with pytest.raises(UserError, match="already holds b"), files.replaced_folder(target, "a"):
        pass
    with pytest.raises(UserError, match="is a file"), files.replaced_folder(target / "b", "a"):
        pass
    assert [child.name for child in target.parent.iterdir()] == ["folder"]


# ------------------------------------------------------------------------------------ buckets


def test_copies_of_buckets(
    objects: fake_bucket.Objects, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert files.local_copy(tmp_path / "missing") == tmp_path / "missing"
    objects |= {"gs://b/t5/a": b"one", "gs://b/t5/deep/er/b": b"two", "gs://b/t5_other/c": b""}
    first = files.local_copy("gs:/b/t5")
    copied = {str(p.relative_to(first)): p.read_bytes() for p in first.rglob("*") if p.is_file()}
    assert copied == {"a": b"one", "deep/er/b": b"two"}
    assert first.name == "t5"
    assert "gs://b/t5: copying" in capsys.readouterr().out
    assert files.local_copy("gs://b/t5") == first
    assert not capsys.readouterr().out
    objects["gs://b/t5/a"] = b"new"
    second = files.local_copy("gs://b/t5")
    assert ((first / "a").read_bytes(), (second / "a").read_bytes()) == (b"one", b"new")
    assert not list(first.parent.parent.rglob("tmp*"))
    assert files.local_copy("gs://b/t5/a").read_bytes() == b"new"
    with pytest.raises(UserError, match="gs://b/no: no such file or folder in the bucket"):
        files.local_copy("gs://b/no")


def test_an_interrupted_copy_leaves_nothing(
    objects: fake_bucket.Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects |= {"gs://b/t5/a": b"one", "gs://b/t5/b": b"two"}
    copied: list[int] = []

    def interrupted(source: object, target: object, length: int) -> None:
        copied.append(length)
        if len(copied) == 2:
            raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", interrupted)
        with pytest.raises(UserError, match=r"gs://b/t5: cannot be copied .*: connection reset"):
            files.local_copy("gs://b/t5")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert (files.local_copy("gs://b/t5") / "b").read_bytes() == b"two"


def test_writing_to_a_bucket(objects: fake_bucket.Objects) -> None:
    from matplotlib import pyplot

    plots.save(pyplot.figure(), "gs://runs/report.png")
    assert objects["gs://runs/report.png"].startswith(b"\x89PNG")
    with files.replaced_folder("gs://runs/adapter", ("spec", "tensors")) as folder:
        (folder / "spec").write_bytes(b"s")
        (folder / "tensors").write_bytes(b"tensors")
    names = [name for name in objects if name.startswith("gs://runs/adapter/")]
    assert names == ["gs://runs/adapter/tensors", "gs://runs/adapter/spec"]


def test_a_backbone_and_its_vocabulary(objects: fake_bucket.Objects, tmp_path: Path) -> None:
    folder = tiny_runs.save_backbone(tmp_path / "t5")
    for file in folder.iterdir():
        objects[f"gs://b/t5/{file.name}"] = file.read_bytes()
    config = tiny_runs.make_config(backbone__path="gs://b/t5")
    remote = runs.load_backbone("gs://b/t5", config)
    local = runs.load_backbone(folder, config)
    assert remote.vocab.identity() == local.vocab.identity()
    jax.tree.map(np.testing.assert_array_equal, remote.params, local.params)


@pytest.mark.usefixtures("objects")
def test_errors_of_bucket_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForbiddenError(Exception):
        """Clients of buckets raise no OSError."""

    def refuse(*_: object, **__: object) -> None:
        raise ForbiddenError("403 no access")

    for name in ("open", "isdir", "exists"):
        monkeypatch.setattr(fake_bucket.Paths, name, refuse)
    with pytest.raises(UserError, match=r"copied from the bucket: 403 no access"):
        files.local_copy("gs://models/t5")
    with pytest.raises(UserError, match=r"cannot write gs://runs/a.json: 403"):
        files.write_json("gs://runs/a.json", {})
    with pytest.raises(UserError, match=r"gs://runs/a.json: cannot be read \(403"):
        files.read_json("gs://runs/a.json")
