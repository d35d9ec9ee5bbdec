"""What each benchmark reports: pure functions of the rows of predictions.jsonl and nothing else.

A row is a dict with

    split, mixture, task, category, id      where it is from
    input, references, prediction           texts; one or more references
    options, option_log_probs, option_tokens    where options were ranked (see `ranking`)

`score_predictions` makes all metrics of such rows, so that a report can be made again from the file
alone. `mark` adds each row's own scores, `report` the means, each with its interval where two tasks
or more make it (`intervals`). All are 0..100.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hyper_t5 import intervals
from hyper_t5.scores import (
    METRICS,
    SQUAD_METRICS,
    Scores,
    choose_by_mean,
    choose_by_sum,
    macro_f1,
    mean_scores,
    rouge_scorer,
    score,
    squad_scores,
    task_metrics,
)

Row = dict[str, Any]
XLINGUAL = "xlingual"  # splits of Super-NaturalInstructions' cross-lingual track begin with it
RANKED = ("accuracy_by_sum", "accuracy_by_mean")

GLUE_METRICS = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


class Protocol(NamedTuple):
    """What is a mixture's own, beside what every mixture has.

    Attributes:
        headline: the metric that a task of it is told by.
        choose: which option is the prediction, by their log-probabilities and numbers of tokens.
        row: more scores of a row.
        task: more scores of a task, of its rows.
        split: more of a split, of its tasks' scores and its rows.
        units: of a split as reported, more overall scores: {score: {unit: value}}, of whose values
            it is the mean.
        unit: what a task is a part of, by its name and scores, for intervals: units are independent
            of each other, and tasks of one are not.
        splits: what the splits make together, of {split: {task: scores}}.
    """

    headline: str = "rougeL"
    choose: Callable[[Sequence[float], Sequence[int]], int] = choose_by_sum
    row: Callable[[Row], Scores] = lambda row: {}
    task: Callable[[str, Sequence[Row]], Scores] = lambda name, rows: {}
    split: Callable[[Mapping[str, Any], Sequence[Row]], dict[str, Any]] = lambda tasks, rows: {}
    units: Callable[[Mapping[str, Any]], dict[str, dict[str, float]]] = lambda split: {}
    unit: Callable[[str, Mapping[str, Any]], str] = lambda name, scores: name
    splits: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda splits: {}


# ------------------------------------------------------------------------------------ every mixture


def score_predictions(rows: Iterable[Row], xlingual_tokenizer: Any = None) -> dict[str, Any]:
    """All metrics of predictions: {"splits": {split: {rows, tasks, overall, per_task, ...}}, ...}.

    Args:
        rows: see the module's docstring; scores that they already have are made anew.
        xlingual_tokenizer: for ROUGE-L in languages other than English, `bpe.Gpt2Tokenizer`;
            without it rows of the cross-lingual track have none.
    """
    return report(mark(rows, xlingual_tokenizer))


def mark(rows: Iterable[Row], xlingual_tokenizer: Any = None) -> list[Row]:
    """The same rows, each with its scores behind what it is."""
    rouge = rouge_scorer()
    other = rouge_scorer(xlingual_tokenizer) if xlingual_tokenizer else None
    marked = []
    for row in rows:
        made: Scores = {}
        if "options" in row:
            made |= _ranked(row)
        english = track_of(row) != XLINGUAL
        made |= score(row["prediction"], row["references"], rouge if english else other)
        made |= of_mixture(row.get("mixture", "")).row(row)
        marked.append({**row, **made})
    return marked


def report(marked: Sequence[Row]) -> dict[str, Any]:
    """The means of marked rows: by split, by category (over its rows), and by task."""
    made: dict[str, Any] = {"intervals": intervals.HOW, "splits": {}}
    by_mixture: dict[str, dict[str, Any]] = defaultdict(dict)
    for split, rows in groups(marked, "split").items():
        made["splits"][split] = _split(rows)
        by_mixture[rows[0].get("mixture", "")][split] = made["splits"][split]["per_task"]
    for mixture, splits in by_mixture.items():
        if over_all := of_mixture(mixture).splits(splits):
            made.setdefault("over_splits", {})[mixture] = over_all
    return made


def _split(rows: Sequence[Row]) -> dict[str, Any]:
    mixture = rows[0].get("mixture", "")
    protocol, per_task, own = of_mixture(mixture), {}, []
    for name, members in groups(rows, "task").items():
        own.append(_own_scores(members) | protocol.task(name, members))
        per_task[name] = {
            "rows": len(members),
            "category": members[0].get("category", ""),
            **_row_means(members),
            **own[-1],
        }
    made = {
        "mixture": mixture,
        "rows": len(rows),
        "tasks": len(per_task),
        "overall": _row_means(rows) | mean_over(own),
        "intervals": {},
        "per_category": {
            name: _category(members, mixture, per_task)
            for name, members in groups(rows, "category").items()
            if name
        },
        **protocol.split(per_task, rows),
        "per_task": per_task,
    }
    made["overall"] |= {
        n: float(np.mean(list(u.values()))) for n, u in protocol.units(made).items()
    }
    made["intervals"] = _intervals(parts_of(made))
    return made


def _category(rows: Sequence[Row], mixture: str, per_task: Mapping[str, Any]) -> dict[str, Any]:
    scores = _row_means(rows) | _own_scores(rows)
    tasks = {name: per_task[name] for name in groups(rows, "task")}
    found = _intervals(_parts(mixture, tasks, scores, scores))
    return {
        "rows": len(rows),
        "tasks": len(tasks),
        **scores,
        **({"intervals": found} if found else {}),
    }


def parts_of(split: Mapping[str, Any]) -> dict[str, intervals.Parts]:
    """{score: {unit: (sum, number)}} of the overall scores of a split as reported.

    Those that every mixture has are means over rows, the others over tasks or units.
    """
    mixture = split.get("mixture", "")
    parts = _parts(mixture, split.get("per_task", {}), split["overall"], METRICS)
    for name, units in of_mixture(mixture).units(split).items():
        parts[name] = {unit: (value, 1.0) for unit, value in units.items()}
    return parts


def differences(
    report: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, dict[str, tuple[int, float, list[float] | None]]]:
    """{split: {score: (tasks, report's less other's, its [low, high])}} over what both have.

    What a mixture's splits make together stands under the mixture's name.
    """
    made = {}
    for split in report["splits"]:
        if split in other["splits"]:
            one, two = (parts_of(r["splits"][split]) for r in (report, other))
            found = {m: intervals.difference(one[m], two[m]) for m in one if m in two}
            made[split] = {m: told for m, told in found.items() if told[0]}
    for mixture in report.get("over_splits", {}):
        if mixture in other.get("over_splits", {}):
            ours, theirs = (
                {t: (v["mean"], 1.0) for t, v in r["over_splits"][mixture]["per_task"].items()}
                for r in (report, other)
            )
            made[mixture] = {"mean": intervals.difference(ours, theirs)}
    return made


def _parts(
    mixture: str, tasks: Mapping[str, Any], names: Collection[str], over_rows: Collection[str]
) -> dict[str, intervals.Parts]:
    """``names`` of the scores of tasks; those of ``over_rows`` are means over rows."""
    parts: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for task, scores in tasks.items():
        unit = of_mixture(mixture).unit(task, scores)
        for name in names:
            if name in scores:
                count = float(scores["rows"] if name in over_rows else 1)
                before = parts[name].get(unit, (0.0, 0.0))
                parts[name][unit] = (before[0] + scores[name] * count, before[1] + count)
    return dict(parts)


def _intervals(parts: Mapping[str, intervals.Parts]) -> dict[str, list[float]]:
    made = {name: intervals.interval(own) for name, own in parts.items()}
    return {name: ends for name, ends in made.items() if ends}


def of_mixture(name: str) -> Protocol:
    """Its own, or what all have."""
    return PROTOCOLS.get(name, Protocol())


def track_of(row: Row) -> str:
    """Super-NaturalInstructions' track: 'default' (English) or 'xlingual'."""
    return XLINGUAL if row["split"].startswith(XLINGUAL) else "default"


