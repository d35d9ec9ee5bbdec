"""Stores: tasks and text survive a build; damaged and unfinished stores are refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from hyper_t5 import config, pipeline
from hyper_t5.data.task_rows import LazyRows, TaskData
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.tasks import MIXTURES, store
from hyper_t5.tasks.seqio_tasks import seqio, tfds
from hyper_t5.tools import build_dataset
from hyper_t5.utils.errors import UserError
from tests.support import tiny_runs

BYTES = ByteVocabulary()
# Rows of each task, by split; lengths differ, and shards are cut in the middle of tasks.
SIZES = {"train": {"task1_a": 7, "task2_b": 12, "task3_c": 1}, "test": {"task4_d": 5}}


def sni_object(name: str, rows: int) -> dict[str, Any]:
    examples = 0 if name == "task1_a" else 2
    return {
        "Categories": [f"kind of {name}"],
        "Definition": [f"Do {name}.", f"Please do {name} – ändern."],
        "Positive Examples": [
            {"input": f"{name} ex {i}", "output": f"{i}"} for i in range(examples)
        ],
        "Instances": [
            {
                "id": f"{name}-{i}",
                "input": f"{name} in {i} ✓",
                "output": ["eins", f"zwei\n{i}"][: 1 + i % 2],
            }
            for i in range(rows)
        ],
    }


@pytest.fixture
def sni_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my sni"
    (folder / "tasks").mkdir(parents=True)
    (folder / "splits" / "default").mkdir(parents=True)
    for split, sizes in SIZES.items():
        for name, rows in sizes.items():
            text = json.dumps(sni_object(name, rows))
            (folder / "tasks" / f"{name}.json").write_text(text)
        (folder / "splits" / "default" / f"{split}_tasks.txt").write_text("\n".join(sizes))
    return folder


def section(sni_dir: Path, **fields: Any) -> ConfigDict:
    data_config = config.defaults().data
    data_config.update({"mixture": "sni", "sni_dir": str(sni_dir), "vocab": "bytes"} | fields)
    data_config.cache_dir = str(sni_dir.parent / "cache")
    return data_config


def make(sni_dir: Path, shards: int = 3, name: str = "out", **fields: Any) -> Path:
    folder = build_dataset.build(
        section(sni_dir, **fields), sni_dir.parent / name, mixture="sni", shards=shards
    )
    return Path(os.fspath(folder))


def plain(tasks: list[TaskData]) -> list[TaskData]:
    """Return tasks that can be compared, with the rows in memory."""
    return [replace(task, rows=tuple(task.rows), skipped=dict(task.skipped)) for task in tasks]


def shards_of(folder: Path, split: str = "train") -> list[Path]:
    return sorted(folder.glob(f"*-{split}.tfrecord-*"))


# ------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("shards", [1, 3])
def test_a_store_has_the_tasks_of_its_source(sni_dir: Path, shards: int) -> None:
    folder = make(sni_dir, shards)
    assert len(shards_of(folder)) == len(shards_of(folder, "test")) == shards
    for split, sizes in SIZES.items():
        expected = pipeline.load_tasks("sni", section(sni_dir), split, BYTES)
        loaded = store.load_store_tasks(
            section(sni_dir, store=str(folder)), "sni", MIXTURES["sni"], split
        )
        assert plain(loaded) == plain(expected)
        assert {task.name: len(task.rows) for task in loaded} == sizes
        assert all(isinstance(task.rows, LazyRows) for task in loaded)
        by_pipeline = pipeline.load_tasks("sni", section(sni_dir, store=str(folder)), split, BYTES)
        assert plain(by_pipeline) == plain(expected)
    # Rows are also read in any order.
    rows = loaded[0].rows
    assert [rows[i].id for i in (3, 0, 4)] == ["task4_d-3", "task4_d-0", "task4_d-4"]


def test_rows_keep_their_order_through_temporary_files(
    sni_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffle = importlib.import_module("tensorflow_datasets.core.shuffle")
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 200)
    buckets = set()
    number_of = shuffle.get_bucket_number

    def spy(*args: Any, **named: Any) -> int:
        number = number_of(*args, **named)
        buckets.add(number)
        return int(number)

    monkeypatch.setattr(shuffle, "get_bucket_number", spy)
    folder = make(sni_dir)
    expected = pipeline.load_tasks("sni", section(sni_dir), "train", BYTES)
    assert plain(store.open_store(folder).tasks("train")) == plain(expected)
    assert len(buckets) >= 20, "TFDS sorts a bucket in memory, and few of them hold all rows"


TEXTS = st.text(max_size=30)
ANY_ROW = st.fixed_dictionaries(
    {
        "task": TEXTS,
        "id": TEXTS,
        "input": TEXTS,
        "outputs": st.lists(TEXTS, min_size=1, max_size=4),
        "options": st.lists(TEXTS, max_size=4),
    }
)


@settings(max_examples=60)
@given(row=ANY_ROW)
def test_any_row_survives(row: dict[str, Any]) -> None:
    features = _features()
    parsed = store._row(features.serialize_example(row), "source")
    assert (parsed.id, parsed.input) == (row["id"], row["input"])
    assert (list(parsed.outputs), list(parsed.options)) == (row["outputs"], row["options"])


def _features() -> Any:
    if not _cached_features:
        _cached_features.append(build_dataset.HyperT5(data_dir="none", config="sni").info.features)
    return _cached_features[0]


_cached_features: list[Any] = []


def test_manifest(sni_dir: Path) -> None:
    folder = make(sni_dir, max_instances_per_task=10, on_bad_row="skip")
    text = (folder / store.MANIFEST).read_text()
    assert str(sni_dir.parent) not in text
    manifest = json.loads(text)
    assert manifest["made_from"] == {
        "mixture": "sni",
        "data": {
            "sni_dir": "my sni",
            "max_instances_per_task": 10,
            "on_bad_row": "skip",
            "on_missing_task": "raise",
            "empty_targets": "raise",
        },
    }
    assert (manifest["format"], manifest["file_format"]) == (1, "tfrecord")
    assert manifest["records"] == 7 + 10 + 1 + 5
    train = manifest["splits"]["train"]
    assert [task["rows"] for task in train["tasks"]] == [[0, 7], [7, 17], [17, 18]]
    assert [task["rate"] for task in train["tasks"]] == [7.0, 10.0, 1.0]
    assert train["tasks"][1]["examples"] == [["task2_b ex 0", "0"], ["task2_b ex 1", "1"]]
    assert sum(shard["records"] for shard in train["shards"]) == 18
    assert {s["name"]: s["bytes"] for s in train["shards"]} == {
        file.name: file.stat().st_size for file in shards_of(folder)
    }
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_a_limit_of_rows_selects_those_of_the_source(sni_dir: Path) -> None:
    folder = str(make(sni_dir))
    fields = {"max_instances_per_task": 5}
    for split in SIZES:
        expected = pipeline.load_tasks("sni", section(sni_dir, **fields), split, BYTES)
        loaded = store.load_store_tasks(
            section(sni_dir, store=folder, **fields), "sni", MIXTURES["sni"], split
        )
        assert plain(loaded) == plain(expected)
        assert all(isinstance(task.rows, LazyRows) for task in loaded)
    capped = make(sni_dir, name="capped", **fields)
    same = section(sni_dir, store=str(capped), **fields)
    assert len(store.load_store_tasks(same, "sni", MIXTURES["sni"], "train")[0].rows) == 5
    same.max_instances_per_task = 0
    with pytest.raises(UserError, match=r"max_instances_per_task=5, and the config has 0"):
        store.load_store_tasks(same, "sni", MIXTURES["sni"], "train")


def test_another_mixture_or_split_is_refused(sni_dir: Path, tmp_path: Path) -> None:
    folder = make(sni_dir)
    data_config = section(sni_dir, store=str(folder))
    with pytest.raises(
        UserError, match=r"built from mixture sni, and data.mixture is glue; .*build"
    ):
        store.load_store_tasks(data_config, "glue", MIXTURES["glue"], "train")
    with pytest.raises(UserError, match=r"has no split 'validation'; it has train, test"):
        store.load_store_tasks(data_config, "sni", MIXTURES["sni"], "validation")
    file = folder / store.MANIFEST
    manifest = json.loads(file.read_text())
    manifest["made_from"]["mixture"] = "metaicl"
    manifest["made_from"]["data"]["metaicl_setting"] = "class_to_class"
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"metaicl_setting=class_to_class, and the config has hr"):
        store.load_store_tasks(data_config, "metaicl", MIXTURES["metaicl"], "train")


# ------------------------------------------------------------------------------- invalid


def test_damaged_shards_are_named(sni_dir: Path) -> None:
    folder, cache = make(sni_dir), str(sni_dir.parent / "cache")
    store.open_store(folder, cache)
    file = shards_of(folder)[1]
    good = file.read_bytes()
    name = re.escape(file.name)
    file.write_bytes(good[:-3])
    with pytest.raises(UserError, match=rf"{name}: truncated or altered, it has .* bytes and was"):
        store.open_store(folder, cache)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: missing; copy the store again"):
        store.open_store(folder, cache)
    for offset in (5, len(good) // 2):  # in a header; in a row
        file.write_bytes(good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :])
        with pytest.raises(UserError, match=rf"{name}: altered, its SHA-256") as error:
            store.open_store(folder, cache)
        assert "\n" not in str(error.value)
    # Another row with a valid checksum: only the digest differs.
    file.write_bytes(good)
    [first, *_] = zip(*store.tfrecord.scan(file)[:2], strict=True)
    begin, end = int(first[0]), int(sum(first))
    other = good[begin:end].replace(b"task", b"tusk")
    assert other != good[begin:end]
    crc = store.tfrecord.FOOTER.pack(store.tfrecord.masked_crc(other))
    file.write_bytes(good[:begin] + other + crc + good[end + 4 :])
    assert len(store.tfrecord.scan(file).offsets) == 6
    with pytest.raises(UserError, match=rf"{name}: altered, its SHA-256"):
        store.open_store(folder, cache)
    file.write_bytes(good)
    assert len(store.open_store(folder, cache).tasks("train")) == 3


def test_processes_share_the_digests(sni_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, caches = make(sni_dir, 4), [str(sni_dir.parent / f"process{i}") for i in range(2)]
    scanned: list[str] = []
    scan = store.tfrecord.scan

    def spy(file: Any, *args: Any, **named: Any) -> Any:
        scanned.append(Path(file).name)
        return scan(file, *args, **named)

    monkeypatch.setattr(store.tfrecord, "scan", spy)
    opened = [store.open_store(folder, caches[index], index, 2) for index in range(2)]
    names = [file.name for split in SIZES for file in shards_of(folder, split)]
    assert sorted(scanned) == sorted(names)
    scanned.clear()
    expected = plain(store.open_store(folder).tasks("train"))
    scanned.clear()
    assert [plain(shard.tasks("train")) for shard in opened] == [expected, expected]
    assert len(scanned) == 4, "a process scans the other's two shards when it needs them"
    scanned.clear()
    store.open_store(folder, caches[0], 0, 2)
    assert not scanned, "a second start reads the cached index"
    # An altered shard is detected when a row of it is read.
    file = shards_of(folder)[1]
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    opened_store = store.open_store(folder, caches[0], 0, 2)
    with pytest.raises(UserError, match=rf"{re.escape(file.name)}: altered"):
        plain(opened_store.tasks("train"))


def test_unfinished_builds_are_refused_and_repeated(
    sni_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = sni_dir.parent / "out"
    folder = out / "hyper_t5" / "sni" / "1.0.0"
    rows = build_dataset._rows

    def interrupted(tasks: Any) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows(tasks)):
            if number == 9:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(build_dataset, "_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make(sni_dir)
    with pytest.raises(UserError, match="no such folder"):
        store.open_store(folder)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # all shards are written, the manifest is not
        patch.setattr(store, "write_manifest", stop)
        with pytest.raises(KeyboardInterrupt):
            make(sni_dir)
    assert shards_of(folder)
    with pytest.raises(UserError, match=r"has no manifest\.json: .* interrupted; build it again"):
        store.open_store(folder)
    capsys.readouterr()
    assert make(sni_dir, 2) == folder
    assert "an interrupted build; it is built again" in capsys.readouterr().out
    assert len(shards_of(folder)) == 2
    assert len(store.open_store(folder).tasks("train")) == 3
    with pytest.raises(
        UserError, match=rf"holds stores but is none itself; set data\.store='{folder}'"
    ):
        store.open_store(out)


def write_again(sni_dir: Path, name: str, task: dict[str, Any]) -> None:
    """Write a task file again and unregister it: SeqIO reads a path once per process."""
    (sni_dir / "tasks" / f"{name}.json").write_text(json.dumps(task))
    seqio.TaskRegistry.remove(f"sni_{name}")
    seqio.MixtureRegistry.remove("sni_train")


def test_building_twice(sni_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(sni_dir)
    before = (folder / store.MANIFEST).stat().st_mtime_ns
    capsys.readouterr()
    assert make(sni_dir, 2) == folder
    assert "built from the same source already" in capsys.readouterr().out
    assert (folder / store.MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"holds a store of another source \(made_from differ\)"):
        make(sni_dir, max_instances_per_task=4)
    write_again(sni_dir, "task3_c", sni_object("task3_c", 2))
    with pytest.raises(UserError, match=r"another source \(splits differ\); .* or --overwrite"):
        make(sni_dir)
    write_again(sni_dir, "task3_c", sni_object("task3_c", 1) | {"Definition": ["Other."]})
    with pytest.raises(UserError, match=r"another source \(tasks of train differ\)"):
        make(sni_dir)
    assert (folder / store.MANIFEST).stat().st_mtime_ns == before
    build_dataset.build(
        section(sni_dir), folder.parents[2], mixture="sni", shards=1, overwrite=True
    )
    assert len(shards_of(folder)) == 1
    tasks = store.open_store(folder).tasks("train")
    assert tasks[2].instructions == ("Other.",)
    assert len(plain(tasks)[2].rows) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged, or not a store's manifest"),
        ("[]", "damaged, or not a store's manifest"),
        ('{"format": 2}', "format 2, and this version reads 1"),
    ],
)
def test_invalid_manifests_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / store.MANIFEST).write_text(text)
    with pytest.raises(UserError, match=rf"manifest\.json: {message}.*; build it again"):
        store.open_store(tmp_path)


def test_invalid_builds_are_refused(sni_dir: Path, tmp_path: Path) -> None:
    data_config = section(sni_dir)
    with pytest.raises(UserError, match="from a mixture or from text: set one"):
        build_dataset.build(data_config, tmp_path / "out")
    with pytest.raises(UserError, match=r"unknown data.mixture 'snii'"):
        build_dataset.build(data_config, tmp_path / "out", mixture="snii")
    with pytest.raises(UserError, match=r"split test has 5 records, too few for 6 shards"):
        make(sni_dir, 6)
    with pytest.raises(UserError, match="from local files"):
        build_dataset.build(data_config, tmp_path / "out", text="tfds:c4")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file: cannot be written"):
        build_dataset.build(data_config, tmp_path / "file", mixture="sni")
    data_config.store = "ignored by a build"
    build_dataset.build(data_config, tmp_path / "out", mixture="sni", shards=1)


def test_array_record_is_refused(sni_dir: Path, tmp_path: Path) -> None:
    builder = build_dataset.HyperT5(
        data_dir=str(tmp_path), config="sni", file_format="array_record"
    )
    builder.data_config = section(sni_dir)
    builder.download_and_prepare()
    with pytest.raises(UserError, match="are array_record, and rows are read from tfrecord"):
        store.open_store(builder.data_dir)


# ----------------------------------------------------------------------------------- text

DOCUMENTS = [f"document {i} of them, and so on {'on ' * (5 + i)}end {i}" for i in range(23)]


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "books.jsonl"
    file.write_text("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS))
    return file


def test_text_to_chunks(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run_config = config.defaults()
    folder = build_dataset.build(run_config.data, tmp_path / "out", text=str(text_file), shards=3)
    assert "data.text=tfds:hyper_t5/books:1.0.0" in capsys.readouterr().out
    manifest = json.loads((folder / store.MANIFEST).read_text())
    assert manifest["made_from"]["text"][0]["name"] == "books.jsonl"
    assert [s["records"] for s in manifest["splits"]["train"]["shards"]] == [8, 7, 8]
    rows = tfds.builder("hyper_t5/books:1.0.0", data_dir=tmp_path / "out").as_dataset("train")
    assert [row["text"].decode() for row in rows.as_numpy_iterator()] == DOCUMENTS
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "out"))
    run_config.stage = "hyperpretrain"
    run_config.data.update({"vocab": "bytes", "chunk_length": 64, "tasks_per_batch": 4})
    run_config.data.text = "tfds:hyper_t5/books:1.0.0"
    sampler = pipeline.make_sampler(run_config, BYTES)
    for step in range(3):
        batch = sampler.batch(step)
        for ids, target in zip(batch["inputs"], batch["targets"], strict=True):
            passage = BYTES.decode(ids[0]) + BYTES.decode(target[0])
            assert passage
            assert any(passage in document for document in DOCUMENTS)
    run_config.data.store = os.fspath(folder)
    with pytest.raises(UserError, match=r"built from text, and data.mixture is sni"):
        store.load_store_tasks(run_config.data, "sni", MIXTURES["sni"], "train")


def test_text_twice(text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_config = config.defaults().data
    folder = build_dataset.build(data_config, tmp_path / "out", text=str(text_file))
    assert build_dataset.build(data_config, tmp_path / "out", text=str(text_file)) == folder
    assert "same source already" in capsys.readouterr().out
    text = text_file.read_text()
    text_file.write_text(text.replace("document 0", "document x"))
    with pytest.raises(UserError, match="store of another source"):
        build_dataset.build(data_config, tmp_path / "out", text=str(text_file))
    text_file.write_text(text + "{}\n")
    with pytest.raises(UserError, match=r"books\.jsonl, line 24: lacks field text"):
        build_dataset.build(data_config, tmp_path / "new", text=str(text_file))
    data_config.on_bad_row = "skip"
    build_dataset.build(data_config, tmp_path / "new", text=str(text_file))
    assert "1 bad rows skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "name"),
    [("a/books/*.jsonl.xz", "books"), ("b/c4-en.jsonl", "c4_en"), ("x/", "x"), ("*.txt", "text")],
)
def test_names_of_text(text: str, name: str) -> None:
    assert build_dataset.text_name(text) == name


# ------------------------------------------------------------------------------- other programs


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            "sni_dirr=x",
            r"HYPER_T5_DATA: unknown field data\.sni_dirr, the nearest is data\.sni_dir",
        ),
        ("on_bad_row=never", "on_bad_row"),
        ("sni_dir", "HYPER_T5_DATA: expected field=value, got 'sni_dir'"),
        ("sni_dir='x", "HYPER_T5_DATA: No closing quotation"),
        ("input_length=many", "data.input_length expects an integer"),
    ],
)
def test_environment(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    monkeypatch.setenv("HYPER_T5_DATA", value)
    with pytest.raises(UserError, match=message):
        build_dataset.config_of_environment()
    monkeypatch.setenv("HYPER_T5_DATA", "sni_dir='a b' data.shots=0,1")
    data_config = build_dataset.config_of_environment().data
    assert (data_config.sni_dir, data_config.shots, data_config.mixture) == ("a b", (0, 1), "")


def test_tasks_are_registered_by_an_import(
    sni_dir: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"mixture=sni 'sni_dir={sni_dir}' vocab=bytes text={text_file}"
    monkeypatch.setenv("HYPER_T5_DATA", words)
    module = importlib.import_module("hyper_t5.tools.seqio_tasks")
    importlib.reload(module)
    for name in ("sni_task1_a", "sni_task4_d"):
        assert seqio.TaskRegistry.get(name).supports_caching
    assert [n for n in seqio.TaskRegistry.names() if n.startswith("text_books_")]
    for words, message in [
        ("", "set mixture=NAME or text=FILES"),
        ("mixture=x", "mixture 'x'"),
    ]:
        monkeypatch.setenv("HYPER_T5_DATA", words)
        with pytest.raises(SystemExit, match=rf"^HYPER_T5_DATA: .*{message}"):
            importlib.reload(module)


def run(command: list[str], repo_root: Path, **environment: str) -> str:
    process = subprocess.run(
        command,
        cwd=repo_root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


MODULE = [sys.executable, "-m", "hyper_t5.tools.build_dataset"]
TFDS = [str(Path(sys.executable).with_name("tfds")), "build", "hyper_t5/tools/build_dataset.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [pytest.param(MODULE, marks=pytest.mark.soak, id="m"), pytest.param(TFDS, id="tfds")]
)
def test_tfds_build(
    command: list[str], sni_dir: Path, text_file: Path, tmp_path: Path, repo_root: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--config", "sni", "--data_dir", str(out), "--num_shards", "2"]
    run([*command, *flags], repo_root, HYPER_T5_DATA=f"'sni_dir={sni_dir}'")
    folder = out / "hyper_t5" / "sni" / "1.0.0"
    expected = pipeline.load_tasks("sni", section(sni_dir), "train", BYTES)
    assert plain(store.open_store(folder).tasks("train")) == plain(expected)
    assert len(shards_of(folder)) == 2
    printed = run([*command, *flags], repo_root, HYPER_T5_DATA=f"'sni_dir={sni_dir}'")
    assert "built from the same source already" in printed
    flags[-1] = "1"
    run([*command, *flags, "--overwrite"], repo_root, HYPER_T5_DATA=f"'sni_dir={sni_dir}'")
    assert len(shards_of(folder)) == 1
    books = json.dumps({"name": "my_books", "text": str(text_file)})
    run([*command, "--config", books, "--data_dir", str(out)], repo_root)
    rows = tfds.builder("hyper_t5/my_books:1.0.0", data_dir=out).as_dataset("train")
    assert [row["text"].decode() for row in rows.as_numpy_iterator()] == DOCUMENTS


@pytest.mark.slow
def test_seqio_cache_tasks(sni_dir: Path, text_file: Path, tmp_path: Path, repo_root: Path) -> None:
    cache = tmp_path / "seqio cache"
    words = f"mixture=sni 'sni_dir={sni_dir}' vocab=bytes text={text_file}"
    command = [
        str(Path(sys.executable).with_name("seqio_cache_tasks")),
        "--module_import=hyper_t5.tools.seqio_tasks",
        "--tasks=sni_task.*,text_.*",
        "--min_shards=1",
        f"--output_cache_dir={cache}",
    ]
    run(command, repo_root, HYPER_T5_DATA=words)
    data_config = section(sni_dir, text=str(text_file))
    names = [f"sni_{name}" for sizes in SIZES.values() for name in sizes]
    for split in SIZES:
        pipeline.load_tasks("sni", data_config, split, BYTES)
    names.append(importlib.import_module("hyper_t5.tasks.text").register(str(text_file), BYTES))
    for name in names:
        task = seqio.get_mixture_or_task(name)
        seqio.add_global_cache_dirs([str(cache)])
        [split] = task.splits
        lengths = dict.fromkeys(task.output_features, 60)
        examples = [
            sorted(
                (
                    _values(row)
                    for row in task.get_dataset(
                        lengths, split, shuffle=False, use_cached=cached
                    ).as_numpy_iterator()
                ),
                key=repr,
            )
            for cached in (True, False)
        ]
        assert examples[0] == examples[1]
        assert examples[0]


def _values(row: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in sorted(row.items())}


WITHOUT_TENSORFLOW = """
import sys

