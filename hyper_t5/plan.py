"""``hyper-t5 plan``: will it fit, what will it cost, before a pod is paid for.

The very functions of ``train`` and ``evaluate`` are compiled for a TPU topology by libtpu, on any
machine: JAX can describe chips that are not there. No weight is made, only shapes and where they
lie. What the compiler says of memory is what it would say on the pod; FLOPs, HBM bytes and
collectives are read from the program that it made (``hlo``), and times follow from the published
numbers of the chip (``chips``):

    compute  FLOPs of matrix products / bf16 peak
    hbm      bytes between HBM and the cores / HBM bandwidth
    ici      sum over collectives of bytes sent / bandwidth of the links along their mesh axis
    dcn      bytes sent between slices / the chip's share of its host's network

The step takes at least the largest of the four, and about that where the compiler overlaps them
well. Utilisation is model FLOPs (nothing that remat computes again) over chips * peak * that time.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from hyper_t5 import (
    chips,
    cost,
    files,
    hlo,
    model,
    optim,
    packing,
    quiet,
    sharding,
    t5,
    train,
    weights,
)
from hyper_t5 import config as config_lib
from hyper_t5.chips import GIB, Chip
from hyper_t5.episodes import input_width
from hyper_t5.errors import UserError
from hyper_t5.overrides import choose
from hyper_t5.sharding import Placement

Tree = Any
JSON = "plan.json"
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Target:
    """A config on chips that need not be there. A v3 chip is two devices, any other one."""

    config: ConfigDict
    model: model.Model
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: Sequence[Any]

    @property
    def placement(self) -> Placement:
        """Where its arrays lie."""
        assert self.model.placement is not None
        return self.model.placement

    @property
    def mesh(self) -> dict[str, int]:
        """Axis sizes, of all slices."""
        return dict(self.placement.mesh.shape)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile and what it is given, which ``parts`` name for the reader."""

    function: jax.stages.Wrapped
    arguments: tuple[Tree, ...]
    parts: Mapping[str, Tree]
    model_flops: float


# ------------------------------------------------------------------------------------ what to plan


def make_target(config: ConfigDict, topology: str, slices: int = 1) -> Target:
    """The model of a config, placed on a topology such as ``v5p:4x4x4``.

    Raises:
        UserError: no such topology, no TPU compiler, or a mesh that the chips do not make.
    """
    chip, shape = chips.parse_topology(topology)
    devices = devices_of(chip, shape, slices)
    if slices > 1 and config.mesh.slices == 1:
        config = config.copy_and_resolve_references()
        config.mesh.slices = slices
    sizes = backbone_sizes(config)
    placement = sharding.make_placement(config.mesh, devices)
    return Target(config, model.build(config, sizes, placement), chip, shape, slices, devices)


def devices_of(chip: Chip, shape: tuple[int, ...], slices: int = 1) -> list[Any]:
    """Devices that programs can be compiled for, and nothing else.

    Raises:
        UserError: libtpu, which has the compiler, is not installed or does not know the chip.
    """
    if not importlib.util.find_spec("libtpu") and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "plan: the TPU compiler is not installed; pip install 'hyper_t5[plan]', or libtpu of "
            "the version that `pip show jax` names in its extra tpu"
        )
    quiet.libraries()
    # The chips of a TPU VM are left to whoever runs on them: JAX is not to look for any, and libtpu
    # not to lock them, which it does for all processes when it is loaded.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    host = [min(side, limit) for side, limit in zip(shape, chip.host, strict=True)]
    # Left to itself libtpu takes a cube for a mesh without rings, and compiles every all-gather
    # over one as an all-reduce.
    rings = chips.wraps(chip, shape)
    wrap = {"wrap": (*rings, False)[:3]} if any(rings) else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            chip_config_name=chip.config,
            chips_per_host_bounds=(*host, 1)[:3],
            num_slices=slices,
            **wrap,
        ).devices
    except (RuntimeError, ValueError) as e:
        version = metadata.version("libtpu") if importlib.util.find_spec("libtpu") else "?"
        raise UserError(f"--topology {name}: libtpu {version} refuses it: {e}") from e


