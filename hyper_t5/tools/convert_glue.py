"""GLUE's rows from files of MetaICL and P3, as a folder for ``data.glue_dir``.

python -m hyper_t5.tools.convert_glue --metaicl DIR --p3 DIR --out FOLDER
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hyper_t5.data import tfrecord
from hyper_t5.data.task_rows import text_key
from hyper_t5.tasks.glue import PAIR, TASKS
from hyper_t5.tasks.rows import read_lines
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError, handle_errors
from hyper_t5.utils.paths import expand

# P3 task -> (GLUE task, pattern of its input with one sentence a line, targets in label order).
# From these prompts a GLUE row can be recovered without loss; the other prompts of these datasets
# have the same rows, and some quote the sentences, which makes quotes ambiguous.
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
# Names of the counts.
OUTCOMES = ("train", "validation", "repeated", "other label", "unreadable")

GlueRow = tuple[tuple[str, ...], int]  # the sentences and the label


def convert(metaicl: str | Path, p3: str | Path, out: str | Path) -> dict[str, Counter[str]]:
    """Write GLUE's rows in the files of MetaICL and P3 as ``OUT/<task>/*.jsonl``.

    MetaICL's k-shot files are drawn from GLUE's train split, its test files from GLUE's validation
    split. So test files (and P3's validation) become validation.jsonl, all others train.jsonl
    without the rows of validation.jsonl: meta-training files may hold rows of both. A task without
    a test file uses MetaICL's dev rows for validation. The same sentences appear once, with the
    first label; white space and double quotes, which SuperGLUE's copy of rte lacks, are ignored in
    the comparison. stsb is in neither source.

    Args:
      metaicl: folder with ``data/glue-<task>/*.jsonl``, '' for none.
      p3: folder with ``data/<P3 task>/<split>.tfrecord-*`` as SeqIO caches them, '' for none.
      out: the folder for data.glue_dir; new or empty.

    Returns:
      By task, the number of rows for each of OUTCOMES ('repeated' includes 'other label').

    Raises:
      UserError: nothing to read, damaged files, or a folder that is not empty.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists; use a new folder, or empty it")
    counts: dict[str, Counter[str]] = {}
    for task in TASKS:
        count = Counter[str]()
        source_rows = [
            *(_metaicl_rows(Path(metaicl), task, count) if metaicl else ()),
            *(_p3_rows(Path(p3), task, count) if p3 else ()),
        ]
        if not source_rows:
            continue
        held_out = "test" if any(part == "test" for part, _ in source_rows) else "dev"
        labels: dict[tuple[str, ...], int] = {}
        written: dict[str, list[dict[str, Any]]] = {"validation": [], "train": []}
        # Validation first, so that its rows count as repeated in train.
        for part, (sentences, label) in sorted(source_rows, key=lambda row: row[0] != held_out):
            key = tuple(text_key(sentence.replace('"', "")) for sentence in sentences)
            if key in labels:
                count["repeated"] += 1
                count["other label"] += labels[key] != label
                continue
            labels[key] = label
            rows = written["validation" if part == held_out else "train"]
            rows.append({**dict(zip(PAIR, sentences, strict=False)), "label": label})
        for split, rows in written.items():
            count[split] = len(rows)
            if rows:
                numbered = [{**row, "idx": i} for i, row in enumerate(rows)]
                files.write_json_lines(out / task / f"{split}.jsonl", numbered)
        counts[task] = count
    if not counts:
        raise UserError(
            f"--metaicl {metaicl} --p3 {p3}: no data/glue-TASK/*.jsonl in the one, nor "
            f"data/TASK/*.tfrecord-* of {', '.join(P3_TASKS)} in the other"
        )
    return counts


def _metaicl_rows(folder: Path, task: str, count: Counter[str]) -> Iterator[tuple[str, GlueRow]]:
    """Yield ('train' | 'dev' | 'test', row) of ``glue-<task>_<k>_<seed>_<part>.jsonl``."""
    # The name of its column precedes each sentence, except in cola.
    columns = TASKS[task].columns if task != "cola" else ()
    heads = [re.sub(r"(\d)", r" \1", column) + ": " for column in columns] or [""]
    pattern = r" \[SEP\] ".join(f"{head}(.*)" for head in heads)
    for file in sorted((folder / "data" / f"glue-{task}").glob("*.jsonl")):
        part = file.stem.rpartition("_")[2]
        for source, line in read_lines(file):
            value = files.json_object(line, source)
            if not isinstance(value.get("input"), str):
                raise UserError(f"{source}: lacks field input, a text")
            match = re.fullmatch(pattern, value["input"], re.DOTALL)
            unambiguous = value["input"].count("[SEP]") == len(heads) - 1
            if match is None or not unambiguous or value.get("output") not in TASKS[task].answers:
                count["unreadable"] += 1
            else:
                yield part, (match.groups(), TASKS[task].answers.index(value["output"]))


def _p3_rows(folder: Path, task: str, count: Counter[str]) -> Iterator[tuple[str, GlueRow]]:
    """Yield ('train' | 'test', row) of cached P3 tasks; of ``_score_eval`` only correct choices."""
    for name, (glue_task, pattern, targets) in P3_TASKS.items():
        folders = [folder / "data" / n for n in (name, f"{name}_score_eval") if glue_task == task]
        for file in (f for d in folders for f in sorted(d.glob("*.tfrecord-*"))):
            split = file.name.partition(".")[0]
            if split == "test":  # has no labels
                continue
            for row in _read_examples(file):
                if not row.get("is_correct", [1])[0]:
                    continue
                match = re.fullmatch(pattern, row["inputs_pretokenized"][0].decode())
                target = row["targets_pretokenized"][0].decode()
                if match is None or target not in targets:
                    count["unreadable"] += 1
                else:
                    part = "train" if split == "train" else "test"
                    yield part, (match.groups(), targets.index(target))


def _read_examples(file: Path) -> Iterator[dict[str, list[Any]]]:
    names = ("inputs_pretokenized", "targets_pretokenized", "is_correct")
    index = tfrecord.scan(str(file))
    for offset, length in zip(index.offsets, index.lengths, strict=True):
        record = tfrecord.read(str(file), int(offset), int(length))
        values = tfrecord.parse_example(record, names)
        yield {k: list(v) for k, v in values.items() if v is not None and len(v)}


@handle_errors("python -m hyper_t5.tools.convert_glue")
def main(argv: Sequence[str] | None = None) -> None:
    """Run `convert` and print the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m hyper_t5.tools.convert_glue",
        description="Convert GLUE rows of MetaICL and P3 into a folder for data.glue_dir",
    )
    parser.add_argument(
        "--metaicl", type=expand, default="", help="folder with data/glue-TASK/*.jsonl"
    )
    parser.add_argument("--p3", type=expand, default="", help="folder with data/TASK/*.tfrecord-*")
    parser.add_argument(
        "--out", type=expand, required=True, help="folder to write TASK/*.jsonl into"
    )
    args = parser.parse_args(argv)
    counts = convert(args.metaicl, args.p3, args.out)
    print("task  " + "  ".join(OUTCOMES))
    for task, count in counts.items():
        print(f"{task:4}  " + "  ".join(f"{count[name]:{len(name)}d}" for name in OUTCOMES))


if __name__ == "__main__":
    sys.exit(main())
