"""Ahead-of-time plans: memory, FLOPs, traffic and time of a step on a TPU that is not attached.

``hyper-t5 plan`` compiles the functions of ``train`` and ``evaluate`` with libtpu for a TPU
topology, on any machine and with abstract weights. The compiler reports memory; FLOPs, HBM bytes
and collectives come from the compiled program (`hlo`). Times are a roofline over the published
peaks of the chip (`accelerators`):

    compute  FLOPs of matrix products / bf16 peak
    hbm      bytes between HBM and the cores / HBM bandwidth
    ici      sum over collectives of bytes sent / bandwidth of the links along their mesh axis
    dcn      bytes sent between slices / the chip's share of its host's network

The largest of the four is a lower bound of the step time, and close to it where the compiler
overlaps them well. Utilisation is model FLOPs (without recomputation) / (chips * peak * time).
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

from hyper_t5 import config as config_lib
from hyper_t5 import flops, model, runs, t5, weights
from hyper_t5.data.batch import batch_spec
from hyper_t5.parallel import accelerators, sharding
from hyper_t5.parallel.accelerators import Chip
from hyper_t5.parallel.sharding import Placement
from hyper_t5.planning import hlo, plan_report
from hyper_t5.training import optim
from hyper_t5.training import step as step_lib
from hyper_t5.utils import environment, files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import choose

Tree = Any
JSON = "plan.json"


@dataclasses.dataclass(frozen=True)
class Target:
    """A model placed on the devices of a TPU topology: one per chip, two per v3 chip."""

    config: ConfigDict
    model: model.Model
    placement: Placement
    chip: Chip
    shape: tuple[int, ...]  # chips per dimension of one slice
    slices: int

    @property
    def mesh(self) -> dict[str, int]:
        """Axis sizes over all slices."""
        return dict(self.placement.mesh.shape)


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, its abstract arguments, and named parts of these for the report."""

    function: jax.stages.Wrapped
    arguments: tuple[Tree, ...]
    parts: Mapping[str, Tree]
    model_flops: float


# ------------------------------------------------------------------------------------------ target


def make_target(config: ConfigDict, topology: str, slices: int = 1) -> Target:
    """Place the model of a config on a topology such as ``v5p:4x4x4``.

    Raises:
      UserError: the topology is unknown, the TPU compiler is missing, or the mesh does not match.
    """
    chip, shape = accelerators.parse_topology(topology)
    devices = topology_devices(chip, shape, slices)
    if slices > 1 and config.mesh.slices == 1:
        config = config.copy_and_resolve_references()
        config.mesh.slices = slices
    placement = sharding.make_placement(config.mesh, devices)
    m = model.build_model(config, backbone_sizes(config), placement)
    return Target(config, m, placement, chip, shape, slices)


def topology_devices(chip: Chip, shape: tuple[int, ...], slices: int = 1) -> list[Any]:
    """Return the devices of a topology; they compile programs and cannot run them.

    Raises:
      UserError: libtpu, which contains the compiler, is missing or does not support the topology.
    """
    if not importlib.util.find_spec("libtpu") and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "plan: the TPU compiler is not installed; pip install 'hyper_t5[plan]', or the version "
            "of libtpu that `pip show jax` lists for its extra tpu"
        )
    environment.set_defaults()
    # On a TPU VM, keep JAX from opening the chips and libtpu from locking them.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    host = [min(side, limit) for side, limit in zip(shape, chip.host, strict=True)]
    # By default libtpu assumes a cube without rings, and compiles every all-gather over one as an
    # all-reduce.
    rings = accelerators.wraps(chip, shape)
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
        version = _version("libtpu")
        raise UserError(f"--topology {name}: libtpu {version} refuses it: {e}") from e


def backbone_sizes(config: ConfigDict) -> t5.T5Config:
    """Read the sizes of ``backbone.path`` if it exists, else return those of ``config.model``.

    Raises:
      UserError: the folder is not a T5.
    """
    sizes = config_lib.t5_config(config)
    if not config.backbone.path or not Path(config.backbone.path).exists():
        return sizes
    stored = weights.read_config(runs.backbone_folder(config.backbone.path))
    runtime = ("dtype", "remat", "dropout_rate", "scan_unroll")
    return dataclasses.replace(stored, **{name: getattr(sizes, name) for name in runtime})


