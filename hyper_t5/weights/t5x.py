"""T5X's own checkpoints: a msgpack file `checkpoint`, and zarr arrays in folders beside it.

The file holds `{version, optimizer: {target: parameters, state: {step, ...}}}`. A leaf is an array,
or the specification of a zarr array with a path relative to the file. Two trees are known:

    minimal        encoder/layers_{i}/attention/query/kernel   [D, H*K]
    scalable_t5    encoder/encoder/attention/query/kernel      [D, N, H, K]

The second, of layers that are scanned, has the layers on axis 1 (axis 0 is read too), heads apart,
and a position table in each layer. This network has one table a stack: only a checkpoint whose
tables are equal can be read, and so it is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from flax import serialization, traverse_util

from hyper_t5.errors import UserError
from hyper_t5.names import LAYER, layer_paths, param_shapes, stacked_path
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import Shape, Tensor, of_array
from hyper_t5.weights.source import Source, verify_layers

FILE = "checkpoint"
VERSION = 3  # T5X's since June 2021; from 2 on the tree has this form
SCANNED = re.compile(r"(encoder|decoder)/(?:layers|encoder|decoder)/(.+)")
# Per-layer tables, by the names of scalable_t5 in its first years and since.
TABLES = ("relpos_bias/rel_embedding", "relative_posemb/rel_embedding")
CHUNK = 2**24  # numbers in a chunk file at most, as T5X has it: 64 MiB in float32
RATIO = 1100  # no gzip or zstd file of weights holds more than so many times its size
Put = Callable[[str, np.ndarray], None]


# --------------------------------------------------------------------------------- reading


def open_checkpoint(root: Path) -> Source:
    """Reads the msgpack file; zarr arrays are read when they are asked for."""
    file = _file(root)
    target = _tree(file).get("target")
    if not isinstance(target, dict):
        raise UserError(f"{file}: optimizer.target is not a tree of parameters")
    leaves = traverse_util.flatten_dict(target, sep="/", is_leaf=lambda _, x: "driver" in x)
    tensors = {path: _leaf(file, path, leaf) for path, leaf in leaves.items()}
    scanned = not any(map(LAYER.fullmatch, tensors)) and any(map(SCANNED.fullmatch, tensors))
    if scanned:
        tensors = _unscanned(tensors, root)
    sizes = _infer_sizes(tensors, root)
    verify_layers(sizes, tensors, str(root))
    return Source("t5x", str(root), sizes, tensors, scanned=scanned)


def step_of(root: Path) -> int:
    """The step that a checkpoint was saved at; 0 where it does not say."""
    state = _tree(_file(root)).get("state")
    step = state.get("step", 0) if isinstance(state, dict) else 0
    return int(np.asarray(step)) if np.ndim(step) == 0 else 0


def _file(root: Path) -> Path:
    return root if root.is_file() else root / FILE


def _tree(file: Path) -> dict[str, Any]:
    try:
        return dict(serialization.msgpack_restore(file.read_bytes())["optimizer"])
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file}: is truncated or not a T5X checkpoint ({error or type(error).__name__})"
        ) from error


def _leaf(file: Path, path: str, leaf: Any) -> Tensor:
    """One leaf of the tree: an inline array, or the specification of a zarr array on disk."""
    if isinstance(leaf, np.ndarray):
        return of_array(leaf, str(file))
    try:
        metadata = leaf["metadata"]
        # tensorstore before 0.1.14 kept the path beside the driver, not inside the kvstore.
        folder = PurePosixPath(leaf["kvstore"].get("path") or leaf["path"])
        spec = {
            "driver": "zarr",
            "dtype": leaf["dtype"],
            "metadata": {key: metadata[key] for key in ("shape", "chunks", "compressor")},
            # Left to itself tensorstore answers zeros for a chunk file that is not there.
            "fill_missing_data_reads": False,
        }
        shape = tuple(map(int, metadata["shape"]))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{file}: {path} is neither an array nor a zarr placeholder") from error
    if leaf["driver"] != "zarr":
        raise UserError(f"{file}: {path} is kept by {leaf['driver']!r}; only zarr is read")
    if folder.is_absolute() or ".." in folder.parts:
        raise UserError(f"{file}: {path} points outside of the checkpoint ({folder})")
    array = file.parent / folder
    _check_size(file, path, shape, array)
    load = functools.partial(_read_zarr, array, spec)
    return Tensor(str(array), shape, str(leaf["dtype"]), load)


def _check_size(file: Path, path: str, shape: Shape, array: Path) -> None:
    """UserError where an array is declared larger than its files can be, before it is allocated."""
    if not array.is_dir():
        return  # what is missing is said when it is read
    stored = sum(part.stat().st_size for part in array.iterdir())
    if min(shape, default=1) < 1 or 2 * math.prod(shape) > RATIO * stored + 2**20:
        raise UserError(
            f"{file}: {path} is declared as {list(shape)}, but its files in {array.name} hold"
            f" {stored:,} bytes; copy the checkpoint again"
        )


def _read_zarr(array: Path, spec: dict[str, Any], rows: slice) -> np.ndarray:
    import tensorstore  # 0.3 s, and nobody but T5X's readers needs it

    kvstore = {"driver": "file", "path": f"{array.resolve()}/"}
    # Copy tools that drop dot-files lose .zarray; the placeholder says all that it said.
    lost = array.is_dir() and not (array / ".zarray").exists()
    store = tensorstore.open(
        {**spec, "kvstore": kvstore}, open=True, read=True, assume_metadata=lost
    ).result()
    return store[rows].read().result()


def _infer_sizes(tensors: Mapping[str, Tensor], root: Path) -> T5Config:
    """The sizes of a T5X model from the shapes of its arrays.

    T5X keeps no config in a checkpoint. The number of heads is that of the position table, because
    a query kernel only tells heads times head size. Not in any shape, so taken from the models
    that exist: gated MLPs use gelu, plain ones relu; positions saturate at distance 128.
    """

    def shape(path: str, rank: int) -> Shape:
        if path not in tensors:
            raise UserError(
                f"{root}: is not a T5 in T5X's layout: lacks {path}; it holds"
                f" {', '.join(sorted(tensors)[:3])}, ..."
            )
        if len(tensors[path].shape) != rank:
            found = list(tensors[path].shape)
            raise UserError(f"{tensors[path].file}: {path} has shape {found}, not {rank} axes")
        return tensors[path].shape

    def layers(stack: str) -> int:
        found = [int(m[2]) for m in map(LAYER.fullmatch, tensors) if m and m[1] == stack]
        return max(found, default=-1) + 1

    vocab_size, emb_dim = shape("token_embedder/embedding", 2)
    num_heads, buckets = shape("encoder/relpos_bias/rel_embedding", 2)
    query = "encoder/layers_0/attention/query/kernel"
    inner = shape(query, 2)[1]
    if num_heads == 0 or inner % num_heads:
        raise UserError(
            f"{tensors[query].file}: {query} has {inner} columns, which"
            f" {num_heads} heads (of encoder/relpos_bias/rel_embedding) do not divide"
        )
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=num_heads,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        head_dim=inner // num_heads,
        mlp_dim=shape("encoder/layers_0/mlp/wo/kernel", 2)[0],
        mlp_activations=(
            ("relu",) if "encoder/layers_0/mlp/wi/kernel" in tensors else ("gelu", "linear")
        ),
        logits_via_embedding="decoder/logits_dense/kernel" not in tensors,
        relpos_buckets=buckets,
    )


# --------------------------------------------------------------------- trees of scanned layers


def _unscanned(tensors: Mapping[str, Tensor], root: Path) -> dict[str, Tensor]:
    """The arrays of a tree of scanned layers under the paths of one subtree a layer.

    An array is read whole, once, as long as its layers are asked for one after the other.
    """
    embedding = tensors.get("token_embedder/embedding")
    width = embedding.shape[-1] if embedding and embedding.shape else 0
    whole = functools.lru_cache(maxsize=1)(lambda path: tensors[path].read())
    made = {}
    for path, tensor in tensors.items():
        match = SCANNED.fullmatch(path)
        if match is None:
            made[path] = tensor
            continue
        stack, inner = match[1], match[2]
        norm = tensors.get(path[: path.index(inner)] + "pre_mlp_layer_norm/scale")
        # A norm's scale is [D, N] or [N, D]; where both are equal, T5X's own axis 1.
        axis = 0 if norm and norm.shape[-1:] == (width,) != norm.shape[:1] else 1
        if len(tensor.shape) <= axis:
            raise UserError(f"{tensor.file}: {path} has shape {list(tensor.shape)}: no layers")
        if inner in TABLES:
            made[f"{stack}/relpos_bias/rel_embedding"] = _one_table(tensor, path, axis)
            continue
        for i in range(tensor.shape[axis]):
            load = functools.partial(_layer, whole, path, axis, i, inner)
            shape = _joined((*tensor.shape[:axis], *tensor.shape[axis + 1 :]), inner)
            layer = dataclasses.replace(tensor, shape=shape, load=load)
            made[f"{stack}/layers_{i}/{inner}"] = layer
    return made


def _layer(
    whole: Callable[[str], np.ndarray], path: str, axis: int, index: int, inner: str, rows: slice
) -> np.ndarray:
    layer = whole(path).take(index, axis)
    return layer.reshape(_joined(layer.shape, inner))[rows]


def _joined(shape: Shape, inner: str) -> Shape:
    """The shape of a layer's array with heads and head size as one axis."""
    if len(shape) != 3:
        return shape
    if inner.endswith("/out/kernel"):
        return shape[0] * shape[1], shape[2]
    return shape[0], shape[1] * shape[2]


