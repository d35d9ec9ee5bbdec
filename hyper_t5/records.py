"""Random access to TFRecord files, and to the `tf.train.Example`s in them. No TensorFlow here.

A TFRecord file is a run of records, each (https://www.tensorflow.org/tutorials/load_data/tfrecord)

    uint64 length, uint32 masked crc32c of it, data [length], uint32 masked crc32c of the data

with numbers in little endian. There is no index in it: `scan` reads a file once from end to end,
and `index` keeps what it found. `read` then gives any record with one read of the file.

Paths go through `etils.epath`: a folder may be local or, say, `gs://bucket/folder`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import google_crc32c
import numpy as np
from etils import epath

from hyper_t5.errors import UserError
from hyper_t5.files import cache_root
from hyper_t5.taskfile import OnBadRow

HEADER = struct.Struct("<QI")  # the length, and its crc
FOOTER = struct.Struct("<I")  # the data's crc
CHUNK = 1 << 22  # bytes read at once by a scan
DAMAGED = "damaged record"  # what Index.skipped calls one
OPEN_FILES = 64  # kept open by `read`; a pod's shards are many more
CACHE_VERSION = 1

File = str | os.PathLike[str]


class Index(NamedTuple):
    """Where the records of a file lie.

    Attributes:
        offsets: [n] int64, bytes before the data of each record (its header is before that).
        lengths: [n] int64, bytes of data.
        size: of the file, bytes.
        sha256: of the whole file, in hex.
        skipped: what was left out, by what was wrong; where the rest of the file is lost the key
            says so, and counts once, because how many records it had cannot be known.
    """

    offsets: np.ndarray
    lengths: np.ndarray
    size: int
    sha256: str
    skipped: Mapping[str, int]


def masked_crc(data: bytes) -> int:
    """The crc32c of `data` as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# ------------------------------------------------------------------------------------ scan


def scan(file: File, on_bad_row: OnBadRow = "raise") -> Index:
    """Reads a whole file once and checks both crcs of every record.

    Args:
        file: a TFRecord file, not compressed.
        on_bad_row: 'skip' leaves damaged records out and counts them in `Index.skipped`. After a
            damaged length, or a record that the file ends in, nothing more can be read.

    Raises:
        UserError: names file, record and byte of the first damage; or the file cannot be read.
    """
    digest = hashlib.sha256()
    skipped: Counter[str] = Counter()
    offsets: list[int] = []
    lengths: list[int] = []
    try:
        size, _ = size_and_time(file)
        with epath.Path(file).open("rb") as raw:
            for offset, length, wrong in _walk(raw, size, digest):
                if not wrong:
                    offsets.append(offset)
                    lengths.append(length)
                    continue
                if on_bad_row == "raise":
                    number = len(offsets)
                    raise UserError(
                        f"{file}, record {number}, byte {offset}: {wrong}; copy the file again, "
                        "or set data.on_bad_row='skip'"
                    )
                lost = length < 0
                skipped[f"rest of the file from byte {offset}: {wrong}" if lost else wrong] += 1
            read = raw.tell()
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    if read != size:
        raise UserError(f"{file}: changed while it was read; is it being written?")
    places = np.array(offsets, np.int64), np.array(lengths, np.int64)
    return Index(*places, size, digest.hexdigest(), dict(skipped))


def _walk(raw: IO[bytes], size: int, digest: Any) -> Iterator[tuple[int, int, str]]:
    """(offset, length, '') of each record; with what is wrong with it, and there offset is that of
    its header and length is -1 where nothing after it can be read. Digests the whole file.
    """
    buffer, start, at = b"", 0, 0  # what is read, the file's byte that it begins at, and where now

    def fill(need: int) -> bool:
        """Has `need` bytes from `at` on in the buffer, or says that the file has not as many."""
        nonlocal buffer, start, at
        if len(buffer) - at >= need:
            return True
        parts, have = [buffer[at:]], len(buffer) - at
        while have < need:
            more = raw.read(max(CHUNK, need - have))
            if not more:
                break
            digest.update(more)
            parts.append(more)
            have += len(more)
        buffer, start, at = b"".join(parts), start + at, 0
        return have >= need

    wrong = ""
    while not wrong and fill(1):
        begin = start + at
        if not fill(HEADER.size):
            wrong = "truncated in a record's header"
            break
        length, crc = HEADER.unpack_from(buffer, at)
        if masked_crc(buffer[at : at + 8]) != crc:
            wrong = "damaged length, or no TFRecord file"
        elif begin + HEADER.size + length + FOOTER.size > size:
            wrong = "truncated in a record"
        elif fill(HEADER.size + length + FOOTER.size):
            at += HEADER.size
            good = (
                masked_crc(buffer[at : at + length]) == FOOTER.unpack_from(buffer, at + length)[0]
            )
            at += length + FOOTER.size
            yield (begin + HEADER.size, length, "") if good else (begin, length, DAMAGED)
        else:
            break  # shorter than it was: `scan` sees it
    if wrong:
        yield begin, -1, wrong
        while more := raw.read(CHUNK):
            digest.update(more)


