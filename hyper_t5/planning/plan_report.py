"""Text of a plan: heading, a table per program, and advice for a step that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hyper_t5.parallel.accelerators import GIB

Report = Mapping[str, Any]  # plan.json


def heading(report: Report) -> str:
    """Format the config, topology, mesh, batch and warnings of a plan."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    slices = f" x {report['slices']} slices" if report["slices"] > 1 else ""
    parameters, batch = report["parameters"], report["batch"]
    lines = [
        f"{report['config'] or report['system']} on {report['topology']}{slices}: "
        f"{report['chips']} chips; mesh {mesh}",
        f"{report['system']}: {parameters['trained']:,} trained and {parameters['frozen']:,} "
        f"frozen parameters; {batch['rows']:,} rows of {batch['tasks']:,} tasks per step in "
        f"{batch['microbatches']} microbatches; remat {report['remat']}",
        *(f"warning: {text}" for text in report["warnings"]),
    ]
    return "\n".join(lines)


def table(step: str, costs: Report, report: Report) -> str:
    """Format the costs of one program per chip (v3: per core)."""
    unit = "core" if report["chip"]["devices"] > 1 else "chip"
    memory = costs["memory"]
    limit = memory["limit"] / GIB
    lines = [f"{step}, per {unit}:"]
    lines += [f"  {name:<22}{size / GIB:10.2f} GiB" for name, size in memory["arguments"].items()]
    if not costs["fits"]:
        lines.append(f"  does not fit: needs {memory['peak'] / GIB:.2f} GiB of {limit:.2f} GiB")
        return "\n".join([*lines, *(f"  try --gin.{text}" for text in costs.get("advice", []))])
    useful = costs["model_flops"] / 1e12
    lines += [
        f"  {'temporaries':<22}{memory['temporaries'] / GIB:10.2f} GiB",
        f"  {'peak':<22}{memory['peak'] / GIB:10.2f} GiB of {limit:.2f} "
        f"({memory['peak'] / memory['limit']:.0%})",
        f"  {'FLOPs':<22}{costs['flops'] / 1e12:10.3f} T"
        + (f", {useful:.3f} T of the model" if useful else ""),
        f"  {'HBM':<22}{costs['hbm_bytes'] / 1e9:10.2f} GB read and written",
    ]
    for axes, kinds in costs["collectives"].items():
        for kind, cell in kinds.items():
            lines.append(
                f"  {f'{kind} over {axes}':<34}{cell['payload'] / 1e6:10.2f} MB in "
                f"{cell['runs']:.0f} runs, {cell['sent'] / 1e6:.2f} MB sent"
            )
    times = ", ".join(f"{k} {v * 1e3:.2f}" for k, v in costs["seconds"].items() if v)
    lines += [
        f"  at least {costs['step_seconds'] * 1e3:.2f} ms a step ({times}): bound by "
        f"{costs['binds']}, {costs['utilisation']:.0%} of peak",
        f"  compiled in {costs['compile_seconds']:.1f} s ({costs['compile_cpu_seconds']:.1f} s of "
        "CPU)",
    ]
    if costs["unknown_loops"]:
        lines.append(f"  warning: {costs['unknown_loops']} loops of unknown length count once")
    return "\n".join(lines)


def too_large(step: str, costs: Report, report: Report) -> str:
    """Format the error message of a step that does not fit, with the first advice."""
    memory = costs["memory"]
    remedy = f"; try --gin.{costs['advice'][0].split()[0]}" if costs.get("advice") else ""
    return (
        f"{step} does not fit: it needs {memory['peak'] / GIB:.2f} GiB and {report['topology']} "
        f"has {memory['limit'] / GIB:.2f} GiB a chip{remedy}"
    )


def advice(config: Any, report: Report, costs: Report, num_heads: int) -> list[str]:
    """List config changes for a training step that does not fit, the largest saving first.

    Savings of arguments are exact. That remat or a finer mesh halves the activations is a rule of
    thumb, which the next plan verifies.
    """
    memory, mesh = costs["memory"], report["mesh"]
    arguments = memory["arguments"]
    fixed = sum(arguments.values())
    activations = max(0.0, memory["peak"] - fixed)  # and gradients and gathered weights
    frozen = arguments.get("frozen weights", 0.0)
    savings: dict[str, float] = {}
    if report["remat"] != "full":
        savings["model.remat=full (at most a third more FLOPs)"] = activations / 2
    parts, tasks = mesh["slice"] * mesh["data"], config.data.tasks_per_batch
    microbatches, needed = config.train.microbatches, activations / max(memory["limit"] - fixed, 1)
    factors = [f for f in (2, 4, 8, 16, 32, 64) if tasks % (f * parts * microbatches) == 0]
    if factors:
        factor = next((f for f in factors if f >= needed), factors[-1])
        text = f"train.microbatches={factor * microbatches} (the same batch, in parts)"
        savings[text] = activations - activations / factor
    elif tasks > parts:
        fewer = max(parts, tasks // 2 // parts * parts)
        savings[f"data.tasks_per_batch={fewer}"] = activations / 2
    twice = 2 * mesh["model"]
    if mesh["data"] % 2 == 0 and num_heads % twice == 0:
        savings[f"mesh.model={twice} (more bytes over ici)"] = (frozen + activations / 2) / 2
    if config.backbone.dtype == "float32":
        savings["backbone.dtype=bfloat16"] = frozen / 2
    if config.optimizer.name == "adamw":
        savings["optimizer.name=adafactor"] = arguments.get("optimizer", 0.0)
    ranked = sorted(savings.items(), key=lambda item: -item[1])
    return [f"{text}: about {saved / GIB:.1f} GiB less" for text, saved in ranked if saved]
