"""Vocabularies: SeqIO's ids, saved and loaded again, and their errors."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hyper_t5.data.vocab import ByteVocabulary, SentencePieceVocabulary, Vocabulary, load_vocab
from hyper_t5.utils.errors import UserError

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
    """Return a model of 26 pieces that SeqIO ships."""
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


def test_byte_ids_equal_seqio() -> None:
    import seqio

    assert_same_as_seqio(ByteVocabulary(), seqio.ByteVocabulary())
    assert_same_as_seqio(ByteVocabulary(100), seqio.ByteVocabulary(100))
    assert ByteVocabulary().encode("\x00A") == [3, 68]


@pytest.mark.parametrize("extra_ids", [0, 100])
def test_sentencepiece_ids_equal_seqio(small_model: Path, extra_ids: int) -> None:
    import seqio

    assert_same_as_seqio(
        SentencePieceVocabulary(small_model, extra_ids),
        seqio.SentencePieceVocabulary(str(small_model), extra_ids),
    )


def test_the_model_of_t5(shared_dir: Path) -> None:
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
        loaded = load_vocab(vocab.save(tmp_path), tmp_path)
        assert loaded.identity() == vocab.identity()
        assert loaded.size == vocab.size
        assert loaded.encode("one two") == vocab.encode("one two")


def test_invalid_vocabularies_are_refused(small_model: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", '{"%(token)s": %(id)d}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"%(id)d": {"content": "%(token)s"}}}'),
        ("tokenizer.json", '{"added_tokens": [{"content": "%(token)s", "id": %(id)d}]}'),
    ],
)
def test_tokens_that_hugging_face_adds(
    small_model: Path, tmp_path: Path, file: str, content: str
) -> None:
    """Tokens of the model are accepted at their ids; others would change the ids of texts."""
    size = load_vocab(str(small_model)).save(tmp_path)["extra_ids"] + 26
    model = str(tmp_path / small_model.name)
    for token, number, is_accepted in (
        ("<extra_id_0>", size - 1, True),
        ("</s>", 1, True),
        ("<extra_id_0>", size - 2, False),
        ("[NEW]", size, False),
    ):
        (tmp_path / file).write_text(content % {"token": token, "id": number})
        if is_accepted:
            assert load_vocab(model).size == size
        else:
            message = rf"{file}: adds the token '{re.escape(token)}' with id {number}"
            with pytest.raises(UserError, match=message):
                load_vocab(model)
    (tmp_path / file).write_text('{"added_tokens": 3, "added_tokens_decoder": [1]}')
    with pytest.raises(UserError, match=rf"{file}: its added tokens are damaged"):
        load_vocab(model)


def test_importing_data_loads_no_tensorflow() -> None:
    code = (
        "import sys, hyper_t5.data.vocab, hyper_t5.data.task_rows, hyper_t5.data.episodes;"
        "import hyper_t5.pipeline;"
        "sys.exit('tensorflow' in sys.modules or 'seqio' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
