"""P3 from its cache: the two mixtures, their rates, the prompts, and files that are not whole."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hyper_t5 import config as config_module
from hyper_t5 import data, records
from hyper_t5.errors import UserError
from hyper_t5.tasks import p3
from hyper_t5.tasks.common import seqio, tf
from hyper_t5.vocab import ByteVocabulary

BYTES = ByteVocabulary()
STRING = {"dtype": "string", "shape": []}
FEATURES = {
    "train": {
        "inputs_pretokenized": STRING,
        "targets_pretokenized": STRING,
        "answer_choices": {"dtype": "string", "shape": [None]},
    },
    "validation": {
        "idx": {"dtype": "int32", "shape": [None]},
        "inputs_pretokenized": STRING,
        "targets_pretokenized": STRING,
        "is_correct": {"dtype": "bool", "shape": []},
    },
}
PROMPTS = """\
ag_news\t||||\tclassify\t||||\t[TEXT]
What label best describes it?
****************************
imdb\t||||\tMovie Expressed Sentiment\t||||\tHow is [text_1]? [COLUMN HEADER]
****************************
anli\t||||\tGPT_3_style_r1\t||||\tOf [PREMISE] and [HYPOTHESIS]
****************************
super_glue_rte\t||||\tgpt_3_style\t||||\t[PREMISE] True or False?
****************************"""

Value = list[Any]


def example(features: dict[str, Value]) -> bytes:
    """A tf.train.Example; texts become bytes."""
    made = tf.train.Example()
    for name, values in features.items():
        feature = made.features.feature[name]
        feature.SetInParent()
        if all(isinstance(value, str | bytes) for value in values):
            texts = (v.encode() if isinstance(v, str) else v for v in values)
            feature.bytes_list.value.extend(texts)
        elif all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return bytes(made.SerializeToString())


def train_row(i: int, **fields: Value) -> dict[str, Value]:
    row: dict[str, Value] = {
        "inputs": [5, 6],
        "inputs_pretokenized": [f"input {i}"],
        "targets_pretokenized": [("no", "yes")[i % 2]],
        "answer_choices": ["no", "yes"],
    }
    return row | fields


def choices(row: int, right: int, count: int = 2) -> list[dict[str, Value]]:
    """The records of one held-out row."""
    return [
        {
            "idx": [row, i],
            "inputs_pretokenized": [f"question {row}"],
            "targets_pretokenized": [f"choice {i}"],
            "is_correct": [int(i == right)],
            "weight": [1.0],
        }
        for i in range(count)
    ]


def write(folder: Path, task: str, split: str, *shards: list[Any], **stats: int) -> Path:
    """A cached task; a record is its features, or bytes. `stats` are given instead of counted."""
    place = folder / task
    place.mkdir(parents=True, exist_ok=True)
    for file in place.glob(f"{split}.tfrecord*"):
        file.unlink()
    for i, shard in enumerate(shards):
        name = f"{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
        with tf.io.TFRecordWriter(str(place / name)) as writer:
            for row in shard:
                writer.write(row if isinstance(row, bytes) else example(row))
    info = {"features": FEATURES[split], "num_shards": len(shards), "seqio_version": "0.0.20"}
    (place / f"info.{split}.json").write_text(json.dumps(info))
    counted = {"examples": sum(map(len, shards)), "inputs_tokens": 7} | stats
    (place / f"stats.{split}.json").write_text(json.dumps(counted))
    (place / "COMPLETED").touch()
    return place


RTE = "super_glue_rte_GPT_3_style_score_eval"
ANLI = "anli_GPT_3_style_r2_score_eval"
AG, IMDB = "ag_news_classify", "imdb_Movie_Expressed_Sentiment"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two training tasks, one of them in two files, and two held-out ones."""
    p3_dir = tmp_path / "p3"
    write(p3_dir / "data", AG, "train", [train_row(i) for i in range(6)])
    rows = [train_row(i) for i in range(10)]
    write(p3_dir / "data", IMDB, "train", rows[:7], rows[7:])
    # The records of a row are not always next to one another, nor in one file.
    mixed = [*choices(1, 0), *choices(0, 1), *choices(2, 0)]
    order = [3, 0, 5, 2, 4, 1]
    shuffled = [mixed[i] for i in order]
    write(p3_dir / "data", RTE, "validation", shuffled[:4], shuffled[4:])
    write(p3_dir / "data", ANLI, "validation", [*choices(0, 2, 3), *choices(1, 0, 3)])
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    return p3_dir