def size_and_time(file: File) -> tuple[int, int]:
    """Bytes, and when it was written: what tells a file from another under its name."""
    if _is_remote(file):
        found: Any = epath.Path(file).stat()
        return int(found.length), int(found.mtime * 10**9)
    local = os.stat(file)
    return local.st_size, local.st_mtime_ns


def _is_remote(file: File) -> bool:
    return "://" in os.fspath(file)


# ----------------------------------------------------------------------------- the index, kept


def index(file: File, cache_dir: File = "", on_bad_row: OnBadRow = "raise") -> Index:
    """What `scan` found, now or before.

    It is kept in a folder as long as path, size and time of the file are the same. A damaged entry
    is made anew. Where the folder cannot be written nothing is kept, and that is said once.

    Args:
        file: a TFRecord file.
        cache_dir: `data.cache_dir`; '' is the user's cache folder.
        on_bad_row: as `scan`.

    Raises:
        UserError: as `scan`.
    """
    try:
        size, time = size_and_time(file)
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    place = os.fspath(file) if _is_remote(file) else os.path.abspath(file)
    key = json.dumps([CACHE_VERSION, place, size, time, on_bad_row])
    folder = cache_root(cache_dir) / "records"
    entry = folder / hashlib.sha256(key.encode()).hexdigest()[:32]
    found = _load(entry, key)
    if found is None:
        found = scan(file, on_bad_row)
        try:
            _keep(found, entry, key)
        except OSError as error:
            _say_not_kept(str(folder), str(error.strerror))
    return found


def _keep(found: Index, entry: Path, key: str) -> None:
    """One line of JSON, then offsets and lengths; it appears whole or not."""
    places = np.stack([found.offsets, found.lengths]).astype("<i8").tobytes()
    facts = {
        "key": key,
        "size": found.size,
        "sha256": found.sha256,
        "skipped": dict(found.skipped),
        "crc": google_crc32c.value(places),
    }
    entry.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f"{entry.name}.", dir=entry.parent)
    try:
        with open(handle, "wb") as out:
            out.write(json.dumps(facts).encode() + b"\n" + places)
        os.replace(part, entry)
    except BaseException:
        os.unlink(part)
        raise


def _load(entry: Path, key: str) -> Index | None:
    """The entry, or None where there is none that is whole."""
    try:
        head, _, places = entry.read_bytes().partition(b"\n")
        facts = json.loads(head)
        if facts["key"] != key or google_crc32c.value(places) != facts["crc"]:
            return None
        offsets, lengths = np.frombuffer(places, "<i8").reshape(2, -1)
        skipped = {str(name): int(count) for name, count in facts["skipped"].items()}
        return Index(offsets, lengths, int(facts["size"]), str(facts["sha256"]), skipped)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@functools.cache
def _say_not_kept(folder: str, reason: str) -> None:
    print(f"{folder}: cannot be written ({reason}), so where records lie is not kept")


# ------------------------------------------------------------------------------------ read


class _Open:
    """An open file to read pieces of. Closed with its last reader, so an evicted one may go on."""

    def __init__(self, file: str) -> None:
        self._remote = _is_remote(file)
        self._lock = threading.Lock()
        self._file: Any = None  # what __del__ finds where the next line raises
        self._file = epath.Path(file).open("rb") if self._remote else os.open(file, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        if not self._remote:
            return os.pread(self._file, length, offset)
        with self._lock:
            self._file.seek(offset)
            return bytes(self._file.read(length))

    def __del__(self) -> None:
        if self._file is not None:
            if self._remote:
                self._file.close()
            else:
                os.close(self._file)


@functools.lru_cache(OPEN_FILES)
def _open(file: str, identity: tuple[int, ...]) -> _Open:
    del identity  # of the file: another one under its name is opened anew
    return _Open(file)


def read(file: File, offset: int, length: int) -> bytes:
    """The data of one record, by its place in an `Index`. Any number of threads may read.

    Raises:
        UserError: the file is gone or not what was indexed: the data's crc is checked again.
    """
    name = os.fspath(file)
    try:
        identity: tuple[int, ...] = ()
        if not _is_remote(name):
            found = os.stat(name)
            identity = (found.st_ino, found.st_size, found.st_mtime_ns)
        raw = _open(name, identity).read(offset, length + FOOTER.size)
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror or error})") from None
    data = raw[:length]
    if len(raw) != length + FOOTER.size or masked_crc(data) != FOOTER.unpack(raw[length:])[0]:
        raise UserError(
            f"{file}, byte {offset}: the record is damaged or not where it was; has the file "
            "changed since the run began?"
        )
    return data


# --------------------------------------------------------------------------- tf.train.Example

# Of protocol buffers' wire format, https://protobuf.dev/programming-guides/encoding.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Fields of Feature (tensorflow/core/example/feature.proto): one of them is set.
_BYTES_LIST, _FLOAT_LIST, _INT64_LIST = 1, 2, 3