def _one_table(tensor: Tensor, path: str, axis: int) -> Tensor:
    """The position table that all layers share; UserError when it is read and they do not."""

    def load(rows: slice) -> np.ndarray:
        tables = np.moveaxis(tensor.read(), axis, 0)
        if not all(np.array_equal(table, tables[0]) for table in tables):
            raise UserError(
                f"{tensor.file}: {path} differs from layer to layer, as in UMT5; this network has"
                " one position table for all layers of a stack, so it cannot compute that model"
            )
        return tables[0][rows]

    shape = (*tensor.shape[:axis], *tensor.shape[axis + 1 :])
    return dataclasses.replace(tensor, shape=shape, load=load)


# --------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def writer(
    folder: Path,
    sizes: T5Config,
    dtype_of: Callable[[str], np.dtype],
    *,
    step: int = 0,
    scanned: bool = False,
) -> Iterator[Put]:
    """Gives the function that writes one array under T5X's per-layer path, in any order.

    Everything is as T5X's Checkpointer writes a state without optimizer, byte for byte. Scanned,
    the layers of an array are kept in memory until it has them all, so they had better follow each
    other.
    """
    shapes = param_shapes(sizes)
    layouts = {}  # T5X's path -> shape there
    for path, shape in shapes.items():
        if scanned:
            layouts[_scanned_path(path)] = _scanned_shape(path, shape, sizes)
        else:
            layouts |= layer_paths(path, shape)
    first = {(_scanned_path(p) if scanned else n): n for p in shapes for n in [_first(p)]}
    target = {
        path: _placeholder(path, shape, dtype_of(first.get(path, path)))
        for path, shape in layouts.items()
    }
    waiting: dict[str, list[Any]] = {}  # path -> stacked array, how many layers are not there yet

    def put(path: str, array: np.ndarray) -> None:
        if not scanned:
            _write_zarr(folder, target[path], array)
            return
        name, layer = stacked_path(path)
        place = _scanned_path(name)
        if name.endswith("rel_embedding"):
            array = np.broadcast_to(array[:, None], layouts[place])
        elif layer is not None:
            whole = layouts[place]
            if name not in waiting:
                waiting[name] = [np.empty(whole, dtype_of(path)), whole[1]]
            waiting[name][0][:, layer] = array.reshape((whole[0], *whole[2:]))
            waiting[name][1] -= 1
            if waiting[name][1]:
                return
            array = waiting.pop(name)[0]
        _write_zarr(folder, target[place], array)

    yield put
    state = {"step": np.array(step, np.int32)}
    tree = traverse_util.unflatten_dict({k: target[k] for k in sorted(target)}, sep="/")
    content = {"version": VERSION, "optimizer": {"state": state, "target": tree}}
    # In place, or its keys would be sorted, unlike T5X's.
    (folder / FILE).write_bytes(serialization.msgpack_serialize(content, in_place=True))