def make_config(folder: Path, **fields: Any) -> ConfigDict:
    config = config_module.defaults()
    config.data.mixture = "p3"
    config.data.p3_dir = str(folder)
    config.data.p3_prompts = str(folder.parent / "prompts.txt")
    config.data.cache_dir = str(folder.parent / "cache")
    config.data.hyper_length = 96
    config.data.update(fields)
    return config


def load(folder: Path, split: str = "train", **fields: Any) -> dict[str, data.TaskRows]:
    section = make_config(folder, **fields).data
    return {task.name: task for task in data.load_tasks("p3", section, split, BYTES)}


# ---------------------------------------------------------------------------- the mixtures


def test_training_tasks(folder: Path) -> None:
    tasks = load(folder)
    assert list(tasks) == [AG, IMDB]
    assert [(len(task.rows), task.rate, task.category) for task in tasks.values()] == [
        (6, 6.0, "ag_news"),
        (10, 10.0, "imdb"),
    ]
    # The last row of the first file and the first of the second.
    assert [tasks[IMDB].rows[i] for i in (6, 7)] == [
        data.Row(f"{IMDB}-6", "input 6", ("no",), ("no", "yes")),
        data.Row(f"{IMDB}-7", "input 7", ("yes",), ("no", "yes")),
    ]
    assert [row.input for row in tasks[IMDB].rows] == [f"input {i}" for i in range(10)]
    # Fields are masked as HINT does: names without a space.
    assert tasks[AG].instructions == ("[MASK]\nWhat label best describes it?",)
    assert tasks[IMDB].instructions == ("How is [MASK]? [COLUMN HEADER]",)
    assert not any(task.examples or task.skipped for task in tasks.values())
    again = load(folder, p3_dir=str(folder / "data"))  # the folder of the tasks itself
    assert [list(task.rows) for task in again.values()] == [list(t.rows) for t in tasks.values()]


def test_held_out_tasks(folder: Path) -> None:
    tasks = load(folder, "validation")
    assert list(tasks) == [ANLI, RTE]
    both = ("choice 0", "choice 1")
    assert list(tasks[RTE].rows) == [
        data.Row(f"{RTE}-0", "question 0", ("choice 1",), both),
        data.Row(f"{RTE}-1", "question 1", ("choice 0",), both),
        data.Row(f"{RTE}-2", "question 2", ("choice 0",), both),
    ]
    assert tasks[ANLI].rows[0].options == ("choice 0", "choice 1", "choice 2")
    assert tasks[ANLI].rows[0].outputs == ("choice 2",)
    # Prompts are named without _score_eval; all rounds of ANLI have the first one's.
    assert tasks[RTE].instruction == "[MASK] True or False?"
    assert tasks[ANLI].instruction == "Of [MASK] and [MASK]"
    assert [task.rate for task in tasks.values()] == [2.0, 3.0]
    assert data.held_out_splits("p3") == ("validation",)


def test_names_that_seqio_knows(folder: Path) -> None:
    section = make_config(folder).data
    for name, split in p3.MIXTURE_NAMES.items():
        assert p3.register(section, split, BYTES) == name
        assert p3.register(section, split, BYTES) == name  # again is no error
    mixture = seqio.get_mixture_or_task("t0_train")
    assert [task.name for task in mixture.tasks] == [AG, IMDB]
    rows = list(
        seqio.get_mixture_or_task(IMDB)
        .get_dataset({"hyper_inputs": 64, "inputs": 32, "targets": 8}, "train", shuffle=False)
        .as_numpy_iterator()
    )
    assert [BYTES.decode(row["inputs"]) for row in rows] == [f"input {i}" for i in range(10)]
    assert BYTES.decode(rows[0]["hyper_inputs"]) == "How is [MASK]? [COLUMN HEADER]"
    with pytest.raises(UserError, match="split 'test' is unknown; the splits are train, valid"):
        p3.register(section, "test", BYTES)