# ---------------------------------------------------------------------------------------- programs


def batch_of(config: ConfigDict, m: model.Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a global training batch."""
    text = config.stage == "hyperpretrain"
    spec = batch_spec(config.data, m.system.layout, text=text)
    return {name: jax.ShapeDtypeStruct(s.shape, s.dtype) for name, s in spec.items()}


def train_program(target: Target) -> Program:
    """Build the training step.

    Raises:
      UserError: the system trains nothing, or the batch does not divide over the mesh.
    """
    config, m, placement = target.config, target.model, target.placement
    if not m.system.trains:
        raise UserError(f"system={config.system} has nothing to train; --steps evaluate,generate")
    sharding.check_batch(config.data.tasks_per_batch, config.train.microbatches, placement)
    params = sharding.struct(_param_shapes(target), model.param_shardings(m))
    trained = {branch: params.pop(branch) for branch in m.system.trains}
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    shardings = step_lib.state_shardings(m, optimizer, trained)
    state = jax.eval_shape(functools.partial(step_lib.init_state, optimizer), trained)
    state = sharding.struct(state, shardings)
    shapes = batch_of(config, m)
    batch = _abstract(shapes, placement.batch_sharding)
    key = _abstract(jax.eval_shape(lambda: jax.random.key(0)), placement.replicated)
    optimizer_state = {k: v for k, v in state.items() if k != "params"}
    parts = {"frozen weights": params, "trained": trained, "optimizer": optimizer_state}
    return Program(
        step_lib.make_step(m, optimizer, config, shardings),
        (state, params, batch, key),
        parts | {"batch": batch},
        flops.train_flops(m, config, shapes, step_lib.loss_sums),
    )


def generate_program(target: Target) -> Program | None:
    """Build adapter generation for one task per shard of a batch; None if nothing reads a task."""
    m, placement = target.model, target.placement
    if m.hypermodel is None or m.system.conditioned_on == "input":
        return None
    params = _replicated_over_data(target)
    length = m.system.layout.hyper_length(target.config.data)
    ids = _abstract(_ids(placement.batch_shards, length), placement.batch_sharding)
    tasks = _abstract(_ids(placement.batch_shards), placement.batch_sharding)
    step = jax.jit(lambda params, ids, tasks: model.generate_adapters(m, params, ids, tasks))
    arguments = (params, ids, tasks)
    work = flops.jaxpr_flops(jax.make_jaxpr(step)(*arguments))
    return Program(step, arguments, {"weights": params, "batch": (ids, tasks)}, work)


def evaluate_program(target: Target) -> Program:
    """Build decoding of ``eval.batch`` rows of one task, to ``eval.max_decode_length``."""
    config, m, placement = target.config, target.model, target.placement
    params = _replicated_over_data(target)
    divides = config.eval.batch % placement.batch_shards == 0
    rows_sharding = placement.batch_sharding if divides else placement.replicated
    width = m.system.layout.input_length(config.data)
    rows = _abstract(_ids(config.eval.batch, width), rows_sharding)
    tasks = _abstract(_ids(config.eval.batch), rows_sharding)
    adapters = None
    if m.hypermodel is not None and m.system.conditioned_on == "task":
        unplaced = dataclasses.replace(m, placement=None)
        length = m.system.layout.hyper_length(config.data)
        shapes = jax.eval_shape(unplaced.adapters, params, _ids(1, length), _ids(1))
        adapters = _abstract(shapes, placement.replicated)
    options = {"steps": config.eval.max_decode_length, "beam_size": config.eval.beam_size}
    step = jax.jit(functools.partial(model.generate_tokens, m, **options))
    parts = {"weights": params, "adapters": adapters, "batch": (rows, tasks)}
    return Program(step, (params, adapters, rows, tasks), parts, 0.0)


PROGRAMS: dict[str, Callable[[Target], Program | None]] = {
    "train": train_program,
    "evaluate": evaluate_program,
    "generate": generate_program,
}


def _param_shapes(target: Target) -> Tree:
    return model.param_shapes(target.model, target.config.backbone.dtype)


def _replicated_over_data(target: Target) -> Tree:
    """Return all parameters as inference holds them: sharded over ``model`` alone."""
    axes, shapes = model.logical_axes(target.model), _param_shapes(target)
    return sharding.struct(
        shapes, {b: target.placement.compute_sharding(axes[b], shapes[b]) for b in axes}
    )


def _ids(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _abstract(tree: Tree, at: Any) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree)


# ------------------------------------------------------------------------------------------- costs


def analyse(target: Target, program: Program, hlo_file: Path | None = None) -> dict[str, Any]:
    """Compile a program and return its costs on one device (a chip; v3: a core) for plan.json.

    ``hlo_file`` receives the gzipped text of the compiled program. If the program does not fit,
    ``fits`` is False and ``memory`` has the compiler's requirement.
    """
    arguments = {name: shard_bytes(tree) for name, tree in program.parts.items()}
    memory: dict[str, Any] = {"arguments": arguments, "limit": target.chip.limit}
    lowered = program.function.lower(*program.arguments)
    began, cpu_began = time.monotonic(), time.process_time()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        needed, available = parse_exhausted(str(e))
        memory |= {"peak": needed, "limit": available or target.chip.limit}
        return {"fits": False, "memory": memory, "compiler": str(e).strip().splitlines()[0][:300]}
    seconds, cpu_seconds = time.monotonic() - began, time.process_time() - cpu_began
    stats: Any = compiled.memory_analysis()
    laid_out, peak = stats.argument_size_in_bytes, stats.peak_memory_in_bytes
    memory |= {"laid_out": laid_out, "temporaries": max(0, peak - laid_out)}
    # The compiler drops unused arguments, which stay in memory all the same.
    memory["peak"] = peak + max(0, sum(arguments.values()) - laid_out)
    text = compiled.as_text() or ""
    if hlo_file is not None:
        files.check_writable(hlo_file)
        hlo_file.parent.mkdir(parents=True, exist_ok=True)
        hlo_file.write_bytes(gzip.compress(text.encode(), mtime=0))
    costs = {"memory": memory, "fits": memory["peak"] <= memory["limit"]}
    costs |= {"compile_seconds": seconds, "compile_cpu_seconds": cpu_seconds}
    model_flops = program.model_flops / target.placement.mesh.size
    return costs | _roofline(target, hlo.totals(hlo.parse(text), target.slices), model_flops)


def _roofline(target: Target, totals: hlo.Totals, model_flops: float) -> dict[str, Any]:
    chip, mesh = target.chip, target.mesh
    ici = sum(
        c.runs * c.sent / link_bandwidth(target, c.groups)
        for c in totals.collectives
        if c.groups is not None and c.sent
    )
    dcn = sum(c.runs * c.sent for c in totals.collectives if c.groups is None)
    seconds = {
        "compute": totals.flops / chip.flops_per_device,
        "hbm": totals.hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        "ici": ici,
        "dcn": dcn / (chip.dcn_bandwidth / chip.devices),
    }
    step_seconds = max(seconds.values())
    peak_flops = step_seconds * chip.flops_per_device
    mesh["slice"] //= target.slices  # replica groups refer to the mesh of one slice
    return {
        "flops": totals.flops,
        "model_flops": model_flops,
        "hbm_bytes": totals.hbm_bytes,
        "collectives": hlo.by_axes(totals.collectives, mesh),
        "unknown_loops": totals.unknown_loops,
        "seconds": seconds,
        "binds": max(seconds, key=lambda name: seconds[name]),
        "step_seconds": step_seconds,
        "utilisation": (model_flops or totals.flops) / peak_flops if peak_flops else 0.0,
    }


def shard_bytes(tree: Tree) -> int:
    """Sum the bytes that abstract arrays occupy on one device, without the padding of tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def parse_exhausted(text: str) -> tuple[float, float]:
    """Parse (bytes needed, bytes available) from RESOURCE_EXHAUSTED; zeros if it has neither."""
    form = r"(?:Used |\()([\d.]+)([KMGT]?)\w*\)?(?: of | exceeds .*?\()([\d.]+)([KMGT]?)"
    match = re.search(form, text)
    if not match:
        return 0.0, 0.0
    needed, unit, available, available_unit = match.groups()
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    return float(needed) * scale[unit], float(available) * scale[available_unit]


def link_bandwidth(target: Target, groups: np.ndarray) -> float:
    """Return the bytes/s that a device of the first group can send to the rest of its group.

    Each dimension of the torus along which the group extends contributes its links: two if the
    group fills a ring, else one, as at the end of a line. The two cores of a v3 chip share its
    links and its memory.
    """
    chip, devices = target.chip, target.placement.mesh.devices.reshape(-1)
    rings = accelerators.wraps(chip, target.shape)
    links = 0
    for axis, (side, ring) in enumerate(zip(target.shape, rings, strict=True)):
        coordinates = {devices[int(i)].coords[axis] for i in groups[0]}
        if len(coordinates) > 1:
            links += 2 if ring and len(coordinates) == side else 1
    return links * chip.ici_bandwidth / chip.devices if links else chip.hbm_bandwidth


# -------------------------------------------------------------------------------------------- plan


def plan(
    config: ConfigDict,
    topology: str,
    slices: int = 1,
    steps: Sequence[str] = tuple(PROGRAMS),
    out: str | Path | None = None,
    name: str = "",
) -> dict[str, Any]:
    """Compile the steps of a config for a topology; print their costs and write OUT/plan.json.

    Returns:
      The content of plan.json. ``name`` is the name of the config in it.

    Raises:
      UserError: the config cannot be planned, or (after the report is written) does not fit.
    """
    for step in steps:
        choose("--steps", step, PROGRAMS)
    target = make_target(config, topology, slices)
    report = describe(target, name)
    print(plan_report.heading(report), flush=True)
    for step in steps:
        program = PROGRAMS[step](target)
        if program is None:
            continue
        costs = analyse(target, program, Path(out) / f"{step}.hlo.gz" if out else None)
        if step == "train" and not costs["fits"]:
            heads = target.model.sizes.num_heads
            costs["advice"] = plan_report.advice(config, report, costs, heads)
        report["programs"][step] = costs
        print(f"\n{plan_report.table(step, costs, report)}", flush=True)
    if out is not None:
        files.write_json(Path(out) / JSON, report)
        print(f"\n{Path(out) / JSON}", flush=True)
    for step, costs in report["programs"].items():
        if not costs["fits"]:
            raise UserError(plan_report.too_large(step, costs, report))
    return report


def describe(target: Target, name: str = "") -> dict[str, Any]:
    """Return the part of plan.json that needs no compilation."""
    shapes, chip = _param_shapes(target), target.chip
    counts = {branch: model.count_parameters(tree) for branch, tree in shapes.items()}
    trained = sum(counts[b] for b in target.model.system.trains)
    data = target.config.data
    return {
        "config": name,
        "system": target.config.system,
        "stage": target.config.stage,
        "topology": f"{chip.name}:{'x'.join(map(str, target.shape))}",
        "slices": target.slices,
        "chips": math.prod(target.shape) * target.slices,
        "devices": target.placement.mesh.size,
        "chip": dataclasses.asdict(chip),
        "mesh": target.mesh,
        "parameters": {"trained": trained, "frozen": sum(counts.values()) - trained},
        "remat": target.model.sizes.remat,
        "batch": {
            "tasks": data.tasks_per_batch,
            "rows": data.tasks_per_batch * data.examples_per_task,
            "microbatches": target.config.train.microbatches,
        },
        "warnings": warnings(target),
        "versions": {package: _version(package) for package in ("jax", "jaxlib", "libtpu")},
        "programs": {},
    }


def warnings(target: Target) -> list[str]:
    """List properties of a mesh that cost memory or time."""
    path, heads = target.config.backbone.path, target.model.sizes.num_heads
    size = target.mesh["model"]
    messages = []
    if path and not Path(path).exists():
        messages.append(f"backbone.path={path} does not exist; sizes are those of config.model")
    if heads % size:
        messages.append(
            f"{heads} heads are not a multiple of mesh.model={size}: attention is not sharded by "
            "heads and gathers its inputs"
        )
    axes, shapes = model.logical_axes(target.model), _param_shapes(target)
    return messages + [
        f"mesh.model={size} does not divide {axis}={length}: it is replicated on every chip, which "
        "costs memory and traffic"
        for axis, length in target.placement.indivisible_axes(axes, shapes).items()
        if axis != "heads"
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