for name in ("tensorflow", "seqio", "tensorflow_text", "t5x"):
    sys.modules[name] = None  # an import of it fails, as where it is not installed
from hyper_t5 import cli

for argv in ARGVS:
    assert cli.main(argv) == 0, argv
"""


@pytest.mark.slow
def test_a_store_needs_no_tensorflow(text_file: Path, tmp_path: Path) -> None:
    sni, backbone = tiny_runs.save_sni(tmp_path / "sni"), tiny_runs.save_backbone(tmp_path / "t5")
    fields = {"backbone__path": str(backbone), "data__sni_dir": str(sni), "train__steps": 2}
    fields |= {"data__cache_dir": str(tmp_path / "cache")}
    built = build_dataset.build(tiny_runs.make_config(**fields).data, tmp_path / "s", mixture="sni")
    fields |= {"data__store": os.fspath(built), "system": "hyper_prefix"}
    mtf = tiny_runs.make_config(**fields)
    text = {"stage": "hyperpretrain", "data__text": str(text_file)}
    hyperpretrain = tiny_runs.make_config(**fields | text)
    argvs = [
        tiny_runs.command(mtf, tmp_path / "mtf"),
        ["evaluate", f"--workdir={tmp_path / 'mtf'}"],
        tiny_runs.command(hyperpretrain, tmp_path / "text"),
    ]
    code = WITHOUT_TENSORFLOW.replace("ARGVS", repr(argvs))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mtf" / "checkpoints" / "2").is_dir()
    assert (tmp_path / "text" / "checkpoints" / "2").is_dir()
