"""Vocabularies without TensorFlow: raw bytes, or a SentencePiece model.

Ids are those of SeqIO's ``ByteVocabulary`` and ``SentencePieceVocabulary(extra_ids=...)``, so
checkpoints trained elsewhere on SeqIO data read the same ids (tests/data/vocab_test.py). In both, 0
is padding, 1 is end of sequence (EOS) and 2 is unknown.
"""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import check_no_pointer, local_copy, read_json

PAD_ID = 0
EOS_ID = 1
UNK_ID = 2
SENTENCEPIECE_EXTRA_IDS = 100  # every published T5 has them


@runtime_checkable
class Vocabulary(Protocol):
    """Interface of a vocabulary."""

    pad_id: int
    eos_id: int

    @property
    def size(self) -> int:
        """Number of ids, extra ids included. A model's embedding may have more rows."""
        ...

    def encode(self, text: str) -> list[int]:
        """Encode a text, without EOS."""
        ...

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Encode many texts. SentencePiece uses threads, by default one per core."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Decode up to the first EOS; padding and ids outside the vocabulary are skipped."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what checkpoints record and `load_vocab` reads; equal means equal ids."""
        ...

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write the files that the identity names into ``folder``; return the identity."""
        ...


class ByteVocabulary:
    """UTF-8 bytes, id = byte + 3; ``extra_ids`` follow at 259."""

    pad_id = PAD_ID
    eos_id = EOS_ID
    _OFFSET = 3

    def __init__(self, extra_ids: int = 0) -> None:
        self.extra_ids = extra_ids

    @property
    def size(self) -> int:
        """Number of ids, extra ids included."""
        return self._OFFSET + 256 + self.extra_ids

    def encode(self, text: str) -> list[int]:
        """Encode a text, without EOS."""
        return [byte + self._OFFSET for byte in text.encode("utf-8")]

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Encode many texts; ``threads`` has no effect."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode up to the first EOS; invalid UTF-8 is skipped, as SeqIO does."""
        kept = _until_eos(ids)
        raw = bytes(i - self._OFFSET for i in kept if self._OFFSET <= i < self._OFFSET + 256)
        return raw.decode("utf-8", errors="ignore")

    def identity(self) -> dict[str, Any]:
        """Return ``{"kind": "bytes", "extra_ids": n}``."""
        return {"kind": "bytes", "extra_ids": self.extra_ids}

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Write nothing: bytes need no file."""
        return self.identity()


class SentencePieceVocabulary:
    """A SentencePiece model with ``extra_ids`` sentinels at its end.

    ``<extra_id_0>`` is the last id and the others count downwards, as in T5. T5's model maps any
    whitespace, newlines too, to one space.

    Raises:
      UserError: the file is missing, is no SentencePiece model, or has other pad and EOS ids; or
        tokenizer files of Hugging Face in its folder add tokens that it does not have.
    """

    pad_id = PAD_ID
    eos_id = EOS_ID

    def __init__(self, model_file: str | Path, extra_ids: int = SENTENCEPIECE_EXTRA_IDS) -> None:
        self.model_file = local_copy(model_file)
        self.extra_ids = extra_ids
        try:
            self._raw = self.model_file.read_bytes()
        except OSError as error:
            raise UserError(
                f"{self.model_file}: cannot read the SentencePiece model ({error.strerror}); "
                "data.vocab takes 'bytes' or the path of a .model file"
            ) from None
        check_no_pointer(self.model_file, self._raw)
        self.sha256 = hashlib.sha256(self._raw).hexdigest()
        self._pieces = _processor(self._raw, extra_ids, self.model_file)
        _check_added_tokens(self._pieces, self.model_file)

    @property
    def size(self) -> int:
        """Number of ids, extra ids included."""
        return int(self._pieces.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Encode a text, without EOS."""
        return self._pieces.encode(text, out_type=int)

    def encode_batch(self, texts: Sequence[str], threads: int | None = None) -> list[list[int]]:
        """Encode many texts on ``threads`` threads, by default one per core."""
        if not texts:
            return []
        return self._pieces.encode(
            list(texts), out_type=int, num_threads=threads or os.cpu_count() or 1
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Decode up to the first EOS; padding and ids outside the vocabulary are skipped."""
        kept = [i for i in _until_eos(ids) if i != PAD_ID and 0 <= i < self.size]
        return self._pieces.decode(kept)

    def identity(self) -> dict[str, Any]:
        """Return kind, file name, SHA-256 of the file and number of extra ids."""
        return {
            "kind": "sentencepiece",
            "file": self.model_file.name,
            "sha256": self.sha256,
            "extra_ids": self.extra_ids,
        }

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Copy the model file into ``folder`` under its own name."""
        (Path(folder) / self.model_file.name).write_bytes(self._raw)
        return self.identity()


def load_vocab(
    spec: str | dict[str, Any], base_dir: str | Path = ".", extra_ids: int | None = None
) -> Vocabulary:
    """Load the vocabulary of a config field or of a checkpoint's identity.

    Args:
      spec: 'bytes', the path of a SentencePiece model, or the value of ``identity()``.
      base_dir: folder with the file of an identity.
      extra_ids: for a string ``spec``; None is 0 for bytes and 100 for SentencePiece.

    Raises:
      UserError: unknown kind, missing or damaged file, or a file with another digest.
    """
    if isinstance(spec, str):
        if spec == "bytes":
            return ByteVocabulary(extra_ids or 0)
        if not spec:
            raise UserError("data.vocab is empty: set 'bytes' or the path of a .model file")
        return SentencePieceVocabulary(
            os.path.expanduser(spec), SENTENCEPIECE_EXTRA_IDS if extra_ids is None else extra_ids
        )
    try:
        kind, count = spec["kind"], int(spec["extra_ids"])
        if kind == "bytes":
            return ByteVocabulary(count)
        if kind == "sentencepiece":
            vocab = SentencePieceVocabulary(Path(base_dir) / spec["file"], count)
            wanted = spec["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"vocabulary record {spec!r} in {base_dir} is damaged: {error!r}") from None
    if kind != "sentencepiece":
        raise UserError(f"vocabulary of unknown kind {kind!r}: known are 'bytes', 'sentencepiece'")
    if vocab.sha256 != wanted:
        raise UserError(
            f"{vocab.model_file}: sha256 {vocab.sha256[:12]}… is not the recorded {wanted[:12]}…; "
            "restore the vocabulary that the model was trained with"
        )
    return vocab


def _until_eos(ids: Iterable[int]) -> list[int]:
    kept: list[int] = []
    for i in ids:
        if int(i) == EOS_ID:
            break
        kept.append(int(i))
    return kept


def _processor(raw: bytes, extra_ids: int, path: Path) -> Any:
    """Return a SentencePiece processor with the sentinels added at its end."""
    import sentencepiece

    # Generated code without type stubs.
    schema: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    decode_error: Any = importlib.import_module("google.protobuf.message").DecodeError
    try:
        model = schema.ModelProto.FromString(raw)
        # As SeqIO names them. The leading mark means that a sentinel starts a word.
        for number in range(extra_ids - 1, -1, -1):
            model.pieces.add(
                piece=f"\u2581<extra_id_{number}>",
                score=0.0,
                type=schema.ModelProto.SentencePiece.USER_DEFINED,
            )
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (decode_error, RuntimeError):
        raise UserError(f"{path}: not a SentencePiece model, or damaged") from None
    if (processor.pad_id(), processor.eos_id()) != (PAD_ID, EOS_ID):
        raise UserError(
            f"{path}: pad and EOS are {processor.pad_id()} and {processor.eos_id()}; T5 needs a "
            "model trained with --pad_id=0 --eos_id=1 --unk_id=2"
        )
    return processor


def _check_added_tokens(processor: Any, path: Path) -> None:
    """Raise UserError where Hugging Face's tokenizer in this folder adds a token to the model."""
    for file, read in _ADDED_TOKENS.items():
        content = read_json(path.with_name(file)) if path.with_name(file).exists() else {}
        try:
            tokens = [(str(token), int(number)) for token, number in read(content)]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path.with_name(file)}: its added tokens are damaged") from error
        for token, number in tokens:
            is_id = 0 <= number < processor.get_piece_size()
            piece = processor.id_to_piece(number) if is_id else ""
            if token not in (piece, piece.removeprefix("\u2581")):
                raise UserError(
                    f"{path.with_name(file)}: adds the token {token!r} with id {number}, which"
                    f" {path.name} does not have and which is not supported; use a tokenizer"
                    " without added tokens"
                )


# File of a Hugging Face tokenizer -> its added tokens with their ids.
_ADDED_TOKENS: dict[str, Callable[[dict[str, Any]], Iterable[tuple[Any, Any]]]] = {
    "added_tokens.json": lambda content: content.items(),
    "tokenizer_config.json": lambda content: [
        (token["content"], number)
        for number, token in content.get("added_tokens_decoder", {}).items()
    ],
    "tokenizer.json": lambda content: [
        (token["content"], token["id"]) for token in content.get("added_tokens", [])
    ],
}
