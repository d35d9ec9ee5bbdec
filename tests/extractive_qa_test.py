"""Extractive QA from local files: both forms, windows and their answers, what is refused."""

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

from hyper_t5 import config as config_lib
from hyper_t5 import data, protocols
from hyper_t5.errors import UserError
from hyper_t5.tasks import extractive_qa as qa
from hyper_t5.tasks import synthetic
from hyper_t5.vocab import ByteVocabulary, Vocabulary, load_vocab

BYTES = ByteVocabulary()

CONTEXT = "Ann met Bob in Rome. Later Bob left."
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where?",
                            "answers": [
                                {"text": "Rome", "answer_start": 15},
                                {"text": "in Rome", "answer_start": 12},
                                {"text": "Rome", "answer_start": 15},
                            ],
                        },
                        {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}
MRQA = [
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
    config = config_lib.defaults()
    config.eval.update(max_rows_per_task=4, shots=0)
    config.data.update(
        qa_dir=str(folder),
        hyper_length=256,
        input_length=80,
        target_length=16,
        tasks_per_batch=2,
        examples_per_task=3,
        shots=(0, 0),
    )
    config.data.update(fields)
    return config


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in qa.SPLITS:
        (tmp_path / f"squad.{split}.json").write_text(json.dumps(SQUAD))
        (tmp_path / f"toy.{split}.jsonl.gz").write_bytes(gzip.compress(lines(MRQA)))
    return tmp_path


# ------------------------------------------------------------------------------ the mixture


def test_both_forms(folder: Path) -> None:
    config = make_config(folder)
    tasks = {t.name: t for t in data.load_tasks("extractive_qa", config.data, "train", BYTES)}
    assert {name: task.rate for name, task in tasks.items()} == {"squad": 2, "toy": 1}
    assert [(row.id, row.input, row.outputs) for row in tasks["squad"].rows] == [
        ("q1", f"question: Where? context: {CONTEXT}", ("Rome",)),
        ("q2", f"question: Why? context: {CONTEXT}", ("",)),
    ]
    # The golds of MRQA need not stand in the context; those that do are given by their places.
    assert [(row.id, row.outputs) for row in tasks["toy"].rows] == [("m1", ("Bob",))]
    tasks = {t.name: t for t in data.load_tasks("extractive_qa", config.data, "validation", BYTES)}
    assert [row.outputs for row in tasks["squad"].rows] == [("Rome", "in Rome"), ("",)]
    assert [row.outputs for row in tasks["toy"].rows] == [("Robert", "Bob")]
    assert data.held_out_splits("extractive_qa") == ("validation",)


def test_evaluation_reads_the_first_window_and_counts_the_cut(folder: Path) -> None:
    config = make_config(folder, input_length=50)
    tasks = data.load_tasks("extractive_qa", config.data, "validation", BYTES)
    squad, toy = data.eval_episodes(tasks, BYTES, config)
    assert (squad.truncated_inputs, toy.truncated_inputs) == (2, 1)
    assert BYTES.decode(toy.inputs[0]) == toy.texts[0][:49]
    assert toy.references == (("Robert", "Bob"),)
    batch = data.EpisodeSampler(
        data.load_tasks("extractive_qa", config.data, "train", BYTES), BYTES, config.data, seed=0
    ).batch(0)
    for row, target in zip(batch["inputs"][0], batch["targets"][0], strict=True):
        assert BYTES.decode(target) in BYTES.decode(row)
    assert BYTES.decode(batch["hyper_inputs"][0]) == qa.INSTRUCTION


def test_metrics() -> None:
    said = [("the Rome", ["Rome", "in Rome"]), ("Paris", [""])]
    rows = [
        {"split": "validation", "mixture": "extractive_qa", "task": "squad"}
        | {"prediction": prediction, "references": golds}
        for prediction, golds in said
    ]
    overall = protocols.score_predictions(rows)["splits"]["validation"]["overall"]
    assert (overall["squad_em"], overall["squad_f1"]) == (50.0, 50.0)


# ------------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("vocab", [BYTES, load_vocab(str(synthetic.VOCAB_FILE))], ids=["b", "sp"])
@pytest.mark.parametrize("room", [7, 40, 300, 100_000])
def test_windows(vocab: Vocabulary, room: int) -> None:
    rng = np.random.default_rng(room)
    words = ["".join(rng.choice(list("abé."), rng.integers(1, 12))) for _ in range(400)]
    words[100] = "x" * 500
    context = "  " + "".join(word + str(rng.choice([" ", "\n\n", "  "])) for word in words)
    found = qa.windows(context, room, vocab)
    texts = [context[start:end] for start, end in found]
    long = [text for text in texts if len(vocab.encode(text)) > room]
    assert all(len(text.split()) == 1 for text in long)
    assert ("x" * 500 in long) == (room < 500)
    assert all(text == text.strip() for text in texts)
    assert found[0][0] == 2
    assert found[-1][1] == len(context.rstrip())
    shared = min(qa.STRIDE, room // 2)
    for (a, b), (c, d) in itertools.pairwise(found):
        assert a < c
        assert b < d
        assert not context[b:c].strip()  # no word between them
        over = len(vocab.encode(context[c:b])) if c < b else 0
        assert over <= shared
        # As much is shared as may be.
        if room == 300 and "x" * 500 not in context[a:d]:
            assert over > shared - 30
    assert len(found) == 1 if room == 100_000 else len(found) > 5


def test_a_windows_answer_is_the_first_gold_that_lies_in_it(tmp_path: Path) -> None:
    context = " ".join(f"w{i:03d}" for i in range(100))  # 5 bytes a word
    place = context.index
    answers = [{"text": text, "answer_start": place(text)} for text in ("w040 w041", "w020")]
    raw = copy.deepcopy(SQUAD)
    raw["data"][0]["paragraphs"] = [  # type: ignore[index]
        {"context": context, "qas": [{"id": "q", "question": "?", "answers": answers}]}
    ]
    file = tmp_path / "squad.train.json"
    file.write_text(json.dumps(raw))
    used = len("question: ? context: ") + 1
    rows = qa.read_task("squad", file, BYTES, window=used + 200).rows
    # 40 words, then 20 of them (100 bytes) again before the next 20, and so on.
    assert [(row.id, row.input[used - 1 :][:4], row.input[-4:], row.outputs) for row in rows] == [
        ("q", "w000", "w039", ("w020",)),
        ("q-1", "w020", "w059", ("w040 w041",)),
        ("q-2", "w040", "w079", ("w040 w041",)),
        ("q-3", "w060", "w099", ("",)),
    ]
    assert all(len(BYTES.encode(row.input)) + 1 <= used + 200 for row in rows)
    # Four bytes more hold one word more, but not the space after it; and only half of a gold.
    rows = qa.read_task("squad", file, BYTES, window=used + 204).rows
    assert rows[0].input.endswith("w040")
    assert rows[0].outputs == ("w020",)
    assert qa.read_task("squad", file, BYTES).rows[0].outputs == ("w040 w041", "w020")


# --------------------------------------------------------------------------------- mistakes


def question(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    return lambda raw: change(raw["data"][0]["paragraphs"][0]["qas"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (question(lambda q: q.pop("id")), r"qas\[0\]: lacks field id"),
        (question(lambda q: q.update(question=3)), r"qas\[0\]: field question must be text"),
        (question(lambda q: q.update(answers={})), r"qas\[0\]: field answers must be a list"),
        (question(lambda q: q.update(answers=[])), r"qas\[0\]: field answers is empty; only is_im"),
        (
            question(lambda q: q["answers"][1].update(answer_start=13)),
            r"qas\[0\]\.answers\[1\]: field answer_start must be where 'in Rome' .* this is 13",
        ),
        (
            question(lambda q: q["answers"][1].pop("text")),
            r"qas\[0\]\.answers\[1\]: lacks field text",
        ),
        (
            question(lambda q: q.update(question="w" * 70)),
            r"qas\[0\]: the question alone is 91 tok",
        ),
    ],
)
def test_bad_questions_of_squad(change: Any, message: str, folder: Path) -> None:
    raw = copy.deepcopy(SQUAD)
    change(raw)
    file = folder / "squad.train.json"
    file.write_text(json.dumps(raw))
    message = rf"squad\.train\.json: data\[0\]\.paragraphs\[0\]\.{message}"
    with pytest.raises(UserError, match=message) as error:
        qa.read_task("squad", file, BYTES, 80)
    assert "\n" not in str(error.value)
    found = qa.read_task("squad", file, BYTES, 80, "skip")
    assert [row.id for row in found.rows] == ["q2"]
    assert found.skipped == {"squad.train.json": 1}


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
def test_bad_questions_of_mrqa(change: Any, message: str, tmp_path: Path) -> None:
    rows = copy.deepcopy(MRQA)
    rows.append(copy.deepcopy(rows[1]))
    change(rows[1]["qas"][0])  # type: ignore[index]
    file = tmp_path / "toy.train.jsonl"
    file.write_bytes(lines(rows) + b"{}\n")
    with pytest.raises(UserError, match=rf"toy\.train\.jsonl, line 2: .*{message}"):
        qa.read_task("toy", file, BYTES)
    found = qa.read_task("toy", file, BYTES, on_bad_row="skip")
    assert [row.id for row in found.rows] == ["m1"]
    assert found.skipped == {"toy.train.jsonl": 2}


def test_file_and_folder_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for qa_dir, split, message in [
        ("", "train", "data.qa_dir is empty"),
        (str(folder / "none"), "train", "no such folder; data.qa_dir"),
        (str(folder), "test", "split 'test' is unknown; the splits are train, validation"),
    ]:
        with pytest.raises(UserError, match=message):
            qa.split_files(qa_dir, split)
    (folder / "squad.dev.json").write_text("{}")
    assert list(qa.split_files(str(folder), "train")) == ["squad", "toy"]
    assert "left out: squad.dev.json" in capsys.readouterr().out
    packed = (folder / "toy.train.jsonl.gz").read_bytes()
    (folder / "toy.train.jsonl.gz").write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"toy.*, after line 2: damaged or truncated \.gz"):
        data.load_tasks("extractive_qa", make_config(folder).data, "train", BYTES)
    (folder / "toy.train.jsonl").write_bytes(lines(MRQA))
    with pytest.raises(UserError, match=r"toy\.train\.jsonl\.gz: toy\.train\.jsonl is the train"):
        qa.split_files(str(folder), "train")
    for raw, message in [
        ({}, r"squad\.train\.json: lacks field data"),
        ({"data": [{"paragraphs": [{"qas": []}]}]}, r"paragraphs\[0\]: lacks field context"),
        ({"data": []}, "holds no usable question"),
    ]:
        (folder / "squad.train.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=message):
            qa.read_task("squad", folder / "squad.train.json", BYTES)
    for file in folder.glob("*.train.*"):
        file.unlink()
    with pytest.raises(UserError, match=r"holds no NAME\.train\.json, "):
        qa.split_files(str(folder), "train")
