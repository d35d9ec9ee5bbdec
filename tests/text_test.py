"""Plain text -> chunks -> batches of their parts: files, cache, splits, SeqIO and TFDS."""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from data_test import BYTES, at_eos, ended_parts, make_config
from hyper_t5 import data, text
from hyper_t5.errors import UserError
from hyper_t5.hosts import slots_of
from hyper_t5.vocab import EOS_ID, ByteVocabulary


def write_text(path: Path, documents: list[str]) -> Path:
    raw = "".join(json.dumps({"title": "t", "text": d}) + "\n" for d in documents).encode()
    path.write_bytes(lzma.compress(raw) if path.suffix == ".xz" else raw)
    return path


DOCUMENTS = ["short", "the quick brown fox " * 30, "lorem ipsum dolor " * 7, "x" * 30]


def text_config(path: str | Path, **fields: Any) -> ConfigDict:
    config = make_config(text=str(path), input_length=20, target_length=20, hyper_length=60)
    config.stage = "hyperpretrain"
    config.data.update(fields)
    return config


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", DOCUMENTS[:2])
    write_text(tmp_path / "b.jsonl.xz", DOCUMENTS[2:3])
    (tmp_path / "c.txt").write_text(DOCUMENTS[3])
    (tmp_path / "notes.json").write_text("{}")
    for spec, wanted in ((tmp_path, DOCUMENTS), (tmp_path / "*.jsonl*", DOCUMENTS[:3])):
        files = text.text_files(str(spec))
        assert [d for file in files for d in text.read_documents(file)] == wanted
    for spec, message in [
        (tmp_path / "none", "no such file"),
        (tmp_path / "*.gz", "no such file"),
        (tmp_path / "notes.json", "not this kind"),
    ]:
        with pytest.raises(UserError, match=message):
            text.text_files(str(spec))


def test_bad_lines_name_file_line_and_field(tmp_path: Path) -> None:
    good = json.dumps({"text": "fine"}).encode()
    bad = {
        b'{"text": "cut': "not valid JSON",
        b'{"body": "x"}': "lacks field text",
        b'{"text": null}': "field text must be text",
        b'{"text": "\xff"}': "not UTF-8",
        b"[]": "must be a JSON object",
    }
    path = tmp_path / "a.jsonl"
    for line, message in bad.items():
        path.write_bytes(good + b"\r\n\n" + line + b"\n" + good)
        with pytest.raises(UserError, match=rf"a\.jsonl, line 3: {message}"):
            list(text.read_documents(path))
        skipped: text.Counter[str] = text.Counter()
        assert list(text.read_documents(path, "skip", skipped)) == ["fine", "fine"]
        assert skipped.total() == 1
    whole = write_text(tmp_path / "b.jsonl.xz", ["word " * 5000] * 3)
    whole.write_bytes(whole.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b\.jsonl\.xz, after line \d: damaged or truncated"):
        list(text.read_documents(whole, "skip"))
    (tmp_path / "c.txt").write_bytes(b"one\ntwo \xff")
    with pytest.raises(UserError, match=r"c\.txt, line 2: not UTF-8"):
        list(text.read_documents(tmp_path / "c.txt"))


def caclm_segments(
    n: int, rng: np.random.Generator, rule: text.SegmentRule
) -> tuple[np.ndarray, ...]:
    """A, B, C, D of a chunk 2, 3, ..., n + 1."""
    context, read, target = map(at_eos, text.caclm_split(np.arange(n) + 2, rng, rule))
    (a, d), (b,), (c,) = context, read, target
    return a, b, c, d


def test_caclm_segments_join_back() -> None:
    config = make_config(input_length=20, target_length=15, hyper_length=40, chunk_length=64)
    rule = text.SegmentRule.of(config.data)
    rng = np.random.default_rng(0)
    lengths = []
    for n in [*range(text.MIN_CHUNK, 65)] * 20:
        parts = caclm_segments(n, rng, rule)
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(n) + 2)
        a, b, c, d = map(len, parts)
        assert min(a, b, c, d) > 0
        assert a + d + 2 <= 40
        assert b + 1 <= 20
        assert c + 1 <= 15
        lengths.append((a, b, c, d))
    assert all(len(set(column)) > 8 for column in zip(*lengths, strict=True)), "cuts not random"
    # Where of() accepts, no length fails: also at the edge, where one token less would not do.
    for hyper in range(18, 60):
        for shares in ((0.1, 0.7), (0.25, 0.25)):
            config = make_config(
                hyper_length=hyper, segment_shares=shares, input_length=64, target_length=64
            )
            try:
                rule = text.SegmentRule.of(config.data)
            except UserError:
                continue
            for n in range(text.MIN_CHUNK, 65):
                parts = caclm_segments(n, rng, rule)
                assert len(parts[0]) + len(parts[3]) <= hyper - 2
    for fields in (
        {"hyper_length": 20},
        {"chunk_length": 400},
        {"segment_shares": (0.6, 0.6)},
        {"segment_shares": (0.0, 0.2)},
        {"target_length": 1},
    ):
        with pytest.raises(UserError, match=r"data\.(chunk_length|segment_shares)"):
            text.SegmentRule.of(make_config(**fields).data)


