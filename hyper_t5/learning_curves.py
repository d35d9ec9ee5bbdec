"""HyperTuning's claim about starts, measured: learning curves of tuning on held-out tasks.

``python -m hyper_t5.learning_curves --out runs/curves --seeds 0 1 2`` tunes LoRA and prefixes of
held-out tasks of the embedded suite by ordinary gradients on 32 examples each
(`configs/peft.py`), from what a hypermodel generates of the task's instruction, from one adapter
that was trained on all training tasks, and from random; evaluates at a few steps; and writes
curves.json, curves.png and a table. Each start has the learning rate of RATES that is best for it:
chosen with the first seed, by half of the judged rows, while the other half is what is reported.
The hypermodels and shared adapters that the starts come from are trained first (OUT/sources), once
for all seeds. What is there already is not made again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import checkpoint, evaluate, files, model, plots, quickstart, tuning
from hyper_t5.errors import exit_code
from hyper_t5.tasks import synthetic

STARTS = {"generated": "hyper", "shared": "shared", "random": "hyper"}  # and whose sizes it has
RATES = {"lora": (1e-3, 3e-3, 1e-2, 3e-2), "prefix": (3e-3, 1e-2, 3e-2, 1e-1)}
STEPS = (0, 5, 20, 80)  # that are judged
SOURCE_STEPS = 300
EXAMPLES = 32  # that a task is tuned on
ROWS = 20  # of a task that are judged: half to choose the rate by, half to report
BATCH = 4  # rows of each task, all tasks in every step

Curve = dict[str, Any]


def main(
    out: str | Path, seeds: Sequence[int], backbone: str | Path | None = None, tasks: int = 0
) -> list[Curve]:
    """Make and write all curves; returns them. ``tasks``: the first so many of a split; 0 = all."""
    out, backbone = Path(out), Path(backbone or quickstart.shipped_backbone())
    curves: list[Curve] = []
    for split in synthetic.HELD_OUT:
        for name, task in list(synthetic.suite()[split].items())[: tasks or None]:
            files.write_json(out / "tasks" / f"{split}-{name}.json", task)
    for kind in RATES:
        sources = {
            who: _source(out, f"{who}_{kind}", backbone) for who in dict.fromkeys(STARTS.values())
        }
        for start, who in STARTS.items():
            made = [_tune(out, sources[who], kind, start, rate, seeds[0]) for rate in RATES[kind]]
            rate = max(made, key=_chosen_by)["rate"]
            made += [_tune(out, sources[who], kind, start, rate, seed) for seed in seeds[1:]]
            curves += [{**curve, "best": curve["rate"] == rate} for curve in made]
    files.write_json(out / "curves.json", {"curves": curves})
    print(f"\n{table(curves)}\n\n{rates_table(curves)}\n")
    print(f"plot: {draw(curves, out / 'curves.png')}\nnumbers: {out / 'curves.json'}")
    return curves


# ---------------------------------------------------------------------------------------- one curve


def _source(out: Path, system: str, backbone: Path) -> Path:
    """A run whose adapters are a start, on the suite's training tasks."""
    fields: dict[str, Any] = {"backbone.path": str(backbone), "train.steps": SOURCE_STEPS}
    if system == "shared_prefix":  # as many positions as the hypermodel emits
        fields["adapter.prefix_length"] = 72
    place = out / "sources" / system
    if model.step_of(place) >= SOURCE_STEPS:
        return place
    print(f"\n== {system}", flush=True)
    quickstart.train_run(f"system={system}", place, fields)
    return place


def _tune(out: Path, source: Path, kind: str, start: str, rate: float, seed: int) -> Curve:
    """A run of `configs/peft.py`, judged at STEPS. Its checkpoints are then removed."""
    place = out / f"{kind}_{start}_{rate:g}_{seed}"
    file = place / "curve.json"
    if file.is_file():
        return files.read_json(file)
    print(f"\n== {kind} from {start}, learning rate {rate:g}, seed {seed}", flush=True)
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
    argument = f"init={source},start={start},task={out / 'tasks'}"
    config = quickstart.train_run(argument, place, fields, "configs/peft.py")
    m, backbone, trained, frozen = model.start(config)
    if config.peft.init:
        trained = tuning.start(config, m, backbone, trained)
    scores = []
    for step in STEPS:
        if step:
            trained, _ = checkpoint.load_subtree(place / checkpoint.FOLDER / str(step), "params")
        params, names = {**frozen, **trained}, model.tasks_of(place)
        _, predictions = evaluate.evaluate(config, m, backbone, params, names)
        scores.append(_halves(predictions))
    curve = {"kind": kind, "start": start, "rate": rate, "seed": seed, "steps": list(STEPS)}
    for number, name in enumerate(("chosen_by", "reported")):
        curve[name] = {s: [made[s][number] for made in scores] for s in synthetic.HELD_OUT}
    files.write_json(file, curve)
    shutil.rmtree(place / checkpoint.FOLDER)
    return curve


