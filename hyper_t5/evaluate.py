"""Generation on tasks never trained on: quality per task and overall, and what it costs.

Metrics are Super-NaturalInstructions' (Wang et al. 2022): ROUGE-L F1 with a stemmer and exact match
after lower-casing and removing punctuation, each the maximum over references, times 100.
``strict_match`` compares the strings as they are. A mixture may have more of its own. Adapters are
generated once a task.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import cost, data, distributed, files, model, plots, sharding
from hyper_t5.errors import PreemptedError, UserError
from hyper_t5.judged import EvalTask
from hyper_t5.scores import METRICS, Scores, mean_scores, rouge_scorer, score

MEGA = 1e6

# --------------------------------------------------------------------------------------- generation


def predict_task(
    m: model.Model, params: model.Tree, task: EvalTask, config: ConfigDict, number: int = 0
) -> Iterator[np.ndarray]:
    """Generated ids of each row of one task; shapes are fixed: all tasks share a compile.

    ``number`` is the task's own (see ``model.task_number``).
    """
    parts = m.placement.parts if m.placement else 1
    size, adapters = -(-config.eval.batch // parts) * parts, None
    numbers = np.full(size, number, np.int32)
    if m.choice.reads == "task":
        adapters = model.generate(m, params, np.asarray(task.hyper_ids)[None], numbers[:1])
    for first in range(0, len(task.inputs), size):
        rows = task.inputs[first : first + size]
        padded = np.zeros((size, rows.shape[1]), np.int32)
        padded[: len(rows)] = rows
        batch: Any = (padded, numbers)
        if m.placement:  # every process has all rows, and its devices decode their part
            batch = sharding.put(batch, (m.placement.batch,) * 2)
        ids = model.respond(
            m,
            params,
            adapters,
            *batch,
            steps=config.eval.max_decode_length,
            beam_size=config.eval.beam_size,
        )
        yield from sharding.fetch(ids)[: len(rows)]


def evaluate(
    config: ConfigDict,
    m: model.Model,
    backbone: model.Backbone,
    params: model.Tree,
    trained_on: Sequence[str] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, predictions) of every held-out task.

    ``trained_on``: the tasks of a run with adapters for each, in their order.
    """
    rouge, report = rouge_scorer(), {}
    predictions: list[dict[str, Any]] = []
    judged = itertools.count(1)
    for split, mixture in data.splits_of(config).items():
        tasks = data.load_judged(config, mixture, split, backbone.vocab)
        episodes = data.eval_episodes(tasks, backbone.vocab, config, m.choice.layout)
        distributed.say(f"evaluate {split}: {_amounts(episodes)}")
        per_task: dict[str, Any] = {}
        own_metrics, own = data.extra_metrics(mixture), []
        began = time.monotonic()
        for number, task in enumerate(episodes, 1):
            if distributed.preempted(next(judged)):
                raise PreemptedError("preempted before all was judged; evaluate again")
            rows, made = [], []
            for ids, row, text, refs in zip(
                predict_task(m, params, task, config, model.task_number(m, task.name, trained_on)),
                task.ids,
                task.texts,
                task.references,
                strict=True,
            ):
                prediction = backbone.vocab.decode(ids.tolist())
                scores = score(prediction, refs, rouge)
                rows.append(scores)
                made.append(prediction)
                predictions.append(
                    {
                        "split": split,
                        "task": task.name,
                        "id": row,
                        "input": text,
                        "references": list(refs),
                        "prediction": prediction,
                        **scores,
                    }
                )
            own.append(own_metrics(task.name, made, task.references))
            per_task[task.name] = {
                "rows": len(rows),
                "category": task.category,
                "examples_shown": len(task.shown),
                "examples_dropped": task.dropped,
                "instruction_cut": task.truncated_instruction,
                "inputs_cut": task.truncated_inputs,
                **mean_scores(rows),
                **own[-1],
            }
            if number % 20 == 0 or number == len(episodes):
                left = (time.monotonic() - began) / number * (len(episodes) - number)
                distributed.say(
                    f"evaluate {split}: task {number}/{len(episodes)}  ETA {left:.0f} s"
                )
        overall = mean_scores([r for r in predictions if r["split"] == split])
        overall |= _mean_over_tasks(own)
        report[split] = {
            "rows": sum(t["rows"] for t in per_task.values()),
            "tasks": len(per_task),
            "overall": overall,
            "per_task": per_task,
        }
    return {"system": config.system, "splits": report}, predictions


def _mean_over_tasks(own: Sequence[Scores]) -> Scores:
    """Of each metric over the tasks that have it."""
    names = dict.fromkeys(name for scores in own for name in scores)
    return {n: float(np.mean([scores[n] for scores in own if n in scores])) for n in names}


