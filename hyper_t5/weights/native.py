"""Native folders: `config.json`, and `model.safetensors` with our paths, layers stacked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.files import read_json, write_json
from hyper_t5.names import layer_paths, param_shapes, stacked_path
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import SafetensorsWriter, open_safetensors
from hyper_t5.vocab import Vocabulary
from hyper_t5.weights.source import Source, by_layer, verify

FORMAT = "hyper_t5.backbone"
CONFIG, TENSORS = "config.json", "model.safetensors"
DtypeOf = Callable[[str], np.dtype]
Put = Callable[[str, np.ndarray], None]


def open_folder(root: Path) -> Source:
    """Reads sizes and header, and checks one with the other."""
    content = read_json(root / CONFIG)
    sizes = config_of(root)
    stacked = open_safetensors(root / TENSORS)
    verify(param_shapes(sizes), stacked, str(root / TENSORS))
    return Source("native", str(root), sizes, by_layer(stacked), content.get("vocab"))


def config_of(root: Path) -> T5Config:
    """The sizes, from config.json alone."""
    file = root / CONFIG
    fields = read_json(file).get("model")
    known = {field.name for field in dataclasses.fields(T5Config)}
    if not isinstance(fields, dict):
        raise UserError(f'{file}: lacks the object "model" with the fields of T5Config')
    if unknown := fields.keys() - known:
        raise UserError(f"{file}: model.{sorted(unknown)[0]} is no field of T5Config")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    like = T5Config()
    for name, value in values.items():
        if type(value) is not type(getattr(like, name)):
            wanted = type(getattr(like, name)).__name__
            raise UserError(f"{file}: model.{name} must be {wanted}, not {value!r}")
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{file}: model.{name} must be positive, not {value}")
    return T5Config(**values)


@contextlib.contextmanager
def writer(
    folder: Path, sizes: T5Config, dtype_of: DtypeOf, vocab: Vocabulary | None
) -> Iterator[Put]:
    """Gives the function that writes one array under T5X's per-layer path, in any order."""
    content = {
        "format": FORMAT,
        "model": dataclasses.asdict(sizes),
        "vocab": vocab.save(folder) if vocab else None,
    }
    write_json(folder / CONFIG, content)
    layout = {
        path: (dtype_of(next(iter(layer_paths(path, shape)))), shape)
        for path, shape in param_shapes(sizes).items()
    }
    with SafetensorsWriter(folder / TENSORS, layout) as file:

        def put(path: str, array: np.ndarray) -> None:
            name, layer = stacked_path(path)
            file.write(name, array, layer)

        yield put