READERS = text.READERS
Lengths = tuple[int, int, int]


def part_lengths(n: int, rng: np.random.Generator, how: str, most: Lengths) -> list[int]:
    """The lengths of the parts of a chunk 2, 3, ..., n + 1, after a look at them."""
    chunk, readers = np.arange(n) + 2, READERS[how]
    found = [at_eos(ids) for ids in text.split_parts(chunk, rng, readers, most)]
    for parts, limit in zip(found, most, strict=True):
        assert sum(map(len, parts)) <= limit
    parts = [found[who].pop(0) for who in readers]
    assert found == [[], [], []]
    assert all(map(len, parts))
    np.testing.assert_array_equal(np.concatenate(parts), chunk)
    return [len(part) for part in parts]


def cuts_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum(np.array(lengths))[:-1]


@pytest.mark.parametrize(("how", "n"), [("three_way", 12), ("six_way", 9)])
def test_cuts_are_uniform_where_lengths_leave_them(how: str, n: int) -> None:
    rng, draws = np.random.default_rng(0), 3000
    number = len(READERS[how])
    places = list(itertools.combinations(range(1, n), number - 1))
    counts = dict.fromkeys(places, 0)
    for _ in range(draws):
        counts[tuple(cuts_of(part_lengths(n, rng, how, (n, n, n))).tolist())] += 1
    expected = draws / len(places)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(places) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    least: Any = [READERS[how].count(who) for who in range(3)]
    assert part_lengths(number, rng, how, least) == [1] * number


@pytest.mark.parametrize(("how", "lengths"), [("three_way", (12, 17)), ("six_way", (8, 12))])
def test_cuts_move_no_further_than_they_must(how: str, lengths: tuple[int, ...]) -> None:
    readers = np.array(READERS[how])
    tight = 0
    for n in lengths:
        every = np.array(list(itertools.combinations(range(1, n), len(readers) - 1)))
        parts = np.diff(every, axis=1, prepend=0, append=n)
        held = np.stack([parts[:, readers == who].sum(1) for who in range(3)], 1)
        for most in itertools.product((1, 3, 4, 7), (2, 4, n), (1, 3, n)):
            fit = every[(held <= most).all(1)]
            for seed in range(3) if len(fit) else ():
                free = cuts_of(part_lengths(n, np.random.default_rng(seed), how, (n, n, n)))
                cuts = cuts_of(part_lengths(n, np.random.default_rng(seed), how, most))
                tight += bool((free != cuts).any())
                assert abs(free - cuts).sum() == abs(fit - free).sum(1).min()
    assert tight > 40


