"""Reader of stores: a mixture's tasks as sharded TFRecords with random access, and a manifest.

`hyper_t5.tools.build_dataset` writes them with TensorFlow Datasets:

    FOLDER/hyper_t5-SPLIT.tfrecord-00000-of-00008    and TFDS's own JSON files
    FOLDER/manifest.json                             written last; a build without it is unfinished

A record is a row (id, input, outputs, options, name of the task); the rows of a task are
consecutive. The manifest has the rest of each task (instructions, examples, category, rate, range
of its rows) and size and SHA-256 of every shard. Reading needs no TensorFlow; FOLDER may be local
or on any file system of `etils.epath`, such as gs://.

The manifest, format 1:

    {"format": 1,
     "made_from": {"mixture": ..., "data": {fields of the config that determine the rows}}
                  or {"text": [{"name": file, "bytes": n}, ...], "data": {...}},
     "file_format": "tfrecord",
     "splits": {SPLIT: {"records": n, "bytes": n,
                        "shards": [{"name", "records", "bytes", "sha256"}, ...],
                        "tasks": [{"name", "category", "rate", "rows": [first, end],
                                   "instructions", "examples", "skipped"}, ...]}},
     "records": n, "bytes": n}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from etils import epath

from hyper_t5.data import tfrecord
from hyper_t5.data.task_rows import LazyRows, TaskData, TaskRow
from hyper_t5.tasks.dataset import Dataset
from hyper_t5.tasks.rows import choose_rows
from hyper_t5.utils.errors import UserError

FORMAT = 1
MANIFEST = "manifest.json"
REBUILD = "build it again (hyper-t5 build)"
READERS = 8  # shards checked in parallel: most of the time is a bucket's latency

# Fields of config.data that determine the rows of any dataset, beside its own options.
SETTINGS = ("max_instances_per_task", "on_bad_row", "on_missing_task", "empty_targets")


# ------------------------------------------------------------------------------- the manifest


def data_fields(data_config: Any, dataset: Dataset) -> dict[str, Any]:
    """Return the fields of ``config.data`` that the manifest records; of paths the last part."""
    fields: dict[str, Any] = {}
    for name in (*dataset.options, *SETTINGS):
        value = data_config[name]
        if name not in dataset.paths:
            fields[name] = value
        elif value:
            fields[name] = PurePosixPath(value.rstrip("/")).name
    return fields


def task_entry(task: TaskData, first: int) -> dict[str, Any]:
    """Return the manifest's entry of a task whose rows begin at record ``first`` of its split."""
    return {
        "name": task.name,
        "category": task.category,
        "rate": task.rate,
        "rows": [first, first + len(task.rows)],
        "instructions": list(task.instructions),
        "examples": [list(example) for example in task.examples],
        "skipped": dict(task.skipped),
    }


