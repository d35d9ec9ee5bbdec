"""What benchmarks report, against their official scripts' numbers and against counts by hand."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from nltk.stem.porter import PorterStemmer

import runs
from hyper_t5 import bpe, cli, intervals, protocols, scores, submission
from hyper_t5.errors import UserError

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "golden/metric_cases.json").read_text())


def row(task: str, prediction: str, *references: str, **fields: Any) -> dict[str, Any]:
    made = {"split": "test", "mixture": "sni", "task": task, "category": "", "id": "1"}
    return {**made, "prediction": prediction, "references": list(references), **fields}


def ranked(
    task: str, right: str, log_probs: list[float], tokens: list[int], **fields: Any
) -> dict[str, Any]:
    """A row of the options a, b, c, ..."""
    scored = {"option_log_probs": log_probs, "option_tokens": tokens}
    return row(task, "", right, options=list("abcdef"[: len(tokens)]), **scored, **fields)


def mean(values: Any) -> float:
    return sum(values) / len(values)


# -------------------------------------------------------------------- Super-NaturalInstructions


def sni_rows() -> list[dict[str, Any]]:
    return [{"split": "test", "mixture": "sni", **case} for case in CASES["sni"]["rows"]]


def test_sni_is_as_the_official_script_has_it() -> None:
    split = protocols.score_predictions(sni_rows())["splits"]["test"]
    assert split["official"] == pytest.approx(CASES["sni"]["expected"], abs=1e-4)
    assert split["overall"]["rougeL"] == pytest.approx(
        CASES["sni"]["expected"]["rougeL_default_track"], abs=1e-4
    )
    title = split["per_category"]["Title Generation"]
    assert (title["rows"], title["tasks"]) == (7, 1)
    assert title["exact_match"] == pytest.approx(100 * 2 / 7)


def lcs(a: list[str], b: list[str]) -> int:
    """The longest common subsequence, by its definition."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        if a[i] == b[j]:
            return 1 + longest(i + 1, j + 1)
        return max(longest(i + 1, j), longest(i, j + 1))

    return longest(0, 0)


def test_rouge_l_is_its_definition() -> None:
    stem = PorterStemmer().stem

    def words(text: str) -> list[str]:
        found = "".join(c if c in "abcdefghijklmnopqrstuvwxyz0123456789" else " " for c in text)
        return [stem(word) if len(word) > 3 else word for word in found.split()]

    for marked in protocols.mark(sni_rows()):
        said = words(marked["prediction"].lower())
        best = 0.0
        for reference in marked["references"]:
            true = words(reference.lower())
            best = max(best, 2 * lcs(said, true) / max(1, len(said) + len(true)))
        assert marked["rougeL"] == pytest.approx(100 * best), marked


def test_scores_in_a_file_are_made_anew() -> None:
    stale = [{**r, "rougeL": 1.0, "exact_match": 100.0} for r in sni_rows()]
    assert protocols.score_predictions(stale) == protocols.score_predictions(sni_rows())
    through = json.loads(json.dumps(protocols.mark(sni_rows())))
    assert protocols.score_predictions(through) == protocols.score_predictions(sni_rows())


