"""Arrays in .safetensors files, against the safetensors package."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hyper_t5 import tensors
from hyper_t5.errors import UserError

KINDS: list[Any] = [
    *("float64", "float32", "float16", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8", "bool", ml_dtypes.bfloat16),
]


def arrays() -> dict[str, np.ndarray]:
    """One of every kind, a name that JSON must escape, an empty array and a scalar."""
    rng = np.random.default_rng(0)
    made = {
        f"of/{np.dtype(kind).name}": (rng.normal(size=(3, 4, 5)) * 9).astype(kind) for kind in KINDS
    }
    shapes: dict[str, tuple[int, ...]] = {'quo"te\né': (2, 3), "empty": (0, 3), "scalar": ()}
    return made | {name: np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_are_those_of_the_safetensors_package(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    save_file(arrays(), tmp_path / "theirs", metadata)
    tensors.write_safetensors(tmp_path / "ours", arrays(), metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    found = tensors.open_safetensors(tmp_path / "theirs")
    for name, array in arrays().items():
        tensor = found[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype.name)
        np.testing.assert_array_equal(tensor.read(), array)
        if array.ndim == 3:
            np.testing.assert_array_equal(tensor.read(slice(1, 3)), array[1:3])
            np.testing.assert_array_equal(tensor.layer(2).read(), array[2])
            np.testing.assert_array_equal(tensor.layer(1).transposed().read(), array[1].T)
            np.testing.assert_array_equal(
                tensor.layer(1).transposed().read(slice(2)), array[1].T[:2]
            )


def test_arrays_in_any_order_and_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "BLOCK", 40)  # several blocks an array
    stacked = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    plain = np.arange(30, dtype=np.float32).reshape(6, 5)
    short = np.dtype(ml_dtypes.bfloat16)
    layout = {"plain": (plain.dtype, (5, 6)), "stacked": (short, stacked.shape)}
    with tensors.SafetensorsWriter(tmp_path / "x", layout) as writer:
        writer.write("stacked", stacked[2], 2)
        writer.write("plain", plain.T)
        for layer in (0, 1):
            writer.write("stacked", stacked[layer], layer)
    found = load_file(tmp_path / "x")
    np.testing.assert_array_equal(found["plain"], plain.T)
    np.testing.assert_array_equal(found["stacked"], stacked.astype(short))


def test_an_array_that_was_forgotten(tmp_path: Path) -> None:
    layout = {"a": (np.dtype("float32"), (2,))}
    with (
        pytest.raises(AssertionError, match="8 bytes were not written"),
        tensors.SafetensorsWriter(tmp_path / "x", layout),
    ):
        pass


def test_transposed_views_are_written_right(tmp_path: Path) -> None:
    """The save_file of safetensors writes the memory as it lies."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensors.write_safetensors(tmp_path / "x.safetensors", {"a": array.T, "b": array[:, ::-1]})
    found = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["a"], array.T)
    np.testing.assert_array_equal(found["b"], array[:, ::-1])


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
    """Before anything of the declared 8 TB is allocated."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: is truncated or not a safetensors"):
        tensors.open_safetensors(file)