def test_registration_reads_no_record_and_loading_each_file_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[str] = Counter()
    scan, read = records.scan, records.read

    def count_scan(file: Any, *args: Any) -> Any:
        seen[f"scan {Path(file).name}"] += 1
        return scan(file, *args)

    def count_read(*args: Any) -> bytes:
        seen["read"] += 1
        return read(*args)

    monkeypatch.setattr(records, "scan", count_scan)
    monkeypatch.setattr(records, "read", count_read)
    section = make_config(folder).data
    p3.register(section, "train", BYTES)
    assert not seen
    for _ in range(2):
        tasks = data.load_tasks("p3", section, "train", BYTES)
    assert seen["read"] == 16
    assert sum(seen.values()) == 16 + 3
    # In another process, which has only what is kept on disk, no record is checked again.
    for name in [*seqio.TaskRegistry.names()]:
        if name in (AG, IMDB):
            seqio.TaskRegistry.remove(name)
    section.max_instances_per_task = 3
    tasks = data.load_tasks("p3", section, "train", BYTES)
    assert sum(seen.values()) == 16 + 3
    assert [len(task.rows) for task in tasks] == [3, 3]


def test_rates_are_those_of_t_zero() -> None:
    amazon = [f"amazon_polarity_template_{i}" for i in range(9)]
    examples = dict.fromkeys(amazon, 3_600_000) | {
        "imdb_a": 25_000,
        "imdb_b": 24_000,
        "gigaword_a": 3_803_957,
        "wiki_bio_a": 582_659,
        "wiki_bio_b": 400_000,  # a template that leaves rows out
        "glue_qqp_a": 500_000,
    }
    templates = {"amazon_polarity": 9, "imdb": 2, "gigaword": 9, "wiki_bio": 5, "glue_qqp": 1}
    rates = p3.train_rates(examples, templates)
    assert {rates[name] for name in amazon} == {500_000 // 9} == {55_555}
    assert rates["gigaword_a"] == 55_555  # gigaword_summarize_ counts and is not there
    assert rates["wiki_bio_a"] == rates["wiki_bio_b"] == 100_000
    assert (rates["imdb_a"], rates["imdb_b"]) == (25_000, 24_000)
    assert rates["glue_qqp_a"] == 500_000


def test_datasets_of_task_names() -> None:
    assert len(set(p3.TRAIN_DATASETS)) == 38
    assert p3.dataset_of("cnn_dailymail_3.0.0_news_stock") == "cnn_dailymail_3.0.0"
    assert p3.dataset_of("adversarial_qa_dbert_based_on") == "adversarial_qa_dbert"
    assert p3.dataset_of("super_glue_wsc.fixed_GPT_3_Style_score_eval") == "super_glue_wsc.fixed"
    assert p3.dataset_of("commonsense_qa_question_answering") == ""
    assert p3.dataset_of("wiki_qa") == ""
    assert not set(p3.TRAIN_DATASETS) & set(p3.EVAL_DATASETS)


def test_other_tasks_are_left_out_and_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(folder / "data", "commonsense_qa_x", "train", [train_row(0)])
    write(folder / "data", "gigaword_a", "train", [train_row(0)])
    (folder / "data" / "gigaword_summarize_").mkdir()  # whose cache is broken on the hub
    write(folder / "data", "super_glue_cb_x", "train", [train_row(0)])
    tasks, templates = p3.find_tasks(str(folder), "train")
    assert list(tasks) == [AG, "gigaword_a", IMDB]
    assert templates["gigaword"] == 2
    out = capsys.readouterr().out
    assert "1 task(s), commonsense_qa_x: of no dataset of T0's, left out\n" in out
    assert "cb_x" not in out


def test_templates_that_ask_something_else_are_not_judged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("hellaswag_how_ends", "hellaswag_complete_first_then"):
        write(folder / "data", f"{name}_score_eval", "validation", choices(0, 1))
    tasks, templates = p3.find_tasks(str(folder), "validation")
    assert "hellaswag_complete_first_then_score_eval" in tasks
    assert templates["hellaswag"] == 1
    out = capsys.readouterr().out
    assert "1 task(s), hellaswag_how_ends_score_eval: not its dataset's original task, left" in out


def test_row_limits(folder: Path) -> None:
    tasks = load(folder, max_instances_per_task=4)
    assert [(len(task.rows), task.rate) for task in tasks.values()] == [(4, 4.0), (4, 4.0)]
    numbers = [int(row.id.rpartition("-")[2]) for row in tasks[IMDB].rows]
    assert numbers == sorted(set(numbers)) != [0, 1, 2, 3]
    held_out = load(folder, "validation", max_instances_per_task=2)
    assert [row.id for row in held_out[RTE].rows] == [f"{RTE}-0", f"{RTE}-1"]


@pytest.mark.parametrize("variant", ["", "pos_2"])
def test_episodes_of_examples_alone(folder: Path, variant: str) -> None:
    config = make_config(
        folder, p3_prompts="", use_instruction=False, shots=(2, 2), variant=variant
    )
    tasks = data.load_tasks("p3", config.data, "train", BYTES)
    assert {task.instructions for task in tasks} == {("",)}
    batch = data.EpisodeSampler(tasks, BYTES, config.data, seed=0).batch(0)
    hyper = BYTES.decode(batch["hyper_inputs"][0])
    assert re.fullmatch(r"\nInput: input \d\nOutput: (no|yes)" * 2, hyper)
    asked = [BYTES.decode(ids) for ids in batch["inputs"][0]]
    assert all(re.fullmatch(r"input \d", text) for text in asked)
    assert not any(f"{text}\n" in hyper for text in asked)
    # Of held-out tasks rows that are not asked are shown.
    config.eval.max_rows_per_task, config.eval.shots = 1, 2
    held_out = data.load_tasks("p3", config.data, "validation", BYTES)
    found = {task.name: task for task in data.eval_episodes(held_out, BYTES, config)}
    assert [shown for shown, _ in found[RTE].shown] == ["question 1", "question 2"]


# ---------------------------------------------------------------------------- the prompts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"use_instruction": True},
            r"data\.use_instruction=True asks .*data\.use_instruction=False",
        ),
        ({"variant": "def_pos_2"}, r"data\.variant='def_pos_2' asks .*data\.variant='pos_16'"),
    ],
)
def test_prompts_that_are_not_given(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"{message} to show examples alone") as error:
        p3.register(make_config(folder, p3_prompts="", **fields).data, "train", BYTES)
    assert "data.p3_prompts is empty; give a file of prompts" in str(error.value)


