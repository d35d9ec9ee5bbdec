"""Comparison of all systems with equal training budgets, on one backbone and held-out tasks.

    python -m hyper_t5.experiments.system_comparison --config configs/laptop.py --backbone DIR \
        --eval_mixtures sni p3 --seeds 0 1 --out runs/study --gin.data.sni_dir=...

Each system trains for the config's steps from the same backbone and is evaluated on the held-out
tasks of each mixture. Three kinds of entries need an explanation: `concat` is the backbone, trained
for as many steps as the others, with the text in front of every input; `start` is that before
training; `hyper_lora+text` is `hyper_lora` with hyperpretraining on running text before, for
--text_steps steps. The command writes study.json, study.png, and for each mixture a table and a
report page of the first seed. Finished runs are kept, so that it resumes after an interruption.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.checkpoints import checkpoint, workdir
from hyper_t5.evaluation import aggregation, evaluate, report, tables
from hyper_t5.evaluation.report import ReportRun
from hyper_t5.hypermodels import HYPERMODEL, SYSTEMS
from hyper_t5.scoring import bootstrap
from hyper_t5.tools import quickstart
from hyper_t5.utils import files, plots
from hyper_t5.utils.errors import handle_errors
from hyper_t5.utils.overrides import Override, choose, read_overrides
from hyper_t5.utils.paths import expand, expanded_path

CONCAT = "concat"  # the system that all others are compared with
GIN = "--gin."
START, TEXT = "start", "+text"
# Systems with adapters per task train on rows of the evaluated tasks: not comparable.
DEFAULT = [START, *(name for name, s in SYSTEMS.items() if s.kind != "per_task")]
HYPERPRETRAINED = [n + TEXT for n in DEFAULT if n != START and HYPERMODEL in SYSTEMS[n].trains]
ENTRIES = [START, *SYSTEMS, *HYPERPRETRAINED]


@handle_errors("system_comparison")
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: train and evaluate what is missing, then write all scores."""
    args = _parse(argv)
    runs: dict[str, dict[str, list[ReportRun]]] = {mixture: {} for mixture in args.eval_mixtures}
    for seed in args.seeds:
        for entry in args.systems:
            if not _is_trained(entry) and seed != args.seeds[0]:
                continue
            folder = args.out / f"seed{seed}" / entry
            _train(folder, entry, seed, args)
            for mixture in args.eval_mixtures:
                run = report.read_run(_evaluate(folder, mixture, args.overrides))
                named = dataclasses.replace(run, name=entry)
                runs[mixture].setdefault(entry, []).append(named)
    results = {mixture: scores(mixture_runs) for mixture, mixture_runs in runs.items()}
    files.write_json(args.out / "study.json", {"seeds": args.seeds, "quality": results})
    for mixture, mixture_runs in runs.items():
        first = [seed_runs[0] for seed_runs in mixture_runs.values()]
        page = report.write_page(first, args.out / f"report_{mixture}")
        print(f"\n{table(results[mixture])}\n\nreport: {page}")
    if drawn := plot(results, args.out / "study.png"):
        print(f"plot: {drawn}")
    print(f"numbers: {args.out / 'study.json'}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.experiments.system_comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="--gin.FIELD=VALUE overrides a field of the config, in both stages.",
    )
    add = parser.add_argument
    add(
        "--out", type=expanded_path, required=True, metavar="DIR", help="a run is in DIR/seedS/NAME"
    )
    add(
        "--config",
        type=expand,
        default="configs/laptop.py",
        metavar="FILE.py",
        help="with argument `system`",
    )
    add(
        "--backbone",
        type=expanded_path,
        required=True,
        metavar="DIR",
        help="a folder or a run's workdir",
    )
    add("--eval_mixtures", nargs="+", default=["sni"], metavar="MIXTURE")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    add("--systems", nargs="+", default=DEFAULT, metavar="NAME", help=f"of {', '.join(ENTRIES)}")
    add("--text_steps", type=int, default=0, metavar="N", help="default: the config's steps")
    args, rest = parser.parse_known_args(argv)
    if unknown := [word for word in rest if not word.startswith(GIN)]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for entry in args.systems:
        choose("--systems", entry, ENTRIES)
    args.overrides = read_overrides([word.removeprefix(GIN) for word in rest])
    return args


# -------------------------------------------------------------------------------------------- runs


def _system(entry: str) -> str:
    return CONCAT if entry == START else entry.removesuffix(TEXT)


def _is_trained(entry: str) -> bool:
    return entry != START and bool(SYSTEMS[_system(entry)].trains)


