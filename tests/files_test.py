"""What lies in a bucket, on this machine's disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import bucket
import runs
from hyper_t5 import files, model, plots
from hyper_t5.errors import UserError


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[bucket.Objects]:
    """What is in every gs:// bucket; copies of it go to a cache of this test's own."""
    with pytest.MonkeyPatch.context() as patch, bucket.served(patch) as objects:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        yield objects


def test_what_is_here_is_taken_as_it_is(tmp_path: Path) -> None:
    assert files.local_copy(tmp_path / "not_there") == tmp_path / "not_there"


def test_a_folder_is_copied_once_and_again_when_it_changes(
    objects: bucket.Objects, capsys: pytest.CaptureFixture[str]
) -> None:
    objects |= {"gs://b/t5/a": b"one", "gs://b/t5/deep/er/b": b"two", "gs://b/t5_other/c": b""}
    first = files.local_copy("gs://b/t5")
    found = {str(p.relative_to(first)): p.read_bytes() for p in first.rglob("*") if p.is_file()}
    assert found == {"a": b"one", "deep/er/b": b"two"}
    assert first.name == "t5"
    assert "gs://b/t5: copying" in capsys.readouterr().out
    assert files.local_copy("gs://b/t5") == first
    assert not capsys.readouterr().out
    objects["gs://b/t5/a"] = b"new"
    second = files.local_copy("gs://b/t5")
    assert ((first / "a").read_bytes(), (second / "a").read_bytes()) == (b"one", b"new")
    assert not list(first.parent.parent.rglob("tmp*"))


def test_a_file(objects: bucket.Objects) -> None:
    objects["gs://b/spiece.model"] = b"pieces"
    assert files.local_copy("gs://b/spiece.model").read_bytes() == b"pieces"


def test_nothing_is_there(objects: bucket.Objects) -> None:
    with pytest.raises(UserError, match="gs://b/no: no such file or folder in the bucket"):
        files.local_copy("gs://b/no")


def test_a_copy_that_breaks_off_leaves_nothing(
    objects: bucket.Objects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects |= {"gs://b/t5/a": b"one", "gs://b/t5/b": b"two"}
    copied: list[int] = []

    def breaks(there: object, here: object, length: int) -> None:
        copied.append(length)
        if len(copied) == 2:
            raise OSError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfileobj", breaks)
        with pytest.raises(UserError, match=r"gs://b/t5: cannot be copied .*: connection reset"):
            files.local_copy("gs://b/t5")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert (files.local_copy("gs://b/t5") / "b").read_bytes() == b"two"


def test_a_backbone_and_its_vocabulary(objects: bucket.Objects, tmp_path: Path) -> None:
    folder = runs.save_backbone(tmp_path / "t5")
    for file in folder.iterdir():
        objects[f"gs://b/t5/{file.name}"] = file.read_bytes()
    config = runs.make_config(backbone__path="gs://b/t5")
    there = model.load_backbone("gs://b/t5", config)
    here = model.load_backbone(folder, config)
    assert there.vocab.identity() == here.vocab.identity()
    jax.tree.map(np.testing.assert_array_equal, there.params, here.params)


def test_a_figure(objects: bucket.Objects) -> None:
    from matplotlib import pyplot

    plots.save(pyplot.figure(), "gs://runs/eval/report.png")
    assert objects["gs://runs/eval/report.png"].startswith(b"\x89PNG")


@pytest.mark.usefixtures("objects")
def test_errors_of_the_buckets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForbiddenError(Exception):
        """As clients of buckets have: no OSError."""

    def refuse(*_: object, **__: object) -> None:
        raise ForbiddenError("403 no access")

    for name in ("open", "isdir", "exists"):
        monkeypatch.setattr(bucket.Paths, name, refuse)
    with pytest.raises(UserError, match=r"copied from the bucket: 403 no access"):
        files.local_copy("gs://models/t5")
    with pytest.raises(UserError, match=r"cannot write gs://runs/a.json: 403"):
        files.write_json("gs://runs/a.json", {})
    with pytest.raises(UserError, match=r"gs://runs/a.json: cannot be read \(403"):
        files.read_json("gs://runs/a.json")
