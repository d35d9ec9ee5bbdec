"""The embedded default, end to end: the main job of ``launch/local_run.sh``.

For each seed: hyperpretraining and multi-task fine-tuning of HyperT5-Prefix and HyperT5-LoRA on a
shipped small backbone, the baselines with that same backbone (and, with ``--systems``, every other
system), evaluation on held-out tasks, then a task file to an adapter, its outputs, and a PEFT
folder. Every step is what a command of the same name does; the folder it leaves can be used with
all of them.
"""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import config as config_lib
from hyper_t5 import runs, weights
from hyper_t5.checkpoints import workdir
from hyper_t5.evaluation import evaluate, report, tables
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.inference import predict_files, predictor
from hyper_t5.tasks import synthetic
from hyper_t5.training import loop
from hyper_t5.utils import files, plots
from hyper_t5.utils.overrides import Override, choose

CONFIG = "configs/quickstart.py"
BACKBONE = "assets/quickstart_backbone"
METRIC = "strict_match"
ALL = "all"
ADAPTER_SYSTEM, PEFT_SYSTEM = "hyper_prefix", "hyper_lora"  # of the adapters at the end


def main(
    out: str | Path,
    seeds: Sequence[int] = (0,),
    backbone: str | Path | None = None,
    systems: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the quickstart; return the numbers of every system and seed (OUT/results.json).

    Args:
      out: the folder to write.
      seeds: of the runs.
      backbone: default is the shipped one.
      systems: names in ``hypermodels.SYSTEMS``, or ``all``; default those with ``in_table``.
    """
    out, start = Path(out), time.monotonic()
    chosen = _choose(systems)
    backbone = Path(backbone) if backbone else shipped_backbone()
    reports = {seed: _run_seed(out / f"seed{seed}", seed, backbone, chosen) for seed in seeds}
    arms = {SYSTEMS[s].title: _over_seeds([reports[seed][s] for seed in seeds]) for s in chosen}
    results = {
        "seeds": list(seeds),
        "metric": METRIC,
        "minutes": (time.monotonic() - start) / 60,
        "arms": arms,
    }
    files.write_json(out / "results.json", results)
    plot = plots.compare(
        [{"name": arm, "system": arm, "splits": _mean_splits(r)} for arm, r in arms.items()],
        out / "results.png",
        METRIC,
    )
    costs = plots.quality_by_cost(_points(arms), out / "costs.png")
    folders = [out / f"seed{seeds[0]}" / system for system in chosen]
    report.write_report(folders, out / "report")
    written = _use_adapters(out, out / f"seed{seeds[0]}", backbone, chosen)
    print(f"\n{summary(results)}\n")
    print(f"plot: {plot}\nplot of costs: {costs}\nnumbers: {out / 'results.json'}")
    print(f"report of the first seed: {out / 'report' / 'report.html'}")
    for name, path in written.items():
        print(f"{name}: {path}")
    return results


def _choose(systems: Sequence[str]) -> list[str]:
    for name in systems:
        choose("--systems", name, [ALL, *SYSTEMS])
    if not systems:
        return [name for name, system in SYSTEMS.items() if system.small.in_table]
    return list(dict.fromkeys(SYSTEMS if ALL in systems else systems))


def shipped_backbone() -> Path:
    """Return the folder of the small backbone in the package."""
    return Path(str(importlib.resources.files("hyper_t5"))) / BACKBONE


def _run_seed(
    folder: Path, seed: int, backbone: Path, systems: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Train and evaluate each system; return its report, with the seconds of both stages."""
    reports = {}
    for name in systems:
        system, argument, run = SYSTEMS[name], f"system={name},seed={seed}", folder / name
        fields, first_seconds = {"backbone.path": str(backbone)}, 0.0
        if system.small.hyperpretrained:
            first = run.with_name(f"{name}_hyperpretrain")
            print(f"\n== seed {seed}: {system.title}, hyperpretraining", flush=True)
            train_run(f"{argument},stage=hyperpretrain", first, fields)
            fields["hypermodel.path"] = str(first)
            first_seconds = workdir.training_seconds(first) or 0.0
        print(f"\n== seed {seed}: {system.title}", flush=True)
        if system.trains and not system.small.is_backbone:
            train_run(argument, run, fields)
        else:
            workdir.write_or_check_config(run, _config(argument, fields))
        reports[name] = evaluate.evaluate_workdir(run)
        if first_seconds:
            reports[name]["seconds"]["train"] += first_seconds
    return reports


def _config(argument: str, fields: Mapping[str, Any], file: str = "") -> Any:
    config = config_lib.load(
        f"{file or CONFIG}:{argument}",
        [Override(k, repr(v), "quickstart") for k, v in fields.items()],
    )
    config_lib.validate(config)
    return config


def train_run(argument: str, folder: Path, fields: Mapping[str, Any], file: str = "") -> Any:
    """Train as ``hyper-t5 train`` does, with a config file's arguments; return the config.

    ``file`` defaults to the quickstart's.
    """
    return train_config(_config(argument, fields, file), folder)


def train_config(config: Any, folder: Path) -> Any:
    """Train as ``hyper-t5 train`` does, resuming an unfinished run; return the config."""
    with workdir.lock(folder):
        workdir.write_or_check_config(folder, config)
        loop.train(config, folder)
    return config


def _use_adapters(
    out: Path, folder: Path, backbone: Path, systems: Sequence[str]
) -> dict[str, Path]:
    """Take a held-out task from its file to an adapter, to outputs, to a PEFT folder."""
    name, task = next(iter(synthetic.suite()["unseen_compositions"].items()))
    task_file, rows, outputs = out / "task.json", out / "rows.jsonl", out / "outputs.jsonl"
    files.write_json(task_file, task)
    files.write_json_lines(rows, [{"input": row["input"]} for row in task["Instances"][:5]])
    written = {}
    if ADAPTER_SYSTEM in systems:
        run = runs.open(folder / ADAPTER_SYSTEM)
        adapter = written["adapter"] = predictor.adapt(run, task_file, out / "adapter")
        config = predictor.GenerationConfig(max_decode_length=8)
        predict_files.predict(rows, outputs, config, backbone=backbone, adapters=[adapter])
        print(f"\n== {name}: {task['Definition'][0]}")
        for line, row in zip(
            outputs.read_text(encoding="utf-8").splitlines(), task["Instances"], strict=False
        ):
            output = json.loads(line)["output"]
            print(f"  {row['input']} -> {output}  (expected {row['output'][0]})")
    if PEFT_SYSTEM in systems:
        run, base = runs.open(folder / PEFT_SYSTEM), out / "backbone_hf"
        written["PEFT adapter"] = predictor.adapt(
            run, task_file, out / "adapter_peft", "peft", str(base)
        )
        weights.convert(runs.backbone_folder(backbone), base, "hf")
        written["its backbone in Hugging Face's layout"] = base
    return written


# ------------------------------------------------------------------------------------------ tables


def _over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = {
        split: [r["splits"][split]["overall"][METRIC] for r in reports]
        for split in synthetic.HELD_OUT
    }
    same = ("system", "trained_parameters", "generated_parameters", "flops")
    seconds = {stage: [r["seconds"][stage] for r in reports] for stage in ("train", "evaluate")}
    return {**{k: reports[0][k] for k in same}, "seconds": seconds, "scores": scores}


def _points(arms: Mapping[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return {title: (MFLOPs per example, exact match of the first split)}."""
    split = synthetic.HELD_OUT[0]
    return {
        name: (arm["flops"]["per_example"] / tables.MEGA, float(np.mean(arm["scores"][split])))
        for name, arm in arms.items()
    }


def _mean_splits(arm: dict[str, Any]) -> dict[str, Any]:
    return {split: {"overall": {METRIC: float(np.mean(v))}} for split, v in arm["scores"].items()}


def summary(results: dict[str, Any]) -> str:
    """Return the closing table: exact match by system and split, and costs.

    Exact match is also relative to concatenation. FLOPs per example are those with the conditioning
    in front of the input, and as the system has it.
    """
    arms = results["arms"]
    [concat] = (s.title for s in SYSTEMS.values() if s.small.is_backbone)
    best = arms.get(concat, {}).get("scores", {})
    heads = [
        ("exact match, %", "(of concatenated)" if best else ""),
        ("trained", ""),
        ("emitted", "per task"),
        *(split.split("_", 1) for split in synthetic.HELD_OUT),
        ("MFLOPs,", "concat"),
        ("MFLOPs,", "adapters"),
        ("MFLOPs", "per task"),
        ("train", "s"),
        ("eval", "s"),
    ]
    lines = [list(line) for line in zip(*heads, strict=True)]
    for name, arm in arms.items():
        line = [name, f"{arm['trained_parameters']:,}", f"{arm['generated_parameters']:,}"]
        for split, values in arm["scores"].items():
            line.append(f"{np.mean(values):.1f}")
            line[-1] += f" ±{np.std(values):.1f}" if len(values) > 1 else ""
            if best:
                line[-1] += f" ({100 * np.mean(values) / max(np.mean(best[split]), 1e-9):.0f}%)"
        for cost in ("concatenated", "per_example", "per_task"):
            line.append(f"{arm['flops'][cost] / tables.MEGA:.1f}")
        for seconds in arm["seconds"].values():
            line.append("-" if None in seconds else f"{np.mean(seconds):.0f}")
        lines.append(line)
    return tables.aligned(lines, right=True)
