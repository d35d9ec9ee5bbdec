"""Scores against constants worked out by hand, and against SciPy (JAX brings it)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from hyper_t5 import scores


def refs(*texts: str) -> list[tuple[str, ...]]:
    return [(text,) for text in texts]


def task(name: str, predictions: list[str], references: list[str]) -> float:
    (value,) = scores.task_metrics([name], predictions, refs(*references)).values()
    return value


# ------------------------------------------------------------------------------- one row


def test_super_natural_instructions_metrics() -> None:
    rouge = scores.rouge_scorer()
    found = scores.score("The cats, sat", ["a dog", "the cat sat!"], rouge)
    # The stems the, cat, sat are all there, but "cats" is another word than "cat" to a comparison.
    assert found == {"exact_match": 0.0, "strict_match": 0.0, "rougeL": 100.0}
    assert scores.score(" Yes.\n", ["yes", "Yes."], rouge)["strict_match"] == 100.0
    assert scores.score("YES", ["no", "yes."], rouge)["exact_match"] == 100.0
    rows = [{"exact_match": 0.0, "strict_match": 100.0, "rougeL": 30.0}] * 2
    rows.append({"exact_match": 30.0, "strict_match": 100.0, "rougeL": 0.0})
    mean = scores.mean_scores(rows)
    assert mean == pytest.approx({"exact_match": 10, "strict_match": 100, "rougeL": 20})
    assert scores.mean_scores([]) == dict.fromkeys(scores.METRICS, 0.0)


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "strict", "rouge"),
    [
        ("b a", ["b a"], 100, 100, 100),
        ("B, a!", ["b a"], 100, 0, 100),
        (" b a\n", ["b a"], 100, 100, 100),
        ("a c", ["x", "a c"], 100, 100, 100),  # the best of the references
        ("a b c", ["a c d"], 0, 0, 100 * 2 / 3),  # a and c: precision and recall are 2/3
        ("a", ["a b c"], 0, 0, 50),  # precision 1, recall 1/3
        ("c a", ["a c"], 0, 0, 50),  # the order counts
        ("running cats", ["runs cat"], 0, 0, 100),  # the stems are equal
        ("", ["a"], 0, 0, 0),
        ("", [""], 100, 100, 0),  # as rouge-score has it
    ],
)
def test_score(
    prediction: str, references: list[str], exact: float, strict: float, rouge: float
) -> None:
    found = scores.score(prediction, references, scores.rouge_scorer())
    assert found == pytest.approx({"exact_match": exact, "strict_match": strict, "rougeL": rouge})


@pytest.mark.parametrize(
    ("prediction", "references", "em", "f1"),
    [
        ("The Beatles!", ["beatles"], 100, 100),
        ("an apple a day", ["Apple day"], 100, 100),
        ("theatre", ["atre"], 0, 0),  # articles are words
        ("a-b", ["ab"], 100, 100),  # punctuation goes before articles do
        ("U.S.A.", ["usa", "America"], 100, 100),
        ("  in\n1999 ", ["in 1999"], 100, 100),
        ("“quoted”", ["quoted"], 0, 0),  # the official script knows ASCII punctuation only
        ("cafe", ["café"], 0, 0),
        # 2 of 3 words said are among 4 of the gold: P 2/3, R 1/2, F1 4/7; the other gold has 1 of 5
        ("red green blue", ["red blue pink grey", "blue b c d e"], 0, 100 * 4 / 7),
        ("to be to", ["to to to be"], 0, 100 * 6 / 7),  # each word as often as it occurs
        ("", ["gold"], 0, 0),
        ("gold", [""], 0, 0),
        ("", ["x", ""], 100, 100),
        ("the", ["."], 100, 100),  # neither has words
    ],
)
def test_squad_scores(prediction: str, references: list[str], em: float, f1: float) -> None:
    found = scores.squad_scores(prediction, references)
    assert found == pytest.approx({"squad_em": em, "squad_f1": f1})


# -------------------------------------------------------------------------------- one task


def test_accuracy_takes_any_reference() -> None:
    found = scores.task_metrics(
        ["accuracy"], ["1", " 0\n", "", "entailment"], [("0", "1"), ("0",), ("1",), ("1",)]
    )
    assert found == {"accuracy": 50.0}


def test_f1_counts_what_is_no_label_as_wrong() -> None:
    # 2 true positives, 1 false negative, 1 false positive: 2*2 / (2*2 + 1 + 1)
    assert task("f1", ["1", "1", "0", "1"], ["1", "1", "1", "0"]) == pytest.approx(100 * 4 / 6)
    # "" for 1 is a false negative, "yes" for 0 a false positive: the same counts
    assert task("f1", ["1", "1", "", "yes"], ["1", "1", "1", "0"]) == pytest.approx(100 * 4 / 6)
    assert task("f1", ["0", "0"], ["0", "1"]) == 0.0
    assert task("f1", ["0", "0"], ["0", "0"]) == 0.0


def test_matthews() -> None:
    # TP 3, TN 1, FP 1, FN 1: (3*1 - 1*1) / sqrt(4*4*2*2) = 1/4
    said, true = list("111010"), list("111100")
    assert task("matthews", said, true) == pytest.approx(25.0)
    assert task("matthews", list("0101"), list("1010")) == pytest.approx(-100.0)
    assert task("matthews", list("1111"), list("1010")) == 0.0
    # A third class: c = 2 right of s = 4, said (0: 1, 1: 1, none: 2), true (0: 2, 1: 2);
    # (c*s - sum p*t) / sqrt((s^2 - sum p^2) (s^2 - sum t^2)) = (8 - 4) / sqrt(10 * 8)
    found = task("matthews", ["0", "1", "maybe", ""], list("0101"))
    assert found == pytest.approx(100 * 4 / np.sqrt(80))


def test_correlations() -> None:
    # Deviations -1.5 -.5 .5 1.5 and -1 -1 0 2: sum of products 5, of squares 5 and 6.
    said, true = ["1", "2.0", " 3", "4\n"], ["0", "0", "1", "3"]
    assert task("pearson", said, true) == pytest.approx(100 * 5 / np.sqrt(30))
    # Ranks 1 2 3 4 and 1.5 1.5 3 4: products 4.5, squares 5 and 4.5.
    assert task("spearman", said, true) == pytest.approx(100 * 4.5 / np.sqrt(22.5))
    # What is no number is -1: both orders are then the same.
    for name in ("pearson", "spearman"):
        assert task(name, ["good", "2"], ["0.0", "5.0"]) == pytest.approx(100.0)
        assert task(name, ["nan", "inf", "0"], ["-1", "-1", "0"]) == pytest.approx(100.0)
        assert task(name, ["0.1", "0.1", "0.1"], ["1", "2", "3"]) == 0.0
        assert task(name, ["3.4"], ["3.4"]) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    said = [f"{v:.1f}" for v in rng.integers(0, 26, 40) / 5]  # many ties
    true = [f"{v:.1f}" for v in rng.integers(0, 26, 40) / 5]
    a, b = [np.array(texts, float) for texts in (said, true)]
    assert task("pearson", said, true) == pytest.approx(100 * stats.pearsonr(a, b)[0])
    assert task("spearman", said, true) == pytest.approx(100 * stats.spearmanr(a, b)[0])
    # Of two classes Matthews' is Pearson's of the labels.
    said, true = ([str(v) for v in rng.integers(0, 2, 40)] for _ in range(2))
    a, b = [np.array(texts, float) for texts in (said, true)]
    assert task("matthews", said, true) == pytest.approx(100 * stats.pearsonr(a, b)[0])


def test_no_rows_and_unequal_rows() -> None:
    assert scores.task_metrics(["f1", "pearson"], [], []) == {"f1": 0.0, "pearson": 0.0}
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        scores.task_metrics(["accuracy"], ["1"], refs("1", "0"))
