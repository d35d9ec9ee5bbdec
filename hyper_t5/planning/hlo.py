"""Cost analysis of a compiled XLA program: FLOPs, HBM bytes and collectives of one device.

The analysis reads the optimized HLO text (``Compiled.as_text()``), because
``Compiled.cost_analysis()`` counts the body of a loop once (41.9 instead of 78.3 GFLOPs for a
training step with two scanned layers, libtpu 0.0.42.1) and lists no collectives. Here the body of
a loop counts once per iteration, and every collective has mesh axes, bytes and a number of runs.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_COLLECTIVE = re.compile(
    "all-gather|all-reduce|reduce-scatter|(ragged-)?all-to-all|collective-(permute|broadcast)"
)
# Ops that move no bytes: they rename values, or their bodies are counted by themselves.
_NO_TRAFFIC = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional|after-all|"
    "partition-id|replica-id|iota|opt-barrier|.*-done"
)
_COPY = re.compile("bitcast|copy|convert|reshape|transpose")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Data type, dimensions and memory space (0 is HBM, others are on the chip) of an array."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Size without the padding of tiles; 0 for tokens and opaque values."""
        bits = re.search(r"\d+", self.dtype)  # bf16, s4, c64, f8e4m3fn
        return self.elements * (int(bits[0]) / 8 if bits else self.dtype == "pred")

    @property
    def hbm_bytes(self) -> float:
        """Size if the array is in HBM, else 0."""
        return 0.0 if self.space else self.bytes


@dataclasses.dataclass(eq=False)
class Op:
    """One instruction: ``shapes`` of its result (of a tuple, all), ``text`` of its arguments."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    text: str
    attributes: str
    computation: Computation

    @functools.cached_property
    def operands(self) -> list[Op]:
        """The ops that define the arguments."""
        return [self.computation.ops[name] for name in re.findall(r"%([\w.\-]+)", self.text)]

    @property
    def kind(self) -> str:
        """The opcode without the suffix of the first half of an asynchronous pair."""
        return self.opcode.removesuffix("-start")

    @property
    def fused(self) -> Computation | None:
        """The computation of a fusion or of a wrapped asynchronous op; None for other ops."""
        return self.called("calls") if self.opcode in ("fusion", "async-start") else None

    def attribute(self, pattern: str) -> str:
        """Return the first group of a pattern in the attributes, or ''."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""

    def called(self, role: str) -> Computation:
        """Return the computation that an attribute such as ``body`` names."""
        return self.computation.module[self.attribute(rf"\b{role}=%?([\w.\-]+)")]


@dataclasses.dataclass(eq=False)
class Computation:
    """Ops by name in program order; ``module`` holds all computations of the program."""

    name: str
    module: dict[str, Computation]
    ops: dict[str, Op] = dataclasses.field(default_factory=dict)
    root: str = ""
    caller: Op | None = None  # the fusion that contains this computation


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a device; ``runs`` is not multiplied into the other fields."""

    kind: str
    # [groups, devices per group], positions in the mesh of one slice; None: between slices.
    groups: np.ndarray | None
    payload: float  # bytes of the array that a group shares: of the gathered one, else the operand
    count: int  # elements of that array
    sent: float  # bytes that a device puts on its links, by the ring algorithm
    runs: int


@dataclasses.dataclass
class Totals:
    """Costs of one device in one run of a program."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0  # loops with an unknown trip count, whose body is counted once


# ----------------------------------------------------------------------------------------- parsing


def parse(text: str) -> Computation:
    """Parse the text of an optimized HLO module and return its entry computation.

    Raises:
      ValueError: the text has no entry computation.
    """
    module: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if current is None:
            if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                current = module[head[2]] = Computation(head[2], module)
                entry = current if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _OP.match(re.sub(r"/\*.*?\*/", "", line)):  # without /*index=5*/
            root, name, result, opcode, arguments, attributes = match.groups()
            shapes = _parse_shapes(result)
            current.ops[name] = Op(name, opcode, shapes, arguments, attributes, current)
            current.root = name if root else current.root
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of an HLO module")
    for computation in module.values():
        for op in computation.ops.values():
            if op.fused:
                op.fused.caller = op
    return entry


_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)\)(.*)")


def _parse_shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for dtype, sizes, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", text):
        space = re.search(r"S\((\d+)\)", layout)
        dims = tuple(int(n) for n in re.findall(r"\d+", sizes))
        shapes.append(Shape(dtype, dims, int(space[1]) if space else 0))
    return tuple(shapes)


# ------------------------------------------------------------------------------------------ totals


