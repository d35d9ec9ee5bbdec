"""Lazy tensors and the writer, against the safetensors library."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyper_t5.utils import safetensors_io
from hyper_t5.utils.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def arrays() -> dict[str, np.ndarray]:
    """Return arrays of each dtype of weights and masks, and of unusual names and shapes."""
    rng = np.random.default_rng(0)
    dtypes = [np.dtype(name) for name in ("float64", "float32", "float16", "bool")] + [BFLOAT16]
    values = {f"of/{d.name}": (rng.normal(size=(3, 4, 5)) * 9).astype(d) for d in dtypes}
    shapes: dict[str, tuple[int, ...]] = {'quo"te\né': (2, 3), "empty": (0, 3), "scalar": ()}
    return values | {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


def test_tensors_and_their_rows(tmp_path: Path) -> None:
    safetensors_io.write_safetensors(tmp_path / "x", arrays(), {"format": "pt"})
    save_file(arrays(), tmp_path / "library", {"format": "pt"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "library").read_bytes()
    tensors = safetensors_io.open_safetensors(tmp_path / "x")
    assert tensors.keys() == arrays().keys()
    for name, array in arrays().items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype.name)
        np.testing.assert_array_equal(tensor.read(), array)
        if array.ndim == 3:
            matrix = tensor.layer(1).transposed()
            assert matrix.shape == (5, 4)
            np.testing.assert_array_equal(tensor.read(slice(1, 3)), array[1:3])
            np.testing.assert_array_equal(tensor.read(slice(2, 9)), array[2:])
            np.testing.assert_array_equal(tensor.layer(2).read(), array[2])
            np.testing.assert_array_equal(matrix.read(), array[1].T)
            np.testing.assert_array_equal(matrix.read(slice(2)), array[1].T[:2])


def test_views_are_written_by_their_values(tmp_path: Path) -> None:
    """The library writes the memory of an array, whatever its strides."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    views = {"a": array.T, "b": array[:, ::-1], "c": array[0, 0]}
    safetensors_io.write_safetensors(tmp_path / "x", views)
    for name, stored in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(stored, views[name], strict=True)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_writer_in_any_order_and_by_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, str] | None
) -> None:
    monkeypatch.setattr(safetensors_io, "BLOCK", 40)  # several blocks per array
    stacked = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    plain = np.arange(30, dtype=np.float32).reshape(6, 5)
    expected = {"é plain": plain.T.copy(), "a": stacked.astype(BFLOAT16), "scalar": plain[0, 1]}
    save_file({k: np.asarray(v) for k, v in expected.items()}, tmp_path / "library", metadata)
    layout = {name: (array.dtype, array.shape) for name, array in expected.items()}
    with safetensors_io.SafetensorsWriter(tmp_path / "x", layout, metadata) as writer:
        writer.write("a", stacked[2], 2)
        writer.write("scalar", plain[0, 1])
        writer.write("é plain", plain.T)
        for layer in (0, 1):
            writer.write("a", stacked[layer], layer)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "library").read_bytes()
    with (
        pytest.raises(AssertionError, match="210 bytes were not written"),
        safetensors_io.SafetensorsWriter(tmp_path / "x", {"a": layout["a"]}),
    ):
        pass


def test_errors_of_writing(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        safetensors_io.write_safetensors(tmp_path / "missing" / "x", arrays())


def raw(header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


HUGE = {"dtype": "F32", "shape": [2**21, 2**20], "data_offsets": [0, 2**43]}
MORE = {"dtype": "F32", "shape": [2**21, 2**20], "data_offsets": [0, 8]}
OUTSIDE = {"dtype": "F32", "shape": [2], "data_offsets": [64, 72]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95",  # a pickle
        struct.pack("<Q", 2**40) + b"{}",
        raw({"a": HUGE}, bytes(8)),
        raw({"a": MORE}, bytes(8)),
        raw({"a": OUTSIDE}, bytes(8)),
        raw({"a": {**MORE, "shape": [-2]}}, bytes(8)),
        raw({"a": {**MORE, "dtype": "OBJECT"}}, bytes(8)),
        raw({"a": {**MORE, "shape": [2]}}, bytes(7)),
    ],
)
def test_damaged_and_hostile_files(tmp_path: Path, content: bytes) -> None:
    """They are refused before the declared 8 TB are allocated."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or not a safetensors"):
        safetensors_io.open_safetensors(file)


def test_files_that_change_after_they_were_opened(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file(arrays(), file)
    tensor = safetensors_io.open_safetensors(file)["of/float32"]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: "):
        tensor.read()
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read: "):
        tensor.read(slice(1))
