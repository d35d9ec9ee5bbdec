"""T5X checkpoints: a msgpack file `checkpoint`, and zarr arrays in folders next to it.

The file holds `{version, optimizer: {target: parameters, state: {step, ...}}}`. A leaf is an array,
or the specification of a zarr array with a path relative to the file. Two trees are supported:

    minimal        encoder/layers_{i}/attention/query/kernel   [D, H*K]
    scalable_t5    encoder/encoder/attention/query/kernel      [D, N, H, K]

In scalable_t5 layers are scanned: they are on axis 1, heads have their own axis, and each layer has
a position table. This network has one table per stack, so the tables must be equal to be read, and
are written equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from hyper_t5.t5 import T5Config
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import read_file
from hyper_t5.utils.safetensors_io import Shape, Tensor, of_array
from hyper_t5.weights.param_names import LAYER, layer_shapes, param_shapes, stacked_path
from hyper_t5.weights.source import DtypeOf, TensorSource, Write, check_layers

FILE = "checkpoint"
VERSION = 3  # of T5X since June 2021
SCANNED = re.compile(r"(encoder|decoder)/\1/(.+)")
# Per-layer position tables: the name in scalable_t5, and its earlier name.
TABLES = ("relpos_bias/rel_embedding", "relative_posemb/rel_embedding")
CHUNK = 2**24  # T5X's limit of values in a chunk file: 64 MiB in float32


def open_checkpoint(root: Path) -> TensorSource:
    """Read the msgpack file; zarr arrays are read on demand."""
    file = root if root.is_file() else root / FILE
    target = _optimizer(file).get("target")
    if not isinstance(target, dict):
        raise UserError(f"{file}: optimizer.target is not a tree of parameters")
    leaves = traverse_util.flatten_dict(target, sep="/", is_leaf=lambda _, x: "driver" in x)
    tensors = {path: _tensor(file, path, leaf) for path, leaf in leaves.items()}
    scanned = not any(map(LAYER.fullmatch, tensors)) and any(map(SCANNED.fullmatch, tensors))
    if scanned:
        tensors = _split_scanned(tensors)
    config = _infer_config(tensors, root)
    check_layers(config, tensors, str(root))
    return TensorSource("t5x", str(root), config, tensors, scanned=scanned)


def _optimizer(file: Path) -> dict[str, Any]:
    try:
        return dict(serialization.msgpack_restore(read_file(file))["optimizer"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: is truncated or not a T5X checkpoint ({error or type(error).__name__})"
        ) from error


def _tensor(file: Path, path: str, leaf: Any) -> Tensor:
    """Wrap a leaf of the tree: an inline array, or the specification of a zarr array."""
    if isinstance(leaf, np.ndarray):
        return of_array(leaf, str(file))
    try:
        metadata = leaf["metadata"]
        # tensorstore before 0.1.14 had the path next to the driver, not inside the kvstore.
        folder = PurePosixPath(leaf["kvstore"].get("path") or leaf["path"])
        spec = {
            "driver": "zarr",
            "dtype": leaf["dtype"],
            "metadata": {key: metadata[key] for key in ("shape", "chunks", "compressor")},
            # By default tensorstore returns zeros for a missing chunk file.
            "fill_missing_data_reads": False,
        }
        shape = tuple(map(int, metadata["shape"]))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{file}: {path} is neither an array nor a zarr specification") from error
    if leaf["driver"] != "zarr":
        raise UserError(f"{file}: {path} has the driver {leaf['driver']!r}; only zarr is supported")
    if folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"{file}: {path} points outside of the checkpoint ({folder})")
    array = file.parent / folder
    return Tensor(str(array), shape, str(leaf["dtype"]), functools.partial(_read_zarr, array, spec))


def _read_zarr(array: Path, spec: dict[str, Any], rows: slice) -> np.ndarray:
    import tensorstore  # takes 0.3 s, and only T5X checkpoints need it

    kvstore = {"driver": "file", "path": f"{array.resolve()}/"}
    # Some copy tools lose .zarray, a dot-file; the specification has the same content.
    lost = array.is_dir() and not (array / ".zarray").exists()
    store = tensorstore.open(
        {**spec, "kvstore": kvstore}, open=True, read=True, assume_metadata=lost
    ).result()
    return store[rows].read().result()


def _infer_config(tensors: Mapping[str, Tensor], root: Path) -> T5Config:
    """Infer the config from the shapes of the arrays: T5X stores none.

    The number of heads is that of the position table, because a query kernel has only heads times
    head size. Not in any shape, and so taken from the published models: gated MLPs use gelu, others
    relu; positions saturate at distance 128.
    """
    embedding, table = "token_embedder/embedding", "encoder/relpos_bias/rel_embedding"
    query, wo = "encoder/layers_0/attention/query/kernel", "encoder/layers_0/mlp/wo/kernel"
    for path in (embedding, table, query, wo):
        if path not in tensors or len(tensors[path].shape) != 2:
            raise UserError(
                f"{root}: is not a T5 checkpoint: lacks the matrix {path}; it holds"
                f" {', '.join(sorted(tensors)[:3])}, ..."
            )
    vocab_size, emb_dim = tensors[embedding].shape
    num_heads, buckets = tensors[table].shape
    inner = tensors[query].shape[1]
    if num_heads == 0 or inner % num_heads:
        raise UserError(
            f"{tensors[query].file}: {query} has {inner} columns, not a multiple of the"
            f" {num_heads} heads of {table}"
        )
    depth = {"encoder": 0, "decoder": 0}
    for match in filter(None, map(LAYER.fullmatch, tensors)):
        depth[match[1]] = max(depth[match[1]], int(match[2]) + 1)
    plain = "encoder/layers_0/mlp/wi/kernel" in tensors
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=depth["encoder"],
        num_decoder_layers=depth["decoder"],
        head_dim=inner // num_heads,
        mlp_dim=tensors[wo].shape[0],
        mlp_activations=("relu",) if plain else ("gelu", "linear"),
        logits_via_embedding="decoder/logits_dense/kernel" not in tensors,
        relpos_buckets=buckets,
    )


def _split_scanned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the arrays of a scanned tree into one tensor per layer.

    T5X has the layers on axis 1, its relatives on axis 0; the norms' scales, [D, N] or [N, D], show
    which. An array is read once if its layers are read one after another.
    """
    embedding = tensors.get("token_embedder/embedding")
    width = embedding.shape[-1] if embedding and embedding.shape else 0
    read_whole = functools.lru_cache(maxsize=1)(lambda path: tensors[path].read())
    split = {}
    for path, tensor in tensors.items():
        match = SCANNED.fullmatch(path)
        if match is None:
            split[path] = tensor
            continue
        stack, inner = match[1], match[2]
        norm = tensors.get(f"{stack}/{stack}/pre_mlp_layer_norm/scale")
        axis = 0 if norm and norm.shape[-1:] == (width,) != norm.shape[:1] else 1
        if len(tensor.shape) < 2:
            raise UserError(f"{tensor.file}: {path} has shape {list(tensor.shape)}: no layers")
        shape = _join_heads((*tensor.shape[:axis], *tensor.shape[axis + 1 :]), inner)
        if inner in TABLES:
            load = functools.partial(_shared_table, tensor, path, axis)
            name = f"{stack}/relpos_bias/rel_embedding"
            split[name] = dataclasses.replace(tensor, shape=shape, load=load)
            continue
        for i in range(tensor.shape[axis]):
            load = functools.partial(_scanned_layer, read_whole, path, axis, i, shape)
            split[f"{stack}/layers_{i}/{inner}"] = dataclasses.replace(
                tensor, shape=shape, load=load
            )
    return split