def backbone_sizes(config: ConfigDict) -> t5.T5Config:
    """Those of ``backbone.path`` where that is there, without its weights; else ``config.model``'s.

    Raises:
        UserError: what is there describes no T5.
    """
    sizes = config_lib.t5_config(config)
    if not config.backbone.path or not Path(config.backbone.path).exists():
        return sizes
    root = model.backbone_folder(config.backbone.path)
    found = weights.read_sizes(root)
    how = ("dtype", "remat", "dropout_rate", "scan_unroll")
    return dataclasses.replace(found, **{k: getattr(sizes, k) for k in how})


def batch_of(config: ConfigDict, m: model.Model) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a global training batch, as ``episodes`` and ``text`` make it."""
    c = config.data
    text = config.stage == "hyperpretrain"
    concat = m.choice.layout == "concat"
    tasks, rows = c.tasks_per_batch, 1 if text else c.examples_per_task
    wide = c.hyper_length + c.input_length if text and concat else input_width(c, m.choice.layout)
    shapes = {"tasks": (tasks,), "hyper_inputs": (tasks, 1 if concat else c.hyper_length)}
    for side, length in zip(packing.SIDES, (wide, c.target_length), strict=True):
        for name in ("s", "_segments", "_positions") if c.pack else ("s",):
            shapes[side + name] = (tasks, rows, length)
    return {k: jax.ShapeDtypeStruct(shape, jnp.int32) for k, shape in shapes.items()}


def train_program(target: Target) -> Program:
    """The training step.

    Raises:
        UserError: the system trains nothing, or the batch cannot be cut over the mesh.
    """
    config, m, placement = target.config, target.model, target.placement
    if not m.choice.trains:
        raise UserError(f"system={config.system} has nothing to train; --steps evaluate,generate")
    sharding.check_batch(config.data.tasks_per_batch, config.train.microbatches, placement)
    params = sharding.struct(_shapes(target), model.placements(m))
    trained = {branch: params.pop(branch) for branch in m.choice.trains}
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    placed = train.place_state(m, optimizer, trained)
    fresh = functools.partial(train.start_state, optimizer)
    state = sharding.struct(jax.eval_shape(fresh, trained), placed)
    shapes = batch_of(config, m)
    batch = _placed(shapes, placement.batch)
    key = _placed(jax.eval_shape(lambda: jax.random.key(0)), placement.whole)
    rest = {k: v for k, v in state.items() if k != "params"}
    return Program(
        train.make_step(m, optimizer, config, placed),
        (state, params, batch, key),
        {"frozen weights": params, "trained": trained, "optimizer": rest, "batch": batch},
        cost.train_flops(m, config, shapes, train.loss_sums),
    )


def generate_program(target: Target) -> Program | None:
    """The hypermodel on as many tasks as the mesh has parts; None where it reads none."""
    m, placement = target.model, target.placement
    if m.hypermodel is None or m.choice.reads == "input":
        return None
    params = _whole_over_data(target)
    length = target.config.data.hyper_length
    ids = _placed(jax.ShapeDtypeStruct((placement.parts, length), jnp.int32), placement.batch)
    tasks = _placed(jax.ShapeDtypeStruct((placement.parts,), jnp.int32), placement.batch)
    step = jax.jit(functools.partial(_generate, m))
    arguments = (params, ids, tasks)
    return Program(
        step, arguments, {"weights": params, "batch": (ids, tasks)}, _work(step, arguments)
    )


def evaluate_program(target: Target) -> Program:
    """Decoding ``eval.batch`` rows of one task with its adapters, to the last step of the loop."""
    config, m, placement = target.config, target.model, target.placement
    params = _whole_over_data(target)
    fits = config.eval.batch % placement.parts == 0
    where = placement.batch if fits else placement.whole
    width = input_width(config.data, m.choice.layout)
    rows = _placed(jax.ShapeDtypeStruct((config.eval.batch, width), jnp.int32), where)
    tasks = _placed(jax.ShapeDtypeStruct((config.eval.batch,), jnp.int32), where)
    made = None
    if m.hypermodel is not None and m.choice.reads == "task":
        one = jax.ShapeDtypeStruct((1, config.data.hyper_length), jnp.int32)
        number = jax.ShapeDtypeStruct((1,), jnp.int32)
        plain = dataclasses.replace(m, placement=None)
        made = _placed(jax.eval_shape(plain.adapters, params, one, number), placement.whole)
    how = {"steps": config.eval.max_decode_length, "beam_size": config.eval.beam_size}
    step = jax.jit(functools.partial(_respond, m, **how))
    arguments = (params, made, rows, tasks)
    parts = {"weights": params, "adapters": made, "batch": (rows, tasks)}
    return Program(step, arguments, parts, 0.0)


def _generate(m: model.Model, params: Tree, ids: Any, tasks: Any) -> Tree:
    return model.generate(m, params, ids, tasks)


def _respond(m: model.Model, params: Tree, made: Tree, rows: Any, tasks: Any, **how: Any) -> Any:
    return model.respond(m, params, made, rows, tasks, **how)


PROGRAMS: dict[str, Callable[[Target], Program | None]] = {
    "train": train_program,
    "evaluate": evaluate_program,
    "generate": generate_program,
}


def _shapes(target: Target) -> Tree:
    return model.shapes_of(target.model, target.config.backbone.dtype)


def _whole_over_data(target: Target) -> Tree:
    """All parameters as a step computes with them: nothing is trained, so none is cut by data."""
    axes, shapes = model.logical_axes(target.model), _shapes(target)
    where = {b: target.placement.computed(axes[b], shapes[b]) for b in shapes}
    return sharding.struct(shapes, where)


def _placed(tree: Tree, where: Any) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def _work(function: jax.stages.Wrapped, arguments: tuple[Tree, ...]) -> float:
    return cost.jaxpr_flops(jax.make_jaxpr(function)(*arguments))


# ----------------------------------------------------------------------------------- what it costs


def analyse(target: Target, program: Program, text: Path | None = None) -> dict[str, Any]:
    """Compile a program for the target's devices; numbers are of one device (a chip; v3: a core).

    Where it does not fit, ``fits`` is False and ``memory`` says what the compiler says it needs.
    ``text``: a file for the compiled program's, gzipped, to look up what moves the bytes.
    """
    memory: dict[str, Any] = {
        "arguments": {name: shard_bytes(tree) for name, tree in program.parts.items()},
        "limit": target.chip.limit,
    }
    began = time.monotonic()
    lowered = program.function.lower(*program.arguments)
    found: dict[str, Any] = {"fits": True, "memory": memory}
    found["lower_seconds"] = time.monotonic() - began
    began, busy = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed, available = read_exhausted(str(e))
        memory |= {"peak": needed, "limit": available or target.chip.limit}
        return found | {"fits": False, "compiler": str(e).strip().splitlines()[0][:300]}
    found["compile_seconds"] = time.monotonic() - began
    found["compile_cpu_seconds"] = time.process_time() - busy  # whatever else runs here
    memory |= _memory(compiled)
    # What a program does not read lies in memory all the same, as the backbone does while adapters
    # are made.
    memory["peak"] += max(0, sum(memory["arguments"].values()) - memory["laid_out"])
    found["fits"] = memory["peak"] <= memory["limit"]
    written = compiled.as_text() or ""
    if text is not None:
        files.check_writable(text)
        text.write_bytes(gzip.compress(written.encode(), mtime=0))
    totals = hlo.totals(hlo.parse(written), target.slices)
    found |= {
        "flops": totals.flops,
        "model_flops": program.model_flops / len(target.devices),
        "hbm_bytes": totals.hbm_bytes,
        "collectives": hlo.by_axes(totals.collectives, _slice_mesh(target)),
        "unknown_loops": totals.unknown_loops,
    }
    found["seconds"] = times = _seconds(target, totals)
    step = max(times.values())
    found["binds"] = max(times, key=lambda name: times[name])
    found["step_seconds"] = step
    work = found["model_flops"] or totals.flops
    found["utilisation"] = work / (step * target.chip.flops_per_device) if step else 0.0
    return found


def _memory(compiled: Any) -> dict[str, float]:
    """What the compiler laid out: `temp_size` is a sum over time, the peak is what must fit."""
    m = compiled.memory_analysis()
    arguments, temporaries = m.argument_size_in_bytes, m.temp_size_in_bytes
    bound = arguments + temporaries + m.output_size_in_bytes - m.alias_size_in_bytes
    peak = getattr(m, "peak_memory_in_bytes", 0) or bound  # jaxlib before 0.6 has none
    return {"laid_out": arguments, "peak": peak, "temporaries": max(0, peak - arguments)}


def shard_bytes(tree: Tree) -> int:
    """Bytes of a tree of placed shapes that lie on one device, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def read_exhausted(text: str) -> tuple[float, float]:
    """(bytes needed, bytes there are) in the compiler's RESOURCE_EXHAUSTED; 0 where not said."""
    number = r"([\d.]+)([KMGT]?)"
    for pattern in (
        rf"Used {number}\w* of {number}",
        rf"\({number}i?B?\) exceeds .*?\({number}",
        rf"{number}i?B? .*?exceeds .*?{number}",
    ):
        if found := re.search(pattern, text):
            needed, n, available, a = found.groups()
            return float(needed) * UNITS[n], float(available) * UNITS[a]
    return 0.0, 0.0


