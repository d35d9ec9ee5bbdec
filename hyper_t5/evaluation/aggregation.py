"""Scores of predictions: of each row, and aggregated over tasks, categories and splits.

`score_rows` adds the scores of each row, `aggregate` computes means over rows and tasks, with an
interval (`scoring.bootstrap`) over two or more independent units. Both depend on nothing but the
rows (`scoring.benchmarks`), so predictions.jsonl reproduces every metric. Imports no JAX.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hyper_t5.scoring import bootstrap
from hyper_t5.scoring.benchmarks import (
    RANKED,
    XLINGUAL,
    Benchmark,
    Row,
    common_means,
    group_by,
)
from hyper_t5.scoring.text_metrics import METRICS, Scores, mean_scores, rouge_scorer, score
from hyper_t5.tasks import benchmark_of


def score_predictions(rows: Iterable[Row], xlingual_tokenizer: Any = None) -> dict[str, Any]:
    """Return all metrics of predictions: `aggregate` of `score_rows`."""
    return aggregate(score_rows(rows, xlingual_tokenizer))


def score_rows(rows: Iterable[Row], xlingual_tokenizer: Any = None) -> list[Row]:
    """Return the rows with their scores; scores that they already have are replaced.

    Args:
      rows: see the module's docstring.
      xlingual_tokenizer: `gpt2_bpe.Gpt2Tokenizer`. Without it, rows of the cross-lingual track
        have no ROUGE-L.
    """
    rouge = rouge_scorer()
    xlingual_rouge = rouge_scorer(xlingual_tokenizer) if xlingual_tokenizer else None
    scored = []
    for row in rows:
        row_rouge = xlingual_rouge if row["split"].startswith(XLINGUAL) else rouge
        scores = _rank_scores(row) | score(row["prediction"], row["references"], row_rouge)
        scores |= benchmark_of(row.get("mixture", "")).row_scores(row)
        scored.append({**row, **scores})
    return scored


def aggregate(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the metrics of scored rows, {"splits": {split: {overall, per_task, ...}}, ...}."""
    report: dict[str, Any] = {"intervals": bootstrap.SETTINGS, "splits": {}}
    tasks_of: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, members in group_by(rows, "split").items():
        split = report["splits"][name] = _aggregate_split(members)
        tasks_of[split["mixture"]][name] = split["per_task"]
    for mixture, splits in tasks_of.items():
        if summary := benchmark_of(mixture).cross_split(splits):
            report.setdefault("over_splits", {})[mixture] = summary
    return report


def _aggregate_split(rows: Sequence[Row]) -> dict[str, Any]:
    mixture = rows[0].get("mixture", "")
    benchmark = benchmark_of(mixture)
    per_task, own_scores = {}, []
    for name, members in group_by(rows, "task").items():
        own = _own_means(members, benchmark) | benchmark.task_scores(name, members)
        own_scores.append(own)
        facts = {"rows": len(members), "category": members[0].get("category", "")}
        per_task[name] = facts | common_means(members) | own
    split = {
        "mixture": mixture,
        "rows": len(rows),
        "tasks": len(per_task),
        "overall": common_means(rows) | mean_scores(own_scores),
        "intervals": {},
        "per_category": {
            name: _aggregate_category(members, benchmark, per_task)
            for name, members in group_by(rows, "category").items()
            if name
        },
        **benchmark.split_fields(per_task, rows),
        "per_task": per_task,
    }
    for name, units in benchmark.unit_scores(split).items():
        split["overall"][name] = float(np.mean(list(units.values())))
    split["intervals"] = _intervals(unit_sums(split))
    return split


def _aggregate_category(
    rows: Sequence[Row], benchmark: Benchmark, per_task: Mapping[str, Any]
) -> dict[str, Any]:
    scores = common_means(rows) | _own_means(rows, benchmark)
    tasks = {name: per_task[name] for name in group_by(rows, "task")}
    intervals = _intervals(_unit_sums(tasks, benchmark, scores, over_rows=scores))
    fields = {"rows": len(rows), "tasks": len(tasks), **scores}
    return fields | ({"intervals": intervals} if intervals else {})


def unit_sums(split: Mapping[str, Any]) -> dict[str, bootstrap.UnitSums]:
    """Return {score: {unit: (sum, number)}} of the overall scores of an aggregated split.

    `METRICS` are means over rows, all other scores means over tasks or units.
    """
    benchmark = benchmark_of(split.get("mixture", ""))
    sums = _unit_sums(split.get("per_task", {}), benchmark, split["overall"], over_rows=METRICS)
    for name, units in benchmark.unit_scores(split).items():
        sums[name] = {unit: (value, 1.0) for unit, value in units.items()}
    return sums


def _unit_sums(
    tasks: Mapping[str, Any], benchmark: Benchmark, names: Iterable[str], over_rows: Collection[str]
) -> dict[str, bootstrap.UnitSums]:
    """Return the sums of the scores ``names``; those in ``over_rows`` are means over rows."""
    sums: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for task, scores in tasks.items():
        unit = benchmark.unit_of(task, scores)
        for name in names:
            if name in scores:
                count = float(scores["rows"] if name in over_rows else 1)
                total, number = sums[name].get(unit, (0.0, 0.0))
                sums[name][unit] = (total + scores[name] * count, number + count)
    return dict(sums)


def _intervals(sums: Mapping[str, bootstrap.UnitSums]) -> dict[str, bootstrap.Interval]:
    intervals = {name: bootstrap.interval(units) for name, units in sums.items()}
    return {name: ends for name, ends in intervals.items() if ends}


def headline(split: Mapping[str, Any]) -> str:
    """Return the headline metric of a split's benchmark, or rougeL if a task lacks it."""
    name = benchmark_of(split.get("mixture", "")).headline
    return name if all(name in scores for scores in split["per_task"].values()) else "rougeL"


def differences(
    report: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, dict[str, tuple[int, float, bootstrap.Interval | None]]]:
    """Return {split: {score: (units, report minus other, interval)}} over what both have.

    The summary of a mixture's splits is listed under the name of the mixture.
    """
    first, second = _report_sums(report), _report_sums(other)
    result = {}
    for name in first:
        if name in second:
            metrics = [metric for metric in first[name] if metric in second[name]]
            pairs = {m: bootstrap.difference(first[name][m], second[name][m]) for m in metrics}
            result[name] = {metric: pair for metric, pair in pairs.items() if pair[0]}
    return result


def _report_sums(report: Mapping[str, Any]) -> dict[str, dict[str, bootstrap.UnitSums]]:
    sums = {name: unit_sums(split) for name, split in report["splits"].items()}
    for mixture, summary in report.get("over_splits", {}).items():
        tasks = summary["per_task"].items()
        sums[mixture] = {"mean": {task: (scores["mean"], 1.0) for task, scores in tasks}}
    return sums


def _own_means(rows: Sequence[Row], benchmark: Benchmark) -> Scores:
    """Return means over rows of ranking accuracies and of the benchmark's row scores."""
    return mean_scores(rows, [*_rank_scores(rows[0]), *benchmark.row_scores(rows[0])])


def _rank_scores(row: Row) -> Scores:
    """Return the accuracy of each way to choose among a row's options, if it has any."""
    if "options" not in row:
        return {}
    log_probs, tokens = row["option_log_probs"], row["option_tokens"]
    choices = {name: row["options"][choose(log_probs, tokens)] for name, choose in RANKED.items()}
    return {name: 100.0 * (choice in row["references"]) for name, choice in choices.items()}
