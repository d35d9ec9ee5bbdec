"""Native backbone folders: `config.json`, and `model.safetensors` with stacked layers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.data.vocab import Vocabulary
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json, write_json
from hyper_t5.utils.safetensors_io import SafetensorsWriter, open_safetensors
from hyper_t5.weights.param_names import layer_paths, param_shapes, stacked_path
from hyper_t5.weights.source import DtypeOf, TensorSource, Write, check_tensors, split_layers

FORMAT = "hyper_t5.backbone"
CONFIG, TENSORS = "config.json", "model.safetensors"


def open_folder(root: Path) -> TensorSource:
    """Read the config and the header, and check one against the other."""
    config = read_config(root)
    stacked = open_safetensors(root / TENSORS)
    check_tensors(param_shapes(config), stacked, str(root / TENSORS))
    vocab = read_json(root / CONFIG).get("vocab")
    return TensorSource("native", str(root), config, split_layers(stacked), vocab)


def read_config(root: Path) -> T5Config:
    """Read the T5Config from config.json."""
    file = root / CONFIG
    fields = read_json(file).get("model")
    if not isinstance(fields, dict):
        raise UserError(f'{file}: lacks the object "model" with the fields of T5Config')
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return T5Config(**values)
    except TypeError as error:  # an unknown field
        raise UserError(f"{file}: model: {error}") from error


@contextlib.contextmanager
def writer(
    folder: Path, config: T5Config, dtype_of: DtypeOf, vocab: Vocabulary | None
) -> Iterator[Write]:
    """Yield a function that writes one array under T5X's per-layer path, in any order."""
    content = {
        "format": FORMAT,
        "model": dataclasses.asdict(config),
        "vocab": vocab.save(folder) if vocab else None,
    }
    write_json(folder / CONFIG, content)
    layout = {
        path: (dtype_of(next(iter(layer_paths(path, shape)))), shape)
        for path, shape in param_shapes(config).items()
    }
    with SafetensorsWriter(folder / TENSORS, layout) as file:

        def write(path: str, array: np.ndarray) -> None:
            name, layer = stacked_path(path)
            file.write(name, array, layer)

        yield write
