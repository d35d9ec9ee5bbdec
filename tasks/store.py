"""A store: a mixture's tasks as sharded TFRecords, each row one read away, with a manifest.

`hyper_t5.build` makes it, with TensorFlow Datasets, as

    FOLDER/hyper_t5-SPLIT.tfrecord-00000-of-00008    and TFDS's own JSON files
    FOLDER/manifest.json                             written last: without it, it is unfinished

One record is one row (id, input, outputs, options, and the task's name); the rows of a task lie one
after the other. What is said once a task (instructions, examples, category, rate, which rows are
its own) is in the manifest, and so are size and SHA-256 of every shard. This module reads, without
TensorFlow; FOLDER may be local or on any file system of `etils.epath`, such as gs://.

The manifest, format 1:

    {"format": 1,
     "made_from": {"mixture": ..., "data": {fields of the config that decide which rows there are}}
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

from hyper_t5 import records
from hyper_t5.errors import UserError
from hyper_t5.taskfile import LazyRows, Row, TaskRows

FORMAT = 1
MANIFEST = "manifest.json"
REBUILD = "build it again (hyper-t5 build)"
READERS = 8  # shards looked at together: most of it is waiting for a bucket

# Fields of config.data that decide which rows a mixture has; of folders and files the last name.
# Those that begin with another mixture's prefix say nothing of this one.
PREFIXES = {
    "sni": "sni_",
    "p3": "p3_",
    "metaicl": "metaicl_",
    "glue": "glue_",
    "extractive_qa": "qa_",
}
PLACES = ("sni_dir", "p3_dir", "p3_prompts", "metaicl_dir", "glue_dir", "qa_dir")
SETTINGS = (
    "metaicl_setting",
    "max_instances_per_task",
    "on_bad_row",
    "on_missing_task",
    "empty_targets",
)


# ------------------------------------------------------------------------------- the manifest


def data_fields(data_config: Any, mixture: str) -> dict[str, Any]:
    """What the manifest says of `config.data`: plain values, and no path of the machine."""
    others = tuple(prefix for name, prefix in PREFIXES.items() if name != mixture)
    fields: dict[str, Any] = {}
    for name in (*PLACES, *SETTINGS):
        if name not in data_config or name.startswith(others):
            continue
        value = data_config[name]
        if name not in PLACES:
            fields[name] = value
        elif value:
            fields[name] = PurePosixPath(value.rstrip("/")).name
    return fields


def task_entry(task: TaskRows, first: int) -> dict[str, Any]:
    """What the manifest says of a task whose rows begin at record `first` of its split."""
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
    """Writes it beside its place and moves it there: it is whole or not there.

    Raises:
        UserError: it cannot be written.
    """
    part = folder / f".{MANIFEST}.{os.getpid()}"
    try:
        part.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        part.replace(folder / MANIFEST)
    except OSError as error:
        raise UserError(f"cannot write {folder / MANIFEST}: {error.strerror or error}") from None


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """The manifest of a store's folder.

    Raises:
        UserError: no store, an unfinished one, a damaged manifest, or one of another format.
    """
    file = folder / MANIFEST
    try:
        text = file.read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(_no_manifest(folder)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot read ({error})") from None
    try:
        manifest = json.loads(text)
        found = manifest["format"]
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file}: damaged, or no store's manifest; {REBUILD}") from None
    if found != FORMAT:
        raise UserError(f"{file}: format {found}, and this version reads {FORMAT}; {REBUILD}")
    return manifest


def _no_manifest(folder: epath.Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder; data.store is what `hyper-t5 build` printed"
    inside = sorted(str(file.parent) for file in folder.glob(f"hyper_t5/*/*/{MANIFEST}"))
    if inside:
        return f"{folder}: holds stores and is none; set data.store={inside[0]!r}"
    return f"{folder}: has no {MANIFEST}, so it is no store or its build was interrupted; {REBUILD}"


# ---------------------------------------------------------------------------------- reading


class Store:
    """An open store; see `open_store`. Any number of threads may read its rows."""

    def __init__(self, folder: epath.Path, manifest: Mapping[str, Any], cache_dir: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self._cache_dir = cache_dir
        self._found: dict[str, records.Index] = {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of its splits."""
        return tuple(self.manifest["splits"])

    def tasks(self, split: str) -> list[TaskRows]:
        """The tasks of a split in its order; their rows are read one by one, when asked for.

        Raises:
            UserError: there is no such split.
        """
        if split not in self.manifest["splits"]:
            raise UserError(
                f"{self.folder}: has no split {split!r}; it has {', '.join(self.splits)}"
            )
        rows = _Rows(self, self.manifest["splits"][split]["shards"])
        return [
            TaskRows(
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
        """Raises UserError where a shard is missing or has another size than it was made with."""
        file = self.folder / shard["name"]
        try:
            size = file.stat().length
        except FileNotFoundError:
            raise UserError(f"{file}: missing; copy the store again, or {REBUILD}") from None
        except OSError as error:
            raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
        if size != shard["bytes"]:
            raise UserError(
                f"{file}: truncated or altered, it has {size} bytes and was made with "
                f"{shard['bytes']}; copy the store again, or {REBUILD}"
            )

    def index(self, shard: Mapping[str, Any]) -> records.Index:
        """Where a shard's records lie, after a look at its digest. Read once, then kept.

        Raises:
            UserError: it is missing or altered.
        """
        name = shard["name"]
        if name not in self._found:
            file = os.fspath(self.folder / name)
            # Damaged records are not passed over here: they change the digest.
            found = records.index(file, self._cache_dir, on_bad_row="skip")
            if found.sha256 != shard["sha256"] or len(found.offsets) != shard["records"]:
                raise UserError(
                    f"{file}: altered, its SHA-256 is not the manifest's; copy the store again, "
                    f"or {REBUILD}"
                )
            self._found[name] = found
        return self._found[name]


class _Rows:
    """A split's records by their number in it."""

    def __init__(self, store: Store, shards: list[dict[str, Any]]) -> None:
        self._store = store
        self._shards = shards
        self._ends = np.cumsum([shard["records"] for shard in shards], dtype=np.int64)

    def read(self, number: int) -> Row:
        which = int(np.searchsorted(self._ends, number, "right"))
        shard = self._shards[which]
        found = self._store.index(shard)
        place = number - int(self._ends[which]) + shard["records"]
        file = os.fspath(self._store.folder / shard["name"])
        raw = records.read(file, int(found.offsets[place]), int(found.lengths[place]))
        return _row(raw, f"{file}, record {place}")


def _row(raw: bytes, where: str) -> Row:
    try:
        found = records.parse_example(raw, ("id", "input", "outputs", "options"))
        text = {name: [str(b, "utf-8") for b in values] for name, values in found.items()}
        [name], [asked] = text["id"], text["input"]
    except (ValueError, TypeError):
        raise UserError(f"{where}: is no row of a task") from None
    return Row(name, asked, tuple(text["outputs"]), tuple(text["options"]))


def open_store(
    folder: str | os.PathLike[str], cache_dir: str = "", host: int = 0, hosts: int = 1
) -> Store:
    """Opens a store and checks it, before training starts.

    Every host looks at the sizes of all shards, and reads every `hosts`-th shard whole for its
    digest; what it read is kept in the cache by size and time, so that a second start is quick.
    Where the records of the other shards lie is read when a row of theirs is first asked for, and
    then their digest is looked at as well.

    Args:
        folder: what `hyper_t5.build.build` returned, wherever it was copied to.
        cache_dir: `data.cache_dir`.
        host: which of the hosts this is.
        hosts: how many there are.

    Raises:
        UserError: unfinished, missing, truncated or altered; names the shard and the remedy.
    """
    place = epath.Path(folder).expanduser()
    manifest = read_manifest(place)
    if manifest["file_format"] != "tfrecord":
        raise UserError(
            f"{place}: its records are {manifest['file_format']}, and rows are read from tfrecord "
            "alone, in which any bucket can be read at any place; build it again without "
            "--file_format"
        )
    store = Store(place, manifest, cache_dir)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(store.check_size, shards):
            pass
        for _ in pool.map(store.index, shards[host::hosts]):
            pass
    return store


def load_store_tasks(
    data_config: Any, mixture: str, split: str, host: int = 0, hosts: int = 1
) -> list[TaskRows]:
    """The tasks of a split from `data.store`: the same rows as the mixture's own, and their rates.

    Args:
        data_config: `config.data`.
        mixture: what the store must be made from.
        split: one that it must have.
        host: see `open_store`.
        hosts: see `open_store`.

    Raises:
        UserError: as `open_store`; or it is made from something else, lacks the split, or has
            fewer rows a task than `data.max_instances_per_task` wants.
    """
    store = open_store(data_config.store, data_config.cache_dir, host, hosts)
    made = store.manifest["made_from"]
    if made.get("mixture") != mixture:
        what = f"mixture {made['mixture']}" if "mixture" in made else "text"
        raise UserError(
            f"data.store={data_config.store!r} is made from {what}, and asked for is "
            f"{mixture}; {REBUILD} from that, or set data.mixture"
        )
    most, had = data_config.max_instances_per_task, made["data"]["max_instances_per_task"]
    setting = made["data"].get("metaicl_setting")
    for field, wanted, found in [
        ("metaicl_setting", data_config.get("metaicl_setting"), setting),
        ("max_instances_per_task", most, had),
    ]:
        if found and found != wanted:
            raise UserError(
                f"data.store={data_config.store!r} is made with data.{field}={found}, and asked "
                f"for is {wanted}; set the same, or {REBUILD} with that"
            )
    tasks = store.tasks(split)
    if most and not had:
        # T0's rule, which every mixture follows where rows are capped (Sanh et al. 2022, 3).
        from hyper_t5.tasks.common import choose_rows

        tasks = [choose_rows(task, split, most) for task in tasks]
        tasks = [replace(task, rate=float(len(task.rows))) for task in tasks]
    return tasks
