"""Builder of stores: a mixture's tasks, or text, as sharded TFRecords for training on a pod.

It is a builder of TensorFlow Datasets (4.9.10), so either command writes the same files:

    hyper-t5 build --mixture sni --out DIR --gin.data.sni_dir=FOLDER
    HYPER_T5_DATA="sni_dir=FOLDER" tfds build hyper_t5/tools/build_dataset.py --config sni \
        --data_dir DIR

``tfds build`` needs the packages apache-beam and mlcroissant; ``python -m
hyper_t5.tools.build_dataset`` takes the same flags and does not need mlcroissant. The flags
--num_shards, --max_shard_size_mb, --overwrite and --file_format have TFDS's meaning. --config also
takes JSON, with a name for the store:

    --config '{"name": "books", "text": "FOLDER/*.jsonl"}'
    --config '{"name": "sni_100", "mixture": "sni",
               "data": {"sni_dir": "FOLDER", "max_instances_per_task": 100}}'

The store is DIR/hyper_t5/NAME/1.0.0. Set ``data.store`` to it to read tasks (tasks/store.py has
the format of manifest.json), or TFDS_DATA_DIR=DIR and ``data.text=tfds:hyper_t5/NAME:1.0.0`` to
read text. TFDS keeps up to 1 GB of rows in memory while it writes, and more in files in DIR.
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
from hyper_t5 import pipeline
from hyper_t5.data import tfrecord
from hyper_t5.data.task_rows import TaskData
from hyper_t5.data.text_corpus import read_documents, text_files
from hyper_t5.data.vocab import ByteVocabulary
from hyper_t5.tasks import MIXTURES, store
from hyper_t5.tasks.seqio_tasks import tf, tfds
from hyper_t5.utils.errors import UserError, handle_errors
from hyper_t5.utils.overrides import Override

ENVIRONMENT = "HYPER_T5_DATA"
TFDS_PREFIX = "tfds:"
KEYS = 2**127  # TFDS sorts its buckets of records by keys up to 2**128
LOG_EVERY = 200_000  # records


def config_of_environment() -> ConfigDict:
    """Return a config with section ``data`` set by HYPER_T5_DATA="field=value ...".

    This configures programs that take no config of ours: ``tfds build``, ``seqio_cache_tasks``.
    Values with spaces are quoted as in a shell. ``data.mixture`` is '' where it is not set.

    Raises:
      UserError: as for ``--gin.data.field=value``.
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
    """Return a config with these JSON values in section ``data``."""
    values = {"data": {name.removeprefix("data."): value for name, value in fields.items()}}
    config = config_lib.from_json(json.dumps(values), "--config")
    config_lib.validate(config, needs_backbone=False)
    return config


# ------------------------------------------------------------------------------ the builder


@dataclasses.dataclass(eq=False)
class StoreConfig(tfds.core.BuilderConfig):
    """A mixture or text to build a store from.

    Attributes:
      mixture: name of a dataset in `tasks.MIXTURES`, or ''.
      text: a value of ``data.text`` for local files, or ''.
      data: fields of the config's section ``data``; without it HYPER_T5_DATA sets them.
    """

    mixture: str = ""
    text: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class HyperT5(tfds.core.GeneratorBasedBuilder):
    """Builder of TFRecords of tasks or text, in the order of the source, and of their manifest."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
        StoreConfig(name=name, mixture=name, description=f"The tasks of data.mixture={name}")
        for name in MIXTURES
    ]
    # TFDS 4.9.10 derives it with importlib_resources, which is not among its requirements.
    code_path = epath.Path(__file__)
    data_config: Any = None  # config.data; None: from the builder's config or the environment

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
        return tfds.core.DatasetInfo(
            builder=self,
            description="A store of hyper_t5: see its manifest.json",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,  # the rows of a task stay consecutive
        )

    def download_and_prepare(self, *, download_config: Any = None, **others: Any) -> None:
        """Build the store, unless the same one exists. See `build`."""
        config = download_config or tfds.download.DownloadConfig()
        config = config.replace(try_download_gcs=False)  # it is not in TFDS's public bucket
        source = self._source()
        folder = epath.Path(self.data_dir)
        if folder.exists() and not config.download_mode.overwrite_dataset:
            if (folder / store.MANIFEST).exists():
                _check_same(folder, store.read_manifest(folder), source)
                print(f"{folder}: built from the same source already", flush=True)
                return
            print(f"{folder}: an interrupted build; it is built again", flush=True)
            config = config.replace(download_mode=tfds.download.GenerateMode.REUSE_CACHE_IF_EXISTS)
        for split, count in source.counts.items():
            if (config.num_shards or 0) > count:
                raise UserError(
                    f"split {split} has {count} records, too few for {config.num_shards} shards; "
                    "set fewer shards"
                )
        super().download_and_prepare(download_config=config, **others)
        store.write_manifest(folder, _manifest(folder, self.info, source))

    def _source(self) -> Source:
        if "_opened" not in self.__dict__:
            request = self.builder_config
            data_config = self.data_config
            if data_config is None:
                config = _config_of(request.data) if request.data else config_of_environment()
                data_config = config.data
            self._opened = open_source(data_config, request.mixture, request.text)
        return self._opened

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        source = self._source()
        return {split: self._generate_examples(source, split) for split in source.counts}

    def _generate_examples(self, source: Source, split: str) -> Iterator[tuple[int, Any]]:
        count = source.counts[split]
        # Keys are spread: TFDS sorts a thousand buckets in memory one by one, and the keys
        # 0, 1, 2, ... would all be in the first.
        step = KEYS // max(1, count)
        number = -1
        for number, row in enumerate(source.records(split)):
            if number and number % LOG_EVERY == 0:
                print(f"{split}: {number} of {count} records", flush=True)
            yield number * step, row
        if number + 1 != count:
            raise UserError(
                f"split {split} had {count} records when it was opened and {number + 1} now; "
                "do not change the files during a build"
            )


# ------------------------------------------------------------------------------- the source


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a store, opened and validated.

    Attributes:
      origin: the manifest's description of it.
      counts: number of records of each split.
      tasks: the manifest's entries of the tasks of each split; {} for text.
      records: returns the records of a split, in order.
    """

    origin: dict[str, Any]
    counts: dict[str, int]
    tasks: dict[str, list[dict[str, Any]]]
    records: Callable[[str], Iterator[dict[str, Any]]]