def _join_heads(shape: Shape, inner: str) -> Shape:
    """Return the shape of one layer with heads and head size as one axis."""
    if len(shape) != 3:
        return shape
    if inner.endswith("/out/kernel"):
        return shape[0] * shape[1], shape[2]
    return shape[0], shape[1] * shape[2]


def _scanned_layer(
    read: Callable[[str], np.ndarray], path: str, axis: int, layer: int, shape: Shape, rows: slice
) -> np.ndarray:
    return read(path).take(layer, axis).reshape(shape)[rows]


def _shared_table(tensor: Tensor, path: str, axis: int, rows: slice) -> np.ndarray:
    """Read the position table that all layers share."""
    tables = np.moveaxis(tensor.read(), axis, 0)
    if not (tables == tables[:1]).all():
        raise UserError(
            f"{tensor.file}: {path} differs between layers, as in UMT5; this network has one"
            " position table per stack, so it cannot compute that model"
        )
    return tables[0, rows]


@contextlib.contextmanager
def writer(
    folder: Path, config: T5Config, dtype_of: DtypeOf, step: int = 0, scanned: bool = False
) -> Iterator[Write]:
    """Yield a function that writes one array under T5X's per-layer path.

    The files equal byte for byte those of T5X's Checkpointer for a state without an optimizer. With
    `scanned`, write the layers of an array one after another, in order: they are collected in
    memory. Otherwise any order will do.
    """
    if scanned:
        stacked = param_shapes(config)
        shapes = {_scanned_path(p): _scanned_shape(p, s, config) for p, s in stacked.items()}
        first = {_scanned_path(p): p.replace("/layers/", "/layers_0/") for p in stacked}
        dtypes = {path: dtype_of(first[path]) for path in shapes}
    else:
        shapes = layer_shapes(config)
        dtypes = {path: dtype_of(path) for path in shapes}
    specs = {path: _zarr_spec(path, shape, dtypes[path]) for path, shape in shapes.items()}
    buffers: dict[str, np.ndarray] = {}  # scanned arrays that are not complete

    def write(path: str, array: np.ndarray) -> None:
        if scanned:
            name, layer = stacked_path(path)
            path = _scanned_path(name)
            shape = shapes[path]
            if layer is not None:
                if layer == 0:
                    buffers[path] = np.empty(shape, array.dtype)
                buffers[path][:, layer] = array.reshape((shape[0], *shape[2:]))
                if layer + 1 < shape[1]:
                    return
                array = buffers.pop(path)
            elif name.endswith("rel_embedding"):
                array = np.broadcast_to(array[:, None], shape)
        _write_zarr(folder, specs[path], array)

    yield write
    tree = traverse_util.unflatten_dict({path: specs[path] for path in sorted(specs)}, sep="/")
    state = {"step": np.array(step, np.int32)}
    content = {"version": VERSION, "optimizer": {"state": state, "target": tree}}
    # In place: a copy would sort the keys, unlike T5X.
    (folder / FILE).write_bytes(serialization.msgpack_serialize(content, in_place=True))