def test_chunks_of_parts_must_fit() -> None:
    fields: dict[str, Any] = {"chunk_length": 64, "input_length": 16, "target_length": 11}
    for how, hyper, message in (
        ("three_way", 40, r"3 parts .*: A 39 \(data.hyper_length\), B 15 .* C 10 "),
        ("six_way", 43, r"6 parts .*: A C F 40 \(data.hyper_length\), B D 14 .*, E 10 "),
    ):
        fields |= {"text_split": how, "hyper_length": hyper}
        text.splitter_of(make_config(**fields).data)
        with pytest.raises(UserError, match=message):
            text.splitter_of(make_config(**{**fields, "chunk_length": 65}).data)
        for worse in (
            {"target_length": 10},
            {"input_length": READERS[how].count(1) * 2 - 1, "hyper_length": 100},
        ):
            with pytest.raises(UserError, match=r"data\.chunk_length=64 does not fit"):
                text.splitter_of(make_config(**{**fields, **worse}).data)
        with pytest.raises(UserError, match=r"data\.chunk_length=15 .* and a chunk 16"):
            text.splitter_of(make_config(**{**fields, "chunk_length": 15}).data)
    with pytest.raises(AssertionError, match="four_way"):
        text.splitter_of(make_config(text_split="four_way").data)


