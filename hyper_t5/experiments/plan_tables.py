"""Plans of docs/scaling.md: HyperT5 and HINT at XL and XXL, and HyperT5-LoRA from 8 to 512 chips.

    python -m hyper_t5.experiments.plan_tables --doc docs/scaling.md --plans runs/plans

The command compiles the plans of scaling_runs.tsv that DIR/NAME/plan.json lacks (minutes each;
``--compile NAME`` for some of them), and rewrites the table of the document, and scaling.json
beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5 import config as config_lib
from hyper_t5.experiments import doc_tables
from hyper_t5.parallel.accelerators import GIB
from hyper_t5.planning import plan
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError, handle_errors
from hyper_t5.utils.overrides import choose
from hyper_t5.utils.paths import expanded_path

JSON, RUNS = "scaling.json", "scaling_runs.tsv"  # beside the document


class PlanRun(NamedTuple):
    """A line of scaling_runs.tsv; overrides and steps are separated by spaces."""

    name: str
    title: str
    config: str
    topology: str
    overrides: str
    steps: str


def load_runs(folder: Path) -> dict[str, PlanRun]:
    """Read scaling_runs.tsv of a folder."""
    return {run.name: run for run in doc_tables.read_tsv(folder / RUNS, PlanRun)}


def compile_plan(
    config_name: str,
    topology: str,
    overrides: str,
    folder: Path,
    steps: str = "train",
) -> None:
    """Plan a config into a folder, unless it is there; a step that does not fit is a result too."""
    if (folder / plan.JSON).exists():
        return
    config = config_lib.load(config_name, overrides.split())
    config_lib.validate(config, needs_backbone=False)
    try:
        plan.plan(config, topology, steps=steps.split(), out=folder, name=config_name)
    except UserError as e:
        if not (folder / plan.JSON).exists():
            raise
        print(e)


def table(runs: Mapping[str, PlanRun], reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the training steps of all plans, per chip."""
    header = ["plan", "chips", "mesh", "rows a step", "frozen GiB", "trained + moments GiB"]
    header += ["peak GiB", "of HBM", "TFLOPs", "HBM GB", "sent GB", "ms a step", "bound by"]
    rows = [
        _cells(runs[name].title, report, report["programs"]["train"])
        for name, report in reports.items()
        if "train" in report["programs"]
    ]
    return doc_tables.markdown_table([*header, "of peak"], rows)


def _cells(title: str, report: Mapping[str, Any], costs: Mapping[str, Any]) -> list[str]:
    memory = costs["memory"]
    arguments = memory["arguments"]
    cells = [
        title,
        f"{report['chips']} {report['chip']['name']}",
        "x".join(str(n) for axis, n in report["mesh"].items() if axis != "slice" or n > 1),
        f"{report['batch']['rows']:,}",
        f"{arguments['frozen weights'] / GIB:.1f}",
        f"{(arguments['trained'] + arguments['optimizer']) / GIB:.2f}",
        f"{memory['peak'] / GIB:.1f}",
        f"{memory['peak'] / memory['limit']:.0%}",
    ]
    if not costs["fits"]:
        return [*cells, "does not fit", "", "", "", "", ""]
    sent = sum(cell["sent"] for kinds in costs["collectives"].values() for cell in kinds.values())
    return [
        *cells,
        f"{costs['flops'] / 1e12:.1f}",
        f"{costs['hbm_bytes'] / 1e9:,.0f}",
        f"{sent / 1e9:.1f}",
        f"{costs['step_seconds'] * 1e3:,.0f}",
        costs["binds"],
        f"{costs['utilisation']:.0%}",
    ]


@handle_errors("plan_tables")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.experiments.plan_tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--doc", type=expanded_path, required=True, metavar="FILE.md")
    parser.add_argument("--plans", type=expanded_path, required=True, metavar="DIR")
    parser.add_argument("--compile", nargs="*", metavar="NAME")
    args = parser.parse_args(argv)
    runs = load_runs(args.doc.parent)
    for name in runs if args.compile is None else args.compile:
        run = runs[choose("--compile", name, runs)]
        compile_plan(run.config, run.topology, run.overrides, args.plans / name, run.steps)
    file = args.doc.parent / JSON
    reports = files.read_json(file) if file.exists() else {}
    for name, run in runs.items():
        if (planned := args.plans / name / plan.JSON).exists():
            reports[name] = {**files.read_json(planned), "overrides": run.overrides.split()}
    doc_tables.update_document(args.doc, {"plans": table(runs, reports)})
    files.write_json(file, reports)


if __name__ == "__main__":
    sys.exit(main())
