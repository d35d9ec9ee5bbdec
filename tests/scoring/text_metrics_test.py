"""Scores against constants computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hyper_t5.scoring import text_metrics


def task(name: str, predictions: list[str], references: list[str]) -> float:
    pairs = [(text,) for text in references]
    (value,) = text_metrics.task_metrics([name], predictions, pairs).values()
    return value


# --------------------------------------------------------------------------- metrics of a row


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "strict", "rouge"),
    [
        ("b a", ["b a"], 100, 100, 100),
        ("B, a!", ["b a"], 100, 0, 100),
        (" b a\n", ["b a"], 100, 100, 100),
        ("a c", ["x", "a c"], 100, 100, 100),  # the best of the references
        ("YES", ["no", "yes."], 100, 0, 100),
        (" Yes.\n", ["yes", "Yes."], 100, 100, 100),
        ("a b c", ["a c d"], 0, 0, 100 * 2 / 3),  # a and c: precision and recall are 2/3
        ("a", ["a b c"], 0, 0, 50),  # precision 1, recall 1/3
        ("c a", ["a c"], 0, 0, 50),  # the order counts
        ("running cats", ["runs cat"], 0, 0, 100),  # equal stems
        ("", ["a"], 0, 0, 0),
        ("", [""], 100, 100, 0),  # as rouge-score
    ],
)
def test_score(
    prediction: str, references: list[str], exact: float, strict: float, rouge: float
) -> None:
    scores = text_metrics.score(prediction, references, text_metrics.rouge_scorer())
    assert scores == pytest.approx({"exact_match": exact, "strict_match": strict, "rougeL": rouge})
    assert "rougeL" not in text_metrics.score(prediction, references)


def test_means_are_over_the_rows_that_have_a_score() -> None:
    rows = [{"a": 0.0, "b": 30.0}, {"a": 30.0}]
    assert text_metrics.mean_scores(rows) == {"a": 15.0, "b": 30.0}
    assert text_metrics.mean_scores(rows, ["b"]) == {"b": 30.0}
    assert text_metrics.mean_scores([]) == text_metrics.mean_scores(rows, []) == {}


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f1"),
    [
        ("The Beatles!", ["beatles"], 100, 100),
        ("an apple a day", ["Apple day"], 100, 100),
        ("theatre", ["atre"], 0, 0),  # articles are words
        ("a-b", ["ab"], 100, 100),  # punctuation is removed before articles
        ("U.S.A.", ["usa", "America"], 100, 100),
        ("  in\n1999 ", ["in 1999"], 100, 100),
        ("“quoted”", ["quoted"], 0, 0),  # the official script removes ASCII punctuation only
        ("cafe", ["café"], 0, 0),
        # 2 of 3 predicted words are among 4 of a reference: P 2/3, R 1/2, F1 4/7; the other has 1
        ("red green blue", ["red blue pink grey", "blue b c d e"], 0, 100 * 4 / 7),
        ("to be to", ["to to to be"], 0, 100 * 6 / 7),  # each word as often as it occurs
        ("", ["gold"], 0, 0),
        ("gold", [""], 0, 0),
        ("", ["x", ""], 100, 100),
        ("the", ["."], 100, 100),  # neither has words
    ],
)
def test_squad_scores(prediction: str, references: list[str], em: float, f1: float) -> None:
    scores = text_metrics.squad_scores(prediction, references)
    assert scores == pytest.approx({"squad_em": em, "squad_f1": f1})


# -------------------------------------------------------------------------- metrics of a task


def test_accuracy_accepts_any_reference() -> None:
    references = [("0", "1"), ("0",), ("1",), ("1",)]
    predictions = ["1", " 0\n", "", "entailment"]
    scores = text_metrics.task_metrics(["accuracy"], predictions, references)
    assert scores == {"accuracy": 50.0}


def test_f1_counts_invalid_labels_as_wrong() -> None:
    # 2 true positives, 1 false negative, 1 false positive: 2*2 / (2*2 + 1 + 1)
    assert task("f1", ["1", "1", "0", "1"], ["1", "1", "1", "0"]) == pytest.approx(100 * 4 / 6)
    # "" for 1 is a false negative, "yes" for 0 a false positive: the same counts
    assert task("f1", ["1", "1", "", "yes"], ["1", "1", "1", "0"]) == pytest.approx(100 * 4 / 6)
    assert task("f1", ["0", "0"], ["0", "1"]) == 0.0
    assert task("f1", ["0", "0"], ["0", "0"]) == 0.0


def test_matthews() -> None:
    # TP 3, TN 1, FP 1, FN 1: (3*1 - 1*1) / sqrt(4*4*2*2) = 1/4
    assert task("matthews", list("111010"), list("111100")) == pytest.approx(25.0)
    assert task("matthews", list("0101"), list("1010")) == pytest.approx(-100.0)
    assert task("matthews", list("1111"), list("1010")) == 0.0
    # A third class: c = 2 correct of s = 4, predicted (0: 1, 1: 1, other: 2), true (0: 2, 1: 2);
    # (c*s - sum p*t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)) = (8 - 4) / sqrt(10 * 8)
    value = task("matthews", ["0", "1", "maybe", ""], list("0101"))
    assert value == pytest.approx(100 * 4 / np.sqrt(80))
    # For two classes it is Pearson's correlation of the labels.
    x, y = np.random.default_rng(0).integers(0, 2, (2, 40))
    expected = 100 * np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std())
    assert task("matthews", list(map(str, x)), list(map(str, y))) == pytest.approx(expected)


def test_correlations() -> None:
    # Deviations -1.5 -.5 .5 1.5 and -1 -1 0 2: sum of products 5, of squares 5 and 6.
    predictions, references = ["1", "2.0", " 3", "4\n"], ["0", "0", "1", "3"]
    assert task("pearson", predictions, references) == pytest.approx(100 * 5 / np.sqrt(30))
    # Ranks 1 2 3 4 and 1.5 1.5 3 4: products 4.5, squares 5 and 4.5.
    assert task("spearman", predictions, references) == pytest.approx(100 * 4.5 / np.sqrt(22.5))
    for name in ("pearson", "spearman"):
        # A text that is no number counts as -1, which keeps the order here.
        assert task(name, ["good", "2"], ["0.0", "5.0"]) == pytest.approx(100.0)
        assert task(name, ["nan", "inf", "0"], ["-1", "-1", "0"]) == pytest.approx(100.0)
        assert task(name, ["0.1", "0.1", "0.1"], ["1", "2", "3"]) == 0.0
        assert task(name, ["3.4"], ["3.4"]) == 0.0


def test_no_rows_and_unequal_rows() -> None:
    assert text_metrics.task_metrics(["f1", "pearson"], [], []) == {"f1": 0.0, "pearson": 0.0}
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        text_metrics.task_metrics(["accuracy"], ["1"], [("1",), ("0",)])