@pytest.mark.parametrize("how", READERS)
def test_batches_of_parts(how: str, tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", DOCUMENTS)
    fields: dict[str, Any] = {"text_split": how, "cache_dir": str(tmp_path / "cache")}
    config = text_config(path, **fields)
    made, again, joined, parts = (
        data.make_sampler(config, BYTES, layout) for layout in ("apart", "apart", "concat", "parts")
    )
    other = text_config(path, **fields)
    other.seed = 4
    first = [made.batch(step) for step in range(8)]
    assert np.any(data.make_sampler(other, BYTES).batch(0)["inputs"] != first[0]["inputs"])
    assert {key: value.shape for key, value in first[0].items()} == {
        "tasks": (3,),
        "hyper_inputs": (3, 60),
        "inputs": (3, 1, 20),
        "targets": (3, 1, 20),
    }
    for step in reversed(range(8)):
        repeated, whole, ended = again.batch(step), joined.batch(step), parts.batch(step)
        for key, value in first[step].items():
            np.testing.assert_array_equal(value, repeated[key])
            np.testing.assert_array_equal(value, ended[key])
        np.testing.assert_array_equal(whole["targets"], first[step]["targets"])
        assert whole["hyper_inputs"].tolist() == [[EOS_ID]] * 3
        for slot in range(3):
            found = [
                ended_parts(first[step][key][slot].reshape(-1))
                for key in ("hyper_inputs", "inputs", "targets")
            ]
            assert ended_parts(whole["inputs"][slot, 0]) == found[0] + found[1]
            passage = [found[who].pop(0) for who in READERS[how]]
            assert found == [[], [], []]
            assert min(map(len, passage)) > 0
            assert any("".join(passage) in document for document in DOCUMENTS[1:])


def test_text_batches_are_pure_and_are_of_the_documents(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl.xz", DOCUMENTS)
    config = text_config(path, cache_dir=str(tmp_path / "cache"))
    made, again = data.make_sampler(config, BYTES), data.make_sampler(config, BYTES)
    joined, parts = (data.make_sampler(config, BYTES, name) for name in ("concat", "parts"))
    assert made.names == joined.names == ()
    assert made.batch(0)["tasks"].tolist() == [0, 0, 0]
    assert made.batch(0)["tasks"].dtype == np.int32
    first = [made.batch(step) for step in range(12)]
    for step in reversed(range(12)):
        repeated, whole = again.batch(step), joined.batch(step)
        for key, value in first[step].items():
            np.testing.assert_array_equal(value, repeated[key])
            np.testing.assert_array_equal(value, parts.batch(step)[key])
        np.testing.assert_array_equal(whole["targets"], first[step]["targets"])
        for slot in range(3):
            hyper, read, target = (
                first[step][key][slot].reshape(-1) for key in ("hyper_inputs", "inputs", "targets")
            )
            a, d = "".join(map(chr, hyper[hyper > 0] + (hyper[hyper > 0] == 1) * 9)).split("\n")[:2]
            a, d = ("".join(chr(ord(ch) - 3) for ch in part) for part in (a, d))
            passage = a + BYTES.decode(read) + BYTES.decode(target) + d
            assert any(passage in document for document in DOCUMENTS[1:])
            line = whole["inputs"][slot, 0]
            np.testing.assert_array_equal(
                line[line != 0], np.concatenate([hyper[hyper != 0], read[read != 0]])
            )
            assert whole["inputs"].shape == (3, 1, 80)
            assert whole["hyper_inputs"].tolist() == [[EOS_ID]] * 3


def test_an_unknown_layout_is_a_mistake_of_ours(tmp_path: Path) -> None:
    config = text_config(write_text(tmp_path / "a.jsonl", DOCUMENTS), cache_dir=str(tmp_path))
    for layout in data.LAYOUTS:
        data.make_sampler(config, BYTES, layout)
    with pytest.raises(AssertionError, match="aside"):
        data.make_sampler(config, BYTES, "aside")


def test_chunks_cover_every_document_once_an_epoch() -> None:
    store = text.tokenise(DOCUMENTS, BYTES)
    chunks = text.StoredChunks(store, 64, seed=5)
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
        text.StoredChunks(text.tokenise(["short"], BYTES), 64, 0)


def test_token_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_text(tmp_path / "a.jsonl", DOCUMENTS)
    cache = tmp_path / "cache"

    def tokens(vocab: Any = BYTES) -> np.ndarray:
        return np.array(text.cached_tokens([path], vocab, cache).tokens)

    def made_anew() -> bool:
        return "tokenising" in capsys.readouterr().out

    first = tokens()
    assert made_anew()
    np.testing.assert_array_equal(tokens(), first)
    assert not made_anew()
    np.testing.assert_array_equal(first, text.tokenise(DOCUMENTS, BYTES).tokens)
    tokens(ByteVocabulary(1))
    assert made_anew(), "another vocabulary read the same entry"
    write_text(path, DOCUMENTS[:2])
    assert len(tokens()) < len(first)
    assert made_anew(), "other text read the same entry"
    for entry in cache.iterdir():
        with open(entry / "tokens.bin", "r+b") as file:
            file.truncate(10)
    tokens()
    assert "damaged" in capsys.readouterr().out
    assert not [p for p in cache.iterdir() if p.name.count(".")], "a half entry was left"
    cache_as_file = tmp_path / "file"
    cache_as_file.write_text("")
    store = text.cached_tokens([path], BYTES, cache_as_file)
    np.testing.assert_array_equal(store.tokens, text.tokenise(DOCUMENTS[:2], BYTES).tokens)
    assert "not kept" in capsys.readouterr().out


def test_text_is_a_seqio_task(tmp_path: Path) -> None:
    import seqio

    from hyper_t5.tasks.text import register

    path = write_text(tmp_path / "a.jsonl", DOCUMENTS)
    name = register(str(path), BYTES)
    assert name.startswith("text_a_")
    rows = seqio.get_mixture_or_task(name).get_dataset(
        {"targets": 50}, split="train", shuffle=False
    )
    found = [row["targets"].tolist() for row in rows.as_numpy_iterator()]
    assert found == [[*BYTES.encode(d)[:49], EOS_ID] for d in DOCUMENTS]
    config = text_config("")
    with pytest.raises(UserError, match=r"data\.text is empty"):
        data.make_sampler(config, BYTES)


class Draws:
    """A source of chunks that notes which it was asked for."""

    def __init__(self, chunks: text.ChunkSource) -> None:
        self.inner = chunks
        self.asked: list[int] = []

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        self.asked += range(first, first + count)
        return self.inner.chunks(first, count)


@pytest.mark.parametrize("split", ["caclm", "six_way"])
def test_hosts_make_their_slots_of_one_batch(split: str) -> None:
    config = text_config("", tasks_per_batch=8, text_split=split).data
    store = text.tokenise(DOCUMENTS * 3, BYTES)

    def made() -> tuple[text.TextSampler, Draws]:
        draws = Draws(text.StoredChunks(store, 64, seed=1))
        return text.TextSampler(draws, config, 5), draws

    whole = made()[0]
    batches = [whole.batch(step) for step in range(6)]
    for hosts, steps in ((1, range(6)), (2, (4, 5)), (4, (3, 1)), (8, (5,))):
        samplers = [made() for _ in range(hosts)]
        for step in steps:
            parts = [one.batch(step, h, hosts) for h, (one, _) in enumerate(samplers)]
            for key, value in batches[step].items():
                np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), value)
        asked = [index for _, draws in samplers for index in draws.asked]
        assert sorted(asked) == sorted(8 * step + slot for step in steps for slot in range(8))
        assert [one.stats["chunks"] for one, _ in samplers] == [8 // hosts * len(steps)] * hosts
    with pytest.raises(UserError, match=r"data\.tasks_per_batch=8 .* for 3 hosts"):
        whole.batch(0, 0, 3)


# ------------------------------------------------------------------------------- bad text


def complaint(path: Path, on_bad_row: Any) -> str:
    """Reads a file; '' where that works, else what the user is told."""
    try:
        for document in text.read_documents(path, on_bad_row):
            BYTES.encode(document)
    except UserError as error:
        return str(error)
    return ""


def check_readable(path: Path) -> None:
    """A file reads, or is refused in one line that names it; with 'skip' too."""
    for on_bad_row in ("raise", "skip"):
        said = complaint(path, on_bad_row)
        assert not said or (said.startswith(str(path)) and "\n" not in said)


@settings(max_examples=60)
@given(
    raw=st.binary(max_size=60)
    | st.text(max_size=40).map(lambda body: json.dumps({"text": body}).encode())
    | st.sampled_from([b'{"text": "\\ud800"}', b"[" * 5000, b'{"text": ' + b"9" * 5000 + b"}"]),
    suffix=st.sampled_from(text.SUFFIXES),
    before=st.integers(0, 2),
)
def test_no_bytes_make_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, suffix: str, before: int
) -> None:
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / f"a{suffix}"
    path.write_bytes(b'{"text": "fine"}\n' * before + raw)
    check_readable(path)
    path.write_bytes(lzma.compress(path.read_bytes()))
    check_readable(path)


