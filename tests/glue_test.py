"""GLUE from local files: its text, its labels, what is refused, and the folder made from others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data, protocols, scores
from hyper_t5.errors import UserError
from hyper_t5.tasks import glue
from hyper_t5.tasks.common import seqio, tf
from hyper_t5.vocab import EOS_ID, ByteVocabulary

BYTES = ByteVocabulary()

# A row with the official columns, the text it becomes, and the answer.
ROWS = {
    "cola": ({"sentence": "It it.", "label": 0}, "cola sentence: It it.", "0"),
    "sst2": ({"sentence": "so good ", "label": 1}, "sst2 sentence: so good ", "1"),
    "mrpc": (
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        "mrpc sentence1: A. sentence2: B.",
        "1",
    ),
    "qqp": (
        {"question1": "A?", "question2": "B?", "label": 0},
        "qqp question1: A? question2: B?",
        "0",
    ),
    "stsb": (
        {"sentence1": "A.", "sentence2": "B.", "label": 3.36},
        "stsb sentence1: A. sentence2: B.",
        "3.4",
    ),
    "mnli": (
        {"premise": "A.", "hypothesis": "B.", "label": 2},
        "mnli premise: A. hypothesis: B.",
        "2",
    ),
    "qnli": (
        {"question": "A?", "sentence": "B.", "label": 1},
        "qnli question: A? sentence: B.",
        "1",
    ),
    "rte": (
        {"sentence1": "A.", "sentence2": "B.", "label": 0},
        "rte sentence1: A. sentence2: B.",
        "0",
    ),
    "wnli": (
        {"sentence1": "A.", "sentence2": "B.", "label": 1},
        "wnli sentence1: A. sentence2: B.",
        "1",
    ),
}


def make_config(folder: Path, **fields: Any) -> ConfigDict:
    config = config_lib.defaults()
    config.eval.update(max_rows_per_task=4, shots=1)
    config.data.update(
        glue_dir=str(folder),
        hyper_length=256,
        input_length=64,
        target_length=8,
        tasks_per_batch=2,
        examples_per_task=3,
        shots=(0, 1),
    )
    config.data.update(fields)
    return config


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pairs(count: int, name: str = "row") -> list[dict[str, Any]]:
    return [
        {"sentence1": f"{name} {i}", "sentence2": "other", "label": i % 2} for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """rte with 8 and 3 rows, mnli with 4 and 2, and its test file."""
    for task, sizes in {"rte": (8, 3), "mnli": (4, 2)}.items():
        for split, size in zip(("train", "validation"), sizes, strict=True):
            write(tmp_path / "glue" / task / f"{split}.jsonl", pairs(size, split))
    write(tmp_path / "glue" / "mnli" / "test.jsonl", pairs(5, "test"))
    return tmp_path / "glue"


# ------------------------------------------------------------------------------------ rows


@pytest.mark.parametrize("task", glue.TASKS)
def test_text_and_answer_of_every_task(task: str, tmp_path: Path) -> None:
    official, text, answer = ROWS[task]
    plain = dict(zip([*glue.PAIR, "label"], official.values(), strict=False))
    if len(glue.TASKS[task].columns) == 1:
        plain = {"sentence1": official["sentence"], "label": official["label"]}
    file = write(tmp_path / "train.jsonl", [official, {**plain, "idx": 17}])
    found = glue.read_task(task, file)
    assert [(row.id, row.input, row.outputs) for row in found.rows] == [
        (f"{task}-0", text, (answer,)),
        (f"{task}-17", text, (answer,)),
    ]
    assert found.name == task
    # The instruction names every answer.
    answers = range(len(glue.TASKS[task].answers)) or ["0.0", "5.0", "0.2"]
    assert all(f" {answer}" in found.instruction for answer in answers)


def test_scores_of_stsb_go_in_fifths(tmp_path: Path) -> None:
    answers = {0: "0.0", 5: "5.0", 0.09: "0.0", 0.11: "0.2", 2.25: "2.2", 4.999: "5.0", 3: "3.0"}
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in answers]
    found = glue.read_task("stsb", write(tmp_path / "train.jsonl", rows))
    assert [row.outputs for row in found.rows] == [(answer,) for answer in answers.values()]


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("rte", '{"sentence1": "a", "label": 0}', "lacks field sentence2$"),
        ("mnli", '{"premise": "a", "label": 0}', "lacks field sentence2 or hypothesis$"),
        ("sst2", '{"label": 0}', "lacks field sentence1 or sentence$"),
        ("sst2", '{"sentence": null, "label": 0}', "field sentence must be text"),
        ("cola", '{"sentence": "a"}', "lacks field label"),
        ("cola", '{"sentence": "a", "label": 2}', "label must be a whole number from 0 to 1"),
        ("cola", '{"sentence": "a", "label": true}', "whole number from 0 to 1, this is True"),
        ("cola", '{"sentence": "a", "label": 0.5}', "whole number from 0 to 1, this is 0.5"),
        ("mnli", '{"premise": "a", "hypothesis": "b", "label": "1"}', "from 0 to 2, this is '1'"),
        ("cola", '{"sentence": "a", "label": -1}', "official test files have no labels"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": 5.1}', "number from 0 to 5, this"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": NaN}', "number from 0 to 5, this"),
        ("cola", '{"sentence": "a", ', "not valid JSON"),
        ("cola", "[1]", "must be a JSON object"),
        ("cola", '{"sentence": "\\ud800", "label": 1}', "half a surrogate pair"),
        ("cola", '{"sentence": "\udcff", "label": 1}', "not UTF-8"),
    ],
)
def test_bad_rows_name_file_line_and_field(
    task: str, line: str, message: str, tmp_path: Path
) -> None:
    good = json.dumps(ROWS[task][0])
    file = tmp_path / "train.jsonl"
    file.write_bytes(f"{good}\n\n{line}\n{good}\n".encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"train\.jsonl, line 3: .*{message}") as error:
        glue.read_task(task, file)
    assert "\n" not in str(error.value)
    found = glue.read_task(task, file, "skip")
    assert len(found.rows) == 2
    assert found.skipped == {f"{task}/train.jsonl": 1}
    file.write_text("\n")
    with pytest.raises(UserError, match="no usable row"):
        glue.read_task(task, file)


# ------------------------------------------------------------------------------ the mixture


def test_mixture_by_size_and_its_splits(folder: Path) -> None:
    config = make_config(folder)
    for split, sizes in {
        "train": {"mnli": 4, "rte": 8},
        "validation": {"mnli": 2, "rte": 3},
        "test": {"mnli": 5},
    }.items():
        tasks = data.load_tasks("glue", config.data, split, BYTES)
        assert {task.name: len(task.rows) for task in tasks} == sizes
        assert {task.name: task.rate for task in tasks} == sizes
        assert all(f" {split} 0 " in task.rows[0].input for task in tasks)
    assert data.held_out_splits("glue") == ("validation",)


def test_seqio_tasks_and_the_fast_path_have_the_same_ids(folder: Path) -> None:
    config = make_config(folder, shots=(0, 0))
    config.eval.shots = 0
    for _ in range(2):  # registering again is no error
        assert glue.register(config.data, "validation", BYTES) == "glue_validation"
    (task,) = data.load_tasks("glue", config.data, "validation", BYTES)[1:]
    (found,) = data.eval_episodes([task], BYTES, config)
    rows = seqio.get_mixture_or_task("glue_rte_validation").get_dataset(
        {"hyper_inputs": 256, "inputs": 64, "targets": 8}, "validation", shuffle=False
    )
    for i, row in enumerate(rows.as_numpy_iterator()):
        for name, ids in (("hyper_inputs", found.hyper_ids), ("inputs", found.inputs[i])):
            assert row[name].tolist() == ids[ids > 0].tolist()
        assert BYTES.decode(row["targets"]) == row["references"][0].decode() == str(i % 2)
        assert row["targets"][-1] == EOS_ID
        assert row["id"].decode() == found.ids[i]
    assert i == 2


def test_episodes(folder: Path) -> None:
    config = make_config(folder)
    tasks = data.load_tasks("glue", config.data, "train", BYTES)
    batch = data.EpisodeSampler(tasks, BYTES, config.data, seed=0).batch(0)
    assert batch["inputs"].shape == (2, 3, 64)
    for hyper, inputs, targets in zip(
        batch["hyper_inputs"], batch["inputs"], batch["targets"], strict=True
    ):
        name = BYTES.decode(inputs[0]).split()[0]
        assert BYTES.decode(hyper).startswith(glue.TASKS[name].instruction)
        for row, target in zip(inputs, targets, strict=True):
            number = BYTES.decode(row).split(" other")[0].split()[-2]
            assert BYTES.decode(target) == str(int(number) % 2)


def test_max_instances(folder: Path) -> None:
    config = make_config(folder, max_instances_per_task=3)
    kept = {}
    for split in ("train", "validation"):
        tasks = data.load_tasks("glue", config.data, split, BYTES)
        assert [(task.name, task.rate) for task in tasks] == [
            ("mnli", min(3, 4 if split == "train" else 2)),
            ("rte", 3),
        ]
        kept[split] = [int(row.id.rpartition("-")[2]) for row in tasks[1].rows]
    assert kept["validation"] == [0, 1, 2]
    assert kept["train"] == sorted(kept["train"]) != [0, 1, 2]
    whole = data.load_tasks("glue", make_config(folder).data, "train", BYTES)
    assert [len(task.rows) for task in whole] == [4, 8]


def test_official_validation_files_of_mnli(folder: Path) -> None:
    mnli = folder / "mnli"
    (mnli / "validation.jsonl").rename(mnli / "validation_mismatched.jsonl")
    (mnli / "test.jsonl").rename(mnli / "validation_matched.jsonl")
    files = {split: glue.split_files(str(folder), split)["mnli"].name for split in glue.SPLITS}
    assert files == {
        "train": "train.jsonl",
        "validation": "validation_mismatched.jsonl",
        "test": "validation_matched.jsonl",
    }


def test_folder_mistakes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for glue_dir, split, message in [
        ("", "train", "data.glue_dir is empty"),
        (str(folder / "none"), "train", "no such folder; data.glue_dir"),
        (str(folder / "rte"), "train", r"holds no folder of a GLUE task \(cola, sst2"),
        (str(folder), "dev", "split 'dev' is unknown; the splits are train, validation, test"),
    ]:
        with pytest.raises(UserError, match=message):
            glue.split_files(glue_dir, split)
    (folder / "rte" / "train.jsonl").unlink()
    (folder / "ax").mkdir()
    with pytest.raises(UserError, match=r"rte/train\.jsonl: no such file; .*on_missing_task"):
        glue.register(make_config(folder).data, "train", BYTES)
    config = make_config(folder, on_missing_task="skip")
    capsys.readouterr()
    assert [t.name for t in data.load_tasks("glue", config.data, "train", BYTES)] == ["mnli"]
    out = capsys.readouterr().out
    assert "no GLUE task and left out: ax\n" in out
    assert "train leaves out rte\n" in out
    (folder / "mnli" / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"mnli/train\.jsonl: no such file, nor that of any other"):
        glue.split_files(str(folder), "train", skip_missing=True)


def test_skipped_rows_are_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(folder / "rte" / "train.jsonl", "a") as lines:
        lines.write('{"sentence1": "a", "label": 1}\n')
    config = make_config(folder)
    with pytest.raises(UserError, match=r"train\.jsonl, line 9: lacks field sentence2"):
        data.load_tasks("glue", config.data, "train", BYTES)
    config.data.on_bad_row = "skip"
    data.load_tasks("glue", config.data, "train", BYTES)
    assert "glue_train: 1 bad rows of rte/train.jsonl skipped" in capsys.readouterr().out


def test_metrics_of_each_task() -> None:
    refs = [("1",), ("0",), ("1",), ("1",)]
    said = ["1", "0", "no", "0"]

    def found(task: str) -> dict[str, float]:
        rows = [
            {
                "split": "validation",
                "mixture": "glue",
                "task": task,
                "prediction": answer,
                "references": list(references),
            }
            for answer, references in zip(said, refs, strict=True)
        ]
        told = protocols.score_predictions(rows)["splits"]["validation"]["per_task"][task]
        return {k: v for k, v in told.items() if k not in ("rows", "category", *scores.METRICS)}

    names = {task: set(found(task)) for task in glue.TASKS}
    assert names.pop("cola") == {"matthews"}
    assert names.pop("mrpc") == names.pop("qqp") == {"f1", "accuracy"}
    assert names.pop("stsb") == {"pearson", "spearman"}
    assert set(map(tuple, names.values())) == {("accuracy",)}
    # 1 true positive, 2 false negatives: 2 / (2 + 2)
    assert found("mrpc") == {"f1": 50.0, "accuracy": 50.0}


# ------------------------------------------------------------------- from MetaICL and from P3


def metaicl(folder: Path, task: str, part: str, rows: list[tuple[str, str]]) -> None:
    lines = [{"task": f"glue-{task}", "input": i, "output": o, "options": []} for i, o in rows]
    write(folder / "data" / f"glue-{task}" / f"glue-{task}_{part}.jsonl", lines)


def p3(folder: Path, task: str, split: str, rows: list[tuple[str, str, int | None]]) -> None:
    file = folder / "data" / task / f"{split}.tfrecord-00000-of-00001"
    file.parent.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(file)) as writer:
        for text, target, right in rows:
            example = tf.train.Example()
            feature = example.features.feature
            feature["inputs_pretokenized"].bytes_list.value.append(text.encode())
            feature["targets_pretokenized"].bytes_list.value.append(target.encode())
            feature["inputs"].int64_list.value.extend([])
            if right is not None:
                feature["is_correct"].int64_list.value.append(right)
            writer.write(example.SerializeToString())


def read(file: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row.pop("idx") for row in rows] == list(range(len(rows)))
    return [tuple(row.values()) for row in rows]


def test_convert(tmp_path: Path) -> None:
    icl, cached, out = tmp_path / "icl", tmp_path / "p3", tmp_path / "out"
    a, b, c = (f"sentence 1: {x} . [SEP] sentence 2: {x}{x}" for x in "abc")
    metaicl(icl, "rte", "16_13_train", [(a, "entailment"), (b, "not_entailment")])
    metaicl(icl, "rte", "16_13_dev", [(a, "not_entailment")])
    # Of the meta-training file one row is a test row: it stays out of train.
    metaicl(icl, "rte", "16384_100_train", [(b, "not_entailment"), (c, "entailment")])
    metaicl(icl, "rte", "16_13_test", [(c.replace(" .", "  ."), "entailment"), ("odd", "yes")])
    p3(
        cached,
        "super_glue_rte_GPT_3_style_score_eval",
        "validation",
        [
            ('"c" .\nQuestion: cc True or False?', "True", 1),
            ('"c" .\nQuestion: cc True or False?', "False", 0),
            ("d\nQuestion: is it True or False? True or False?", "False", 1),
            ("d\nQuestion: e\nQuestion: f True or False?", "False", 1),
        ],
    )
    # No test rows of qqp: dev rows are its validation. A question may hold the mark's text.
    metaicl(icl, "qqp", "16_13_dev", [("question 1: a? [SEP] question 2: b?", "duplicate")])
    metaicl(icl, "qqp", "16_13_train", [("question 1: [SEP] [SEP] question 2: b?", "duplicate")])
    ask = "Question 1: {}\nQuestion 2: {}\n\nDo these two questions convey the same meaning? "
    ask += "Yes or no?"
    p3(
        cached,
        "glue_qqp_meaning",
        "train",
        [(ask.format("x?", "y?"), "Yes", None), (ask.format("a?", "b?"), "No", None)],
    )
    metaicl(icl, "cola", "16_13_test", [("sentence: it", "acceptable"), ("Me.", "unacceptable")])
    counts = glue.convert(icl, cached, out)
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.jsonl")) == [
        "cola/validation.jsonl",
        "qqp/train.jsonl",
        "qqp/validation.jsonl",
        "rte/train.jsonl",
        "rte/validation.jsonl",
    ]
    assert read(out / "rte/train.jsonl") == [("b .", "bb", 1), ("a .", "aa", 1)]
    assert read(out / "rte/validation.jsonl") == [
        ("c  .", "cc", 0),
        ("d", "is it True or False?", 1),
    ]
    assert read(out / "qqp/train.jsonl") == [("x?", "y?", 1)]
    assert read(out / "qqp/validation.jsonl") == [("a?", "b?", 1)]
    assert read(out / "cola/validation.jsonl") == [("sentence: it", 1), ("Me.", 0)]
    assert counts["rte"] == Counter(
        {"train": 2, "validation": 2, "repeated": 4, "other label": 1, "unreadable": 2}
    )
    assert counts["qqp"] == Counter(
        {"train": 1, "validation": 1, "repeated": 1, "other label": 1, "unreadable": 1}
    )
    config = make_config(out, on_missing_task="skip")
    assert len(data.load_tasks("glue", config.data, "train", BYTES)) == 2


def test_convert_mistakes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no data/glue-TASK/\*\.jsonl in the one"):
        glue.convert(tmp_path, "", tmp_path / "out")
    file = tmp_path / "data" / "glue_mrpc_equivalent" / "train.tfrecord-00000-of-00001"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"not a record, but long enough to be read as one")
    with pytest.raises(UserError, match=r"train\.tfrecord.*: damaged or no TFRecord file"):
        glue.convert("", tmp_path, tmp_path / "out")
    write(tmp_path / "data" / "glue-rte" / "glue-rte_16_13_train.jsonl", [{"output": "x"}])
    with pytest.raises(UserError, match=r"train\.jsonl, line 1: lacks field input"):
        glue.convert(tmp_path, "", tmp_path / "out")
    with pytest.raises(UserError, match=r"--out .*: is there already"):
        glue.convert(tmp_path, "", tmp_path)


def test_command(tmp_path: Path, repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metaicl(tmp_path / "icl", "sst2", "16_13_train", [("sentence: fine", "positive")])
    argv = [sys.executable, "-m", "hyper_t5.tasks.glue", "--metaicl", str(tmp_path / "icl")]
    argv += ["--out", str(tmp_path / "out")]
    run = subprocess.run(argv, cwd=repo_root, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.splitlines()[1].split() == ["sst2", "1", "0", "0", "0", "0"]
    assert glue.main(argv[3:]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("python -m hyper_t5.tasks.glue: error: --out ")
    assert err.count("\n") == 1


def test_real_rows_when_at_hand(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    counts = glue.convert(real_data("metaicl"), real_data("p3"), tmp_path / "out")
    assert set(counts) == set(glue.TASKS) - {"stsb"}
    assert not any(count["unreadable"] for count in counts.values())
    # The whole official validation sets of these four.
    sizes = {"sst2": 872, "mrpc": 408, "rte": 277, "wnli": 71}
    assert {task: counts[task]["validation"] for task in sizes} == sizes
    config = make_config(tmp_path / "out")
    tasks = {t.name: t for t in data.load_tasks("glue", config.data, "validation", BYTES)}
    # Official shares of label 1.
    shares = {name: np.mean([row.outputs == ("1",) for row in t.rows]) for name, t in tasks.items()}
    assert shares["mrpc"] == pytest.approx(279 / 408)
    assert shares["sst2"] == pytest.approx(444 / 872)
    assert shares["rte"] == pytest.approx(131 / 277)
    assert shares["wnli"] == pytest.approx(31 / 71)