def test_a_submission_scores_as_the_rows_that_it_was_made_of(tmp_path: Path) -> None:
    rows = sni_rows()
    lines = submission.submission([*rows, row("x", "y", "z", mixture="p3")])
    assert lines[0] == {"id": "task1_entail-0", "prediction": "Yes."}
    assert len(lines) == len(rows)
    (tmp_path / "submission.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[::-1]))
    official = (
        {
            "id": r["id"],
            "references": r["references"],
            "task_id": r["task"],
            "task_category": r["category"],
            "track": "default",
        }
        for r in rows
    )
    (tmp_path / "refs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in official))
    argv = ["score", "--predictions", str(tmp_path / "submission.jsonl")]
    argv += ["--references", str(tmp_path / "refs.jsonl"), "--out", str(tmp_path / "m.json")]
    assert cli.main(argv) == 0
    made = json.loads((tmp_path / "m.json").read_text())
    assert made["splits"]["test"]["official"] == pytest.approx(CASES["sni"]["expected"], abs=1e-4)


def test_what_a_submission_lacks_is_empty_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.jsonl").write_text('{"id": "1", "prediction": "a"}\n{"id":"9","prediction":""}')
    lines = ['{"id": "1", "references": ["a"]}', '{"id": "2", "references": ["b"]}']
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    rows = submission.read_predictions(tmp_path / "s.jsonl", tmp_path / "r.jsonl")
    assert [r["prediction"] for r in rows] == ["a", ""]
    out = capsys.readouterr().out
    assert "no prediction for 1 of 2 instances" in out
    assert "1 predictions are of no instance" in out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "is empty"),
        ("[1]", "line 1: must be a JSON object"),
        ('{"id": 3', "line 1: not valid JSON"),
        ('{"id": "1", "prediction": "a"}', "line 1: lacks field split; a submission needs its"),
        ('{"split": "test", "task": "t", "id": 1}', "field id must be text, this is 1"),
        (
            '{"split": "test", "task": "t", "id": "1", "prediction": "a", "references": []}',
            "field references must be a list of texts, one or more",
        ),
        (
            '{"split": "test", "task": "t", "id": "1", "prediction": "a", "references": ["a"], '
            '"options": ["a"], "option_log_probs": [], "option_tokens": [1]}',
            "options, option_log_probs and option_tokens differ in length",
        ),
    ],
)
def test_bad_files_of_predictions(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.jsonl").write_text(line)
    said = runs.fails(capsys, "score", f"--predictions={tmp_path / 'p.jsonl'}")
    assert expected in said
    assert "p.jsonl" in said


# ------------------------------------------------------------------------ the cross-lingual track

TEXTS = (
    "low lower lowest, the newest widest!",
    "  two  spaces\n\nand lines ",
    "São Paulo’s café — naïve 日本語 текст",
    "it's 3.14 or 1,000€ don't we'll",
    "",
)


def learned_merges(corpus: str, count: int) -> list[tuple[str, str]]:
    """Byte-pair merges of a text, the commonest pair first, by their definition."""
    letters = bpe.byte_letters()
    words = Counter(tuple(letters[b] for b in w.encode()) for w in corpus.split(" ") if w)
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for i in range(len(word) - 1):
                pairs[word[i], word[i + 1]] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        joined: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            parts: list[str] = []
            for part in word:
                if parts and (parts[-1], part) == best:
                    parts[-1] += part
                else:
                    parts.append(part)
            joined[tuple(parts)] += times
        words = joined
    return merges


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gpt2") / "merges.txt"
    learned = learned_merges(" ".join(TEXTS * 2).replace(" ", " Ġ"), 60)
    file.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in learned))
    return file


def test_tokens_are_those_of_tokenizers(merges: Path) -> None:
    pairs = [tuple(line.split()) for line in merges.read_text().splitlines()[1:]]
    alphabet = [*bpe.byte_letters(), *(a + b for a, b in pairs)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(alphabet))}
    theirs = tokenizers.ByteLevelBPETokenizer(vocab, pairs)
    ours, rng = bpe.Gpt2Tokenizer(merges), random.Random(0)
    noise = ["".join(rng.choices("".join(TEXTS) + "  \n", k=40)) for _ in range(50)]
    for text in (*TEXTS, *noise):
        assert ours.tokenize(text) == [t.lstrip("Ġ") for t in theirs.encode(text).tokens]
    assert any(len(token) > 2 for token in ours.tokenize(TEXTS[0]))


def test_the_cross_lingual_track(merges: Path) -> None:
    rows = [
        row("t", "текст 日本語", "日本語 текст", split="xlingual_test"),
        row("t", "same", "Same!", split="xlingual_test"),
    ]
    without = protocols.score_predictions(rows)["splits"]["xlingual_test"]
    assert without["official"]["exact_match_xlingual_track"] == 50.0
    assert not any(name.startswith("rougeL") for name in without["official"])
    assert "rougeL" not in without["overall"]
    tokenizer = bpe.Gpt2Tokenizer(merges)
    both = protocols.score_predictions(rows, tokenizer)["splits"]["xlingual_test"]["official"]
    expected = []
    for r in rows:
        said, true = (tokenizer.tokenize(t) for t in (r["prediction"], r["references"][0]))
        expected.append(200 * lcs(said, true) / (len(said) + len(true)))
    assert 0 < expected[0] < 100
    assert both["rougeL_xlingual_track"] == pytest.approx(mean(expected), abs=1e-4)


