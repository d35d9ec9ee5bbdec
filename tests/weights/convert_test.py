"""Conversions between T5X, Hugging Face and native folders: exact, verified, and atomic."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import serialization

from hyper_t5 import cli, t5, weights
from hyper_t5.data.vocab import ByteVocabulary, load_vocab
from hyper_t5.utils import safetensors_io
from hyper_t5.utils.errors import UserError
from hyper_t5.weights import t5x as t5x_format
from hyper_t5.weights.load import open_source
from tests.support import fake_bucket, tiny_runs
from tests.support.param_trees import (
    HF,
    T5_1_0,
    T5X,
    assert_equal,
    random_params,
    stored_arrays,
)
from tests.support.tiny_model import CONFIG, TIED

LAYOUTS = ("t5x", "scanned", "hf", "native")


def options(layout: str) -> dict[str, Any]:
    return {"to": "t5x", "scanned": True} if layout == "scanned" else {"to": layout}


def write(folder: Path, layout: str, config: t5.T5Config, params: Any) -> Path:
    weights.save_native(folder.with_name("first"), config, params)
    weights.convert(folder.with_name("first"), folder, **options(layout))
    shutil.rmtree(folder.with_name("first"))
    return folder


def array_files(folder: Path) -> dict[str, bytes]:
    """Read the files of a T5X checkpoint's arrays, hidden ones included."""
    files = [path for path in folder.glob("target.*/*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the chunk size of the golden checkpoint, in which larger arrays are several files."""
    monkeypatch.setattr(t5x_format, "CHUNK", 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_restores_the_files_of_t5x(
    tmp_path: Path, small_chunks: None, dtype: str
) -> None:
    first = weights.convert(T5X, tmp_path / "a", "native", dtype=dtype)
    weights.convert(tmp_path / "a", tmp_path / "b", "hf")
    weights.convert(tmp_path / "b", tmp_path / "c", "native")
    last = weights.convert(tmp_path / "c", tmp_path / "checkpoint_7", "t5x")
    assert first["digest"] == last["digest"]
    native = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert native[0] == native[1]
    storage = weights.STORAGE_DTYPES[dtype]
    golden = {path: array.astype(storage) for path, array in stored_arrays(T5X).items()}
    assert_equal(stored_arrays(tmp_path / "checkpoint_7"), golden)
    if dtype == "float32":
        assert_same_files(tmp_path / "checkpoint_7", T5X)


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Compare byte for byte, except for the optimizer state, which a backbone does not have."""
    assert array_files(ours) == array_files(theirs)
    trees = [
        serialization.msgpack_restore((folder / "checkpoint").read_bytes())
        for folder in (ours, theirs)
    ]
    assert list(trees[0]) == list(trees[1])
    assert trees[0]["version"] == trees[1]["version"] == 3
    our, their = (tree["optimizer"] for tree in trees)
    assert list(our) == list(their) == ["state", "target"]
    assert json.dumps(our["target"]) == json.dumps(their["target"])
    assert our["state"].keys() == {"step"}
    for state in (our["state"], their["state"]):
        assert (state["step"].dtype, state["step"].shape, int(state["step"])) == (np.int32, (), 7)


def test_bfloat16_files_equal_those_of_t5x(
    tmp_path: Path, shared_dir: Path, small_chunks: None
) -> None:
    theirs = shared_dir / "golden_t5x/bfloat16/checkpoint_7"
    summary = weights.convert(theirs, tmp_path / "checkpoint_7", "t5x")
    assert summary["dtype"] == "bfloat16"
    assert_same_files(tmp_path / "checkpoint_7", theirs)


@pytest.mark.parametrize(
    ("start", "config"), [("t5x", CONFIG), ("scanned", TIED), ("hf", CONFIG), ("native", TIED)]
)
def test_every_layout_to_every_other(tmp_path: Path, start: str, config: t5.T5Config) -> None:
    """Unequal depths and H*K != D; bfloat16 is kept."""
    params = random_params(config, ml_dtypes.bfloat16)
    write(tmp_path / "source", start, config, params)
    expected = stored_arrays(tmp_path / "source")
    for layout in LAYOUTS:
        summary = weights.convert(tmp_path / "source", tmp_path / layout, **options(layout))
        assert summary["digest"] == weights.digest(params)
        assert summary["dtype"] == "bfloat16"
        assert weights.read_config(tmp_path / layout) == config
        assert_equal(stored_arrays(tmp_path / layout), expected)
        assert open_source(tmp_path / layout).scanned == (layout == "scanned")


def test_another_dtype(tmp_path: Path) -> None:
    summary = weights.convert(HF, tmp_path / "b", "native", dtype="bfloat16")
    exact = stored_arrays(HF)
    assert_equal(
        stored_arrays(tmp_path / "b"), {k: v.astype(ml_dtypes.bfloat16) for k, v in exact.items()}
    )
    assert summary["digest"] == weights.digest(weights.load_backbone(tmp_path / "b")[1])
    wide = weights.convert(tmp_path / "b", tmp_path / "c", "native", dtype="float32")
    assert wide["digest"] == summary["digest"]
    assert {array.dtype.name for array in stored_arrays(tmp_path / "c").values()} == {"float32"}


def test_vocabularies(tmp_path: Path) -> None:
    weights.convert(T5X, tmp_path / "a", "native", vocab="bytes")
    weights.convert(tmp_path / "a", tmp_path / "b", "hf")
    weights.convert(tmp_path / "b", tmp_path / "c", "native")
    assert weights.load_backbone(tmp_path / "c")[2] == ByteVocabulary().identity()
    backbone, vocab = tiny_runs.save_backbone(tmp_path / "t5"), tiny_runs.vocabulary()
    weights.convert(backbone, tmp_path / "d", "hf")
    weights.convert(tmp_path / "d", tmp_path / "e", "native")
    for folder in (backbone, tmp_path / "d", tmp_path / "e"):  # sentencepiece
        identity = weights.load_backbone(folder)[2]
        assert identity is not None
        loaded = load_vocab(identity, folder)
        assert loaded.identity()["sha256"] == vocab.identity()["sha256"]
        assert loaded.size == vocab.size
    write(tmp_path / "small", "t5x", CONFIG, random_params(CONFIG))
    for source, to, message in (
        ("b", "native", r"--vocab: .*b has its own vocabulary"),
        ("b", "t5x", "--vocab: a T5X checkpoint stores no vocabulary"),
        ("small", "hf", r"has 259 ids, but model\.vocab_size is 60"),
    ):
        with pytest.raises(UserError, match=message):
            weights.convert(tmp_path / source, tmp_path / "f", to, vocab="bytes")
    assert not (tmp_path / "f").exists()


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Yield the target of a refused conversion, and check that nothing is left there."""
    yield tmp_path / "made/out"
    assert not list((tmp_path / "made").glob("*"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path: Path, out: Path, layout: str, value: float) -> None:
    params = random_params(CONFIG)
    params["decoder"]["layers"]["mlp"]["wo"]["kernel"][1, 2, 3] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "isfinite", lambda x: np.ones(np.shape(x), bool))
        write(tmp_path / "t5", layout, CONFIG, params)
    with pytest.raises(UserError, match=r"wo[/.].* is not finite in float32"):
        weights.convert(tmp_path / "t5", out, "native" if layout != "native" else "hf")


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_values_too_large_for_the_dtype(tmp_path: Path, out: Path) -> None:
    params = random_params(CONFIG)
    params["decoder"]["decoder_norm"]["scale"][3] = np.finfo(np.float32).max
    weights.save_native(tmp_path / "t5", CONFIG, params)
    with pytest.raises(UserError, match="decoder_norm/scale is not finite in bfloat16"):
        weights.convert(tmp_path / "t5", out, "hf", dtype="bfloat16")


@pytest.mark.parametrize("to", ["t5x", "hf", "native"])
def test_the_written_arrays_are_verified(
    tmp_path: Path, out: Path, to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk changes one bit of one array."""
    owner = t5x_format if to == "t5x" else safetensors_io.SafetensorsWriter
    name = "_write_zarr" if to == "t5x" else "write"
    write_array = getattr(owner, name)

    def write_wrong(*args: Any) -> None:
        args = tuple(
            np.where(np.arange(32) == 7, np.nextafter(a, np.float32(9)), a)
            if isinstance(a, np.ndarray) and a.shape == (32,)
            else a
            for a in args
        )
        write_array(*args)

    monkeypatch.setattr(owner, name, write_wrong)
    with pytest.raises(UserError, match=r"norm.* differs when it is read back"):
        weights.convert(T5X, out, to)


def test_which_folders_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = shutil.copytree(T5X, tmp_path / "checkpoint_7")  # has the names that ours would have
    with pytest.raises(UserError, match=r"already holds checkpoint"):
        weights.convert(HF, theirs, "t5x")
    assert array_files(theirs) == array_files(T5X)
    for _ in range(2):
        weights.convert(HF, tmp_path / "checkpoint_3", "t5x")
        weights.convert(HF, tmp_path / "hf", "hf", vocab="bytes")
    names = {"config.json", "model.safetensors", "tokenizer_config.json", "convert.json"}
    assert {p.name for p in (tmp_path / "hf").iterdir()} == names

    params, folder = random_params(T5_1_0), tmp_path / "native/t5"
    weights.save_native(folder, T5_1_0, jax.tree.map(lambda x: x + 1, params))
    weights.save_native(folder, T5_1_0, params)

    def disk_full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_io.SafetensorsWriter, "write", disk_full)
    with pytest.raises(UserError, match="No space left on device"):
        weights.save_native(folder, T5_1_0, jax.tree.map(lambda x: x + 2, params))
    assert_equal(weights.load_backbone(folder)[1], params)
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"already holds thesis\.tex"):
        weights.save_native(folder, T5_1_0, params)
    assert [p.name for p in folder.parent.iterdir()] == ["t5"]


def test_invalid_requests(tmp_path: Path) -> None:
    silu = dataclasses.replace(CONFIG, mlp_activations=("silu", "linear"))
    weights.save_native(tmp_path / "silu", silu, random_params(silu))
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (HF, {"to": "torch"}, "--to torch: is not one of t5x, hf, native"),
        (HF, {"to": "native", "scanned": True}, "--scanned: is a layout of T5X checkpoints"),
        (HF, {"to": "native", "dtype": "float16"}, "--dtype: 'float16' is not one of"),
        (HF, {"to": "native", "source_format": "t5x"}, "has the format hf, not t5x"),
        (tmp_path / "no", {"to": "hf"}, "no: does not exist"),
        (tmp_path / "silu", {"to": "hf"}, "cannot be written as a Hugging Face T5"),
    ]
    for source, fields, message in cases:
        with pytest.raises(UserError, match=message):
            weights.convert(source, tmp_path / "out", **fields)
    other = dataclasses.replace(T5_1_0, mlp_dim=41)
    with pytest.raises(UserError, match="mlp/wi/kernel has shape"):
        weights.save_native(tmp_path / "out", other, random_params(T5_1_0))
    assert not (tmp_path / "out").exists()


def test_from_a_bucket_into_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with fake_bucket.served(monkeypatch) as objects:
        for file in filter(Path.is_file, T5X.rglob("*")):
            objects[f"gs://b/t5/{file.relative_to(T5X).as_posix()}"] = file.read_bytes()
        summary = weights.convert("gs://b/t5", "gs://b/checkpoint_7", "t5x")
        weights.convert("gs://b/checkpoint_7", tmp_path / "local", "native")
    assert summary["digest"] == weights.digest(weights.load_backbone(tmp_path / "local")[1])
    assert_equal(stored_arrays(tmp_path / "local"), stored_arrays(T5X))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "t5"
    argv = ["convert", "--from=t5x", f"--input={T5X}", "--to=native", f"--out={out}"]
    assert cli.main([*argv, "--vocab=bytes", "--dtype=bfloat16"]) == 0
    captured = capsys.readouterr()
    assert "written: tensor 52/52" in captured.err
    assert "compared: tensor 52/52" in captured.err
    summary = json.loads(captured.out)
    assert summary == json.loads((out / "convert.json").read_text())
    assert (summary["from"]["format"], summary["to"]["format"]) == ("t5x", "native")
    assert (summary["tensors"], summary["parameters"]) == (52, 82560)
    assert summary["dtype"] == "bfloat16"
    assert summary["seconds"] > 0 < summary["peak_memory_mb"]
    error = tiny_runs.fails(capsys, "convert", f"--input={T5X}", f"--out={out}", "--to=gguf")
    assert "--to" in error


CHILD = """
import sys
from hyper_t5 import weights
from hyper_t5.utils import memory
import tensorstore
before = memory.peak_memory_mb()
summary = weights.convert(sys.argv[1], sys.argv[2], sys.argv[3])
print(before, summary["peak_memory_mb"], summary["parameters"])
"""


@pytest.mark.slow
def test_memory_is_that_of_some_arrays(tmp_path: Path) -> None:
    """A model of 400 MB in arrays of 8 MB, between all formats."""
    config = t5.T5Config(
        vocab_size=512, emb_dim=512, num_heads=8, mlp_dim=4096, num_encoder_layers=8
    )
    weights.save_native(tmp_path / "native", config, random_params(config))
    for source, to in (("native", "hf"), ("hf", "t5x"), ("t5x", "native")):
        argv = [str(tmp_path / source), str(tmp_path / f"of_{source}"), to]
        run = subprocess.run(
            [sys.executable, "-c", CHILD, *argv], check=True, capture_output=True, text=True
        )
        before, peak, parameters = map(float, run.stdout.split())
        assert parameters * 4 > 350e6
        assert peak - before < 150, (source, to)
        shutil.rmtree(tmp_path / source)
        (tmp_path / f"of_{source}").rename(tmp_path / to)
