"""Builds the store that a pod reads: a mixture's tasks, or text, as sharded TFRecords.

It is a builder of TensorFlow Datasets (4.9.10), so that there are two ways to the same files:

    hyper-t5 build --mixture sni --out DIR --gin.data.sni_dir=FOLDER
    HYPER_T5_DATA="sni_dir=FOLDER" tfds build hyper_t5/build.py --config sni --data_dir DIR

`tfds build` wants the packages apache-beam and mlcroissant; `python -m hyper_t5.build` takes the
same flags and does without the latter. Of its flags, --num_shards, --max_shard_size_mb, --overwrite
and --file_format mean here what they mean for every TFDS set. A config may be JSON too, with a name
of its own, which becomes the folder's:

    --config '{"name": "books", "text": "FOLDER/*.jsonl"}'
    --config '{"name": "sni_100", "mixture": "sni",
               "data": {"sni_dir": "FOLDER", "max_instances_per_task": 100}}'

Either way DIR/hyper_t5/NAME/1.0.0 is made. Tasks are read from there by `data.store` (see
tasks/store.py, which also says what manifest.json holds), text with TFDS_DATA_DIR=DIR by
`data.text=tfds:hyper_t5/NAME:1.0.0`. TFDS keeps up to 1 GB of rows in memory while it writes; what
is more goes through files in DIR.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import data, records
from hyper_t5.errors import UserError, exit_code
from hyper_t5.overrides import Override
from hyper_t5.taskfile import TaskRows
from hyper_t5.tasks import store
from hyper_t5.tasks.common import tf, tfds, tfds_build
from hyper_t5.text import read_documents, text_files
from hyper_t5.vocab import ByteVocabulary

ENVIRONMENT = "HYPER_T5_DATA"
TFDS_PREFIX = "tfds:"
KEYS = 2**127  # TFDS sorts its buckets of records by keys up to 2**128
SAY_EVERY = 200_000  # records


def config_of_environment() -> ConfigDict:
    """A config whose section `data` is set by the environment: HYPER_T5_DATA="field=value ...".

    For what is started by others and takes no config of ours: `tfds build`, `seqio_cache_tasks`.
    Values with spaces are quoted as in a shell. `data.mixture` is '' where it is not set.

    Raises:
        UserError: as for `--gin.data.field=value`.
    """
    config = config_lib.defaults()
    config.data.mixture = ""
    try:
        words = shlex.split(os.environ.get(ENVIRONMENT, ""))
    except ValueError as error:
        raise UserError(f"{ENVIRONMENT}: {error}") from None
    config_lib.apply(config, [_override(word) for word in words])
    config_lib.validate(config, needs_backbone=False)
    return config


def _override(word: str) -> Override:
    field, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"{ENVIRONMENT}: expected field=value, got {word!r}")
    return Override(f"data.{field.removeprefix('data.')}", value, ENVIRONMENT)


def _config_of(fields: Mapping[str, Any]) -> ConfigDict:
    """A config whose section `data` has these values, as JSON gives them."""
    values = {"data": {name.removeprefix("data."): value for name, value in fields.items()}}
    config = config_lib.from_json(json.dumps(values), "--config")
    config_lib.validate(config, needs_backbone=False)
    return config


# ------------------------------------------------------------------------------ the builder


@dataclasses.dataclass(eq=False)
class StoreConfig(tfds.core.BuilderConfig):
    """What to build: a mixture, or text.

    `data` sets fields of the config's section "data"; without it HYPER_T5_DATA does.
    """

    mixture: str = ""
    text: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class HyperT5(tfds.core.GeneratorBasedBuilder):
    """Tasks or text as TFRecords in the order of their source, and their manifest."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        StoreConfig(name=name, mixture=name, description=f"The tasks of data.mixture={name}")
        for name in data.MIXTURES
    ]
    # TFDS 4.9.10 looks for it with the package importlib_resources, which it does not ask for.
    code_path = epath.Path(__file__)
    section: Any = None  # of a config, "data"; None = as the builder's config or environment says

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        features = {"text": text()}
        if self.builder_config.mixture:
            features = {
                "task": text(),
                "id": text(),
                "input": text(),
                "outputs": tfds.features.Sequence(text()),
                "options": tfds.features.Sequence(text()),
            }
        # Without this TFDS shuffles the rows, and a task's would lie all over.
        return tfds.core.DatasetInfo(
            builder=self,
            description="A store of hyper_t5: see its manifest.json",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def download_and_prepare(self, *, download_config: Any = None, **others: Any) -> None:
        """Builds; does nothing where the same is there already. See `build`."""
        config = download_config or tfds.download.DownloadConfig()
        config = config.replace(try_download_gcs=False)  # no such set is in TFDS's public bucket
        source = self._source()
        folder = epath.Path(self.data_dir)
        if folder.exists() and not config.download_mode.overwrite_dataset:
            if (folder / store.MANIFEST).exists():
                _check_same(folder, store.read_manifest(folder), source)
                print(f"{folder}: made from the same already; nothing was done", flush=True)
                return
            print(f"{folder}: a build that was interrupted; made anew", flush=True)
            config = config.replace(download_mode=tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS)
        for split, count in source.counts.items():
            if (config.num_shards or 0) > count:
                raise UserError(
                    f"split {split} has {count} records, which cannot be cut in "
                    f"{config.num_shards} shards; ask for fewer"
                )
        super().download_and_prepare(download_config=config, **others)
        store.write_manifest(folder, _manifest(folder, self.info, source))

    def _source(self) -> Source:
        if "_opened" not in self.__dict__:
            wanted = self.builder_config
            section = self.section
            if section is None:
                config = _config_of(wanted.data) if wanted.data else config_of_environment()
                section = config.data
            self._opened = open_source(section, wanted.mixture, wanted.text)
        return self._opened

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        source = self._source()
        return {split: self._generate_examples(source, split) for split in source.counts}

    def _generate_examples(self, source: Source, split: str) -> Iterator[tuple[int, Any]]:
        count = source.counts[split]
        # Spread over all keys there are: TFDS sorts a thousand buckets one by one in memory, and
        # 0, 1, 2, ... would all fall into the first.
        step = KEYS // max(1, count)
        number = -1
        for number, row in enumerate(source.records(split)):
            if number and number % SAY_EVERY == 0:
                print(f"{split}: {number} of {count} records", flush=True)
            yield number * step, row
        if number + 1 != count:
            raise UserError(
                f"split {split} had {count} records when it was opened and {number + 1} now; "
                "leave the files alone while they are read"
            )


# ------------------------------------------------------------------------- what it is made from


@dataclasses.dataclass(frozen=True)
class Source:
    """What a store is made from; every row of it was checked when it was opened.

    Attributes:
        made_from: what the manifest says of it.
        counts: records of each split.
        tasks: what the manifest says of the tasks of each split; {} for text.
        records: the records of a split, in order.
    """

    made_from: dict[str, Any]
    counts: dict[str, int]
    tasks: dict[str, list[dict[str, Any]]]
    records: Callable[[str], Iterator[dict[str, Any]]]


def open_source(data_config: Any, mixture: str = "", text: str = "") -> Source:
    """A mixture's training and held-out splits, or text, opened and checked.

    Args:
        data_config: `config.data`.
        mixture: a key of `data.MIXTURES`, or
        text: what `data.text` may be, of local files.

    Raises:
        UserError: neither or both are given, or what is wrong with the data.
    """
    if bool(mixture) == bool(text):
        raise UserError("a store is made from a mixture or from text: give one of them")
    return _open_text(data_config, text) if text else _open_tasks(data_config, mixture)


def _open_tasks(data_config: Any, mixture: str) -> Source:
    fields = dict(data_config) | {"store": ""}  # from the source itself, whatever is built already
    section = ConfigDict(fields)
    splits = ("train", *data.held_out_splits(mixture))
    # Rows are text and know no vocabulary; the SeqIO Tasks they come through want one.
    tasks = {name: data.load_tasks(mixture, section, name, ByteVocabulary()) for name in splits}
    entries = {}
    for split, found in tasks.items():
        ends = np.cumsum([0, *(len(task.rows) for task in found)]).tolist()
        entries[split] = [
            store.task_entry(task, first) for task, first in zip(found, ends, strict=False)
        ]
        print(f"{mixture} {split}: {len(found)} tasks, {ends[-1]} rows", flush=True)
    return Source(
        {"mixture": mixture, "data": store.data_fields(section, mixture)},
        {split: sum(len(task.rows) for task in found) for split, found in tasks.items()},
        entries,
        lambda split: _rows(tasks[split]),
    )


def _rows(tasks: Sequence[TaskRows]) -> Iterator[dict[str, Any]]:
    for task in tasks:
        for row in task.rows:
            yield {
                "task": task.name,
                "id": row.id,
                "input": row.input,
                "outputs": list(row.outputs),
                "options": list(row.options),
            }


def _open_text(data_config: Any, text: str) -> Source:
    if text.startswith(TFDS_PREFIX) or text == "synthetic":
        raise UserError(f"--text {text}: a store is built from local files")
    paths, on_bad_row = text_files(text), data_config.on_bad_row
    skipped: Counter[str] = Counter()
    count = sum(1 for path in paths for _ in read_documents(path, on_bad_row, skipped))
    for kind, number in sorted(skipped.items()):
        print(f"{text}: {number} bad rows skipped (data.on_bad_row='skip'): {kind}")
    if not count:
        raise UserError(f"--text {text}: holds no document")
    print(f"{text}: {len(paths)} files, {count} documents", flush=True)
    made_from = []
    for path in paths:
        with open(path, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        made_from.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return Source(
        {"text": made_from, "data": {"on_bad_row": on_bad_row}, "skipped": dict(skipped)},
        {"train": count},
        {},
        lambda _: ({"text": d} for path in paths for d in read_documents(path, on_bad_row)),
    )


# ------------------------------------------------------------------------------- the manifest


def _manifest(folder: epath.Path, info: tfds.core.DatasetInfo, source: Source) -> dict[str, Any]:
    """See tasks/store.py. Reads every shard once: what it says of them is what is on disk."""
    splits: dict[str, Any] = {}
    for split, count in source.counts.items():
        shards = []
        for name, length in zip(
            info.splits[split].filenames, info.splits[split].shard_lengths, strict=True
        ):
            size, digest = _look_at(folder / name, info.file_format.value, length)
            shards.append({"name": name, "records": length, "bytes": size, "sha256": digest})
        splits[split] = {
            "records": count,
            "bytes": sum(shard["bytes"] for shard in shards),
            "shards": shards,
            "tasks": source.tasks.get(split, []),
        }
        if sum(shard["records"] for shard in shards) != count:
            raise UserError(
                f"{folder}: split {split} has not the {count} records of its source; build it "
                "again without --max_examples_per_split"
            )
    return {
        "format": store.FORMAT,
        "made_from": source.made_from,
        "file_format": info.file_format.value,
        "splits": splits,
        "records": sum(split["records"] for split in splits.values()),
        "bytes": sum(split["bytes"] for split in splits.values()),
    }


def _look_at(file: epath.Path, file_format: str, count: int) -> tuple[int, str]:
    """Bytes and SHA-256 of a shard, every record of which was read where that can be done here."""
    if file_format != "tfrecord":
        with file.open("rb") as raw:
            return int(file.stat().length), hashlib.file_digest(raw, "sha256").hexdigest()
    found = records.scan(os.fspath(file))
    if len(found.offsets) != count:
        raise UserError(f"{file}: has {len(found.offsets)} records, and {count} were written")
    return found.size, found.sha256


def _check_same(folder: epath.Path, manifest: Mapping[str, Any], source: Source) -> None:
    """Raises UserError, naming what differs, where a store is made from something else.

    Compared are settings, tasks, what is said of them and how many rows each has; of text, the
    files' digests.
    """
    splits = manifest["splits"]
    for what, there, now in [
        ("made_from", manifest["made_from"], source.made_from),
        ("splits", {name: split["records"] for name, split in splits.items()}, source.counts),
        *(
            (f"tasks of {name}", splits[name]["tasks"], source.tasks[name])
            for name in source.tasks
            if name in splits
        ),
    ]:
        if there != json.loads(json.dumps(now)):
            raise UserError(
                f"{folder}: holds a store made from something else ({what} differ); give another "
                "--out, or --overwrite to lose it"
            )


# ------------------------------------------------------------------------------- from our own CLI


def build(
    data_config: Any,
    out: str | os.PathLike[str],
    *,
    mixture: str = "",
    text: str = "",
    shards: int = 0,
    overwrite: bool = False,
) -> epath.Path:
    """Builds the store of a mixture or of text under `out`, and prints what it made.

    Where it is there already, made from the same, nothing is done; one that an interrupted build
    left is made anew.

    Args:
        data_config: `config.data`.
        out: TFDS's data_dir; the store is `out`/hyper_t5/NAME/1.0.0.
        mixture: a key of `data.MIXTURES`: NAME is this; its training and held-out splits, or
        text: files as `data.text` takes them: NAME is their name without its suffix.
        shards: of each split; 0 = as TFDS thinks, by size.
        overwrite: replace a store made from something else.

    Returns:
        The store's folder.

    Raises:
        UserError: bad data, `out` holds a store made from something else, or cannot be written.
    """
    if bool(mixture) == bool(text):
        raise UserError("a store is made from a mixture or from text: give one of them")
    if mixture:
        data.held_out_splits(mixture)  # refuses an unknown one
    config = mixture or StoreConfig(name=text_name(text), text=text)
    tfds.disable_progress_bar()
    mode = tfds.download.GenerateMode
    download = tfds.download.DownloadConfig(
        num_shards=shards or None,
        download_mode=(mode.REUSE_CACHE_IF_EXISTS if overwrite else mode.REUSE_DATASET_IF_EXISTS),
    )
    try:
        builder = HyperT5(data_dir=os.fspath(epath.Path(out).expanduser()), config=config)
        builder.section = data_config
        builder.download_and_prepare(download_config=download)
    except (OSError, tf.errors.OpError) as error:
        reason = getattr(error, "strerror", None) or getattr(error, "message", None) or error
        raise UserError(f"--out {out}: cannot be written ({reason})") from None
    folder = epath.Path(builder.data_dir)
    manifest = store.read_manifest(folder)
    count = sum(len(split["shards"]) for split in manifest["splits"].values())
    print(
        f"{folder}: {manifest['records']} records in {count} shards, "
        f"{manifest['bytes'] / 1e6:.1f} MB",
        flush=True,
    )
    if text:
        name = f"{builder.name}/{builder.builder_config.name}:{builder.version}"
        print(f"read it with TFDS_DATA_DIR={out} and data.text=tfds:{name}", flush=True)
    return folder


def text_name(text: str) -> str:
    """The name of a store of these files, such as `books` of `folder/books/*.jsonl.xz`."""
    parts = [part for part in text.rstrip("/").split("/") if not set("*?[") & set(part)]
    stem = parts[-1].split(".")[0] if parts else ""
    return re.sub(r"\W", "_", stem) or "text"


@exit_code("hyper_t5.build")
def main() -> None:
    """`tfds build` of this file's builder: its flags, without the packages of its other commands.

    tfds 4.9.10 imports mlcroissant for `tfds build_croissant` whatever is asked for.
    """
    tfds_build([sys.argv[0], __file__, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