def _halves(predictions: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """split -> exact match of the first half of each task's rows, and of the second.

    A task is named by its split.
    """
    found: dict[str, tuple[list[float], list[float]]] = {}
    seen: dict[str, int] = {}
    for row in predictions:
        place = seen[row["task"]] = seen.get(row["task"], -1) + 1
        split = row["task"].partition("-")[0]
        found.setdefault(split, ([], []))[place >= ROWS // 2].append(row[quickstart.METRIC])
    return {s: (float(np.mean(one)), float(np.mean(two))) for s, (one, two) in found.items()}


def _chosen_by(curve: Curve) -> float:
    """What the best rate has most of: exact match at the end, on the rows to choose by."""
    return float(np.mean([values[-1] for values in curve["chosen_by"].values()]))


# ------------------------------------------------------------------------------- table and plot


def _best(curves: Sequence[Curve], kind: str, start: str) -> list[Curve]:
    return [c for c in curves if c["best"] and (c["kind"], c["start"]) == (kind, start)]


def table(curves: Sequence[Curve]) -> str:
    """Each start at its own best rate: exact match by steps, mean and spread over the seeds."""
    steps = [str(step) for step in curves[0]["steps"]]
    lines = [["exact match, %", "", "best rate"], ["after steps", "", ""]]
    for split in synthetic.HELD_OUT:
        lines[0] += [split.replace("_", " ") if i == 0 else "" for i in range(len(steps))]
        lines[1] += steps
    for kind in RATES:
        for start in STARTS:
            found = _best(curves, kind, start)
            line = [kind, start, f"{found[0]['rate']:g}"]
            for split in synthetic.HELD_OUT:
                values = np.array([curve["reported"][split] for curve in found])
                pairs = zip(values.mean(0), values.std(0), strict=True)
                line += [f"{mean:.1f} ±{std:.1f}" for mean, std in pairs]
            lines.append(line)
    return evaluate.aligned(lines)


def rates_table(curves: Sequence[Curve]) -> str:
    """The same rate for all starts: exact match at the end, first seed, mean of the splits."""
    seed, rates = curves[0]["seed"], sorted({rate for of in RATES.values() for rate in of})
    lines = [["learning rate", "", *(f"{rate:g}" for rate in rates)]]
    for kind in RATES:
        for start in STARTS:
            at = {
                c["rate"]: np.mean([values[-1] for values in c["reported"].values()])
                for c in curves
                if (c["kind"], c["start"], c["seed"]) == (kind, start, seed)
            }
            lines.append([kind, start, *(f"{at[r]:.1f}" if r in at else "-" for r in rates)])
    return evaluate.aligned(lines)


def draw(curves: Sequence[Curve], path: Path) -> str | Path:
    """A panel for each kind and split, a line for each start."""
    panels: dict[str, dict[str, Any]] = {}
    for kind in RATES:
        for split in synthetic.HELD_OUT:
            lines = {
                start: [c["reported"][split] for c in _best(curves, kind, start)]
                for start in STARTS
            }
            panels[f"{kind}, {split.replace('_', ' ')}"] = lines
    return plots.curves(curves[0]["steps"], panels, path, "steps of tuning", "exact match, %")


@exit_code("learning_curves")
def command(argv: Sequence[str] | None = None) -> None:
    """Its command line."""
    parser = argparse.ArgumentParser(prog="python -m hyper_t5.learning_curves", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--backbone", type=Path, metavar="DIR", help="another than the shipped one")
    parser.add_argument(
        "--tasks", type=int, default=0, metavar="N", help="of each split (default: all 24)"
    )
    args = parser.parse_args(argv)
    main(args.out, args.seeds, args.backbone, args.tasks)


if __name__ == "__main__":
    sys.exit(command())