def _first(path: str) -> str:
    return path.replace("/layers/", "/layers_0/")


def _scanned_path(path: str) -> str:
    """Where scalable_t5 has the array that is ours under a stacked path."""
    stack = path.partition("/")[0]
    if path.endswith(f"{stack}/relpos_bias/rel_embedding"):
        return f"{stack}/{stack}/relpos_bias/rel_embedding"
    return path.replace("/layers/", f"/{stack}/")


def _scanned_shape(path: str, shape: Shape, sizes: T5Config) -> Shape:
    """The shape there, layers on axis 1 and heads apart."""
    if path.endswith("rel_embedding"):
        layers = sizes.num_encoder_layers, sizes.num_decoder_layers
        return shape[0], layers[path.startswith("decoder")], shape[1]
    if "/layers/" not in path:
        return shape
    layer = shape[1:]
    heads = sizes.num_heads, sizes.head_dim
    if path.endswith("/out/kernel"):
        layer = (*heads, layer[1])
    elif path.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
        layer = (layer[0], *heads)
    return layer[0], shape[0], *layer[1:]


def _placeholder(path: str, shape: Shape, dtype: np.dtype) -> dict[str, Any]:
    """What stands in the tree for an array kept in zarr."""
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
    """T5X's chunks: divisors of the shape, the largest axis cut until there are few enough."""
    chunks = list(shape)
    while math.prod(chunks) > CHUNK:
        axis = max(range(len(chunks)), key=lambda i: (chunks[i], -i))
        chunks[axis] = next(n for n in range(chunks[axis] - 1, 0, -1) if shape[axis] % n == 0)
    return chunks


def _write_zarr(folder: Path, spec: dict[str, Any], array: np.ndarray) -> None:
    """Writes chunk by chunk, two at a time: an array is never whole in memory a second time."""
    try:
        _write_chunks(spec, folder / spec["kvstore"]["path"], array)
    except ValueError as error:  # of tensorstore, also where the disk is full
        raise OSError(str(error).split(" [tensorstore_spec")[0]) from error


def _write_chunks(spec: dict[str, Any], place: Path, array: np.ndarray) -> None:
    import tensorstore

    kvstore = {"driver": "file", "path": f"{place}/"}
    store = tensorstore.open({**spec, "kvstore": kvstore}, create=True).result()
    dtype = store.dtype.numpy_dtype
    steps = [range(0, n, c) for n, c in zip(array.shape, spec["metadata"]["chunks"], strict=True)]
    running: list[Any] = []
    for corner in itertools.product(*steps):
        chunks = zip(corner, spec["metadata"]["chunks"], strict=True)
        region = tuple(slice(at, at + size) for at, size in chunks)
        if len(running) == 2:
            running.pop(0).result()
        running.append(store[region].write(array[region].astype(dtype, copy=False)))
    for write in running:
        write.result()