def groups(rows: Iterable[Row], field: str) -> dict[str, list[Row]]:
    """Rows by a field, in the order of their first."""
    made: dict[str, list[Row]] = {}
    for row in rows:
        made.setdefault(row.get(field, ""), []).append(row)
    return made


def mean_over(own: Sequence[Scores]) -> Scores:
    """The mean of each score over those that have it."""
    names = dict.fromkeys(name for scores in own for name in scores)
    return {n: float(np.mean([scores[n] for scores in own if n in scores])) for n in names}


def _row_means(rows: Sequence[Row]) -> Scores:
    """Of what all mixtures have; ROUGE-L only where every row has it."""
    return mean_scores(rows, [m for m in METRICS if all(m in row for row in rows)])


def _own_scores(rows: Sequence[Row]) -> Scores:
    """Means over rows of what only some mixtures have."""
    names = [n for n in (*RANKED, *SQUAD_METRICS) if n in rows[0]]
    return mean_scores(rows, names)


def _ranked(row: Row) -> Scores:
    """Whether the likeliest option is right: by the sum of its tokens' log-probabilities, without
    length normalisation (T0), and by their mean (MetaICL).
    """
    scores = row["option_log_probs"], row["option_tokens"]
    chosen = (choose_by_sum(*scores), choose_by_mean(*scores))
    return {
        name: 100.0 * (row["options"][i] in row["references"])
        for name, i in zip(RANKED, chosen, strict=True)
    }