def test_prompts_that_the_file_lacks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "data", "trec_x", "train", [train_row(0)])
    with pytest.raises(UserError, match=r"prompts\.txt: has no prompt of trec_x; add it, or set"):
        load(folder)
    assert list(load(folder, on_missing_task="skip")) == [AG, IMDB]
    assert "1 task(s), trec_x: without a prompt, left out\n" in capsys.readouterr().out
    (folder.parent / "prompts.txt").write_text("a |||| b |||| c\n")
    with pytest.raises(UserError, match="no prompt of ag_news_classify and 2 more"):
        load(folder, on_missing_task="skip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROMPTS + "\na |||| b\nmore\n", r"line 10: an entry must be 'dataset \|\|\|\| templ"),
        (PROMPTS + "\na |||| b |||| \n", r"line 10: an entry must be"),
        (PROMPTS + "\n\n\udcff", r"line 11: not UTF-8"),
    ],
)
def test_prompts_that_are_wrong(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message) as error:
        p3.read_prompts(str(file))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"data\.p3_prompts=.*none: cannot read \(No such file"):
        p3.read_prompts(str(tmp_path / "none"))


def test_prompts_that_are_given_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    stars = "\n" + "*" * 28 + "\n"
    file.write_text(
        stars.join(["trec |||| X-y |||| one", "trec |||| x_Y |||| two", "a|||| b |||| c"])
    )
    assert p3.read_prompts(str(file)) == {"trec_x_y": "two", "a_b": "c"}
    assert "1 name(s), trec_x_y: given twice, the later counts\n" in capsys.readouterr().out


