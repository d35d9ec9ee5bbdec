"""From a path to a backbone in memory, or over the devices of a mesh."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hyper_t5 import names, sharding
from hyper_t5.errors import UserError
from hyper_t5.files import read_json
from hyper_t5.names import Params, layer_paths, param_shapes, stacked_path
from hyper_t5.t5 import T5Config
from hyper_t5.weights import hf, native, t5x
from hyper_t5.weights.source import Source, VocabIdentity

STORAGE_DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def load_backbone(
    path: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[T5Config, Params, VocabIdentity | None]:
    """Reads a backbone from a native, T5X or Hugging Face path.

    Args:
      path: a folder of one of the three layouts, or a T5X `checkpoint` file.
      dtype: how to store the weights, 'float32' or 'bfloat16'.

    Returns:
      The config; the nested dict of numpy arrays, layers stacked (see `param_shapes`); and the
      identity of its vocabulary, for `vocab.load_vocab(identity, base_dir=path)`; None where the
      folder does not say (always for T5X).

    Raises:
      UserError: what is at `path` is missing, damaged, or not a T5.
    """
    kept = storage_dtype(dtype)
    source = open_source(path)
    return source.sizes, _in_memory(source, kept), source.vocab


def load_sharded(
    path: str | os.PathLike[str], where: Callable[[T5Config], Any], *, dtype: str = "float32"
) -> tuple[T5Config, Params, VocabIdentity | None, str]:
    """As `load_backbone`, onto the devices of a mesh: the host never holds more than an array.

    One layer of one array after the other is read, once, and each device takes its part. Every
    process of a run must call it. A T5X tree of scanned layers is whole on the host in between.

    Args:
      path: as `load_backbone` takes it.
      where: from the sizes to a tree of shardings, as the parameters' tree.
      dtype: how to store the weights, 'float32' or 'bfloat16'.

    Returns:
      What `load_backbone` returns, arrays being jax's, and the digest (`names.digest`) of them.
    """
    kept = storage_dtype(dtype)
    source = open_source(path)
    placed = where(source.sizes)
    if source.scanned:
        host = _in_memory(source, kept)
        digest, params = names.digest(host), sharding.put(host, placed)
    else:
        params, digest = _on_devices(source, kept, placed)
    return source.sizes, params, source.vocab, digest


def read_sizes(path: str | os.PathLike[str]) -> T5Config:
    """The sizes of the T5 at a path, from its config or from the shapes of its arrays."""
    root = Path(path)
    kind = detect(root)
    if kind == "t5x":
        return t5x.open_checkpoint(root).sizes
    return native.config_of(root) if kind == "native" else hf.config_of(root)


def open_source(path: str | os.PathLike[str], kind: str = "") -> Source:
    """What lies at a path; its names and shapes are checked, its arrays not yet read.

    ``kind`` is 'native', 't5x' or 'hf' where it is known; what is found must be of it.
    """
    root = Path(path)
    found = detect(root)
    if kind and found != kind:
        raise UserError(f"{root}: is a folder of the format {found}, not {kind}")
    openers = {
        "native": native.open_folder,
        "t5x": t5x.open_checkpoint,
        "hf": hf.open_folder,
    }
    return openers[found](root)


def detect(root: Path) -> str:
    """Which layout is at `root`: 'native', 't5x' or 'hf'.

    Raises:
      UserError: none of them; the message says what was looked for and what is there instead.
    """
    if not root.exists():
        raise UserError(f"{root}: does not exist; give a folder with T5 weights")
    if root.is_file():
        if root.suffix in (".safetensors", ".json", ".bin", ".pt", ".index"):
            raise UserError(f"{root}: is a file; give the folder that holds it")
        return "t5x"
    if (root / "_METADATA").exists():
        raise UserError(
            f"{root}: is an Orbax checkpoint; only T5X's own format (a file `checkpoint` and zarr"
            " folders) is read: restore it with T5X and save it with t5x.checkpoints.Checkpointer"
        )
    if (root / t5x.FILE).is_file():
        return "t5x"
    if (root / native.CONFIG).is_file():
        content = read_json(root / native.CONFIG)
        if content.get("format") == native.FORMAT:
            return "native"
        if "model_type" in content:
            return "hf"
        raise UserError(
            f'{root / native.CONFIG}: has neither "format": "{native.FORMAT}" nor Hugging'
            ' Face\'s field "model_type": it describes no T5'
        )
    steps = [p for p in root.glob("checkpoint_*") if p.is_dir() and ".tmp-" not in p.name]
    if steps:
        latest = max(steps, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        raise UserError(f"{root}: holds {len(steps)} T5X checkpoints; give one, such as {latest}")
    raise UserError(
        f"{root}: holds no T5 weights: neither config.json (native or Hugging Face) nor a file"
        " `checkpoint` (T5X)"
    )


def storage_dtype(name: str, field: str = "backbone.dtype") -> np.dtype:
    """The dtype of a name; UserError where weights are not stored so."""
    if name not in STORAGE_DTYPES:
        raise UserError(
            f"{field}: {name!r} is not one of {', '.join(STORAGE_DTYPES)} (T5 overflows in float16)"
        )
    return STORAGE_DTYPES[name]


# ------------------------------------------------------------------------------------ placing


def _in_memory(source: Source, dtype: np.dtype) -> Params:
    """The whole tree on the host, one array after the other: never is it in memory twice."""
    flat = {}
    for path, shape in param_shapes(source.sizes).items():
        flat[path] = out = np.empty(shape, dtype)
        if "/layers/" not in path:
            out[...] = source.tensors[path].read()
            continue
        for i, name in enumerate(layer_paths(path, shape)):
            out[i] = source.tensors[name].read()
    return traverse_util.unflatten_dict(flat, sep="/")


def _on_devices(source: Source, dtype: np.dtype, placed: Any) -> tuple[Params, str]:
    """The tree over the devices, and its digest; in the digest's order each array is read once."""
    where: dict[str, NamedSharding] = traverse_util.flatten_dict(placed, sep="/")
    flat = {
        path: jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=where[path])()
        for path, shape in param_shapes(source.sizes).items()
        if "/layers/" in path
    }
    digest = hashlib.sha256()
    for name in source.order():
        array = source.tensors[name].read().astype(dtype, copy=False)
        names.add_to_digest(digest, name, array)
        path, layer = stacked_path(name)
        if layer is None:
            flat[path] = _cut(array, where[path])
            continue
        spec = PartitionSpec(*where[path].spec[1:])
        part = _cut(array, NamedSharding(where[path].mesh, spec))
        # Not ahead of the devices: what waits for them would pile up on the host.
        flat[path] = jax.block_until_ready(_insert(flat[path], part, layer))
    return traverse_util.unflatten_dict(flat, sep="/"), digest.hexdigest()


def _cut(array: np.ndarray, where: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, lambda index: array[index])


@functools.partial(jax.jit, donate_argnums=0)
def _insert(stacked: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    """``stacked`` with one layer replaced, in place, where it lies."""
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)
