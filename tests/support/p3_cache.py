"""Writer of P3 tasks as SeqIO caches them, and a small folder of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hyper_t5 import config as config_lib
from hyper_t5 import pipeline
from hyper_t5.data.task_rows import TaskData
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.tasks.seqio_tasks import tf

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
AG, IMDB = "ag_news_classify", "imdb_Movie_Expressed_Sentiment"
RTE = "super_glue_rte_GPT_3_style_score_eval"
ANLI = "anli_GPT_3_style_r2_score_eval"

Features = dict[str, list[Any]]


def example(features: Features) -> bytes:
    """Return a serialized tf.train.Example; texts become bytes."""
    message = tf.train.Example()
    for name, values in features.items():
        feature = message.features.feature[name]
        feature.SetInParent()
        if all(isinstance(value, str | bytes) for value in values):
            texts = (v.encode() if isinstance(v, str) else v for v in values)
            feature.bytes_list.value.extend(texts)
        elif all(isinstance(value, int) for value in values):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return bytes(message.SerializeToString())


def train_record(i: int, **fields: list[Any]) -> Features:
    """Return the features of row ``i`` of a training task, with others in ``fields``."""
    record: Features = {
        "inputs": [5, 6],
        "inputs_pretokenized": [f"input {i}"],
        "targets_pretokenized": [("no", "yes")[i % 2]],
        "answer_choices": ["no", "yes"],
    }
    return record | fields


def choices(row: int, correct: int, count: int = 2) -> list[Features]:
    """Return the records of one row of a held-out task, one for each choice."""
    return [
        {
            "idx": [row, i],
            "inputs_pretokenized": [f"question {row}"],
            "targets_pretokenized": [f"choice {i}"],
            "is_correct": [int(i == correct)],
            "weight": [1.0],
        }
        for i in range(count)
    ]


def write_task(folder: Path, task: str, split: str, *shards: list[Any]) -> Path:
    """Write a cached task; a record is its features, or bytes. Return the task's folder."""
    folder = folder / task
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob(f"{split}.tfrecord*"):
        file.unlink()
    for i, shard in enumerate(shards):
        name = f"{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
        with tf.io.TFRecordWriter(str(folder / name)) as writer:
            for record in shard:
                writer.write(record if isinstance(record, bytes) else example(record))
    info = {"features": FEATURES[split], "num_shards": len(shards), "seqio_version": "0.0.20"}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    stats = {"examples": sum(map(len, shards)), "inputs_tokens": 7}
    (folder / f"stats.{split}.json").write_text(json.dumps(stats))
    (folder / "COMPLETED").touch()
    return folder


def edit_json(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def write_folder(folder: Path) -> Path:
    """Write two training tasks, one of them in two shards, two held-out ones, and the prompts.

    The records of a held-out row are neither consecutive nor in one shard.

    Returns:
      The value of ``data.p3_dir``; its parent holds prompts.txt.
    """
    p3_dir = folder / "p3"
    write_task(p3_dir / "data", AG, "train", [train_record(i) for i in range(6)])
    records = [train_record(i) for i in range(10)]
    write_task(p3_dir / "data", IMDB, "train", records[:7], records[7:])
    records = [*choices(1, 0), *choices(0, 1), *choices(2, 0)]
    shuffled = [records[i] for i in (3, 0, 5, 2, 4, 1)]
    write_task(p3_dir / "data", RTE, "validation", shuffled[:4], shuffled[4:])
    write_task(p3_dir / "data", ANLI, "validation", [*choices(0, 2, 3), *choices(1, 0, 3)])
    (folder / "prompts.txt").write_text(PROMPTS)
    return p3_dir


def make_config(p3_dir: Path, **fields: Any) -> Any:
    """Return a config of a folder of `write_folder`; ``fields`` are of its section ``data``."""
    config = config_lib.defaults()
    config.data.update(
        mixture="p3",
        p3_dir=str(p3_dir),
        p3_prompts=str(p3_dir.parent / "prompts.txt"),
        cache_dir=str(p3_dir.parent / "cache"),
        hyper_length=96,
    )
    config.data.update(fields)
    return config


def load(p3_dir: Path, split: str = "train", **fields: Any) -> dict[str, TaskData]:
    """Load the tasks of a split by name."""
    section = make_config(p3_dir, **fields).data
    return {t.name: t for t in pipeline.load_tasks("p3", section, split, ByteVocabulary())}
