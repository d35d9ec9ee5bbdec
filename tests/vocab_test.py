"""Our ids are SeqIO's; a vocabulary finds its way back from a checkpoint, or says why not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_t5.errors import UserError
from hyper_t5.vocab import (
    ByteVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    load_vocab,
)

pytestmark = pytest.mark.smoke

TEXTS = [
    "",
    "a b",
    "  spaces  and\nnew lines\t",
    "naïve café 日本 😀",
    "Fill <extra_id_0> and <extra_id_1> in.",
    "UPPER lower 0123 !?",
]


@pytest.fixture(scope="session")
def small_model() -> Path:
    """A model of 26 pieces that comes with SeqIO."""
    spec = importlib.util.find_spec("seqio")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "test_data" / "sentencepiece" / "sentencepiece.model"


def assert_same_as_seqio(ours: Vocabulary, theirs: object) -> None:
    assert ours.size == theirs.vocab_size  # type: ignore[attr-defined]
    for text, batched in zip(TEXTS, ours.encode_batch(TEXTS), strict=True):
        ids = ours.encode(text)
        assert ids == list(theirs.encode(text)) == batched  # type: ignore[attr-defined]
        assert ours.decode([*ids, 1, 5, 6]) == theirs.decode([*ids, 1, 5, 6])  # type: ignore[attr-defined]


def test_byte_ids_are_seqios() -> None:
    import seqio

    assert_same_as_seqio(ByteVocabulary(), seqio.ByteVocabulary())
    assert_same_as_seqio(ByteVocabulary(100), seqio.ByteVocabulary(100))
    assert ByteVocabulary().encode("\x00A") == [3, 68]


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_sentencepiece_ids_are_seqios(small_model: Path, extra_ids: int) -> None:
    import seqio

    assert_same_as_seqio(
        SentencePieceVocabulary(small_model, extra_ids),
        seqio.SentencePieceVocabulary(str(small_model), extra_ids),
    )


def test_t5s_own_model(shared_dir: Path) -> None:
    import seqio

    model = shared_dir / "data" / "tokenizer" / "spiece.model"
    ours = load_vocab(str(model))
    assert ours.size == 32100
    assert ours.encode("<extra_id_0>") == [32099]
    assert_same_as_seqio(ours, seqio.SentencePieceVocabulary(str(model), 100))


def test_decode_skips_padding_and_unknown_ids_and_stops_at_eos(small_model: Path) -> None:
    for vocab in (ByteVocabulary(), load_vocab(str(small_model))):
        ids = vocab.encode("ab cd")
        padded = [0, *ids[:1], 0, *ids[1:], 10**6, 1, *ids]
        assert vocab.decode(padded) == vocab.decode(ids)


def test_identity_round_trip(small_model: Path, tmp_path: Path) -> None:
    for vocab in (ByteVocabulary(7), load_vocab(str(small_model), extra_ids=3)):
        again = load_vocab(vocab.save(tmp_path), tmp_path)
        assert again.identity() == vocab.identity()
        assert again.size == vocab.size
        assert again.encode("one two") == vocab.encode("one two")


def test_mistakes_are_named(small_model: Path, tmp_path: Path) -> None:
    identity = load_vocab(str(small_model)).save(tmp_path)
    with pytest.raises(UserError, match=r"nowhere\.model"):
        load_vocab(str(tmp_path / "nowhere.model"))
    with pytest.raises(UserError, match=r"data\.vocab is empty"):
        load_vocab("")
    with pytest.raises(UserError, match="unknown kind 'wordpiece'"):
        load_vocab({**identity, "kind": "wordpiece"}, tmp_path)
    with pytest.raises(UserError, match="damaged"):
        load_vocab({"kind": "sentencepiece", "extra_ids": 1}, tmp_path)
    model = tmp_path / small_model.name
    with pytest.raises(UserError, match=rf"{model.name}: sha256"):
        load_vocab({**identity, "sha256": "0" * 64}, tmp_path)
    model.write_bytes(small_model.read_bytes()[:100])
    with pytest.raises(UserError, match="not a SentencePiece model, or damaged"):
        load_vocab(str(model))


def test_needs_no_tensorflow() -> None:
    code = (
        "import sys, hyper_t5.vocab, hyper_t5.taskfile, hyper_t5.episodes, hyper_t5.data;"
        "sys.exit('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
