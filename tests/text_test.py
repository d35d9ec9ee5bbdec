"""Plain text -> chunks -> batches of their parts: files, cache, splits, SeqIO and TFDS."""

from __future__ import annotations

import itertools
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_test import BYTES, at_eos, ended_parts, make_config
from ml_collections import ConfigDict

from hyper_t5 import data, text
from hyper_t5.errors import UserError
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
        b"[]": "lacks field text",
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


def three_way_cuts(n: int, rng: np.random.Generator, most: tuple[int, int, int]) -> tuple[int, int]:
    """The two cuts of a chunk 2, 3, ..., n + 1, after a look at the parts."""
    chunk = np.arange(n) + 2
    split = [at_eos(part) for part in text.three_way_split(chunk, rng, most)]
    assert [len(part) for part in split] == [1, 1, 1]
    hyper, read, target = (part[0] for part in split)
    np.testing.assert_array_equal(np.concatenate([hyper, read, target]), chunk)
    assert all(0 < len(p) <= m for p, m in zip((hyper, read, target), most, strict=True))
    return len(hyper), len(hyper) + len(read)


def test_three_way_cuts_are_uniform_where_lengths_leave_them() -> None:
    rng, n, draws = np.random.default_rng(0), 12, 5500
    pairs = list(itertools.combinations(range(1, n), 2))
    counts = dict.fromkeys(pairs, 0)
    for _ in range(draws):
        counts[three_way_cuts(n, rng, (n, n, n))] += 1
    expected = draws / len(pairs)
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    freedom = len(pairs) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5
    assert three_way_cuts(3, rng, (1, 1, 1)) == (1, 2)


def test_three_way_cuts_move_no_further_than_they_must() -> None:
    sizes = (1, 3, 7, 16, 24)
    for n in (text.MIN_CHUNK, 19, 24):
        pairs = list(itertools.combinations(range(1, n), 2))
        for most in [(h, i, t) for h in sizes for i in sizes for t in sizes]:
            if sum(most) < n:
                continue
            fit = [
                (s, t) for s, t in pairs if s <= most[0] and t - s <= most[1] and n - t <= most[2]
            ]
            for seed in range(3):
                free = three_way_cuts(n, np.random.default_rng(seed), (n, n, n))
                cuts = three_way_cuts(n, np.random.default_rng(seed), most)
                moved = [abs(free[0] - s) + abs(free[1] - t) for s, t in fit]
                assert abs(free[0] - cuts[0]) + abs(free[1] - cuts[1]) == min(moved)


def test_three_way_chunks_must_fit() -> None:
    fields: dict[str, Any] = {"text_split": "three_way", "chunk_length": 64}
    lengths = {"hyper_length": 40, "input_length": 16, "target_length": 11}
    text.splitter_of(make_config(**fields, **lengths).data)
    for worse in (
        {"target_length": 10},
        {"chunk_length": 65},
        {"input_length": 1, "hyper_length": 100},
    ):
        with pytest.raises(UserError, match=r"data\.chunk_length=6[45] does not fit: its three"):
            text.splitter_of(make_config(**{**fields, **lengths, **worse}).data)
    with pytest.raises(UserError, match=r"data\.chunk_length=15 .* a chunk needs 16"):
        text.splitter_of(make_config(**{**fields, "chunk_length": 15}).data)
    with pytest.raises(AssertionError, match="four_way"):
        text.splitter_of(make_config(text_split="four_way").data)


def test_three_way_batches(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", DOCUMENTS)
    fields: dict[str, Any] = {"text_split": "three_way", "cache_dir": str(tmp_path / "cache")}
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
            (hyper,), (read,), (target,) = (
                ended_parts(first[step][key][slot].reshape(-1))
                for key in ("hyper_inputs", "inputs", "targets")
            )
            assert min(map(len, (hyper, read, target))) > 0
            assert any(hyper + read + target in document for document in DOCUMENTS[1:])
            assert ended_parts(whole["inputs"][slot, 0]) == [hyper, read]


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


def test_tfds_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tfds: Any = pytest.importorskip("tensorflow_datasets")
    from hyper_t5.tasks.text import TfdsChunks

    documents = [f"document number {i:03d} " * (1 + i % 7) for i in range(23)] + ["tiny"]

    class SmallText(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: Any) -> Any:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Any:
            yield from enumerate({"text": d} for d in documents)

    SmallText(data_dir=tmp_path).download_and_prepare()
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    config = text_config("tfds:small_text:1.0.0")
    made, again = data.make_sampler(config, BYTES), data.make_sampler(config, BYTES)
    first = [made.batch(step) for step in range(20)]
    for step in (17, 3):
        np.testing.assert_array_equal(again.batch(step)["inputs"], first[step]["inputs"])

    builder = tfds.builder("small_text:1.0.0", data_dir=tmp_path)
    chunks = TfdsChunks(builder, BYTES, 512, seed=1, block=6)
    epochs = [[BYTES.decode(c) for c in chunks.chunks(e * 24, 24)] for e in range(2)]
    assert epochs[0] != epochs[1]
    for epoch in epochs:  # every document once; the tiny one's neighbour stands in for it
        assert set(epoch) == set(documents[:-1])
        assert len(epoch) == 24
    config.data.text = "tfds:no_such_set:1.0.0"
    with pytest.raises(UserError, match=r"tfds:no_such_set.*TFDS_DATA_DIR"):
        data.make_sampler(config, BYTES)
