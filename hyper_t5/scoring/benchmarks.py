"""Benchmarks: scoring and aggregation rules of datasets, in addition to the common metrics.

`tasks.MIXTURES` assigns a benchmark to each dataset, and `evaluation.aggregation` applies it to
rows of predictions. A row is a dict with

    split, mixture, task, category, id          its origin
    input, references, prediction               texts; one or more references
    options, option_log_probs, option_tokens    only where options were ranked

All scores are 0..100.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hyper_t5.scoring import bootstrap
from hyper_t5.scoring.text_metrics import (
    METRICS,
    Scores,
    choose_by_mean,
    choose_by_sum,
    macro_f1,
    mean_scores,
    squad_scores,
    task_metrics,
)

Row = dict[str, Any]
Tasks = Mapping[str, Mapping[str, Any]]  # task -> its scores, number of rows and category
XLINGUAL = "xlingual"  # prefix of the splits of Super-NaturalInstructions' cross-lingual track
# Rank classification by the sum of an option's log-probabilities (T0), and by their mean (MetaICL).
BY_SUM, BY_MEAN = "accuracy_by_sum", "accuracy_by_mean"
RANKED = {BY_SUM: choose_by_sum, BY_MEAN: choose_by_mean}
MEDIAN = "median_"  # prefix of P3's medians over templates
P3_SCORES = [*RANKED, *(MEDIAN + name for name in RANKED)]
GLUE_METRICS = {
    **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), ("accuracy",)),
    **dict.fromkeys(("mrpc", "qqp"), ("f1", "accuracy")),
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Scoring and aggregation rules of a dataset, in addition to the common metrics.

    Attributes:
      headline: metric that summarizes a task.
      choose: index of the predicted option, from the options' log-probabilities and token counts.
      row_scores: more scores of a row.
      task_scores: more scores of a task, from its name and rows.
      split_fields: more fields of a split, from its tasks' scores and its rows.
      unit_scores: more overall scores of an aggregated split, {score: {unit: value}}; the score
        is the mean over units.
      unit_of: unit that a task belongs to, from its name and scores. Units are independent of
        each other; tasks of one unit are not.
      cross_split: summary of all splits, from {split: {task: scores}}.
      submissions: whether rows are also written in Super-NaturalInstructions' official form.
    """

    headline: str = "rougeL"
    choose: Callable[[Sequence[float], Sequence[int]], int] = choose_by_sum
    row_scores: Callable[[Row], Scores] = lambda row: {}
    task_scores: Callable[[str, Sequence[Row]], Scores] = lambda task, rows: {}
    split_fields: Callable[[Tasks, Sequence[Row]], dict[str, Any]] = lambda tasks, rows: {}
    unit_scores: Callable[[Mapping[str, Any]], dict[str, dict[str, float]]] = lambda split: {}
    unit_of: Callable[[str, Mapping[str, Any]], str] = lambda task, scores: task
    cross_split: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda splits: {}
    submissions: bool = False


def group_by(rows: Iterable[Row], field: str) -> dict[str, list[Row]]:
    """Return rows by the value of a field, in the order of first occurrence."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get(field, ""), []).append(row)
    return groups


def common_means(rows: Sequence[Row]) -> Scores:
    """Return means over rows of `METRICS`; ROUGE-L only where every row has it."""
    return mean_scores(rows, [m for m in METRICS if all(m in row for row in rows)])


# ---------------------------------------------------------------------- Super-NaturalInstructions


def _sni_split_fields(tasks: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return the numbers of the official script: over all rows, by category and by task."""
    track = XLINGUAL if rows[0]["split"].startswith(XLINGUAL) else "default"
    rows = [{**row, "category": "_".join(row.get("category", "").lower().split())} for row in rows]
    groups = {"": rows}
    for field in ("category", "task"):
        groups |= {f"_for_{name}": v for name, v in group_by(rows, field).items() if name}
    return {
        "official": {
            f"{metric}{group}_{track}_track": round(value, 4)
            for group, members in groups.items()
            for metric, value in common_means(members).items()
            if metric != "strict_match"
        }
    }


# --------------------------------------------------------------------------------------------- P3


