"""A T5 that lies somewhere, whatever the format: what every reader makes and every writer takes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5.errors import UserError
from hyper_t5.names import Params, layer_paths, param_shapes, t5x_paths
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import Shape, Tensor, of_array

VocabIdentity = dict[str, Any]
# A path and shape of ours -> the same as its format has them, for messages.
Describe = Callable[[str, Shape], tuple[str, Shape]]


def as_is(path: str, shape: Shape) -> tuple[str, Shape]:
    """The names of T5X, which are ours."""
    return path, shape


@dataclasses.dataclass(frozen=True)
class Source:
    """Sizes, and arrays that are read when they are asked for.

    Attributes:
      kind: 'native', 't5x', 'hf', or 'memory'.
      where: the folder or file, for messages.
      sizes: of the T5.
      tensors: T5X's per-layer path -> array; names, shapes and kinds are known to fit ``sizes``.
      vocab: identity of its vocabulary; None where its files do not say.
      scanned: its files hold an array of all layers as one, which must be read to have one layer.
      describe: how its format names an array.
    """

    kind: str
    where: str
    sizes: T5Config
    tensors: Mapping[str, Tensor]
    vocab: VocabIdentity | None = None
    scanned: bool = False
    describe: Describe = as_is

    def order(self) -> list[str]:
        """Every path: sorted, or, where that costs much, all layers of an array together."""
        return t5x_paths(self.sizes) if self.scanned else sorted(self.tensors)


def of_params(sizes: T5Config, params: Params) -> Source:
    """A tree in memory (`names.param_shapes`) as a source.

    Raises:
      UserError: the tree is not one of these sizes.
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    stacked = {path: of_array(np.asarray(leaf)) for path, leaf in flat.items()}
    verify(param_shapes(sizes), stacked, "parameters")
    return Source("memory", "parameters", sizes, by_layer(stacked))


def by_layer(stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Arrays of all layers, axis 0, as one array a layer under T5X's paths."""
    tensors = {}
    for path, tensor in stacked.items():
        for i, name in enumerate(layer_paths(path, tensor.shape)):
            tensors[name] = tensor if name == path else tensor.layer(i)
    return tensors


def verify_layers(
    sizes: T5Config, tensors: Mapping[str, Tensor], where: str, describe: Describe = as_is
) -> None:
    """`verify` of arrays under T5X's per-layer paths."""
    layers = sizes.num_encoder_layers + sizes.num_decoder_layers
    if layers > len(tensors):  # before so many names are made
        raise UserError(f"{where}: declares {layers} layers, but holds {len(tensors)} arrays")
    shapes = param_shapes(sizes)
    expected = [layer_paths(path, shape).items() for path, shape in shapes.items()]
    verify(dict(itertools.chain.from_iterable(expected)), tensors, where, describe)


def verify(
    expected: Mapping[str, Shape],
    tensors: Mapping[str, Tensor],
    where: str,
    describe: Describe = as_is,
) -> None:
    """Compares names, shapes and kinds with those expected, before a single array is read.

    Raises:
      UserError: names are missing or extra; an array has another shape, is transposed, or holds no
        floating point numbers.
    """

    def names(paths: Collection[str]) -> str:
        listed = sorted(describe(path, ())[0] for path in paths)
        more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
        return ", ".join(listed[:3]) + more

    if missing := expected.keys() - tensors.keys():
        raise UserError(
            f"{where}: lacks {names(missing)}: the file is incomplete, or not of this model"
        )
    if extra := tensors.keys() - expected.keys():
        raise UserError(f"{where}: holds {names(extra)}, which this T5 does not have")
    for path, shape in expected.items():
        tensor = tensors[path]
        if tensor.shape != shape:
            _refuse_shape(path, shape, tensor, describe)
        if "float" not in tensor.dtype.lower():
            name = describe(path, shape)[0]
            raise UserError(f"{tensor.file}: {name} holds {tensor.dtype}, not floating point")


def _refuse_shape(path: str, shape: Shape, tensor: Tensor, describe: Describe) -> None:
    name, wanted = describe(path, shape)
    found = list(describe(path, tensor.shape)[1])
    # All layers of an array may lie on axis 0.
    turned = (*shape[:-2], *shape[:-3:-1])
    reason = (
        "it is transposed: exchange its last two axes"
        if tensor.shape == turned
        else "take config and weights from the same model"
    )
    raise UserError(
        f"{tensor.file}: {name} has shape {found}, expected {list(wanted)} from the other sizes of"
        f" this model; {reason}"
    )


def size_of(fields: Mapping[str, Any], name: str, file: Path) -> int:
    """A size among the fields of a config file; UserError where it is none."""
    value = fields.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {name} must be a positive whole number, not {value!r}")
    return value
