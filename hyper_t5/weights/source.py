"""A backbone in any format whose tensors are read on demand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import traverse_util

from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.safetensors_io import Shape, Tensor, of_array
from hyper_t5.weights.param_names import Params, layer_paths, layer_shapes, param_shapes

VocabIdentity = dict[str, Any]
DtypeOf = Callable[[str], np.dtype]  # T5X's per-layer path -> dtype on disk
Write = Callable[[str, np.ndarray], None]  # takes T5X's per-layer path and the array
STORAGE_DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The config and the tensors of a stored backbone.

    Attributes:
      format: `native`, `t5x`, `hf` or `memory`.
      path: The folder or file, for messages.
      config: The T5's config.
      tensors: T5X's per-layer path -> tensor. Names, shapes and dtypes are checked.
      vocab: Identity of the vocabulary; None if it is not stored.
      scanned: Whether all layers of an array are stored as one, which is read whole.
    """

    format: str
    path: str
    config: T5Config
    tensors: Mapping[str, Tensor]
    vocab: VocabIdentity | None = None
    scanned: bool = False

    def read_order(self) -> list[str]:
        """List all paths: sorted as in the digest, or by array if each read is of all layers."""
        return list(layer_shapes(self.config)) if self.scanned else sorted(self.tensors)

    def dtype_of(self, path: str) -> np.dtype:
        """Return the dtype of one tensor."""
        return STORAGE_DTYPES[self.tensors[path].dtype]

    def astype(self, dtype: np.dtype | None) -> TensorSource:
        """Cast all tensors to `dtype`; None casts those that cannot be stored to float32."""
        tensors = {}
        for path, tensor in self.tensors.items():
            own = STORAGE_DTYPES.get(tensor.dtype, STORAGE_DTYPES["float32"])
            target = own if dtype is None else dtype
            load = functools.partial(_load_as, tensor, target)
            tensors[path] = dataclasses.replace(tensor, dtype=target.name, load=load)
        return dataclasses.replace(self, tensors=tensors)


def _load_as(tensor: Tensor, dtype: np.dtype, rows: slice) -> np.ndarray:
    return tensor.load(rows).astype(dtype, copy=False)


def from_params(config: T5Config, params: Params) -> TensorSource:
    """Wrap parameters in memory, with stacked layers.

    Raises:
      UserError: The parameters do not fit the config.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    stacked = {path: of_array(np.asarray(leaf)) for path, leaf in flat.items()}
    check_tensors(param_shapes(config), stacked, "parameters")
    return TensorSource("memory", "parameters", config, split_layers(stacked))


def split_layers(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split tensors with layers on axis 0 into one tensor per layer, under T5X's paths."""
    tensors = {}
    for path, tensor in stacked.items():
        for i, name in enumerate(layer_paths(path, tensor.shape)):
            tensors[name] = tensor if name == path else tensor.layer(i)
    return tensors


def check_layers(
    config: T5Config,
    tensors: Mapping[str, Tensor],
    path: str,
    entry: Callable[[str, Shape], tuple[str, Shape]] = lambda name, shape: (name, shape),
) -> None:
    """Check per-layer tensors against a config; `entry` maps T5X's path and shape to the stored."""
    layers = config.num_encoder_layers + config.num_decoder_layers
    if layers > len(tensors):  # before that many names are created
        raise UserError(f"{path}: declares {layers} layers, but holds {len(tensors)} arrays")
    expected = dict(entry(name, shape) for name, shape in layer_shapes(config).items())
    check_tensors(expected, tensors, path)


def check_tensors(expected: Mapping[str, Shape], tensors: Mapping[str, Tensor], path: str) -> None:
    """Check names, shapes and dtypes before any value is read.

    Raises:
      UserError: A tensor is missing, unexpected, transposed, of another shape, or not floating
        point.
    """
    if missing := expected.keys() - tensors.keys():
        raise UserError(
            f"{path}: lacks {_listed(missing)}; the file is incomplete or of another model"
        )
    if extra := tensors.keys() - expected.keys():
        raise UserError(f"{path}: holds {_listed(extra)}, which this T5 does not have")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape:
            transposed = tensor.shape == (*shape[:-2], *shape[:-3:-1])
            remedy = "it is transposed: swap its last two axes" if transposed else ""
            raise UserError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, expected {list(shape)} from"
                f" the config; {remedy or 'use config and weights of the same model'}"
            )
        if "float" not in tensor.dtype:
            raise UserError(f"{tensor.file}: {name} has dtype {tensor.dtype}, not floating point")


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
