"""Scores of predicted texts against references, each 0..100.

Rows: exact match and ROUGE-L (Wang et al. 2022, Super-NaturalInstructions), and SQuAD's exact match
and F1 (Rajpurkar et al. 2016). Tasks: GLUE's metrics (Wang et al. 2019) and MetaICL's macro-F1 (Min
et al. 2022). `benchmarks` selects and aggregates them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

METRICS = ("exact_match", "strict_match", "rougeL")
SQUAD_METRICS = ("squad_em", "squad_f1")
NO_NUMBER = -1.0  # value of a prediction that is no number (Raffel et al. 2020, T5's evaluation)
OTHER = 2  # class of a prediction that is neither "0" nor "1"
Scores = dict[str, float]
References = Sequence[Sequence[str]]  # one or more accepted texts per row

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower-case, and remove ASCII punctuation and extra space, as Super-NaturalInstructions."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def score(prediction: str, references: Sequence[str], rouge: Any = None) -> Scores:
    """Return the scores of `METRICS`, each the maximum over references; ROUGE-L needs a scorer."""
    scores = {
        "exact_match": 100.0 * max(normalise(prediction) == normalise(r) for r in references),
        "strict_match": 100.0 * max(prediction.strip() == r.strip() for r in references),
    }
    if rouge is not None:
        f_measures = [rouge.score(r, prediction)["rougeL"].fmeasure for r in references]
        scores["rougeL"] = 100.0 * max(f_measures)
    return scores


def rouge_scorer(tokenizer: Any = None) -> Any:
    """Return a ROUGE-L scorer of Porter-stemmed English words, or of a tokenizer's tokens."""
    from rouge_score import rouge_scorer as library

    return library.RougeScorer(["rougeL"], use_stemmer=tokenizer is None, tokenizer=tokenizer)


def mean_scores(rows: Sequence[Mapping[str, Any]], names: Iterable[str] | None = None) -> Scores:
    """Return the mean of each score, by default of all, over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row) if names is None else names
    return {n: float(np.mean([row[n] for row in rows if n in row])) for n in names}


def choose_by_sum(log_probs: Sequence[float], tokens: Sequence[int]) -> int:
    """Return the index of the most likely option; the first one on a tie."""
    del tokens
    return int(np.argmax(log_probs))


def choose_by_mean(log_probs: Sequence[float], tokens: Sequence[int]) -> int:
    """Return the index of the option with the most likely mean token; the first one on a tie."""
    return int(np.argmax(np.asarray(log_probs) / np.asarray(tokens)))


def squad_scores(prediction: str, references: Sequence[str]) -> Scores:
    """Return SQuAD's exact match and word F1, each the maximum over references.

    F1 is 100 where prediction and reference both have no words (SQuAD 2.0's rule; that of 1.1 would
    reject a correct empty answer).
    """
    words = _squad_words(prediction)
    references_words = [_squad_words(reference) for reference in references]
    return {
        "squad_em": 100.0 * max(words == other for other in references_words),
        "squad_f1": 100.0 * max(_word_f1(words, other) for other in references_words),
    }


def _squad_words(text: str) -> list[str]:
    """Split into lower-case words without ASCII punctuation and articles, in this order."""
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION)).split()


def _word_f1(words: list[str], reference: list[str]) -> float:
    if not words or not reference:
        return float(words == reference)
    return 2 * (Counter(words) & Counter(reference)).total() / (len(words) + len(reference))


def task_metrics(
    names: Sequence[str], predictions: Sequence[str], references: References
) -> Scores:
    """Return metrics over a task's rows, 0..100 (correlations -100..100); 0 without rows.

    A prediction that is no valid answer counts as in T5's evaluation (Raffel et al. 2020): for
    accuracy and f1 (of class "1" against "0") it is wrong, for matthews it is a third class, for
    the correlations it is the number -1. An undefined correlation, with a constant, is 0.

    Args:
      names: any of 'accuracy', 'f1', 'matthews', 'pearson', 'spearman'.
      predictions: [n] texts; surrounding white space is ignored.
      references: [n]; all metrics but accuracy use the first of each row.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} rows")
    return {
        name: 100.0 * _TASK_METRICS[name](predictions, references) if predictions else 0.0
        for name in names
    }


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean F1, 0..100, over the classes that occur in the references (MetaICL)."""
    predicted, actual = Counter(predictions), Counter(references)
    correct = Counter(a for a, b in zip(predictions, references, strict=True) if a == b)
    f1s = [2 * correct[name] / (predicted[name] + actual[name]) for name in actual]
    return 100.0 * float(np.mean(f1s)) if f1s else 0.0


def _accuracy(predictions: Sequence[str], references: References) -> float:
    pairs = zip(predictions, references, strict=True)
    return float(np.mean([text.strip() in [r.strip() for r in row] for text, row in pairs]))


# F1 and Matthews' correlation are own code: only scikit-learn, a large dependency, has them.


def _f1(predictions: Sequence[str], references: References) -> float:
    predicted, actual = _labels(predictions), _labels([row[0] for row in references])
    predicted = np.where(predicted == OTHER, 1 - actual, predicted)
    positives = np.sum(predicted == 1) + np.sum(actual == 1)
    return float(2 * np.sum((predicted == 1) & (actual == 1)) / positives) if positives else 0.0


def _matthews(predictions: Sequence[str], references: References) -> float:
    """Return the correlation coefficient of three classes (Gorodkin 2004)."""
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (_labels([row[0] for row in references]), _labels(predictions)), 1)
    predicted, actual, total = confusion.sum(0), confusion.sum(1), confusion.sum()
    variances = (total**2 - predicted @ predicted) * (total**2 - actual @ actual)
    covariance = total * np.trace(confusion) - predicted @ actual
    return float(covariance / math.sqrt(variances)) if variances else 0.0


def _correlation(predictions: Sequence[str], references: References, function: str) -> float:
    from scipy import stats  # takes a second to import

    x, y = _numbers(predictions), _numbers([row[0] for row in references])
    if np.all(x == x[0]) or np.all(y == y[0]):
        return 0.0
    return float(getattr(stats, function)(x, y).statistic)


def _labels(texts: Sequence[str]) -> np.ndarray:
    """Return the classes of texts: [n] int of 0, 1 or `OTHER`."""
    return np.array([{"0": 0, "1": 1}.get(text.strip(), OTHER) for text in texts])


def _numbers(texts: Sequence[str]) -> np.ndarray:
    """Return the values of texts: [n] float, `NO_NUMBER` for a text that is no finite number."""
    values = np.full(len(texts), NO_NUMBER)
    for i, text in enumerate(texts):
        with contextlib.suppress(ValueError):
            values[i] = float(text)
    return np.where(np.isfinite(values), values, NO_NUMBER)


_TASK_METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": functools.partial(_correlation, function="pearsonr"),
    "spearman": functools.partial(_correlation, function="spearmanr"),
}
