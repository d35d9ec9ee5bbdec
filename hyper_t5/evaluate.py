"""Tasks never trained on: what is said to their rows, how good it is, and what it costs.

A task is judged by what is generated, or, where its rows are a choice, by which of their options is
the likeliest (`ranking`). Adapters are generated once a task.

Metrics are made by `protocols`. For every row they are Super-NaturalInstructions' (Wang et al.
2022): ROUGE-L F1 with a stemmer and exact match after lower-casing and removing punctuation, each
the maximum over references, times 100; ``strict_match`` compares the strings as they are. A
benchmark may have more of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import (
    __version__,
    adapter_stats,
    bpe,
    checkpoint,
    cost,
    data,
    distributed,
    files,
    given,
    model,
    plots,
    protocols,
    ranking,
    sharding,
    submission,
)
from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5.answers import Answers, key_of
from hyper_t5.decoding import decode
from hyper_t5.errors import PreemptedError, UserError
from hyper_t5.judged import EvalTask
from hyper_t5.scores import METRICS
from hyper_t5.taskfile import TaskRows

MEGA = 1e6

# ------------------------------------------------------------------------------------- the answers


def predict_task(
    m: model.Model, params: model.Tree, task: EvalTask, config: ConfigDict, number: int = 0
) -> Iterator[np.ndarray]:
    """Generated ids of each row of one task; shapes are fixed: all tasks share a compile.

    ``number`` is the task's own (see ``model.task_number``).
    """
    batches = ranking.task_batches(m, params, task, task.inputs, config, number)
    for first, adapters, rows in batches:
        ids, _ = decode(
            m.sizes,
            params[model.BACKBONE],
            rows,
            adapters,
            steps=config.eval.max_decode_length,
            beam_size=config.eval.beam_size,
        )
        yield from sharding.fetch(ids)[: len(task.inputs) - first]


def evaluate(
    config: ConfigDict,
    m: model.Model,
    backbone: model.Backbone,
    params: model.Tree,
    trained_on: Sequence[str] = (),
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, predictions) of every held-out task.

    The metrics are those that `protocols.score_predictions` makes of the predictions, and of each
    task what its conditioning held. ``trained_on``: the tasks of a run with adapters for each, in
    their order.
    """
    tokenizer = _tokenizer(config)
    asked = ask(config, m, backbone)
    kept = Answers(None, [""] * len(asked), [len(one.task.inputs) for one in asked])
    answer(config, m, backbone, params, asked, kept, trained_on)
    return judge(config, asked, kept.rows(), tokenizer)


class Asked(NamedTuple):
    """A held-out task, and how it is asked: by generation, or by ranking its rows' options."""

    split: str
    mixture: str
    task: EvalTask
    by_rank: bool


# Split -> its mixture and tasks.
Loaded = Mapping[str, tuple[str, Sequence[TaskRows]]]


def load(config: ConfigDict, backbone: model.Backbone) -> Loaded:
    """The tasks of all splits."""
    return {
        split: (mixture, data.load_judged(config, mixture, split, backbone.vocab))
        for split, mixture in data.splits_of(config).items()
    }


def ask(
    config: ConfigDict, m: model.Model, backbone: model.Backbone, loaded: Loaded | None = None
) -> list[Asked]:
    """The tasks of all splits, before anything is computed: a mistake is told at once.

    ``loaded``: others than `load` finds.
    """
    asked = []
    for split, (mixture, tasks) in (load(config, backbone) if loaded is None else loaded).items():
        episodes = data.eval_episodes(tasks, backbone.vocab, config, m.choice.layout)
        asked += [Asked(split, mixture, one, ranks(one, config.eval.how)) for one in episodes]
        distributed.say(f"evaluate {split}: {_amounts(episodes)}")
    return asked


def answer(
    config: ConfigDict,
    m: model.Model,
    backbone: model.Backbone,
    params: model.Tree,
    asked: Sequence[Asked],
    kept: Answers,
    trained_on: Sequence[str] = (),
) -> None:
    """Answer every task that ``kept`` has not yet.

    Raises:
        PreemptedError: the machine is taken away; what is done is kept.
    """
    left = [number for number, done in enumerate(kept.done) if not done]
    began = time.monotonic()
    for count, number in enumerate(left, 1):
        if distributed.preempted(count):
            raise PreemptedError("preempted before all was judged; evaluate again to go on")
        since, one = time.monotonic(), asked[number]
        own = model.task_number(m, one.task.name, trained_on)
        where = {"split": one.split, "mixture": one.mixture, "task": one.task.name}
        said = answers_of(m, params, one, config, backbone, own)
        rows = [where | row | told for row, told in zip(task_rows(one.task), said, strict=True)]
        kept.add(number, rows, time.monotonic() - since)
        if count % 20 == 0 or count == len(left):
            eta = (time.monotonic() - began) / count * (len(left) - count)
            place = f"task {number + 1}/{len(asked)}"
            distributed.say(f"evaluate {one.split}: {place}  ETA {eta:.0f} s")