# -------------------------------------------------------------------- Super-NaturalInstructions


def _sni_split(tasks: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """What the official script writes: over all rows, by category and by task, of the track."""
    track = track_of(rows[0])
    named = [{**row, "category": "_".join(row.get("category", "").lower().split())} for row in rows]
    by_group = {"": named}
    for field in ("category", "task"):
        by_group |= {f"_for_{k}": v for k, v in groups(named, field).items() if k}
    return {
        "official": {
            f"{metric}{group}_{track}_track": round(value, 4)
            for group, members in by_group.items()
            for metric, value in _row_means(members).items()
            if metric != "strict_match"
        }
    }


# ------------------------------------------------------------------------------------------- P3


def _p3_split(tasks: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Mean and median of a dataset's templates, and means over datasets.

    `anli_as_one` takes ANLI's three rounds as one dataset (as HINT), `all` each round by itself
    (T0's 11), `without_story_cloze` is `anli_as_one` without that one (HyperTuning's 8).
    """
    by_dataset: dict[str, list[Scores]] = defaultdict(list)
    for name, scores in tasks.items():
        if RANKED[0] in scores:
            by_dataset[p3_dataset(name, scores["category"])].append(scores)
    if not by_dataset:
        return {}
    per_dataset = {
        name: {
            "templates": len(templates),
            **{m: float(np.mean([t[m] for t in templates])) for m in RANKED},
            **{f"median_{m}": float(np.median([t[m] for t in templates])) for m in RANKED},
        }
        for name, templates in by_dataset.items()
    }
    datasets = _anli_as_one(per_dataset)
    fewer = [v for name, v in datasets.items() if not name.startswith("story_cloze")]
    wholes = {
        "anli_as_one": list(datasets.values()),
        "all": list(per_dataset.values()),
        "without_story_cloze": fewer,
    }
    averages = {name: {"datasets": len(v), **_p3_mean(v)} for name, v in wholes.items() if v}
    return {"per_dataset": per_dataset, "averages": averages}


def _p3_units(split: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By the sum of log-probabilities: the mean and the median of each dataset's templates."""
    datasets = _anli_as_one(split.get("per_dataset", {}))
    named = {"datasets_mean": RANKED[0], "datasets_median": f"median_{RANKED[0]}"}
    return {n: {k: v[m] for k, v in datasets.items()} for n, m in named.items() if datasets}


def _anli_as_one(per_dataset: Mapping[str, Any]) -> dict[str, Any]:
    rounds = [v for name, v in per_dataset.items() if name.startswith("anli")]
    joined = {name: v for name, v in per_dataset.items() if not name.startswith("anli")}
    return joined | ({"anli": mean_over(rounds)} if rounds else {})


def p3_dataset(task: str, category: str) -> str:
    """Of a template: its category, but of ANLI each round is a dataset."""
    found = re.search(r"_(r[123])(_score_eval)?$", task)
    return f"{category}_{found[1]}" if category == "anli" and found else category


def _p3_mean(datasets: Sequence[Mapping[str, Any]]) -> Scores:
    names = [f"{median}{m}" for median in ("", "median_") for m in RANKED]
    return {n: float(np.mean([scores[n] for scores in datasets])) for n in names}


# -------------------------------------------------------------------------------------- MetaICL


def _metaicl_task(name: str, rows: Sequence[Row]) -> Scores:
    """Macro-F1 of classification, accuracy of any other choice; `metaicl` is the one of them."""
    if not all("options" in row for row in rows):
        return {}
    said = [row["prediction"].strip() for row in rows]
    true = [row["references"][0].strip() for row in rows]
    if rows[0].get("category") == "classification":
        value = macro_f1(said, true)
        return {"macro_f1": value, "metaicl": value}
    return {"metaicl": 100.0 * float(np.mean([a == b for a, b in zip(said, true, strict=True)]))}


def _metaicl_splits(splits: Mapping[str, Any]) -> dict[str, Any]:
    """Over seeds of the demonstrations, one a split: what the paper reports, and its spread.

    `mean` is over tasks and seeds; `worst_seed` the least of the seeds' means over tasks;
    `mean_of_worst` the mean over tasks of each one's least.
    """
    by_task: dict[str, dict[str, float]] = defaultdict(dict)
    for split, tasks in splits.items():
        for name, scores in tasks.items():
            if "metaicl" in scores:
                by_task[name][split] = scores["metaicl"]
    if not by_task:
        return {}
    seeds = {
        split: float(np.mean([v[split] for v in by_task.values() if split in v]))
        for split in splits
        if any(split in v for v in by_task.values())
    }
    parts = {name: (sum(v.values()), float(len(v))) for name, v in by_task.items()}
    told = {"intervals": {"mean": ends}} if (ends := intervals.interval(parts)) else {}
    return {
        "seeds": len(seeds),
        "tasks": len(by_task),
        **told,
        "mean": float(np.mean([x for values in by_task.values() for x in values.values()])),
        "worst_seed": min(seeds.values()),
        "mean_of_worst": float(np.mean([min(v.values()) for v in by_task.values()])),
        "per_seed": seeds,
        "per_task": {
            name: {
                "mean": float(np.mean(list(values.values()))),
                "worst": min(values.values()),
                "deviation": float(np.std(list(values.values()))),
            }
            for name, values in by_task.items()
        },
    }


# ---------------------------------------------------------------------------------------- GLUE, QA


def _glue_task(name: str, rows: Sequence[Row]) -> Scores:
    names, said = GLUE_METRICS.get(name, ()), [row["prediction"] for row in rows]
    return task_metrics(names, said, [row["references"] for row in rows])


def _glue_units(split: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of each task the mean of its one or two metrics; WNLI left out, as by most."""
    each = {
        name: float(np.mean([scores[m] for m in GLUE_METRICS[name]]))
        for name, scores in split["per_task"].items()
        if name in GLUE_METRICS and name != "wnli"
    }
    return {"glue": each} if each else {}


PROTOCOLS = {
    "synthetic": Protocol("strict_match"),
    "sni": Protocol(split=_sni_split),
    "p3": Protocol(
        RANKED[0],
        split=_p3_split,
        units=_p3_units,
        unit=lambda name, scores: scores.get("category") or name,
    ),
    "metaicl": Protocol("metaicl", choose_by_mean, task=_metaicl_task, splits=_metaicl_splits),
    "glue": Protocol("exact_match", task=_glue_task, units=_glue_units),
    "extractive_qa": Protocol(
        "squad_f1", row=lambda row: squad_scores(row["prediction"], row["references"])
    ),
}