def open_source(data_config: Any, mixture: str = "", text: str = "") -> Source:
    """Open and validate a mixture's training and held-out splits, or text.

    Args:
      data_config: ``config.data``.
      mixture: name of a dataset in `tasks.MIXTURES`, or ''.
      text: a value of ``data.text`` for local files, or ''.

    Raises:
      UserError: neither or both are set, or the data are invalid.
    """
    if bool(mixture) == bool(text):
        raise UserError(
            "a store is built from a mixture or from text: set one of --mixture, --text"
        )
    return _open_text(data_config, text) if text else _open_tasks(data_config, mixture)


def _open_tasks(data_config: Any, mixture: str) -> Source:
    data_config = ConfigDict(dict(data_config) | {"store": ""})  # read the dataset, not a store
    splits = ("train", *pipeline.held_out_splits(mixture))
    vocab = ByteVocabulary()  # rows are text, whatever the vocabulary
    tasks = {name: pipeline.load_tasks(mixture, data_config, name, vocab) for name in splits}
    entries, counts = {}, {}
    for split, split_tasks in tasks.items():
        ends = np.cumsum([0, *(len(task.rows) for task in split_tasks)]).tolist()
        entries[split] = [
            store.task_entry(task, first) for task, first in zip(split_tasks, ends, strict=False)
        ]
        counts[split] = ends[-1]
        print(f"{mixture} {split}: {len(split_tasks)} tasks, {ends[-1]} rows", flush=True)
    origin = {"mixture": mixture, "data": store.data_fields(data_config, MIXTURES[mixture])}
    return Source(origin, counts, entries, lambda split: _rows(tasks[split]))


