"""Extractive question answering: both formats, windows and their outputs, invalid files."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import pipeline
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.vocab import Vocabulary, load_vocab
from hyper_t5.evaluation import aggregation
from hyper_t5.tasks import extractive_qa as qa
from hyper_t5.tasks import synthetic
from hyper_t5.utils.errors import UserError
from tests.support import toy_tasks
from tests.support.toy_tasks import BYTES

CONTEXT = "Ann met Bob in Rome. Later Bob left."
ANSWERS = [("Rome", 15), ("in Rome", 12), ("Rome", 15)]


def squad(context: str, *questions: dict[str, Any]) -> dict[str, Any]:
    """Return a file in SQuAD's format with one paragraph."""
    paragraph = {"context": context, "qas": list(questions)}
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": [paragraph]}]}


def squad_question(answers: list[tuple[str, int]], **fields: Any) -> dict[str, Any]:
    spans = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": "q1", "question": "Where?", "answers": spans, **fields}


SQUAD = squad(
    CONTEXT,
    squad_question(ANSWERS),
    squad_question([], id="q2", question="Why?", is_impossible=True),
)
MRQA: list[dict[str, Any]] = [
    {"header": {"dataset": "toy", "split": "train"}},
    {
        "context": CONTEXT,
        "qas": [
            {
                "qid": "m1",
                "question": "Who left?",
                "answers": ["Robert", "Bob"],
                "detected_answers": [
                    {"text": "Bob", "char_spans": [[27, 29], [8, 10]], "token_spans": [[7, 7]]}
                ],
            }
        ],
    },
]


def make_config(folder: Path, **fields: Any) -> ConfigDict:
    lengths = {"hyper_length": 256, "input_length": 80, "target_length": 16}
    config = toy_tasks.make_config(
        mixture="extractive_qa", qa_dir=str(folder), shots=(0, 0), **{**lengths, **fields}
    )
    config.eval.shots = 0
    return config


def load(config: ConfigDict, split: str) -> Any:
    tasks = pipeline.load_tasks("extractive_qa", config.data, split, BYTES)
    return {task.name: task for task in tasks}


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in qa.SPLITS:
        (tmp_path / f"squad.{split}.json").write_text(json.dumps(SQUAD))
        (tmp_path / f"toy.{split}.jsonl.gz").write_bytes(gzip.compress(json_lines(MRQA)))
    return tmp_path


# ------------------------------------------------------------------------------- mixture


def test_both_formats(folder: Path) -> None:
    config = make_config(folder)
    tasks = load(config, "train")
    assert {name: task.rate for name, task in tasks.items()} == {"squad": 2, "toy": 1}
    assert [(row.id, row.input, row.outputs) for row in tasks["squad"].rows] == [
        ("q1", f"question: Where? context: {CONTEXT}", ("Rome",)),
        ("q2", f"question: Why? context: {CONTEXT}", ("",)),
    ]
    # MRQA's references need not be in the context; its character spans are.
    assert [(row.id, row.outputs) for row in tasks["toy"].rows] == [("m1", ("Bob",))]
    tasks = load(config, "validation")
    assert [row.outputs for row in tasks["squad"].rows] == [("Rome", "in Rome"), ("",)]
    assert [row.outputs for row in tasks["toy"].rows] == [("Robert", "Bob")]
    assert pipeline.held_out_splits("extractive_qa") == ("validation",)


def test_evaluation_truncates_to_the_first_window_and_counts(folder: Path) -> None:
    config = make_config(folder, input_length=50)
    squad_task, toy_task = build_eval_tasks(
        list(load(config, "validation").values()), BYTES, config
    )
    assert (squad_task.truncated_inputs, toy_task.truncated_inputs) == (2, 1)
    assert BYTES.decode(toy_task.inputs[0]) == toy_task.texts[0][:49]
    assert toy_task.references == (("Robert", "Bob"),)
    train = list(load(config, "train").values())
    batch = EpisodeSampler(train, BYTES, config.data, seed=0).batch(0)
    for row, target in zip(batch["inputs"][0], batch["targets"][0], strict=True):
        assert BYTES.decode(target) in BYTES.decode(row)
    assert BYTES.decode(batch["hyper_inputs"][0]) == qa.INSTRUCTION