def judge(
    config: ConfigDict,
    asked: Sequence[Asked],
    predictions: Sequence[dict[str, Any]],
    tokenizer: bpe.Gpt2Tokenizer | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, the predictions with their scores) of the answers to all that was asked."""
    marked = protocols.mark(predictions, tokenizer)
    report = {"system": config.system, **protocols.report(marked)}
    for split, _, task, _ in asked:
        report["splits"][split]["per_task"][task.name] |= _conditioning(task)
    return report, marked


def _tokenizer(config: ConfigDict) -> bpe.Gpt2Tokenizer | None:
    return bpe.Gpt2Tokenizer(config.eval.gpt2_merges) if config.eval.gpt2_merges else None


def ranks(task: EvalTask, how: str) -> bool:
    """Whether a task is judged by ranking its options: `eval.how`, 'auto' where it has them.

    Raises:
        UserError: how is 'rank', and a row has nothing to rank.
    """
    free = [row for row, options in zip(task.ids, task.options, strict=True) if not options]
    if how == "rank" and free:
        raise UserError(
            f"eval.how=rank: row {free[0]} of task {task.name} has no options to rank; take auto, "
            "which generates where there are none"
        )
    return how != "generate" and not free


def task_rows(task: EvalTask) -> Iterator[dict[str, Any]]:
    """What predictions.jsonl says of each row asked."""
    for row, text, references in zip(task.ids, task.texts, task.references, strict=True):
        yield {
            "category": task.category,
            "id": row,
            "input": text,
            "references": list(references),
        }


def answers_of(
    m: model.Model,
    params: model.Tree,
    one: Asked,
    config: ConfigDict,
    backbone: model.Backbone,
    number: int,
) -> Iterator[dict[str, Any]]:
    """What is said to each row of a task, and by which scores where its options were ranked."""
    if not one.by_rank:
        for ids in predict_task(m, params, one.task, config, number):
            yield {"prediction": backbone.vocab.decode(ids.tolist())}
        return
    choose = protocols.of_mixture(one.mixture).choose
    ranked = ranking.rank_task(m, params, one.task, config, backbone.vocab, number)
    for options, found in zip(one.task.options, ranked, strict=True):
        yield {
            "prediction": options[choose(found.log_probs, found.tokens)],
            "options": list(options),
            "option_log_probs": list(found.log_probs),
            "option_tokens": list(found.tokens),
        }


def _conditioning(task: EvalTask) -> dict[str, Any]:
    return {
        "examples_shown": len(task.shown),
        "examples_dropped": task.dropped,
        "instruction_cut": task.truncated_instruction,
        "inputs_cut": task.truncated_inputs,
    }


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


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        weights: digests of all that it computes with.
        facts: what the report says of it.
        trained_on: the tasks of a run with adapters for each, in their order.
        train_seconds: that its training took, None where nobody knows.
    """

    config: ConfigDict
    m: model.Model
    backbone: model.Backbone
    params: model.Tree
    weights: Sequence[str]
    facts: dict[str, Any]
    trained_on: Sequence[str] = ()
    train_seconds: float | None = None


