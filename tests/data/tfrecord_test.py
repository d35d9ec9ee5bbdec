"""TFRecord files and their index: against TensorFlow, and damaged in every way."""

from __future__ import annotations

import hashlib
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

from hyper_t5.data import tfrecord
from hyper_t5.tasks.seqio_tasks import tf
from hyper_t5.utils.errors import UserError
from tests.support import fake_bucket

RECORDS = [b"", b"one", b"x" * 1000, bytes(range(256)), b"last"]
STARTS = np.cumsum([0] + [len(record) + 16 for record in RECORDS])  # of the headers, and the end


def write(file: Path, data: list[bytes] = RECORDS) -> Path:
    with tf.io.TFRecordWriter(str(file)) as writer:
        for record in data:
            writer.write(record)
    return file


def read_all(file: Path | str, index: tfrecord.Index) -> list[bytes]:
    locations = zip(index.offsets.tolist(), index.lengths.tolist(), strict=True)
    return [tfrecord.read(file, offset, length) for offset, length in locations]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.tfrecord")


# ------------------------------------------------------------------------------------- scan


def test_records_of_tensorflow(file: Path) -> None:
    index = tfrecord.scan(file)
    assert read_all(file, index) == RECORDS
    assert index.offsets.dtype == index.lengths.dtype == np.int64
    assert index.offsets.tolist() == (STARTS[:-1] + 12).tolist()
    assert index.size == file.stat().st_size == STARTS[-1]
    assert index.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert index.skipped == {}


def test_a_file_without_records(tmp_path: Path) -> None:
    scanned = tfrecord.scan(write(tmp_path / "empty", []))
    assert (len(scanned.offsets), scanned.size, scanned.skipped) == (0, 0, {})
    for _ in range(2):
        index = tfrecord.index(tmp_path / "empty", tmp_path / "cache")
        assert (index.offsets.shape, index.sha256) == ((0,), scanned.sha256)