WHOLE_XZ = lzma.compress(
    b"".join(json.dumps({"text": f"document {i} of many"}).encode() + b"\n" for i in range(300))
)


@settings(max_examples=60)
@given(
    cut=st.integers(0, len(WHOLE_XZ) - 1),
    flip=st.none() | st.tuples(st.integers(0, len(WHOLE_XZ) - 1), st.integers(1, 255)),
)
def test_a_cut_xz_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: tuple[int, int] | None
) -> None:
    path = tmp_path_factory.mktemp("xz", numbered=True) / "a.jsonl.xz"
    path.write_bytes(WHOLE_XZ[:cut])
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(UserError, match=r"a\.jsonl\.xz, after line \d+: damaged or truncated"):
            list(text.read_documents(path, on_bad_row))
    if flip:
        damaged = bytearray(WHOLE_XZ)
        damaged[flip[0]] ^= flip[1]
        path.write_bytes(damaged)
        check_readable(path)


# ----------------------------------------------------------------------------------- TFDS


def build_tfds(folder: Path, documents: list[str], shards: int, field: str = "text") -> Any:
    """A prepared TFDS set `small_text:1.0.0` of documents in their order."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():

        class SmallText(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self) -> Any:
                features = tfds.features.FeaturesDict({field: tfds.features.Text()})
                return tfds.core.DatasetInfo(
                    builder=self, features=features, disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> Any:
                return {"train": self._generate_examples()}

            def _generate_examples(self) -> Any:
                yield from enumerate({field: d} for d in documents)

    builder = SmallText(data_dir=folder)
    download_config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(download_config=download_config)
    return builder


def note_reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """(begin, end, documents that came) of every call of the reader from now on."""
    from hyper_t5.tasks import text as module

    reads: list[list[int]] = []
    read = module.read_blocks

    def noted(builder: Any, begin: int, end: int, block: int) -> Iterator[np.ndarray]:
        entry = [begin, end, 0]
        reads.append(entry)
        for texts in read(builder, begin, end, block):
            entry[2] += len(texts)
            yield texts

    monkeypatch.setattr(module, "read_blocks", noted)
    return reads


TFDS_DOCUMENTS = [f"document number {i:03d} " * (1 + i % 7) for i in range(47)] + ["tiny"]


def test_tfds_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder = build_tfds(tmp_path, TFDS_DOCUMENTS, shards=4)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = text_config("tfds:small_text:1.0.0")
    made, again = data.make_sampler(config, BYTES), data.make_sampler(config, BYTES)
    first = [made.batch(step) for step in range(6)]
    for step in (5, 3):
        np.testing.assert_array_equal(again.batch(step)["inputs"], first[step]["inputs"])
    config.data.text = "tfds:no_such_set:1.0.0"
    with pytest.raises(UserError, match=r"tfds:no_such_set.*TFDS_DATA_DIR"):
        data.make_sampler(config, BYTES)
    for spec in ("tfds:small_text", "tfds:small_text/1.0.0"):
        config.data.text = spec
        with pytest.raises(UserError, match=rf"data\.text='{spec}'.*named with a version"):
            data.make_sampler(config, BYTES)
    # A file is damaged after the set was prepared.
    file = sorted(builder.data_path.glob("*tfrecord*"))[2]
    raw = file.read_bytes()
    for damage, message in (
        (raw[: len(raw) // 2], "cannot be read"),
        (b"", "was expected to contain 12"),
    ):
        file.write_bytes(damage)
        config.data.text = "tfds:small_text:1.0.0"
        broken = data.train_batches(data.make_sampler(config, BYTES))
        with pytest.raises(UserError, match=rf"small_text/1\.0\.0 .*{message}"):
            list(itertools.islice(broken, 8))


@pytest.mark.parametrize("held", [10**6, 0])
@pytest.mark.parametrize(("shards", "draws"), [(4, 4), (1, 4), (4, 1), (2, 8)])
def test_tfds_epochs_have_every_document_once(
    shards: int, draws: int, held: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyper_t5.tasks import text as module

    monkeypatch.setattr(module, "HELD", held or 5 * draws)
    reads = note_reads(monkeypatch)
    builder = build_tfds(tmp_path, TFDS_DOCUMENTS, shards)

    def made() -> Any:
        return module.TfdsChunks(builder, BYTES, 512, 1, draws, block=5)

    chunks = made()
    epochs = [[BYTES.decode(c) for c in chunks.chunks(e * 48, 48)] for e in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:  # every document once; the tiny one's neighbour stands in for it
        assert set(epoch) == set(TFDS_DOCUMENTS[:-1])
        assert len(epoch) == 48
    assert sum(count for *_, count in reads) == (48 if held else 96), "read more than once"
    for first in (60, 11):
        later = [BYTES.decode(c) for c in made().chunks(first, 20)]
        assert later == (epochs[0] + epochs[1])[first : first + 20]


def test_tfds_units() -> None:
    from hyper_t5.tasks.text import Units

    for lengths, wanted, size, starts, left_out in [
        ([12, 12, 12], 3, 12, [0, 12, 24], 0),
        ([12, 13, 12], 2, 12, [0, 12, 25], 1),
        ([12, 13], 8, 3, [0, 3, 6, 9, 12, 15, 18, 21], 1),
        ([100, 100, 1, 100], 2, 1, range(301), 0),
        ([100, 100, 3, 100], 2, 100, [0, 100, 203], 3),
        ([0, 10, 0, 20], 2, 10, [0, 10, 20], 0),
        ([2], 256, 1, [0, 1], 0),
    ]:
        units = Units(lengths, wanted)
        assert (units.size, units.starts.tolist(), units.left_out) == (size, list(starts), left_out)


@pytest.mark.parametrize(("draws", "streams"), [(8, 8), (512, 256), (300, 150), (257, 1)])
def test_tfds_streams(draws: int, streams: int, tmp_path: Path) -> None:
    from hyper_t5.tasks.text import TfdsChunks

    builder = build_tfds(tmp_path, TFDS_DOCUMENTS, 2)
    chunks = TfdsChunks(builder, BYTES, 512, 1, draws)
    assert chunks._streams == streams


def test_tfds_sets_that_cannot_be_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hyper_t5.tasks import text as module

    builder = build_tfds(tmp_path / "a", ["x"], 1, field="body")
    with pytest.raises(UserError, match=r"small_text/1\.0\.0 has no field text, but body"):
        module.TfdsChunks(builder, BYTES, 512, 1)
    builder = build_tfds(tmp_path / "b", ["short"] * 3, 1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_blocks", lambda *_: iter(()))
        with pytest.raises(UserError, match="fewer documents in a file than its dataset_info"):
            module.TfdsChunks(builder, BYTES, 512, 1).chunks(0, 1)
    with pytest.raises(UserError, match="no document of a whole block has 16 tokens"):
        module.TfdsChunks(builder, BYTES, 512, 1).chunks(0, 1)
    # Every unit is one document; those that are too short are stood in for by another unit's.
    builder = build_tfds(tmp_path / "d", ["short", "long enough " * 3, "tiny"], 1)
    found = module.TfdsChunks(builder, BYTES, 512, 1, 3).chunks(0, 3)
    assert [BYTES.decode(chunk) for chunk in found] == ["long enough " * 3] * 3
    builder = build_tfds(tmp_path / "c", TFDS_DOCUMENTS[:11], 1)
    assert capsys.readouterr().out.count("never read") == 0
    module.TfdsChunks(builder, BYTES, 512, 1, 4)
    assert "11 documents 1 are never read" in capsys.readouterr().out


C4_SHARD = 356_317  # documents of each of C4's 1024 files, about


def mocked_c4(folder: Path) -> Any:
    """C4 with TFDS's metadata as if prepared, and made-up documents that say their number."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    place = folder / "c4" / "en" / "3.1.0"
    place.mkdir(parents=True)
    lengths = [str(C4_SHARD + i % 3) for i in range(1024)]
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    split = {"name": "train", "shardLengths": lengths, "filepathTemplate": template}
    info = {"name": "c4", "version": "3.1.0", "fileFormat": "tfrecord", "splits": [split]}
    (place / "dataset_info.json").write_text(json.dumps(info))

    def as_dataset(self: Any, split: Any, **_: Any) -> Any:
        (part,) = split.to_absolute(self.info.splits)
        numbers = tf.data.Dataset.range(part.from_, part.to)
        return numbers.map(
            lambda i: {"text": tf.strings.join(["document number ", tf.strings.as_string(i)])}
        )

    return tfds.testing.mock_data(
        policy=tfds.testing.MockPolicy.USE_FILES, data_dir=str(folder), as_dataset_fn=as_dataset
    )