def test_a_file_that_is_no_merges(tmp_path: Path) -> None:
    for text, said in [("a b c\n", "line 1: not two tokens"), ("#version\n", "holds no merges")]:
        (tmp_path / "m.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            bpe.Gpt2Tokenizer(tmp_path / "m.txt")
    with pytest.raises(UserError, match="cannot be read"):
        bpe.Gpt2Tokenizer(tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------- P3


def test_rank_classification_by_sum_and_by_mean() -> None:
    # By the sum "a" (-2 against -3), by the mean "b" (-1 against -2); of equal ones the first.
    rows = [
        ranked("t", "a", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "b", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "b", [-2.0, -3.0], [1, 3], mixture="p3"),
        ranked("t", "a", [-2.0, -2.0], [2, 2], mixture="p3"),
    ]
    told = protocols.score_predictions(rows)["splits"]["test"]["per_task"]["t"]
    assert (told["accuracy_by_sum"], told["accuracy_by_mean"]) == (50.0, 75.0)
    assert protocols.of_mixture("p3").choose([-2.0, -3.0], [1, 3]) == 0
    assert protocols.of_mixture("metaicl").choose([-2.0, -3.0], [1, 3]) == 1


def test_p3_means_and_medians_over_templates() -> None:
    def template(name: str, dataset: str, right: int, rows: int = 4) -> list[dict[str, Any]]:
        return [
            ranked(f"{name}_score_eval", "a" if i < right else "b", [-1.0, -2.0], [1, 1])
            | {"mixture": "p3", "category": dataset}
            for i in range(rows)
        ]

    rows = [
        *template("super_glue_rte_a", "super_glue_rte", 4),
        *template("super_glue_rte_b", "super_glue_rte", 1),
        *template("super_glue_rte_c", "super_glue_rte", 1),
        *template("anli_x_r1", "anli", 2),
        *template("anli_x_r2", "anli", 1),
        *template("anli_x_r3", "anli", 0),
        *template("anli_y_r3", "anli", 4, rows=8),
        *template("story_cloze_2016_q", "story_cloze_2016", 3),
    ]
    split = protocols.score_predictions(rows)["splits"]["test"]
    told = {k: (v["templates"], v["accuracy_by_sum"]) for k, v in split["per_dataset"].items()}
    assert told == {
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


# -------------------------------------------------------------------------------------- MetaICL


@pytest.mark.parametrize("case", CASES["metaicl"])
def test_metaicl_is_as_its_evaluation_has_it(case: dict[str, Any]) -> None:
    rows = [
        row("t", said, true, mixture="metaicl", category=case["category"])
        | {"options": ["x"], "option_log_probs": [0.0], "option_tokens": [1]}
        for said, true in zip(case["predictions"], case["references"], strict=True)
    ]
    told = protocols.score_predictions(rows)["splits"]["test"]["per_task"]["t"]
    assert told["metaicl"] == pytest.approx(case["expected"])
    assert ("macro_f1" in told) == (case["category"] == "classification")


def test_macro_f1_by_hand() -> None:
    # yes: 1 of 2 found, 1 of 3 said right: 2/5. no: 0. What is only said counts against nobody.
    found = scores.macro_f1(["yes", "yes", "other", "yes"], ["yes", "no", "yes", "no"])
    assert found == pytest.approx(100 * (2 / 5 + 0) / 2)


def test_metaicl_over_seeds() -> None:
    def task(name: str, seed: int, right: int) -> list[dict[str, Any]]:
        made = [ranked(name, "a", [-1.0, -2.0], [1, 1]) for _ in range(4)]
        return [
            {**r, "split": f"test_{seed}", "mixture": "metaicl", "category": "multi-choice"}
            | {"prediction": "a" if i < right else "b"}
            for i, r in enumerate(made)
        ]

    hits = {"x": {100: 4, 13: 2, 21: 0}, "y": {100: 1, 13: 1, 21: 4}}
    rows = [r for name, seeds in hits.items() for s, n in seeds.items() for r in task(name, s, n)]
    told = protocols.score_predictions(rows)["over_splits"]["metaicl"]
    assert (told["seeds"], told["tasks"]) == (3, 2)
    assert told["mean"] == pytest.approx(mean([100, 50, 0, 25, 25, 100]))
    assert told["per_seed"] == {"test_100": 62.5, "test_13": 37.5, "test_21": 50.0}
    assert told["worst_seed"] == 37.5
    assert told["mean_of_worst"] == pytest.approx(mean([0, 25]))
    assert told["per_task"]["x"] == {
        "mean": pytest.approx(50),
        "worst": 0,
        "deviation": pytest.approx(np.std([100, 50, 0])),
    }


# ---------------------------------------------------------------------------------------- GLUE, QA


@pytest.mark.parametrize("case", CASES["squad"])
def test_squad_is_as_the_official_script_has_it(case: dict[str, Any]) -> None:
    rows = [row("t", case["prediction"], *case["references"], mixture="extractive_qa")]
    told = protocols.score_predictions(rows)["splits"]["test"]["per_task"]["t"]
    for name in scores.SQUAD_METRICS:
        assert told[name] == pytest.approx(case[name])


def test_qa_is_the_mean_over_sets() -> None:
    sets = {"a": ["x", "x", "y"], "b": ["x"]}
    rows = [row(k, v, "x", mixture="extractive_qa") for k, said in sets.items() for v in said]
    overall = protocols.score_predictions(rows)["splits"]["test"]["overall"]
    assert overall["squad_f1"] == pytest.approx(mean([200 / 3, 100]))


def test_glue_is_the_mean_over_tasks_with_paired_metrics_as_one() -> None:
    said = {"mrpc": "1100", "stsb": ["1.0", "2.0", "3.0", "x"], "rte": "0110", "wnli": "0000"}
    true = {"mrpc": "1001", "stsb": ["1.0", "2.0", "3.0", "4.0"], "rte": "0111", "wnli": "1111"}
    rows = [
        row(name, a, b, mixture="glue")
        for name in said
        for a, b in zip(said[name], true[name], strict=True)
    ]
    split = protocols.score_predictions(rows)["splits"]["test"]
    told = split["per_task"]
    assert (told["mrpc"]["f1"], told["mrpc"]["accuracy"]) == (50.0, 50.0)
    x, y = np.array([1.0, 2, 3, -1]), np.array([1.0, 2, 3, 4])
    pearson = 100 * np.corrcoef(x, y)[0, 1]
    spearman = 100 * np.corrcoef([2, 3, 4, 1], [1, 2, 3, 4])[0, 1]
    assert told["stsb"]["pearson"] == pytest.approx(pearson)
    assert told["stsb"]["spearman"] == pytest.approx(spearman)
    assert split["overall"]["glue"] == pytest.approx(mean([50, (pearson + spearman) / 2, 75]))


def test_splits_and_mixtures_stand_apart() -> None:
    rows = [row("t", "a", "a"), row("rte", "b", "a", split="other", mixture="glue")]
    made = protocols.score_predictions(rows)
    assert list(made["splits"]) == ["test", "other"]
    assert made["splits"]["test"]["overall"]["exact_match"] == 100.0
    assert made["splits"]["other"]["per_task"]["rte"]["accuracy"] == 0.0
    assert "over_splits" not in made


# --------------------------------------------------------------------------------- intervals


def p3_rows(right: int = 3) -> list[dict[str, Any]]:
    hits = {"super_glue_cb_a": right, "super_glue_cb_b": 1, "anli_x_r1": 2, "anli_x_r2": 4}
    return [
        ranked(f"{name}_score_eval", "a" if i < n else "b", [-1.0, -2.0], [1, 1])
        | {"mixture": "p3", "category": name.rpartition("_")[0] if "glue" in name else "anli"}
        for name, n in hits.items()
        for i in range(4)
    ]


def glue_rows(said: str = "0110") -> list[dict[str, Any]]:
    tasks = {"rte": said, "sst2": "0001", "mrpc": "0101", "qqp": "0011", "wnli": "0000"}
    return [
        row(name, a, b, mixture="glue")
        for name, text in tasks.items()
        for a, b in zip(text, "0111", strict=True)
    ]


@pytest.mark.parametrize("rows", [sni_rows(), p3_rows(), glue_rows()], ids=["sni", "p3", "glue"])
def test_a_score_is_the_ratio_of_its_parts(rows: list[dict[str, Any]]) -> None:
    split = protocols.score_predictions(rows)["splits"]["test"]
    parts = protocols.parts_of(json.loads(json.dumps(split)))
    assert parts.keys() == split["overall"].keys() == split["intervals"].keys()
    for name, value in split["overall"].items():
        assert intervals.ratio(parts[name]) == pytest.approx(value)
        low, high = split["intervals"][name]
        assert low <= value <= high


def test_templates_of_a_dataset_are_not_independent() -> None:
    split = protocols.score_predictions(p3_rows())["splits"]["test"]
    parts = protocols.parts_of(split)
    assert parts["accuracy_by_sum"] == {"super_glue_cb": (100.0, 2.0), "anli": (150.0, 2.0)}
    assert parts["datasets_mean"] == {"super_glue_cb": (50.0, 1.0), "anli": (75.0, 1.0)}
    assert split["intervals"]["datasets_mean"] == [50.0, 75.0]
    assert not any("intervals" in told for told in split["per_category"].values())


def test_a_category_and_seeds_have_intervals_over_their_tasks() -> None:
    rows = [r | {"category": "kind"} for r in sni_rows()]
    split = protocols.score_predictions(rows)["splits"]["test"]
    assert split["per_category"]["kind"]["intervals"] == split["intervals"]
    one = protocols.score_predictions(sni_rows())["splits"]["test"]["per_category"]
    assert "intervals" not in one["Title Generation"]  # a single task
    made = [
        ranked(name, "a", [-1.0, -2.0], [1, 1], split=seed, mixture="metaicl", category="qa")
        | {"prediction": said}
        for seed, answers in {"test_1": "aab", "test_2": "abb"}.items()
        for name, said in zip("xyz", answers, strict=True)
    ]
    report = protocols.score_predictions(made)
    told = report["over_splits"]["metaicl"]
    same = protocols.differences(report, report)
    assert same["metaicl"] == {"mean": (3, 0.0, [0.0, 0.0])}
    assert same["test_2"]["metaicl"] == (3, 0.0, [0.0, 0.0])
    each = {"x": (200.0, 2.0), "y": (100.0, 2.0), "z": (0.0, 2.0)}
    assert told["intervals"]["mean"] == intervals.interval(each)


def test_differences_of_reports() -> None:
    one, two = (protocols.score_predictions(rows) for rows in (p3_rows(4), p3_rows(3)))
    told = protocols.differences(one, two)["test"]
    assert told["datasets_mean"] == (2, 6.25, [0.0, 12.5])
    assert protocols.differences(two, one)["test"]["datasets_mean"] == (2, -6.25, [-12.5, 0.0])
    assert protocols.differences(one, {"splits": {}}) == {}
    # Only tasks that both have.
    fewer = protocols.score_predictions([r for r in glue_rows("0111") if r["task"] != "sst2"])
    glue = protocols.differences(fewer, protocols.score_predictions(glue_rows()))["test"]["glue"]
    assert glue[0] == 3
    assert glue[1] == pytest.approx(25 / 3)


def test_score_tells_intervals_and_the_difference_to_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rows in {"worse": p3_rows(3), "better": p3_rows(4)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = ["score", f"--predictions={tmp_path / 'worse.jsonl'}"]
    assert cli.main([*argv, f"--out={tmp_path / 'worse.json'}"]) == 0
    assert "62.5 [50.0, 75.0]" in capsys.readouterr().out
    argv = ["score", f"--predictions={tmp_path / 'better.jsonl'}"]
    assert cli.main([*argv, f"--compare={tmp_path / 'worse.json'}"]) == 0
    *_, head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["system", "less", "split", "tasks"]
    assert line.startswith("better  worse  test   2 ")
    at = head.index("datasets_mean")
    assert line[at:].startswith("+6.2 [+0.0, +12.5]  ")
