"""Hyperpretraining data: text files, cached tokens, chunks, and batches of their parts.

``data.text_split`` chooses how a chunk of text becomes an example:

caclm       context-augmented conditional language modelling (Phang et al. 2023, HyperTuning): four
            contiguous segments A B C D; the hypermodel reads A and D, the backbone reads B and
            predicts C.
three_way   HINT (Ivison et al. 2023): the hypermodel reads the first part, the backbone reads the
            second and predicts the third.
six_way     HINT's code (allenai/hyper-task-descriptions): A B C D E F, of which the hypermodel
            reads A, C and F, the backbone reads B and D and predicts E.

Text is tokenized once into a flat memory-mapped array. Batch ``s`` is a function of (seed, s).
No TensorFlow here.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import itertools
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from hyper_t5.data.batch import SEPARATE, Batch, Layout, batch_spec, zeros
from hyper_t5.data.process_share import process_share
from hyper_t5.data.task_rows import OnBadRow
from hyper_t5.data.vocab import EOS_ID, Vocabulary
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import cache_root, check_no_pointer, is_local, json_object

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json.gz", ".txt")  # .json.gz: C4's JSON lines
MIN_CHUNK = 16  # tokens; shorter documents are skipped, their four segments would be too short
MAX_BC_SHARE = 0.8  # of a chunk; leaves A and D a token each in the shortest one
CACHE_VERSION = 2
DOCUMENTS_PER_BATCH = 256  # of the tokenizer's threads


# ------------------------------------------------------------------------------- documents


def text_files(spec: str) -> list[Path]:
    """Return the files that ``data.text`` names.

    Args:
      spec: a file, a folder (its files with one of `SUFFIXES`), or a glob.

    Raises:
      UserError: no such file, or one with another suffix.
    """
    if not is_local(spec):
        raise UserError(
            f"data.text={spec}: text is not read from a bucket; copy the files to this machine, or "
            "store them there by `hyper-t5 build --text` and set data.text=tfds:NAME"
        )
    path = Path(spec)
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
    elif path.is_file():
        paths = [path]
    else:
        paths = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())
    if not paths:
        raise UserError(
            f"data.text={spec!r}: no such file, or no file there ends in {', '.join(SUFFIXES)}"
        )
    for file in paths:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: data.text reads {', '.join(SUFFIXES)}, not this kind of file")
    return paths


def read_documents(
    file: str | Path, on_bad_row: OnBadRow = "raise", skipped: Counter[str] | None = None
) -> Iterator[str]:
    """Iterate over the documents of a file: field ``text`` of each line, or a whole .txt file.

    Blank lines are ignored. With 'skip', bad lines are counted in ``skipped`` by kind.

    Raises:
      UserError: names file, line and field. A truncated .xz or .gz raises under 'skip' too.
    """
    file = Path(file)
    if file.name.endswith(".txt"):
        yield _utf8(_read(file), file, 1)
        return
    line = 0
    try:
        check_no_pointer(file)
        with _open_lines(file) as lines:
            for line, raw in enumerate(lines, 1):
                if not raw.strip():
                    continue
                try:
                    yield _document(raw, file, line)
                except UserError as error:
                    if on_bad_row == "raise":
                        raise
                    if skipped is not None:
                        skipped[str(error).rsplit(": ", 1)[-1]] += 1
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}, after line {line}: damaged or truncated {file.suffix} ({error})"
        ) from None
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


def _open_lines(file: Path) -> IO[bytes]:
    openers: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open}
    return openers.get(file.suffix, open)(file, "rb")


def _document(raw: bytes, file: Path, line: int) -> str:
    source = f"{file}, line {line}"
    value = json_object(raw, source)
    if "text" not in value:
        raise UserError(f"{source}: lacks field text")
    text = value["text"]
    if not isinstance(text, str):
        raise UserError(f"{source}: field text must be text")
    return text


def _read(file: Path) -> bytes:
    try:
        check_no_pointer(file)
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


def _utf8(raw: bytes, file: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{file}, line {line}: not UTF-8; save it as UTF-8") from None


# ----------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenStore:
    """All documents in one array.

    Attributes:
      tokens: [n] uint16 or int32, memory-mapped where it comes from the cache. Document ``i`` is
        ``tokens[offsets[i]:offsets[i + 1]]`` and ends in EOS.
      offsets: [documents + 1] int64.
    """

    tokens: np.ndarray
    offsets: np.ndarray


def tokenize(
    documents: Iterable[str], vocab: Vocabulary, out: IO[bytes] | None = None
) -> TokenStore:
    """Encode documents in order; with ``out``, tokens are written there and not kept in memory."""
    dtype = token_dtype(vocab)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    documents = iter(documents)
    while batch := list(itertools.islice(documents, DOCUMENTS_PER_BATCH)):
        for ids in vocab.encode_batch(batch):
            array = np.array([*ids, EOS_ID], dtype)
            lengths.append(len(array))
            if out is None:
                parts.append(array)
            else:
                out.write(array.tobytes())
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return TokenStore(np.concatenate([np.zeros(0, dtype), *parts]), offsets)


def token_dtype(vocab: Vocabulary) -> np.dtype:
    """Return the smallest integer type for a vocabulary's ids."""
    return np.dtype(np.uint16 if vocab.size <= 2**16 else np.int32)


