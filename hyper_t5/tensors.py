"""Arrays in files, read lazily and written as they come: .safetensors without the file in memory.

The format is a JSON header (names, dtypes, shapes, places) and the bytes of the arrays behind it.
The safetensors package checks the header against the file. The bytes are read and written here:
its own functions want all arrays of a file in memory at once, or map the file into it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from hyper_t5.errors import UserError

Shape = tuple[int, ...]
READ_ERRORS = (OSError, ValueError, SafetensorError)
BLOCK = 2**26  # bytes that are handled at once: no copy of a large array is ever whole
# In the order in which the format's own writer lays them out: wide ones first, so all are aligned.
_DTYPES = {
    "U64": np.dtype("uint64"),
    "I64": np.dtype("int64"),
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "U32": np.dtype("uint32"),
    "I32": np.dtype("int32"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("float16"),
    "U16": np.dtype("uint16"),
    "I16": np.dtype("int16"),
    "I8": np.dtype("int8"),
    "U8": np.dtype("uint8"),
    "BOOL": np.dtype("bool"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint that has not been read yet.

    Attributes:
      file: where it lies, for messages.
      shape: as it will be read.
      dtype: numpy's name of what is stored.
      load: rows of axis 0 -> their values; ``slice(None)`` is all, also of a scalar.
    """

    file: str
    shape: Shape
    dtype: str
    load: Callable[[slice], np.ndarray]

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """The values, or some rows; UserError naming the file when they cannot be had."""
        try:
            return self.load(rows)
        except READ_ERRORS as error:
            # Tensorstore appends its whole specification to what it says.
            reason = str(error).split(" [tensorstore_spec")[0]
            raise UserError(
                f"{self.file}: cannot be read: {reason}; copy the checkpoint again"
            ) from error

    def layer(self, index: int) -> Tensor:
        """Row ``index`` as an array of its own."""

        def load(rows: slice) -> np.ndarray:
            return self.load(slice(index, index + 1))[0][rows]

        return dataclasses.replace(self, shape=self.shape[1:], load=load)

    def transposed(self) -> Tensor:
        """With its two axes exchanged; rows of it are columns of the stored array."""

        def load(rows: slice) -> np.ndarray:
            return self.load(slice(None)).T[rows]

        return dataclasses.replace(self, shape=self.shape[::-1], load=load)


def of_array(array: np.ndarray, where: str = "parameters") -> Tensor:
    """An array in memory as a Tensor."""
    return Tensor(
        where, array.shape, array.dtype.name, lambda rows: array[rows] if array.ndim else array
    )


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in parts of whole rows, of about BLOCK bytes each."""
    if array.nbytes <= BLOCK or array.ndim == 0:
        yield array
        return
    rows = max(1, BLOCK * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The memory of an array in C order, as uint8 [bytes]: NaNs and bf16 compare like the rest."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# --------------------------------------------------------------------------------- safetensors


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """What a .safetensors file holds; shapes come from its header, values are read on demand.

    Raises:
      UserError: the file is missing, truncated, declares more than it holds, or is of another kind.
    """
    try:
        # Refuses headers whose shapes and places do not fill the file exactly, before any is used.
        with safe_open(str(file), framework="np"):
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError as error:
        raise UserError(f"{file}: does not exist; the folder is incomplete") from error
    except READ_ERRORS as error:
        raise UserError(
            f"{file}: is truncated or not a safetensors file ({error}); copy it again"
        ) from error
    header.pop("__metadata__", None)
    return {name: _stored(file, 8 + length, facts) for name, facts in sorted(header.items())}


def _stored(file: Path, start: int, facts: Mapping[str, Any]) -> Tensor:
    shape, code = tuple(facts["shape"]), facts["dtype"]
    place = start + facts["data_offsets"][0]
    if code not in _DTYPES:

        def unknown(rows: slice) -> np.ndarray:
            raise ValueError(f"values of type {code} are not known here")

        return Tensor(str(file), shape, code, unknown)
    load = functools.partial(_read_rows, file, place, shape, _DTYPES[code])
    return Tensor(str(file), shape, _DTYPES[code].name, load)


def _read_rows(file: Path, place: int, shape: Shape, dtype: np.dtype, rows: slice) -> np.ndarray:
    if shape:
        start, stop, _ = rows.indices(shape[0])
        place += start * math.prod(shape[1:]) * dtype.itemsize
        shape = (max(0, stop - start), *shape[1:])
    out = np.empty(shape, dtype)
    with file.open("rb") as stream:
        stream.seek(place)
        if stream.readinto(as_bytes(out).data) != out.nbytes:
            raise OSError("the file ends too early")
    return out


class SafetensorsWriter:
    """A .safetensors file whose arrays come one by one, in any order, whole or by layers.

    The file is that of the safetensors package, byte for byte. Use it as a context manager.

    Args:
      file: to write.
      layout: name -> (dtype, shape) of every array.
      metadata: of strings.
    """

    def __init__(
        self,
        file: Path,
        layout: Mapping[str, tuple[np.dtype, Shape]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self._layout = file, dict(layout)
        codes = list(_DTYPES)
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        ranked = sorted(self._layout, key=lambda n: (codes.index(_CODES[self._layout[n][0]]), n))
        self._places = {}
        for name in ranked:
            dtype, shape = self._layout[name]
            self._places[name] = end
            end += math.prod(shape) * dtype.itemsize
            offsets = [self._places[name], end]
            facts = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
            header[name] = facts
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start, self._end = 8 + len(raw), 8 + len(raw) + end
        self._missing = end
        self._stream = file.open("wb")
        self._stream.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """The values of one array, or of its row ``layer`` alone; cast to the dtype laid out."""
        dtype, shape = self._layout[name]
        place = self._start + self._places[name]
        if layer is not None:
            shape = shape[1:]
            place += layer * math.prod(shape) * dtype.itemsize
        assert array.shape == shape, (name, array.shape, shape)
        self._stream.seek(place)
        for block in blocks(array):
            # In C order: the memory of a transposed view has another.
            self._stream.write(as_bytes(block.astype(dtype, copy=False)).data)
        self._missing -= math.prod(shape) * dtype.itemsize

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._stream.close()
        if error is None:
            assert self._missing == 0, f"{self._file}: {self._missing} bytes were not written"


def write_safetensors(
    file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Writes arrays to a .safetensors file, reads them back and compares.

    Raises:
      UserError: what is on disk is not what was given.
    """
    layout = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(file, layout, metadata) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    written = open_safetensors(file)
    same = written.keys() == arrays.keys() and all(
        written[name].shape == array.shape
        and np.array_equal(as_bytes(written[name].read()), as_bytes(array))
        for name, array in arrays.items()
    )
    if not same:
        raise UserError(f"{file}: what was read back differs from what was written")
