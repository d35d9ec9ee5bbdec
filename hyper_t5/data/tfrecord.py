"""Random access to TFRecord files and their `tf.train.Example`s, without importing TensorFlow.

A TFRecord file is a sequence of records (https://www.tensorflow.org/tutorials/load_data/tfrecord)

    uint64 length, uint32 masked CRC-32C of it, data [length], uint32 masked CRC-32C of the data

in little endian. `scan` reads a file once and locates its records, `index` caches the result, and
`read` reads one record. Files may be local or in a bucket, `gs://BUCKET/NAME`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import threading
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
from etils import epath
from google.protobuf.message import DecodeError

from hyper_t5.data.task_rows import OnBadRow
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import File

HEADER = struct.Struct("<QI")  # length of the data, and the length's CRC
FOOTER = struct.Struct("<I")  # CRC of the data
CHUNK = 2**22  # bytes read at once from a damaged file's remainder
DAMAGED = "damaged record"  # key of Index.skipped
OPEN_FILES = 64  # files that `read` keeps open
CACHE_VERSION = 2
DTYPES = {"int64_list": np.int64, "float_list": np.float32}  # of a Feature's lists of numbers


class Index(NamedTuple):
    """Locations of the records of a file.

    Attributes:
      offsets: [n] int64, position of each record's data, in bytes.
      lengths: [n] int64, bytes of data.
      size: bytes of the file.
      sha256: of the whole file, in hex.
      skipped: number of skipped records by reason. An unreadable remainder of the file counts
        once, as its number of records is unknown.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    size: int
    sha256: str
    skipped: Mapping[str, int]


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C of data as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def size_and_time(file: File) -> tuple[int, int]:
    """Return the bytes and the modification time, in ns, of a file; OSError when it is missing."""
    if files.is_local(file):
        local = os.stat(file)
        return local.st_size, local.st_mtime_ns
    remote = epath.Path(file).stat()
    return int(remote.length), int(remote.mtime * 10**9)


def scan(file: File, on_bad_row: OnBadRow = "raise") -> Index:
    """Read a whole file and check both CRCs of every record.

    Args:
      file: an uncompressed TFRecord file.
      on_bad_row: 'skip' leaves damaged records out and counts them in `Index.skipped`. Nothing
        can be read after a damaged length or a truncated record.

    Raises:
      UserError: names file, record and byte of the first damage; or the file cannot be read or is
        a Git LFS pointer.
    """
    sha256 = hashlib.sha256()
    skipped: Counter[str] = Counter()
    records: list[tuple[int, int]] = []
    try:
        size, _ = size_and_time(file)
        files.check_no_pointer(file)
        with epath.Path(file).open("rb") as stream:
            for offset, length, damage in _records(stream, size, sha256):
                if not damage:
                    records.append((offset, length))
                    continue
                if on_bad_row == "raise":
                    raise UserError(
                        f"{file}, record {len(records)}, byte {offset}: {damage}; copy the file "
                        "again, or set data.on_bad_row='skip'"
                    )
                rest = f"rest of the file from byte {offset}: {damage}"
                skipped[rest if length < 0 else damage] += 1
            position = stream.tell()
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    if position != size:
        raise UserError(f"{file}: changed while it was read; is it being written?")
    offsets, lengths = np.array(records, np.int64).reshape(-1, 2).T
    return Index(offsets, lengths, size, sha256.hexdigest(), dict(skipped))


def _records(stream: IO[bytes], size: int, sha256: Any) -> Iterator[tuple[int, int, str]]:
    """Yield (offset of the data, length, '') of each record, and digest the whole file.

    For a damaged record yield (offset of its header, length, damage); the length is -1, and nothing
    follows, where the next record cannot be located.
    """

    def read(count: int) -> bytes:
        data = stream.read(count)
        sha256.update(data)
        return data

    start, damage = 0, ""
    while not damage and (header := read(HEADER.size)):
        if len(header) < HEADER.size:
            damage = "truncated in a record's header"
            break
        length, crc = HEADER.unpack(header)
        end = start + HEADER.size + length + FOOTER.size
        if masked_crc(header[:8]) != crc:
            damage = "damaged length, or no TFRecord file"
        elif end > size:
            damage = "truncated in a record"
        else:
            data, footer = read(length), read(FOOTER.size)
            if len(footer) < FOOTER.size:
                return  # the file became shorter, which `scan` reports
            intact = masked_crc(data) == FOOTER.unpack(footer)[0]
            yield (start + HEADER.size, length, "") if intact else (start, length, DAMAGED)
            start = end
    if damage:
        yield start, -1, damage
        while read(CHUNK):
            pass


