"""Learning curves of ordinary tuning from generated, shared and random adapters.

    python -m hyper_t5.experiments.peft_init_curves --out runs/curves --seeds 0 1 2

HyperTuning (Phang et al. 2022) claims that generated adapters are the better initialization. Here
LoRA and prefixes of held-out tasks of the embedded suite are tuned on 32 examples each
(`configs/peft.py`). They start from what a hypermodel generates of the task's instruction, from one
adapter that was trained on all training tasks, or at random. Each initialization has its own best
learning rate of RATES, selected with the first seed on one half of the evaluation rows; the other
half is the test set. The command writes curves.json, curves.png and tables. Finished runs are kept,
so that it resumes after an interruption.
"""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import runs
from hyper_t5.checkpoints import checkpoint
from hyper_t5.evaluation import evaluate, tables
from hyper_t5.runs import Run
from hyper_t5.tasks import synthetic
from hyper_t5.tools import quickstart
from hyper_t5.training import peft_init
from hyper_t5.utils import files, plots
from hyper_t5.utils.errors import handle_errors
from hyper_t5.utils.paths import expanded_path

INITS = {"generated": "hyper", "shared": "shared", "random": "hyper"}  # -> system of the source run
RATES = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "prefix": (3e-3, 1e-2, 3e-2, 1e-1)}
STEPS = (0, 5, 20, 80)  # evaluated steps
SOURCE_STEPS = 300  # of the hypermodel and of the shared adapter
EXAMPLES = 32  # training examples per task
ROWS = 20  # evaluation rows per task: half for selection, half for test
BATCH = 4  # rows of each task in a step; a step has all tasks

Curve = dict[str, Any]


@handle_errors("peft_init_curves")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: train and evaluate all curves, then write tables and the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.experiments.peft_init_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=expanded_path, required=True, metavar="DIR")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    add("--backbone", type=expanded_path, metavar="DIR", help="default: the shipped one")
    add("--tasks", type=int, metavar="N", help="tasks per split (default: all 24)")
    args = parser.parse_args(argv)
    out, seeds, backbone = args.out, args.seeds, args.backbone or quickstart.shipped_backbone()
    for split in synthetic.HELD_OUT:
        for name, task in list(synthetic.suite()[split].items())[: args.tasks]:
            files.write_json(out / "tasks" / f"{split}-{name}.json", task)
    curves: list[Curve] = []
    for kind, rates in RATES.items():
        for init, system in INITS.items():
            source = _train_source(out, f"{system}_{kind}", backbone)
            group = [_tune(out, source, kind, init, rate, seeds[0]) for rate in rates]
            best = max(group, key=_selection_score)["rate"]
            group += [_tune(out, source, kind, init, best, seed) for seed in seeds[1:]]
            curves += [{**curve, "best": curve["rate"] == best} for curve in group]
    files.write_json(out / "curves.json", {"curves": curves})
    print(f"\n{table(curves)}\n\n{rates_table(curves)}\n")
    print(f"plot: {plot(curves, out / 'curves.png')}\nnumbers: {out / 'curves.json'}")


# ------------------------------------------------------------------------------------------- runs


def _train_source(out: Path, system: str, backbone: Path) -> Path:
    """Train the system that provides an initialization, on the training tasks of the suite."""
    fields: dict[str, Any] = {"backbone.path": str(backbone), "train.steps": SOURCE_STEPS}
    if system == "shared_prefix":
        fields["adapter.prefix_length"] = 72  # as long as the generated prefix
    workdir = out / "sources" / system
    if (checkpoint.latest_step(workdir) or 0) < SOURCE_STEPS:
        print(f"\n== {system}", flush=True)
        quickstart.train_run(f"system={system}", workdir, fields)
    return workdir