def _amounts(episodes: Sequence[EvalTask]) -> str:
    """What is judged, and what did not fit the lengths of the config."""
    rows = sum(len(task.inputs) for task in episodes)
    text = f"{len(episodes)} tasks, {rows:,} rows"
    for what, count in {
        "examples dropped": sum(task.dropped for task in episodes),
        "instructions cut": sum(task.truncated_instruction for task in episodes),
        "inputs cut": sum(task.truncated_inputs for task in episodes),
    }.items():
        text += f", {count:,} {what}" if count else ""
    return text


# ------------------------------------------------------------------------------------------ command


def evaluate_workdir(
    workdir: str | Path,
    overrides: Any = (),
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Evaluate a run; writes metrics.json, predictions.jsonl and a plot to WORKDIR/eval/STEP.

    ``compare``: workdirs or metrics.json files of runs evaluated before, to stand in the same plot
    and table.
    """
    others = [read_report(path) for path in compare]  # a mistake is told before the long work
    config, m, backbone, params = model.load_run(workdir, overrides, on_mesh=True)
    step = distributed.agree("evaluated", model.step_of(workdir))
    place = files.as_path(out or files.as_path(workdir) / "eval" / str(step))
    costs = {
        "trained_parameters": model.trained_parameters(m, params),
        "generated_parameters": cost.generated_parameters(m, config),
        "flops": cost.flops(config, m.sizes),
    }
    began = time.monotonic()
    report, predictions = evaluate(config, m, backbone, params, model.tasks_of(workdir))
    if not distributed.is_first():
        return report
    seconds = {"train": cost.training_seconds(workdir), "evaluate": time.monotonic() - began}
    report |= {"workdir": str(workdir), "shots": config.eval.shots, **costs, "seconds": seconds}
    files.write_json_lines(place / "predictions.jsonl", predictions)
    files.write_json(place / "metrics.json", report)
    reports = [report, *others]
    print(f"{table(reports)}\n\n{cost_table(reports)}")
    plot = plots.compare(reports, place / "report.png")
    print(f"{place / 'metrics.json'}\n{place / 'predictions.jsonl'}\n{plot}")
    return report


def read_report(path: str | Path) -> dict[str, Any]:
    """A metrics.json, or the newest one of a workdir."""
    file = files.as_path(path)
    if file.is_dir():
        steps = sorted((file / "eval").glob("*/metrics.json"), key=lambda p: p.stat().mtime)
        if not steps:
            raise UserError(
                f"{path}: no eval/*/metrics.json in it; run `hyper-t5 evaluate "
                f"--workdir {path}` first"
            )
        file = steps[-1]
    report = files.read_json(file)
    try:
        table([report])
        cost_table([report])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not the metrics of an evaluation") from None
    return report


def table(reports: Sequence[dict[str, Any]], metrics: Sequence[str] = METRICS) -> str:
    """Systems by splits and metrics, as aligned text; then the metrics of a mixture's own."""
    splits = [(r, split, s) for r in reports for split, s in r["splits"].items()]
    own = dict.fromkeys(name for _, _, s in splits for name in s["overall"] if name not in METRICS)
    lines = [["system", "split", "tasks", *metrics, *own]]
    for r, split, s in splits:
        told = [f"{s['overall'][m]:.1f}" for m in metrics]
        told += [_number(s["overall"].get(m), ".1f") for m in own]
        lines.append([r.get("name", r["system"]), split, str(s["tasks"]), *told])
    return aligned(lines)


def cost_table(reports: Sequence[dict[str, Any]]) -> str:
    """Systems by what they cost, as aligned text; a ``-`` where an older report does not say."""
    head = [
        [
            "system",
            "trained",
            "emitted",
            *["MFLOPs per example,"] * 2,
            "MFLOPs",
            "train",
            "evaluate",
        ],
        ["", "", "per task", "text concatenated", "text in adapters", "per task", "s", "s"],
    ]
    lines = []
    for r in reports:
        flops, seconds = r.get("flops", {}), r.get("seconds", {})
        lines.append(
            [
                r.get("name", r["system"]),
                *(_number(r.get(f"{what}_parameters"), ",") for what in ("trained", "generated")),
                *(
                    _number(flops.get(what), ",.1f", MEGA)
                    for what in ("concatenated", "per_example", "per_task")
                ),
                *(_number(seconds.get(what), ".1f") for what in ("train", "evaluate")),
            ]
        )
    return aligned([*head, *lines], right=True)


def _number(value: float | None, form: str, unit: float = 0) -> str:
    return "-" if value is None else format(value / unit if unit else value, form)


def aligned(lines: Sequence[Sequence[str]], right: bool = False) -> str:
    """Columns of one width each; with ``right`` all but the first end where they end."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(w) if right and i else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
