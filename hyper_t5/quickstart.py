"""The embedded default, end to end: the main job of ``launch/local_run.sh``.

For each seed: hyperpretraining and multi-task fine-tuning of HyperT5-Prefix and HyperT5-LoRA on a
shipped small backbone, the baselines with that same backbone (and, if asked for, every other
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
from hyper_t5 import (
    cost,
    evaluate,
    files,
    model,
    plots,
    predict,
    report,
    serve,
    train,
    weights,
    workdir,
)
from hyper_t5.hypermodels import SYSTEMS
from hyper_t5.overrides import Override, choose
from hyper_t5.tasks import synthetic

CONFIG = "configs/quickstart.py"
BACKBONE = "assets/quickstart_backbone"
METRIC = "strict_match"
ALL = "all"
DEFAULT = ("none", "shared_prefix", "shared_lora", "hyper_lora", "hyper_prefix", "concat")
HYPERPRETRAINED = ("hyper_lora", "hyper_prefix")
CONCAT = "concat"  # the shipped backbone itself: it was trained so, and is not trained again
ARMS = {  # system -> its name in the table, where that is another
    "hyper_prefix": "HyperT5-Prefix",
    "hyper_lora": "HyperT5-LoRA",
    "hyper_prefix_plus": "HyperTuning+ prefix",
    "hyper_lora_plus": "HyperTuning+ LoRA",
    "hint": "HINT",
    "hyperdecoder": "Hyperdecoder",
    "text_to_lora": "Text-to-LoRA style",
    "cached": "cached conditioning",
    "fid_icl": "FiD-ICL",
    CONCAT: "text concatenated",
    "shared_lora": "shared LoRA",
    "shared_prefix": "shared prefix",
    "shared_bottleneck": "shared bottleneck",
    "task_lora": "LoRA per task",
    "task_prefix": "prefix per task",
    "task_bottleneck": "bottleneck per task",
    "none": "no adapter",
}


def main(
    out: str | Path,
    seeds: Sequence[int] = (0,),
    backbone: str | Path | None = None,
    systems: Sequence[str] = (),
) -> dict[str, Any]:
    """Run it; returns and writes (OUT/results.json) the numbers of every arm and seed.

    ``systems``: names in ``hypermodels.SYSTEMS``, or ``all``; none is DEFAULT.
    """
    out, began = Path(out), time.monotonic()
    chosen = _chosen(systems or DEFAULT)
    backbone = Path(backbone) if backbone else shipped_backbone()
    runs = {seed: _one_seed(out / f"seed{seed}", seed, backbone, chosen) for seed in seeds}
    arms = {ARMS.get(s, s): _over_seeds([runs[seed][s] for seed in seeds]) for s in chosen}
    results = {
        "seeds": list(seeds),
        "metric": METRIC,
        "minutes": (time.monotonic() - began) / 60,
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
    shown = _use(out, out / f"seed{seeds[0]}", backbone, chosen)
    print(f"\n{summary(results)}\n")
    print(f"plot: {plot}\nplot of costs: {costs}\nnumbers: {out / 'results.json'}")
    print(f"report of the first seed: {out / 'report' / 'report.html'}")
    for what, path in shown.items():
        print(f"{what}: {path}")
    return results


def _chosen(systems: Sequence[str]) -> list[str]:
    """The systems that these names say, each once."""
    for name in systems:
        choose("--systems", name, [ALL, *SYSTEMS])
    return list(dict.fromkeys(SYSTEMS if ALL in systems else systems))


def shipped_backbone() -> Path:
    """The folder of the small backbone that the package carries."""
    return Path(str(importlib.resources.files("hyper_t5"))) / BACKBONE


def _one_seed(
    folder: Path, seed: int, backbone: Path, systems: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """system -> its evaluation report; its seconds of training are those of both stages."""
    reports = {}
    for system in systems:
        argument, place = f"system={system}", folder / system
        arm, before = ARMS.get(system, system), 0.0
        fields = {"backbone.path": str(backbone)}
        if system in HYPERPRETRAINED:
            first = place.with_name(place.name + "_hyperpretrain")
            print(f"\n== seed {seed}: {arm}, hyperpretraining", flush=True)
            train_run(f"{argument},stage=hyperpretrain,seed={seed}", first, fields)
            fields["hypermodel.path"] = str(first)
            before = cost.training_seconds(first) or 0.0
        print(f"\n== seed {seed}: {arm}", flush=True)
        if SYSTEMS[system].trains and system != CONCAT:
            train_run(f"{argument},seed={seed}", place, fields)
        else:
            workdir.check_resume(place, _config(f"{argument},seed={seed}", fields))
        reports[system] = evaluate.evaluate_workdir(place)
        if before:
            reports[system]["seconds"]["train"] += before
    return reports


def _config(argument: str, fields: Mapping[str, Any], file: str = "") -> Any:
    config = config_lib.load(
        f"{file or CONFIG}:{argument}",
        [Override(k, repr(v), "quickstart") for k, v in fields.items()],
    )
    config_lib.validate(config)
    return config


def train_run(argument: str, place: Path, fields: Mapping[str, Any], file: str = "") -> Any:
    """What ``hyper-t5 train`` does with a config (the quickstart's) of these fields; returns it."""
    return train_config(_config(argument, fields, file), place)


def train_config(config: Any, place: Path) -> Any:
    """What ``hyper-t5 train`` does with a config; returns it. A run that was cut off goes on."""
    with workdir.hold(place):
        workdir.check_resume(place, config)
        train.train(config, place)
    return config


def _use(out: Path, run: Path, backbone: Path, systems: Sequence[str]) -> dict[str, Path]:
    """A held-out task from its file to an adapter, to outputs, to a PEFT folder."""
    name, task = next(iter(synthetic.suite()["unseen_compositions"].items()))
    task_file, rows, outputs = out / "task.json", out / "rows.jsonl", out / "outputs.jsonl"
    files.write_json(task_file, task)
    files.write_json_lines(rows, [{"input": row["input"]} for row in task["Instances"][:5]])
    made = {}
    if "hyper_prefix" in systems:
        made["adapter"] = serve.adapt(run / "hyper_prefix", task_file, out / "adapter")
        options = serve.Options(max_decode_length=8)
        predict.predict(rows, outputs, options, backbone=backbone, adapters=[made["adapter"]])
        print(f"\n== {name}: {task['Definition'][0]}")
        for line, row in zip(outputs.read_text().splitlines(), task["Instances"], strict=False):
            print(
                f"  {row['input']} -> {json.loads(line)['output']}  (expected {row['output'][0]})"
            )
    if "hyper_lora" in systems:
        base = out / "backbone_hf"
        made["PEFT adapter"] = serve.adapt(
            run / "hyper_lora", task_file, out / "adapter_peft", "peft", str(base)
        )
        what = "its backbone in Hugging Face's layout"
        weights.convert(model.backbone_folder(backbone), base, "hf")
        made[what] = base
    return made


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
    """arm -> (MFLOPs per example, % of the first split)."""
    split = synthetic.HELD_OUT[0]
    return {
        name: (arm["flops"]["per_example"] / evaluate.MEGA, float(np.mean(arm["scores"][split])))
        for name, arm in arms.items()
    }


def _mean_splits(arm: dict[str, Any]) -> dict[str, Any]:
    return {split: {"overall": {METRIC: float(np.mean(v))}} for split, v in arm["scores"].items()}


def summary(results: dict[str, Any]) -> str:
    """The closing table: exact match by arm and split, as a share of the concatenated text, costs.

    FLOPs per example are those with the text in front of the input, and as the arm has it.
    """
    arms = results["arms"]
    best = arms.get(ARMS[CONCAT], {}).get("scores", {})
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
        for what in ("concatenated", "per_example", "per_task"):
            line.append(f"{arm['flops'][what] / evaluate.MEGA:.1f}")
        for seconds in arm["seconds"].values():
            line.append("-" if None in seconds else f"{np.mean(seconds):.0f}")
        lines.append(line)
    return evaluate.aligned(lines, right=True)
