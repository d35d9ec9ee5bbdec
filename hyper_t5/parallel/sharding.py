"""Meshes and shardings: how parameters, optimizer states and batches are split over devices.

A mesh has three axes: `slice` (over the data-center network between TPU slices), `data` and
`model`. Parameters carry T5X's logical axis names, and `mesh.rules` maps them to mesh axes (T5X's
`standard_logical_axis_rules`). Between steps, trained parameters and their optimizer states are
sharded over `data` as well (ZeRO, Rajbhandari et al. 2020). A step gathers the parameters, computes
with the shardings of the rules, and scatters the gradients. Frozen weights are never reduced.
Batches and generated adapters are sharded by task over `slice` and `data`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hyper_t5.adapters import Adapters
from hyper_t5.utils.errors import UserError

Tree = Any
AXES = ("slice", "data", "model")
BATCH_AXES = ("slice", "data")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and the mesh axis ('' for none) of every logical axis.

    Hashable, so that a model can hold it as a static argument of jit.
    """

    mesh: Mesh
    rules: tuple[tuple[str, str], ...]

    @property
    def batch_shards(self) -> int:
        """Number of shards of a batch."""
        return self.mesh.shape["slice"] * self.mesh.shape["data"]

    @property
    def replicated(self) -> NamedSharding:
        """Sharding of an array that every device holds whole."""
        return self._sharding()

    @property
    def batch_sharding(self) -> NamedSharding:
        """Sharding by the first dimension: tasks, or rows."""
        return self._sharding(BATCH_AXES)

    @property
    def microbatch_sharding(self) -> NamedSharding:
        """Sharding of [microbatches, tasks, ...] by tasks."""
        return self._sharding(None, BATCH_AXES)

    def compute_sharding(self, axes: Tree, shapes: Tree) -> Tree:
        """Return the shardings of parameters during a step: by the rules.

        Args:
          axes: tuples of logical axis names, in the tree structure of `shapes`.
          shapes: arrays, or their shapes and dtypes.

        Raises:
          UserError: a parameter has an axis without a rule.
        """

        def leaf(path: Any, names: Any, array: Any) -> NamedSharding:
            try:
                return self._sharding(*self._spec(names, array.shape))
            except KeyError as error:
                raise UserError(
                    f"mesh.rules has no rule for the axis {error.args[0]} of parameter "
                    f"{_path(path)}; add {error.args[0]}= (not sharded) or {error.args[0]}=model"
                ) from None

        return jax.tree_util.tree_map_with_path(
            leaf, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    def storage_sharding(self, axes: Tree, shapes: Tree) -> Tree:
        """Return the shardings of trained parameters between steps: over `data` as well."""
        return jax.tree.map(self._shard_over_data, self.compute_sharding(axes, shapes), shapes)

    def indivisible_axes(self, axes: Tree, shapes: Tree) -> dict[str, int]:
        """Return {logical axis: size} of axes that their mesh axis does not divide."""
        sizes = {}
        leaves = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        for names, array in zip(leaves, jax.tree.leaves(shapes), strict=True):
            for name, size in zip(names, array.shape, strict=True):
                axis = dict(self.rules).get(name or "", "")
                if axis and size % self.mesh.shape[axis]:
                    sizes[name] = size
        return sizes

    def constrain_adapters(self, adapters: Adapters) -> Adapters:
        """Constrain adapters, inside jit, to be sharded as their tasks and heads are."""

        def constrain(path: Any, x: Any) -> Any:
            tasks = BATCH_AXES if x.shape[1] % self.batch_shards == 0 else None
            names = _adapter_axes([key.key for key in path], x.ndim - 2)
            sharding = self._sharding(None, tasks, *self._spec(names, x.shape[2:]))
            return jax.lax.with_sharding_constraint(x, sharding)

        tree = jax.tree_util.tree_map_with_path(constrain, adapters.tree)
        return Adapters(tree, adapters.spec)

    def _sharding(self, *spec: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def _spec(self, names: Sequence[str | None], shape: Sequence[int]) -> list[str | None]:
        """Return the mesh axis of each dimension: each axis once, and only where it divides."""
        rules = dict(self.rules)
        spec: list[str | None] = []
        for name, size in zip(names, shape, strict=True):
            axis = rules[name] if name is not None else ""
            fits = axis and axis not in spec and size % self.mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        return spec

    def _shard_over_data(self, sharding: NamedSharding, array: Any) -> NamedSharding:
        """Shard the largest free dimension that `data` divides."""
        spec, size = list(sharding.spec), self.mesh.shape["data"]
        free = [i for i, axis in enumerate(spec) if axis is None and array.shape[i] % size == 0]
        if size == 1 or not free or "data" in spec:
            return sharding
        spec[max(free, key=lambda i: array.shape[i])] = "data"
        return self._sharding(*spec)


def _adapter_axes(path: list[str], count: int) -> list[str | None]:
    """Return the logical axes of an adapter leaf's dimensions after [N, T]."""
    site, *inner = path
    wide = "mlp" if site.endswith("mlp") else "joined_kv"
    ends_narrow = inner[0] in ("out", "wo")  # a projection back to the model's width
    match inner:
        case ["prefix", "key" | "value"]:
            return [None, "heads", None]
        case [_, "a"] if ends_narrow:
            return [wide, None]
        case [_, "b"] if not ends_narrow:
            return [None, wide]
        case [_, "bias"] if not ends_narrow:
            return [wide]
    return [None] * count


def make_placement(mesh_config: Any, devices: Sequence[jax.Device] | None = None) -> Placement:
    """Return the placement of `config.mesh`.

    A size of -1 is the number of devices that the other sizes leave. A single process may use fewer
    devices than it has. `hyper-t5 plan` passes descriptions of devices.

    Raises:
      UserError: the product of the sizes is not the number of devices, or a rule is invalid.
    """
    rules = []
    for rule in mesh_config.rules:
        name, equals, axis = rule.partition("=")
        if not equals or axis not in ("", *AXES):
            raise UserError(
                f"mesh.rules: {rule!r} must be NAME=AXIS with one of {', '.join(AXES)}, or NAME="
            )
        rules.append((name, axis))
    devices = list(jax.devices() if devices is None else devices)
    sizes = [mesh_config.slices, mesh_config.data, mesh_config.model]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif min(sizes) > 0 and known < len(devices) and jax.process_count() == 1:
        print(f"mesh: {known} of {len(devices)} devices are used", flush=True)
        devices = devices[:known]
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"mesh.slices, mesh.data, mesh.model = {mesh_config.slices}, {mesh_config.data}, "
            f"{mesh_config.model} do not multiply to the {len(devices)} devices available; one of "
            "them may be -1"
        )
    mesh = Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * 3)
    return Placement(mesh, tuple(rules))