def _tune(out: Path, source: Path, kind: str, init: str, rate: float, seed: int) -> Curve:
    """Tune all tasks with `configs/peft.py` and evaluate at STEPS; keeps the curve alone."""
    workdir = out / f"{kind}_{init}_{rate:g}_{seed}"
    file = workdir / "curve.json"
    if file.is_file():
        return files.read_json(file)
    print(f"\n== {kind} from {init}, learning rate {rate:g}, seed {seed}", flush=True)
    fields = {
        "seed": seed,
        "optimizer.learning_rate": rate,
        "data.max_instances_per_task": EXAMPLES,
        "data.tasks_per_batch": len(list((out / "tasks").iterdir())),
        "data.examples_per_task": BATCH,
        "eval.max_rows_per_task": ROWS,
        "eval.batch": ROWS,
        "eval.shots": 0,  # the instruction alone, as in the quickstart
        "train.steps": STEPS[-1],
        "train.save_every": int(np.gcd.reduce(STEPS)),
        "train.keep": 0,
    }
    argument = f"init={source},start={init},task={out / 'tasks'}"
    config = quickstart.train_run(argument, workdir, fields, "configs/peft.py")
    m, backbone, trained, frozen = runs.init_run(config)
    if config.peft.init:
        trained = peft_init.init_adapters(config, m, backbone, trained)
    tasks = tuple(checkpoint.read_meta(workdir)["tasks"])
    scores = []
    for step in STEPS:
        if step:
            trained, _ = checkpoint.load_subtree(workdir / checkpoint.FOLDER / str(step), "params")
        run = Run(str(workdir), config, m, backbone, {**frozen, **trained}, step, tasks)
        _, predictions = evaluate.evaluate(run)
        scores.append(_halves(predictions))
    curve = {"kind": kind, "init": init, "rate": rate, "seed": seed, "steps": list(STEPS)}
    for half in ("selection", "test"):
        curve[half] = {split: [s[split][half] for s in scores] for split in synthetic.HELD_OUT}
    files.write_json(file, curve)
    shutil.rmtree(workdir / checkpoint.FOLDER)
    return curve


def _halves(predictions: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Average the exact match of each split over both halves of its tasks' rows."""
    rows: dict[str, int] = collections.Counter()
    values: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for row in predictions:
        half = "selection" if rows[row["task"]] < ROWS // 2 else "test"
        rows[row["task"]] += 1
        values[row["task"].partition("-")[0], half].append(row[quickstart.METRIC])
    splits = {split for split, _ in values}
    return {s: {h: float(np.mean(values[s, h])) for h in ("selection", "test")} for s in splits}


def _selection_score(curve: Curve) -> float:
    """Average the final exact match on the selection rows over the splits."""
    return float(np.mean([values[-1] for values in curve["selection"].values()]))


# ----------------------------------------------------------------------------------------- tables


def _best(curves: Sequence[Curve], kind: str, init: str) -> list[Curve]:
    return [c for c in curves if c["best"] and (c["kind"], c["init"]) == (kind, init)]


def table(curves: Sequence[Curve]) -> str:
    """Format exact match by steps at each best rate: mean and standard deviation over seeds."""
    steps = [str(step) for step in curves[0]["steps"]]
    lines = [["exact match, %", "", "best rate"], ["after steps", "", ""]]
    for split in synthetic.HELD_OUT:
        lines[0] += [split.replace("_", " "), *[""] * (len(steps) - 1)]
        lines[1] += steps
    for kind in RATES:
        for init in INITS:
            best = _best(curves, kind, init)
            line = [kind, init, f"{best[0]['rate']:g}"]
            for split in synthetic.HELD_OUT:
                values = np.array([curve["test"][split] for curve in best])
                pairs = zip(values.mean(0), values.std(0), strict=True)
                line += [f"{mean:.1f} ±{std:.1f}" for mean, std in pairs]
            lines.append(line)
    return tables.aligned(lines)


def rates_table(curves: Sequence[Curve]) -> str:
    """Format final exact match by learning rate: first seed, mean over the splits."""
    rates = sorted({rate for kind_rates in RATES.values() for rate in kind_rates})
    lines = [["learning rate", "", *(f"{rate:g}" for rate in rates)]]
    for kind in RATES:
        for init in INITS:
            scores = {
                c["rate"]: np.mean([values[-1] for values in c["test"].values()])
                for c in curves
                if (c["kind"], c["init"], c["seed"]) == (kind, init, curves[0]["seed"])
            }
            cells = [f"{scores[rate]:.1f}" if rate in scores else "-" for rate in rates]
            lines.append([kind, init, *cells])
    return tables.aligned(lines)


def plot(curves: Sequence[Curve], path: Path) -> str | Path:
    """Draw a panel per kind and split, and a line per initialization."""
    panels = {
        f"{kind}, {split.replace('_', ' ')}": {
            init: [c["test"][split] for c in _best(curves, kind, init)] for init in INITS
        }
        for kind in RATES
        for split in synthetic.HELD_OUT
    }
    return plots.curves(curves[0]["steps"], panels, path, "steps of tuning", "exact match, %")


if __name__ == "__main__":
    sys.exit(main())
