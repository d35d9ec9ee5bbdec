"""Evaluation on held-out tasks: predictions, metrics and cost.

A task is evaluated by generation, or, where its rows have options, by rank classification.
Adapters are generated once per task.

Every row has the metrics of Super-NaturalInstructions (Wang et al. 2022): ROUGE-L F1 with a stemmer
and exact match after lower-casing and removing punctuation, each the maximum over references, times
100; ``strict_match`` compares the strings as they are. A benchmark may have more of its own
(`evaluation.aggregation`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import __version__, flops, pipeline, runs
from hyper_t5 import adapters as ad
from hyper_t5 import config as config_lib
from hyper_t5 import model as model_lib
from hyper_t5.adapters import Adapters
from hyper_t5.checkpoints import workdir as workdir_lib
from hyper_t5.checkpoints.steps import Step
from hyper_t5.data.eval_tasks import EvalTask, build_eval_tasks
from hyper_t5.data.task_rows import TaskData
from hyper_t5.evaluation import (
    adapter_stats,
    aggregation,
    fixed_adapter,
    rank_classification,
    tables,
)
from hyper_t5.evaluation.prediction_cache import PredictionCache, cache_key
from hyper_t5.evaluation.report_io import read_report
from hyper_t5.hypermodels import BACKBONE
from hyper_t5.inference.generate import iterate_adapters
from hyper_t5.parallel import distributed, sharding
from hyper_t5.runs import Run
from hyper_t5.scoring import gpt2_bpe, predictions_io
from hyper_t5.t5.decoding import decode
from hyper_t5.tasks import benchmark_of
from hyper_t5.utils import files, plots
from hyper_t5.utils.errors import PreemptedError, UserError

# split -> (mixture, tasks)
Splits = Mapping[str, tuple[str, Sequence[TaskData]]]
Predictions = list[dict[str, Any]]


class EvalRequest(NamedTuple):
    """A held-out task, evaluated by generation or by ranking its rows' options."""

    split: str
    mixture: str
    task: EvalTask
    by_rank: bool


# ------------------------------------------------------------------------------- commands


def evaluate_workdir(
    workdir: str | Path,
    overrides: Any = (),
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
    step: Step | None = None,
) -> dict[str, Any]:
    """Evaluate a run; write metrics.json, predictions.jsonl, adapters.json and a plot.

    Predictions are cached per task until the evaluation is complete, so that it is resumable.

    Args:
      workdir: of the run.
      overrides: of its config.
      out: the folder to write; default WORKDIR/eval/STEP, or STEP-MIXTURE where the mixture is not
        the one of training.
      compare: workdirs or metrics.json files of earlier evaluations for the same plot and table.
      step: of the checkpoint; None is the newest.

    Returns:
      The report, on process 0; {} on the others.
    """
    others = [read_report(path) for path in compare]  # invalid input is reported first
    run = runs.open(workdir, overrides, on_mesh=True, step=step)
    name = str(run.step)
    if run.config.eval.mixture not in ("", run.config.data.mixture):
        name += f"-{run.config.eval.mixture}"
    folder = files.as_path(out or files.as_path(workdir) / "eval" / name)
    workdir_lib.on_primary("evaluate/out", lambda: _check_writable(folder))
    facts = {
        "workdir": run.workdir,
        "trained_parameters": model_lib.trained_parameters(run.model, run.params),
        "generated_parameters": flops.generated_parameters(run.model, run.config),
        "flops": flops.system_flops(run.config, run.model.sizes),
    }
    return _evaluate_to(folder, run, facts, others)


def _check_writable(folder: epath.Path) -> None:
    try:
        files.check_writable(Path(folder / "metrics.json"))
    except UserError as error:
        raise UserError(f"{error}; pass another folder by --out") from None


