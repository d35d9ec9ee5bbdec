"""Text files, cached tokens, chunks and their splits, and hyperpretraining batches."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import lzma
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_t5 import pipeline
from hyper_t5.data import text_corpus
from hyper_t5.data.batch import CONCAT, FUSION, IDS, SEPARATE
from hyper_t5.data.text_corpus import READERS, SegmentRule, StoredChunks, TextSampler
from hyper_t5.data.vocab import EOS_ID, ByteVocabulary
from hyper_t5.utils.errors import UserError
from tests.support.toy_tasks import (
    BYTES,
    make_config,
    parts_at_eos,
    result_or_error,
    text_config,
    texts_at_eos,
)

DOCUMENTS = ["short", "the quick brown fox " * 30, "lorem ipsum dolor " * 7, "x" * 30]


def write_text(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    raw = "".join(json.dumps({"title": "t", "text": d}) + "\n" for d in documents).encode()
    path.write_bytes(lzma.compress(raw) if path.suffix == ".xz" else raw)
    return path


# ------------------------------------------------------------------------------- documents


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", DOCUMENTS[:2])
    write_text(tmp_path / "b.jsonl.xz", DOCUMENTS[2:3])
    (tmp_path / "c.txt").write_text(DOCUMENTS[3])
    (tmp_path / "notes.json").write_text("{}")
    for spec, expected in ((tmp_path, DOCUMENTS), (tmp_path / "*.jsonl*", DOCUMENTS[:3])):
        files = text_corpus.text_files(str(spec))
        assert [d for file in files for d in text_corpus.read_documents(file)] == expected
    for spec, message in [
        (tmp_path / "none", "no such file"),
        (tmp_path / "*.gz", "no such file"),
        (tmp_path / "notes.json", "not this kind"),
    ]:
        with pytest.raises(UserError, match=message):
            text_corpus.text_files(str(spec))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not valid JSON"),
        (b'{"body": "x"}', "lacks field text"),
        (b'{"text": null}', "field text must be text"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_a_bad_line_is_reported_or_skipped(line: bytes, message: str, tmp_path: Path) -> None:
    good = json.dumps({"text": "fine"}).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(good + b"\r\n\n" + line + b"\n" + good)
    with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {message}"):
        list(text_corpus.read_documents(path))
    skipped: Counter[str] = Counter()
    assert list(text_corpus.read_documents(path, "skip", skipped)) == ["fine", "fine"]
    assert skipped.total() == 1


def test_a_text_file_that_is_not_utf8_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(UserError, match=r"c\.txt, line 2: not UTF-8"):
        list(text_corpus.read_documents(tmp_path / "c.txt"))


def assert_readable_or_refused(path: Path) -> None:
    """Check that a file is read, or refused in one line that names it; with 'skip' too."""
    for on_bad_row in ("raise", "skip"):
        documents = map(BYTES.encode, text_corpus.read_documents(path, on_bad_row))
        _, message = result_or_error(functools.partial(list, documents))
        assert not message or message.startswith(str(path))


@settings(max_examples=60)
@given(
    raw=st.binary(max_size=60)
    | st.text(max_size=40).map(lambda body: json.dumps({"text": body}).encode())
    | st.sampled_from([b'{"text": "\\ud800"}', b"[" * 5000, b'{"text": ' + b"9" * 5000 + b"}"]),
    suffix=st.sampled_from(text_corpus.SUFFIXES),
    before=st.integers(0, 2),
)
def test_any_bytes_are_readable_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str, before: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / f"a{suffix}"
    path.write_bytes(b'{"text": "fine"}\n' * before + raw)
    assert_readable_or_refused(path)
    path.write_bytes(lzma.compress(path.read_bytes()))
    assert_readable_or_refused(path)


WHOLE_XZ = lzma.compress(
    b"".join(json.dumps({"text": f"document {i} of many"}).encode() + b"\n" for i in range(300))
)


@settings(max_examples=60)
@given(
    cut=st.integers(0, len(WHOLE_XZ) - 1),
    flip=st.none() | st.tuples(st.integers(0, len(WHOLE_XZ) - 1), st.integers(1, 255)),
)
def test_a_truncated_xz_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: tuple[int, int] | None
) -> None:
    path = tmp_path_factory.mktemp("xz", numbered=True) / "a.jsonl.xz"
    path.write_bytes(WHOLE_XZ[:cut])
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(UserError, match=r"a\.jsonl\.xz, after line \d+: damaged or truncated"):
            list(text_corpus.read_documents(path, on_bad_row))
    if flip:
        damaged = bytearray(WHOLE_XZ)
        damaged[flip[0]] ^= flip[1]
        path.write_bytes(damaged)
        assert_readable_or_refused(path)


# ------------------------------------------------------------------------------- tokens, chunks


def test_token_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(tmp_path / "a.jsonl")
    cache = tmp_path / "cache"

    def tokens(vocab: Any = BYTES) -> np.ndarray:
        return np.array(text_corpus.cached_tokens([path], vocab, cache).tokens)

    def was_tokenized() -> bool:
        return "tokenizing" in capsys.readouterr().out

    first = tokens()
    assert was_tokenized()
    np.testing.assert_array_equal(tokens(), first)
    assert not was_tokenized()
    np.testing.assert_array_equal(first, text_corpus.tokenize(DOCUMENTS, BYTES).tokens)
    tokens(ByteVocabulary(1))
    assert was_tokenized(), "two vocabularies share an entry"
    write_text(path, DOCUMENTS[:2])
    assert len(tokens()) < len(first)
    assert was_tokenized(), "two texts share an entry"
    for entry in cache.iterdir():
        with open(entry / "tokens.bin", "r+b") as file:
            file.truncate(10)
    tokens()
    assert "damaged" in capsys.readouterr().out
    assert not [p for p in cache.iterdir() if p.name.count(".")], "a partial entry remains"
    not_a_folder = tmp_path / "file"
    not_a_folder.write_text("")
    store = text_corpus.cached_tokens([path], BYTES, not_a_folder)
    np.testing.assert_array_equal(store.tokens, text_corpus.tokenize(DOCUMENTS[:2], BYTES).tokens)
    assert "not cached" in capsys.readouterr().out


def test_chunks_cover_every_document_once_an_epoch() -> None:
    store = text_corpus.tokenize(DOCUMENTS, BYTES)
    chunks = StoredChunks(store, 64, seed=5)
    assert len(chunks) == 10 + 2 + 1  # 600, 126 and 30 tokens; "short" is too short
    epochs = [chunks.chunks(e * len(chunks), len(chunks)) for e in range(2)]
    decoded = [[BYTES.decode(chunk) for chunk in epoch] for epoch in epochs]
    assert decoded[0] != decoded[1]
    assert sorted(decoded[0]) == sorted(decoded[1])
    for document in DOCUMENTS[1:]:
        covered = np.zeros(len(document), bool)
        for chunk in decoded[0]:
            for start in range(len(document)):
                if document.startswith(chunk, start):
                    covered[start : start + len(chunk)] = True
        assert covered.all()
    with pytest.raises(UserError, match="no document has 16 tokens"):
        StoredChunks(text_corpus.tokenize(["short"], BYTES), 64, 0)


# ------------------------------------------------------------------------------- CACLM's split


def caclm_segments(n: int, rng: np.random.Generator, rule: SegmentRule) -> tuple[np.ndarray, ...]:
    """Return A, B, C, D of the chunk 2, 3, ..., n + 1."""
    split = text_corpus.caclm_split(np.arange(n) + 2, rng, rule)
    (a, d), (b,), (c,) = map(parts_at_eos, split)
    return a, b, c, d


def test_caclm_segments_are_contiguous_and_within_their_lengths() -> None:
    config = make_config(input_length=20, target_length=15, hyper_length=40, chunk_length=64)
    rule = SegmentRule.of(config.data)
    rng = np.random.default_rng(0)
    lengths = []
    for n in [*range(text_corpus.MIN_CHUNK, 65)] * 20:
        segments = caclm_segments(n, rng, rule)
        np.testing.assert_array_equal(np.concatenate(segments), np.arange(n) + 2)
        a, b, c, d = map(len, segments)
        assert min(a, b, c, d) > 0
        assert a + d + 2 <= 40
        assert b + 1 <= 20
        assert c + 1 <= 15
        lengths.append((a, b, c, d))
    assert all(len(set(column)) > 8 for column in zip(*lengths, strict=True)), "cuts not random"


def test_every_accepted_segment_rule_fits_every_chunk() -> None:
    """At the limit too, where one token less does not fit."""
    rng = np.random.default_rng(0)
    accepted = 0
    for hyper, shares in itertools.product(range(18, 60), ((0.1, 0.7), (0.25, 0.25))):
        lengths = {"hyper_length": hyper, "input_length": 64, "target_length": 64}
        try:
            rule = SegmentRule.of(make_config(segment_shares=shares, **lengths).data)
        except UserError:
            continue
        accepted += 1
        for n in range(text_corpus.MIN_CHUNK, 65):
            a, _, _, d = caclm_segments(n, rng, rule)
            assert len(a) + len(d) <= hyper - 2
    assert 10 < accepted < 80


@pytest.mark.parametrize(
    "fields",
    [
        {"hyper_length": 20},
        {"chunk_length": 400},
        {"segment_shares": (0.6, 0.6)},
        {"segment_shares": (0.0, 0.2)},
        {"target_length": 1},
    ],
)
def test_a_segment_rule_that_does_not_fit_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.(chunk_length|segment_shares)"):
        SegmentRule.of(make_config(**fields).data)


# ------------------------------------------------------------------------------- HINT's splits


def part_lengths(
    n: int, rng: np.random.Generator, split: str, most: tuple[int, int, int]
) -> list[int]:
    """Split the chunk 2, 3, ..., n + 1, check its parts, and return their lengths."""
    chunk, readers = np.arange(n) + 2, READERS[split]
    by_reader = [parts_at_eos(ids) for ids in text_corpus.split_parts(chunk, rng, readers, most)]
    for parts, limit in zip(by_reader, most, strict=True):
        assert sum(map(len, parts)) <= limit
    parts = [by_reader[reader].pop(0) for reader in readers]
    assert by_reader == [[], [], []]
    assert all(map(len, parts))
    np.testing.assert_array_equal(np.concatenate(parts), chunk)
    return [len(part) for part in parts]


def part_cuts(*args: Any) -> np.ndarray:
    return np.cumsum(np.array(part_lengths(*args)))[:-1]


@pytest.mark.parametrize(("split", "n"), [("three_way", 12), ("six_way", 9)])
def test_unconstrained_cuts_are_uniform(split: str, n: int) -> None:
    rng, draws = np.random.default_rng(0), 3000
    number = len(READERS[split])
    possible = list(itertools.combinations(range(1, n), number - 1))
    counts = Counter(tuple(part_cuts(n, rng, split, (n, n, n)).tolist()) for _ in range(draws))
    expected = draws / len(possible)
    chi_square = sum((counts[cuts] - expected) ** 2 / expected for cuts in possible)
    freedom = len(possible) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    least: Any = [READERS[split].count(reader) for reader in range(3)]
    assert part_lengths(number, rng, split, least) == [1] * number


@pytest.mark.parametrize(("split", "lengths"), [("three_way", (12, 17)), ("six_way", (8, 12))])
def test_constrained_cuts_move_as_little_as_possible(split: str, lengths: tuple[int, ...]) -> None:
    readers = np.array(READERS[split])
    moved = 0
    for n in lengths:
        possible = np.array(list(itertools.combinations(range(1, n), len(readers) - 1)))
        parts = np.diff(possible, axis=1, prepend=0, append=n)
        by_reader = np.stack([parts[:, readers == reader].sum(1) for reader in range(3)], 1)
        for most in itertools.product((1, 3, 4, 7), (2, 4, n), (1, 3, n)):
            fit = possible[(by_reader <= most).all(1)]
            for seed in range(3) if len(fit) else ():
                free = part_cuts(n, np.random.default_rng(seed), split, (n, n, n))
                cuts = part_cuts(n, np.random.default_rng(seed), split, most)
                moved += bool((free != cuts).any())
                assert abs(free - cuts).sum() == abs(fit - free).sum(1).min()
    assert moved > 40


@pytest.mark.parametrize(
    ("split", "hyper", "message"),
    [
        ("three_way", 40, r"3 parts .* A 39 \(data.hyper_length\), B 15 .* C 10 "),
        ("six_way", 43, r"6 parts .* A C F 40 \(data.hyper_length\), B D 14 .*, E 10 "),
    ],
)
def test_chunks_that_do_not_fit_are_refused(split: str, hyper: int, message: str) -> None:
    fields: dict[str, Any] = {"text_split": split, "hyper_length": hyper, "chunk_length": 64}
    fields |= {"input_length": 16, "target_length": 11}
    text_corpus.make_splitter(make_config(**fields).data)
    for worse, problem in [
        ({"chunk_length": 65}, message),
        ({"target_length": 10}, r"data\.chunk_length=64 does not fit"),
        (
            {"input_length": READERS[split].count(1) * 2 - 1, "hyper_length": 100},
            r"data\.chunk_length=64 does not fit",
        ),
        ({"chunk_length": 15}, r"data\.chunk_length=15 .* and a chunk 16"),
    ]:
        with pytest.raises(UserError, match=problem):
            text_corpus.make_splitter(make_config(**{**fields, **worse}).data)


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("split", "readers"), [("caclm", (0, 1, 2, 0)), *READERS.items()], ids=str)
def test_batches_are_pure_and_consist_of_the_documents(
    split: str, readers: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_text(tmp_path / "a.jsonl.xz")
    fields: dict[str, Any] = {"text_split": split, "cache_dir": str(tmp_path / "cache")}
    config = text_config(path, **fields)
    separate, same, concat, fusion = (
        pipeline.make_sampler(config, BYTES, layout)
        for layout in (SEPARATE, SEPARATE, CONCAT, FUSION)
    )
    assert separate.names == concat.names == ()
    batches = [separate.batch(step) for step in range(10)]
    config.seed = 4
    other = pipeline.make_sampler(config, BYTES).batch(0)
    assert np.any(other["inputs"] != batches[0]["inputs"])
    assert {key: value.shape for key, value in batches[0].items()} == {
        "tasks": (3,),
        "hyper_inputs": (3, 60),
        "inputs": (3, 1, 20),
        "targets": (3, 1, 20),
    }
    assert {value.dtype for value in batches[0].values()} == {np.dtype(np.int32)}
    for step in reversed(range(10)):
        batch, joined, ended = batches[step], concat.batch(step), fusion.batch(step)
        repeated = same.batch(step)
        for key, value in batch.items():
            np.testing.assert_array_equal(value, repeated[key])
            np.testing.assert_array_equal(value, ended[key])
        assert batch["tasks"].tolist() == [0, 0, 0]
        np.testing.assert_array_equal(joined["targets"], batch["targets"])
        assert joined["hyper_inputs"].tolist() == [[EOS_ID]] * 3
        assert joined["inputs"].shape == (3, 1, 80)
        for slot in range(3):
            by_reader = [texts_at_eos(batch[key][slot].reshape(-1)) for key in IDS]
            assert texts_at_eos(joined["inputs"][slot, 0]) == by_reader[0] + by_reader[1]
            parts = [by_reader[reader].pop(0) for reader in readers]
            assert by_reader == [[], [], []]
            assert min(map(len, parts)) > 0
            assert any("".join(parts) in document for document in DOCUMENTS[1:])


class LoggedChunks:
    """A source of chunks that logs the requested draws."""

    def __init__(self, chunks: text_corpus.ChunkSource) -> None:
        self.inner = chunks
        self.draws: list[int] = []

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        self.draws += range(first, first + count)
        return self.inner.chunks(first, count)


@pytest.mark.parametrize("split", ["caclm", "six_way"])
def test_processes_make_their_slots_of_one_batch(split: str) -> None:
    config = text_config("", tasks_per_batch=8, text_split=split).data
    store = text_corpus.tokenize(DOCUMENTS * 3, BYTES)

    def logged_sampler() -> tuple[TextSampler, LoggedChunks]:
        chunks = LoggedChunks(StoredChunks(store, 64, seed=1))
        return TextSampler(chunks, config, 5), chunks

    whole, _ = logged_sampler()
    batches = [whole.batch(step) for step in range(6)]
    for count, steps in ((1, range(6)), (2, (4, 5)), (4, (3, 1)), (8, (5,))):
        samplers = [logged_sampler() for _ in range(count)]
        for step in steps:
            parts = [s.batch(step, process, count) for process, (s, _) in enumerate(samplers)]
            for key, value in batches[step].items():
                np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), value)
        draws = [draw for _, chunks in samplers for draw in chunks.draws]
        assert sorted(draws) == sorted(8 * step + slot for step in steps for slot in range(8))
        assert [s.stats["chunks"] for s, _ in samplers] == [8 // count * len(steps)] * count
    with pytest.raises(UserError, match=r"data\.tasks_per_batch=8 .* for 3 processes"):
        whole.batch(0, 0, 3)


@pytest.mark.parametrize("suffix", [".json.gz", ".jsonl.gz"])
def test_gzipped_lines_as_on_the_hub(suffix: str, tmp_path: Path) -> None:
    content = b'{"text": "a b", "url": "u"}\n{"text": "c"}\n'
    file = tmp_path / f"c4-train.00000-of-01024{suffix}"
    file.write_bytes(gzip.compress(content))
    assert text_corpus.text_files(str(tmp_path)) == [file]
    assert list(text_corpus.read_documents(file)) == ["a b", "c"]
    file.write_bytes(gzip.compress(content)[:-9])
    with pytest.raises(UserError, match=r"\.gz, after line \d: damaged or truncated \.gz"):
        list(text_corpus.read_documents(file, "skip"))
    file.write_bytes(content)
    with pytest.raises(UserError, match="damaged or truncated"):
        list(text_corpus.read_documents(file))


def test_text_in_a_bucket_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.text=gs://b/c4: text is not read from a bucket"):
        text_corpus.text_files("gs://b/c4")