def totals(entry: Computation, slices: int = 1) -> Totals:
    """Sum the costs of one device of ``slices``, with loop bodies counted once per iteration."""
    result = Totals()
    _accumulate(entry, 1, slices, result)
    return result


def _accumulate(computation: Computation, runs: int, slices: int, result: Totals) -> None:
    overlapped: set[str] = set()  # channels of collectives that appear in several fusions
    for op in computation.ops.values():
        if op.opcode == "while":
            trips = trip_count(op)
            result.unknown_loops += trips is None
            _accumulate(op.called("body"), runs * (1 if trips is None else trips), slices, result)
        elif op.opcode in ("call", "conditional", "async-start") and not any(_collectives(op)):
            for body in _bodies(op):
                _accumulate(body, runs, slices, result)
        elif op.opcode == "send" and "xla_megascale" in op.attributes:
            result.collectives.append(_between_slices(op, runs, slices))
        else:
            result.flops += runs * _flops(op)
            result.hbm_bytes += runs * _hbm_bytes(op)
            for collective in _collectives(op):
                channel = collective.attribute(r"channel_id=(\d+)")
                if channel and "async_collective_fusion_config" in collective.attributes:
                    if channel in overlapped:
                        continue
                    overlapped.add(channel)
                result.collectives.append(_measure(collective, runs))


def _bodies(op: Op) -> list[Computation]:
    """Return the computations that an op calls; of a conditional all, which is an upper bound."""
    roles = r"(?:calls|to_apply|\w+_computations?)=\{?(%[\w.\-]+(?:, %[\w.\-]+)*)"
    names = ", ".join(re.findall(roles, op.attributes)).split(", ")
    return [op.computation.module[name.removeprefix("%")] for name in names]


# ------------------------------------------------------------------------------------------- loops


