"""Loading of a backbone from a path into host memory, or onto the devices of a mesh."""

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
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hyper_t5.parallel import sharding
from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_json
from hyper_t5.weights import hf, native, param_names, t5x
from hyper_t5.weights.param_names import Params, layer_paths, param_shapes, stacked_path
from hyper_t5.weights.source import STORAGE_DTYPES, TensorSource, VocabIdentity


def load_backbone(
    path: str | os.PathLike[str], *, dtype: str = "float32"
) -> tuple[T5Config, Params, VocabIdentity | None]:
    """Read a backbone into host memory.

    Args:
      path: A native, T5X or Hugging Face folder, or a T5X `checkpoint` file.
      dtype: `float32` or `bfloat16`, the dtype of the weights in memory.

    Returns:
      The config; the nested dict of numpy arrays with stacked layers (see `param_shapes`); and the
      identity of the vocabulary, for `vocab.load_vocab(identity, base_dir=path)`, or None if the
      folder has none (always for T5X).

    Raises:
      UserError: There is no T5 at `path`, or it is damaged.
    """
    storage = storage_dtype(dtype)
    source = open_source(path)
    return source.config, _in_memory(source, storage), source.vocab


def load_sharded(
    path: str | os.PathLike[str],
    make_shardings: Callable[[T5Config], Any],
    *,
    dtype: str = "float32",
) -> tuple[T5Config, Params, VocabIdentity | None, str]:
    """Read a backbone onto the devices of a mesh; the host holds one array at a time.

    Each array is read once, layer by layer, and each device takes its part. Every process of a run
    must call it. A T5X tree of scanned layers is read into host memory first.

    Args:
      path: As for `load_backbone`.
      make_shardings: Returns the tree of shardings, like the parameters, for a config.
      dtype: `float32` or `bfloat16`.

    Returns:
      As `load_backbone`, with jax.Arrays, and the digest of the weights (`param_names.digest`).
    """
    storage = storage_dtype(dtype)
    source = open_source(path)
    shardings = make_shardings(source.config)
    if source.scanned:
        host = _in_memory(source, storage)
        digest, params = param_names.digest(host), sharding.device_put(host, shardings)
    else:
        params, digest = _on_devices(source.astype(storage), storage, shardings)
    return source.config, params, source.vocab, digest


def read_config(path: str | os.PathLike[str]) -> T5Config:
    """Read the T5Config at a path, for T5X from the shapes of the arrays."""
    root = Path(path)
    match detect(root):
        case "t5x":
            return t5x.open_checkpoint(root).config
        case "native":
            return native.read_config(root)
        case _:
            return hf.read_config(root)


def open_source(path: str | os.PathLike[str], expected_format: str = "") -> TensorSource:
    """Open a backbone: names and shapes are checked, no values are read.

    Args:
      path: As for `load_backbone`.
      expected_format: `native`, `t5x` or `hf`; empty accepts all.
    """
    root = Path(path)
    stored_format = detect(root)
    if expected_format not in ("", stored_format):
        raise UserError(f"{root}: has the format {stored_format}, not {expected_format}")
    openers = {"native": native.open_folder, "t5x": t5x.open_checkpoint, "hf": hf.open_folder}
    return openers[stored_format](root)


def detect(root: Path) -> str:
    """Return the format at a path: `native`, `t5x` or `hf`.

    Raises:
      UserError: It is none of them.
    """
    if not root.exists():
        raise UserError(f"{root}: does not exist; use a folder with T5 weights")
    if root.is_file():
        if root.suffix in (".safetensors", ".json", ".bin", ".pt", ".index"):
            raise UserError(f"{root}: is a file; use its folder")
        return "t5x"
    if (root / "_METADATA").exists():
        raise UserError(
            f"{root}: is an Orbax checkpoint, which is not supported; restore it with T5X and save"
            " it with t5x.checkpoints.Checkpointer"
        )
    if (root / t5x.FILE).is_file():
        return "t5x"
    content = read_json(root / native.CONFIG) if (root / native.CONFIG).is_file() else {}
    if content.get("format") == native.FORMAT:
        return "native"
    if "model_type" in content:
        return "hf"
    if snapshots := [*root.glob("snapshots/*"), *root.glob("models--*/snapshots/*")]:
        latest = max(snapshots, key=lambda path: path.stat().st_mtime)
        raise UserError(
            f"{root}: is a cache of Hugging Face; use a snapshot in it, such as {latest}"
        )
    steps = [p for p in root.glob("checkpoint_*") if p.is_dir() and ".tmp-" not in p.name]
    if steps:
        latest = max(steps, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])
        raise UserError(f"{root}: holds {len(steps)} T5X checkpoints; use one, such as {latest}")
    raise UserError(
        f"{root}: holds no T5 weights; use a folder with config.json (native or Hugging Face) or a"
        " file `checkpoint` (T5X)"
    )


def storage_dtype(name: str, field: str = "backbone.dtype") -> np.dtype:
    """Return the dtype of weights by its name; `field` is for the message."""
    if name not in STORAGE_DTYPES:
        raise UserError(
            f"{field}: {name!r} is not one of {', '.join(STORAGE_DTYPES)} (T5 overflows in float16)"
        )
    return STORAGE_DTYPES[name]


def _in_memory(source: TensorSource, dtype: np.dtype) -> Params:
    """Read the whole tree, each array straight into its place."""
    flat = {}
    for path, shape in param_shapes(source.config).items():
        flat[path] = array = np.empty(shape, dtype)
        if "/layers/" not in path:
            array[...] = source.tensors[path].read()
            continue
        for i, name in enumerate(layer_paths(path, shape)):
            array[i] = source.tensors[name].read()
    return traverse_util.unflatten_dict(flat, sep="/")


def _on_devices(source: TensorSource, dtype: np.dtype, shardings: Any) -> tuple[Params, str]:
    """Read each array once, in the order of the digest, onto the devices."""
    sharding_of: dict[str, NamedSharding] = traverse_util.flatten_dict(shardings, sep="/")
    flat = {
        path: jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding_of[path])()
        for path, shape in param_shapes(source.config).items()
        if "/layers/" in path
    }
    digest = hashlib.sha256()
    for name in source.read_order():
        array = source.tensors[name].read()
        param_names.update_digest(digest, name, array)
        path, layer = stacked_path(name)
        if layer is None:
            flat[path] = _shard(array, sharding_of[path])
            continue
        layer_spec = PartitionSpec(*sharding_of[path].spec[1:])
        part = _shard(array, NamedSharding(sharding_of[path].mesh, layer_spec))
        # Wait for the devices: arrays in transfer would accumulate on the host.
        flat[path] = jax.block_until_ready(_set_layer(flat[path], part, layer))
    return traverse_util.unflatten_dict(flat, sep="/"), digest.hexdigest()


def _shard(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(stacked: jax.Array, part: jax.Array, layer: int) -> jax.Array:
    """Replace one layer in place."""
    return jax.lax.dynamic_update_index_in_dim(stacked, part, layer, 0)
