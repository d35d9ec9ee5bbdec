"""The plans of docs/scaling.md: ``python -m hyper_t5.plan_tables --out runs/plans``.

Each is compiled once, minutes each, and kept in a folder of its name; a second run goes on with
those that are missing. Then all are put into OUT/scaling.json, OUT/scaling.png and the tables that
are printed for the document.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hyper_t5 import config as config_lib
from hyper_t5 import files, plan, plots
from hyper_t5.chips import GIB
from hyper_t5.errors import UserError, exit_code


@dataclasses.dataclass(frozen=True)
class Row:
    """One plan; ``overrides`` as they are typed behind --gin. on a command line."""

    name: str
    config: str
    topology: str
    overrides: tuple[str, ...]
    steps: tuple[str, ...] = ("train",)


def _rows() -> list[Row]:
    """XL on pods of v5p and v4, XXL on v5p, and HyperT5-LoRA from 8 to 512 chips.

    Two tasks a chip where nothing else is said, so the batch grows with the chips (weak scaling).
    """
    lora, prefix = (f"configs/mtf.py:system=hyper_{kind}" for kind in ("lora", "prefix"))
    rows = []
    given: tuple[str, ...]
    for chip, parts in (("v5p", 4), ("v4", 16)):
        for name, config, given in (
            ("lora", f"{lora},size=xl", ("data.tasks_per_batch=128",)),
            ("prefix", f"{prefix},size=xl", ("data.tasks_per_batch=128",)),
            # As published, 1,024 rows, of which a chip holds only so many at once.
            ("hint", "configs/hint.py:size=xl", (f"train.microbatches={parts}",)),
        ):
            rows.append(Row(f"{name}_xl_{chip}_64", config, f"{chip}:4x4x4", given))
    for name, config, given in (
        ("lora", f"{lora},size=xxl", ("data.tasks_per_batch=32",)),
        ("prefix", f"{prefix},size=xxl", ("data.tasks_per_batch=32",)),
        ("hint", "configs/hint.py:size=xxl", ("data.tasks_per_batch=256", "train.microbatches=4")),
    ):
        cut = (*given, "mesh.model=4")
        rows.append(Row(f"{name}_xxl_v5p_64", config, "v5p:4x4x4", cut))
    for chips, shape in ((8, "2x2x2"), (512, "8x8x8")):
        batch = f"data.tasks_per_batch={2 * chips}"
        rows.append(Row(f"lora_xl_v5p_{chips}", f"{lora},size=xl", f"v5p:{shape}", (batch,)))
    use = ("data.tasks_per_batch=128", "eval.batch=64")
    rows.append(
        Row("lora_xl_v5p_64_use", f"{lora},size=xl", "v5p:4x4x4", use, ("generate", "evaluate"))
    )
    return rows


def compile_row(row: Row, folder: Path) -> None:
    """Plan one row into ``folder``, unless it is there; what does not fit is a result too."""
    if (folder / plan.JSON).exists():
        return
    config = config_lib.load(row.config, row.overrides)
    config_lib.validate(config, needs_backbone=False)
    try:
        plan.plan(config, row.topology, steps=row.steps, out=folder, name=row.config)
    except UserError as e:
        if not (folder / plan.JSON).exists():
            raise
        print(e)


def gather(rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """{name: report} of the rows that have been planned, with what they were given."""
    found = {}
    for row in rows:
        file = out / row.name / plan.JSON
        if file.exists():
            found[row.name] = {**files.read_json(file), "overrides": list(row.overrides)}
    return found


COLUMNS = (
    *("chips", "mesh", "rows a step", "frozen", "trained + moments", "peak GiB", "of HBM"),
    *("TFLOPs", "HBM GB", "sent GB", "ms a step", "binds", "of peak", "compiled s"),
)


def line(name: str, report: Mapping[str, Any], step: str = "train") -> list[str]:
    """The cells of one plan's step, in the order of COLUMNS, behind its name."""
    found = report["programs"][step]
    memory = found["memory"]
    parts = memory["arguments"]
    mesh = "x".join(str(n) for axis, n in report["mesh"].items() if axis != "slice" or n > 1)
    trained = parts.get("trained", 0) + parts.get("optimizer", 0)
    cells = [
        name,
        f"{report['chips']} {report['chip']['name']}",
        mesh,
        f"{report['batch']['rows']:,}",
        f"{parts.get('frozen weights', parts.get('weights', 0)) / GIB:.1f}",
        f"{trained / GIB:.2f}",
        f"{memory['peak'] / GIB:.1f}",
        f"{memory['peak'] / memory['limit']:.0%}",
    ]
    if not found["fits"]:
        return [*cells, "does not fit", *[""] * (len(COLUMNS) - len(cells))]
    return [
        *cells,
        f"{found['flops'] / 1e12:.1f}",
        f"{found['hbm_bytes'] / 1e9:,.0f}",
        f"{sent(found) / 1e9:.1f}",
        f"{found['step_seconds'] * 1e3:,.0f}",
        found["binds"],
        f"{found['utilisation']:.0%}",
        f"{found['compile_seconds']:.0f}",
    ]


def sent(found: Mapping[str, Any]) -> float:
    """Bytes that a device puts on its links in a step."""
    return sum(cell["sent"] for kinds in found["collectives"].values() for cell in kinds.values())


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Every step of every plan as one table, per chip."""
    lines = ["| plan | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, report in reports.items():
        for step in report["programs"]:
            told = name if step == "train" else f"{name}: {step}"
            lines.append("| " + " | ".join(line(told, report, step)) + " |")
    return "\n".join(lines)


def draw(reports: Mapping[str, Mapping[str, Any]], path: Path) -> str | Path:
    """What a step costs a chip as the pod and the batch grow: seconds, memory, bytes sent."""
    pyplot = plots.headless()
    grown = {
        report["chips"]: report["programs"]["train"]
        for name, report in reports.items()
        if name.startswith("lora_xl_v5p") and report["programs"].get("train", {}).get("fits")
    }
    counts = sorted(grown)
    figure, (times, sizes) = pyplot.subplots(1, 2, figsize=(10, 4))
    for term in ("compute", "hbm", "ici"):
        seconds = [grown[n]["seconds"][term] * 1e3 for n in counts]
        times.plot(counts, seconds, marker="o", label=term)
    times.set_ylabel("ms a step")
    for label, of in {
        "peak memory": lambda found: found["memory"]["peak"],
        "trained and moments": lambda found: sum(
            found["memory"]["arguments"][part] for part in ("trained", "optimizer")
        ),
        "bytes sent": sent,
    }.items():
        sizes.plot(counts, [of(grown[n]) / GIB for n in counts], marker="o", label=label)
    sizes.set_ylabel("GiB a chip")
    for axes in (times, sizes):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("v5p chips, two tasks each")
        axes.set_xticks(counts, [str(n) for n in counts])
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    return plots.save(figure, path)


@exit_code("plan_tables")
def main(argv: Sequence[str] | None = None) -> None:
    """Plan what is missing, then write and print all that is there."""
    parser = argparse.ArgumentParser(prog="python -m hyper_t5.plan_tables", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="compile these; [] for none")
    args = parser.parse_args(argv)
    rows = _rows()
    for row in rows:
        if args.only is None or row.name in args.only:
            compile_row(row, args.out / row.name)
    reports = gather(rows, args.out)
    files.write_json(args.out / "scaling.json", reports)
    print(markdown(reports))
    print(draw(reports, args.out / "scaling.png"))


if __name__ == "__main__":
    sys.exit(main())