def test_damaged_data_costs_one_record(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[STARTS[2] + 12 + 500] ^= 1  # data
    raw[STARTS[4] - 1] ^= 128  # CRC of record 3's data
    file.write_bytes(raw)
    message = rf"a\.tfrecord, record 2, byte {STARTS[2]}: damaged record; copy the file"
    with pytest.raises(UserError, match=message):
        tfrecord.scan(file)
    index = tfrecord.scan(file, "skip")
    assert read_all(file, index) == [RECORDS[0], RECORDS[1], RECORDS[4]]
    assert index.skipped == {tfrecord.DAMAGED: 2}
    assert index.size == len(raw)


@pytest.mark.parametrize("byte", [0, 7, 8, 11])  # the length, and its CRC
def test_a_damaged_length_loses_the_rest_of_the_file(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[STARTS[2] + byte] ^= 64
    file.write_bytes(raw)
    with pytest.raises(UserError, match=rf"record 2, byte {STARTS[2]}: damaged length"):
        tfrecord.scan(file)
    index = tfrecord.scan(file, "skip")
    assert read_all(file, index) == RECORDS[:2]
    message = f"rest of the file from byte {STARTS[2]}: damaged length, or no TFRecord file"
    assert index.skipped == {message: 1}
    assert index.sha256 == hashlib.sha256(raw).hexdigest()  # also of what is lost


def test_truncation_at_any_byte(tmp_path: Path) -> None:
    records = [b"", b"one", b"last"]
    file = write(tmp_path / "a", records)
    raw, starts = file.read_bytes(), np.cumsum([0] + [len(record) + 16 for record in records])
    for size in range(len(raw)):
        file.write_bytes(raw[:size])
        whole = int(np.searchsorted(starts, size, "right")) - 1
        index = tfrecord.scan(file, "skip")
        assert len(index.offsets) == whole
        if size == starts[whole]:  # a file that ends with a record is valid
            assert index.skipped == {}
            continue
        assert sum(index.skipped.values()) == 1
        with pytest.raises(UserError, match=f"record {whole}, byte {starts[whole]}: truncated in"):
            tfrecord.scan(file)


def test_a_length_beyond_the_file_is_not_allocated(file: Path) -> None:
    header = (1 << 62).to_bytes(8, "little")
    file.write_bytes(header + tfrecord.masked_crc(header).to_bytes(4, "little") + b"data")
    with pytest.raises(UserError, match="record 0, byte 0: truncated in a record"):
        tfrecord.scan(file)


@settings(max_examples=60)
@given(
    data=st.lists(st.binary(max_size=40), max_size=6),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3),
    cut=st.integers(0, 10**6) | st.none(),
)
def test_damage_is_never_returned_as_data(
    tmp_path_factory: pytest.TempPathFactory,
    data: list[bytes],
    flips: list[tuple[int, int]],
    cut: int | None,
) -> None:
    file = write(tmp_path_factory.getbasetemp() / "fuzzed", data)
    raw = bytearray(file.read_bytes())
    whole = bytes(raw)
    for position, mask in flips if raw else []:
        raw[position % len(raw)] ^= mask
    raw = raw if cut is None else raw[: cut % (len(raw) + 1)]
    file.write_bytes(raw)
    index = tfrecord.scan(file, "skip")
    intact = read_all(file, index)
    assert all(intact.count(x) <= data.count(x) for x in intact)
    lost = any(key.startswith("rest") for key in index.skipped)
    counted = len(intact) + sum(index.skipped.values())
    if bytes(raw) == whole:
        assert (intact, index.skipped) == (data, {})
    elif not lost and len(raw) == len(whole):
        assert counted == len(data)
    else:
        assert counted <= len(data)
    if index.skipped:
        with pytest.raises(UserError, match=r"fuzzed, record \d+, byte \d+: "):
            tfrecord.scan(file)
    else:
        assert tfrecord.scan(file).offsets.tolist() == index.offsets.tolist()


def test_missing_files(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        for call in (tfrecord.scan, lambda x: tfrecord.index(x, tmp_path / "cache")):
            with pytest.raises(UserError, match=r"cannot read \((No such file|Is a directory)"):
                call(path)
    with pytest.raises(UserError, match=r"none: cannot read \(No such file"):
        tfrecord.read(tmp_path / "none", 12, 3)


# ------------------------------------------------------------------------------------ index


def test_an_index_is_cached_until_the_file_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[Any] = []
    scan = tfrecord.scan

    def counted(*args: Any) -> tfrecord.Index:
        scans.append(args)
        return scan(*args)

    monkeypatch.setattr(tfrecord, "scan", counted)
    cache = tmp_path / "cache"
    first, second = (tfrecord.index(file, cache) for _ in range(2))
    assert len(scans) == 1
    assert second.offsets.tolist() == first.offsets.tolist() == scan(file).offsets.tolist()
    assert second.lengths.tolist() == first.lengths.tolist()
    assert second[2:] == first[2:]
    assert read_all(file, second) == RECORDS
    monkeypatch.chdir(file.parent)  # a relative path is the same file
    tfrecord.index(file.name, cache)
    assert len(scans) == 1
    os.utime(file, ns=(0, 12345))
    tfrecord.index(file, cache)
    assert len(scans) == 2
    write(file, [b"other"])
    assert read_all(file, tfrecord.index(file, cache)) == [b"other"]
    assert len(scans) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    tfrecord.index(file)
    assert len(list((tmp_path / "xdg/hyper_t5/records").iterdir())) == 1


def test_skipped_records_are_cached(file: Path, tmp_path: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    for _ in range(2):
        assert tfrecord.index(file, tmp_path, "skip").skipped == {"damaged record": 1}
        with pytest.raises(UserError, match=r"record 4, .*damaged record"):
            tfrecord.index(file, tmp_path)


def test_damaged_cache_entries_are_replaced(file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    good = tfrecord.index(file, cache)
    (entry,) = (cache / "records").iterdir()
    whole = entry.read_bytes()
    head = whole.index(b"\n")
    for damaged in [b"", b"[]\n", b"\n", whole[:head], whole[:-8], whole[:-1] + b"\1", b"\xff" * 9]:
        entry.write_bytes(damaged)
        assert tfrecord.index(file, cache).lengths.tolist() == good.lengths.tolist()
        assert entry.read_bytes() == whole
    assert list((cache / "records").iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_reported_once(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for _ in range(2):
        assert len(tfrecord.index(file, tmp_path / "file").offsets) == 5
    assert capsys.readouterr().out.count("cannot be written; ") == 1


# ------------------------------------------------------------------------------------- read


def test_a_changed_file_is_not_misread(file: Path) -> None:
    assert read_all(file, tfrecord.scan(file)) == RECORDS
    write(file, [b"another", b"y" * 900, b"z" * 900])
    with pytest.raises(UserError, match="byte 28: the record is damaged or not where it was"):
        tfrecord.read(file, 28, 3)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="not where it was"):
        tfrecord.read(file, 12, 0)
    file.unlink()
    write(file, [b"replaced"])
    assert read_all(file, tfrecord.scan(file)) == [b"replaced"]


def test_many_files_and_threads(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}", [b"%d %d" % (i, j) for j in range(9)]) for i in range(100)]
    index = [tfrecord.scan(file) for file in files]
    wrong: list[Any] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for i, j in rng.integers([100, 9], size=(500, 2)).tolist():
            data = tfrecord.read(files[i], int(index[i].offsets[j]), int(index[i].lengths[j]))
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
        assert len(os.listdir("/proc/self/fd")) <= before + tfrecord.OPEN_FILES


def test_files_in_a_bucket(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_bucket.served(monkeypatch) as objects:
        objects["gs://b/a"] = file.read_bytes()
        for _ in range(2):
            index = tfrecord.index("gs://b/a", tmp_path / "cache")
            assert read_all("gs://b/a", index) == RECORDS
        with pytest.raises(UserError, match="gs://b/none: cannot read"):
            tfrecord.index("gs://b/none", tmp_path / "cache")


# ------------------------------------------------------------------------- tf.train.Example

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
    """Return the features that TensorFlow reads, in the form of `parse_example`."""
    features: dict[str, Any] = {}
    for name, feature in tf.train.Example.FromString(raw).features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        dtype = {"int64_list": np.int64, "float_list": np.float32}.get(kind)
        features[name] = np.array(values, dtype) if dtype else values
    return features


def assert_reads_as_tensorflow(raw: bytes) -> None:
    expected = tf_features(raw)
    features = tfrecord.parse_example(raw, [*expected, "absent"])
    assert features.pop("absent") == []
    assert features.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, list):
            assert features[name] == value
        else:
            np.testing.assert_array_equal(features[name], value, strict=True)
    some = list(expected)[:1]
    assert list(tfrecord.parse_example(raw, some)) == some


@settings(max_examples=100)
@given(st.dictionaries(NAMES, FEATURES, max_size=5))
def test_examples_of_tensorflow(features: dict[str, Any]) -> None:
    assert_reads_as_tensorflow(make_example(features))


@settings(max_examples=200)
@given(
    features=st.dictionaries(NAMES, FEATURES, max_size=3),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4),
    cut=st.integers(0, 10**6) | st.none(),
    more=st.binary(max_size=12),
)
def test_damaged_examples_raise_value_error_or_are_valid(
    features: dict[str, Any], flips: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    raw = bytearray(make_example(features))
    for position, mask in flips if raw else []:
        raw[position % len(raw)] ^= mask
    damaged = bytes(raw[: None if cut is None else cut % (len(raw) + 1)]) + more
    try:
        tf_features(damaged)
    except (DecodeError, UnicodeDecodeError):
        with pytest.raises(ValueError, match=r"cannot be parsed|codec"):
            tfrecord.parse_example(damaged, list(features))
    else:
        assert_reads_as_tensorflow(damaged)


def test_real_records(real_data: Callable[[str], Path]) -> None:
    task = real_data("p3") / "data" / "super_glue_cb_can_we_infer_score_eval"
    [file] = task.glob("*.tfrecord-*")
    records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
    assert read_all(file, tfrecord.scan(file)) == records
    assert len(records) == 56 * 3
    for raw in records:
        assert_reads_as_tensorflow(raw)
