"""Plain text as a SeqIO Task, and as the chunks that hyperpretraining reads.

`data.text` is a .jsonl, .jsonl.xz (field `text`) or .txt file, a folder or a glob of them; or
`tfds:NAME` for a TensorFlow Datasets text set such as `tfds:c4/en:3.1.0`; or 'synthetic' for the
embedded suite's documents. Each is a Task with the one feature `targets`: a document's tokens, EOS.
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
MOST_STREAMS = 256  # files that are open at once
BLOCK = 1024  # documents of one stream read, and shuffled, together
HELD = 32768  # documents of all blocks together, so that memory is bounded


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
        try:
            source = seqio.TfdsDataSource(dataset, folder, splits=["train", "validation"])
        except ValueError:
            raise UserError(
                f"data.text={spec!r}: TensorFlow Datasets are named with a version, as in "
                "tfds:c4/en:3.1.0"
            ) from None
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
        builder = _builder(source, spec)
        return TfdsChunks(builder, vocab, length, seed, data_config.tasks_per_batch)
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
    """The documents of a TFDS split in units of `size` that follow each other in one file.

    A unit is a shard or, where there are fewer shards than `wanted`, one of equal parts of a shard:
    units can be read side by side, each from start to end. They are equally long, for a draw's
    place to be a division; what a shard has beyond its whole units is never read. Of the sizes that
    shards offer the one that leaves out the fewest documents is taken (of C4, whose shards differ
    by chance alone, under 1%).

    Attributes:
        size: documents a unit.
        starts: the first document of each unit, by its number in the split [units].
        left_out: documents that no unit has.
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
    """What is open of a stream: the block that its last draw is of, and the unit's later ones."""

    turn: int
    block: int
    texts: list[bytes]  # in the order of draws
    following: Iterator[np.ndarray]


