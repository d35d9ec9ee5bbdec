"""P3's mixtures: which tasks they have, their rates, their prompts, and their SeqIO Tasks."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hyper_t5 import pipeline
from hyper_t5.data import tfrecord
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.task_rows import TaskRow
from hyper_t5.tasks import p3
from hyper_t5.tasks.p3_prompts import read_prompts
from hyper_t5.tasks.seqio_tasks import seqio
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.p3_cache import (
    AG,
    ANLI,
    IMDB,
    RTE,
    choices,
    load,
    make_config,
    train_record,
    write_folder,
    write_task,
)
from tests.support.toy_tasks import BYTES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


# ------------------------------------------------------------------------------- tasks


def test_training_tasks(folder: Path) -> None:
    tasks = load(folder)
    assert [(t.name, len(t.rows), t.rate, t.category) for t in tasks.values()] == [
        (AG, 6, 6.0, "ag_news"),
        (IMDB, 10, 10.0, "imdb"),
    ]
    # The last row of the first shard and the first of the second.
    assert [tasks[IMDB].rows[i] for i in (6, 7)] == [
        TaskRow(f"{IMDB}-6", "input 6", ("no",), ("no", "yes")),
        TaskRow(f"{IMDB}-7", "input 7", ("yes",), ("no", "yes")),
    ]
    assert [row.input for row in tasks[IMDB].rows] == [f"input {i}" for i in range(10)]
    # Fields are masked as in HINT's code: names without a space.
    assert tasks[AG].instructions == ("[MASK]\nWhat label best describes it?",)
    assert tasks[IMDB].instructions == ("How is [MASK]? [COLUMN HEADER]",)
    assert not any(task.examples or task.skipped for task in tasks.values())
    subfolder = load(folder / "data", p3_prompts=str(folder.parent / "prompts.txt"))
    assert [list(t.rows) for t in subfolder.values()] == [list(t.rows) for t in tasks.values()]


def test_held_out_tasks(folder: Path) -> None:
    tasks = load(folder, "validation")
    assert list(tasks) == [ANLI, RTE]
    both = ("choice 0", "choice 1")
    assert list(tasks[RTE].rows) == [
        TaskRow(f"{RTE}-0", "question 0", ("choice 1",), both),
        TaskRow(f"{RTE}-1", "question 1", ("choice 0",), both),
        TaskRow(f"{RTE}-2", "question 2", ("choice 0",), both),
    ]
    assert tasks[ANLI].rows[0].options == ("choice 0", "choice 1", "choice 2")
    assert tasks[ANLI].rows[0].outputs == ("choice 2",)
    # Prompts are named without _score_eval; all rounds of ANLI have the first one's.
    assert tasks[RTE].instruction == "[MASK] True or False?"
    assert tasks[ANLI].instruction == "Of [MASK] and [MASK]"
    assert [task.rate for task in tasks.values()] == [2.0, 3.0]
    assert pipeline.held_out_splits("p3") == ("validation",)


def test_row_limits(folder: Path) -> None:
    tasks = load(folder, max_instances_per_task=4)
    assert [(len(task.rows), task.rate) for task in tasks.values()] == [(4, 4.0), (4, 4.0)]
    numbers = [int(row.id.rpartition("-")[2]) for row in tasks[IMDB].rows]
    assert numbers == sorted(set(numbers)) != [0, 1, 2, 3]
    held_out = load(folder, "validation", max_instances_per_task=2)
    assert [row.id for row in held_out[RTE].rows] == [f"{RTE}-0", f"{RTE}-1"]


def test_tasks_outside_the_mixture_are_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("commonsense_qa_x", "gigaword_a", "super_glue_cb_x"):
        write_task(folder / "data", name, "train", [train_record(0)])
    (folder / "data" / "gigaword_summarize_").mkdir()  # its cache is broken on the hub
    tasks, templates = p3.find_tasks(str(folder), "train")
    assert list(tasks) == [AG, "gigaword_a", IMDB]
    assert templates["gigaword"] == 2
    out = capsys.readouterr().out
    assert "skips 1 task(s), commonsense_qa_x: not of T0's datasets\n" in out
    assert "cb_x" not in out
    for name in ("hellaswag_how_ends", "hellaswag_complete_first_then"):
        write_task(folder / "data", f"{name}_score_eval", "validation", choices(0, 1))
    tasks, templates = p3.find_tasks(str(folder), "validation")
    assert "hellaswag_complete_first_then_score_eval" in tasks
    assert templates["hellaswag"] == 1
    message = "1 task(s), hellaswag_how_ends_score_eval: not the original task of the dataset\n"
    assert message in capsys.readouterr().out


def test_folders_without_tasks_are_refused(folder: Path) -> None:
    for p3_dir, message in [
        ("", r"data\.p3_dir is empty"),
        (str(folder / "none"), r"data\.p3_dir=.*none: cannot read the folder \(No such"),
        (str(folder / "data" / AG), "holds no task of a training dataset of T0's"),
    ]:
        with pytest.raises(UserError, match=message):
            p3.find_tasks(p3_dir, "train")
    with pytest.raises(UserError, match="split 'test' is unknown; the splits are train, valid"):
        p3.find_tasks(str(folder), "test")
    (folder / "data" / RTE).rename(folder / "x")
    (folder / "data" / ANLI).rename(folder / "y")
    with pytest.raises(UserError, match=r"no task of a held-out dataset \(\*_score_eval\)"):
        p3.find_tasks(str(folder), "validation")


# ------------------------------------------------------------------------------- rates


def test_rates_are_those_of_t_zero() -> None:
    amazon = [f"amazon_polarity_template_{i}" for i in range(9)]
    examples = dict.fromkeys(amazon, 3_600_000) | {
        "imdb_a": 25_000,
        "imdb_b": 24_000,
        "gigaword_a": 3_803_957,
        "wiki_bio_a": 582_659,
        "wiki_bio_b": 400_000,  # a template that skips rows
        "glue_qqp_a": 500_000,
    }
    templates = {"amazon_polarity": 9, "imdb": 2, "gigaword": 9, "wiki_bio": 5, "glue_qqp": 1}
    rates = p3.train_rates(examples, templates)
    assert {rates[name] for name in amazon} == {500_000 // 9} == {55_555}
    assert rates["gigaword_a"] == 55_555  # gigaword_summarize_ counts as a template
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


# ------------------------------------------------------------------------------- SeqIO


def test_mixtures_have_the_names_of_t_zero(folder: Path) -> None:
    section = make_config(folder, shots=(0, 0)).data
    for split, name in p3.MIXTURE_NAMES.items():
        for _ in range(2):
            assert tiny_runs.register("p3", section, split, BYTES) == name
    assert [task.name for task in seqio.get_mixture_or_task("t0_train").tasks] == [AG, IMDB]
    lengths = {"hyper_inputs": 64, "inputs": 32, "targets": 8}
    dataset = seqio.get_mixture_or_task(IMDB).get_dataset(lengths, "train", shuffle=False)
    rows = list(dataset.as_numpy_iterator())
    assert [BYTES.decode(row["inputs"]) for row in rows] == [f"input {i}" for i in range(10)]
    assert BYTES.decode(rows[0]["hyper_inputs"]) == "How is [MASK]? [COLUMN HEADER]"


def test_registration_reads_no_record_and_loading_each_file_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    scan, read = tfrecord.scan, tfrecord.read

    def counted_scan(file: Any, *args: Any) -> Any:
        calls[f"scan {Path(file).name}"] += 1
        return scan(file, *args)

    def counted_read(*args: Any) -> bytes:
        calls["read"] += 1
        return read(*args)

    monkeypatch.setattr(tfrecord, "scan", counted_scan)
    monkeypatch.setattr(tfrecord, "read", counted_read)
    section = make_config(folder).data
    tiny_runs.register("p3", section, "train", BYTES)
    assert not calls
    for _ in range(2):
        pipeline.load_tasks("p3", section, "train", BYTES)
    assert calls["read"] == 16
    assert calls.total() == 16 + 3
    # Another process has the cache on disk alone, and validates no record again.
    for name in (AG, IMDB):
        seqio.TaskRegistry.remove(name)
    section.max_instances_per_task = 3
    tasks = pipeline.load_tasks("p3", section, "train", BYTES)
    assert calls.total() == 16 + 3
    assert [len(task.rows) for task in tasks] == [3, 3]


@pytest.mark.parametrize("variant", ["", "pos_2"])
def test_tasks_can_be_conditioned_on_examples_alone(folder: Path, variant: str) -> None:
    config = make_config(
        folder, p3_prompts="", use_instruction=False, shots=(2, 2), variant=variant
    )
    tasks = pipeline.load_tasks("p3", config.data, "train", BYTES)
    assert {task.instructions for task in tasks} == {("",)}
    batch = EpisodeSampler(tasks, BYTES, config.data, seed=0).batch(0)
    text = BYTES.decode(batch["hyper_inputs"][0])
    assert re.fullmatch(r"\nInput: input \d\nOutput: (no|yes)" * 2, text)
    inputs = [BYTES.decode(ids) for ids in batch["inputs"][0]]
    assert all(re.fullmatch(r"input \d", row) for row in inputs)
    assert not any(f"{row}\n" in text for row in inputs)
    # Held-out tasks show rows that are not evaluated.
    config.eval.max_rows_per_task, config.eval.shots = 1, 2
    held_out = pipeline.load_tasks("p3", config.data, "validation", BYTES)
    eval_tasks = {task.name: task for task in build_eval_tasks(held_out, BYTES, config)}
    assert [text for text, _ in eval_tasks[RTE].shown] == ["question 1", "question 2"]


# ------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"use_instruction": True}, "data.use_instruction=False"),
        ({"variant": "def_pos_2"}, "data.variant='pos_16'"),
    ],
)
def test_instructions_need_a_file_of_prompts(
    folder: Path, fields: dict[str, Any], remedy: str
) -> None:
    setting = "=".join(str(part) for part in next(iter(fields.items())))
    setting = setting.replace("def_pos_2", "'def_pos_2'")
    message = f"p3: data.{setting} needs instructions, and data.p3_prompts is empty; .* or set"
    with pytest.raises(UserError, match=f"{message} {remedy} to condition on examples alone"):
        tiny_runs.register("p3", make_config(folder, p3_prompts="", **fields).data, "train", BYTES)


def test_every_task_needs_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(folder / "data", "trec_x", "train", [train_record(0)])
    with pytest.raises(UserError, match=r"prompts\.txt: has no prompt of trec_x; add it, or set"):
        load(folder)
    assert list(load(folder, on_missing_task="skip")) == [AG, IMDB]
    assert "skips 1 task(s), trec_x: without a prompt\n" in capsys.readouterr().out
    (folder.parent / "prompts.txt").write_text("a |||| b |||| c\n")
    with pytest.raises(UserError, match="no prompt of ag_news_classify and 2 more"):
        load(folder, on_missing_task="skip")


# ------------------------------------------------------------------------------- official files


def test_official_tasks(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    root = tmp_path / "p3"
    for name in (
        "rotten_tomatoes_Movie_Expressed_Sentiment",
        "super_glue_cb_can_we_infer_score_eval",
        "anli_GPT_3_style_r2_score_eval",
    ):
        shutil.copytree(real_data("p3") / "data" / name, root / "data" / name)
    prompts = real_data("p3") / "meta" / "hint_all_edited_prompts.txt"
    [train] = load(root, p3_prompts=str(prompts)).values()
    assert len(train.rows) == 200
    assert {row.outputs[0] for row in train.rows} == {"positive", "negative"}
    assert all(set(row.options) == {"positive", "negative"} for row in train.rows)
    assert "[MASK]" in train.instruction
    assert len(read_prompts(str(prompts))) == 399
    held_out = load(root, "validation", p3_prompts=str(prompts))
    cb = held_out["super_glue_cb_can_we_infer_score_eval"].rows
    # CB's validation: 28 contradictions, 23 entailments, 5 neutral.
    assert sorted(Counter(row.outputs[0] for row in cb).values()) == [5, 23, 28]
    assert all(len(row.options) == 3 for row in cb)
    anli = held_out["anli_GPT_3_style_r2_score_eval"]
    assert len(anli.rows) == 300
    assert np.mean([len(row.outputs) for row in anli.rows]) == 1
    assert "[MASK]" in anli.instruction
