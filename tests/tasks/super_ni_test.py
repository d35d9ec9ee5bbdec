"""Super-NaturalInstructions: splits, rates and row limits, and its SeqIO Tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hyper_t5 import pipeline
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.eval_tasks import build_eval_tasks
from hyper_t5.data.vocab import load_vocab
from hyper_t5.tasks import seqio_tasks
from hyper_t5.tasks.seqio_tasks import seqio
from hyper_t5.tasks.super_ni import sni_tasks
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs
from tests.support.toy_tasks import BYTES, assert_seqio_reads, make_config, sni_object, write_sni


@pytest.fixture
def sni_dir(tmp_path: Path) -> Path:
    splits = {"train": ["task1_a", "task2_b-c", "task3_d"], "test": ["task4_e"]}
    objects = {split: {name: sni_object(name) for name in names} for split, names in splits.items()}
    return write_sni(tmp_path / "sni", objects)


# ------------------------------------------------------------------------------- SeqIO


def test_seqio_tasks_have_the_ids_of_evaluation(sni_dir: Path) -> None:
    config = make_config(sni_dir=str(sni_dir))
    for _ in range(2):  # registering again does nothing
        for split in ("test", "train"):
            assert tiny_runs.register("sni", config.data, split, BYTES) == f"sni_{split}"
    mixture = seqio.get_mixture_or_task("sni_train")
    assert {task.name for task in mixture.tasks} == {
        *("sni_task1_a", "sni_task2_b_c", "sni_task3_d")
    }
    tasks = pipeline.load_tasks("sni", config.data, "test", BYTES)
    assert [(task.name, task.rate) for task in tasks] == [("task4_e", 1.0)]
    for hyper_length in (160, 60):  # both examples, one dropped
        config.data.hyper_length = hyper_length
        [task] = build_eval_tasks(tasks, BYTES, config)
        assert len(assert_seqio_reads("sni_task4_e", "test", task, config)) == 5
    lengths = {"hyper_inputs": 60, "inputs": 24, "targets": 12}
    dataset = mixture.get_dataset(lengths, split="train", shuffle=False, num_epochs=1)
    assert set(next(dataset.as_numpy_iterator())) >= {"hyper_inputs", "inputs", "targets"}


def test_registering_another_folder_replaces_the_tasks(sni_dir: Path) -> None:
    raw = sni_object("task4_e", rows=2)
    config = make_config(sni_dir=str(sni_dir)).data
    pipeline.load_tasks("sni", config, "test", BYTES)
    tasks = sni_tasks("sni", "test", {"task4_e": raw}, config)
    assert seqio_tasks.register(tasks, config, "test", BYTES) == "sni_test"
    source = seqio.get_mixture_or_task("sni_task4_e").source
    assert len(source.task_rows().rows) == 2
    with pytest.raises(UserError, match="has no tasks"):
        sni_tasks("sni", "test", {}, config)
    same_name = sni_tasks("sni", "test", {"a-b": raw, "a_b": raw}, config)
    with pytest.raises(UserError, match="become sni_a_b"):
        seqio_tasks.register(same_name, config, "test", BYTES)


# ------------------------------------------------------------------------------- splits


def test_max_instances_limits_rows_and_rates(sni_dir: Path) -> None:
    config = make_config(sni_dir=str(sni_dir), max_instances_per_task=5).data
    path = sni_dir / "tasks" / "task3_d.json"
    path.write_text(json.dumps(sni_object("task3_d", rows=3)))
    tasks = {task.name: task for task in pipeline.load_tasks("sni", config, "train", BYTES)}
    assert {name: (len(t.rows), t.rate) for name, t in tasks.items()} == {
        "task1_a": (5, 5.0),
        "task2_b-c": (5, 5.0),
        "task3_d": (3, 3.0),
    }
    numbers = [row.id[-1] for row in tasks["task1_a"].rows]
    assert numbers == sorted(numbers) != list("01234"), "not a random choice"
    [test] = pipeline.load_tasks("sni", config, "test", BYTES)
    assert [row.id[-1] for row in test.rows] == list("01234")


def test_skipped_rows_are_printed(sni_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = sni_object("task4_e")
    del raw["Instances"][1]["output"]
    (sni_dir / "tasks" / "task4_e.json").write_text(json.dumps(raw))
    config = make_config(sni_dir=str(sni_dir), on_bad_row="skip").data
    pipeline.load_tasks("sni", config, "test", BYTES)
    assert "sni_test: 1 bad rows of Instances skipped" in capsys.readouterr().out


def test_invalid_splits_are_refused(sni_dir: Path) -> None:
    config = make_config(sni_dir=str(sni_dir)).data
    listing = sni_dir / "splits" / "default" / "train_tasks.txt"

    def assert_refused(message: str, split: str = "train") -> None:
        with pytest.raises(UserError, match=message):
            pipeline.load_tasks("sni", config, split, BYTES)

    (sni_dir / "tasks" / "task3_d.json").unlink()
    assert_refused(r"train_tasks\.txt: names task3_d, .*on_missing_task")
    config.on_missing_task = "skip"
    assert len(pipeline.load_tasks("sni", config, "train", BYTES)) == 2
    listing.write_text("task3_d\n")
    assert_refused(r"train_tasks\.txt: none of its 1 tasks")
    listing.write_text("\n")
    assert_refused(r"train_tasks\.txt: the list is empty")
    assert_refused(r"dev_tasks\.txt: no such split", "dev")
    config.sni_dir = ""
    assert_refused(r"data\.sni_dir is empty")


def test_official_files(shared_dir: Path, real_data: Callable[[str], Path]) -> None:
    config = make_config(
        sni_dir=str(real_data("sni")),
        on_missing_task="skip",
        empty_targets="keep",
        on_long_instruction="truncate",
        hyper_length=512,
        input_length=256,
        target_length=64,
    )
    vocab = load_vocab(str(shared_dir / "data" / "tokenizer" / "spiece.model"))
    tasks = pipeline.load_tasks("sni", config.data, "test", vocab)
    assert len(tasks) > 40
    for task in build_eval_tasks(tasks, vocab, config):
        assert len(task.ids) == 5
        assert task.hyper_ids[0]
    sampler = EpisodeSampler(tasks, vocab, config.data, 0)
    assert sampler.batch(0)["inputs"].max() < vocab.size
