"""TFRecord files by place: against TensorFlow's own writer and reader, and damaged in every way."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_t5 import records
from hyper_t5.errors import UserError
from hyper_t5.tasks.common import tf

RECORDS = [b"", b"one", b"x" * 1000, bytes(range(256)), b"last"]
STARTS = np.cumsum([0] + [len(record) + 16 for record in RECORDS])  # of the headers, and the end


def write(file: Path, data: list[bytes] = RECORDS) -> Path:
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in data:
            writer.write(record)
    return file


def read_all(file: Path, found: records.Index) -> list[bytes]:
    return [
        records.read(file, int(offset), int(length))
        for offset, length in zip(found.offsets, found.lengths, strict=True)
    ]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.tfrecord")


# ------------------------------------------------------------------------------------ scan


@pytest.mark.parametrize("chunk", [1, 7, 16, 1 << 22])
def test_records_of_tensorflow(file: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(records, "CHUNK", chunk)
    found = records.scan(file)
    assert read_all(file, found) == RECORDS
    assert found.offsets.dtype == found.lengths.dtype == np.int64
    assert found.offsets.tolist() == (STARTS[:-1] + 12).tolist()
    assert found.size == file.stat().st_size == STARTS[-1]
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.skipped == {}


def test_a_file_without_records(tmp_path: Path) -> None:
    found = records.scan(write(tmp_path / "empty", []))
    assert (len(found.offsets), found.size, found.skipped) == (0, 0, {})
    assert records.index(tmp_path / "empty", tmp_path / "cache").offsets.shape == (0,)
    again = records.index(tmp_path / "empty", tmp_path / "cache")
    assert again.offsets.shape == (0,)
    assert again.sha256 == found.sha256


def test_damaged_data_costs_one_record(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[STARTS[2] + 12 + 500] ^= 1  # data
    raw[STARTS[4] - 1] ^= 128  # the crc of record 3's data
    file.write_bytes(raw)
    with pytest.raises(
        UserError, match=rf"a\.tfrecord, record 2, byte {STARTS[2]}: damaged record; copy the file"
    ):
        records.scan(file)
    found = records.scan(file, "skip")
    assert read_all(file, found) == [RECORDS[0], RECORDS[1], RECORDS[4]]
    assert found.skipped == {"damaged record": 2}
    assert found.size == len(raw)


@pytest.mark.parametrize("byte", [0, 7, 8, 11])  # the length, and its crc
def test_after_a_damaged_length_the_rest_is_lost_and_said_so(file: Path, byte: int) -> None:
    import hashlib

    raw = bytearray(file.read_bytes())
    raw[STARTS[2] + byte] ^= 64
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"record 2, byte {STARTS[2]}: damaged length"):
        records.scan(file)
    found = records.scan(file, "skip")
    assert read_all(file, found) == RECORDS[:2]
    message = f"rest of the file from byte {STARTS[2]}: damaged length, or no TFRecord file"
    assert found.skipped == {message: 1}
    assert found.sha256 == hashlib.sha256(raw).hexdigest()  # of what is lost too


def test_truncated_anywhere(file: Path) -> None:
    raw = file.read_bytes()
    for size in range(len(raw)):
        file.write_bytes(raw[:size])
        whole = int(np.searchsorted(STARTS, size, "right")) - 1
        found = records.scan(file, "skip")
        assert len(found.offsets) == whole
        if size == STARTS[whole]:  # where a record ends the file is as good as any
            assert found.skipped == {}
            continue
        assert sum(found.skipped.values()) == 1
        with pytest.raises(UserError, match=f"record {whole}, byte {STARTS[whole]}: truncated in"):
            records.scan(file)


def test_a_length_that_no_file_has_is_not_read(file: Path) -> None:
    header = (1 << 62).to_bytes(8, "little")
    file.write_bytes(header + records.masked_crc(header).to_bytes(4, "little") + b"data")
    with pytest.raises(UserError, match="record 0, byte 0: truncated in a record"):
        records.scan(file)


@settings(max_examples=60)
@given(
    data=st.lists(st.binary(max_size=40), max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
    cut=st.integers(0, 10**6) | st.none(),
)
def test_damage_is_never_believed(
    tmp_path_factory: pytest.TempPathFactory,
    data: list[bytes],
    flips: list[tuple[int, int]],
    cut: int | None,
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "fuzzed", data)
    raw = bytearray(file.read_bytes())
    whole = bytes(raw)
    for place, mask in flips if raw else []:
        raw[place % len(raw)] ^= mask
    raw = raw if cut is None else raw[: cut % (len(raw) + 1)]
    file.write_bytes(raw)
    found = records.scan(file, "skip")
    kept = read_all(file, found)
    assert [kept.count(x) <= data.count(x) for x in kept] == [True] * len(kept)
    lost = any(key.startswith("rest") for key in found.skipped)
    counted = len(kept) + sum(found.skipped.values())
    if bytes(raw) == whole:
        assert (kept, found.skipped) == (data, {})
    elif not lost and len(raw) == len(whole):
        assert counted == len(data)
    else:
        assert counted <= len(data)
    if found.skipped:
        with pytest.raises(UserError, match=r"fuzzed, record \d+, byte \d+: "):
            records.scan(file)
    else:
        assert records.scan(file).offsets.tolist() == found.offsets.tolist()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        for call in (records.scan, lambda x: records.index(x, tmp_path / "cache")):
            with pytest.raises(UserError, match=r"cannot read \((No such file|Is a directory)"):
                call(path)
    with pytest.raises(UserError, match=r"none: cannot read \(No such file"):
        records.read(tmp_path / "none", 12, 3)


# --------------------------------------------------------------------------------- the cache


def test_an_index_is_kept_until_the_file_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Any] = []
    scan = records.scan

    def counted(*args: Any) -> records.Index:
        scans.append(args)
        return scan(*args)

    monkeypatch.setattr(records, "scan", counted)
    cache = tmp_path / "cache"
    first = records.index(file, cache)
    second = records.index(file, cache)
    assert len(scans) == 1
    assert second.offsets.tolist() == first.offsets.tolist() == scan(file).offsets.tolist()
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second[2:] == first[2:]
    assert read_all(file, second) == RECORDS
    monkeypatch.chdir(file.parent)  # another way to name it
    records.index(file.name, cache)
    assert len(scans) == 1
    os.utime(file, ns=(0, 12345))
    records.index(file, cache)
    assert len(scans) == 2
    write(file, [b"other"])
    assert read_all(file, records.index(file, cache)) == [b"other"]
    assert len(scans) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    records.index(file)
    assert len(list((tmp_path / "xdg/hyper_t5/records").iterdir())) == 1


def test_what_was_skipped_is_kept_too(file: Path, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for _ in range(2):
        assert records.index(file, tmp_path, "skip").skipped == {"damaged record": 1}
        with pytest.raises(UserError, match=r"record 4, .*damaged record"):
            records.index(file, tmp_path)


def test_damaged_entries_are_made_anew(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good = records.index(file, cache)
    (entry,) = (cache / "records").iterdir()
    whole = entry.read_bytes()
    head = whole.index(b"\n")
    for damaged in [b"", b"[]\n", b"\n", whole[:head], whole[:-8], whole[:-1] + b"\1", b"\xff" * 9]:
        entry.write_bytes(damaged)
        assert records.index(file, cache).lengths.tolist() == good.lengths.tolist()
        assert entry.read_bytes() == whole
    assert len(list((cache / "records").iterdir())) == 1  # nothing half-made is left


def test_a_cache_that_cannot_be_written_is_said_once(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        assert len(records.index(file, tmp_path / "file").offsets) == 5
    out = capsys.readouterr().out
    assert out.count("cannot be written (") == 1


# ------------------------------------------------------------------------------------ read


def test_a_file_that_changed_is_not_misread(file: Path) -> None:
    found = records.scan(file)
    assert read_all(file, found) == RECORDS
    write(file, [b"another", b"y" * 900, b"z" * 900])
    with pytest.raises(UserError, match="byte 28: the record is damaged or not where it was"):
        records.read(file, 28, 3)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="not where it was"):
        records.read(file, 12, 0)


def test_many_files_and_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / f"{i}", [b"%d %d" % (i, j) for j in range(9)]) for i in range(100)]
    found = [records.scan(file) for file in files]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i, j in rng.integers([100, 9], size=(500, 2)).tolist():
            data = records.read(files[i], int(found[i].offsets[j]), int(found[i].lengths[j]))
            if data != b"%d %d" % (i, j):
                wrong.append(data)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + records.OPEN_FILES


def test_files_elsewhere_go_through_epath(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A bucket that is a folder: what epath gives for its paths is what it gives for ours.
    class Stat:
        def __init__(self, path: Path) -> None:
            self.length, self.mtime = path.stat().st_size, int(path.stat().st_mtime)

    class Bucket:
        def __init__(self, path: str) -> None:
            self.path = tmp_path / str(path).removeprefix("gs://bucket/")

        def open(self, mode: str) -> Any:
            return self.path.open(mode)

        def stat(self) -> Stat:
            return Stat(self.path)

    monkeypatch.setattr(records.epath, "Path", Bucket)
    name = f"gs://bucket/{file.name}"
    for _ in range(2):
        found = records.index(name, tmp_path / "cache")
        assert [
            records.read(name, offset, length)
            for offset, length in zip(found.offsets.tolist(), found.lengths.tolist(), strict=True)
        ] == RECORDS
    with pytest.raises(UserError, match="gs://bucket/none: cannot read"):
        records.index("gs://bucket/none", tmp_path / "cache")


# --------------------------------------------------------------------------- tf.train.Example

INT64S = st.integers(-(2**63), 2**63 - 1) | st.integers(0, 300)
FEATURES = st.one_of(
    st.none(),
    st.lists(st.binary(max_size=200), max_size=4),
    st.lists(INT64S, max_size=40).map(lambda values: ("int64", values)),
    st.lists(st.floats(width=32), max_size=9).map(lambda values: ("float", values)),
)
NAMES = st.sampled_from(["inputs", "idx", "a", "ä", "", "x" * 200])


def make_example(features: dict[str, Any]) -> bytes:
    example = tf.train.Example()
    for name, value in features.items():
        feature = example.features.feature[name]
        if isinstance(value, tuple):
            getattr(feature, f"{value[0]}_list").value.extend(value[1])
            feature.SetInParent()
        elif value is not None:
            feature.bytes_list.value.extend(value)
    return bytes(example.SerializeToString())


def tf_features(raw: bytes) -> dict[str, Any]:
    """What TensorFlow's own parser says, in our form."""
    found: dict[str, Any] = {}
    for name, feature in tf.train.Example.FromString(raw).features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        dtype = {"int64_list": np.int64, "float_list": np.float32}.get(kind)
        found[name] = np.array(values, dtype) if dtype else values
    return found