def index(file: File, cache_dir: File = "", on_bad_row: OnBadRow = "raise") -> Index:
    """Return the result of `scan`, cached while path, size and time of the file are the same.

    ``cache_dir`` is `data.cache_dir`; a message is printed once if it cannot be written.
    """
    try:
        identity = size_and_time(file)
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    path = os.path.abspath(file) if files.is_local(file) else os.fspath(file)
    key = json.dumps([CACHE_VERSION, path, *identity, on_bad_row])
    folder = files.cache_root(cache_dir) / "records"
    entry = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    if (cached := _load(entry, key)) is not None:
        return cached
    result = scan(file, on_bad_row)
    locations = np.stack(result[:2]).astype("<i8").tobytes()
    facts = {"key": key, "crc": google_crc32c.value(locations), "fields": result[2:]}
    try:
        files.write_atomic(entry, json.dumps(facts).encode() + b"\n" + locations)
    except UserError:
        _warn_once(folder)
    return result


@functools.cache
def _warn_once(folder: Path) -> None:
    print(f"{folder}: cannot be written; the index of records is not cached")


def _load(entry: Path, key: str) -> Index | None:
    """Return a cache entry, or None where it is missing or damaged."""
    try:
        head, _, locations = entry.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if facts["key"] != key or google_crc32c.value(locations) != facts["crc"]:
            return None
        return Index(*np.frombuffer(locations, "<i8").reshape(2, -1), *facts["fields"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class _Reader:
    """Open file for positional reads by many threads; closed when its last user drops it."""

    def __init__(self, file: str) -> None:
        self._stream = epath.Path(file).open("rb")
        self._lock = threading.Lock()
        self._local = files.is_local(file)
        weakref.finalize(self, self._stream.close)

    def read(self, offset: int, length: int) -> bytes:
        if self._local:
            return os.pread(self._stream.fileno(), length, offset)
        with self._lock:
            self._stream.seek(offset)
            return self._stream.read(length)


@functools.lru_cache(OPEN_FILES)
def _reader(file: str, identity: tuple[int, ...]) -> _Reader:
    """Open a file; another file of the same name has another ``identity``."""
    del identity
    return _Reader(file)


def read(file: File, offset: int, length: int) -> bytes:
    """Read and check the data of one record of an `Index`; any number of threads may read."""
    name = os.fspath(file)
    try:
        stat = os.stat(name) if files.is_local(name) else None
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns) if stat else ()
        raw = _reader(name, identity).read(offset, length + FOOTER.size)
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    data = raw[:length]
    if len(raw) != length + FOOTER.size or masked_crc(data) != FOOTER.unpack(raw[length:])[0]:
        raise UserError(
            f"{file}, byte {offset}: the record is damaged or not where it was; has the file "
            "changed since the run began?"
        )
    return data


@functools.cache
def _example_class() -> Any:
    """Return the message class of `tf.train.Example`; that of TFDS needs no TensorFlow."""
    from tensorflow_datasets.proto import tf_example_generated_pb2

    return tf_example_generated_pb2.Example


def parse_example(raw: bytes, names: Collection[str]) -> dict[str, list[bytes] | np.ndarray]:
    """Return the named features of a serialized `tf.train.Example`.

    Each is a list of bytes, an array [n] int64 or float32, or [] where it is absent. ValueError
    where the message is damaged or no `tf.train.Example`.
    """
    try:
        features = _example_class().FromString(raw).features.feature
    except DecodeError:
        raise ValueError("the message cannot be parsed") from None
    return {name: _values(features[name]) if name in features else [] for name in names}


def _values(feature: Any) -> list[bytes] | np.ndarray:
    kind = feature.WhichOneof("kind")
    values = getattr(feature, kind).value if kind else []
    return np.array(values, DTYPES[kind]) if kind in DTYPES else list(values)