def test_metrics() -> None:
    row = {"split": "validation", "mixture": "extractive_qa", "task": "squad"}
    rows = [
        row | {"prediction": "the Rome", "references": ["Rome", "in Rome"]},
        row | {"prediction": "Paris", "references": [""]},
    ]
    overall = aggregation.score_predictions(rows)["splits"]["validation"]["overall"]
    assert (overall["squad_em"], overall["squad_f1"]) == (50.0, 50.0)


# ------------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "vocab", [BYTES, load_vocab(str(synthetic.VOCAB_FILE))], ids=["bytes", "sentencepiece"]
)
@pytest.mark.parametrize("room", [7, 40, 300, 100_000])
def test_windows_cover_the_context_and_overlap(vocab: Vocabulary, room: int) -> None:
    rng = np.random.default_rng(room)
    words = ["".join(rng.choice(list("abé."), rng.integers(1, 12))) for _ in range(400)]
    words[100] = "x" * 500
    context = "  " + "".join(word + str(rng.choice([" ", "\n\n", "  "])) for word in words)
    spans = qa.windows(context, room, vocab)
    texts = [context[start:end] for start, end in spans]
    too_long = [text for text in texts if len(vocab.encode(text)) > room]
    assert all(len(text.split()) == 1 for text in too_long)
    assert ("x" * 500 in too_long) == (room < 500)
    assert all(text == text.strip() for text in texts)
    assert spans[0][0] == 2
    assert spans[-1][1] == len(context.rstrip())
    shared = min(qa.STRIDE, room // 2)
    for (a, b), (c, d) in itertools.pairwise(spans):
        assert a < c
        assert b < d
        assert not context[b:c].strip()  # no word is lost between them
        overlap = len(vocab.encode(context[c:b])) if c < b else 0
        assert overlap <= shared
        if room == 300 and "x" * 500 not in context[a:d]:
            assert overlap > shared - 30, "less than possible"
    assert len(spans) == 1 if room == 100_000 else len(spans) > 5


def test_the_output_of_a_window_is_the_first_reference_inside_it(tmp_path: Path) -> None:
    context = " ".join(f"w{i:03d}" for i in range(100))  # 5 bytes a word
    answers = [(text, context.index(text)) for text in ("w040 w041", "w020")]
    file = tmp_path / "squad.train.json"
    question = squad_question(answers, id="q", question="?")
    file.write_text(json.dumps(squad(context, question)))
    used = len("question: ? context: ") + 1
    rows = qa.read_task("squad", file, BYTES, window=used + 200).rows
    # 40 words a window, of which the last 20 (100 bytes) are also the first of the next.
    assert [(row.id, row.input[used - 1 :][:4], row.input[-4:], row.outputs) for row in rows] == [
        ("q", "w000", "w039", ("w020",)),
        ("q-1", "w020", "w059", ("w040 w041",)),
        ("q-2", "w040", "w079", ("w040 w041",)),
        ("q-3", "w060", "w099", ("",)),
    ]
    assert all(len(BYTES.encode(row.input)) + 1 <= used + 200 for row in rows)
    # Four bytes more hold one more word, without the space after it, and half of a reference.
    first = qa.read_task("squad", file, BYTES, window=used + 204).rows[0]
    assert first.input.endswith("w040")
    assert first.outputs == ("w020",)
    assert qa.read_task("squad", file, BYTES).rows[0].outputs == ("w040 w041", "w020")


# ------------------------------------------------------------------------------- invalid files


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("id"), r"qas\[0\]: lacks field id"),
        (lambda q: q.update(question=3), r"qas\[0\]: field question must be text"),
        (lambda q: q.update(answers={}), r"qas\[0\]: field answers must be a list"),
        (lambda q: q.update(answers=[]), r"qas\[0\]: field answers is empty; only is_im"),
        (
            lambda q: q["answers"][1].update(answer_start=13),
            r"qas\[0\]\.answers\[1\]: field answer_start must be the position of 'in Rome' .* 13",
        ),
        (lambda q: q["answers"][1].pop("text"), r"qas\[0\]\.answers\[1\]: lacks field text"),
        (lambda q: q.update(question="w" * 70), r"qas\[0\]: the question alone has 91 tokens"),
    ],
)
def test_bad_questions_of_squad(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    raw = copy.deepcopy(SQUAD)
    change(raw["data"][0]["paragraphs"][0]["qas"][0])
    file = tmp_path / "squad.train.json"
    file.write_text(json.dumps(raw))
    message = rf"squad\.train\.json: data\[0\]\.paragraphs\[0\]\.{message}"
    with pytest.raises(UserError, match=message) as error:
        qa.read_task("squad", file, BYTES, 80)
    assert "\n" not in str(error.value)
    task = qa.read_task("squad", file, BYTES, 80, "skip")
    assert [row.id for row in task.rows] == ["q2"]
    assert task.skipped == {"squad.train.json": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.pop("qid"), r"qas\[0\]: lacks field qid"),
        (lambda q: q.update(answers=[]), r"qas\[0\]: field answers must be a list of texts, one"),
        (lambda q: q.pop("detected_answers"), r"qas\[0\]: lacks field detected_answers"),
        (
            lambda q: q["detected_answers"][0].update(char_spans=[[30, len(CONTEXT)]]),
            r"qas\[0\]\.detected_answers\[0\]: field char_spans must hold .* is \[30, 36\]",
        ),
        (lambda q: q["detected_answers"][0].update(char_spans=[3]), r"char_spans must hold"),
    ],
)
def test_bad_questions_of_mrqa(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    rows = [*MRQA[:1], copy.deepcopy(MRQA[1]), MRQA[1]]
    change(rows[1]["qas"][0])
    file = tmp_path / "toy.train.jsonl"
    file.write_bytes(json_lines(rows) + b"{}\n")
    with pytest.raises(UserError, match=rf"toy\.train\.jsonl, line 2: .*{message}"):
        qa.read_task("toy", file, BYTES)
    task = qa.read_task("toy", file, BYTES, on_bad_row="skip")
    assert [row.id for row in task.rows] == ["m1"]
    assert task.skipped == {"toy.train.jsonl": 2}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, r"squad\.train\.json: lacks field data"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"paragraphs\[0\]: lacks field context"),
        ({"data": []}, "holds no usable question"),
    ],
)
def test_invalid_squad_files_are_refused(raw: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "squad.train.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message):
        qa.read_task("squad", tmp_path / "squad.train.json", BYTES)


def test_invalid_folders_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for qa_dir, split, message in [
        ("", "train", "data.qa_dir is empty"),
        (str(folder / "none"), "train", "no such folder; data.qa_dir"),
        (str(folder), "test", "split 'test' is unknown; the splits are train, validation"),
    ]:
        with pytest.raises(UserError, match=message):
            qa.split_files(qa_dir, split)
    (folder / "squad.dev.json").write_text("{}")
    assert list(qa.split_files(str(folder), "train")) == ["squad", "toy"]
    assert "skips squad.dev.json" in capsys.readouterr().out
    compressed = (folder / "toy.train.jsonl.gz").read_bytes()
    (folder / "toy.train.jsonl.gz").write_bytes(compressed[:-9])
    with pytest.raises(UserError, match=r"toy.*, after line 2: damaged or truncated \.gz"):
        load(make_config(folder), "train")
    (folder / "toy.train.jsonl").write_bytes(json_lines(MRQA))
    with pytest.raises(UserError, match=r"toy\.train\.jsonl\.gz: toy\.train\.jsonl is the train"):
        qa.split_files(str(folder), "train")
    for file in folder.glob("*.train.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no NAME\.train\.json, "):
        qa.split_files(str(folder), "train")
