"""From a config to tasks and batches: mixture names, stage 'peft', prefetching."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from hyper_t5 import pipeline
from hyper_t5.data.batch import FUSION
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.tasks import MIXTURES, Dataset
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import BYTES, make_config, sni_object, write_sni


@pytest.fixture
def sni_dir(tmp_path: Path) -> Path:
    """Three training tasks with 30 rows and one held-out task with 12."""
    rows = {
        "train": dict.fromkeys(("task1_a", "task2_b-c", "task3_d"), 30),
        "test": {"task4_e": 12},
    }
    splits = {
        split: {name: sni_object(name, count) for name, count in tasks.items()}
        for split, tasks in rows.items()
    }
    return write_sni(tmp_path / "sni", splits)


# ------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sni", ("sni", "train", {})),
        ("sni_test", ("sni", "test", {})),
        ("synthetic_unseen_wordings", ("synthetic", "unseen_wordings", {})),
        ("extractive_qa_validation", ("extractive_qa", "validation", {})),
        ("t0_eval_score_eval", ("p3", "validation", {})),
        ("metaicl_x_test_13", ("metaicl", "test_13", {"data.metaicl_setting": "x"})),
        ("outside", ("outside", "train", {})),
        ("outside_dev", ("outside", "dev", {})),
        ("alias_dev", ("outside", "dev", {})),
        ("parsed_5", ("outside", "dev", {"data.shots": (5, 5)})),
    ],
)
def test_a_mixture_has_several_names(
    name: str, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"data.shots": (5, 5)}
    outside = Dataset(
        lambda *_: pytest.fail("rows are not needed"),
        splits=("train", "dev"),
        aliases={"alias_dev": "dev"},
        parse_name=lambda name: ("dev", fields) if name == "parsed_5" else None,
    )
    monkeypatch.setitem(MIXTURES, "outside", outside)
    assert pipeline.find_mixture(name) == expected


def test_the_nearest_name_is_suggested() -> None:
    with pytest.raises(UserError, match=r"unknown mixture 'sni_tset', the nearest is 'sni_test'"):
        pipeline.find_mixture("sni_tset")
    with pytest.raises(UserError, match=r"unknown data.mixture 'sn', the nearest is 'sni'"):
        pipeline.load_tasks("sn", make_config().data, "train", BYTES)
    with pytest.raises(UserError, match=r"data\.vocab is empty"):
        pipeline.mixture_vocab(make_config(vocab="").data)


# ------------------------------------------------------------------------------- stage 'peft'


def peft_config(**fields: Any) -> ConfigDict:
    config = make_config(**fields)
    config.stage = "peft"
    return config


@pytest.mark.parametrize(
    ("limit", "numbers"),
    [(0, (5, 6, 7, 8, 10, 11)), (3, (5, 6, 7)), (40, (5, 6, 7, 8, 10, 11))],
)
def test_peft_trains_on_the_rows_that_are_not_evaluated(
    limit: int, numbers: tuple[int, ...], sni_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = sni_object("task4_e", rows=12)
    raw["Instances"][9]["input"] = " task4_e  row 0"  # evaluated, with other whitespace
    (sni_dir / "tasks" / "task4_e.json").write_text(json.dumps(raw))
    config = peft_config(sni_dir=str(sni_dir), max_instances_per_task=limit)
    [whole] = pipeline.load_tasks("sni", config.data, "test", BYTES)
    load = pipeline.load_tasks
    monkeypatch.setattr(
        pipeline, "load_tasks", lambda *args: [replace(task, rate=12.0) for task in load(*args)]
    )
    [task] = pipeline.load_peft_tasks(config, BYTES)
    assert [row.id for row in task.rows] == [f"task4_e-row-{i}" for i in numbers]
    assert (task.name, task.examples, task.rate) == ("task4_e", whole.examples, 1.0)
    assert config.data.max_instances_per_task == limit
    sampler = pipeline.make_sampler(config, BYTES)
    assert sampler.names == ("task4_e",)
    inputs = {
        BYTES.decode(row)
        for step in range(20)
        for row in sampler.batch(step)["inputs"].reshape(-1, 24)
    }
    assert inputs == {f"task4_e row {i}" for i in numbers}


@pytest.mark.parametrize("limit", [0, 10])
def test_peft_never_trains_on_evaluated_rows_of_any_split(sni_dir: Path, limit: int) -> None:
    config = peft_config(sni_dir=str(sni_dir), max_instances_per_task=limit)
    config.eval.split = "train"
    loaded = pipeline.load_eval_tasks(config, "sni", "train", BYTES)
    eval_tasks = build_eval_tasks(loaded, BYTES, config)
    tasks = pipeline.load_peft_tasks(config, BYTES)
    assert [task.name for task in tasks] == [task.name for task in eval_tasks]
    for task, eval_task in zip(tasks, eval_tasks, strict=True):
        assert len(eval_task.ids) == 5
        assert len(task.rows) == (limit or 25)
        assert not {row.id for row in task.rows} & set(eval_task.ids)


def test_peft_on_the_embedded_suite() -> None:
    config = peft_config(vocab="", mixture="synthetic", max_instances_per_task=4)
    vocab = pipeline.mixture_vocab(config.data)
    config.eval.max_rows_per_task = 90
    tasks = pipeline.load_peft_tasks(config, vocab)
    assert {tuple(row.id for row in task.rows) for task in tasks} == {("90", "91", "92", "93")}
    assert {len(task.examples) for task in tasks} == {8}
    splits = pipeline.held_out_splits("synthetic")
    assert pipeline.eval_splits(config) == dict.fromkeys(splits, "synthetic")
    assert len(tasks) == 48
    config.data.mixture, config.eval.mixture, config.eval.split = "sni", "synthetic", splits[1]
    sampler = pipeline.make_sampler(config, vocab, FUSION)
    assert sampler.names == tuple(task.name for task in tasks[24:])
    assert sampler.batch(0)["targets"].any()


def test_peft_without_rows_is_refused(sni_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft_config(sni_dir=str(sni_dir))
    for most, message in [
        (0, r"eval\.max_rows_per_task=0 evaluates every row"),
        (12, r"task task4_e of split test: all its 12 rows .*; lower eval\.max_rows_per_task=12"),
    ]:
        config.eval.max_rows_per_task = most
        with pytest.raises(UserError, match=message):
            pipeline.make_sampler(config, BYTES)
    config.eval.max_rows_per_task = 5
    two_splits = replace(MIXTURES["sni"], held_out=("test", "dev"))
    monkeypatch.setitem(MIXTURES, "sni", two_splits)
    (sni_dir / "splits" / "default" / "dev_tasks.txt").write_text("task4_e\n")
    with pytest.raises(UserError, match=r"two splits of sni have a task task4_e.*eval\.split"):
        pipeline.load_peft_tasks(config, BYTES)


# ------------------------------------------------------------------------------- prefetching


def test_prefetch_keeps_order_raises_errors_and_stops() -> None:
    def failing() -> Iterator[int]:
        yield from range(5)
        raise UserError("the sixth")

    stream = pipeline.prefetch(failing())
    assert list(itertools.islice(stream, 5)) == list(range(5))
    with pytest.raises(UserError, match="the sixth"):
        next(stream)
    assert list(pipeline.prefetch(iter("abc"))) == list("abc")
    before = threading.active_count()
    stream = pipeline.prefetch(itertools.count())
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
