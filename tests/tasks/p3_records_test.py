"""The cache of a P3 task: metadata, records, and damage to either."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyper_t5.tasks import p3, p3_records
from hyper_t5.tasks.seqio_tasks import seqio
from hyper_t5.utils.errors import UserError
from tests.support.p3_cache import (
    AG,
    IMDB,
    RTE,
    STRING,
    Features,
    choices,
    edit_json,
    load,
    train_record,
    write_folder,
    write_task,
)
from tests.support.toy_tasks import result_or_error


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


# ------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize(
    "lost", ["COMPLETED", "info.train.json", "stats.train.json", "train.tfrecord-00000-of-00001"]
)
def test_an_incomplete_task_is_refused_or_skipped(
    folder: Path, lost: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "data" / AG / lost).unlink()
    name = re.escape(lost.removesuffix("00001"))
    with pytest.raises(UserError, match=rf"{AG}: lacks {name}.*data\.on_missing_task='skip'"):
        load(folder)
    assert list(load(folder, on_missing_task="skip")) == [IMDB]
    assert f"skips 1 task(s), {AG}: incomplete; the last: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("info", {"num_shards": 2}, r"num_shards is 2, but the names of the files have 1"),
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
        # Truncated exactly where a record ends, or files of two runs.
        ("stats", {"examples": 7}, "field examples is 7, but the task's files hold 6 records"),
        ("stats", {"examples": 5}, "field examples is 5, but the task's files hold 6 records"),
    ],
)
def test_invalid_metadata_are_refused(
    folder: Path, file: str, fields: dict[str, Any], message: str
) -> None:
    edit_json(folder / "data" / AG / f"{file}.train.json", **fields)
    with pytest.raises(UserError, match=rf"{AG}/{file}\.train\.json: .*{message}") as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["info", "stats"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{\n", "line 2: not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b"\xff", "line 1: not UTF-8"),
    ],
)
def test_invalid_json_is_refused(folder: Path, name: str, text: bytes, message: str) -> None:
    (folder / "data" / AG / f"{name}.train.json").write_bytes(text)
    with pytest.raises(UserError, match=rf"{name}\.train\.json.*{message}"):
        load(folder)


def test_missing_and_foreign_shards(folder: Path) -> None:
    task_folder = folder / "data" / IMDB
    (task_folder / "train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(UserError, match=rf"{IMDB}/train\.tfrecord-00001-of-00002: missing; copy"):
        load(folder)
    task = load(folder, on_bad_row="skip")[IMDB]
    assert len(task.rows) == 7
    assert task.skipped == {f"{IMDB}, lost with train.tfrecord-00001-of-00002": 3}
    (task_folder / "train.tfrecord-00003-of-00004").touch()
    message = r"00000-of-00002 and train.*00003-of-00004 are of two runs"
    with pytest.raises(UserError, match=message):
        load(folder)
    (task_folder / "train.tfrecord-00003-of-00004").rename(
        task_folder / "train.tfrecord-00002-of-00002"
    )
    with pytest.raises(UserError, match="00002-of-00002 has a number that is too high"):
        load(folder)


# ------------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("record", "field", "message"),
    [
        (train_record(1, inputs_pretokenized=[]), "inputs_pretokenized", "holds 0 texts; it must"),
        (train_record(1, inputs_pretokenized=["a", "b"]), "inputs_pretokenized", "holds 2 texts"),
        (train_record(1, inputs_pretokenized=[1]), "inputs_pretokenized", "holds 1 numbers"),
        (train_record(1, targets_pretokenized=[b"\xff"]), "targets_pretokenized", "is not UTF-8"),
        (train_record(1, targets_pretokenized=[0.5]), "targets_pretokenized", "holds 1 numbers"),
        (train_record(1, answer_choices=[b"\xff"]), "answer_choices", "is not UTF-8"),
        (train_record(1, answer_choices=[1, 2]), "answer_choices", "holds numbers"),
        ({"other": ["x"]}, "inputs_pretokenized", "holds 0 texts"),
        (b"\x0a\xff", "record", "is no tf.train.Example"),
    ],
)
def test_bad_training_records(folder: Path, record: Any, field: str, message: str) -> None:
    records = [train_record(0), train_record(1), record, train_record(3)]
    write_task(folder / "data", AG, "train", records)
    at = rf"{AG}/train\.tfrecord-00000-of-00001, record 2: field {field} {message}"
    with pytest.raises(UserError, match=f"{at}.*data.on_bad_row='skip'") as error:
        load(folder)
    assert "\n" not in str(error.value)
    for _ in range(2):  # validated, then from the cache
        task = load(folder, on_bad_row="skip")[AG]
        assert [row.input for row in task.rows] == ["input 0", "input 1", "input 3"]
        assert task.rows[2].id == f"{AG}-3"
        assert task.skipped == {field: 1}
        seqio.TaskRegistry.remove(AG)


def test_a_task_needs_a_usable_row(folder: Path) -> None:
    write_task(folder / "data", AG, "train", [{"other": ["x"]}])
    with pytest.raises(UserError, match=f"{AG}: holds no usable row"):
        load(folder, on_bad_row="skip")


def test_empty_targets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [train_record(0), train_record(1, targets_pretokenized=[" \n"])]
    write_task(folder / "data", AG, "train", records)
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


def test_options_are_the_answer_choices(folder: Path) -> None:
    records = [
        train_record(1, targets_pretokenized=[" yes\n"], answer_choices=[" no", " yes", "yes"]),
        train_record(1, targets_pretokenized=["maybe"]),
        train_record(1, answer_choices=[]),
    ]
    task_folder = write_task(folder / "data", AG, "train", records)
    rows = [(row.outputs, row.options) for row in load(folder)[AG].rows]
    # Stripped and without repetition; none where the target is not among them.
    assert rows == [(("yes",), ("no", "yes")), (("maybe",), ()), (("yes",), ())]
    # Features that info.train.json does not name are not read.
    features = dict.fromkeys(p3_records.EVAL_FIELDS[:2], STRING)
    edit_json(task_folder / "info.train.json", features=features)
    assert not any(row.options for row in load(folder)[AG].rows)


def test_a_file_that_changes_during_the_run_is_detected(folder: Path) -> None:
    rows = load(folder)[AG].rows
    file = folder / "data" / AG / "train.tfrecord-00000-of-00001"
    raw = bytearray(file.read_bytes())
    raw[20] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="damaged or not where it was; has the file changed"):
        list(rows)


# ------------------------------------------------------------------------------- held-out


def with_bad_choice(**fields: list[Any]) -> list[Features]:
    first, second = choices(1, 0)
    return [*choices(0, 1), first, second | fields, *choices(2, 0)]


@pytest.mark.parametrize(
    ("records", "source", "message", "skipped"),
    [
        (with_bad_choice(idx=[1]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (with_bad_choice(idx=["1", "1"]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (with_bad_choice(idx=[1, -1]), "record 3", "idx must hold two numbers", {"idx": 2}),
        (with_bad_choice(idx=[1, 0]), "record 3", r"idx is \[1, 0\], as in an earlier", {"idx": 2}),
        (with_bad_choice(idx=[1, 2]), "row 1", "idx has no choice 1", {"idx": 2}),
        (
            with_bad_choice(is_correct=[2]),
            "record 3",
            "is_correct must hold 0 or 1",
            {"is_correct": 1, "idx": 1},
        ),
        (
            with_bad_choice(is_correct=[]),
            "record 3",
            "is_correct must hold 0 or 1",
            {"is_correct": 1, "idx": 1},
        ),
        (
            with_bad_choice(inputs_pretokenized=["other"]),
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
    folder: Path, records: list[Any], source: str, message: str, skipped: dict[str, int]
) -> None:
    records = [*records, *choices(3, 0)]
    write_task(folder / "data", RTE, "validation", records[:3], records[3:])
    # Records are numbered in their file; the fourth is the first of the second.
    source = "00001-of-00002, record 0" if source == "record 3" else source
    message = f"{RTE}.*{source}.*: field {message}.*on_bad_row"
    with pytest.raises(UserError, match=message) as error:
        load(folder, "validation")
    assert "\n" not in str(error.value)
    task = load(folder, "validation", on_bad_row="skip")[RTE]
    assert [row.id for row in task.rows] == [f"{RTE}-0", f"{RTE}-2", f"{RTE}-3"]
    assert task.skipped == skipped
    assert sum(len(row.options) for row in task.rows) + sum(skipped.values()) == 8


def test_rows_that_may_have_lost_choices_are_skipped(folder: Path) -> None:
    """No record shows that row 1 has lost the last of its three choices."""
    records = [record for row in range(5) for record in choices(row, 0, 3)]
    del records[5]
    task_folder = write_task(folder / "data", RTE, "validation", records)
    whole = load(folder, "validation")[RTE]  # no record is lost, so a row may have two choices
    assert [len(row.options) for row in whole.rows] == [3, 2, 3, 3, 3]
    edit_json(task_folder / "stats.validation.json", examples=15)
    task = load(folder, "validation", on_bad_row="skip")[RTE]
    assert [row.id for row in task.rows] == [f"{RTE}-{i}" for i in (0, 2, 3, 4)]
    assert task.skipped == {"idx": 2, f"{RTE}, lost with the end of a file": 1}
    # All may be incomplete: 4 rows with one more choice each have no more than 16 records.
    edit_json(task_folder / "stats.validation.json", examples=16)
    with pytest.raises(UserError, match=f"{RTE}: of 16 records only 12 are in complete rows"):
        load(folder, "validation", on_bad_row="skip")


# ------------------------------------------------------------------------------- fuzzing

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHARED_FOLDER = [HealthCheck.function_scoped_fixture]  # each example writes a folder of its own


@settings(max_examples=25, suppress_health_check=SHARED_FOLDER)
@given(
    rows=st.lists(st.tuples(TEXTS, TEXTS, st.lists(TEXTS, max_size=3)), min_size=1, max_size=6),
    shards=st.integers(1, 3),
)
def test_any_text_is_read_as_written(
    tmp_path: Path, rows: list[tuple[str, str, list[str]]], shards: int
) -> None:
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    records = [
        train_record(
            0, inputs_pretokenized=[text], targets_pretokenized=[target], answer_choices=options
        )
        for text, target, options in rows
    ]
    write_task(folder, "trec_x", "train", *(records[i::shards] for i in range(shards)))
    tasks, _ = p3.find_tasks(str(folder), "train")
    policy = p3_records.Policy(empty_targets="keep", cache_dir=str(tmp_path / "cache"))
    read = p3_records.read_train_task(tasks["trec_x"], policy).rows
    written = [row for i in range(shards) for row in rows[i::shards]]
    assert [(r.input, r.outputs[0]) for r in read] == [(a, b.strip()) for a, b, _ in written]
    for row, (_, target, options) in zip(read, written, strict=True):
        stripped = [option.strip() for option in options]
        assert row.options == (tuple(dict.fromkeys(stripped)) if target.strip() in stripped else ())


def damage_shard(file: Path, kind: str, number: int) -> None:
    """Flip a bit of a shard, truncate it, or remove it unless it is the last."""
    if kind == "lose":
        if len(list(file.parent.glob("*tfrecord*"))) > 1:
            file.unlink(missing_ok=True)
    elif file.exists():
        raw = bytearray(file.read_bytes())
        if kind == "flip" and raw:
            raw[number // 2 % len(raw)] ^= 1 << number % 8
        elif kind == "cut":
            raw = raw[: number // 2 % (len(raw) + 1)]
        file.write_bytes(raw)


@settings(max_examples=120, suppress_health_check=SHARED_FOLDER)
@given(
    split=st.sampled_from(["train", "validation"]),
    damage=st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "lose"]), st.integers(0, 10**6)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_files_are_refused_or_their_records_counted(
    tmp_path: Path, split: str, damage: list[tuple[str, int]]
) -> None:
    folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
    train = split == "train"
    name = "trec_x" if train else RTE
    records = [train_record(i) for i in range(9)]
    expected = {(f"input {i}", ("no", "yes")[i % 2]) for i in range(9)}
    if not train:
        records = [record for i in range(10) for record in choices(i, i % 2)]
        expected = {(f"question {i}", f"choice {i % 2}") for i in range(10)}
    task_folder = write_task(folder, name, split, records[:5], records[5:])
    whole = {file: file.read_bytes() for file in sorted(task_folder.glob("*tfrecord*"))}
    for kind, number in damage:
        damage_shard(list(whole)[number % 2], kind, number)
    intact = all(file.exists() and file.read_bytes() == raw for file, raw in whole.items())
    task = p3.find_tasks(str(folder), split)[0][name]
    read = p3_records.read_train_task if train else p3_records.read_eval_task
    cache = str(tmp_path / "cache")
    if intact:  # two flips of one bit
        assert not read(task, p3_records.Policy(cache_dir=cache)).skipped
        return
    with pytest.raises(UserError) as error:
        read(task, p3_records.Policy(cache_dir=cache))
    assert "\n" not in str(error.value)
    skip = p3_records.Policy(on_bad_row="skip", cache_dir=cache)
    usable, message = result_or_error(lambda: read(task, skip))
    if usable is None:
        assert re.search("holds no usable row|too few to infer the number", message)
        return
    rows = list(usable.rows)
    assert len(rows) * (1 if train else 2) + sum(usable.skipped.values()) == len(records)
    assert {(row.input, row.outputs[0]) for row in rows} <= expected
    assert all(len(row.options) == 2 for row in rows)