def _train(folder: Path, entry: str, seed: int, args: argparse.Namespace) -> None:
    """Train an entry to its last step, after its hyperpretraining; or write its config alone."""
    argument = f"{args.config}:system={_system(entry)}"
    overrides = [
        Override("backbone.path", repr(str(args.backbone)), "--backbone"),
        *args.overrides,
        Override("seed", str(seed), "--seeds"),
    ]
    if entry.endswith(TEXT):
        first = folder.with_name(f"{_system(entry)}_hyperpretrain")
        steps = Override("train.steps", str(args.text_steps), "--text_steps")
        text_overrides = [*overrides, steps] if args.text_steps else overrides
        _train_stage(first, f"{argument},stage=hyperpretrain", text_overrides)
        overrides.append(Override("hypermodel.path", repr(str(first)), "--systems"))
    if _is_trained(entry):
        _train_stage(folder, argument, overrides)
    else:
        workdir.write_or_check_config(folder, _load_config(argument, overrides))


def _load_config(argument: str, overrides: list[Override]) -> ConfigDict:
    config = config_lib.load(argument, overrides)
    config_lib.validate(config)
    return config


def _train_stage(folder: Path, argument: str, overrides: list[Override]) -> None:
    config = _load_config(argument, overrides)
    if (checkpoint.latest_step(folder) or 0) < config.train.steps:
        print(f"\n== {folder.name}, seed {config.seed}, {config.stage}", flush=True)
        quickstart.train_config(config, folder)


def _evaluate(folder: Path, mixture: str, overrides: Sequence[Override]) -> Path:
    """Evaluate a run on a mixture; returns its metrics.json."""
    out = folder / "eval_mixtures" / mixture
    if not (out / "metrics.json").is_file():
        selected = Override("eval.mixture", mixture, "--eval_mixtures")
        evaluate.evaluate_workdir(folder, [*overrides, selected], out=out)
    return out / "metrics.json"


# ------------------------------------------------------------------------------------------ scores


def scores(runs: Mapping[str, Sequence[ReportRun]]) -> dict[str, Any]:
    """Average the runs of each entry over tasks, then over seeds.

    Returns:
      {entry: {split: {metric, mean, deviation, seeds: [...]}}}, with the ``difference`` to
      `concat` and the ``gain`` of hyperpretraining, if these runs exist. Both have a paired
      bootstrap ``interval`` over tasks (P3: datasets), each the mean of its seeds.
    """
    result: dict[str, Any] = {}
    for entry, seed_runs in runs.items():
        result[entry] = {}
        for split in seed_runs[0].report["splits"]:
            values = [float(np.mean(list(run.quality(split).values()))) for run in seed_runs]
            cell = result[entry][split] = {
                "metric": seed_runs[0].metric(split),
                "mean": float(np.mean(values)),
                "deviation": float(np.std(values)),
                "seeds": values,
            }
            for other, point, interval in (
                (CONCAT, "difference", "interval"),
                (entry.removesuffix(TEXT), "gain", "gain_interval"),
            ):
                if other != entry and other in runs:
                    parts = (_sum_seeds(r, split) for r in (seed_runs, runs[other]))
                    _, cell[point], cell[interval] = bootstrap.difference(*parts)
    return result


def _sum_seeds(runs: Sequence[ReportRun], split: str) -> bootstrap.UnitSums:
    """Sum the parts of a split's headline metric over seeds."""
    total: dict[str, tuple[float, float]] = {}
    for run in runs:
        parts = aggregation.unit_sums(run.report["splits"][split])[run.metric(split)]
        for unit, (score, count) in parts.items():
            before = total.get(unit, (0.0, 0.0))
            total[unit] = (before[0] + score, before[1] + count)
    return total


def plot(results: Mapping[str, Any], path: Path) -> str | Path | None:
    """Draw a panel per split, if all have `concat`, the entry that all others are compared with."""
    panels: dict[str, dict[str, Any]] = {}
    for mixture, entries in results.items():
        for entry, splits in entries.items():
            for split, cell in splits.items():
                panels.setdefault(f"{mixture} {split}: {cell['metric']}", {})[entry] = cell
    complete = all(CONCAT in panel for panel in panels.values())
    return plots.against(panels, CONCAT, path) if complete else None


def table(entries: Mapping[str, Any]) -> str:
    """Format mean, deviation over seeds and difference to `concat`; below, gains of text."""
    splits: Mapping[str, Any] = next(iter(entries.values()))
    lines = [[""]]
    for split, cell in splits.items():
        lines[0] += [f"{split}: {cell['metric']}", f"vs {CONCAT}"]
    gains = []
    for entry, splits in entries.items():
        line = [entry]
        for split, cell in splits.items():
            spread = f" ±{cell['deviation']:.1f}" if len(cell["seeds"]) > 1 else ""
            line += [f"{cell['mean']:.1f}{spread}", _format(cell, "difference", "interval")]
            if "gain" in cell:
                gain = _format(cell, "gain", "gain_interval")
                gains.append(f"{entry}, {split}: {gain} vs {entry.removesuffix(TEXT)}")
        lines.append(line)
    return "\n".join([tables.aligned(lines, right=True), *gains])


def _format(cell: Mapping[str, Any], point: str, interval: str) -> str:
    if point not in cell:
        return ""
    ends = cell[interval]
    return f"{cell[point]:+.1f}" + (f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "")


if __name__ == "__main__":
    sys.exit(main())