def _rows(tasks: Sequence[TaskData]) -> Iterator[dict[str, Any]]:
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
        raise UserError(f"--text {text}: a store is built from local files; set their path")
    paths, on_bad_row = text_files(text), data_config.on_bad_row
    skipped: Counter[str] = Counter()
    count = sum(1 for path in paths for _ in read_documents(path, on_bad_row, skipped))
    for kind, number in sorted(skipped.items()):
        print(f"{text}: {number} bad rows skipped (data.on_bad_row='skip'): {kind}")
    if not count:
        raise UserError(f"--text {text}: holds no document")
    print(f"{text}: {len(paths)} files, {count} documents", flush=True)
    sources = []
    for path in paths:
        with open(path, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
        sources.append({"name": path.name, "bytes": path.stat().st_size, "sha256": digest})
    return Source(
        {"text": sources, "data": {"on_bad_row": on_bad_row}, "skipped": dict(skipped)},
        {"train": count},
        {},
        lambda _: ({"text": d} for path in paths for d in read_documents(path, on_bad_row)),
    )


# ------------------------------------------------------------------------------- the manifest


def _manifest(folder: epath.Path, info: tfds.core.DatasetInfo, source: Source) -> dict[str, Any]:
    """Return the manifest (see tasks/store.py). Reads every shard once, to check it."""
    splits: dict[str, Any] = {}
    for split, count in source.counts.items():
        shards = []
        for name, length in zip(
            info.splits[split].filenames, info.splits[split].shard_lengths, strict=True
        ):
            size, digest = _check_shard(folder / name, info.file_format.value, length)
            shards.append({"name": name, "records": length, "bytes": size, "sha256": digest})
        splits[split] = {
            "records": count,
            "bytes": sum(shard["bytes"] for shard in shards),
            "shards": shards,
            "tasks": source.tasks.get(split, []),
        }
        if sum(shard["records"] for shard in shards) != count:
            raise UserError(
                f"{folder}: split {split} lacks records of its source, which has {count}; build "
                "it again without --max_examples_per_split"
            )
    return {
        "format": store.FORMAT,
        "made_from": source.origin,
        "file_format": info.file_format.value,
        "splits": splits,
        "records": sum(split["records"] for split in splits.values()),
        "bytes": sum(split["bytes"] for split in splits.values()),
    }


def _check_shard(file: epath.Path, file_format: str, count: int) -> tuple[int, str]:
    """Return size in bytes and SHA-256 of a shard; checks the records of a TFRecord file."""
    if file_format != "tfrecord":
        with file.open("rb") as raw:
            return int(file.stat().length), hashlib.file_digest(raw, "sha256").hexdigest()
    index = tfrecord.scan(os.fspath(file))
    if len(index.offsets) != count:
        raise UserError(f"{file}: has {len(index.offsets)} records, and {count} were written")
    return index.size, index.sha256


def _check_same(folder: epath.Path, manifest: Mapping[str, Any], source: Source) -> None:
    """Raise UserError, naming the difference, where a store was built from another source.

    Settings, number of records, and the tasks' entries are compared; of text, the files' digests.
    """
    splits = manifest["splits"]
    for name, recorded, now in [
        ("made_from", manifest["made_from"], source.origin),
        ("splits", {name: split["records"] for name, split in splits.items()}, source.counts),
        *(
            (f"tasks of {split}", splits[split]["tasks"], source.tasks[split])
            for split in source.tasks
            if split in splits
        ),
    ]:
        if recorded != json.loads(json.dumps(now)):
            raise UserError(
                f"{folder}: holds a store of another source ({name} differ); set another --out, "
                "or --overwrite to replace it"
            )


# ------------------------------------------------------------------------------- hyper-t5 build


def build(
    data_config: Any,
    out: str | os.PathLike[str],
    *,
    mixture: str = "",
    text: str = "",
    shards: int = 0,
    overwrite: bool = False,
) -> epath.Path:
    """Build the store of a mixture or of text, and print a summary.

    An existing store of the same source is kept; one of an interrupted build is built again.

    Args:
      data_config: ``config.data``.
      out: TFDS's data_dir; the store is ``out``/hyper_t5/NAME/1.0.0.
      mixture: name of a dataset in `tasks.MIXTURES`, which is NAME, or ''.
      text: files as for ``data.text``, or ''. NAME is their name without its suffix.
      shards: number of shards of each split; 0 lets TFDS choose by size.
      overwrite: replace a store of another source.

    Returns:
      The store's folder.

    Raises:
      UserError: invalid data, a store of another source in ``out``, or it cannot be written.
    """
    if bool(mixture) == bool(text):
        raise UserError(
            "a store is built from a mixture or from text: set one of --mixture, --text"
        )
    if mixture:
        pipeline.held_out_splits(mixture)  # raises for an unknown one
    # A mixture may be registered after this module is imported, and is then not in BUILDER_CONFIGS.
    config = HyperT5.builder_configs.get(
        mixture, StoreConfig(name=mixture or text_name(text), mixture=mixture, text=text)
    )
    tfds.disable_progress_bar()
    mode = tfds.download.GenerateMode
    download = tfds.download.DownloadConfig(
        num_shards=shards or None,
        download_mode=(mode.REUSE_CACHE_IF_EXISTS if overwrite else mode.REUSE_DATASET_IF_EXISTS),
    )
    try:
        builder = HyperT5(data_dir=os.fspath(epath.Path(out).expanduser()), config=config)
        builder.data_config = data_config
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
        print(f"set TFDS_DATA_DIR={out} and data.text=tfds:{name} to read it", flush=True)
    return folder


def text_name(text: str) -> str:
    """Return the name of a store of these files: ``books`` for ``folder/books/*.jsonl.xz``."""
    parts = [part for part in text.rstrip("/").split("/") if not set("*?[") & set(part)]
    stem = parts[-1].split(".")[0] if parts else ""
    return re.sub(r"\W", "_", stem) or "text"


@handle_errors("hyper_t5.tools.build_dataset")
def main() -> None:
    """Run ``tfds build`` on this builder.

    TFDS's own command (4.9.10) imports mlcroissant, for another of its commands.
    """
    from absl import app
    from tensorflow_datasets.scripts.cli import build as tfds_build
    from tensorflow_datasets.scripts.cli import cli_utils

    parse = cli_utils.make_flags_parser(tfds_build.Args, description="tfds build")
    argv = [sys.argv[0], __file__, *sys.argv[1:]]
    app.run(lambda args: args.execute(), argv, flags_parser=parse)


if __name__ == "__main__":
    sys.exit(main())
