"""Plain text as a SeqIO Task, and as chunks for hyperpretraining.

``data.text`` is a .jsonl (field ``text``; or .gz, .xz) or .txt file, a folder or a glob of them; or
``tfds:NAME`` for a text dataset of TensorFlow Datasets, such as ``tfds:c4/en:3.1.0``; or
'synthetic' for the documents of the embedded suite. The Task has one feature, ``targets``: a
document's tokens and EOS.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyper_t5.data.task_rows import OnBadRow
from hyper_t5.data.text_corpus import (
    MIN_CHUNK,
    SUFFIXES,
    ChunkSource,
)
from hyper_t5.data.vocab import Vocabulary
from hyper_t5.tasks import local_text
from hyper_t5.tasks.local_text import TFDS_PREFIX
from hyper_t5.tasks.seqio_tasks import (
    register_once,
    seqio,
    seqio_name,
    text_features,
    tf,
    tfds,
)
from hyper_t5.utils.errors import UserError

MAX_STREAMS = 256  # open files
BLOCK = 1024  # documents of a stream that are read and shuffled together
MAX_IN_MEMORY = 32768  # documents of all blocks together


def register(spec: str, vocab: Vocabulary, on_bad_row: OnBadRow = "raise") -> str:
    """Register the Task of a ``data.text`` value; return its name, such as text_c4_en_3.1.0.

    Raises:
      UserError: no such text.
    """
    source: seqio.DataSource
    folder = None
    if spec.startswith(TFDS_PREFIX):
        dataset = spec.removeprefix(TFDS_PREFIX)
        name = seqio_name(f"text_{dataset}")
        folder = os.environ.get("TFDS_DATA_DIR")
        try:
            source = seqio.TfdsDataSource(dataset, folder, splits=["train", "validation"])
        except ValueError:
            raise UserError(
                f"data.text={spec!r}: TensorFlow Datasets are named with a version, as in "
                "tfds:c4/en:3.1.0"
            ) from None
    else:
        documents = local_text.documents(spec, on_bad_row)
        digest = hashlib.sha256(spec.encode()).hexdigest()[:8]
        stem = spec.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        name = seqio_name(f"text_{stem}_{digest}")
        source = seqio.FunctionDataSource(
            functools.partial(_dataset, documents=documents), splits=["train"]
        )
    signature = (spec, folder, on_bad_row, vocab.identity())
    register_once(seqio.TaskRegistry, name, signature, lambda: _task(name, source, vocab))
    return name


def open_chunks(data_config: Any, vocab: Vocabulary, seed: int) -> ChunkSource:
    """Open the chunks of ``data.text``, and register its Task.

    Chunks do not pass through the Task's tf.data pipeline, which has no random access: a resumed
    run needs the chunks of step s at once.

    Raises:
      UserError: ``data.text`` is empty or does not exist, or bad rows; names file, line, field.
    """
    spec, length = data_config.text, data_config.chunk_length
    if not spec:
        raise UserError(
            "data.text is empty: stage hyperpretrain needs a file ("
            f"{', '.join(SUFFIXES)}), a folder of them, or tfds:NAME"
        )
    name = register(spec, vocab, data_config.on_bad_row)
    if spec.startswith(TFDS_PREFIX):
        source = seqio.TaskRegistry.get(name).source
        builder = _builder(source, spec)
        return TfdsChunks(builder, vocab, length, seed, data_config.tasks_per_batch)
    return local_text.open_chunks(data_config, vocab, seed)


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
            seqio.CacheDatasetPlaceholder(),
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
        raise UserError(
            f"data.text={spec!r}: TensorFlow Datasets cannot read it ({_first_line(error)}); "
            "prepare it and set TFDS_DATA_DIR to its folder or bucket"
        ) from None


class Units:
    """Units of consecutive documents of a TFDS split, which are read in parallel.

    A unit is a shard or, where there are fewer shards than ``wanted``, a part of a shard. All units
    have the same size, so that the position of a draw is a division; the remainder of a shard is
    never read. The size is the one that skips the fewest documents (of C4, under 1%).

    Attributes:
      size: documents in a unit.
      starts: [units] number of each unit's first document in the split.
      left_out: number of documents in no unit.
    """

    def __init__(self, shard_lengths: Sequence[int], wanted: int) -> None:
        lengths = np.array(shard_lengths, np.int64)
        parts = -(-wanted // int(np.count_nonzero(lengths)))
        sizes = np.unique(np.maximum(lengths[lengths > 0] // parts, 1))[::-1]
        left_out = [int((lengths % size).sum()) for size in sizes]
        best = int(np.argmin(left_out))
        self.size, self.left_out = int(sizes[best]), left_out[best]
        firsts = np.cumsum(lengths) - lengths
        starts = [
            first + self.size * np.arange(length // self.size)
            for first, length in zip(firsts, lengths, strict=True)
        ]
        self.starts = np.concatenate(starts)

    def __len__(self) -> int:
        return len(self.starts)


@dataclass
class _Stream:
    """State of a stream: the block of its last draw, and the rest of the unit."""

    turn: int
    block: int
    texts: list[bytes]  # of the block, in the order of draws
    following: Iterator[np.ndarray]


class TfdsChunks:
    """Chunks of a prepared TFDS text dataset, tokenized on the fly.

    Draw i is a random chunk of one document, and both are a function of (seed, i): a run resumes at
    any step, on any number of processes.

    There are S streams, where S is the largest divisor of the T draws of a step that is at most
    MAX_STREAMS. Each stream has T / S consecutive draws of a step, so that no two processes read
    one stream (if the number of processes divides S). Unit t of stream s is entry t S + s of an
    endless sequence of permutations of all units (see Units). A stream reads its unit sequentially,
    block by block, each shuffled; only the first draw, or one out of order, seeks, which skips
    records of one file without parsing them. A dataset of at most MAX_IN_MEMORY documents is read
    once.

    Raises:
      UserError: no training documents, or a dataset without field ``text``.
    """

    def __init__(
        self,
        builder: tfds.core.DatasetBuilder,
        vocab: Vocabulary,
        length: int,
        seed: int,
        tasks_per_batch: int = 1,
        block: int = BLOCK,
    ) -> None:
        name, split = builder.info.full_name, builder.info.splits["train"]
        if "text" not in builder.info.features:
            fields = ", ".join(builder.info.features)
            raise UserError(f"data.text: {name} has no field text; its fields are {fields}")
        if not split.num_examples:
            raise UserError(f"data.text: {name} has no training documents")
        self._builder = builder
        self._vocab = vocab
        self._length = length
        self._seed = seed % 2**63
        self._draws = tasks_per_batch
        most = min(MAX_STREAMS, tasks_per_batch)
        self._streams = max(s for s in range(1, most + 1) if tasks_per_batch % s == 0)
        self._units = Units(split.shard_lengths, self._streams)
        self._block = max(1, min(block, MAX_IN_MEMORY // self._streams, self._units.size))
        self._blocks_each = self._units.size // self._block  # the last has the remainder too
        self._open: dict[int, _Stream] = {}
        self._order: tuple[int, np.ndarray] = (-1, self._units.starts)
        in_memory = split.num_examples <= MAX_IN_MEMORY
        self._cache: dict[int, list[np.ndarray]] | None = {} if in_memory else None
        if self._units.left_out > split.num_examples // 100:
            print(
                f"data.text: {self._units.left_out} of {name}'s {split.num_examples} documents are "
                f"never read: they are beyond its {len(self._units)} units of {self._units.size}"
            )

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Return draws first, ..., first + count - 1 (see text_corpus.ChunkSource).

        Raises:
          UserError: a file cannot be read, or no document of a block is long enough.
        """
        draws = range(first, first + count)
        # All blocks are referenced here: a later draw may advance a stream to its next block.
        located = [self._locate(draw) for draw in draws]
        encoded = self._vocab.encode_batch([_text(texts[i]) for texts, i in located])
        return [
            self._cut(ids, draw, texts, i)
            for ids, draw, (texts, i) in zip(encoded, draws, located, strict=True)
        ]

    def _cut(self, ids: list[int], draw: int, texts: list[bytes], index: int) -> np.ndarray:
        others = self._replacements(draw, texts, index)
        while len(ids) < MIN_CHUNK:
            text = next(others, None)
            if text is None:
                raise UserError(f"data.text: no document of a whole block has {MIN_CHUNK} tokens")
            ids = self._vocab.encode(text)
        rng = np.random.default_rng([self._seed, 3, draw])
        start = int(rng.integers(max(0, len(ids) - self._length) + 1))
        return np.array(ids[start : start + self._length], np.int32)

    def _replacements(self, draw: int, texts: list[bytes], index: int) -> Iterator[str]:
        """Yield replacements for a document that is too short: the next ones in its block.

        Blocks of a small dataset may have one document; then those of the other units follow.
        """
        for shift in range(1, len(texts)):
            yield _text(texts[(index + shift) % len(texts)])
        for start in np.roll(self._units.starts, -draw) if self._cache is not None else ():
            for block in self._blocks(int(start), 0):
                yield from map(_text, block)

    def _locate(self, draw: int) -> tuple[list[bytes], int]:
        """Return the block of a draw, and the draw's index in it."""
        step, slot = divmod(draw, self._draws)
        each = self._draws // self._streams
        number, position = slot // each, step * each + slot % each
        turn, position = divmod(position, self._units.size)
        block = min(position // self._block, self._blocks_each - 1)
        stream = self._open.get(number)
        if stream is None or (stream.turn, stream.block) != (turn, block):
            # Removed first: after a failure its blocks would be out of step.
            previous = self._open.pop(number, None)
            stream = self._open[number] = self._advance(previous, number, turn, block)
        return stream.texts, position - block * self._block

    def _advance(self, previous: _Stream | None, number: int, turn: int, block: int) -> _Stream:
        """Return a stream at another block: read sequentially where possible, else by seeking."""
        entry = turn * self._streams + number
        if previous is not None and (previous.turn, previous.block + 1) == (turn, block):
            following = previous.following
        else:
            epoch, position = divmod(entry, len(self._units))
            following = self._blocks(int(self._starts(epoch)[position]), block)
        last = block == self._blocks_each - 1
        count = self._units.size - block * self._block if last else self._block
        texts = self._read(following, count)
        shuffle = np.random.default_rng([self._seed, 5, entry, block]).permutation(len(texts))
        return _Stream(turn, block, [texts[i] for i in shuffle], following)

    def _blocks(self, start: int, block: int) -> Iterator[np.ndarray]:
        """Return the blocks of the unit that begins at a document, from ``block`` on."""
        end = start + self._units.size
        if self._cache is None:
            return read_blocks(self._builder, start + block * self._block, end, self._block)
        if start not in self._cache:
            self._cache[start] = list(read_blocks(self._builder, start, end, self._block))
        return iter(self._cache[start][block:])

    def _starts(self, epoch: int) -> np.ndarray:
        """Return the first documents of an epoch's units, in order."""
        if self._order[0] != epoch:
            rng = np.random.default_rng([self._seed, 4, epoch])
            self._order = (epoch, rng.permutation(self._units.starts))
        return self._order[1]

    def _read(self, following: Iterator[np.ndarray], count: int) -> list[bytes]:
        texts: list[bytes] = []
        while len(texts) < count:
            more = next(following, None)
            if more is None:
                raise UserError(
                    f"data.text: {self._builder.info.full_name} has fewer documents in a file than "
                    "in its dataset_info.json; prepare it again"
                )
            texts.extend(more)
        return texts


def read_blocks(
    builder: tfds.core.DatasetBuilder, begin: int, end: int, block: int
) -> Iterator[np.ndarray]:
    """Read texts of documents begin, ..., end - 1 of split 'train', ``block`` at a time.

    The documents are in one file; those before ``begin`` are skipped unparsed. One block is
    prefetched. Uses few threads, because hundreds of these are open at once.

    Args:
      builder: builder of a prepared dataset.
      begin: number of the first document in the split.
      end: number after the last document.
      block: documents in an array; the last may have fewer.

    Yields:
      1-D arrays of bytes.

    Raises:
      UserError: a file is missing, damaged, or of a format without sequential access.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    config = tfds.ReadConfig(
        options=options,
        try_autocache=False,
        skip_prefetch=True,
        interleave_cycle_length=1,
        num_parallel_calls_for_interleave_files=1,
        num_parallel_calls_for_decode=1,
    )
    part = tfds.core.ReadInstruction("train", from_=begin, to=end, unit="abs")
    try:
        rows = builder.as_dataset(split=part, shuffle_files=False, read_config=config)
        texts = rows.map(lambda row: row["text"], num_parallel_calls=1).batch(block).prefetch(1)
        yield from texts.as_numpy_iterator()
    except (tf.errors.OpError, OSError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"data.text: {builder.info.full_name} cannot be read ({_first_line(error)})"
        ) from None


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, without TensorFlow's node names."""
    message = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", str(error).strip())
    return message.splitlines()[0] if message else type(error).__name__
