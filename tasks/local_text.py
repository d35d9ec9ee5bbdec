"""Chunks of local text and of the embedded suite's documents; needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from hyper_t5.data.task_rows import OnBadRow
from hyper_t5.data.text_corpus import (
    StoredChunks,
    cached_tokens,
    read_documents,
    text_files,
    tokenize,
)
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks import synthetic

TFDS_PREFIX = "tfds:"  # of a ``data.text`` that `tasks.text` reads


def open_chunks(data_config: Any, vocab: Vocabulary, seed: int) -> StoredChunks:
    """Open the chunks of a ``data.text`` that names files or 'synthetic'.

    Raises:
      UserError: it does not exist, or bad rows; names file, line, field.
    """
    c = data_config
    if c.text == "synthetic":
        store = tokenize(synthetic.documents(), vocab)
    else:
        store = cached_tokens(text_files(c.text), vocab, c.get("cache_dir", ""), c.on_bad_row)
    return StoredChunks(store, c.chunk_length, seed, f"data.text={c.text!r}")


def documents(spec: str, on_bad_row: OnBadRow) -> Callable[[], Iterable[str]]:
    """Return a function that iterates over the documents of such a ``data.text``."""
    if spec == "synthetic":
        return synthetic.documents
    files = text_files(spec)
    return lambda: (text for file in files for text in read_documents(file, on_bad_row))
