"""Small tasks as objects and as Super-NaturalInstructions files, and their batches as text.

The vocabulary is bytes, so that every id decodes to the text that it was written from.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.data.batch import SEPARATE, Layout
from hyper_t5.data.episodes import EpisodeSampler
from hyper_t5.data.eval_tasks import EvalTask
from hyper_t5.data.task_rows import TaskData, TaskRow
from hyper_t5.data.vocab import EOS_ID, ByteVocabulary
from hyper_t5.utils.errors import UserError

BYTES = ByteVocabulary()


def make_config(**fields: Any) -> ConfigDict:
    """Return a config of short episodes; ``fields`` are of its section ``data``."""
    config = config_lib.defaults()
    config.seed = 3
    config.eval.update(max_rows_per_task=5, shots=2)
    config.data.update(
        mixture="sni",
        vocab="bytes",
        extra_ids=0,
        hyper_length=160,
        input_length=24,
        target_length=12,
        tasks_per_batch=3,
        examples_per_task=4,
        chunk_length=64,
    )
    config.data.update(fields)
    return config


def text_config(text: Path | str, **fields: Any) -> ConfigDict:
    """Return a config of stage 'hyperpretrain' on ``data.text``."""
    lengths = {"input_length": 20, "target_length": 20, "hyper_length": 60}
    config = make_config(**{"text": str(text), **lengths, **fields})
    config.stage = "hyperpretrain"
    return config


# ------------------------------------------------------------------------------- tasks


def sni_object(name: str, rows: int = 8, examples: int = 3) -> dict[str, Any]:
    """Return the JSON object of a task file of Super-NaturalInstructions."""
    return {
        "Definition": [f"Definition of {name}."],
        "Categories": [f"Kind of {name}"],
        "Positive Examples": [
            {"input": f"{name} shown {i}", "output": f"s{i}", "explanation": ""}
            for i in range(examples)
        ],
        "Instances": [
            {"id": f"{name}-row-{i}", "input": f"{name} row {i}", "output": [f"a{i}", f"b{i}"]}
            for i in range(rows)
        ],
    }


def write_sni(folder: Path, splits: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write {split: {task: object}} as a folder of Super-NaturalInstructions; return the folder."""
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for split, tasks in splits.items():
        for name, content in tasks.items():
            (folder / "tasks" / f"{name}.json").write_text(json.dumps(content, indent=1))
        listing = folder / "splits" / "default" / f"{split}_tasks.txt"
        listing.write_text("".join(f"{name}\n" for name in tasks))
    return folder


def task_data(name: str, rows: int = 8, examples: int = 3, **fields: Any) -> TaskData:
    """Return the task of `sni_object`."""
    raw = sni_object(name, rows, examples)
    return TaskData(
        name,
        fields.pop("instructions", tuple(raw["Definition"])),
        tuple((e["input"], e["output"]) for e in raw["Positive Examples"]),
        tuple(TaskRow(r["id"], r["input"], tuple(r["output"])) for r in raw["Instances"]),
        **fields,
    )


# ------------------------------------------------------------------------------- batches


def make_sampler(
    tasks: Sequence[TaskData], seed: int = 0, layout: Layout = SEPARATE, **fields: Any
) -> EpisodeSampler:
    """Return a sampler of tasks with the config of `make_config`."""
    return EpisodeSampler(tasks, BYTES, make_config(**fields).data, seed, layout)


def parts_at_eos(ids: np.ndarray) -> list[np.ndarray]:
    """Return the parts of a padded row, each of which ends in EOS, without their EOS."""
    ids = ids[: np.count_nonzero(ids)]
    assert ids[-1] == EOS_ID
    parts = np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)[:-1]
    return [part[:-1] for part in parts]


def texts_at_eos(ids: np.ndarray) -> list[str]:
    """Return the decoded parts of a padded row."""
    return [BYTES.decode(part) for part in parts_at_eos(ids)]


def shown_inputs(ids: np.ndarray) -> list[str]:
    """Return the inputs of the examples in a conditioning of template 'labelled'."""
    parts = BYTES.decode(ids).split("\nInput: ")[1:]
    return [part.split("\nOutput: ")[0] for part in parts]


def result_or_error(call: Callable[[], Any]) -> tuple[Any, str]:
    """Return (result, ''), or None and the message of a UserError, which must be one line."""
    message = ""
    try:
        return call(), message
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    return None, message


def assert_seqio_reads(name: str, split: str, task: EvalTask, config: ConfigDict) -> list[Any]:
    """Check the ids, texts and row ids of a SeqIO Task against an evaluated task; return its rows.

    Only the rows that are evaluated are compared.
    """
    from hyper_t5.tasks.seqio_tasks import seqio

    lengths = {"hyper_inputs": config.data.hyper_length, "inputs": config.data.input_length}
    lengths["targets"] = config.data.target_length
    dataset = seqio.get_mixture_or_task(name).get_dataset(lengths, split=split, shuffle=False)
    rows = list(itertools.islice(dataset.as_numpy_iterator(), len(task.ids)))
    assert [row["id"].decode() for row in rows] == list(task.ids)
    for i, row in enumerate(rows):
        assert row["hyper_inputs"].tolist() == task.hyper_ids[task.hyper_ids != 0].tolist()
        assert row["inputs"].tolist() == task.inputs[i][task.inputs[i] != 0].tolist()
        assert [text.decode() for text in row["references"]] == list(task.references[i])
        assert row["targets"].tolist() == [*BYTES.encode(task.references[i][0]), EOS_ID]
    return rows
