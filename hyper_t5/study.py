"""All systems with one budget: trained alike on one backbone, judged on held-out tasks, over seeds.

``python -m hyper_t5.study --config configs/laptop.py --backbone DIR --judge sni p3 --seeds 0 1
--out runs/study --gin.data.sni_dir=...`` trains each system for the config's steps from the same
backbone, judges it on the held-out tasks of each mixture, and writes study.json, study.png, and for
each mixture a table and a report page (of the first seed). `start` is that backbone as it is with
the text in front of every input; `concat` the same after as many steps as all the others had;
`hyper_lora+text` is hyper_lora, hyperpretrained on running text before, in --text_steps steps. What
is there already is not made again, so that it goes on after a stop.
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

from hyper_t5 import (
    checkpoint,
    evaluate,
    files,
    intervals,
    plots,
    protocols,
    quickstart,
    report,
    workdir,
)
from hyper_t5 import config as config_lib
from hyper_t5.errors import exit_code
from hyper_t5.hypermodels import HYPERMODEL, SYSTEMS
from hyper_t5.overrides import Override, choose, read_overrides
from hyper_t5.quickstart import CONCAT

GIN = "--gin."
START = "start"
TEXT = "+text"
# Those with adapters for each task are trained on rows of the judged ones: another question.
DEFAULT = [START, *(name for name in SYSTEMS if not name.startswith("task_"))]
HYPERPRETRAINED = [n + TEXT for n in DEFAULT if n != START and HYPERMODEL in SYSTEMS[n].trains]


def main(
    out: str | Path,
    file: str,
    backbone: str | Path,
    judge: Sequence[str],
    seeds: Sequence[int] = (0,),
    arms: Sequence[str] = (),
    overrides: Sequence[Override] = (),
    text_steps: int = 0,
) -> dict[str, Any]:
    """Make what is not there; returns and writes (OUT/study.json) the quality of every arm.

    Args:
        out: a folder; OUT/seedS/ARM is the workdir of each run.
        file: the config, whose argument `system` says which.
        backbone: the folder or run that all start from, and most keep frozen.
        judge: mixtures whose held-out tasks are asked.
        seeds: of the runs; `start` and what is not trained have one.
        arms: names of systems, or `start`, or one of HYPERPRETRAINED; none is DEFAULT.
        overrides: of the config, in both stages.
        text_steps: of the hyperpretraining; 0 is what the config says.

    Raises:
        UserError: a name or field that is not known, no backbone.
    """
    out = Path(out)
    for arm in arms:
        choose("--systems", arm, [START, *SYSTEMS, *HYPERPRETRAINED])
    given = [Override("backbone.path", repr(str(backbone)), "--backbone"), *overrides]
    made: dict[str, dict[str, list[report.Run]]] = {mixture: {} for mixture in judge}
    for seed in seeds:
        for arm in arms or DEFAULT:
            if _trains(arm) or seed == seeds[0]:
                place = out / f"seed{seed}" / arm
                mine = [*given, Override("seed", str(seed), "--seeds")]
                _run(place, arm, file, mine, text_steps)
                for mixture in judge:
                    run = report.read_run(_judged(place, mixture, overrides))
                    made[mixture].setdefault(arm, []).append(dataclasses.replace(run, name=arm))
    results = {mixture: _scores(runs) for mixture, runs in made.items()}
    files.write_json(out / "study.json", {"seeds": list(seeds), "quality": results})
    for mixture, runs in made.items():
        page = report.write_page([found[0] for found in runs.values()], out / f"report_{mixture}")
        print(f"\n{table(results[mixture])}\n\nreport: {page}")
    if plot := _plot(results, out / "study.png"):
        print(f"plot: {plot}")
    print(f"numbers: {out / 'study.json'}")
    return results


# ---------------------------------------------------------------------------------------- one run


def _system(arm: str) -> str:
    return CONCAT if arm == START else arm.removesuffix(TEXT)


def _trains(arm: str) -> bool:
    return arm != START and bool(SYSTEMS[_system(arm)].trains)


def _run(place: Path, arm: str, file: str, overrides: list[Override], text_steps: int) -> None:
    """Make the workdir of an arm, trained to its end; before it that of its first stage."""
    argument = f"{file}:system={_system(arm)}"
    if arm.endswith(TEXT):
        first = place.with_name(f"{_system(arm)}_hyperpretrain")
        steps = [Override("train.steps", str(text_steps), "--text_steps")] if text_steps else []
        _train(first, arm, f"{argument},stage=hyperpretrain", [*overrides, *steps])
        overrides = [*overrides, Override("hypermodel.path", repr(str(first)), "--systems")]
    if _trains(arm):
        _train(place, arm, argument, overrides)
    else:
        workdir.check_resume(place, _config(argument, overrides))


def _config(argument: str, overrides: list[Override]) -> ConfigDict:
    config = config_lib.load(argument, overrides)
    config_lib.validate(config)
    return config


def _train(place: Path, arm: str, argument: str, overrides: list[Override]) -> None:
    config = _config(argument, overrides)
    if (checkpoint.latest_step(place) or 0) < config.train.steps:
        print(f"\n== {arm}, seed {config.seed}, {config.stage}", flush=True)
        quickstart.train_config(config, place)


def _judged(place: Path, mixture: str, overrides: Sequence[Override]) -> Path:
    """metrics.json of a run on a mixture."""
    folder = place / "judged" / mixture
    if not (folder / "metrics.json").is_file():
        named = Override("eval.mixture", mixture, "--judge")
        evaluate.evaluate_workdir(place, [*overrides, named], out=folder)
    return folder / "metrics.json"


# ----------------------------------------------------------------------------------------- tables

MEAN = "mean"


def _scores(runs: Mapping[str, Sequence[report.Run]]) -> dict[str, Any]:
    """{arm: {split: {metric, mean, deviation, seeds: [...]}}}, means over tasks.

    Where `concat` is there, the others have a ``difference`` to it, and its paired ``interval``
    over tasks (in P3: datasets), each the mean of its seeds. What was hyperpretrained has the same
    two, named ``gain`` and ``gain_interval``, to what was not.
    """
    made: dict[str, Any] = {}
    for arm, found in runs.items():
        made[arm] = {}
        for split in found[0].report["splits"]:
            values = [float(np.mean(list(run.quality(split).values()))) for run in found]
            made[arm][split] = {
                "metric": found[0].metric(split),
                MEAN: float(np.mean(values)),
                "deviation": float(np.std(values)),
                "seeds": values,
            }
            for other, names in (
                (CONCAT, ("difference", "interval")),
                (arm.removesuffix(TEXT), ("gain", "gain_interval")),
            ):
                if other != arm and other in runs:
                    pair = (_over_seeds(r, split) for r in (found, runs[other]))
                    _, points, ends = intervals.difference(*pair)
                    made[arm][split] |= dict(zip(names, (points, ends), strict=True))
    return made


def _over_seeds(runs: Sequence[report.Run], split: str) -> intervals.Parts:
    """What the headline metric of a split is made of, of all seeds together."""
    made: dict[str, tuple[float, float]] = {}
    for run in runs:
        parts = protocols.parts_of(run.report["splits"][split])[run.metric(split)]
        for unit, (total, count) in parts.items():
            before = made.get(unit, (0.0, 0.0))
            made[unit] = (before[0] + total, before[1] + count)
    return made


def _plot(results: Mapping[str, Any], path: Path) -> Any:
    """Every split of every mixture as a panel; None without `concat`, to which all is compared."""
    panels: dict[str, dict[str, Any]] = {}
    for mixture, scores in results.items():
        for arm, splits in scores.items():
            for split, told in splits.items():
                panels.setdefault(f"{mixture} {split}: {told['metric']}", {})[arm] = told
    return (
        plots.against(panels, CONCAT, path) if all(CONCAT in p for p in panels.values()) else None
    )


def table(scores: Mapping[str, Any]) -> str:
    """A line an arm: the mean over seeds of each split's metric, and the standard deviation.

    Behind it the difference to `concat`, and its 95 % interval; below what hyperpretraining gained.
    """
    splits: Mapping[str, Any] = next(iter(scores.values()))
    lines = [[""]]
    for split, told in splits.items():
        lines[0] += [f"{split}: {told['metric']}", f"less {CONCAT}"]
    for arm, found in scores.items():
        cells = [arm]
        for told in found.values():
            spread = f" ±{told['deviation']:.1f}" if len(told["seeds"]) > 1 else ""
            difference = _told(told["difference"], told["interval"]) if "difference" in told else ""
            cells += [f"{told[MEAN]:.1f}{spread}", difference]
        lines.append(cells)
    gains = [
        f"{arm}, {split}: {_told(told['gain'], told['gain_interval'])} to {arm.removesuffix(TEXT)}"
        for arm, found in scores.items()
        for split, told in found.items()
        if "gain" in told
    ]
    return "\n".join([evaluate.aligned(lines, right=True), *gains])


def _told(difference: float, ends: Sequence[float] | None) -> str:
    return f"{difference:+.1f}" + (f" [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else "")


@exit_code("study")
def command(argv: Sequence[str] | None = None) -> None:
    """Its command line."""
    parser = argparse.ArgumentParser(prog="python -m hyper_t5.study", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", default="configs/laptop.py", metavar="FILE.py")
    parser.add_argument("--backbone", type=Path, required=True, metavar="DIR")
    parser.add_argument("--judge", nargs="+", default=["sni"], metavar="MIXTURE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--text_steps", type=int, default=0, metavar="N")
    words = list(sys.argv[1:] if argv is None else argv)
    gin = [word.removeprefix(GIN) for word in words if word.startswith(GIN)]
    args = parser.parse_args([word for word in words if not word.startswith(GIN)])
    overrides = read_overrides(gin)
    where = (args.out, args.config, args.backbone)
    main(*where, args.judge, args.seeds, args.systems, overrides, args.text_steps)


if __name__ == "__main__":
    sys.exit(command())