def _arrange(devices: list[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Return devices [slices, data, model], neighbors on TPUs' networks next to each other."""
    slices, data, model = sizes
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    # XLA's gathers and scatters follow the rings of the torus in this order. With devices sorted by
    # process they become all-reduces of zero-padded arrays, with twice the traffic.
    if slices > 1:
        try:
            return mesh_utils.create_hybrid_device_mesh(
                (1, data, model), (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        except ValueError as error:
            raise UserError(
                f"mesh.slices={slices}: {error}; set it to the number of TPU slices"
            ) from None
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def describe_mesh(placement: Placement) -> str:
    """Describe a mesh as in `8 devices: data 4 x model 2`."""
    axes = " x ".join(f"{axis} {size}" for axis, size in placement.mesh.shape.items() if size > 1)
    count = placement.mesh.size
    return f"{count} device{'s' if count > 1 else ''}{': ' if axes else ''}{axes}"


def batch_share(placement: Placement, process_index: int | None = None) -> tuple[int, int]:
    """Return (index, count): which of `count` equal shares of a batch this process loads.

    Processes that hold the same batch shards (`model` spans them) load the same share. On a torus
    the batch shards of a process may not be adjacent; then `device_put_batch` permutes the batch.

    Raises:
      UserError: the batch shards of two processes overlap in part.
    """
    process_index = jax.process_index() if process_index is None else process_index
    held: dict[int, list[int]] = {}  # process -> its batch shards
    for shard, row in enumerate(placement.mesh.devices.reshape(placement.batch_shards, -1)):
        for process in {device.process_index for device in row}:
            held.setdefault(process, []).append(shard)
    shares = sorted({tuple(shards) for shards in held.values()})
    if sum(map(len, shares)) != placement.batch_shards or len(set(map(len, shares))) > 1:
        raise UserError(
            f"mesh: the batch shards of processes, {', '.join(map(str, shares[:3]))}, ..., are not "
            "equal shares; choose mesh.model as a divisor or a multiple of a process's devices"
        )
    return shares.index(tuple(held[process_index])), len(shares)


def check_batch(tasks: int, microbatches: int, placement: Placement) -> None:
    """Raise UserError when a batch of so many tasks cannot be split equally over the mesh."""
    divisor = placement.batch_shards * microbatches
    if tasks % divisor:
        raise UserError(
            f"data.tasks_per_batch={tasks} cannot be split into mesh.slices x mesh.data = "
            f"{placement.batch_shards} shards of train.microbatches={microbatches} each; make it a "
            f"multiple of {divisor}, or set mesh.data and mesh.model"
        )


def state_sharding(opt_shapes: Any, params: Tree, shardings: Tree, placement: Placement) -> Any:
    """Return the shardings of an optimizer state: those of its parameters where shapes agree.

    Leaves are matched by the end of their path, as optax nests the parameters' tree in its own.
    Smaller leaves, such as Adafactor's rows and columns, are replicated.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    known = {
        (_path(path), param.shape): sharding
        for (path, param), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    }

    def leaf(path: Any, array: Any) -> NamedSharding:
        names = _path(path).split("/")
        ends = (("/".join(names[start:]), array.shape) for start in range(len(names)))
        return next((known[end] for end in ends if end in known), placement.replicated)

    return jax.tree_util.tree_map_with_path(leaf, opt_shapes)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def device_put(tree: Tree, shardings: Tree) -> Tree:
    """Place arrays on the devices; every process passes whole host arrays, or global arrays."""

    def leaf(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.is_fully_addressable == sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(leaf, tree, shardings)


def device_put_batch(share: Mapping[str, np.ndarray], placement: Placement) -> dict[str, jax.Array]:
    """Return the global batch, on the devices, from every process's share (`batch_share`)."""
    sharding = placement.batch_sharding
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in share.items()}


def fetch(tree: Tree) -> Tree:
    """Return device arrays as whole numpy arrays, on every process; all processes must call it."""

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def struct(shapes: Tree, shardings: Tree) -> Tree:
    """Return shapes and dtypes with shardings: to compile for, or to restore into."""

    def leaf(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(leaf, shapes, shardings)