# ------------------------------------------------------------------------- the task's files


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_folders_that_are_not_p3(folder: Path) -> None:
    for p3_dir, message in [
        ("", r"data\.p3_dir is empty"),
        (str(folder / "none"), r"data\.p3_dir=.*none: cannot read the folder \(No such"),
        (str(folder / "data" / AG), "holds no task of a training dataset of T0's"),
    ]:
        with pytest.raises(UserError, match=message):
            p3.find_tasks(p3_dir, "train")
    (folder / "data" / RTE).rename(folder / "x")
    (folder / "data" / ANLI).rename(folder / "y")
    with pytest.raises(UserError, match=r"no task of a held-out dataset \(\*_score_eval\)"):
        p3.find_tasks(str(folder), "validation")


@pytest.mark.parametrize(
    "lost", ["COMPLETED", "info.train.json", "stats.train.json", "train.tfrecord-00000-of-00001"]
)
def test_tasks_that_are_not_whole(
    folder: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data" / AG / lost).unlink()
    shown = re.escape(lost.removesuffix("00001"))
    with pytest.raises(UserError, match=rf"{AG}: lacks {shown}.*data\.on_missing_task='skip'"):
        load(folder)
    assert list(load(folder, on_missing_task="skip")) == [IMDB]
    assert f"1 task(s), {AG}: not whole, left out; the last: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("info", {"num_shards": 2}, r"num_shards is 2, but the names of the files say 1"),
        ("info", {"features": {"inputs": STRING}}, "features lacks inputs_pretokenized"),
        ("info", {"features": []}, "lacks field features"),
        (
            "info",
            {"features": {"inputs_pretokenized": {"dtype": "int32"}}},
            r"features\.inputs_pretokenized has dtype 'int32'; it must be string",
        ),
        ("info", {"features": {"inputs_pretokenized": None}}, "has dtype None"),
        ("stats", {"examples": "6"}, "field examples must be a number of 1 or more, this is '6'"),
        ("stats", {"examples": 0}, "must be a number of 1 or more"),
        ("stats", {"examples": None}, "must be a number of 1 or more"),
        # Cut exactly where a record ends, or files of two runs.
        ("stats", {"examples": 7}, "field examples is 7, but the task's files hold 6 records"),
        ("stats", {"examples": 5}, "field examples is 5, but the task's files hold 6 records"),
    ],
)
def test_info_and_stats_that_do_not_fit(
    folder: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit_json(folder / "data" / AG / f"{file}.train.json", **fields)
    with pytest.raises(UserError, match=rf"{AG}/{file}\.train\.json: .*{message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"{\n", "line 2: not valid JSON"), (b"[]", "one JSON object"), (b"\xff", "not a JSON file")],
)
def test_json_that_is_none(folder: Path, text: bytes, message: str) -> None:
    for name in ("info", "stats"):
        file = folder / "data" / AG / f"{name}.train.json"
        whole = file.read_bytes()
        file.write_bytes(text)
        with pytest.raises(UserError, match=rf"{name}\.train\.json.*{message}"):
            load(folder)
        file.write_bytes(whole)


def test_a_missing_file_of_several(folder: Path) -> None:
    place = folder / "data" / IMDB
    (place / "train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(UserError, match=rf"{IMDB}/train\.tfrecord-00001-of-00002: missing; copy"):
        load(folder)
    task = load(folder, on_bad_row="skip")[IMDB]
    assert len(task.rows) == 7
    assert task.skipped == {f"{IMDB}, lost with train.tfrecord-00001-of-00002": 3}
    (place / "train.tfrecord-00003-of-00004").touch()
    with pytest.raises(
        UserError, match=r"00000-of-00002 and train.*00003-of-00004 are of two runs"
    ):
        load(folder)
    (place / "train.tfrecord-00003-of-00004").rename(place / "train.tfrecord-00002-of-00002")
    with pytest.raises(UserError, match="00002-of-00002 has a number that is too high"):
        load(folder)


# ---------------------------------------------------------------------------- bad records

BAD_TRAIN = [
    (train_row(1) | {"inputs_pretokenized": []}, "inputs_pretokenized", "holds 0 texts; it must"),
    (train_row(1, inputs_pretokenized=["a", "b"]), "inputs_pretokenized", "holds 2 texts"),
    (train_row(1, inputs_pretokenized=[1]), "inputs_pretokenized", "holds 1 numbers"),
    (train_row(1, targets_pretokenized=[b"\xff"]), "targets_pretokenized", "is not UTF-8"),
    (train_row(1, targets_pretokenized=[0.5]), "targets_pretokenized", "holds 1 numbers"),
    (train_row(1, answer_choices=[b"\xff"]), "answer_choices", "is not UTF-8"),
    (train_row(1, answer_choices=[1, 2]), "answer_choices", "holds numbers"),
    ({"other": ["x"]}, "inputs_pretokenized", "holds 0 texts"),
    (b"\x0a\xff", "record", "is no tf.train.Example"),
]


@pytest.mark.parametrize(("row", "field", "message"), BAD_TRAIN)
def test_bad_training_records(folder: Path, row: Any, field: str, message: str) -> None:
    write(folder / "data", AG, "train", [train_row(0), train_row(1), row, train_row(3)])
    at = rf"{AG}/train\.tfrecord-00000-of-00001, record 2: field {field} {message}"
    with pytest.raises(UserError, match=f"{at}.*data.on_bad_row='skip'") as error:
        load(folder)
    assert "\n" not in str(error.value)
    for _ in range(2):  # found, and then remembered
        task = load(folder, on_bad_row="skip")[AG]
        assert [row.input for row in task.rows] == ["input 0", "input 1", "input 3"]
        assert task.rows[2].id == f"{AG}-3"
        assert task.skipped == {field: 1}
        seqio.TaskRegistry.remove(AG)


def test_no_usable_row(folder: Path) -> None:
    write(folder / "data", AG, "train", [{"other": ["x"]}])
    with pytest.raises(UserError, match=f"{AG}: holds no usable row"):
        load(folder, on_bad_row="skip")


def test_empty_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder / "data", AG, "train", [train_row(0), train_row(1, targets_pretokenized=[" \n"])])
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(UserError, match=r"record 1: field targets_.* is empty; .*'keep'"):
            load(folder, on_bad_row=on_bad_row)
        task = load(folder, empty_targets="skip", on_bad_row=on_bad_row)[AG]
        assert len(task.rows) == 1
        assert task.skipped == {"targets_pretokenized, empty output": 1}
    assert "t0_train: 1 bad rows of targets_pretokenized, empty output" in capsys.readouterr().out
    kept = load(folder, empty_targets="keep")[AG]
    assert kept.rows[1].outputs == ("",)
    assert not kept.skipped


def test_answer_choices(folder: Path) -> None:
    rows = [
        train_row(1, targets_pretokenized=[" yes\n"], answer_choices=[" no", " yes", "yes"]),
        train_row(1, targets_pretokenized=["maybe"]),
        train_row(1, answer_choices=[]),
    ]
    place = write(folder / "data", AG, "train", rows)
    found = [(row.outputs, row.options) for row in load(folder)[AG].rows]
    # Without white space and repetition; and none where the target is not one of them.
    assert found == [(("yes",), ("no", "yes")), (("maybe",), ()), (("yes",), ())]
    # What info does not name is not read.
    edit_json(place / "info.train.json", features=dict.fromkeys(p3.EVAL_FIELDS[:2], STRING))
    assert not any(row.options for row in load(folder)[AG].rows)


def bad_choice(**fields: Value) -> list[dict[str, Value]]:
    first, second = choices(1, 0)
    return [*choices(0, 1), first, second | fields, *choices(2, 0)]


@pytest.mark.parametrize(
    ("rows", "at", "message", "skipped"),
    [
        (bad_choice(idx=[1]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (bad_choice(idx=["1", "1"]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (bad_choice(idx=[1, -1]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (bad_choice(idx=[1, 0]), "record 3", r"idx is \[1, 0\], as in an earlier", {"idx": 2}),
        (bad_choice(idx=[1, 2]), "row 1", "idx has no choice 1", {"idx": 2}),
        (
            bad_choice(is_correct=[2]),
            "record 3",
            "is_correct must hold 0 or 1",
            {"is_correct": 1, "idx": 1},
        ),
        (
            bad_choice(is_correct=[]),
            "record 3",
            "is_correct must hold 0 or 1",
            {"is_correct": 1, "idx": 1},
        ),
        (
            bad_choice(inputs_pretokenized=["other"]),
            "record 3",
            "inputs_pretokenized is not that of the other choices of row 1",
            {"inputs_pretokenized": 1, "idx": 1},
        ),
        (
            [*choices(0, 1), *choices(1, -1), *choices(2, 0)],
            "row 1",
            "is_correct is set in no choice",
            {"is_correct": 2},
        ),
        (
            [*choices(0, 1), b"\x0a\xff", choices(1, 0)[1], *choices(2, 0)],
            "record 2",
            "record is no tf.train.Example",
            {"record": 1, "idx": 1},
        ),
    ],
)
def test_bad_held_out_records(
    folder: Path, rows: list[Any], at: str, message: str, skipped: dict[str, int]
) -> None:
    rows = [*rows, *choices(3, 0)]
    write(folder / "data", RTE, "validation", rows[:3], rows[3:])
    # Records are numbered in their file; the bad one is the first of the second.
    place = "00001-of-00002, record 0" if at == "record 3" else at
    with pytest.raises(UserError, match=f"{RTE}.*{place}.*: field {message}.*on_bad_row") as error:
        load(folder, "validation")
    assert "\n" not in str(error.value)
    task = load(folder, "validation", on_bad_row="skip")[RTE]
    assert [row.id for row in task.rows] == [f"{RTE}-0", f"{RTE}-2", f"{RTE}-3"]
    assert task.skipped == skipped
    assert sum(len(row.options) for row in task.rows) + sum(skipped.values()) == 8


def test_rows_whose_last_choices_may_be_lost(folder: Path) -> None:
    """That of row 1 two choices of three are there shows in no record."""
    rows = [record for row in range(5) for record in choices(row, 0, 3)]
    del rows[5]
    place = write(folder / "data", RTE, "validation", rows)
    whole = load(folder, "validation")[RTE]  # nothing is lost: a row may have two choices
    assert [len(row.options) for row in whole.rows] == [3, 2, 3, 3, 3]
    edit_json(place / "stats.validation.json", examples=15)
    task = load(folder, "validation", on_bad_row="skip")[RTE]
    assert [row.id for row in task.rows] == [f"{RTE}-{i}" for i in (0, 2, 3, 4)]
    assert task.skipped == {"idx": 2, f"{RTE}, lost with the end of a file": 1}
    # All may be incomplete: 4 rows with a choice more each are no more than 16 records.
    edit_json(place / "stats.validation.json", examples=16)
    with pytest.raises(UserError, match=f"{RTE}: of 16 records only 12 are in rows that lack non"):
        load(folder, "validation", on_bad_row="skip")


# ------------------------------------------------------------------------------ fuzzing

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=6),
    shards=st.integers(1, 3),
)
def test_any_text_comes_back(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], shards: int
) -> None:
    made = [
        train_row(0, inputs_pretokenized=[text], targets_pretokenized=[target], answer_choices=list)
        for text, target, list in rows
    ]
    place = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    write(place, "trec_x", "train", *(made[i::shards] for i in range(shards)))
    tasks, _ = p3.find_tasks(str(place), "train")
    policy = p3.Policy(empty_targets="keep", cache_dir=str(tmp_path / "cache"))
    found = p3.read_train_task(tasks["trec_x"], policy).rows
    want = [row for i in range(shards) for row in rows[i::shards]]
    assert [(row.input, row.outputs[0]) for row in found] == [(a, b.strip()) for a, b, _ in want]
    for row, (_, target, options) in zip(found, want, strict=True):
        stripped = [option.strip() for option in options]
        assert row.options == (tuple(dict.fromkeys(stripped)) if target.strip() in stripped else ())


@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    split=st.sampled_from(["train", "validation"]),
    damage=st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "lose"]), st.integers(0, 10**6)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_files_are_user_errors_and_rows_add_up(
    tmp_path: Path, split: str, damage: list[tuple[str, int]]
) -> None:
    number = len(list(tmp_path.iterdir()))
    name = "trec_x" if split == "train" else RTE
    rows = [train_row(i) for i in range(9)]
    if split == "validation":
        rows = [record for i in range(10) for record in choices(i, i % 2)]
    place = write(tmp_path / str(number), name, split, rows[:5], rows[5:])
    whole = {file.name: file.read_bytes() for file in place.glob("*tfrecord*")}
    shards = sorted(whole)
    for kind, where in damage:
        file = place / shards[where % 2]
        raw = bytearray(file.read_bytes()) if file.exists() else bytearray()
        if kind == "flip" and raw:
            raw[where // 2 % len(raw)] ^= 1 << where % 8
        elif kind == "cut":
            raw = raw[: where // 2 % (len(raw) + 1)]
        if kind == "lose" and len(list(place.glob("*tfrecord*"))) > 1:
            file.unlink(missing_ok=True)
        elif file.exists():
            file.write_bytes(raw)
    same = all((place / n).exists() and (place / n).read_bytes() == whole[n] for n in whole)
    tasks, _ = p3.find_tasks(str(tmp_path / str(number)), split)
    read = p3.read_train_task if split == "train" else p3.read_eval_task
    cache = str(tmp_path / "cache")
    if same:  # two flips of one bit
        assert not read(tasks[name], p3.Policy(cache_dir=cache)).skipped
        return
    with pytest.raises(UserError) as error:
        read(tasks[name], p3.Policy(cache_dir=cache))
    assert "\n" not in str(error.value)
    try:
        found = read(tasks[name], p3.Policy(on_bad_row="skip", cache_dir=cache))
    except UserError as error:
        if not re.search("holds no usable row|too few to tell how many choices", str(error)):
            raise
        return
    kept = list(found.rows)
    unit = 1 if split == "train" else 2  # records of a row
    assert len(kept) * unit + sum(found.skipped.values()) == len(rows)
    want = (
        {(f"input {i}", ("no", "yes")[i % 2]) for i in range(9)}
        if split == "train"
        else {(f"question {i}", f"choice {i % 2}") for i in range(10)}
    )
    assert {(row.input, row.outputs[0]) for row in kept} <= want
    assert all(len(row.options) == 2 for row in kept)


def test_files_that_change_while_they_are_read(folder: Path) -> None:
    rows = load(folder)[AG].rows
    file = folder / "data" / AG / "train.tfrecord-00000-of-00001"
    raw = bytearray(file.read_bytes())
    raw[20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="damaged or not where it was; has the file changed"):
        list(rows)


# ------------------------------------------------------------------------- the real data


def test_real_tasks_when_at_hand(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "p3"
    for name in (
        "rotten_tomatoes_Movie_Expressed_Sentiment",
        "super_glue_cb_can_we_infer_score_eval",
        "anli_GPT_3_style_r2_score_eval",
    ):
        shutil.copytree(real_data("p3") / "data" / name, root / "data" / name)
    prompts = real_data("p3") / "meta" / "hint_all_edited_prompts.txt"
    fields = {"p3_prompts": str(prompts), "cache_dir": str(tmp_path / "cache")}
    (train,) = load(root, **fields).values()
    assert len(train.rows) == 200
    assert Counter(row.outputs[0] for row in train.rows).keys() == {"positive", "negative"}
    assert all(set(row.options) == {"positive", "negative"} for row in train.rows)
    assert "[MASK]" in train.instruction
    assert len(p3.read_prompts(str(prompts))) == 399
    held_out = load(root, "validation", **fields)
    cb = held_out["super_glue_cb_can_we_infer_score_eval"].rows
    assert len(cb) == 56
    # CB's validation: 28 contradictions, 23 entailments, 5 neutral.
    answers = Counter(row.outputs[0] for row in cb)
    assert sorted(answers.values()) == [5, 23, 28]
    assert all(len(row.options) == 3 for row in cb)
    anli = held_out["anli_GPT_3_style_r2_score_eval"]
    assert len(anli.rows) == 300
    assert np.mean([len(row.outputs) for row in anli.rows]) == 1
    assert "[MASK]" in anli.instruction
