"""The embedded default, end to end: the main job of ``launch/local_run.sh``.

For each seed: hyperpretraining and multi-task fine-tuning of HyperT5-Prefix and HyperT5-LoRA on a
shipped small backbone, the baselines with that same backbone, evaluation on held-out tasks, then a
task file to an adapter, its outputs, and a PEFT folder. Every step is what a command of the same
name does; the folder it leaves can be used with all of them.
"""

from __future__ import annotations

import importlib.resources
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import config as config_lib
from hyper_t5 import evaluate, files, plots, serve, train, workdir
from hyper_t5.overrides import Override
from hyper_t5.tasks import synthetic

CONFIG = "configs/quickstart.py"
BACKBONE = "assets/quickstart_backbone"
METRIC = "strict_match"
# name in the table -> (config arguments, whether it is trained here)
ARMS = {
    "no adapter": ("system=none", False),
    "shared prefix": ("system=shared_prefix", True),
    "shared LoRA": ("system=shared_lora", True),
    "HyperT5-LoRA": ("system=hyper_lora", True),
    "HyperT5-Prefix": ("system=hyper_prefix", True),
    "text concatenated": ("system=concat", False),
}
HYPERPRETRAINED = ("HyperT5-LoRA", "HyperT5-Prefix")


def main(
    out: str | Path, seeds: Sequence[int] = (0,), backbone: str | Path | None = None
) -> dict[str, Any]:
    """Run it; returns and writes (OUT/results.json) the numbers of every arm and seed."""
    out, began = Path(out), time.monotonic()
    backbone = Path(backbone) if backbone else shipped_backbone()
    runs = {seed: _one_seed(out / f"seed{seed}", seed, backbone) for seed in seeds}
    arms = {arm: _over_seeds([runs[s][arm] for s in seeds]) for arm in ARMS}
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
    shown = _use(out, out / f"seed{seeds[0]}", backbone)
    print(f"\n{summary(results)}\n")
    print(f"plot: {plot}\nnumbers: {out / 'results.json'}")
    for what, path in shown.items():
        print(f"{what}: {path}")
    return results


def shipped_backbone() -> Path:
    """The folder of the small backbone that the package carries."""
    return Path(str(importlib.resources.files("hyper_t5"))) / BACKBONE


def _one_seed(folder: Path, seed: int, backbone: Path) -> dict[str, Any]:
    """arm -> its evaluation report."""
    reports = {}
    for arm, (argument, trained) in ARMS.items():
        place = folder / argument.removeprefix("system=")
        fields = {"backbone.path": str(backbone)}
        if arm in HYPERPRETRAINED:
            first = place.with_name(place.name + "_hyperpretrain")
            print(f"\n== seed {seed}: {arm}, hyperpretraining", flush=True)
            _train(f"{argument},stage=hyperpretrain,seed={seed}", first, fields)
            fields["hypermodel.path"] = str(first)
        print(f"\n== seed {seed}: {arm}", flush=True)
        if trained:
            _train(f"{argument},seed={seed}", place, fields)
        else:
            workdir.check_resume(place, _config(f"{argument},seed={seed}", fields))
        reports[arm] = evaluate.evaluate_workdir(place)
    return reports


def _config(argument: str, fields: dict[str, str]) -> Any:
    config = config_lib.load(
        f"{CONFIG}:{argument}", [Override(k, repr(v), "quickstart") for k, v in fields.items()]
    )
    config_lib.validate(config)
    return config


def _train(argument: str, place: Path, fields: dict[str, str]) -> None:
    config = _config(argument, fields)
    with workdir.hold(place):
        workdir.check_resume(place, config)
        train.train(config, place)


def _use(out: Path, run: Path, backbone: Path) -> dict[str, Path]:
    """A held-out task from its file to an adapter, to outputs, to a PEFT folder."""
    name, task = next(iter(synthetic.suite()["unseen_compositions"].items()))
    task_file, rows, outputs = out / "task.json", out / "rows.jsonl", out / "outputs.jsonl"
    files.write_json(task_file, task)
    files.write_json_lines(rows, [{"input": row["input"]} for row in task["Instances"][:5]])
    adapter = serve.adapt(run / "hyper_prefix", task_file, out / "adapter")
    serve.predict(backbone, [adapter], rows, outputs, max_decode_length=8)
    print(f"\n== {name}: {task['Definition'][0]}")
    for line, row in zip(outputs.read_text().splitlines(), task["Instances"], strict=False):
        print(f"  {row['input']} -> {json.loads(line)['output']}  (expected {row['output'][0]})")
    peft = serve.adapt(
        run / "hyper_lora", task_file, out / "adapter_peft", "peft", str(out / "backbone_hf")
    )
    return {
        "adapter": adapter,
        "PEFT adapter": peft,
        "its backbone in Hugging Face's layout": serve.export(
            None, out / "backbone_hf", "backbone", backbone
        ),
    }


# ------------------------------------------------------------------------------------------ tables


def _over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = {
        split: [r["splits"][split]["overall"][METRIC] for r in reports]
        for split in synthetic.HELD_OUT
    }
    return {"trained_parameters": reports[0]["trained_parameters"], "scores": scores}


def _mean_splits(arm: dict[str, Any]) -> dict[str, Any]:
    return {split: {"overall": {METRIC: float(np.mean(v))}} for split, v in arm["scores"].items()}


def summary(results: dict[str, Any]) -> str:
    """The closing table: exact match by arm and split, and as a share of the concatenated text."""
    arms = results["arms"]
    best = {s: np.mean(v) for s, v in arms["text concatenated"]["scores"].items()}
    lines = [
        f"{'exact match, %':<20}{'trained':>10}"
        + "".join(f"{split.replace('_', ' '):>22}{'of concat':>11}" for split in synthetic.HELD_OUT)
    ]
    for name, arm in arms.items():
        line = f"{name:<20}{arm['trained_parameters']:>10,}"
        for split, values in arm["scores"].items():
            spread = f" ±{np.std(values):.1f}" if len(values) > 1 else ""
            line += f"{f'{np.mean(values):.1f}{spread}':>22}"
            line += f"{100 * np.mean(values) / max(best[split], 1e-9):>10.0f}%"
        lines.append(line)
    return "\n".join(lines)
