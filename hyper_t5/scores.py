"""Scores of generated texts against references, each 0..100.

A row's: Super-NaturalInstructions' (Wang et al. 2022) in `score`, SQuAD's (Rajpurkar et al. 2016)
in `squad_scores`. A task's over all its rows: GLUE's (Wang et al. 2019) in `task_metrics`, and
MetaICL's (Min et al. 2022) in `macro_f1`. What benchmarks make of them is in `protocols`.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

METRICS = ("exact_match", "strict_match", "rougeL")
SQUAD_METRICS = ("squad_em", "squad_f1")
NO_NUMBER = -1.0  # what a text that is no number counts as: T5's evaluation says so
Scores = dict[str, float]

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


# ------------------------------------------------------------------------------- one row


def normalise(text: str) -> str:
    """Lower case, no punctuation, single spaces: as Super-NaturalInstructions compares."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def score(prediction: str, references: Sequence[str], rouge: Any = None) -> Scores:
    """0..100 each, the best over the references; no ROUGE-L without a scorer."""
    made = {
        "exact_match": 100.0 * max(normalise(prediction) == normalise(r) for r in references),
        "strict_match": 100.0 * max(prediction.strip() == r.strip() for r in references),
    }
    if rouge is not None:
        values = [rouge.score(r, prediction)["rougeL"].fmeasure for r in references]
        made["rougeL"] = 100.0 * max(values)
    return made


def rouge_scorer(tokenizer: Any = None) -> Any:
    """ROUGE-L: of English words with the Porter stemmer, or of what a tokenizer makes."""
    from rouge_score import rouge_scorer as library

    return library.RougeScorer(["rougeL"], use_stemmer=tokenizer is None, tokenizer=tokenizer)


def mean_scores(rows: Sequence[Scores], metrics: Sequence[str] = METRICS) -> Scores:
    """Mean of each metric over rows; all zero without rows."""
    return {m: float(np.mean([r[m] for r in rows])) if rows else 0.0 for m in metrics}


def choose_by_sum(log_probs: Sequence[float], tokens: Sequence[int]) -> int:
    """The likeliest option; of equal ones the first."""
    del tokens
    return int(np.argmax(log_probs))


def choose_by_mean(log_probs: Sequence[float], tokens: Sequence[int]) -> int:
    """The option whose tokens are the likeliest on average; of equal ones the first."""
    return int(np.argmax(np.asarray(log_probs) / np.asarray(tokens)))


def squad_scores(prediction: str, references: Sequence[str]) -> Scores:
    """Exact match and F1 over words, normalised as SQuAD does, the best over the references.

    Where prediction or reference has no words, F1 is 100 if neither has any (SQuAD 2.0's rule; that
    of 1.1 would call a rightly empty answer wrong).
    """
    words = _squad_words(prediction)
    golds = [_squad_words(reference) for reference in references]
    return {
        "squad_em": 100.0 * max(words == gold for gold in golds),
        "squad_f1": 100.0 * max(_words_f1(words, gold) for gold in golds),
    }


def _squad_words(text: str) -> list[str]:
    """Lower-case words without ASCII punctuation (no other, as in the official script), a, an, the.

    Punctuation goes first: "a." is an article, "a-b" the word "ab".
    """
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def _words_f1(words: list[str], gold: list[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))


# -------------------------------------------------------------------------------- one task


def task_metrics(
    names: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Scores:
    """Metrics over a task's rows, 0..100 (correlations -100..100); all zero without rows.

    Args:
        names: of 'accuracy', 'f1', 'matthews', 'pearson', 'spearman'.
        predictions: texts [n]; white space around them does not count.
        references: [n] of one or more texts; all but accuracy take the first.

    The rules for a prediction that is none of the answers are those of T5's evaluation (Raffel et
    al. 2020): for accuracy and f1 (of class "1" against "0") it is wrong, as the opposite label
    is; for matthews it is a third class; for the correlations it is the number -1. A correlation
    with a constant, which is undefined, is 0.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} rows")
    return {
        name: 100.0 * _TASK_METRICS[name](predictions, references) if predictions else 0.0
        for name in names
    }


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The mean F1, 0..100, of the classes that the references have, as MetaICL has it.

    A class that is only predicted has no F1 of its own, but what it took is wrong.
    """
    f1s = []
    for name in dict.fromkeys(references):
        hits = sum(a == b == name for a, b in zip(predictions, references, strict=True))
        all_of_it = sum(text == name for text in (*predictions, *references))
        f1s.append(2 * hits / all_of_it)
    return 100.0 * float(np.mean(f1s)) if f1s else 0.0


def _accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    right = [
        prediction.strip() in [reference.strip() for reference in accepted]
        for prediction, accepted in zip(predictions, references, strict=True)
    ]
    return float(np.mean(right))


def _f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    said, true = _labels(predictions), _labels([r[0] for r in references])
    said = np.where(said < 0, 1 - true, said)
    positives = np.sum(said == 1) + np.sum(true == 1)
    return float(2 * np.sum((said == 1) & (true == 1)) / positives) if positives else 0.0


def _matthews(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Of any number of classes (Gorodkin 2004): the correlation of the one-hot labels."""
    classes = np.array([-1, 0, 1])
    said = (_labels(predictions)[:, None] == classes).astype(float)
    true = (_labels([r[0] for r in references])[:, None] == classes).astype(float)
    return _correlation(said, true)


def _pearson(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    return _correlation(_numbers(predictions), _numbers([r[0] for r in references]))


def _spearman(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Pearson's of the ranks; equal numbers share the mean of theirs."""
    said, true = _numbers(predictions), _numbers([r[0] for r in references])
    return _correlation(_ranks(said), _ranks(true))


_TASK_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
}


def _labels(texts: Sequence[str]) -> np.ndarray:
    """[n] int: 0 or 1, -1 for any other text."""
    return np.array([{"0": 0, "1": 1}.get(text.strip(), -1) for text in texts])


def _numbers(texts: Sequence[str]) -> np.ndarray:
    return np.array([_number(text) for text in texts])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return NO_NUMBER
    return value if math.isfinite(value) else NO_NUMBER


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of [n] or [n, classes]: the covariance, summed over classes, over both deviations."""
    if np.all(a == a[0]) or np.all(b == b[0]):  # exactly: a rounded mean would leave a deviation
        return 0.0
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return float(np.sum(a * b) / (np.sqrt(np.sum(a * a)) * np.sqrt(np.sum(b * b))))