# ---------------------------------------------------------------------------------------- its time


def _slice_mesh(target: Target) -> dict[str, int]:
    """The mesh of one slice: groups of a program are told within it."""
    return {**target.mesh, "slice": target.mesh["slice"] // target.slices}


def _seconds(target: Target, totals: hlo.Totals) -> dict[str, float]:
    bandwidth = functools.partial(link_bandwidth, target)
    inside = [c for c in totals.collectives if c.groups is not None and c.sent]
    between = [c for c in totals.collectives if c.groups is None]
    chip = target.chip
    return {
        "compute": totals.flops / chip.flops_per_device,
        "hbm": totals.hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        "ici": sum(c.times * c.sent / bandwidth(c.groups) for c in inside if c.groups is not None),
        "dcn": sum(c.times * c.sent for c in between) / (chip.dcn_bandwidth / chip.devices),
    }


def link_bandwidth(target: Target, groups: np.ndarray) -> float:
    """Bytes/s that a device of the first group can send to the others of it.

    Each dimension of the torus along which they lie has its own links: two of them where they fill
    a ring, else one, at the end of a line. Cores of one v3 chip share its links, and its memory.
    """
    chip, order = target.chip, target.placement.mesh.devices.reshape(-1)
    group = [order[int(i)] for i in groups[0]]
    rings = chips.wraps(chip, target.shape)
    links = 0
    for axis, (side, ring) in enumerate(zip(target.shape, rings, strict=True)):
        places = {device.coords[axis] for device in group}
        if len(places) > 1:
            links += 2 if ring and len(places) == side else 1
    return links * chip.ici_bandwidth / chip.devices if links else chip.hbm_bandwidth


# ------------------------------------------------------------------------------ advice and warnings


def warnings(target: Target) -> list[str]:
    """What makes a mesh slower or larger than it looks."""
    sizes, cut = target.model.sizes, target.mesh["model"]
    told = []
    path = target.config.backbone.path
    if path and not Path(path).exists():
        told.append(f"backbone.path={path} is not there: the sizes are those of config.model")
    if sizes.num_heads % cut:
        told.append(
            f"{sizes.num_heads} heads are not a multiple of mesh.model={cut}: attention is not cut "
            "in heads, and gathers what it needs"
        )
    axes, shapes = model.logical_axes(target.model), _shapes(target)
    return told + [
        f"mesh.model={cut} does not divide {name}={size}: it is whole on every chip, which costs "
        "memory and traffic"
        for name, size in target.placement.uneven(axes, shapes).items()
        if name != "heads"
    ]


def advice(target: Target, found: Mapping[str, Any]) -> list[str]:
    """What to change where a training step does not fit, what saves most first.

    Bytes of arguments are exact; that of activations half are saved by each of these is a rule of
    thumb, which the next plan checks.
    """
    config, memory = target.config, found["memory"]
    parts, parallel = memory["arguments"], target.placement.parts
    fixed = sum(parts.values())
    rest = max(0.0, memory["peak"] - fixed)  # activations, gradients, gathered weights
    changes: list[tuple[float, str]] = []
    if target.model.sizes.remat != "full":
        changes.append((rest / 2, "model.remat=full (a third more FLOPs at most)"))
    tasks, now = config.data.tasks_per_batch, config.train.microbatches
    room = max(memory["limit"] - fixed, 1.0)
    times = 2 ** max(1, math.ceil(math.log2(max(rest / room, 1.0))))
    while times > 1 and tasks % (times * parallel * now):
        times //= 2
    if times > 1:
        text = f"train.microbatches={times * now} (the same batch, in parts)"
        changes.append((rest - rest / times, text))
    elif tasks > parallel:
        fewer = max(parallel, tasks // 2 // parallel * parallel)
        changes.append((rest / 2, f"data.tasks_per_batch={fewer}"))
    twice = 2 * target.mesh["model"]
    if target.mesh["data"] % 2 == 0 and target.model.sizes.num_heads % twice == 0:
        saved = (parts.get("frozen weights", 0.0) + rest / 2) / 2
        changes.append((saved, f"mesh.model={twice} (more bytes over ici)"))
    if config.backbone.dtype == "float32" and parts.get("frozen weights"):
        changes.append((parts["frozen weights"] / 2, "backbone.dtype=bfloat16"))
    if config.optimizer.name == "adamw":
        changes.append((parts.get("optimizer", 0.0), "optimizer.name=adafactor"))
    changes.sort(key=lambda change: -change[0])
    return [f"{text}: about {saved / GIB:.1f} GiB less" for saved, text in changes if saved]


# ------------------------------------------------------------------------------------- the command


def plan(
    config: ConfigDict,
    topology: str,
    slices: int = 1,
    steps: Sequence[str] = tuple(PROGRAMS),
    out: str | Path | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Compile the steps of a config for a topology and print what each of them costs.

    Returns what ``out``/plan.json gets: bytes, FLOPs and seconds as plain numbers.

    Raises:
        UserError: something does not fit (told, and written, before), or cannot be planned.
    """
    for step in steps:
        choose("--steps", step, PROGRAMS)
    target = make_target(config, topology, slices)
    report = describe(target, name)
    print(heading(report), flush=True)
    for step in steps:
        program = PROGRAMS[step](target)
        if program is None:
            continue
        found = analyse(target, program, Path(out) / f"{step}.hlo.gz" if out else None)
        if step == "train" and not found["fits"]:
            found["advice"] = advice(target, found)
        report["programs"][step] = found
        print(f"\n{table(step, found, report)}", flush=True)
    if out is not None:
        files.write_json(Path(out) / JSON, report)
        print(f"\n{Path(out) / JSON}", flush=True)
    for step, found in report["programs"].items():
        if not found["fits"]:
            raise UserError(_too_large(step, found, report))
    return report


def _too_large(step: str, found: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    memory = found["memory"]
    remedy = f"; try --gin.{found['advice'][0].split()[0]}" if found.get("advice") else ""
    return (
        f"{step} does not fit: it needs {memory['peak'] / GIB:.2f} GiB and {report['topology']} "
        f"has {memory['limit'] / GIB:.2f} GiB a chip{remedy}"
    )


def describe(target: Target, name: str = "") -> dict[str, Any]:
    """What a report says beside its programs."""
    shapes, chip = _shapes(target), target.chip
    counts = {branch: model.count(tree) for branch, tree in shapes.items()}
    trained = sum(counts[b] for b in target.model.choice.trains)
    return {
        "config": name,
        "system": target.config.system,
        "stage": target.config.stage,
        "topology": f"{chip.name}:{'x'.join(map(str, target.shape))}",
        "slices": target.slices,
        "chips": math.prod(target.shape) * target.slices,
        "devices": len(target.devices),
        "chip": dataclasses.asdict(chip),
        "mesh": target.mesh,
        "parameters": {"trained": trained, "frozen": sum(counts.values()) - trained},
        "remat": target.model.sizes.remat,
        "batch": {
            "tasks": target.config.data.tasks_per_batch,
            "rows": target.config.data.tasks_per_batch * target.config.data.examples_per_task,
            "microbatches": target.config.train.microbatches,
        },
        "warnings": warnings(target),
        "versions": {n: _version(n) for n in ("jax", "jaxlib", "libtpu")},
        "programs": {},
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def heading(report: Mapping[str, Any]) -> str:
    """What is planned, and what to mind."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    many = f" x {report['slices']} slices" if report["slices"] > 1 else ""
    lines = [
        f"{report['config'] or report['system']} on {report['topology']}{many}: "
        f"{report['chips']} chips; mesh {mesh}",
        f"{report['system']} trains {report['parameters']['trained']:,} parameters, "
        f"{report['parameters']['frozen']:,} are frozen; {report['batch']['rows']:,} rows of "
        f"{report['batch']['tasks']:,} tasks a step, in {report['batch']['microbatches']}; "
        f"remat {report['remat']}",
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    return "\n".join(lines)


def table(step: str, found: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """One program's numbers, per chip (of a v3: per core)."""
    unit = "core" if report["chip"]["devices"] > 1 else "chip"
    memory = found["memory"]
    lines = [f"{step}, per {unit}:"]
    for name, size in memory["arguments"].items():
        lines.append(f"  {name:<22}{size / GIB:10.2f} GiB")
    limit = memory["limit"] / GIB
    if not found["fits"]:
        lines.append(f"  does not fit: needs {memory['peak'] / GIB:.2f} GiB of {limit:.2f} GiB")
        lines += [f"  try --gin.{text}" for text in found.get("advice", [])]
        return "\n".join(lines)
    useful = found["model_flops"] / 1e12
    of_model = f", {useful:.3f} T of the model" if useful else ""
    lines += [
        f"  {'temporaries':<22}{memory['temporaries'] / GIB:10.2f} GiB",
        f"  {'peak':<22}{memory['peak'] / GIB:10.2f} GiB of {limit:.2f} "
        f"({memory['peak'] / memory['limit']:.0%})",
        f"  {'FLOPs':<22}{found['flops'] / 1e12:10.3f} T{of_model}",
        f"  {'HBM':<22}{found['hbm_bytes'] / 1e9:10.2f} GB moved",
    ]
    for axes, kinds in found["collectives"].items():
        for kind, cell in kinds.items():
            label = f"{kind} over {axes}"
            lines.append(
                f"  {label:<34}{cell['payload'] / 1e6:10.2f} MB in {cell['runs']:.0f} runs, "
                f"{cell['sent'] / 1e6:.2f} MB sent"
            )
    times = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in found["seconds"].items() if v)
    lines += [
        f"  at least {found['step_seconds'] * 1e3:.2f} ms a step ({times}): {found['binds']} "
        f"binds, {found['utilisation']:.0%} of peak",
        f"  lowered in {found['lower_seconds']:.1f} s, compiled in "
        f"{found['compile_seconds']:.1f} s ({found['compile_cpu_seconds']:.1f} s of CPU)",
    ]
    if found["unknown_loops"]:
        lines.append(
            f"  warning: {found['unknown_loops']} loops of a length that the program does not say "
            "are counted once"
        )
    return "\n".join(lines)