def assert_same(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, list):
        assert list(ours) == theirs
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=150)
@given(st.dictionaries(NAMES, FEATURES, max_size=5))
def test_examples_of_tensorflow(features: dict[str, Any]) -> None:
    raw = make_example(features)
    theirs = tf_features(raw)
    ours = records.parse_example(raw, [*features, "absent"])
    assert ours.pop("absent") == []
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert_same(ours[name], value)
    some = list(features)[:1]
    assert list(records.parse_example(raw, some)) == some


def varint(value: int) -> bytes:
    value &= 2**64 - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def test_lists_that_are_not_packed_and_parts_that_come_twice() -> None:
    """What no writer in use makes, and every reader must read."""
    ints = field(1, varint(-1) + varint(300)) + b"\x08" + varint(7) + b"\x08" + varint(2**63 - 1)
    one = np.float32(1.5).tobytes()
    floats = b"\x0d" + one + field(1, one + one) + b"\x0d" + one
    unknown = varint(15 << 3) + varint(9) + varint(14 << 3 | 1) + bytes(8) + field(13, b"?")
    unknown += varint(12 << 3 | 5) + bytes(4)

    def entry(name: bytes, *lists: bytes) -> bytes:
        return field(1, field(1, name) + field(2, unknown + b"".join(lists)))

    ints_then_bytes = field(3, ints), field(1, field(1, b"x"))
    raw = (
        field(1, entry(b"i", field(3, ints), field(3, ints)) + unknown)
        + unknown
        + field(1, entry(b"f", field(2, floats + unknown)) + entry(b"last", *ints_then_bytes))
        + field(1, entry(b"none") + entry(b"again", field(3, ints)))
        + field(1, entry(b"again", *ints_then_bytes))
    )
    theirs = tf_features(raw)
    assert theirs["i"].tolist() == [-1, 300, 7, 2**63 - 1] * 2
    assert theirs["f"].tolist() == [1.5] * 4
    assert theirs["last"] == theirs["again"] == [b"x"]
    ours = records.parse_example(raw, list(theirs))
    for name, value in theirs.items():
        assert_same(ours[name], value)


