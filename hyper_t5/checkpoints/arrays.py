"""Arrays of a checkpoint: written by Orbax, read by TensorStore, checked by CRC-32.

Orbax has no checksums of array data: it restores flipped bytes without an error. The record has a
CRC-32 of each shard as it was saved. A reader reads the saved shards that overlap its own, checks
them whole and takes its part, so every byte is checked on any mesh and any number of processes.
The check takes 0.4 s of one core per GB, reading and decompressing takes 1.4 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from hyper_t5.checkpoints.steps import DamagedError, Specs, crc32, one_line
from hyper_t5.parallel import distributed
from hyper_t5.utils import files

Index = tuple[slice, ...]
Shards = dict[str, dict[str, np.ndarray]]  # leaf name -> {region, such as "0:4,8:16": array}
Digests = dict[str, dict[str, str]]  # leaf name -> {region: CRC-32}


def make_handler() -> ocp.PyTreeCheckpointHandler:
    """Create Orbax's handler of pytrees, which has no barriers between processes.

    Replica-parallel writing is off: it would store other regions than the shards.
    """
    logging.getLogger("absl").addFilter(_is_not_from_orbax)
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=False, enable_write_sharding_file=False
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, enable_pinned_host_transfer=False
    )


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname  # it logs the traceback of each error that it raises


def copy_shards(leaves: dict[str, Any]) -> Shards:
    """Copy the shards that this process writes, those with replica 0, to the host.

    JAX caches the host copy of a shard: Orbax writes the bytes that are returned here.
    """
    shards: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            shards[name] = {_whole(leaf.shape): leaf} if distributed.is_primary() else {}
            continue
        own = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        shards[name] = {_region(shard.index, leaf.shape): shard.data for shard in own}
    return jax.device_get(shards)


def start_write(
    handler: ocp.PyTreeCheckpointHandler, folder: epath.Path, leaves: dict[str, Any]
) -> list[Any]:
    """Copy the leaves to the host and start to write them; returns Orbax's futures."""
    request = ocp.args.PyTreeSave(traverse_util.unflatten_dict(leaves, sep="/"))
    return asyncio.run(handler.async_save(folder, args=request)) or []


def finish_write(futures: list[Any]) -> None:
    """Wait for all futures, even when one fails: a folder in use cannot be removed."""
    with contextlib.ExitStack() as stack:
        for future in futures:
            stack.callback(future.result)


def shard_digests(shards: Shards) -> Digests:
    """Compute the CRC-32 of each shard."""
    return {
        name: {region: _crc32(array) for region, array in regions.items()}
        for name, regions in shards.items()
    }


def add_digests(specs: Specs, digests: Sequence[Digests]) -> None:
    """Add the digests of all processes to the specs; ValueError if they do not cover a leaf."""
    for name, spec in specs.items():
        spec["shards"] = {region: crc for own in digests for region, crc in own[name].items()}
        regions = [_slices(region) for region in spec["shards"]]
        written = sum(math.prod(cut.stop - cut.start for cut in region) for region in regions)
        if written != math.prod(spec["shape"]):
            raise ValueError(f"{name}: {written} elements of {spec['shape']} were written")


def read_leaves(folder: epath.Path, specs: Specs, targets: dict[str, Any]) -> dict[str, Any]:
    """Read leaves and check them.

    Args:
      folder: Orbax's folder.
      specs: leaves of the record, by name.
      targets: by name an array or ShapeDtypeStruct, whose sharding the leaf gets, or None for a
        NumPy array.

    Raises:
      DamagedError: a leaf cannot be read, or differs from its spec; the message names the leaf.
    """
    import tensorstore

    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})

    def read(name: str) -> np.ndarray:
        try:
            return _read_leaf(_open(folder, name, context), specs[name], targets[name])
        except Exception as error:  # TensorStore has no common error type
            raise DamagedError(f"leaf {name}: {one_line(error)}") from error

    with ThreadPoolExecutor(4, "restore") as pool:  # checks one leaf while it reads others
        leaves = zip(targets.items(), pool.map(read, targets), strict=True)
        return {name: _put(array, target) for (name, target), array in leaves}


def _open(folder: epath.Path, name: str, context: Any) -> Any:
    """Open a leaf as a TensorStore."""
    import tensorstore

    path = f"{os.fspath(folder)}/"
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": path} if files.is_local(folder) else path,
        "path": f"{name.replace('/', '.')}/",
        "cache_pool": "cache_pool#ocdbt",
    }
    spec = {"driver": "zarr", "kvstore": kvstore}
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def _read_leaf(store: Any, spec: dict[str, Any], target: Any) -> np.ndarray:
    """Read the saved shards that this process needs into an array of the whole leaf."""
    shape, dtype = store.shape, store.dtype.numpy_dtype
    if (str(dtype), list(shape)) != (spec["dtype"], spec["shape"]):
        raise ValueError(f"is stored as {dtype}{list(shape)}")
    needed = [_slices(_whole(shape))]
    if sharding := _sharding(target):
        needed = list(sharding.addressable_devices_indices_map(shape).values())
    digests = spec["shards"] if "shards" in spec else {_whole(shape): spec["crc32"]}
    reads = {
        region: store[_slices(region)].read(order="C")
        for region in digests
        if any(_overlap(_slices(region), index, shape) for index in needed)
    }
    array = np.empty(shape, dtype)  # the memory of shards that are not read stays unused
    while reads:
        region, read = reads.popitem()
        shard = np.asarray(read.result())
        if _crc32(shard) != digests[region]:
            raise ValueError(f"region [{region}] does not match its checksum")
        array[_slices(region)] = shard
    return array


def _put(array: np.ndarray, target: Any) -> Any:
    """Put a leaf on the devices of its target."""
    if sharding := _sharding(target):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    on_device = isinstance(target, jax.Array | jax.ShapeDtypeStruct)
    return jax.device_put(array) if on_device else array


def _sharding(target: Any) -> Any:
    """Return the sharding to which a target commits its leaf, or None."""
    uncommitted = isinstance(target, jax.Array) and not target.committed
    return None if uncommitted else getattr(target, "sharding", None)


def _whole(shape: tuple[int, ...]) -> str:
    return ",".join(f"0:{size}" for size in shape)


def _region(index: Index, shape: tuple[int, ...]) -> str:
    """Format an index as `0:4,8:16`; that of a scalar is empty."""
    bounds = [cut.indices(size) for cut, size in zip(index, shape, strict=True)]
    return ",".join(f"{start}:{stop}" for start, stop, _ in bounds)


def _slices(region: str) -> Index:
    return tuple(slice(*map(int, bounds.split(":"))) for bounds in region.split(",") if bounds)


def _overlap(a: Index, b: Index, shape: tuple[int, ...]) -> bool:
    ranges = [(range(size)[x], range(size)[y]) for x, y, size in zip(a, b, shape, strict=True)]
    return all(max(x.start, y.start) < min(x.stop, y.stop) for x, y in ranges)


def _crc32(array: np.ndarray) -> str:
    return crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
