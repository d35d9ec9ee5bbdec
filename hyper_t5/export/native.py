"""Native adapter folders: `adapter_spec.json` and `adapter.safetensors`.

The JSON file holds the AdapterSpec, a digest of the tensors, and `meta`: the backbone, the system,
and how inputs are encoded. The other file holds the adapters tree with paths joined by `/`. Systems
that generate adapters for each input store their parameters under `hypermodel/` instead.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from hyper_t5 import adapters as ad
from hyper_t5.adapters import Adapters, AdapterSpec, BottleneckSpec, LoraSpec, PrefixSpec
from hyper_t5.utils import files, safetensors_io
from hyper_t5.utils.errors import UserError

SPEC_FILE = "adapter_spec.json"
TENSOR_FILE = "adapter.safetensors"
FORMAT = "hyper_t5.adapter"
HYPERMODEL = "hypermodel"


def save(
    folder: str | os.PathLike[str],
    adapters: Adapters,
    meta: dict[str, Any],
    hypermodel: dict[str, Any] | None = None,
) -> Path:
    """Write the adapters of all tasks; an existing adapter folder is replaced atomically.

    Args:
      folder: The folder to write.
      adapters: The adapters.
      meta: JSON content that describes their use.
      hypermodel: Parameters of a hypermodel that generates adapters for each input, or None.

    Returns:
      The folder.

    Raises:
      UserError: The folder holds other files, or cannot be written.
    """
    tree = adapters.tree if hypermodel is None else {**adapters.tree, HYPERMODEL: hypermodel}
    tensors = _flatten(tree)
    header = {"format": FORMAT, "spec": spec_to_json(adapters.spec), "digest": _digest(tensors)}
    with files.replaced_folder(folder, (SPEC_FILE, TENSOR_FILE)) as new:
        safetensors_io.write_safetensors(new / TENSOR_FILE, tensors)
        files.write_json(new / SPEC_FILE, header | {"meta": meta})
    return Path(folder)


def load(
    folder: str | os.PathLike[str], dims: ad.Dims | None = None
) -> tuple[Adapters, dict[str, Any], dict[str, Any] | None]:
    """Read an adapter folder.

    Args:
      folder: The folder.
      dims: Sizes of the backbone. If set, names and shapes are checked before any tensor is read;
        otherwise call `adapters.check` before use.

    Returns:
      The adapters, `meta`, and the hypermodel's parameters or None.

    Raises:
      UserError: The folder is not an adapter folder, is damaged, or does not fit the backbone.
    """
    folder = Path(folder)
    spec, digest, meta = _read_spec(folder)
    file = folder / TENSOR_FILE
    files.check_regular(file)
    stored = safetensors_io.open_safetensors(file)
    if dims is not None:
        prefix = f"{HYPERMODEL}/"
        shapes = {name: x.shape for name, x in stored.items() if not name.startswith(prefix)}
        ad.check_shapes(shapes, spec, dims, str(file))
    tensors = {name: tensor.read() for name, tensor in stored.items()}
    for name, array in tensors.items():
        if array.dtype != bool and not np.isfinite(array).all():
            raise UserError(f"{file}: {name} has non-finite values; generate the adapter again")
    if digest != _digest(tensors):
        raise UserError(
            f"{file}: does not match the digest in {SPEC_FILE}; copy both files again, or generate"
            " the adapter again"
        )
    tree = traverse_util.unflatten_dict(tensors, sep="/")
    hypermodel = tree.pop(HYPERMODEL, None)
    return Adapters(tree, spec), meta, hypermodel


def digest(adapters: Adapters) -> str:
    """Return the digest that `save` stores for these adapters."""
    return _digest(_flatten(adapters.tree))


def _flatten(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    flat = traverse_util.flatten_dict(tree, sep="/")
    return {name: np.asarray(leaf) for name, leaf in flat.items()}


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of names, dtypes, shapes and values, independent of the file layout."""
    result = hashlib.sha256()
    for name in sorted(tensors):
        result.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        result.update(safetensors_io.as_bytes(tensors[name]).data)
    return result.hexdigest()


def _read_spec(folder: Path) -> tuple[AdapterSpec, Any, dict[str, Any]]:
    """Read the JSON file: the spec, the digest of the tensors, and meta."""
    file = folder / SPEC_FILE
    if not file.exists():
        raise UserError(
            f"{file}: no such file; a native adapter folder holds {SPEC_FILE} and {TENSOR_FILE}"
            " (`hyper-t5 adapt` writes one)"
        )
    files.check_regular(file)
    header = files.read_json(file)
    try:
        if header.get("format") != FORMAT:
            raise ValueError(f'"format" is not "{FORMAT}"')
        meta = header.get("meta", {})
        if not isinstance(meta, dict):
            raise ValueError("meta must be an object")
        return spec_from_json(header.get("spec")), header.get("digest"), meta
    except ValueError as error:
        raise UserError(
            f"{file}: is not an adapter spec ({error}); write it again with `hyper-t5 adapt`"
        ) from None


def spec_to_json(spec: AdapterSpec) -> dict[str, Any]:
    """Return the JSON form of a spec; patterns are objects, as in PEFT's files."""
    data = dataclasses.asdict(spec)
    for name in ("rank_pattern", "alpha_pattern") if data["lora"] else ():
        data["lora"][name] = dict(data["lora"][name])
    return data


def spec_from_json(data: Any) -> AdapterSpec:
    """Build a spec from its JSON form; inverse of `spec_to_json`.

    Raises:
      ValueError: A field is missing, unknown, of another type, or out of range.
    """
    kinds = {"lora": LoraSpec, "prefix": PrefixSpec, "bottleneck": BottleneckSpec}
    try:
        parts = {
            name: kinds[name](**{field: _tuples(value) for field, value in part.items()})
            for name, part in data.items()
            if name in kinds and part is not None
        }
        return AdapterSpec(**data | parts)
    except (TypeError, AttributeError) as error:
        raise ValueError(error) from error


def _tuples(value: Any) -> Any:
    """Convert lists to tuples, and objects to tuples of pairs."""
    if isinstance(value, dict):
        value = tuple(value.items())
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value
