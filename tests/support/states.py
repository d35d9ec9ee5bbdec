"""States to save, on one device or on a mesh of eight, and their comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

META = {"seed": 3, "adapter": {"lora": {"targets": ["enc_self.query"], "rank": 4}}}
AXES = {"rows": ("data",), "both": ("data", "model"), "inner": (None, "model", "data")}


def numpy_state(seed: int = 0) -> dict[str, Any]:
    """Leaves that `on_mesh` shards in different ways, of the size of several OCDBT blocks."""
    rng = np.random.default_rng(seed)
    params = {
        "rows": rng.normal(size=(8, 1000)).astype(np.float32),
        "both": rng.normal(size=(64, 320)).astype(jnp.bfloat16),
        "inner": rng.normal(size=(3, 8, 800)).astype(np.float32),
        "whole": rng.normal(size=(1000,)).astype(np.float32),
    }
    return {"params": params, "step": np.int32(seed)}


def many_leaves(step: int) -> dict[str, Any]:
    """Tens of files per save, so that a kill interrupts one."""
    rng = np.random.default_rng(step)
    params = {f"{i}": {"both": rng.normal(size=(64, 256)).astype(np.float32)} for i in range(20)}
    return {"params": params, "step": np.int32(step)}


def on_mesh(state: Any, rows: int) -> Any:
    """Shard a state over ROWS x 8/ROWS devices, by the names of its leaves."""
    mesh = jax.make_mesh((rows, 8 // rows), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def put(path: Any, leaf: Any) -> Any:
        leaf = np.asarray(leaf)
        sharding = NamedSharding(mesh, PartitionSpec(*AXES.get(path[-1].key, ())))
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree_util.tree_map_with_path(put, state)


def assert_same(actual: Any, expected: Any) -> None:
    """Compare paths, dtypes, shapes and bits; of arrays over several processes, the local part."""
    trees = [jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected)]
    for (path, leaf), (expected_path, expected_leaf) in zip(*trees, strict=True):
        assert path == expected_path
        assert (leaf.dtype, leaf.shape) == (expected_leaf.dtype, expected_leaf.shape), path
        whole = np.asarray(expected_leaf)
        if isinstance(leaf, jax.Array):
            for shard in leaf.addressable_shards:
                assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes(), path
        else:
            assert leaf.tobytes() == whole.tobytes(), path


def folder_of(workdir: Path, step: int) -> Path:
    """Return the folder of a checkpoint."""
    return workdir / "checkpoints" / str(step)


def saved_steps(workdir: Path) -> list[str]:
    """List everything beside the checkpoints, in the order of steps."""
    return sorted((x.name for x in (workdir / "checkpoints").iterdir()), key=lambda x: (len(x), x))


def flip_bit(file: Path, position: float) -> None:
    """Flip one bit of a file; the position is between 0 and 1."""
    content = bytearray(file.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x10
    file.write_bytes(content)
