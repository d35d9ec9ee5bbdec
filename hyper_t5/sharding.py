"""Where every array of a run lies on a mesh of devices.

A mesh has three axes: `slice` (over the data-centre network between TPU slices), `data` and
`model`. Parameters carry T5X's logical axis names; `mesh.rules` says which of them a mesh axis
cuts (T5X's `standard_logical_axis_rules`). What is trained is *stored* cut once more, over `data`
(ZeRO, Rajbhandari et al. 2020): its optimizer state is as large as itself twice over. A step
gathers it, computes with it cut by the rules only, and scatters its gradients. Frozen weights are
read by all and reduced by none. Batches are cut by tasks over `slice` and `data`, and so are the
adapters made of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hyper_t5.adapters import Adapters
from hyper_t5.errors import UserError

Tree = Any
AXES = ("slice", "data", "model")
BATCH_AXES = ("slice", "data")


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which mesh axis cuts which logical axis ('' for none).

    Hashable, so that a model can hold it as a static argument of jit.
    """

    mesh: Mesh
    rules: tuple[tuple[str, str], ...]

    @property
    def parts(self) -> int:
        """In how many parts a batch is cut."""
        return self.mesh.shape["slice"] * self.mesh.shape["data"]

    @property
    def whole(self) -> NamedSharding:
        """On every device, all of it."""
        return self._at()

    @property
    def batch(self) -> NamedSharding:
        """Cut by its first dimension: the tasks, or the rows."""
        return self._at(BATCH_AXES)

    @property
    def microbatches(self) -> NamedSharding:
        """[parts, tasks, ...]: each of the parts as a batch is."""
        return self._at(None, BATCH_AXES)

    def computed(self, axes: Tree, shapes: Tree) -> Tree:
        """Shardings of parameters as a step computes with them: cut by the rules.

        ``axes`` has a tuple of names where ``shapes`` has an array, or its shape and dtype.

        Raises:
            UserError: a parameter has an axis without a rule; names both.
        """
        return self._each(axes, shapes, lambda spec, shape: spec)

    def stored(self, axes: Tree, shapes: Tree) -> Tree:
        """Shardings of trained parameters between steps: cut over `data` too; as `computed`."""
        return self._each(axes, shapes, self._over_data)

    def _each(self, axes: Tree, shapes: Tree, change: Any) -> Tree:
        def leaf(path: Any, names: Any, array: Any) -> NamedSharding:
            try:
                cut = self.cut(names, array.shape)
            except KeyError as error:
                raise UserError(
                    f"mesh.rules has none for the axis {error.args[0]} of parameter {_path(path)}; "
                    f"add {error.args[0]}= (not cut) or {error.args[0]}=model"
                ) from None
            return self._at(*change(cut, array.shape))

        return jax.tree_util.tree_map_with_path(
            leaf, axes, shapes, is_leaf=lambda x: isinstance(x, tuple)
        )

    def uneven(self, axes: Tree, shapes: Tree) -> dict[str, int]:
        """Logical axis -> a size of it that its mesh axis does not divide, and so does not cut."""
        found = {}
        leaves = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        for names, array in zip(leaves, jax.tree.leaves(shapes), strict=True):
            for name, size in zip(names, array.shape, strict=True):
                axis = dict(self.rules).get(name or "", "")
                if axis and size % self.mesh.shape[axis]:
                    found[name] = size
        return found

    def _at(self, *cut: Any) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(*cut))

    def cut(self, names: Sequence[str | None], shape: Sequence[int]) -> list[str | None]:
        """The mesh axis that cuts each dimension: each one once, and only in equal parts.

        Raises:
            KeyError: a name without a rule.
        """
        rules = dict(self.rules)
        made: list[str | None] = []
        for name, size in zip(names, shape, strict=True):
            axis = rules[name] if name is not None else ""
            fits = axis and axis not in made and size % self.mesh.shape[axis] == 0
            made.append(axis if fits else None)
        return made

    def _over_data(self, cut: list[str | None], shape: Sequence[int]) -> list[str | None]:
        """Cut once more over `data`, at the largest dimension that is whole and divides."""
        parts = self.mesh.shape["data"]
        whole = [i for i, axis in enumerate(cut) if axis is None and shape[i] % parts == 0]
        if parts == 1 or not whole or "data" in cut:
            return cut
        place = max(whole, key=lambda i: shape[i])
        return ["data" if i == place else axis for i, axis in enumerate(cut)]

    def adapters(self, made: Adapters) -> Adapters:
        """The same adapters, inside jit, told to lie with their tasks and their heads."""

        def leaf(path: Any, x: Any) -> Any:
            tasks = BATCH_AXES if x.shape[1] % self.parts == 0 else None
            inner = self.cut(_adapter_axes([key.key for key in path], x.ndim - 2), x.shape[2:])
            return jax.lax.with_sharding_constraint(x, self._at(None, tasks, *inner))

        tree = jax.tree_util.tree_map_with_path(leaf, made.tree)
        return Adapters(tree, made.spec)


