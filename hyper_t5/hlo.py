"""What a compiled program does on one device, read from its optimized HLO text.

XLA's own cost analysis counts the body of a loop once, tells no mesh axis, and a program that is
only compiled cannot be profiled. Here loops count as often as they run: FLOPs of matrix products,
bytes between HBM and the cores, and collectives with their kind, mesh axes and bytes.

Written from the text that jaxlib prints (``Compiled.as_text()``), with what TPU programs have in
it: fusions in fusions, collectives that run beside a fusion and are written down in each part of
it, memory spaces (``S(1)`` is on the chip, no HBM), three ways to write groups of devices.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_ITEM = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
# As started or not: "-start" is counted, "-done" is the same one.
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Nothing is read or written: names for what is there, or bodies that are counted by themselves.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
}
_SAME = {"bitcast", "copy", "convert", "reshape", "transpose", "get-tuple-element"}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: item type, sizes, and the memory it lies in (0 = HBM)."""

    dtype: str
    sizes: tuple[int, ...]
    space: int = 0

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.sizes)

    @property
    def bytes(self) -> float:
        """Without what tiles add at the edges."""
        bits = re.search(r"\d+", self.dtype)
        item = _ITEM.get(self.dtype, int(bits[0]) / 8 if bits else 0)
        if self.dtype.startswith("f8"):
            item = 1
        return self.count * item


@dataclasses.dataclass(frozen=True)
class Op:
    """One instruction; of a tuple, all its arrays in order."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    given: str  # what stands between its brackets
    attributes: str

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in its attributes, or ''."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def calls(self) -> str:
        """The computation that it runs."""
        return self.attribute(r"(?:calls|to_apply)=%?([\w.\-]+)")


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order; ``root`` is its result."""

    name: str
    ops: dict[str, Op] = dataclasses.field(default_factory=dict)
    root: str = ""


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by name, and the one that it starts with."""

    computations: Mapping[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a device in a step.

    ``payload`` bytes are of the whole array that a group shares: the result of an all-gather, the
    operand of any other; ``count`` of its numbers; ``sent`` what a device puts on its links, by the
    ring algorithm. ``times`` is how often it runs, and not yet in these.

    ``groups`` is [groups, devices of one], by place in the mesh (of one slice, where there are
    several), or the pairs of a permute; None where slices talk to each other.
    """

    kind: str
    groups: np.ndarray | None
    payload: float
    count: int
    sent: float
    times: int
    source: str  # the operation of JAX that asked for it


@dataclasses.dataclass
class Totals:
    """Of one device in one run of the program."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: int = 0  # counted once, because their length could not be read
    slices: int = 1


# ------------------------------------------------------------------------------------ reading text


def parse(text: str) -> Module:
    """The computations of an optimized HLO module's text.

    Raises:
        ValueError: there is no entry computation in it.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                current = computations[head[2]] = Computation(head[2])
                entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif op := _parse_op(line):
            current.ops[op.name] = op
            if line.lstrip().startswith("ROOT "):
                current.root = op.name
    if not entry:
        raise ValueError("no ENTRY computation: this is no HLO module's text")
    return Module(computations, entry)