def evaluate_adapter(
    adapter: str | Path,
    backbone: str | Path,
    overrides: Any = (),
    out: str | Path = "",
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Evaluate an adapter folder, native or PEFT's, on every task; see `evaluate_workdir`."""
    others = [read_report(path) for path in compare]
    run, adapters = fixed_adapter.open_adapter(adapter, backbone, overrides)
    facts = {
        "system": "adapter",
        "adapter": str(adapter),
        "backbone": str(backbone),
        "trained_parameters": None,
        "generated_parameters": ad.parameters_per_task(adapters),
        "flops": flops.system_flops(run.config, run.model.sizes, fixed=adapters),
    }
    return _evaluate_to(files.as_path(out), run, facts, others)


def score_file(
    predictions: str | Path,
    references: str | Path | None = None,
    gpt2_merges: str | Path | None = None,
    out: str | Path | None = None,
    compare: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Score a file of predictions and print the tables.

    Args:
      predictions: the file; see `predictions_io.read_predictions`.
      references: of Super-NaturalInstructions' submissions.
      gpt2_merges: GPT-2's merges.txt, for its cross-lingual track.
      out: a JSON file for all metrics.
      compare: as `evaluate_workdir`.
    """
    others = [read_report(path) for path in compare]
    rows = predictions_io.read_predictions(predictions, references)
    tokenizer = gpt2_bpe.Gpt2Tokenizer(gpt2_merges) if gpt2_merges else None
    name = files.as_path(predictions).stem
    report = {"system": name, **aggregation.score_predictions(rows, tokenizer)}
    print(tables.summary(report, others), end="")
    if out:
        files.write_json(out, report)
        print(out)
    return report


def _evaluate_to(
    folder: epath.Path, run: Run, facts: dict[str, Any], others: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Evaluate a run and write the files of FOLDER; ``facts`` become part of the report."""
    start = time.monotonic()
    tokenizer, requests = _tokenizer(run.config), build_requests(run)
    cache = open_cache(run, requests, folder / "prediction_cache")
    sampled = _sampled_requests(run, requests)
    adapters = predict(run, requests, cache, keep_adapters=sampled)
    if not distributed.is_primary():
        return {}
    report, predictions = score(run.config, requests, cache.rows(), tokenizer)
    seconds = time.monotonic() - start + cache.seconds
    report |= {"shots": run.config.eval.shots, **facts}
    report["seconds"] = {"train": run.train_seconds, "evaluate": seconds}
    files.write_json_lines(folder / "predictions.jsonl", predictions)
    files.write_json(folder / "metrics.json", report)
    print(tables.summary(report, others), end="")
    print(tables.aligned(tables.cost_table([report, *others]), right=True))
    plot = plots.compare([report, *others], folder / "report.png")
    if adapters:
        files.write_json(folder / "adapters.json", _adapter_statistics(requests, adapters))
        print(folder / "adapters.json")
    print(f"{folder / 'metrics.json'}\n{folder / 'predictions.jsonl'}\n{plot}")
    submitted = [row for row in predictions if benchmark_of(row["mixture"]).submissions]
    if submission := predictions_io.to_submission(submitted):
        files.write_json_lines(folder / "submission.jsonl", submission)
        print(folder / "submission.jsonl")
    cache.remove()
    return report


def _tokenizer(config: ConfigDict) -> gpt2_bpe.Gpt2Tokenizer | None:
    return gpt2_bpe.Gpt2Tokenizer(config.eval.gpt2_merges) if config.eval.gpt2_merges else None


# ------------------------------------------------------------------------------- requests


def load_splits(run: Run) -> Splits:
    """Load the tasks of all held-out splits."""
    return {
        split: (mixture, pipeline.load_eval_tasks(run.config, mixture, split, run.backbone.vocab))
        for split, mixture in pipeline.eval_splits(run.config).items()
    }


def build_requests(run: Run, splits: Splits | None = None) -> list[EvalRequest]:
    """Encode the tasks of all splits before anything is computed.

    ``splits`` replaces those of the config.
    """
    requests: list[EvalRequest] = []
    for split, (mixture, tasks) in (load_splits(run) if splits is None else splits).items():
        layout = run.model.system.layout
        eval_tasks = build_eval_tasks(tasks, run.backbone.vocab, run.config, layout)
        requests += [
            EvalRequest(split, mixture, task, uses_ranking(task, run.config.eval.method))
            for task in eval_tasks
        ]
        distributed.log(f"evaluate {split}: {_amounts(eval_tasks)}")
    return requests


def uses_ranking(task: EvalTask, method: str) -> bool:
    """Return whether ``eval.method`` ranks a task's options; 'auto' does where all rows have them.

    Raises:
      UserError: the method is 'rank', and a row has no options.
    """
    free = [row for row, options in zip(task.ids, task.options, strict=True) if not options]
    if method == "rank" and free:
        raise UserError(
            f"eval.method=rank: row {free[0]} of task {task.name} has no options to rank; use "
            "auto, which generates where there are none"
        )
    return method != "generate" and not free


def _amounts(tasks: Sequence[EvalTask]) -> str:
    """Return the number of tasks and rows, and of everything truncated to the config's lengths."""
    counts = {
        "examples dropped": sum(task.dropped for task in tasks),
        "instructions cut": sum(task.truncated_instruction for task in tasks),
        "inputs cut": sum(task.truncated_inputs for task in tasks),
    }
    text = f"{len(tasks)} tasks, {sum(len(task.inputs) for task in tasks):,} rows"
    return text + "".join(f", {count:,} {name}" for name, count in counts.items() if count)


# ------------------------------------------------------------------------------- predictions


def evaluate(run: Run) -> tuple[dict[str, Any], Predictions]:
    """Return (metrics, predictions) of every held-out task; nothing is cached or written."""
    tokenizer, requests = _tokenizer(run.config), build_requests(run)
    cache = PredictionCache(None, [""] * len(requests), [len(r.task.inputs) for r in requests])
    predict(run, requests, cache)
    return score(run.config, requests, cache.rows(), tokenizer)


def open_cache(run: Run, requests: Sequence[EvalRequest], folder: epath.Path) -> PredictionCache:
    """Open the cache of a run's predictions, keyed by everything that determines them."""
    keys = [""] * len(requests)
    if distributed.is_primary():
        # The mesh may differ; data are part of the encoded tasks, wherever their files are.
        config = json.loads(config_lib.to_json(run.config))
        config = {k: v for k, v in config.items() if k not in ("mesh", "data")}
        settings = [__version__, config, run.backbone.identity, *run.digests]
        keys = [
            cache_key(settings, r.task, split=r.split, mixture=r.mixture, by_rank=r.by_rank, own=n)
            for r, n in zip(requests, task_numbers(run, requests), strict=True)
        ]
    return PredictionCache(folder, keys, [len(r.task.inputs) for r in requests])


@distributed.catch_sigterm()
def predict(
    run: Run,
    requests: Sequence[EvalRequest],
    cache: PredictionCache,
    keep_adapters: Collection[int] = (),
) -> dict[int, Adapters]:
    """Predict every request that is not in the cache.

    Every process of a run must call it.

    Args:
      run: an open run.
      requests: all of them.
      cache: receives each task's predictions as soon as it is complete.
      keep_adapters: indices of requests whose adapters are returned.

    Raises:
      PreemptedError: the process received SIGTERM; the cache has the complete tasks.
    """
    missing = {i for i, done in enumerate(cache.done) if not done}
    needed = sorted(missing.union(keep_adapters))
    adapters = task_adapters(run, [requests[i] for i in needed])
    numbers = task_numbers(run, requests)
    returned: dict[int, Adapters] = {}
    start, done = time.monotonic(), 0
    for index, own_adapters in zip(needed, adapters, strict=True):
        if index in keep_adapters:
            assert own_adapters is not None
            returned[index] = own_adapters
        if index not in missing:
            continue
        done += 1
        if distributed.preempted(done):
            raise PreemptedError(
                "preempted before all tasks were evaluated; run it again to resume"
            )
        request, task_start = requests[index], time.monotonic()
        outputs = predict_rows(run, request, own_adapters, numbers[index])
        rows = [
            record | output for record, output in zip(row_records(request), outputs, strict=True)
        ]
        cache.add(index, rows, time.monotonic() - task_start)
        if done % 20 == 0 or done == len(missing):
            eta = (time.monotonic() - start) / done * (len(missing) - done)
            position = f"task {index + 1}/{len(requests)}"
            distributed.log(f"evaluate {request.split}: {position}  ETA {eta:.0f} s")
    return returned


def task_numbers(run: Run, requests: Sequence[EvalRequest]) -> list[int]:
    """Return `model.task_number` of each request's task."""
    return [model_lib.task_number(run.model, r.task.name, run.tasks) for r in requests]


def task_adapters(run: Run, requests: Sequence[EvalRequest]) -> Iterator[Adapters | None]:
    """Yield the adapters of each request's task, None where the system emits none per task."""
    if not run.model.emits_per_task:
        yield from [None] * len(requests)
        return
    ids, numbers = [r.task.hyper_ids for r in requests], task_numbers(run, requests)
    yield from iterate_adapters(run.model, run.params, ids, numbers)


def row_records(request: EvalRequest) -> Iterator[dict[str, Any]]:
    """Yield the part of predictions.jsonl that does not depend on the model."""
    task = request.task
    for row, text, references in zip(task.ids, task.texts, task.references, strict=True):
        yield {
            "split": request.split,
            "mixture": request.mixture,
            "task": task.name,
            "category": task.category,
            "id": row,
            "input": text,
            "references": list(references),
        }


def predict_rows(
    run: Run, request: EvalRequest, adapters: Adapters | None, number: int
) -> Iterator[dict[str, Any]]:
    """Yield the prediction of each row, with the options' scores where they are ranked."""
    task, vocab = request.task, run.backbone.vocab
    if not request.by_rank:
        for ids in generate_task(run, task, adapters, number):
            yield {"prediction": vocab.decode(ids.tolist())}
        return
    choose = benchmark_of(request.mixture).choose
    scores = rank_classification.rank_task(run, task, adapters, number)
    for options, row in zip(task.options, scores, strict=True):
        yield {
            "prediction": options[choose(row.log_probs, row.tokens)],
            "options": list(options),
            "option_log_probs": list(row.log_probs),
            "option_tokens": list(row.tokens),
        }


def generate_task(
    run: Run, task: EvalTask, adapters: Adapters | None, number: int = 0
) -> Iterator[np.ndarray]:
    """Yield the generated ids of each row of a task; all tasks share a compile."""
    config = run.config.eval
    batches = rank_classification.task_batches(run, task.inputs, adapters, number)
    for first, batch_adapters, rows in batches:
        ids, _ = decode(
            run.model.sizes,
            run.params[BACKBONE],
            rows,
            batch_adapters,
            steps=config.max_decode_length,
            beam_size=config.beam_size,
        )
        yield from sharding.fetch(ids)[: len(task.inputs) - first]


# ------------------------------------------------------------------------------- scores


def score(
    config: ConfigDict,
    requests: Sequence[EvalRequest],
    predictions: Predictions,
    tokenizer: gpt2_bpe.Gpt2Tokenizer | None = None,
) -> tuple[dict[str, Any], Predictions]:
    """Return (metrics, predictions with their scores)."""
    scored = aggregation.score_rows(predictions, tokenizer)
    report = {"system": config.system, **aggregation.aggregate(scored)}
    for request in requests:
        task = request.task
        report["splits"][request.split]["per_task"][task.name] |= {
            "examples_shown": len(task.shown),
            "examples_dropped": task.dropped,
            "instruction_cut": task.truncated_instruction,
            "inputs_cut": task.truncated_inputs,
        }
    return report, scored


def _sampled_requests(run: Run, requests: Sequence[EvalRequest]) -> list[int]:
    """Return the indices of the requests whose adapters `adapter_stats` describes."""
    if not run.model.emits_per_task:
        return []
    size = 4 * flops.generated_parameters(run.model, run.config)
    indices: list[int] = []
    for split in dict.fromkeys(r.split for r in requests):
        members = [i for i, r in enumerate(requests) if r.split == split]
        indices += [members[i] for i in adapter_stats.sample(len(members), size)]
    return indices


def _adapter_statistics(
    requests: Sequence[EvalRequest], adapters: Mapping[int, Adapters]
) -> dict[str, Any]:
    """Return {split: `adapter_stats.statistics`} of the sampled tasks."""
    by_split: dict[str, list[int]] = {}
    for index in adapters:
        by_split.setdefault(requests[index].split, []).append(index)
    return {
        split: adapter_stats.statistics(
            ad.concatenate([adapters[i] for i in indices]),
            [requests[i].task.name for i in indices],
        )
        for split, indices in by_split.items()
    }