def write_manifest(folder: epath.Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest atomically.

    Raises:
      UserError: it cannot be written.
    """
    part = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(folder / MANIFEST)
    except OSError as error:
        raise UserError(f"cannot write {folder / MANIFEST}: {error.strerror or error}") from None


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Read the manifest of a store.

    Raises:
      UserError: no store, an unfinished one, a damaged manifest, or one of another format.
    """
    file = folder / MANIFEST
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_manifest(folder)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read ({error})") from None
    try:
        manifest = json.loads(text)
        version = manifest["format"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file}: damaged, or not a store's manifest; {REBUILD}") from None
    if version != FORMAT:
        raise UserError(f"{file}: format {version}, and this version reads {FORMAT}; {REBUILD}")
    return manifest


def _no_manifest(folder: epath.Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; data.store is what `hyper-t5 build` printed"
    inside = sorted(str(file.parent) for file in folder.glob(f"hyper_t5/*/*/{MANIFEST}"))
    if inside:
        return f"{folder}: holds stores but is none itself; set data.store={inside[0]!r}"
    return f"{folder}: has no {MANIFEST}: not a store, or its build was interrupted; {REBUILD}"


# ---------------------------------------------------------------------------------- reading


class Store:
    """An open store; see `open_store`. Any number of threads may read its rows."""

    def __init__(self, folder: epath.Path, manifest: Mapping[str, Any], cache_dir: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self._cache_dir = cache_dir
        self._indices: dict[str, tfrecord.Index] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of its splits."""
        return tuple(self.manifest["splits"])

    def tasks(self, split: str) -> list[TaskData]:
        """Return the tasks of a split in order, with lazy rows.

        Raises:
          UserError: there is no such split.
        """
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{self.folder}: has no split {split!r}; it has {', '.join(self.splits)}"
            )
        rows = _Rows(self, self.manifest["splits"][split]["shards"])
        return [
            TaskData(
                entry["name"],
                tuple(entry["instructions"]),
                tuple((shown, answer) for shown, answer in entry["examples"]),
                LazyRows(rows.read, range(*entry["rows"])),
                entry["category"],
                float(entry["rate"]),
                entry["skipped"],
            )
            for entry in self.manifest["splits"][split]["tasks"]
        ]

    def check_size(self, shard: Mapping[str, Any]) -> None:
        """Raise UserError where a shard is missing or its size is not the manifest's."""
        file = self.folder / shard["name"]
        try:
            size = file.stat().length
        except FileNotFoundError:
            raise UserError(f"{file}: missing; copy the store again, or {REBUILD}") from None
        except OSError as error:
            raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
        if size != shard["bytes"]:
            raise UserError(
                f"{file}: truncated or altered, it has {size} bytes and was written with "
                f"{shard['bytes']}; copy the store again, or {REBUILD}"
            )

    def index(self, shard: Mapping[str, Any]) -> tfrecord.Index:
        """Return the index of a shard's records, with its digest checked. Read once.

        Raises:
          UserError: the shard is missing or altered.
        """
        name = shard["name"]
        if name not in self._indices:
            file = os.fspath(self.folder / name)
            # A damaged record is not skipped silently: it changes the digest.
            index = tfrecord.index(file, self._cache_dir, on_bad_row="skip")
            if index.sha256 != shard["sha256"] or len(index.offsets) != shard["records"]:
                raise UserError(
                    f"{file}: altered, its SHA-256 is not the manifest's; copy the store again, "
                    f"or {REBUILD}"
                )
            self._indices[name] = index
        return self._indices[name]


class _Rows:
    """Random access to the records of a split."""

    def __init__(self, store: Store, shards: list[dict[str, Any]]) -> None:
        self._store = store
        self._shards = shards
        self._ends = np.cumsum([shard["records"] for shard in shards], dtype=np.int64)

    def read(self, number: int) -> TaskRow:
        shard_number = int(np.searchsorted(self._ends, number, "right"))
        shard = self._shards[shard_number]
        index = self._store.index(shard)
        record = number - int(self._ends[shard_number]) + shard["records"]
        file = os.fspath(self._store.folder / shard["name"])
        raw = tfrecord.read(file, int(index.offsets[record]), int(index.lengths[record]))
        return _row(raw, f"{file}, record {record}")


def _row(raw: bytes, source: str) -> TaskRow:
    try:
        features = tfrecord.parse_example(raw, ("id", "input", "outputs", "options"))
        text = {name: [str(b, "utf-8") for b in values] for name, values in features.items()}
        [row_id], [row_input] = text["id"], text["input"]
    except (ValueError, TypeError):
        raise UserError(f"{source}: is not a row of a task; {REBUILD}") from None
    return TaskRow(row_id, row_input, tuple(text["outputs"]), tuple(text["options"]))


def open_store(
    folder: str | os.PathLike[str],
    cache_dir: str = "",
    process_index: int = 0,
    process_count: int = 1,
) -> Store:
    """Open a store and check it before training starts.

    Every process checks the sizes of all shards and the digest of every ``process_count``-th one,
    for which it reads the shard; results are cached by size and time, so a second start is quick.
    The other shards are checked on first access.

    Args:
      folder: the value of `hyper_t5.tools.build_dataset.build`, or a copy of it anywhere.
      cache_dir: ``data.cache_dir``.
      process_index: of this process.
      process_count: of the run.

    Raises:
      UserError: unfinished, missing, truncated or altered; names the shard and the remedy.
    """
    path = epath.Path(folder).expanduser()
    manifest = read_manifest(path)
    if manifest["file_format"] != "tfrecord":
        raise UserError(
            f"{path}: its records are {manifest['file_format']}, and rows are read from tfrecord "
            "alone, which has random access in buckets; build it again without --file_format"
        )
    store = Store(path, manifest, cache_dir)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(store.check_size, shards):
            pass
        for _ in pool.map(store.index, shards[process_index::process_count]):
            pass
    return store


def load_store_tasks(
    data_config: Any,
    mixture: str,
    dataset: Dataset,
    split: str,
    process_index: int = 0,
    process_count: int = 1,
) -> list[TaskData]:
    """Load the tasks of a split from ``data.store``: same rows and rates as from the dataset.

    Args:
      data_config: ``config.data``.
      mixture: name of the dataset that the store must be built from.
      dataset: its registry entry.
      split: name of the split.
      process_index: see `open_store`.
      process_count: see `open_store`.

    Raises:
      UserError: from `open_store`; or the store is built from something else, lacks the split, or
        has other options or a lower ``data.max_instances_per_task``.
    """
    store = open_store(data_config.store, data_config.cache_dir, process_index, process_count)
    source = store.manifest["made_from"]
    if source.get("mixture") != mixture:
        kind = f"mixture {source['mixture']}" if "mixture" in source else "text"
        raise UserError(
            f"data.store={data_config.store!r} is built from {kind}, and data.mixture is "
            f"{mixture}; {REBUILD} from that, or set data.mixture"
        )
    recorded = source["data"]
    limit = data_config.max_instances_per_task
    # Another path may hold the same files; another option of the dataset means other rows.
    fields = [name for name in dataset.options if name not in dataset.paths]
    for field in (*fields, "max_instances_per_task"):
        built_with, wanted = recorded.get(field), data_config[field]
        if built_with and built_with != wanted:
            raise UserError(
                f"data.store={data_config.store!r} was built with data.{field}={built_with}, and "
                f"the config has {wanted}; set the same, or {REBUILD} with that"
            )
    tasks = store.tasks(split)
    if limit and not recorded["max_instances_per_task"]:
        # T0's rule, which every mixture follows where rows are limited (Sanh et al. 2022, 3).
        tasks = [choose_rows(task, split, limit) for task in tasks]
        tasks = [replace(task, rate=float(len(task.rows))) for task in tasks]
    return tasks