def parse_example(raw: bytes, names: Collection[str]) -> dict[str, list[bytes] | np.ndarray]:
    """The asked-for features of a serialized `tf.train.Example`; all others are passed over.

    Returns:
        By name: bytes as a list, numbers as an array [n] int64 or float32; [] where it is absent.

    Raises:
        ValueError: not a `tf.train.Example`, or a damaged one.
    """
    wanted = {name.encode(): name for name in names}
    found: dict[str, list[bytes] | np.ndarray] = {name: [] for name in names}
    try:
        for features in _field(raw, (0, len(raw)), 1):  # Example.features
            for entry in _field(raw, features, 1):  # Features.feature, a map
                key, values = b"", []
                for field, inner in _messages(raw, *entry):
                    if field == 1:
                        key = raw[inner[0] : inner[1]]
                    elif field == 2:
                        values.append(inner)
                if key in wanted:
                    found[wanted[key]] = _feature(raw, values)
    except IndexError:
        raise ValueError("ends in the middle of a number") from None
    return found


def _field(raw: bytes, inside: tuple[int, int], number: int) -> list[tuple[int, int]]:
    return [place for field, place in _messages(raw, *inside) if field == number]


def _messages(raw: bytes, at: int, end: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """(field, (begin, end)) of the fields of raw[at:end] that are bytes; others are passed over."""
    while at < end:
        tag = raw[at]
        at += 1
        if tag >= 0x80:
            tag, at = _varint(raw, at - 1)
        kind = tag & 7
        if kind == _BYTES:
            length = raw[at]
            at += 1
            if length >= 0x80:
                length, at = _varint(raw, at - 1)
            begin, at = at, at + length
            if at > end:
                raise ValueError("a field is longer than what it is in")
            if tag < 8:
                raise ValueError("a field without a number")
            yield tag >> 3, (begin, at)
        else:
            at = _pass_over(raw, at, tag)
    if at != end:
        raise ValueError("a field is longer than what it is in")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number (64 bits, unsigned), and where the next thing begins."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise ValueError("a number of more than ten bytes")


def _pass_over(raw: bytes, at: int, tag: int) -> int:
    kind = tag & 7
    if tag < 8:
        raise ValueError("a field without a number")
    if kind == _VARINT:
        return _varint(raw, at)[1]
    if kind in (_FIXED64, _FIXED32):
        return at + (8 if kind == _FIXED64 else 4)
    raise ValueError(f"a field of unknown kind {kind}")


def _feature(raw: bytes, values: list[tuple[int, int]]) -> list[bytes] | np.ndarray:
    """A Feature's list. Of several kinds the last counts; several lists of a kind are one."""
    kind = 0
    lists: list[tuple[int, int]] = []
    for begin, end in values:
        for field, inner in _messages(raw, begin, end):
            if field in (_BYTES_LIST, _FLOAT_LIST, _INT64_LIST):
                lists = [*lists, inner] if field == kind else [inner]
                kind = field
    if kind == _FLOAT_LIST:
        return _numbers(raw, lists, _FIXED32, _floats, "<f4").astype(np.float32)
    if kind == _INT64_LIST:
        return _numbers(raw, lists, _VARINT, _int64s, "<i8").astype(np.int64)
    return [raw[begin:end] for inner in lists for begin, end in _field(raw, inner, 1)]


def _numbers(
    raw: bytes, lists: list[tuple[int, int]], kind: int, unpack: Any, dtype: str
) -> np.ndarray:
    """Lists of numbers, each packed in one piece (as is usual), one by one, or both."""
    parts: list[np.ndarray] = []
    alone = 1 << 3 | kind  # the tag of a number that is not packed
    for at, end in lists:
        while at < end:
            tag, at = _varint(raw, at)
            begin = at
            if tag == (1 << 3 | _BYTES):
                length, begin = _varint(raw, at)
                at = begin + length
            elif tag & 7 == _BYTES:
                length, at = _varint(raw, at)
                at += length
            else:
                at = _pass_over(raw, at, tag)
            if at > end:
                raise ValueError("a number is longer than its list")
            if tag in (alone, 1 << 3 | _BYTES):
                parts.append(unpack(raw[begin:at]))
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, dtype), *parts])


def _floats(packed: bytes) -> np.ndarray:
    if len(packed) % 4:
        raise ValueError("ends in the middle of a number")
    return np.frombuffer(packed, "<f4")


def _int64s(packed: bytes) -> np.ndarray:
    """Packed varints, as two's complement of 64 bits."""
    data = np.frombuffer(packed, np.uint8)
    ends = np.flatnonzero(data < 0x80)
    if not len(data):
        return np.zeros(0, np.int64)
    if data[-1] >= 0x80:
        raise ValueError("ends in the middle of a number")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 10:
        raise ValueError("a number of more than ten bytes")
    # Seven bits a byte, the lowest first; no two bytes have a bit in common.
    shifts = (7 * (np.arange(len(data)) - np.repeat(starts, sizes))).astype(np.uint64)
    bits = (data & 0x7F).astype(np.uint64) << shifts
    return np.add.reduceat(bits, starts).view(np.int64)