def cached_tokens(
    files: Sequence[Path],
    vocab: Vocabulary,
    cache_dir: str | Path = "",
    on_bad_row: OnBadRow = "raise",
) -> TokenStore:
    """Tokenize files, through a cache keyed by the files' bytes, the vocabulary and ``on_bad_row``.

    Entries are written atomically, so an interrupted run leaves none and two runs may write the
    same one. Without a writable cache the tokens stay in memory.

    Args:
      files: from `text_files`.
      vocab: the vocabulary.
      cache_dir: '' is $XDG_CACHE_HOME/hyper_t5, or ~/.cache/hyper_t5.
      on_bad_row: as in `read_documents`.
    """
    entry = cache_root(cache_dir) / f"tokens-{_cache_key(files, vocab, on_bad_row)}"
    store = _load_cache(entry, vocab)
    if store is not None:
        return store
    size = sum(file.stat().st_size for file in files)
    print(
        f"tokenizing {len(files)} file(s), {size / 1e6:.1f} MB, once; cached in {entry}", flush=True
    )
    skipped: Counter[str] = Counter()
    documents = (d for file in files for d in read_documents(file, on_bad_row, skipped))
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    except OSError as error:
        print(f"{entry.parent}: cannot be written ({error.strerror}); the tokens are not cached")
        return tokenize(documents, vocab)
    try:
        with open(part / "tokens.bin", "wb") as out:
            offsets = tokenize(documents, vocab, out).offsets
        np.save(part / "offsets.npy", offsets)
        if not entry.exists():
            os.replace(part, entry)
    except OSError as error:
        print(f"{entry.parent}: cannot be written ({error.strerror}); the tokens are not cached")
        return tokenize((d for file in files for d in read_documents(file, on_bad_row)), vocab)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for kind, count in sorted(skipped.items()):
        print(f"data.text: {count} bad rows skipped (data.on_bad_row='skip'): {kind}")
    store = _load_cache(entry, vocab)
    assert store is not None, f"{entry} was just written"
    return store


def _cache_key(files: Sequence[Path], vocab: Vocabulary, on_bad_row: OnBadRow) -> str:
    digest = hashlib.sha256()
    identity = {key: value for key, value in vocab.identity().items() if key != "file"}
    digest.update(json.dumps([CACHE_VERSION, identity, on_bad_row], sort_keys=True).encode())
    for file in files:
        try:
            with open(file, "rb") as raw:
                digest.update(hashlib.file_digest(raw, "sha256").digest())
        except OSError as error:
            raise UserError(f"{file}: cannot read ({error.strerror})") from None
        digest.update(file.suffix.encode())
    return digest.hexdigest()[:32]


def _load_cache(entry: Path, vocab: Vocabulary) -> TokenStore | None:
    """Return the cache entry, or None where it is absent or damaged. Removes a damaged one."""
    try:
        offsets = np.load(entry / "offsets.npy")
        dtype = token_dtype(vocab)
        if (entry / "tokens.bin").stat().st_size != offsets[-1] * dtype.itemsize:
            raise ValueError("tokens.bin and offsets.npy do not match")
        if not offsets[-1]:
            return TokenStore(np.zeros(0, dtype), offsets)
        return TokenStore(np.memmap(entry / "tokens.bin", dtype, "r"), offsets)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        print(f"{entry}: damaged ({error}); it is written again")
    shutil.rmtree(entry, ignore_errors=True)
    return None


# ----------------------------------------------------------------------------------- chunks


