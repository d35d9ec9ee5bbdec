"""GLUE (Wang et al. 2019) as SeqIO Tasks in the text of Hyperdecoders, from local files.

    FOLDER/<task>/train.jsonl, validation.jsonl, and test.jsonl where there is a labelled one

for any of the tasks in TASKS; one row a line, `{"sentence1": ..., "sentence2": ..., "label": 0,
"idx": 7}`, or with the official names of the columns (mnli: premise, hypothesis). The official
files of mnli are taken too: validation_mismatched.jsonl is its validation and
validation_matched.jsonl its test, as in Hyperdecoders (Ivison & Peters 2022).

A row reads `mnli premise: ... hypothesis: ...`, with the task's name and its official columns, and
the answer is the label's digit, of stsb the score rounded to 0.2. Hyperdecoders reads nothing else;
the instructions, for hypermodels that read one, are ours. Tasks are mixed by their sizes.

    python -m hyper_t5.tasks.glue --metaicl DIR --p3 DIR --out FOLDER

makes such a folder from what MetaICL's and P3's files hold of GLUE: see `convert`.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hyper_t5 import files
from hyper_t5.errors import UserError, exit_code
from hyper_t5.taskfile import OnBadRow, Row, TaskRows, text_key
from hyper_t5.tasks.common import read_lines, register_rows, tf
from hyper_t5.vocab import Vocabulary

SPLITS = ("train", "validation", "test")
HELD_OUT = ("validation",)
# Of a split's files the first that is there.
FILES = {
    "train": ("train.jsonl",),
    "validation": ("validation.jsonl", "validation_mismatched.jsonl"),
    "test": ("test.jsonl", "validation_matched.jsonl"),
}


class GlueTask(NamedTuple):
    """What one task is."""

    columns: tuple[str, ...]  # official names of its one or two sentences
    answers: tuple[str, ...]  # official names of labels 0, 1, ...; () where they are scores, 0..5
    instruction: str


PAIR = ("sentence1", "sentence2")
TASKS = {
    "cola": GlueTask(
        ("sentence",),
        ("unacceptable", "acceptable"),
        "Is the sentence acceptable English? Answer 0 if it is not, 1 if it is.",
    ),
    "sst2": GlueTask(
        ("sentence",),
        ("negative", "positive"),
        "What does the sentence say of the film? Answer 0 for bad, 1 for good.",
    ),
    "mrpc": GlueTask(
        PAIR,
        ("not_equivalent", "equivalent"),
        "Do the two sentences say the same? Answer 0 if they do not, 1 if they do.",
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        "Do the two questions ask the same? Answer 0 if they do not, 1 if they do.",
    ),
    "stsb": GlueTask(
        PAIR,
        (),
        "How alike in meaning are the two sentences? Answer with a number from 0.0, not at all, "
        "to 5.0, the same, in steps of 0.2.",
    ),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        "Is the hypothesis true if the premise is? Answer 0 for yes, 1 for maybe, 2 for no.",
    ),
    "qnli": GlueTask(
        ("question", "sentence"),
        ("entailment", "not_entailment"),
        "Does the sentence answer the question? Answer 0 if it does, 1 if it does not.",
    ),
    "rte": GlueTask(
        PAIR,
        ("entailment", "not_entailment"),
        "Does sentence2 follow from sentence1? Answer 0 if it does, 1 if it does not.",
    ),
    "wnli": GlueTask(
        PAIR,
        ("not_entailment", "entailment"),
        "In sentence2 a name stands for a pronoun of sentence1. Is it the right one? "
        "Answer 0 if it is not, 1 if it is.",
    ),
}


# ------------------------------------------------------------------------------ the mixture


def register(data_config: Any, split: str, vocab: Vocabulary) -> str:
    """Registers one split of `data_config.glue_dir`; returns the Mixture's name.

    Raises:
        UserError: no such folder or split, or a task without its file ('test' leaves those out).
    """
    found = split_files(
        data_config.get("glue_dir", ""),
        split,
        data_config.get("on_missing_task", "raise") == "skip",
    )
    on_bad_row = data_config.on_bad_row
    readers = {
        task: functools.partial(read_task, task, file, on_bad_row) for task, file in found.items()
    }
    signature = (sorted(map(str, found.values())), on_bad_row)
    most = data_config.max_instances_per_task
    return register_rows("glue", split, readers, signature, vocab, most)


def split_files(glue_dir: str, split: str, skip_missing: bool = False) -> dict[str, Path]:
    """The file of a split by task name, in the order of TASKS.

    Raises:
        UserError: names folder, task and remedy.
    """
    if split not in SPLITS:
        raise UserError(f"glue: split {split!r} is unknown; the splits are {', '.join(SPLITS)}")
    if not glue_dir:
        raise UserError("data.glue_dir is empty: give the folder that holds cola/, sst2/, ...")
    folder = Path(glue_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; data.glue_dir must hold cola/, sst2/, ...")
    inside = {path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != "."}
    tasks = [task for task in TASKS if task in inside]
    if not tasks:
        raise UserError(f"{folder}: holds no folder of a GLUE task ({', '.join(TASKS)})")
    if other := sorted(inside - set(tasks)):
        print(f"{folder}: no GLUE task and left out: {', '.join(other)}")
    found = {
        task: [folder / task / name for name in FILES[split] if (folder / task / name).is_file()]
        for task in tasks
    }
    kept = {task: there[0] for task, there in found.items() if there}
    missing = [folder / task / FILES[split][0] for task in tasks if task not in kept]
    if not kept:
        raise UserError(f"{missing[0]}: no such file, nor that of any other task")
    if missing and split != "test" and not skip_missing:
        raise UserError(
            f"{missing[0]}: no such file; add it, take its folder away, or set "
            "data.on_missing_task='skip'"
        )
    if missing:
        print(f"{folder}: {split} leaves out {', '.join(file.parent.name for file in missing)}")
    return kept


def read_task(task: str, file: Path, on_bad_row: OnBadRow = "raise") -> TaskRows:
    """One task from one of its files.

    Raises:
        UserError: names file, line and field; no usable row.
    """
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    for number, (where, line) in enumerate(read_lines(file)):
        try:
            rows.append(_row(files.json_object(line, where), task, number, where))
        except UserError:
            if on_bad_row == "raise":
                raise
            skipped[f"{task}/{file.name}"] += 1
    if not rows:
        raise UserError(f"{file}: holds no usable row; a task needs at least one")
    instruction = TASKS[task].instruction
    return TaskRows(task, (instruction,), (), tuple(rows), "GLUE", skipped=dict(skipped))


def _row(value: Mapping[str, Any], task: str, number: int, where: str) -> Row:
    columns = TASKS[task].columns
    parts = [task]
    for column, plain in zip(columns, PAIR, strict=False):
        parts += [f"{column}:", _sentence(value, column, plain, where)]
    if "label" not in value:
        raise UserError(f"{where}: lacks field label")
    answer = _answer(value["label"], task, f"{where}: field label")
    return Row(f"{task}-{value.get('idx', number)}", " ".join(parts), (answer,))


def _sentence(value: Mapping[str, Any], column: str, plain: str, where: str) -> str:
    name = plain if plain in value else column
    if name not in value:
        either = plain if plain == column else f"{plain} or {column}"
        raise UserError(f"{where}: lacks field {either}")
    if not isinstance(value[name], str):
        raise UserError(f"{where}: field {name} must be text")
    return value[name]


def _answer(label: Any, task: str, where: str) -> str:
    """The text of a label."""
    number = isinstance(label, int | float) and not isinstance(label, bool)
    count = len(TASKS[task].answers)
    if not count:
        if number and 0 <= label <= 5:
            return f"{round(label * 5) / 5:.1f}"
        raise UserError(f"{where} must be a number from 0 to 5, this is {label!r}")
    if number and label in range(count):
        return str(int(label))
    hint = "; official test files have no labels, leave them out" if label == -1 else ""
    raise UserError(
        f"{where} must be a whole number from 0 to {count - 1}, this is {label!r}{hint}"
    )


# ---------------------------------------------------------------- rows in files -> SeqIO Tasks


# ------------------------------------------------------------------- from MetaICL and from P3

# A P3 task that gives a GLUE row back without loss: the pattern of its input, sentences one line
# each, and its targets in the order of the labels. The other prompts of the same sets are made of
# the same rows, and some put the sentences in quotes, where they cannot be told from their own.
P3_TASKS = {
    "glue_mrpc_equivalent": (
        "mrpc",
        r'Are the following two sentences "equivalent" or "not equivalent"\?\n(.+)\n(.+)',
        ("not equivalent", "equivalent"),
    ),
    "glue_qqp_meaning": (
        "qqp",
        r"Question 1: (.+)\nQuestion 2: (.+)\n\n"
        r"Do these two questions convey the same meaning\? Yes or no\?",
        ("No", "Yes"),
    ),
    "super_glue_rte_GPT_3_style": (
        "rte",
        r"(.+)\nQuestion: (.+) True or False\?",
        ("True", "False"),
    ),
}
# What became of the rows that were read.
OUTCOMES = ("train", "validation", "repeated", "other label", "unreadable")

Found = tuple[tuple[str, ...], int]  # the sentences and the label


def convert(metaicl: str | Path, p3: str | Path, out: str | Path) -> dict[str, Counter[str]]:
    """Writes the rows of GLUE that the files of MetaICL and of P3 hold as `FOLDER/<task>/*.jsonl`.

    MetaICL's k-shot files are drawn from GLUE's train, its test files from GLUE's validation. So
    test files (and P3's validation) make validation.jsonl, and all others train.jsonl, less the
    rows that are in validation.jsonl too: meta-training files may hold rows of both. A task
    without a test file has MetaICL's dev rows for validation. The same sentences come once, with
    the first label; white space and double quotes, which SuperGLUE's copy of rte lost, do not tell
    them apart. stsb is left out: neither has it.

    Args:
        metaicl: folder with `data/glue-<task>/*.jsonl`, '' for none.
        p3: folder with `data/<P3 task>/<split>.tfrecord-*` as SeqIO caches them, '' for none.
        out: the folder for data.glue_dir; it must be new or empty.

    Returns:
        By task, how many rows met each of OUTCOMES ('repeated' counts 'other label' too).

    Raises:
        UserError: nothing to read, damaged files, or `out` holds something.
    """
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is there already; give a new folder, or empty it")
    counts: dict[str, Counter[str]] = {}
    for task in TASKS:
        read = Counter[str]()
        found = [
            *(_metaicl_rows(Path(metaicl).expanduser(), task, read) if metaicl else ()),
            *(_p3_rows(Path(p3).expanduser(), task, read) if p3 else ()),
        ]
        if not found:
            continue
        held_out = "test" if any(part == "test" for part, _ in found) else "dev"
        labels: dict[tuple[str, ...], int] = {}
        written: dict[str, list[dict[str, Any]]] = {"validation": [], "train": []}
        # Validation first: what is in it is then a repetition to train.
        for part, (sentences, label) in sorted(found, key=lambda row: row[0] != held_out):
            key = tuple(text_key(sentence.replace('"', "")) for sentence in sentences)
            if key in labels:
                read["repeated"] += 1
                read["other label"] += labels[key] != label
                continue
            labels[key] = label
            rows = written["validation" if part == held_out else "train"]
            rows.append({**dict(zip(PAIR, sentences, strict=False)), "label": label})
        for split, rows in written.items():
            read[split] = len(rows)
            if rows:
                numbered = [{**row, "idx": i} for i, row in enumerate(rows)]
                files.write_json_lines(out / task / f"{split}.jsonl", numbered)
        counts[task] = read
    if not counts:
        raise UserError(
            f"--metaicl {metaicl} --p3 {p3}: no data/glue-TASK/*.jsonl in the one, nor "
            f"data/TASK/*.tfrecord-* of {', '.join(P3_TASKS)} in the other"
        )
    return counts


def _metaicl_rows(folder: Path, task: str, read: Counter[str]) -> Iterator[tuple[str, Found]]:
    """('train' | 'dev' | 'test', row) of `glue-<task>_<k>_<seed>_<part>.jsonl`."""
    # Sentences have their column's name in front, in words, but for cola's.
    columns = TASKS[task].columns if task != "cola" else ()
    heads = [re.sub(r"(\d)", r" \1", column) + ": " for column in columns] or [""]
    pattern = r" \[SEP\] ".join(f"{head}(.*)" for head in heads)
    for file in sorted((folder / "data" / f"glue-{task}").glob("*.jsonl")):
        part = file.stem.rpartition("_")[2]
        for where, line in read_lines(file):
            value = files.json_object(line, where)
            if not isinstance(value.get("input"), str):
                raise UserError(f"{where}: lacks field input, a text")
            match = re.fullmatch(pattern, value["input"], re.DOTALL)
            sure = value["input"].count("[SEP]") == len(heads) - 1
            if match is None or not sure or value.get("output") not in TASKS[task].answers:
                read["unreadable"] += 1
            else:
                yield part, (match.groups(), TASKS[task].answers.index(value["output"]))


def _p3_rows(folder: Path, task: str, read: Counter[str]) -> Iterator[tuple[str, Found]]:
    """('train' | 'test', row) of a cached P3 task; of a `_score_eval` one the right choices."""
    for name, (of, pattern, targets) in P3_TASKS.items():
        found = [name, f"{name}_score_eval"] if of == task else []
        for file in (f for n in found for f in sorted((folder / "data" / n).glob("*.tfrecord-*"))):
            split = file.name.partition(".")[0]
            if split == "test":  # has no labels
                continue
            for row in _tf_examples(file):
                if not row.get("is_correct", [1])[0]:
                    continue
                match = re.fullmatch(pattern, row["inputs_pretokenized"][0].decode())
                target = row["targets_pretokenized"][0].decode()
                if match is None or target not in targets:
                    read["unreadable"] += 1
                else:
                    part = "train" if split == "train" else "test"
                    yield part, (match.groups(), targets.index(target))


def _tf_examples(file: Path) -> Iterator[dict[str, list[Any]]]:
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            yield {
                name: list(getattr(value, value.WhichOneof("kind")).value)
                for name, value in features.items()
                if value.WhichOneof("kind")
            }
    except tf.errors.OpError as error:
        raise UserError(f"{file}: damaged or no TFRecord file ({error.message})") from None


@exit_code("python -m hyper_t5.tasks.glue")
def main(argv: Sequence[str] | None = None) -> None:
    """The command line of `convert`; prints what was written."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.tasks.glue",
        description="Make a folder for data.glue_dir from MetaICL's and P3's files.",
    )
    parser.add_argument("--metaicl", default="", help="folder with data/glue-TASK/*.jsonl")
    parser.add_argument("--p3", default="", help="folder with data/TASK/*.tfrecord-*")
    parser.add_argument("--out", required=True, help="folder to write TASK/*.jsonl into")
    args = parser.parse_args(argv)
    counts = convert(args.metaicl, args.p3, args.out)
    print("task  " + "  ".join(OUTCOMES))
    for task, count in counts.items():
        print(f"{task:4}  " + "  ".join(f"{count[name]:{len(name)}d}" for name in OUTCOMES))


if __name__ == "__main__":
    sys.exit(main())