@settings(max_examples=300)
@given(
    features=st.dictionaries(NAMES, FEATURES, max_size=3),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 10**6) | st.none(),
    more=st.binary(max_size=12),
)
def test_damaged_examples_raise_value_error_or_say_what_tensorflow_says(
    features: dict[str, Any], flips: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    raw = bytearray(make_example(features))
    for place, mask in flips if raw else []:
        raw[place % len(raw)] ^= mask
    damaged = bytes(raw[: None if cut is None else cut % (len(raw) + 1)]) + more
    try:
        ours = records.parse_example(damaged, list(features))
    except ValueError:
        return
    try:
        theirs = tf_features(damaged)
    except (DecodeError, UnicodeDecodeError):
        return  # it also refuses what we were not asked for
    # Of an entry with a field that is unknown Python's protobuf keeps nothing, C++'s the rest.
    for name in theirs.keys() & features.keys():
        assert_same(ours[name], theirs[name])


@pytest.mark.parametrize(
    "raw",
    [
        b"\x0a",  # ends after a tag
        b"\x0a\x05ab",  # a field longer than the whole
        b"\x0a" + b"\xff" * 11,  # a length of more than ten bytes
        b"\x0b",  # a group: older than tf.train.Example
        b"\x02\x00",  # a field without a number
        field(1, field(1, field(1, b"i") + field(2, field(3, field(1, b"\x80"))))),
        field(1, field(1, field(1, b"i") + field(2, field(3, field(1, b"\x80" * 10 + b"\1"))))),
        field(1, field(1, field(1, b"i") + field(2, field(3, b"\x0a\x09\x01")))),
        field(1, field(1, field(1, b"i") + field(2, field(2, field(1, b"abc"))))),
        field(1, field(1, field(1, b"i") + field(2, field(2, b"\x0dabc")))),
    ],
)
def test_malformed_examples(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"number|field"):
        records.parse_example(raw, ["i"])
    with pytest.raises(DecodeError, match=r"(?i)parsing|decod"):
        tf_features(raw)


def test_real_records_when_at_hand(real_data: Callable[[str], Path]) -> None:
    task = real_data("p3") / "data" / "super_glue_cb_can_we_infer_score_eval"
    [file] = task.glob("*.tfrecord-*")
    index = records.scan(file)
    theirs = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    assert read_all(file, index) == theirs
    assert len(theirs) == 56 * 3
    for raw in theirs:
        want = tf_features(raw)
        ours = records.parse_example(raw, list(want))
        for name, value in want.items():
            assert_same(ours[name], value)