class TfdsChunks:
    """Chunks of a prepared TFDS text set that is too large to tokenise beforehand.

    Draw i is a random chunk of one document, and which document follows from (seed, i) without
    reading what came before, so that a run can go on at any step, on any number of hosts.

    There are S streams, S being the largest divisor of the T draws of a step that is at most
    MOST_STREAMS. The draws of a step are dealt out in runs of T / S, so that a host's slots, which
    are neighbours, are of streams that no other host reads (where the number of hosts divides S).
    The streams take units (see Units) in turn: the t-th of stream s is entry t S + s of an endless
    sequence, in which every epoch is a permutation of all units. In a unit a stream reads block
    after block, each shuffled. So it reads straight on; only for the first draw, and for one out of
    order, it looks for the place, which passes over records of one file without parsing them. A set
    of at most HELD documents is read once and kept.

    Raises:
        UserError: no training documents, or a set without the field text.
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
            found = ", ".join(builder.info.features)
            raise UserError(f"data.text: {name} has no field text, but {found}")
        if not split.num_examples:
            raise UserError(f"data.text: {name} has no training documents")
        self._builder = builder
        self._vocab = vocab
        self._length = length
        self._seed = seed % 2**63
        self._draws = tasks_per_batch
        most = min(MOST_STREAMS, tasks_per_batch)
        self._streams = max(s for s in range(1, most + 1) if tasks_per_batch % s == 0)
        self._units = Units(split.shard_lengths, self._streams)
        self._block = max(1, min(block, HELD // self._streams, self._units.size))
        self._blocks_each = self._units.size // self._block  # the last has the remainder too
        self._open: dict[int, _Stream] = {}
        self._order: tuple[int, np.ndarray] = (-1, self._units.starts)
        self._kept: dict[int, list[np.ndarray]] | None = {} if split.num_examples <= HELD else None
        if self._units.left_out > split.num_examples // 100:
            print(
                f"data.text: of {name}'s {split.num_examples} documents {self._units.left_out} are "
                f"never read: its files are cut in {len(self._units)} units of {self._units.size}, "
                "and these are left over"
            )

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Draws first, ..., first + count - 1 (see text.ChunkSource).

        Raises:
            UserError: a file cannot be read, or no document of a block is long enough.
        """
        draws = range(first, first + count)
        # The blocks are held here: the batch may go on into the next ones.
        found = [self._find(index) for index in draws]
        encoded = self._vocab.encode_batch([_text(texts[place]) for texts, place in found])
        return [
            self._cut(ids, index, texts, place)
            for ids, index, (texts, place) in zip(encoded, draws, found, strict=True)
        ]

    def _cut(self, ids: list[int], index: int, texts: list[bytes], place: int) -> np.ndarray:
        others = self._stand_ins(index, texts, place)
        while len(ids) < MIN_CHUNK:
            text = next(others, None)
            if text is None:
                raise UserError(f"data.text: no document of a whole block has {MIN_CHUNK} tokens")
            ids = self._vocab.encode(text)
        rng = np.random.default_rng([self._seed, 3, index])
        start = int(rng.integers(max(0, len(ids) - self._length) + 1))
        return np.array(ids[start : start + self._length], np.int32)

    def _stand_ins(self, index: int, texts: list[bytes], place: int) -> Iterator[str]:
        """What may stand in for too short a document: the next ones in its block.

        Blocks of a small set may be as small as one document: then those of its other units too.
        """
        for shift in range(1, len(texts)):
            yield _text(texts[(place + shift) % len(texts)])
        for start in np.roll(self._units.starts, -index) if self._kept is not None else ():
            for block in self._blocks(int(start), 0):
                yield from map(_text, block)

    def _find(self, index: int) -> tuple[list[bytes], int]:
        """The block of a draw, and the draw's place in it."""
        step, slot = divmod(index, self._draws)
        each = self._draws // self._streams
        stream, place = slot // each, step * each + slot % each
        turn, place = divmod(place, self._units.size)
        block = min(place // self._block, self._blocks_each - 1)
        place -= block * self._block
        at = self._open.get(stream)
        if at is None or (at.turn, at.block) != (turn, block):
            # Without the old one, should this fail: its blocks would be out of step.
            at = self._open[stream] = self._next(self._open.pop(stream, None), stream, turn, block)
        return at.texts, place

    def _next(self, at: _Stream | None, stream: int, turn: int, block: int) -> _Stream:
        """A stream at another block: read on where the last one ended or, failing that, found."""
        entry = turn * self._streams + stream
        if at is not None and (at.turn, at.block + 1) == (turn, block):
            following = at.following
        else:
            epoch, position = divmod(entry, len(self._units))
            following = self._blocks(int(self._starts(epoch)[position]), block)
        last = block == self._blocks_each - 1
        count = self._units.size - block * self._block if last else self._block
        texts = self._read(following, count)
        shuffle = np.random.default_rng([self._seed, 5, entry, block]).permutation(len(texts))
        return _Stream(turn, block, [texts[i] for i in shuffle], following)

    def _blocks(self, start: int, block: int) -> Iterator[np.ndarray]:
        """The blocks of the unit that begins at a document, from one of them on."""
        end = start + self._units.size
        if self._kept is None:
            return read_blocks(self._builder, start + block * self._block, end, self._block)
        if start not in self._kept:
            self._kept[start] = list(read_blocks(self._builder, start, end, self._block))
        return iter(self._kept[start][block:])

    def _starts(self, epoch: int) -> np.ndarray:
        """The units of an epoch in their order, by their first documents."""
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
                    "its dataset_info.json says; prepare it again"
                )
            texts.extend(more)
        return texts


def read_blocks(
    builder: tfds.core.DatasetBuilder, begin: int, end: int, block: int
) -> Iterator[np.ndarray]:
    """Texts of documents begin, ..., end - 1 of split 'train', `block` at a time.

    The documents are of one file; those before `begin` in it are passed over unparsed. The next
    block is read while one is in use. Few threads: hundreds of these are open at once.

    Args:
        builder: of a prepared set.
        begin: number of the first document in the split.
        end: one after the last.
        block: how many make one array; the last may have fewer.

    Yields:
        1-D arrays of bytes, one after the other.

    Raises:
        UserError: a file is not there, is damaged, or is of a format that cannot be read in order.
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
    """What an error says, without the names that TensorFlow has for its own parts."""
    said = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", str(error).strip())
    return said.splitlines()[0] if said else type(error).__name__