def _adapter_axes(path: list[str], count: int) -> list[str | None]:
    """Logical names of an adapter leaf's dimensions behind [N, T]; None: of no parameter's."""
    site, *inner = path
    wide = "mlp" if site.endswith("mlp") else "joined_kv"
    ends_narrow = inner[0] in ("out", "wo")  # of a projection back to the model's width
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
    """The placement of `config.mesh` over all devices (or these, which need not be there).

    Raises:
        UserError: the sizes do not multiply to the number of devices, or a rule is none.
    """
    rules = []
    for rule in mesh_config.rules:
        name, equals, axis = rule.partition("=")
        if not equals or axis not in ("", *AXES):
            raise UserError(
                f"mesh.rules: {rule!r} must be NAME=AXIS with one of {', '.join(AXES)}, or NAME="
            )
        rules.append((name, axis))
    return Placement(make_mesh(mesh_config, devices), tuple(rules))


def make_mesh(mesh_config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh`; a size of -1 is what the others leave.

    On TPUs neighbours on the `model` axis are neighbours on the chips' own network, and each slice
    of `slice` is one TPU slice. In one process fewer devices than there are may be used.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [mesh_config.slices, mesh_config.data, mesh_config.model]
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    elif min(sizes) > 0 and known < len(devices) and jax.process_count() == 1:
        print(f"mesh: {known} of {len(devices)} devices are used", flush=True)
        devices = devices[:known]
    if int(np.prod(sizes)) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"mesh.slices, mesh.data, mesh.model = {mesh_config.slices}, {mesh_config.data}, "
            f"{mesh_config.model} do not make the {len(devices)} devices there are; one of them "
            "may be -1"
        )
    return Mesh(_arrange(devices, sizes), AXES, axis_types=(AxisType.Auto,) * 3)


def _arrange(devices: list[jax.Device], sizes: Sequence[int]) -> np.ndarray:
    """Devices [slices, data, model] in an order that suits their network."""
    slices, data, model = sizes
    if devices[0].platform != "tpu":
        return np.array(devices).reshape(sizes)
    # In the order of their torus, in which XLA's gathers and scatters go along its rings. Sorted by
    # host they become sums of arrays of zeros, with twice the traffic.
    if slices > 1:
        try:
            return mesh_utils.create_hybrid_device_mesh(
                (1, data, model), (slices, 1, 1), devices, allow_split_physical_axes=True
            )
        except ValueError as error:
            raise UserError(
                f"mesh.slices={slices}: {error}; set it to the slices there are"
            ) from None
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def describe(placement: Placement) -> str:
    """`8 devices: data 4 x model 2`."""
    shape = placement.mesh.shape
    cut = " x ".join(f"{axis} {size}" for axis, size in shape.items() if size > 1)
    count = placement.mesh.size
    return f"{count} device{'s' if count > 1 else ''}{': ' if cut else ''}{cut}"


def share_of(placement: Placement, process: int | None = None) -> tuple[int, int]:
    """Which equal share of a batch a process makes: (share, shares), as samplers take them.

    A process's devices have some of the batch's parts, and processes that have the same ones (where
    `model` spans them) make the same share. On a torus these parts may lie apart: `put_batch` deals
    a share out in their order, so that a batch's rows are the sampler's in another order.

    Raises:
        UserError: processes have parts in common, but not all of theirs.
    """
    process = jax.process_index() if process is None else process
    parts: dict[int, list[int]] = {}
    for i, row in enumerate(placement.mesh.devices.reshape(placement.parts, -1)):
        for owner in {device.process_index for device in row}:
            parts.setdefault(owner, []).append(i)
    shares = sorted({tuple(mine) for mine in parts.values()})
    if sum(map(len, shares)) != placement.parts or len({len(share) for share in shares}) > 1:
        raise UserError(
            f"mesh: processes have parts {', '.join(map(str, shares[:3]))}, ... of a batch, which "
            "are no equal shares; choose mesh.model as a divisor or a multiple of a host's devices"
        )
    return shares.index(tuple(parts[process])), len(shares)


def check_batch(tasks: int, microbatches: int, placement: Placement) -> None:
    """UserError where a batch of so many tasks cannot be cut over the mesh in equal parts."""
    each = placement.parts * microbatches
    if tasks % each:
        raise UserError(
            f"data.tasks_per_batch={tasks} cannot be cut over mesh.slices x mesh.data = "
            f"{placement.parts} parts, train.microbatches={microbatches} times each; make it a "
            f"multiple of {each}, or set mesh.data and mesh.model"
        )


def of_state(opt_shapes: Any, params: Tree, placed: Tree, placement: Placement) -> Any:
    """Shardings of an optimizer state: a leaf as large as a parameter lies where that lies.

    Leaves are matched by the end of their path (optax keeps the parameters' tree inside its own);
    what is smaller, such as Adafactor's rows and columns, is whole on every device.
    """
    flat = {
        _path(path): (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(placed), strict=True
        )
    }

    def leaf(path: Any, array: Any) -> NamedSharding:
        end = _path(path).split("/")
        for start in range(len(end)):
            shape, where = flat.get("/".join(end[start:]), ((), None))
            if where is not None and shape == array.shape:
                return where
        return placement.whole

    return jax.tree_util.tree_map_with_path(leaf, opt_shapes)


def _path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# ------------------------------------------------------------------------ between host and devices


def put(tree: Tree, shardings: Tree) -> Tree:
    """Host arrays, which every process has whole, on the devices; each takes what it needs."""

    def leaf(x: Any, where: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == where:
            return x
        if isinstance(x, jax.Array) and x.is_fully_addressable and where.is_fully_addressable:
            return jax.device_put(x, where)
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(lambda x: x, out_shardings=where)(x)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, where, lambda index: host[index])

    return jax.tree.map(leaf, tree, shardings)


def put_batch(share: Mapping[str, np.ndarray], placement: Placement) -> dict[str, jax.Array]:
    """A process's share of a batch (`share_of`) -> the global batch, cut over the devices."""
    at = placement.batch
    return {k: jax.make_array_from_process_local_data(at, x) for k, x in share.items()}


def fetch(tree: Tree) -> Tree:
    """Device arrays as numpy, whole, on every process; each process must call it."""

    def leaf(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            assert isinstance(x.sharding, NamedSharding)
            whole = NamedSharding(x.sharding.mesh, PartitionSpec())
            x = jax.jit(lambda x: x, out_shardings=whole)(x)
        return np.asarray(x)

    return jax.tree.map(leaf, tree)


def struct(shapes: Tree, shardings: Tree) -> Tree:
    """Shapes and dtypes that say where they lie: to compile for, or to restore into."""
    return jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