def trip_count(loop: Op) -> int | None:
    """Return how often the body of a loop runs, at most; None if the program does not determine it.

    Loops of ``scan``, ``fori_loop`` and XLA compare a counter with a constant. The counter starts
    at a constant and grows by 1, or by more where XLA has unrolled the body. A ``while_loop`` may
    have further conditions, which end it earlier.
    """
    if known := loop.attribute(r"known_trip_count\W+n\W+(\d+)"):
        return int(known)
    condition, body = loop.called("condition"), loop.called("body")
    counts = []
    for op in _with_fused(condition):
        direction = op.attribute(r"direction=(\w+)")
        if op.opcode != "compare" or direction not in ("LT", "GT", "LE", "GE"):
            continue
        bounds, step = [], 1
        for operand in op.operands:
            source, index = _source(operand)
            if source.computation is condition and source.opcode == "parameter":
                # The counter: an element of the loop's state. Its initial value is the bound.
                source, _ = _source(loop.operands[0], index)
                step = _increment(body, index)
            if (value := _constant(source)) is not None:
                bounds.append(value)
        if len(bounds) == 2:
            counts.append(-(-(abs(bounds[1] - bounds[0]) + direction.endswith("E")) // step))
    return min(counts) if counts else None


def _with_fused(computation: Computation) -> Iterator[Op]:
    """Yield all ops of a computation, including those inside fusions."""
    for op in computation.ops.values():
        yield op
        if op.fused:
            yield from _with_fused(op.fused)


def _source(op: Op, index: int | None = None) -> tuple[Op, int | None]:
    """Follow a value through copies, tuples and fusions; ``index`` selects a tuple element."""
    if op.opcode == "get-tuple-element":
        return _source(op.operands[0], int(op.attribute(r"index=(\d+)")))
    if op.opcode == "tuple" and index is not None:
        return _source(op.operands[index])
    if op.opcode == "parameter" and op.computation.caller:
        return _source(op.computation.caller.operands[int(op.text)], index)
    return _source(op.operands[0], index) if _COPY.fullmatch(op.opcode) else (op, index)


def _constant(op: Op) -> int | None:
    return int(op.text) if op.opcode == "constant" and re.fullmatch(r"-?\d+", op.text) else None


def _increment(body: Computation, index: int | None) -> int:
    """Return what one iteration adds to the counter at ``index`` of the state; 1 if unknown."""
    op, _ = _source(body.ops[body.root], index)
    terms = [_constant(_source(operand)[0]) for operand in op.operands if op.opcode == "add"]
    return next((abs(term) for term in terms if term), 1)


# ------------------------------------------------------------------------------------------- FLOPs


def _flops(op: Op) -> float:
    """Count two FLOPs per multiply-add of matrix products; element-wise ops do not count."""
    if op.fused:
        return sum(map(_flops, op.fused.ops.values()))
    if op.opcode == "convolution":
        return _convolution_flops(op)
    if op.opcode != "dot":
        return 0.0
    contracted = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
    sizes = op.operands[0].shapes[0].sizes
    depth = math.prod(sizes[int(i)] for i in contracted.split(",") if i)
    return 2.0 * op.shapes[0].elements * depth


def _convolution_flops(op: Op) -> float:
    """Count the FLOPs of a convolution; TPUs write all matrix products as convolutions.

    Batch dimensions of a product become spatial dimensions, whose window overlaps the input at a
    few positions only: these alone count.
    """
    left, right, out = (x.shapes[0].sizes for x in (*op.operands[:2], op))
    lhs, rhs, result = re.split("_|->", op.attribute(r"dim_labels=([^\s,]+)"))
    window = dict(re.findall(r"(\w+)=([\d_x\-]+)", op.attribute(r"window=\{([^}]*)\}")))
    products = left[lhs.index("b")] * left[lhs.index("f")] * out[result.index("f")]
    for i, label in enumerate(sorted(set(lhs) - set("bf"))):

        def field(key: str, default: int, i: int = i) -> int:
            return int(window[key].split("x")[i].split("_")[0]) if key in window else default

        outputs = np.arange(out[result.index(label)])[:, None] * field("stride", 1)
        taps = np.arange(right[rhs.index(label)])[None] * field("rhs_dilate", 1)
        positions = outputs + taps - field("pad", 0)
        inputs, rest = np.divmod(positions, field("lhs_dilate", 1))
        products *= int(((inputs >= 0) & (inputs < left[lhs.index(label)]) & (rest == 0)).sum())
    return 2.0 * products


# --------------------------------------------------------------------------------------- HBM bytes


def _hbm_bytes(op: Op) -> float:
    """Count the bytes that an op reads from HBM and writes to it."""
    if _NO_TRAFFIC.fullmatch(op.opcode) or "AllocateBuffer" in op.attributes:
        return 0.0
    if op.opcode.endswith("-start") and not op.fused:
        return sum(shape.hbm_bytes for shape in op.shapes)  # the result includes the operand
    arrays = [(i, o.shapes[0]) for i, o in enumerate(op.operands) if len(o.shapes) == 1]
    return _bytes_written(op) + sum(_bytes_read(op, i, shape.hbm_bytes) for i, shape in arrays)


def _bytes_read(op: Op, position: int, size: float) -> float:
    """Count the bytes that an op reads of the operand at ``position``, which has ``size`` bytes."""
    if not size or op.opcode == "tuple":
        return 0.0
    if op.opcode == "dynamic-update-slice" and position == 0:
        return 0.0  # updated in place
    if op.opcode in ("dynamic-slice", "gather", "slice"):
        return min(size, op.shapes[0].bytes) if position == 0 else 0.0  # indices hardly count
    if op.fused:
        inner = op.fused.ops.values()
        [value] = (o for o in inner if o.opcode == "parameter" and int(o.text) == position)
        return _bytes_read_by_users(value, size)
    return _bytes_read_by_users(op, size) if op.opcode == "bitcast" else size


def _bytes_read_by_users(value: Op, size: float) -> float:
    uses = (
        _bytes_read(user, position, size)
        for user in value.computation.ops.values()
        for position, operand in enumerate(user.operands)
        if operand is value
    )
    return min(size, sum(uses))


def _bytes_written(op: Op) -> float:
    if op.fused:
        return _bytes_written(op.fused.ops[op.fused.root])
    if op.opcode == "tuple":
        return sum(map(_bytes_written, set(op.operands)))
    if op.opcode in ("parameter", "get-tuple-element"):
        return 0.0
    if op.opcode == "bitcast":
        return 0.0 if op.shapes[0].space else _bytes_written(op.operands[0])
    if op.opcode == "dynamic-update-slice":
        return 0.0 if op.shapes[0].space else op.operands[1].shapes[0].bytes
    return sum(shape.hbm_bytes for shape in op.shapes)


# ------------------------------------------------------------------------------------- collectives


def _collectives(op: Op) -> Iterator[Op]:
    """Yield the collectives that an op is or contains."""
    if op.fused:
        for inner in op.fused.ops.values():
            yield from _collectives(inner)
    elif _COLLECTIVE.fullmatch(op.kind):
        yield op


def _measure(op: Op, runs: int) -> Collective:
    kind, arrays = op.kind, [shape for operand in op.operands for shape in operand.shapes]
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute(r"source_target_pairs=(\{[^=]*\}\})"))
        groups = np.array(pairs, int).reshape(-1, 2)
        arrays, share, size = arrays[:1], 1.0, 1
    else:
        groups = replica_groups(op.attributes)
        size = groups.shape[1]
        share = (size - 1) / size
    # TPUs write a reduce-scatter as a fusion of this name: an all-reduce and a slice of its result.
    if kind == "all-reduce" and "reduce-scatter" in op.computation.name:
        kind = "reduce-scatter"
    parts = size if kind == "all-gather" else 1
    payload = sum(shape.bytes for shape in arrays) * parts
    if kind == "all-reduce":
        share *= 2
    elif kind.endswith("all-to-all"):  # blocks pass through the devices of the ring between
        share = max(share, size / 4)
    count = sum(shape.elements for shape in arrays) * parts
    return Collective(kind, groups, payload, count, payload * share, runs)


def _between_slices(op: Op, runs: int, slices: int) -> Collective:
    """Measure a transfer that a TPU program hands to its host, for the hosts of other slices."""
    kind = op.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    shape = op.operands[0].shapes[0]
    parts = slices if kind == "all-gather" else 1
    share = (slices - 1) / slices * (2 if kind == "all-reduce" else 1)
    payload = shape.bytes * parts
    return Collective(kind, None, payload, shape.elements * parts, payload * share, runs)


def replica_groups(attributes: str) -> np.ndarray:
    """Parse the ``replica_groups`` of a collective.

    XLA has three notations: ``{{0,2},{1,3}}`` lists the groups; ``[2,2]<=[2,2]T(1,0)`` reshapes and
    transposes the sequence of devices; ``mesh['a'=2,'b'=2] {'b'}`` groups along mesh axes, with
    devices in sequence or in the order of ``device_ids=([2,2]T(1,0))``.

    Returns:
      [groups, devices per group].

    Raises:
      ValueError: the notation is unknown.
    """
    if match := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        rows = re.findall(r"\{([\d,]+)\}", match[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if match := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(match[1])
    form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
    if match := re.search(form, attributes):
        return _groups_along_axes(match[1], match[2], match[3])
    match = re.search(r"replica_groups=\S*", attributes)
    raise ValueError(f"cannot parse {match[0] if match else 'a collective without replica_groups'}")


def _iota(text: str) -> np.ndarray:
    """Evaluate ``[shape]<=[source shape]T(permutation)``."""
    parts = re.split(r"<=|(?=T\()", text)
    shape, source, *axes = ([int(n) for n in re.findall(r"\d+", part)] for part in parts)
    devices = np.arange(math.prod(source)).reshape(source)
    return (devices.transpose(axes[0]) if axes else devices).reshape(shape)


def _groups_along_axes(mesh: str, devices: str | None, axes: str) -> np.ndarray:
    """Group devices along mesh axes, or along parts of axes, ``'a':(before)size``."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", mesh)}
    parts = re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes)
    selected = {name: (int(before or 1), int(n or sizes[name])) for name, before, n in parts}
    shape: list[int] = []  # [before, selected, after] for each axis
    for name, n in sizes.items():
        before, size = selected.get(name, (n, 1))
        shape += [before, size, n // before // size]
    total = math.prod(shape)
    order = _iota(f"[{total}]<={devices}") if devices else np.arange(total)
    grouped = np.moveaxis(order.reshape(shape), range(1, len(shape), 3), range(-len(sizes), 0))
    return grouped.reshape(-1, math.prod(shape[1::3]))


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """Return the mesh axes along which groups [groups, n] differ: ``data+model``, or ``none``."""
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.values())), -1)  # [groups, n, axes]
    differs = (coordinates != coordinates[:, :1]).any((0, 1))
    return "+".join(name for name, d in zip(mesh, differs, strict=True) if d) or "none"


def by_axes(
    collectives: Sequence[Collective], mesh: Mapping[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Sum collectives over their runs, by mesh axes ("dcn" between slices) and kind.

    Returns:
      {axes: {kind: {"payload", "count", "sent", "runs"}}}.
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for c in collectives:
        axes = "dcn" if c.groups is None else axes_of(c.groups, mesh)
        if axes == "none":
            continue
        cell = table.setdefault(axes, {}).setdefault(c.kind, collections.defaultdict(float))
        for key, value in (("payload", c.payload), ("count", c.count), ("sent", c.sent)):
            cell[key] += value * c.runs
        cell["runs"] += c.runs
    return table