def _scanned_path(path: str) -> str:
    """Return the path in scalable_t5 of a stacked path."""
    stack = path.partition("/")[0]
    if path.endswith("relpos_bias/rel_embedding"):
        return f"{stack}/{stack}/relpos_bias/rel_embedding"
    return path.replace("/layers/", f"/{stack}/")


def _scanned_shape(path: str, shape: Shape, config: T5Config) -> Shape:
    """Return the shape in scalable_t5 of a stacked path: layers on axis 1, heads split."""
    if path.endswith("rel_embedding"):
        is_decoder = path.startswith("decoder")
        depth = config.num_decoder_layers if is_decoder else config.num_encoder_layers
        return shape[0], depth, shape[1]
    if "/layers/" not in path:
        return shape
    depth, *layer = shape
    if path.endswith("/out/kernel"):
        layer[:1] = config.num_heads, config.head_dim
    elif path.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
        layer[1:] = config.num_heads, config.head_dim
    return layer[0], depth, *layer[1:]


def _zarr_spec(path: str, shape: Shape, dtype: np.dtype) -> dict[str, Any]:
    """Return the leaf of the tree for an array in zarr."""
    return {
        "driver": "zarr",
        "dtype": dtype.name,
        "kvstore": {"driver": "file", "path": f"target.{path.replace('/', '.')}/"},
        "metadata": {
            "chunks": _chunks(shape),
            "compressor": {"id": "gzip", "level": 1},
            "shape": list(shape),
        },
    }


def _chunks(shape: Shape) -> list[int]:
    """Choose chunks as T5X does: divisors of the shape, with the largest axis split first."""
    chunks = list(shape)
    while math.prod(chunks) > CHUNK:
        axis = max(range(len(chunks)), key=lambda i: (chunks[i], -i))
        chunks[axis] = next(n for n in range(chunks[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return chunks


@functools.cache
def _write_context() -> Any:
    """Limit the chunks that are copied at a time: memory must not grow with the number of cores."""
    import tensorstore

    return tensorstore.Context({"data_copy_concurrency": {"limit": 2}})


def _write_zarr(folder: Path, spec: dict[str, Any], array: np.ndarray) -> None:
    import tensorstore

    spec = {**spec, "kvstore": {"driver": "file", "path": f"{folder / spec['kvstore']['path']}/"}}
    try:
        store = tensorstore.open(spec, create=True, context=_write_context()).result()
        store.write(array).result()
    except ValueError as error:  # from tensorstore, also if the disk is full
        raise OSError(str(error).split(" [tensorstore_spec")[0]) from error
