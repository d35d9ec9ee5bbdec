"""Lazy tensors of checkpoints, and .safetensors files that are written tensor by tensor.

The safetensors library reads tensors and their rows. Its writer needs all tensors in memory, so
that `SafetensorsWriter` writes whole models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import check_no_pointer

Shape = tuple[int, ...]
READ_ERRORS = (OSError, ValueError, SafetensorError)
BLOCK = 2**26  # bytes processed at once, so that large arrays are not copied as a whole
# Code in the format -> numpy's name, of the dtypes of weights and masks; others keep their code.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
CODES = {name: code for code, name in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An array of a checkpoint that is read on demand.

    Attributes:
      file: its location, for messages.
      shape: shape of what `read` returns.
      dtype: numpy's name of the stored dtype, or its code in the format (see `DTYPES`).
      load: reads rows of axis 0; ``slice(None)`` reads all, also of a scalar.
    """

    file: str
    shape: Shape
    dtype: str
    load: Callable[[slice], np.ndarray]

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Read all values or some rows; UserError where the file cannot be read."""
        try:
            return self.load(rows)
        except READ_ERRORS as error:
            reason = str(error).split(" [tensorstore_spec")[0]  # TensorStore appends its whole spec
            raise UserError(
                f"{self.file}: cannot be read: {reason}; copy the checkpoint again"
            ) from error

    def layer(self, index: int) -> Tensor:
        """Return row ``index`` as a tensor."""
        row = slice(index, index + 1)
        return dataclasses.replace(
            self, shape=self.shape[1:], load=lambda rows: self.load(row)[0][rows]
        )

    def transposed(self) -> Tensor:
        """Return the transpose of a matrix; reading any row of it reads all of the matrix."""
        return dataclasses.replace(
            self, shape=self.shape[::-1], load=lambda rows: self.load(slice(None)).T[rows]
        )


def of_array(array: np.ndarray, file: str = "parameters") -> Tensor:
    """Return an array in memory as a tensor."""
    return Tensor(
        file, array.shape, array.dtype.name, lambda rows: array[rows] if array.ndim else array
    )


def blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield an array in parts of whole rows, of about BLOCK bytes each."""
    if array.nbytes <= BLOCK or array.ndim == 0:
        yield array
        return
    rows = max(1, BLOCK * len(array) // array.nbytes)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def as_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array's memory in C order, uint8 [bytes]; NaNs and bfloat16 can be compared."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def open_safetensors(file: Path) -> dict[str, Tensor]:
    """Read the header of a .safetensors file; the values of its tensors are read on demand.

    Raises:
      UserError: the file is missing, truncated, no safetensors file, or its header is wrong.
    """
    tensors = {}
    try:
        with safe_open(str(file), framework="np") as stored:
            for name in sorted(stored.keys()):
                view = stored.get_slice(name)
                shape, code = tuple(view.get_shape()), view.get_dtype()
                load = functools.partial(_read_rows, file, name, shape)
                tensors[name] = Tensor(str(file), shape, DTYPES.get(code, code), load)
    except FileNotFoundError as error:
        raise UserError(f"{file}: does not exist; the folder is incomplete") from error
    except READ_ERRORS as error:
        if file.is_file():
            check_no_pointer(file)
        raise UserError(
            f"{file}: is truncated or not a safetensors file ({error}); copy it again"
        ) from error
    return tensors


def _read_rows(file: Path, name: str, shape: Shape, rows: slice) -> np.ndarray:
    # Opened for each read: the pages of a mapped file count as memory of the process.
    with safe_open(str(file), framework="np") as stored:
        if rows == slice(None):
            return stored.get_tensor(name)
        start, stop, _ = rows.indices(shape[0])
        return stored.get_slice(name)[start:stop]


def write_safetensors(
    file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays to a .safetensors file; OSError where that fails."""
    try:  # the library writes the memory of an array, whatever its strides
        save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, file, metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from error


class SafetensorsWriter(contextlib.AbstractContextManager):
    """A .safetensors file that is written in any order, by tensors or by their layers.

    The file equals that of the safetensors library, byte for byte. Use it as a context manager.

    Args:
      file: path.
      layout: dtype, float32 or bfloat16, and shape of every tensor.
      metadata: metadata of the header.
    """

    def __init__(
        self,
        file: Path,
        layout: Mapping[str, tuple[np.dtype, Shape]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self._layout, self._offsets = file, dict(layout), {}
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in sorted(layout, key=lambda name: (-layout[name][0].itemsize, name)):
            dtype, shape = layout[name]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            self._offsets[name] = start
            fields = {"dtype": CODES[dtype.name], "shape": shape, "data_offsets": (start, end)}
            header[name] = fields
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        raw += b" " * (-len(raw) % 8)
        self._start, self._missing = 8 + len(raw), end
        self._stream = file.open("wb")
        self._stream.write(len(raw).to_bytes(8, "little") + raw)

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """Write a tensor, or only its row ``layer``, cast to the dtype of the layout."""
        dtype, shape = self._layout[name]
        offset = self._start + self._offsets[name]
        if layer is not None:
            shape = shape[1:]
            offset += layer * math.prod(shape) * dtype.itemsize
        assert array.shape == shape, (name, array.shape, shape)
        self._stream.seek(offset)
        for block in blocks(array):
            self._stream.write(as_bytes(block.astype(dtype, copy=False)).data)
        self._missing -= array.size * dtype.itemsize

    def __exit__(self, *exception: Any) -> None:
        self._stream.close()
        if exception == (None, None, None):
            assert self._missing == 0, f"{self._file}: {self._missing} bytes were not written"