def evaluate_workdir(
    workdir: str | Path,
    overrides: Any = (),
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Evaluate a run; writes metrics.json, predictions.jsonl and a plot.

    They go to WORKDIR/eval/STEP, or STEP-MIXTURE where that is another than the one of training;
    with them adapters.json, what the generated adapters are like (`adapter_stats`).

    What is judged is kept in a folder there until all is: after a stop, whatever it was, the next
    call goes on from it. Returns the report, on process 0; on the others nothing.

    ``compare``: workdirs or metrics.json files of runs evaluated before, to stand in the same plot
    and table.
    """
    others = [read_report(path) for path in compare]  # a mistake is told before the long work
    subject, step = run_subject(workdir, overrides)
    place = files.as_path(workdir) / "eval" / _place_name(subject.config, step)
    return _evaluate_to(files.as_path(out or place), subject, others)


def run_subject(workdir: str | Path, overrides: Any = ()) -> tuple[Subject, int]:
    """(a run as what is evaluated, its newest step)."""
    config, m, backbone, params = model.load_run(workdir, overrides, on_mesh=True)
    step = distributed.agree("evaluated", model.step_of(workdir))
    weights = [checkpoint.digest(workdir)]
    if not weights[0] or model.BACKBONE not in m.choice.trains:
        weights.append(backbone.digest)
    subject = Subject(
        config,
        m,
        backbone,
        params,
        weights,
        {"workdir": str(workdir), "trained_parameters": model.trained_parameters(m, params)}
        | {"generated_parameters": cost.generated_parameters(m, config)}
        | {"flops": cost.flops(config, m.sizes)},
        model.tasks_of(workdir),
        cost.training_seconds(workdir),
    )
    return subject, step


def _place_name(config: ConfigDict, step: int) -> str:
    """The step; with the mixture, where that is not the one of training."""
    other = config.eval.mixture not in ("", config.data.mixture)
    return f"{step}-{config.eval.mixture}" if other else str(step)


def evaluate_adapter(
    adapter: str | Path,
    backbone: str | Path,
    overrides: Any = (),
    out: str | Path = "",
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Evaluate an adapter folder, native or PEFT's: every task is given its adapters.

    Else as `evaluate_workdir`; results go to ``out``.
    """
    others = [read_report(path) for path in compare]
    config, m, base, params, found = given.load(adapter, backbone, overrides)
    facts = {
        "system": "adapter",
        "adapter": str(adapter),
        "backbone": str(backbone),
        "trained_parameters": None,
        "generated_parameters": ad.parameters_per_task(found),
        "flops": cost.flops(config, m.sizes, given=found),
    }
    weights = [base.digest, ad.digest(found)]
    return _evaluate_to(
        files.as_path(out), Subject(config, m, base, params, weights, facts), others
    )


def _evaluate_to(
    place: epath.Path, subject: Subject, others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    s, began = subject, time.monotonic()
    tokenizer, asked = _tokenizer(s.config), ask(s.config, s.m, s.backbone)
    kept = answered(s, asked, place / "answers")
    generated = statistics_of_adapters(s, asked)
    if not distributed.is_first():
        return {}
    report, predictions = judge(s.config, asked, kept.rows(), tokenizer)
    seconds = time.monotonic() - began + kept.seconds
    report |= {"shots": s.config.eval.shots, **s.facts}
    report["seconds"] = {"train": s.train_seconds, "evaluate": seconds}
    files.write_json_lines(place / "predictions.jsonl", predictions)
    files.write_json(place / "metrics.json", report)
    reports = [report, *others]
    print(f"{table(reports)}\n{over_splits(report)}{differences(report, others)}")
    print(cost_table(reports))
    plot = plots.compare(reports, place / "report.png")
    if generated:
        files.write_json(place / "adapters.json", generated)
        print(place / "adapters.json")
    print(f"{place / 'metrics.json'}\n{place / 'predictions.jsonl'}\n{plot}")
    if official := submission.submission(predictions):
        files.write_json_lines(place / "submission.jsonl", official)
        print(place / "submission.jsonl")
    kept.remove()
    return report


def answered(s: Subject, asked: Sequence[Asked], folder: epath.Path) -> Answers:
    """The answers to all that is asked: those that the folder has, and the others, kept there."""
    kept = Answers(folder, _keys(s, asked), [len(one.task.inputs) for one in asked])
    answer(s.config, s.m, s.backbone, s.params, asked, kept, s.trained_on)
    return kept


def statistics_of_adapters(s: Subject, asked: Sequence[Asked]) -> dict[str, Any]:
    """{split: `adapter_stats.statistics` of what is generated for its tasks}.

    Empty where nothing is, or for each input anew. Every process of a run must call it.
    """
    if s.m.hypermodel is None or s.m.choice.reads != "task":
        return {}
    made = {}
    for split in dict.fromkeys(one.split for one in asked):
        tasks = [one.task for one in asked if one.split == split]
        generate = functools.partial(_generated, s, tasks)
        made[split] = adapter_stats.of_tasks(generate, [task.name for task in tasks])
    return made


def _generated(s: Subject, tasks: Sequence[EvalTask], index: int) -> ad.Adapters:
    task = tasks[index]
    number = np.array([model.task_number(s.m, task.name, s.trained_on)], np.int32)
    made = model.generate(s.m, s.params, np.asarray(task.hyper_ids)[None], number)
    return sharding.fetch(made)


def _keys(s: Subject, asked: Sequence[Asked]) -> list[str]:
    """What names each task's answers: a digest of all that decides them."""
    if not distributed.is_first():
        return [""] * len(asked)
    # It may go on elsewhere, and what its data are, and not where they lie, is in the tasks.
    config = json.loads(config_lib.to_json(s.config))
    config = {k: v for k, v in config.items() if k not in ("mesh", "data")}
    settings = [__version__, config, s.backbone.vocab.identity(), *s.weights]
    return [
        key_of(settings, task, split=split, mixture=mixture, by_rank=by_rank, own=number)
        for split, mixture, task, by_rank in asked
        for number in [model.task_number(s.m, task.name, s.trained_on)]
    ]


def score_file(
    predictions: str | Path,
    references: str | Path | None = None,
    gpt2_merges: str | Path | None = None,
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Scores predictions that lie in a file (`submission.read_predictions`); prints the tables.

    ``out``: where all the metrics go, as JSON. ``compare``: as `evaluate_workdir` has it.
    """
    others = [read_report(path) for path in compare]
    rows = submission.read_predictions(predictions, references)
    tokenizer = bpe.Gpt2Tokenizer(gpt2_merges) if gpt2_merges else None
    name = files.as_path(predictions).stem
    report = {"system": name, **protocols.score_predictions(rows, tokenizer)}
    print(f"{table([report, *others])}\n{over_splits(report)}{differences(report, others)}", end="")
    if out:
        files.write_json(out, report)
        print(out)
    return report


def report_file(path: str | Path) -> epath.Path:
    """The newest metrics.json of a workdir; any other file is itself."""
    file = files.as_path(path)
    if not file.is_dir():
        return file
    steps = sorted((file / "eval").glob("*/metrics.json"), key=lambda p: p.stat().mtime)
    if not steps:
        raise UserError(
            f"{path}: no eval/*/metrics.json in it; run `hyper-t5 evaluate --workdir {path}` first"
        )
    return steps[-1]


def read_report(path: str | Path) -> dict[str, Any]:
    """A metrics.json, or the newest one of a workdir."""
    file = report_file(path)
    report = files.read_json(file)
    try:
        table([report])
        cost_table([report])
        for split in report["splits"].values():
            protocols.parts_of(split)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{file}: not the metrics of an evaluation") from None
    return report


def table(reports: Sequence[dict[str, Any]], metrics: Sequence[str] = METRICS) -> str:
    """Systems by splits and metrics, as aligned text; then the metrics of a mixture's own.

    Beside a score its interval, where the report has one.
    """
    splits = [(r, split, s) for r in reports for split, s in r["splits"].items()]
    own = dict.fromkeys(name for _, _, s in splits for name in s["overall"] if name not in METRICS)
    lines = [["system", "split", "tasks", *metrics, *own]]
    for r, split, s in splits:
        ends = s.get("intervals", {})
        told = [_score(s["overall"].get(m), ends.get(m)) for m in (*metrics, *own)]
        lines.append([_name(r), split, str(s["tasks"]), *told])
    return aligned(lines)


def _score(value: float | None, ends: Sequence[float] | None = None) -> str:
    told = _number(value, ".1f")
    return f"{told} [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else told


def over_splits(report: dict[str, Any]) -> str:
    """What a mixture's splits make together, a line each; '' where they make nothing."""
    lines = []
    for mixture, told in report.get("over_splits", {}).items():
        said = [f"{k} {v}" for k, v in told.items() if isinstance(v, int)]
        said += [
            f"{k} {_score(v, told.get('intervals', {}).get(k))}"
            for k, v in told.items()
            if isinstance(v, float)
        ]
        lines.append(f"\n{mixture}: {', '.join(said)}\n")
    return "".join(lines)


def differences(report: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """A report less each of the others, over the tasks of both, as aligned text; '' where there are
    none. The intervals are of pairs: both are asked the same tasks.
    """
    found = [
        (other, where, made)
        for other in others
        for where, made in protocols.differences(report, other).items()
        if made
    ]
    if not found:
        return ""
    metrics = dict.fromkeys(metric for _, _, made in found for metric in made)
    lines = [["system", "less", "split", "tasks", *metrics]]
    for other, where, made in found:
        tasks = max(count for count, _, _ in made.values())
        told = [_difference(*made[m][1:]) if m in made else "-" for m in metrics]
        lines.append([_name(report), _name(other), where, str(tasks), *told])
    return f"\n{aligned(lines)}\n"


def _difference(value: float, ends: Sequence[float] | None) -> str:
    return f"{value:+.1f} [{ends[0]:+.1f}, {ends[1]:+.1f}]" if ends else f"{value:+.1f}"


def _name(report: dict[str, Any]) -> str:
    return str(report.get("name", report["system"]))


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
                _name(r),
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
