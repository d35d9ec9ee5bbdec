"""Benchmarks against their official scripts' numbers and against counts by hand."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nltk.stem.porter import PorterStemmer

from hyper_t5 import cli
from hyper_t5.evaluation import aggregation
from hyper_t5.scoring import bootstrap, gpt2_bpe, text_metrics
from hyper_t5.tasks import benchmark_of
from tests.support.prediction_rows import CASES, Row, p3_rows, ranked, row, rows_of, sni_rows


def mean(values: Any) -> float:
    return sum(values) / len(values)


def split_of(rows: list[Row], name: str = "test") -> Any:
    return aggregation.score_predictions(rows)["splits"][name]


def lcs(a: list[str], b: list[str]) -> int:
    """Return the length of the longest common subsequence, by its definition."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


# ---------------------------------------------------------------------- Super-NaturalInstructions


def test_sni_equals_the_official_script() -> None:
    split, expected = split_of(sni_rows()), CASES["sni"]["expected"]
    assert split["official"] == pytest.approx(expected, abs=1e-4)
    assert split["overall"]["rougeL"] == pytest.approx(expected["rougeL_default_track"], abs=1e-4)
    title = split["per_category"]["Title Generation"]
    assert (title["rows"], title["tasks"]) == (7, 1)
    assert title["exact_match"] == pytest.approx(100 * 2 / 7)


def test_rouge_l_equals_its_definition() -> None:
    stem = PorterStemmer().stem

    def words(text: str) -> list[str]:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789"
        split = "".join(c if c in letters else " " for c in text.lower()).split()
        return [stem(word) if len(word) > 3 else word for word in split]

    for scored in aggregation.score_rows(sni_rows()):
        predicted, best = words(scored["prediction"]), 0.0
        for reference in map(words, scored["references"]):
            common = 2 * lcs(predicted, reference)
            best = max(best, common / max(1, len(predicted) + len(reference)))
        assert scored["rougeL"] == pytest.approx(100 * best), scored


def test_scores_of_a_file_are_replaced() -> None:
    expected = aggregation.score_predictions(sni_rows())
    stale = [{**r, "rougeL": 1.0, "exact_match": 100.0} for r in sni_rows()]
    assert aggregation.score_predictions(stale) == expected
    stored = json.loads(json.dumps(aggregation.score_rows(sni_rows())))
    assert aggregation.score_predictions(stored) == expected


def test_the_cross_lingual_track(tmp_path: Path) -> None:
    rows = [
        row("t", "текст 日本語", "日本語 текст", split="xlingual_test"),
        row("t", "same", "Same!", split="xlingual_test"),
    ]
    without = split_of(rows, "xlingual_test")
    assert without["official"]["exact_match_xlingual_track"] == 50.0
    assert not any(name.startswith("rougeL") for name in without["official"])
    assert "rougeL" not in without["overall"]
    (tmp_path / "merges.txt").write_text("#version: 0.2\nÑ Ĥ\na m\nam e\n")
    tokenizer = gpt2_bpe.Gpt2Tokenizer(tmp_path / "merges.txt")
    report = aggregation.score_predictions(rows, tokenizer)["splits"]["xlingual_test"]
    expected = []
    for r in rows:
        predicted, reference = map(tokenizer.tokenize, (r["prediction"], r["references"][0]))
        expected.append(200 * lcs(predicted, reference) / (len(predicted) + len(reference)))
    assert 0 < expected[0] < 100
    rouge = report["official"]["rougeL_xlingual_track"]
    assert rouge == pytest.approx(mean(expected), abs=1e-4)


# --------------------------------------------------------------------------------------------- P3


def test_rank_classification_by_sum_and_by_mean() -> None:
    # The sum prefers "a" (-2 to -3), the mean "b" (-1 to -2); ties go to the first option.
    rows = [
        ranked("t", "a", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "b", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "b", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "a", [-2.0, -2.0], [2, 2], mixture="p3"),
    ]
    scores = split_of(rows)["per_task"]["t"]
    assert (scores["accuracy_by_sum"], scores["accuracy_by_mean"]) == (50.0, 75.0)
    assert benchmark_of("p3").choose([-2.0, -3.0], [1, 3]) == 0
    assert benchmark_of("metaicl").choose([-2.0, -3.0], [1, 3]) == 1


