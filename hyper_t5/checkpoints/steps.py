"""Step folders and their records: which checkpoints are complete, and what they contain.

WORKDIR/checkpoints/STEP/ has three entries:

- `state/`: the arrays, see arrays.py;
- `meta.json`: metadata of the caller;
- `COMMITTED.json`: dtype, shape and checksums of every leaf. It is written last.
"""

from __future__ import annotations

import contextlib
import json
import logging
import zlib
from collections.abc import Iterator
from typing import Any, Literal

from etils import epath

from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

FOLDER, STATE, META, RECORD = "checkpoints", "state", "meta.json", "COMMITTED.json"
FORMAT = "hyper_t5.checkpoint/2"
VERSIONS = ("1", "2")  # version 1 has one CRC-32 for a whole leaf

Step = int | Literal["best"]  # 'best' has the lowest validation loss
Specs = dict[str, dict[str, Any]]  # leaf name -> {"dtype", "shape", "shards": {region: CRC-32}}

log = logging.getLogger(__name__)


class DamagedError(Exception):
    """Unusable checkpoint; the message is the reason."""


def to_json(content: Any) -> bytes:
    """Encode content as JSON: equal content as equal bytes."""
    return json.dumps(content, indent=1, sort_keys=True).encode()


def crc32(content: bytes | memoryview) -> str:
    """Compute a CRC-32, in hexadecimal."""
    return f"{zlib.crc32(content):08x}"


def one_line(error: BaseException) -> str:
    """Format an error as one line, without TensorStore's specification and source locations."""
    text = str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]
    return " ".join((text or type(error).__name__).split())[:300]


def step_folders(root: epath.Path) -> list[epath.Path]:
    """List the folders that are named like steps, newest first."""
    steps = [folder for folder in root.iterdir() if folder.name.isdigit()] if root.exists() else []
    return sorted(steps, key=lambda folder: int(folder.name), reverse=True)


def committed(root: epath.Path) -> Iterator[epath.Path]:
    """Yield the step folders with a valid record, newest first; warn of the others."""
    for folder in step_folders(root):
        try:
            read_record(folder)
        except DamagedError as error:
            log.warning("checkpoint %s does not count: %s", folder, error)
        else:
            yield folder


def remove(folder: epath.Path) -> None:
    """Remove a folder, its record first: part of a checkpoint must not count."""
    if folder.exists():
        (folder / RECORD).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)  # clients of buckets cache listings for seconds


def try_remove(folder: epath.Path) -> None:
    """Remove a folder; if that fails now, the next start of a run removes it."""
    try:
        if folder.name.isdigit() and files.is_local(folder):
            # Renamed first: the process may be killed at any moment.
            folder = folder.rename(folder.with_name(f"{folder.name}.old.tmp"))
        remove(folder)
    except Exception as error:  # each file system has its own error types
        log.info("could not remove %s: %s", folder, one_line(error))


def remove_unfinished(root: epath.Path) -> None:
    """Remove what a killed run has left of its last save; it can be large."""
    for folder in list(root.iterdir()):
        in_bucket = folder.name.isdigit() and not files.is_local(root)
        if folder.name.endswith(".tmp") or (in_bucket and not (folder / RECORD).exists()):
            try_remove(folder)


def commit(folder: epath.Path, final: epath.Path, meta: bytes, leaves: Specs) -> None:
    """Write the metadata and the record, and move the folder to its final name."""
    files.write_bytes(folder / META, meta)
    record = {"format": FORMAT, "step": int(final.name), "meta": crc32(meta), "leaves": leaves}
    content = {"record": record, "crc32": crc32(to_json(record))}
    files.write_bytes(folder / RECORD, to_json(content))
    if folder != final:
        old = final.with_name(f"{final.name}.old.tmp")
        if final.exists():
            final.rename(old)
        folder.rename(final)
        try_remove(old)


def read_record(folder: epath.Path) -> dict[str, Any]:
    """Read a record; DamagedError if it is missing or invalid."""
    try:
        content = json.loads(files.read_bytes(folder / RECORD))
        record = content["record"]
        if content["crc32"] != crc32(to_json(record)):
            raise ValueError("its checksum is wrong")
        if record["format"].rpartition("/")[2] not in VERSIONS:
            raise ValueError(f"its format is {record['format']}, not {FORMAT}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{RECORD} is missing or broken: {one_line(error)}") from error
    return record


def read_meta(folder: epath.Path, record: dict[str, Any]) -> dict[str, Any]:
    """Read the metadata; DamagedError if it differs from the record."""
    try:
        content = files.read_bytes(folder / META)
    except OSError as error:
        raise DamagedError(one_line(error)) from error
    if crc32(content) != record["meta"]:
        raise DamagedError(f"{META} does not match its checksum")
    return json.loads(content)


def best(root: epath.Path) -> tuple[epath.Path, float] | None:
    """Find the committed step with the lowest validation loss in its metadata, and that loss."""
    losses = []
    for folder in committed(root):
        with contextlib.suppress(DamagedError):
            validation = read_meta(folder, read_record(folder)).get("validation", {})
            if "loss" in validation:
                losses.append((validation["loss"], int(folder.name), folder))
    return (min(losses)[2], min(losses)[0]) if losses else None


def check_leaves(folder: epath.Path, stored: Specs, targets: dict[str, Any]) -> None:
    """Raise UserError for the first leaf whose name, shape or dtype differs from its target."""
    for name in sorted(stored.keys() | targets.keys()):
        actual = expected = "no such leaf"
        if name in stored:
            actual = f"{stored[name]['dtype']}{stored[name]['shape']}"
        if name in targets:
            expected = f"{targets[name].dtype}{list(targets[name].shape)}"
        if actual != expected:
            raise UserError(
                f"checkpoint {folder}: {name} is {actual}, expected {expected}; use the config of "
                "that run, or another workdir"
            )