@pytest.mark.parametrize("streams", [8, 4])
def test_hosts_read_only_their_share_of_c4(
    streams: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hyper_t5.tasks import text as module

    monkeypatch.setattr(module, "HELD", 4 * streams)
    monkeypatch.setattr(module, "MOST_STREAMS", streams)
    reads = note_reads(monkeypatch)
    config = text_config("tfds:c4/en:3.1.0", tasks_per_batch=8, chunk_length=64)
    far = 123_456_789  # steps; a run may go on anywhere
    with mocked_c4(tmp_path):
        whole = data.make_sampler(config, BYTES)
        batches = {step: whole.batch(step) for step in (0, 1, 2, 3, 4, 5, far)}
        assert len(reads) == 2 * streams, "a stream was looked up more than once in a row"
        reads.clear()
        for hosts in (2, 4, 8)[: streams // 3 + 1]:
            units = []
            for host in range(hosts):
                one = data.make_sampler(config, BYTES)
                for step in (2, 3, 4, 5, far):
                    part = one.batch(step, host, hosts)
                    rows = slots_of(8, host, hosts)
                    for key, value in batches[step].items():
                        np.testing.assert_array_equal(part[key], value[rows.start : rows.stop])
                assert len(reads) == 2 * streams // hosts
                # Four steps in a row touch blocks of 4 documents at most so often.
                assert all(count <= (8 if streams == 8 else 12) for *_, count in reads)
                units.append({begin // C4_SHARD for begin, *_ in reads})
                reads.clear()
            assert not set.intersection(*units)
            assert sum(map(len, units)) == len(set.union(*units)), "two hosts read one file"