def test_p3_means_and_medians_over_templates() -> None:
    hits = {"super_glue_rte/rte_a": 4, "super_glue_rte/rte_b": 1, "super_glue_rte/rte_c": 1}
    hits |= {"anli/x_r1": 2, "anli/x_r2_score_eval": 1, "anli/x_r3": 0, "story_cloze_2016/q": 3}
    split = split_of([*p3_rows(hits), *p3_rows({"anli/y_r3": 4}, rows=8)])
    datasets = {k: (v["templates"], v["accuracy_by_sum"]) for k, v in split["per_dataset"].items()}
    assert datasets == {
        "super_glue_rte": (3, 50.0),
        "anli_r1": (1, 50.0),
        "anli_r2": (1, 25.0),
        "anli_r3": (2, 25.0),
        "story_cloze_2016": (1, 75.0),
    }
    assert split["per_dataset"]["super_glue_rte"]["median_accuracy_by_sum"] == 25.0
    anli = mean([50, 25, 25])
    averages = {k: (v["datasets"], v["accuracy_by_sum"]) for k, v in split["averages"].items()}
    assert averages == {
        "anli_as_one": (3, pytest.approx(mean([50, anli, 75]))),
        "all": (5, pytest.approx(mean([50, 50, 25, 25, 75]))),
        "without_story_cloze": (2, pytest.approx(mean([50, anli]))),
    }
    assert split["overall"]["datasets_mean"] == pytest.approx(mean([50, anli, 75]))
    assert split["overall"]["datasets_median"] == pytest.approx(mean([25, anli, 75]))


# ---------------------------------------------------------------------------------------- MetaICL


@pytest.mark.parametrize("case", CASES["metaicl"])
def test_metaicl_equals_its_evaluation(case: dict[str, Any]) -> None:
    fields = {"options": ["x"], "option_log_probs": [0.0], "option_tokens": [1]}
    fields |= {"mixture": "metaicl", "category": case["category"]}
    scores = split_of(rows_of("t", case["predictions"], case["references"], **fields))
    assert scores["per_task"]["t"]["metaicl"] == pytest.approx(case["expected"])
    assert ("macro_f1" in scores["overall"]) == (case["category"] == "classification")


def metaicl_rows(answers: dict[str, dict[str, str]]) -> list[Row]:
    """Return rows of {split: {task: predictions}}; "a" is correct."""
    return [
        ranked(task, "a", [-1.0, -2.0], [1, 1], split=split, mixture="metaicl", category="qa")
        | {"prediction": prediction}
        for split, tasks in answers.items()
        for task, predictions in tasks.items()
        for prediction in predictions
    ]


def test_metaicl_over_seeds() -> None:
    answers = {
        "test_100": {"x": "aaaa", "y": "abbb"},
        "test_13": {"x": "aabb", "y": "abbb"},
        "test_21": {"x": "bbbb", "y": "aaaa"},
    }
    summary = aggregation.score_predictions(metaicl_rows(answers))["over_splits"]["metaicl"]
    assert (summary["seeds"], summary["tasks"]) == (3, 2)
    assert summary["mean"] == pytest.approx(mean([100, 50, 0, 25, 25, 100]))
    assert summary["per_seed"] == {"test_100": 62.5, "test_13": 37.5, "test_21": 50.0}
    assert summary["worst_seed"] == 37.5
    assert summary["mean_of_worst"] == pytest.approx(mean([0, 25]))
    assert summary["per_task"]["x"] == {"mean": pytest.approx(50), "worst": 0}


# ---------------------------------------------------------------------------- GLUE, extractive QA


@pytest.mark.parametrize("case", CASES["squad"])
def test_squad_equals_the_official_script(case: dict[str, Any]) -> None:
    rows = [row("t", case["prediction"], *case["references"], mixture="extractive_qa")]
    scores = split_of(rows)["per_task"]["t"]
    for name in text_metrics.SQUAD_METRICS:
        assert scores[name] == pytest.approx(case[name])


def test_qa_is_the_mean_over_sets() -> None:
    rows = [*rows_of("a", "xxy", "xxx"), *rows_of("b", "x", "x")]
    overall = split_of([r | {"mixture": "extractive_qa"} for r in rows])["overall"]
    assert overall["squad_f1"] == pytest.approx(mean([200 / 3, 100]))


def test_glue_is_the_mean_over_tasks_with_paired_metrics_as_one() -> None:
    numbers = ["1.0", "2.0", "3.0", "4.0"]
    rows = [
        *rows_of("mrpc", "1100", "1001", mixture="glue"),
        *rows_of("stsb", [*numbers[:3], "x"], numbers, mixture="glue"),
        *rows_of("rte", "0110", "0111", mixture="glue"),
        *rows_of("wnli", "0000", "1111", mixture="glue"),
    ]
    split = split_of(rows)
    scores = split["per_task"]
    assert (scores["mrpc"]["f1"], scores["mrpc"]["accuracy"]) == (50.0, 50.0)
    pearson = 100 * np.corrcoef([1, 2, 3, -1], [1, 2, 3, 4])[0, 1]
    spearman = 100 * np.corrcoef([2, 3, 4, 1], [1, 2, 3, 4])[0, 1]
    assert scores["stsb"]["pearson"] == pytest.approx(pearson)
    assert scores["stsb"]["spearman"] == pytest.approx(spearman)
    assert split["overall"]["glue"] == pytest.approx(mean([50, (pearson + spearman) / 2, 75]))