class ChunkSource(Protocol):
    """Chunks of text in an endless, random, repeatable order."""

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Return draws first, ..., first + count - 1, each 1-D int32 without a final EOS."""
        ...


class StoredChunks:
    """Chunks of a TokenStore. Every epoch has all of them, in an order of its own.

    A chunk never crosses documents, so the context is always of the same text as input and target.
    A document is cut at multiples of ``length``; its last chunk ends with the document and may
    overlap the one before. A document shorter than ``length`` is one chunk.

    Raises:
      UserError: no document has MIN_CHUNK tokens.
    """

    def __init__(
        self, store: TokenStore, length: int, seed: int, source: str = "data.text"
    ) -> None:
        self._tokens = store.tokens
        self._length = length
        self._seed = seed % 2**63
        self._starts, self._ends = _cut_documents(store.offsets, length)
        self._order: tuple[int, np.ndarray] = (-1, self._starts)
        if not len(self._starts):
            raise UserError(
                f"{source}: no document has {MIN_CHUNK} tokens; there is nothing to train on"
            )

    def __len__(self) -> int:
        """Return the number of chunks in an epoch."""
        return len(self._starts)

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Return draws first, ..., first + count - 1 (see ChunkSource)."""
        chunks = []
        for draw in range(first, first + count):
            epoch, rank = divmod(draw, len(self))
            if self._order[0] != epoch:
                rng = np.random.default_rng([self._seed, 1, epoch])
                self._order = (epoch, rng.permutation(len(self)))
            index = self._order[1][rank]
            tokens = self._tokens[self._starts[index] : self._ends[index]]
            chunks.append(np.asarray(tokens, np.int32))
        return chunks