def _p3_split_fields(tasks: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return mean and median over each dataset's templates, and means over datasets.

    `anli_as_one` counts ANLI's three rounds as one dataset (HINT), `all` as three (T0's 11
    datasets), `without_story_cloze` is `anli_as_one` without that one (HyperTuning's 8).
    """
    templates_of: dict[str, list[Scores]] = defaultdict(list)
    for name, scores in tasks.items():
        if BY_SUM in scores:
            templates_of[p3_dataset(name, scores["category"])].append(scores)
    if not templates_of:
        return {}
    per_dataset = {
        name: {
            "templates": len(templates),
            **{m: float(np.mean([t[m] for t in templates])) for m in RANKED},
            **{MEDIAN + m: float(np.median([t[m] for t in templates])) for m in RANKED},
        }
        for name, templates in templates_of.items()
    }
    joined = _join_anli(per_dataset)
    groups = {
        "anli_as_one": list(joined.values()),
        "all": list(per_dataset.values()),
        "without_story_cloze": [v for k, v in joined.items() if not k.startswith("story_cloze")],
    }
    averages = {
        group: {"datasets": len(datasets), **mean_scores(datasets, P3_SCORES)}
        for group, datasets in groups.items()
        if datasets
    }
    return {"per_dataset": per_dataset, "averages": averages}


def _p3_unit_scores(split: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the mean and the median of each dataset's templates, by the sum."""
    datasets = _join_anli(split.get("per_dataset", {}))
    metrics = {"datasets_mean": BY_SUM, "datasets_median": MEDIAN + BY_SUM}
    return {n: {k: v[m] for k, v in datasets.items()} for n, m in metrics.items() if datasets}


def _join_anli(per_dataset: Mapping[str, Any]) -> dict[str, Any]:
    rounds = [v for name, v in per_dataset.items() if name.startswith("anli")]
    others = {name: v for name, v in per_dataset.items() if not name.startswith("anli")}
    return others | ({"anli": mean_scores(rounds)} if rounds else {})


def p3_dataset(task: str, category: str) -> str:
    """Return a template's dataset: its category; for ANLI also the round."""
    anli_round = re.search(r"_(r[123])(_score_eval)?$", task)
    return f"{category}_{anli_round[1]}" if category == "anli" and anli_round else category


# ---------------------------------------------------------------------------------------- MetaICL


def _metaicl_task_scores(task: str, rows: Sequence[Row]) -> Scores:
    """Return `metaicl`: macro-F1 of a classification task, accuracy of any other."""
    if not all("options" in row for row in rows):
        return {}
    predictions = [row["prediction"].strip() for row in rows]
    references = [row["references"][0].strip() for row in rows]
    if rows[0].get("category") == "classification":
        value = macro_f1(predictions, references)
        return {"macro_f1": value, "metaicl": value}
    pairs = zip(predictions, references, strict=True)
    return {"metaicl": 100.0 * float(np.mean([text == reference for text, reference in pairs]))}


def _metaicl_cross_split(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the paper reports over seeds of the demonstrations, one seed per split.

    `mean` is over tasks and seeds, `worst_seed` the minimum of the seeds' means over tasks,
    `mean_of_worst` the mean over tasks of each task's minimum.
    """
    by_task: dict[str, list[float]] = defaultdict(list)
    by_seed: dict[str, list[float]] = defaultdict(list)
    for split, tasks in splits.items():
        for task, scores in tasks.items():
            if "metaicl" in scores:
                by_task[task].append(scores["metaicl"])
                by_seed[split].append(scores["metaicl"])
    if not by_task:
        return {}
    per_seed = {split: float(np.mean(values)) for split, values in by_seed.items()}
    per_task = {
        task: {"mean": float(np.mean(values)), "worst": min(values)}
        for task, values in by_task.items()
    }
    ends = bootstrap.interval({task: (sum(v), float(len(v))) for task, v in by_task.items()})
    return {
        "seeds": len(per_seed),
        "tasks": len(per_task),
        **({"intervals": {"mean": ends}} if ends else {}),
        "mean": float(np.mean([value for values in by_task.values() for value in values])),
        "worst_seed": min(per_seed.values()),
        "mean_of_worst": float(np.mean([scores["worst"] for scores in per_task.values()])),
        "per_seed": per_seed,
        "per_task": per_task,
    }


# ---------------------------------------------------------------------------- GLUE, extractive QA


def _glue_task_scores(task: str, rows: Sequence[Row]) -> Scores:
    predictions, references = ([row[k] for row in rows] for k in ("prediction", "references"))
    return task_metrics(GLUE_METRICS.get(task, ()), predictions, references)


def _glue_unit_scores(split: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return each task's mean over its one or two metrics; without WNLI, as is usual."""
    tasks = {
        name: float(np.mean([scores[m] for m in GLUE_METRICS[name]]))
        for name, scores in split["per_task"].items()
        if name in GLUE_METRICS and name != "wnli"
    }
    return {"glue": tasks} if tasks else {}


SYNTHETIC = Benchmark(headline="strict_match")
SNI = Benchmark(split_fields=_sni_split_fields, submissions=True)
P3 = Benchmark(
    headline=BY_SUM,
    split_fields=_p3_split_fields,
    unit_scores=_p3_unit_scores,
    unit_of=lambda task, scores: scores.get("category") or task,
)
METAICL = Benchmark(
    headline="metaicl",
    choose=choose_by_mean,
    task_scores=_metaicl_task_scores,
    cross_split=_metaicl_cross_split,
)
GLUE = Benchmark(
    headline="exact_match", task_scores=_glue_task_scores, unit_scores=_glue_unit_scores
)
EXTRACTIVE_QA = Benchmark(
    headline="squad_f1",
    row_scores=lambda row: squad_scores(row["prediction"], row["references"]),
)