def test_splits_and_mixtures_are_separate() -> None:
    rows = [row("t", "a", "a"), row("rte", "b", "a", split="other", mixture="glue")]
    report = aggregation.score_predictions(rows)
    assert list(report["splits"]) == ["test", "other"]
    assert report["splits"]["test"]["overall"]["exact_match"] == 100.0
    assert report["splits"]["other"]["per_task"]["rte"]["accuracy"] == 0.0
    assert "over_splits" not in report


# -------------------------------------------------------------------------------------- intervals


def cb_and_anli(correct: int = 3) -> list[Row]:
    hits = {"super_glue_cb/cb_a": correct, "super_glue_cb/cb_b": 1}
    return p3_rows(hits | {"anli/x_r1": 2, "anli/x_r2": 4})


def glue_rows(rte: str = "0110", *without: str) -> list[Row]:
    tasks = {"rte": rte, "sst2": "0001", "mrpc": "0101", "qqp": "0011", "wnli": "0000"}
    return [
        r
        for task, predictions in tasks.items()
        if task not in without
        for r in rows_of(task, predictions, "0111", mixture="glue")
    ]


@pytest.mark.parametrize("rows", [sni_rows(), cb_and_anli(), glue_rows()])
def test_a_score_is_the_ratio_of_its_sums(rows: list[Row]) -> None:
    split = split_of(rows)
    sums = aggregation.unit_sums(json.loads(json.dumps(split)))
    assert sums.keys() == split["overall"].keys() == split["intervals"].keys()
    for name, value in split["overall"].items():
        assert bootstrap.ratio(sums[name]) == pytest.approx(value)
        low, high = split["intervals"][name]
        assert low <= value <= high


def test_templates_of_a_dataset_are_one_unit() -> None:
    split = split_of(cb_and_anli())
    sums = aggregation.unit_sums(split)
    assert sums["accuracy_by_sum"] == {"super_glue_cb": (100.0, 2.0), "anli": (150.0, 2.0)}
    assert sums["datasets_mean"] == {"super_glue_cb": (50.0, 1.0), "anli": (75.0, 1.0)}
    assert split["intervals"]["datasets_mean"] == [50.0, 75.0]
    assert not any("intervals" in scores for scores in split["per_category"].values())


def test_intervals_of_categories_and_over_seeds() -> None:
    split = split_of([r | {"category": "kind"} for r in sni_rows()])
    assert split["per_category"]["kind"]["intervals"] == split["intervals"]
    single_task = split_of(sni_rows())["per_category"]["Title Generation"]
    assert "intervals" not in single_task
    answers = {"test_1": dict(zip("xyz", "aab", strict=True))}
    answers |= {"test_2": dict(zip("xyz", "abb", strict=True))}
    report = aggregation.score_predictions(metaicl_rows(answers))
    summary = report["over_splits"]["metaicl"]
    units = {"x": (200.0, 2.0), "y": (100.0, 2.0), "z": (0.0, 2.0)}
    assert summary["intervals"]["mean"] == bootstrap.interval(units)
    same = aggregation.differences(report, report)
    assert same["metaicl"] == {"mean": (3, 0.0, [0.0, 0.0])}
    assert same["test_2"]["metaicl"] == (3, 0.0, [0.0, 0.0])


def test_differences_of_reports() -> None:
    better, worse = (aggregation.score_predictions(cb_and_anli(n)) for n in (4, 3))
    difference = aggregation.differences(better, worse)["test"]
    assert difference["datasets_mean"] == (2, 6.25, [0.0, 12.5])
    difference = aggregation.differences(worse, better)["test"]
    assert difference["datasets_mean"] == (2, -6.25, [-12.5, 0.0])
    assert aggregation.differences(better, {"splits": {}}) == {}
    # Only tasks that both have count.
    fewer, report = map(aggregation.score_predictions, (glue_rows("0111", "sst2"), glue_rows()))
    tasks, value, _ = aggregation.differences(fewer, report)["test"]["glue"]
    assert tasks == 3
    assert value == pytest.approx(25 / 3)


def test_score_prints_intervals_and_the_difference_to_another_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, correct in {"worse": 3, "better": 4}.items():
        lines = [json.dumps(r) + "\n" for r in cb_and_anli(correct)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    argv = ["score", f"--predictions={tmp_path / 'worse.jsonl'}"]
    assert cli.main([*argv, f"--out={tmp_path / 'worse.json'}"]) == 0
    assert "62.5 [50.0, 75.0]" in capsys.readouterr().out
    argv = ["score", f"--predictions={tmp_path / 'better.jsonl'}"]
    assert cli.main([*argv, f"--compare={tmp_path / 'worse.json'}"]) == 0
    *_, head, line = capsys.readouterr().out.splitlines()
    assert line.startswith("better  worse  test   2 ")
    assert line[head.index("datasets_mean") :].startswith("+6.2 [+0.0, +12.5]  ")