def _parse_op(line: str) -> Op | None:
    head = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    given = rest[start + 1 : stop]
    names = tuple(re.findall(r"%([\w.\-]+)", given))
    return Op(head[1], rest[:start], _shapes(type_), names, given, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if not depth:
            return place
    raise ValueError(f"a bracket stays open: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", text)
    return tuple(
        Shape(
            dtype,
            tuple(int(n.removeprefix("<=")) for n in sizes.split(",") if n),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", layout)) else 0,
        )
        for dtype, sizes, layout in found
    )


# ---------------------------------------------------------------------------------------- counting


def totals(module: Module, slices: int = 1) -> Totals:
    """FLOPs, HBM bytes and collectives of one device of ``slices``, loops multiplied out."""
    found = Totals(slices=slices)
    _walk(module, module.computations[module.entry], 1, found)
    return found


def _walk(module: Module, computation: Computation, times: int, found: Totals) -> None:
    beside: set[str] = set()  # channels of collectives in parts, of which each part tells the whole
    for op in computation.ops.values():
        if op.kind == "while":
            trips = trip_count(module, computation, op)
            found.unknown_loops += trips is None
            body = module.computations[op.attribute(r"body=%?([\w.\-]+)")]
            _walk(module, body, times * (1 if trips is None else trips), found)
        elif op.kind in ("call", "async-start") and not _is_collective(module, op):
            _walk(module, module.computations[op.calls], times, found)
        elif op.kind == "send" and "xla_megascale" in op.attributes:
            found.collectives.append(_between_slices(computation, op, times, found.slices))
        elif op.kind == "conditional":  # any of them may run: the sum is a bound
            for name in _branches(op):
                _walk(module, module.computations[name], times, found)
        else:
            found.flops += times * _flops(module, computation, op)
            found.hbm_bytes += times * _hbm_bytes(module, computation, op)
            for inner, collective in _collectives(module, computation, op):
                channel = collective.attribute(r"channel_id=(\d+)")
                if "async_collective_fusion_config" in collective.attributes and channel:
                    if channel in beside:
                        continue
                    beside.add(channel)
                found.collectives.append(_measure(inner, collective, times))


def _branches(op: Op) -> list[str]:
    listed = op.attribute(r"branch_computations=\{([^}]*)\}")
    both = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", op.attributes)
    return re.findall(r"%?([\w.\-]+)", listed) or both


def _kind(op: Op) -> str:
    return op.kind.removesuffix("-start")


def _is_collective(module: Module, op: Op) -> bool:
    inner = module.computations.get(op.calls)
    return inner is not None and any(_kind(o) in _COLLECTIVES for o in inner.ops.values())


def _inner(module: Module, op: Op) -> Computation | None:
    """The computation of a fusion or of what runs beside others; None for any other operation."""
    return module.computations.get(op.calls) if op.kind in ("fusion", "async-start") else None


# ------------------------------------------------------------------------------------------- loops


def trip_count(module: Module, computation: Computation, loop: Op) -> int | None:
    """How often a loop's body runs, at most; None where that is not written in the program.

    What JAX's scan and fori_loop make, and XLA itself: a counter that starts at a constant, is
    compared with one, and grows by one, or by more where XLA has unrolled the body. A while_loop
    may have other ends beside that one.
    """
    known = loop.attribute(r"known_trip_count\W+n\W+(\d+)")
    if known:
        return int(known)
    condition = module.computations[loop.attribute(r"condition=%?([\w.\-]+)")]
    body = module.computations[loop.attribute(r"body=%?([\w.\-]+)")]
    resolve = functools.partial(_constant_in_loop, module, computation, loop)
    counts = []
    for inner, op in _all_ops(module, condition):
        direction = op.attribute(r"direction=(\w+)")
        if op.kind != "compare" or direction not in ("LT", "GT", "LE", "GE"):
            continue
        # The counter is what the loop brings along; its start is what it was given.
        ends = [end for name in op.operands if (end := resolve(inner, condition, name)) is not None]
        if len(ends) == 2:
            low, high = sorted(value for value, _ in ends)
            each = max(_step(body, place) for _, place in ends)
            counts.append(-(-(high - low + direction.endswith("E")) // each))
    return min(counts) if counts else None


def _step(body: Computation, place: int | None) -> int:
    """What a turn of a loop adds to the number at a place of its tuple; 1 where it is not said."""
    root, total = body.ops[body.root], 0
    if place is None or root.kind != "tuple":
        return 1
    op = body.ops.get(root.operands[place])
    while op is not None and (op.kind == "add" or op.kind in _SAME):
        if op.kind == "get-tuple-element":
            break
        constants = {n: c for n in op.operands if (c := _constant(body, n)) is not None}
        total += sum(constants.values()) if op.kind == "add" else 0
        op = next((body.ops.get(n) for n in op.operands if n not in constants), None)
    return abs(total) or 1


def _all_ops(module: Module, computation: Computation) -> Iterator[tuple[Computation, Op]]:
    """Each instruction with its computation, those of fusions and calls too."""
    for op in computation.ops.values():
        yield computation, op
        inner = module.computations.get(op.calls) if op.kind in ("fusion", "call") else None
        if inner is not None:
            yield from _all_ops(module, inner)


def _constant_in_loop(
    module: Module,
    outer: Computation,
    loop: Op,
    inner: Computation,
    condition: Computation,
    name: str,
) -> tuple[int, int | None] | None:
    """(the constant that a value of a loop's condition is, or has at the start of the loop; its
    place in what the loop brings along); None where it is neither.
    """
    op = inner.ops.get(name)
    if op is None:
        return None
    if op.kind == "constant":
        value = _constant(inner, name)
        return None if value is None else (value, None)
    again = functools.partial(_constant_in_loop, module, outer, loop)
    if op.kind == "parameter" and inner is not condition:
        # Of a fusion in the condition: what it is called with.
        for place, caller in _all_ops(module, condition):
            if caller.calls == inner.name:
                return again(place, condition, caller.operands[int(op.given)])
        return None
    if op.kind == "get-tuple-element":
        index = int(op.attribute(r"index=(\d+)"))
        value = _constant(outer, loop.operands[0], index)
        return None if value is None else (value, index)
    if op.kind in _SAME:
        return again(inner, condition, op.operands[0])
    return None


def _constant(computation: Computation, name: str, index: int | None = None) -> int | None:
    """The constant that a value is, where it is one; ``index`` of a tuple."""
    op = computation.ops.get(name)
    if op is None:
        return None
    if op.kind == "tuple" and index is not None:
        return _constant(computation, op.operands[index])
    if op.kind == "constant" and index is None:
        return int(op.given) if re.fullmatch(r"-?\d+", op.given) else None
    if op.kind in _SAME and op.kind != "get-tuple-element":
        return _constant(computation, op.operands[0], index)
    return None


# ------------------------------------------------------------------------------------------- FLOPs


def _flops(module: Module, computation: Computation, op: Op) -> float:
    """Two a multiply-add of matrix products, also in fusions; element-wise work is not counted."""
    inner = _inner(module, op)
    if inner is not None:
        return sum(_flops(module, inner, o) for o in inner.ops.values())
    if op.kind not in ("dot", "convolution"):
        return 0.0
    left, right = (_shape_of(computation, name) for name in op.operands[:2])
    if op.kind == "dot":
        contracted = op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        depth = math.prod(left.sizes[int(i)] for i in contracted.split(",") if i)
        return 2.0 * op.shapes[0].count * depth
    return _convolution_flops(op, left, right)


def _convolution_flops(op: Op, left: Shape, right: Shape) -> float:
    """Of a TPU's products: they are convolutions, whose windows may be there for batches alone."""
    lhs, rhs, out = op.attribute(r"dim_labels=(\S+?_\S+?->[^\s,]+)").replace("->", "_").split("_")
    window = {
        key: [[int(n) for n in part.split("_")] for part in values.split("x")]
        for key, values in re.findall(r"(\w+)=([\d_x\-]+)", op.attribute(r"window=\{([^}]*)\}"))
    }
    groups = int(op.attribute(r"feature_group_count=(\d+)") or 1)
    batches = int(op.attribute(r"batch_group_count=(\d+)") or 1)
    products = left.sizes[lhs.index("b")] // batches * op.shapes[0].sizes[out.index("f")]
    products *= left.sizes[lhs.index("f")] // groups
    for place, label in enumerate(sorted(set(lhs) - set("bf"))):

        def of(key: str, default: int, place: int = place) -> list[int]:
            return window[key][place] if key in window else [default]

        size, output = right.sizes[rhs.index(label)], op.shapes[0].sizes[out.index(label)]
        at = np.arange(output)[:, None] * of("stride", 1)[0] - of("pad", 0)[0]
        at = at + np.arange(size)[None] * of("rhs_dilate", 1)[0]
        spread = of("lhs_dilate", 1)[0]
        inside = (at >= 0) & (at % spread == 0) & (at // spread < left.sizes[lhs.index(label)])
        products *= int(inside.sum())
    return 2.0 * products


def _shape_of(computation: Computation, name: str) -> Shape:
    return computation.ops[name].shapes[0]


# --------------------------------------------------------------------------------------- HBM bytes


def _hbm_bytes(module: Module, computation: Computation, op: Op) -> float:
    """What is read from HBM and written to it: of slices the slice, of updates the update."""
    if op.kind in _FREE or op.kind.endswith("-done") or "AllocateBuffer" in op.attributes:
        return 0.0
    inner = _inner(module, op)
    if inner is not None:
        read = sum(
            _read(module, inner, parameter, shape)
            for parameter, shape in _parameters(computation, op, inner)
        )
        return read + _written(module, inner, inner.root)
    if op.kind == "dynamic-update-slice":
        update = computation.ops[op.operands[1]].shapes[0]
        return 2 * _in_hbm(update) if not op.shapes[0].space else _in_hbm(update)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        source = computation.ops[op.operands[0]].shapes[0]
        made = op.shapes[0]
        return _in_hbm(made) + (0.0 if source.space else made.bytes)
    if op.kind.endswith("-start"):
        # The tuple names its operand again, and counters on the chip.
        return sum(map(_in_hbm, op.shapes))
    operands = [computation.ops[name] for name in op.operands if name in computation.ops]
    read = sum(_in_hbm(s) for o in operands if len(o.shapes) == 1 for s in o.shapes)
    return read + sum(map(_in_hbm, op.shapes))


def _in_hbm(shape: Shape) -> float:
    return 0.0 if shape.space else shape.bytes


def _parameters(computation: Computation, op: Op, inner: Computation) -> Iterator[tuple[Op, Shape]]:
    """The parameters of a fusion, with the arrays that it is given for them."""
    for parameter in inner.ops.values():
        if parameter.kind == "parameter":
            given = computation.ops.get(op.operands[int(parameter.given)])
            if given is not None and len(given.shapes) == 1:
                yield parameter, given.shapes[0]


def _read(module: Module, computation: Computation, value: Op, shape: Shape) -> float:
    """Bytes read of an array that lies in ``shape``'s memory: all of it, or slices of it."""
    if shape.space:
        return 0.0
    total = 0.0
    for user in computation.ops.values():
        if value.name not in user.operands:
            continue
        first = user.operands[0] == value.name
        if user.kind == "dynamic-slice" or (user.kind == "gather" and first):
            total += user.shapes[0].bytes
        elif user.kind == "dynamic-update-slice" and first:
            continue  # it is written in place
        elif user.kind == "bitcast":
            total += _read(module, computation, user, shape)
        elif user.kind == "fusion":
            inner = module.computations[user.calls]
            places = [i for i, name in enumerate(user.operands) if name == value.name]
            for parameter in inner.ops.values():
                if parameter.kind == "parameter" and int(parameter.given) in places:
                    total += _read(module, inner, parameter, shape)
        elif user.kind != "tuple":
            return shape.bytes
    return min(total, shape.bytes)


def _written(module: Module, computation: Computation, name: str) -> float:
    """Bytes written by the result of a fusion."""
    op = computation.ops[name]
    if op.kind == "tuple":
        return sum(_written(module, computation, n) for n in set(op.operands))
    if op.kind in ("parameter", "get-tuple-element") or all(s.space for s in op.shapes):
        return 0.0
    if op.kind == "dynamic-update-slice":
        return computation.ops[op.operands[1]].shapes[0].bytes
    if op.kind == "bitcast":
        return _written(module, computation, op.operands[0])
    if op.kind == "fusion":
        inner = module.computations[op.calls]
        return _written(module, inner, inner.root)
    return sum(map(_in_hbm, op.shapes))


# ------------------------------------------------------------------------------------- collectives


def _collectives(
    module: Module, computation: Computation, op: Op
) -> Iterator[tuple[Computation, Op]]:
    """Those that an instruction is or has in it, with the computation that they are in."""
    inner = _inner(module, op)
    if inner is not None:
        for o in inner.ops.values():
            yield from _collectives(module, inner, o)
    elif _kind(op) in _COLLECTIVES:
        yield computation, op


def _measure(computation: Computation, op: Op, times: int) -> Collective:
    kind = _kind(op)
    operands = [s for n in op.operands if n in computation.ops for s in computation.ops[n].shapes]
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", op.attribute(r"source_target_pairs=(\{[^=]*\}\})"))
        groups = np.array(pairs, int).reshape(-1, 2)
        arrays, share = operands[:1], 1.0
    else:
        groups = replica_groups(op.attributes)
        n = groups.shape[1]
        arrays, share = operands, (n - 1) / n
        if kind == "all-gather":
            arrays = [dataclasses.replace(s, sizes=(*s.sizes, n)) for s in operands]
    # TPUs write a reduce-scatter as a fusion of this name: an all-reduce and the device's slice.
    if kind == "all-reduce" and "reduce-scatter" in computation.name:
        kind = "reduce-scatter"
    payload = sum(s.bytes for s in arrays)
    sent = payload * share * (2 if kind == "all-reduce" else 1)
    if kind.endswith("all-to-all"):  # through the ring's other devices: the further the more
        sent = payload * max(share, groups.shape[1] / 4)
    count = sum(s.count for s in arrays)
    source = op.attribute(r'op_name="([^"]*)"')
    return Collective(kind, groups, payload, count, sent, times, source)


def _between_slices(computation: Computation, op: Op, times: int, slices: int) -> Collective:
    """What a TPU program hands to its host, for the other slices' hosts to gather or to add."""
    kind = op.attribute(r'_xla_megascale_transfer_type="(\w+)"').lower().replace("_", "-")
    shape = _shape_of(computation, op.operands[0])
    parts = slices if kind == "all-gather" else 1
    share = (slices - 1) / slices * (2 if kind == "all-reduce" else 1)
    payload = shape.bytes * parts
    source = op.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"')
    return Collective(kind, None, payload, shape.count * parts, payload * share, times, source)


def replica_groups(attributes: str) -> np.ndarray:
    """[groups, devices of one] of an instruction's ``replica_groups``, in any of XLA's forms.

    ``{{0,2},{1,3}}``; ``[2,2]<=[2,2]T(1,0)``: count up in the shape behind the arrow, transpose,
    reshape; ``mesh['a'=2,'b'=2] {'b'}``: along the axes in the last brackets, of devices counted up
    or in the order of ``device_ids=([2,2]T(1,0))``.

    Raises:
        ValueError: another form.
    """
    if found := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        rows = re.findall(r"\{([\d,]+)\}", found[1])
        return np.array([[int(n) for n in row.split(",")] for row in rows])
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes):
        return _iota(found[1])
    form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}"
    if found := re.search(form, attributes):
        return _of_mesh(found[1], found[2], found[3])
    if found := re.search(r"replica_groups=\S*", attributes):
        raise ValueError(f"cannot read {found[0]}")
    raise ValueError("a collective without replica_groups")


def _iota(text: str) -> np.ndarray:
    shape, _, source = text.partition("<=")
    sizes, _, order = source.partition("T")
    numbers = [[int(n) for n in re.findall(r"\d+", part)] for part in (shape, sizes, order)]
    places = np.arange(math.prod(numbers[1])).reshape(numbers[1])
    if numbers[2]:
        places = places.transpose(numbers[2])
    return places.reshape(numbers[0])


def _of_mesh(axes: str, devices: str | None, along: str) -> np.ndarray:
    sizes = {name: int(n) for name, n in re.findall(r"'([^']*)'=(\d+)", axes)}
    shape, chosen = [], []
    wanted: dict[str, tuple[int, int] | None] = {}
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", along):
        wanted[name] = (int(before), int(size)) if before else None
    for name, n in sizes.items():
        if name not in wanted:
            shape.append(n)
            continue
        before, size = wanted[name] or (1, n)  # a part of an axis: its middle
        chosen.append(len(shape) + 1)
        shape += [before, size, n // before // size]
    total = math.prod(sizes.values())
    places = _iota(f"[{total}]<={devices}") if devices else np.arange(total)
    rest = [i for i in range(len(shape)) if i not in chosen]
    grouped = places.reshape(shape).transpose(*rest, *chosen)
    return grouped.reshape(-1, math.prod(shape[i] for i in chosen))


def axes_of(groups: np.ndarray, mesh: Mapping[str, int]) -> str:
    """The mesh axes along which the devices of a group differ: ``data``, ``data+model``, ``none``.

    ``groups`` count devices in the order of the mesh, whose axes and sizes ``mesh`` gives.
    """
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), -1)  # [groups, n, axes]
    differs = (places != places[:, :1]).any((0, 1))
    return "+".join(name for name, d in zip(mesh, differs, strict=True) if d) or "none"


def by_axes(
    found: Sequence[Collective], mesh: Mapping[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """{axes: {kind: {"payload", "count", "sent", "runs"}}}, what repeats multiplied out.

    ``mesh`` is that of one slice; what goes between slices is under "dcn".
    """
    table: dict[str, dict[str, dict[str, float]]] = collections.defaultdict(dict)
    for c in found:
        axes = "dcn" if c.groups is None else axes_of(c.groups, mesh)
        if axes == "none":
            continue
        cell = table[axes].setdefault(
            c.kind, {"payload": 0.0, "count": 0.0, "sent": 0.0, "runs": 0.0}
        )
        for key, value in (("payload", c.payload), ("count", c.count), ("sent", c.sent)):
            cell[key] += value * c.times
        cell["runs"] += c.times
    return dict(table)
