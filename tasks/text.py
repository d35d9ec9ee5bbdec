"""Plain text as a SeqIO Task, and as the chunks that hyperpretraining reads.

`data.text` is a .jsonl, .jsonl.xz (field `text`) or .txt file, a folder or a glob of them; or
`tfds:NAME` for a TensorFlow Datasets text set such as `tfds:c4/en:3.1.0`; or 'synthetic' for the
embedded suite's documents. Each is a Task with the one feature `targets`: a document's tokens, EOS.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.taskfile import OnBadRow
from hyper_t5.tasks.common import register_once, seqio, seqio_name, text_features, tf, tfds
from hyper_t5.text import (
    MIN_CHUNK,
    ChunkSource,
    StoredChunks,
    cached_tokens,
    read_documents,
    text_files,
    tokenise,
)
from hyper_t5.vocab import Vocabulary

TFDS_PREFIX = "tfds:"
BLOCK = 8192  # documents read together: a TFDS shard can only be read from its start


def register(spec: str, vocab: Vocabulary, on_bad_row: OnBadRow = "raise") -> str:
    """Registers the Task of a `data.text` value; returns its name, such as `text_c4_en_3.1.0`.

    Raises:
        UserError: nothing there to read.
    """
    source: seqio.DataSource
    folder = None
    if spec.startswith(TFDS_PREFIX):
        dataset = spec.removeprefix(TFDS_PREFIX)
        name = seqio_name("text", dataset)
        folder = os.environ.get("TFDS_DATA_DIR")
        source = seqio.TfdsDataSource(dataset, folder, splits=["train", "validation"])
    else:
        documents = _local_documents(spec, on_bad_row)
        digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
        stem = spec.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        name = seqio_name("text", f"{stem}_{digest}")
        source = seqio.FunctionDataSource(
            functools.partial(_dataset, documents=documents), splits=["train"]
        )
    signature = (spec, folder, on_bad_row, vocab.identity())
    register_once(seqio.TaskRegistry, name, signature, lambda: _task(name, source, vocab))
    return name


def open_chunks(data_config: Any, vocab: Vocabulary, seed: int) -> ChunkSource:
    """The chunks of `data.text`, and its Task registered.

    The chunks do not pass through the Task's tf.data pipeline: that can be read from its start
    only, and a resumed run wants the chunks of step s at once.

    Raises:
        UserError: `data.text` is empty or names nothing, or bad rows; names file, line, field.
    """
    spec, length = data_config.text, data_config.chunk_length
    if not spec:
        raise UserError(
            "data.text is empty: stage hyperpretrain needs a .jsonl, .jsonl.xz or .txt file, a "
            "folder of them, or tfds:NAME"
        )
    name = register(spec, vocab, data_config.on_bad_row)
    if spec.startswith(TFDS_PREFIX):
        source = seqio.TaskRegistry.get(name).source
        return TfdsChunks(_builder(source, spec), vocab, length, seed)
    if spec == "synthetic":
        store = tokenise(_local_documents(spec, data_config.on_bad_row)(), vocab)
    else:
        store = cached_tokens(
            text_files(spec), vocab, data_config.get("cache_dir", ""), data_config.on_bad_row
        )
    return StoredChunks(store, length, seed, f"data.text={spec!r}")


def _local_documents(spec: str, on_bad_row: OnBadRow) -> Callable[[], Iterable[str]]:
    if spec == "synthetic":
        from hyper_t5.tasks import synthetic

        return synthetic.documents
    files = text_files(spec)
    return lambda: (text for file in files for text in read_documents(file, on_bad_row))


def _dataset(
    split: str,
    shuffle_files: bool,
    seed: int | None = None,
    *,
    documents: Callable[[], Iterable[str]],
) -> tf.data.Dataset:
    del split, shuffle_files, seed  # one split; SeqIO shuffles the examples itself

    def rows() -> Iterator[dict[str, str]]:
        for text in documents():
            yield {"text": text}

    return tf.data.Dataset.from_generator(
        rows, output_signature={"text": tf.TensorSpec([], tf.string)}
    )


def _task(name: str, source: seqio.DataSource, vocab: Vocabulary) -> seqio.Task:
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            functools.partial(seqio.preprocessors.rekey, key_map={"targets": "text"}),
            seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=text_features(vocab, ["targets"]),
        metric_fns=[],
    )


def _builder(source: seqio.TfdsDataSource, spec: str) -> tfds.core.DatasetBuilder:
    try:
        builder = source.tfds_dataset.builder
        if "train" not in builder.info.splits:
            raise FileNotFoundError("no prepared split 'train'")
        return builder
    except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"data.text={spec!r}: TensorFlow Datasets cannot read it ({first}); prepare it and set "
            "TFDS_DATA_DIR to its folder or bucket"
        ) from None


class TfdsChunks:
    """Chunks of a prepared TFDS text set that is too large to tokenise beforehand.

    Draw i is a random chunk of one document, so that a draw's place is known without reading what
    came before it: epoch and document follow from i, the order of blocks of BLOCK documents from
    the epoch, the order in a block from epoch and block. A restart reads one block and goes on. The
    documents after the last whole block are never read (under 8192 of C4's 365 million).
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        vocab: Vocabulary,
        length: int,
        seed: int,
        block: int = BLOCK,
    ) -> None:
        self._builder = builder
        self._vocab = vocab
        self._length = length
        self._seed = seed % 2**63
        documents = builder.info.splits["train"].num_examples
        self._block = min(block, documents)
        self._blocks = documents // self._block if self._block else 0
        if not self._blocks:
            raise UserError(f"data.text: {builder.info.full_name} has no training documents")
        self._held: OrderedDict[tuple[int, int], list[str]] = OrderedDict()

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Draws first, ..., first + count - 1 (see text.ChunkSource)."""
        draws = range(first, first + count)
        encoded = self._vocab.encode_batch([self._document(index) for index in draws])
        return [self._cut(ids, index) for ids, index in zip(encoded, draws, strict=True)]

    def _cut(self, ids: list[int], index: int) -> np.ndarray:
        place = index
        for _ in range(self._block):
            if len(ids) >= MIN_CHUNK:
                break
            place = self._next(place)  # too short a document: the next in its block stands in
            ids = self._vocab.encode(self._document(place))
        else:
            raise UserError(f"data.text: no document of a whole block has {MIN_CHUNK} tokens")
        rng = np.random.default_rng([self._seed, 3, index])
        start = int(rng.integers(max(0, len(ids) - self._length) + 1))
        return np.array(ids[start : start + self._length], np.int32)

    def _next(self, index: int) -> int:
        block, place = divmod(index, self._block)
        return block * self._block + (place + 1) % self._block

    def _document(self, index: int) -> str:
        turn, place = divmod(index, self._block)
        epoch, position = divmod(turn, self._blocks)
        key = (epoch, position)
        if key not in self._held:
            self._held[key] = self._read(epoch, position)
            if len(self._held) > 2:  # a batch may lie on the border of two blocks
                self._held.popitem(last=False)
        return self._held[key][place]

    def _read(self, epoch: int, position: int) -> list[str]:
        order = np.random.default_rng([self._seed, 4, epoch]).permutation(self._blocks)
        which = int(order[position])
        part = tfds.core.ReadInstruction(
            "train", from_=which * self._block, to=(which + 1) * self._block, unit="abs"
        )
        dataset = self._builder.as_dataset(split=part, shuffle_files=False)
        texts = [row["text"].decode("utf-8", "replace") for row in tfds.as_numpy(dataset)]
        shuffle = np.random.default_rng([self._seed, 5, epoch, which]).permutation(len(texts))
        return [texts[i] for i in shuffle]