def _cut_documents(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    starts: list[int] = []
    ends: list[int] = []
    for begin, end in zip(offsets[:-1].tolist(), (offsets[1:] - 1).tolist(), strict=True):
        if end - begin < min(MIN_CHUNK, length):
            continue
        cuts = list(range(begin, end - length + 1, length)) or [begin]
        # A remainder of an eighth or less would repeat nearly all of the chunk before.
        if end - cuts[-1] > length + length // 8:
            cuts.append(end - length)
        starts += cuts
        ends += [min(cut + length, end) for cut in cuts]
    return np.array(starts, np.int64), np.array(ends, np.int64)


# --------------------------------------------------------------------- the parts of a chunk

# (hyper_inputs, inputs, targets) of a chunk: 1-D, every part of it ending in EOS.
Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def make_splitter(data_config: Any) -> Callable[[np.ndarray, np.random.Generator], Split]:
    """Return the function that splits a chunk by ``data.text_split``.

    Raises:
      UserError: from `SegmentRule.of` or `part_lengths`.
    """
    split = data_config.get("text_split", "caclm")
    if split == "caclm":
        return functools.partial(caclm_split, rule=SegmentRule.of(data_config))
    readers = READERS[split]
    return functools.partial(split_parts, readers=readers, most=part_lengths(data_config, readers))


def _join_with_eos(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([ids for part in parts for ids in (part, [EOS_ID])])


@dataclass(frozen=True)
class SegmentRule:
    """Limits on the segments of a CACLM chunk of n tokens.

    B has 1 to ``b_share * n`` tokens, uniformly, and C half of ``c_share * n`` to all of it (short
    targets would waste the decoder), within ``b_most`` and ``c_most``. A and D share the rest at a
    uniform cut and have at most ``ad_most`` together; B and C are longer where that needs it. The
    paper does not publish its rule; HINT's re-implementation draws three uniform cuts.
    """

    b_share: float
    c_share: float
    b_most: int
    c_most: int
    ad_most: int

    @staticmethod
    def of(data_config: Any) -> SegmentRule:
        """Return the limits of ``data.segment_shares`` and the lengths.

        Raises:
          UserError: a chunk of up to ``data.chunk_length`` cannot fit, or shares out of range.
        """
        c = data_config
        b_share, c_share = c.get("segment_shares", (0.25, 0.25))
        if not (b_share > 0 and c_share > 0 and b_share + c_share <= MAX_BC_SHARE):
            raise UserError(
                f"data.segment_shares=({b_share}, {c_share}) are B's and C's largest shares of a "
                f"chunk: both above 0, together at most {MAX_BC_SHARE}"
            )
        rule = SegmentRule(
            b_share, c_share, c.input_length - 1, c.target_length - 1, c.hyper_length - 2
        )
        n = c.chunk_length
        b_most, c_most = rule.most(n)
        # Checked at every length, not the longest alone: shares are rounded down at each.
        rest = max((m - sum(rule.most(m)) for m in range(MIN_CHUNK, n + 1)), default=n)
        if n < MIN_CHUNK or min(rule.b_most, rule.c_most) < 1 or rest > rule.ad_most:
            raise UserError(
                f"data.chunk_length={n} does not fit: B holds {b_most}, C {c_most} and A and D "
                f"{rule.ad_most} tokens (data.input_length, data.target_length, data.hyper_length, "
                f"data.segment_shares), and a chunk needs {MIN_CHUNK}"
            )
        return rule

    def most(self, n: int) -> tuple[int, int]:
        """Return the longest B and C of a chunk of n tokens."""
        return (
            min(self.b_most, max(1, int(self.b_share * n))),
            min(self.c_most, max(1, int(self.c_share * n))),
        )


def caclm_split(chunk: np.ndarray, rng: np.random.Generator, rule: SegmentRule) -> Split:
    """Split a chunk of at least 4 tokens into non-empty contiguous segments A, B, C, D.

    Returns:
      A EOS D EOS, B EOS, C EOS.
    """
    n = len(chunk)
    b_most, c_most = rule.most(n)
    need = n - rule.ad_most  # least length of B and C together, so that A and D fit
    b = int(rng.integers(max(1, need - c_most), b_most + 1))
    c = int(rng.integers(max(1, (c_most + 1) // 2, need - b), c_most + 1))
    a = int(rng.integers(1, n - b - c))
    first, second, third = a, a + b, a + b + c
    context = _join_with_eos(chunk[:first], chunk[third:])
    return context, _join_with_eos(chunk[first:second]), _join_with_eos(chunk[second:third])


# Reader of each part of a chunk, in order: 0 the hypermodel, 1 the backbone; 2 is the target.
READERS = {"three_way": (0, 1, 2), "six_way": (0, 1, 0, 1, 2, 0)}
LENGTH_FIELDS = ("data.hyper_length", "data.input_length", "data.target_length")


def part_lengths(data_config: Any, readers: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the most tokens that each reader's parts may have together, without their EOS.

    Args:
      data_config: ``config.data``.
      readers: a value of READERS.

    Raises:
      UserError: a chunk of up to ``data.chunk_length`` cannot fit.
    """
    c = data_config
    names = ["".join("ABCDEF"[i] for i, who in enumerate(readers) if who == r) for r in range(3)]
    lengths = (c.hyper_length, c.input_length, c.target_length)
    most = tuple(length - len(parts) for length, parts in zip(lengths, names, strict=True))
    none_empty = all(m >= len(parts) for m, parts in zip(most, names, strict=True))
    if c.chunk_length < MIN_CHUNK or not none_empty or c.chunk_length > sum(most):
        limits = ", ".join(
            f"{' '.join(parts)} {m} ({field})"
            for parts, m, field in zip(names, most, LENGTH_FIELDS, strict=True)
        )
        raise UserError(
            f"data.chunk_length={c.chunk_length} does not fit: the most tokens of its "
            f"{len(readers)} parts are {limits}; each part needs one, and a chunk {MIN_CHUNK}"
        )
    return most[0], most[1], most[2]


def split_parts(
    chunk: np.ndarray,
    rng: np.random.Generator,
    readers: tuple[int, ...],
    most: tuple[int, int, int],
) -> Split:
    """Split a chunk at distinct uniform cuts and join the parts of each reader.

    Where a reader would get more tokens than ``most``, cuts are moved as little as possible.

    Args:
      chunk: [n], with at least as many tokens as there are parts.
      rng: draws the cuts.
      readers: reader of each part, as in READERS.
      most: from `part_lengths`; together they hold the chunk.

    Returns:
      The parts of each reader in order, EOS after each.
    """
    n = len(chunk)
    cuts = np.sort(rng.choice(n - 1, len(readers) - 1, replace=False)) + 1
    lengths = np.diff(cuts, prepend=0, append=n).tolist()
    parts = np.split(chunk, np.cumsum(_fit_lengths(lengths, readers, most))[:-1])
    context, read, target = (
        _join_with_eos(*(part for part, who in zip(parts, readers, strict=True) if who == reader))
        for reader in range(3)
    )
    return context, read, target


def _fit_lengths(
    lengths: Sequence[int], readers: tuple[int, ...], most: tuple[int, int, int]
) -> list[int]:
    """Change lengths, none to 0, so that each reader's sum is at most ``most``; move cuts least.

    This is a minimum-cost flow: tokens flow between neighboring parts, from readers with too many
    to readers with room, at a cost of 1 for every cut they cross. Augmenting along a cheapest path,
    on which earlier flow may be reverted, gives the least cost.
    """
    lengths = list(lengths)
    moved = [0] * (len(lengths) - 1)  # tokens over each cut, to the right
    room = list(most)
    for length, who in zip(lengths, readers, strict=True):
        room[who] -= length
    while min(room) < 0:
        path = _cheapest_path(lengths, moved, readers, room)
        first, last = path[0], path[-1]
        amount = min(-room[readers[first]], room[readers[last]], lengths[first] - 1)
        for p, q in itertools.pairwise(path):
            amount = min(amount, _edge(p, q, lengths, moved, readers)[1])
        for p, q in itertools.pairwise(path):
            if readers[p] == readers[q]:  # one reader: p grows by what q loses
                lengths[p] += amount
                lengths[q] -= amount
            else:
                moved[min(p, q)] += amount * (q - p)
        for part, gain in ((first, -amount), (last, amount)):
            lengths[part] += gain
            room[readers[part]] -= gain
    return lengths


def _edge(
    p: int, q: int, lengths: Sequence[int], moved: Sequence[int], readers: tuple[int, ...]
) -> tuple[int, int]:
    """Return (cost per token, most tokens) of an edge from part p to q; 0 tokens is no edge."""
    if readers[p] == readers[q]:
        return 0, lengths[q] - 1
    if abs(p - q) > 1:
        return 0, 0
    back = -moved[min(p, q)] * (q - p)
    return (-1, back) if back > 0 else (1, sum(lengths))


def _cheapest_path(
    lengths: Sequence[int], moved: Sequence[int], readers: tuple[int, ...], room: Sequence[int]
) -> list[int]:
    """Return a path of parts from a reader with too many to one with room (Bellman-Ford)."""
    parts = range(len(lengths))
    paths = {p: (0, [p]) for p in parts if room[readers[p]] < 0 and lengths[p] > 1}
    for _ in parts:
        for p, q in itertools.permutations(parts, 2):
            cost, most = _edge(p, q, lengths, moved, readers)
            if p in paths and most and (q not in paths or paths[p][0] + cost < paths[q][0]):
                paths[q] = (paths[p][0] + cost, [*paths[p][1], q])
    return min(path for p, path in paths.items() if room[readers[p]] > 0)[1]


class TextSampler:
    """Hyperpretraining batches: T chunks of text, each an episode with G = 1.

    hyper_inputs, inputs and targets are the parts of ``data.text_split``; every part ends in EOS,
    so the layouts "separate" and "fusion" are the same. In layouts with ``in_inputs`` the inputs
    are the conditioning and the input one after the other, which is the order of episodes too.

    Attributes:
      stats: counts of the chunks and tokens that were used.
      names: (), because text has no tasks; a batch's ``tasks`` are zeros.

    Raises:
      UserError: as `make_splitter`.
    """

    def __init__(
        self, chunks: ChunkSource, data_config: Any, seed: int, layout: Layout = SEPARATE
    ) -> None:
        self.stats: Counter[str] = Counter()
        self.names: tuple[str, ...] = ()
        self._chunks = chunks
        self._config = data_config
        self._seed = seed % 2**63
        self._layout = layout
        self._split = make_splitter(data_config)

    def batch(self, step: int, share_index: int = 0, share_count: int = 1) -> Batch:
        """Return batch ``step``, or the T / share_count slots of one share (`process_share`).

        Names and shapes are those of `batch.batch_spec` with ``text``. Only the chunks of those
        slots are read.

        Raises:
          UserError: T is no multiple of ``share_count``, or from the chunks.
        """
        c = self._config
        slots = process_share(c.tasks_per_batch, share_index, share_count)
        batch = zeros(batch_spec(c, self._layout, text=True, tasks=len(slots)))
        chunks = self._chunks.chunks(step * c.tasks_per_batch + slots.start, len(slots))
        for row, chunk in enumerate(chunks):
            rng = np.random.default_rng([self._seed, 2, step, slots[row]])
            context, source, target = self._split(chunk, rng)
            if self._layout.in_inputs:
                context, source = np.array([EOS_ID]), np.concatenate([context, source])
            batch["hyper_inputs"][row, : len(context)] = context
            batch["inputs"][row, 0, : len(source)] = source
            batch["targets"][row, 0, : len(target)] = target
            self.stats["tokens"] += len(chunk)
        self.stats["chunks"] += len(slots)
        return batch
