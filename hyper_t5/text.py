"""Plain text -> chunks of tokens -> batches of their parts. No TensorFlow here.

CACLM (context-augmented conditional language modelling, Phang et al., HyperTuning, ICML 2023): a
chunk of text is cut in four contiguous segments A B C D; the hypermodel reads A and D, the backbone
reads B and predicts C. HINT's split (Ivison et al., ACL 2023) is in three: the hypermodel reads the
first part, the backbone the second, and it predicts the third. Its code
(allenai/hyper-task-descriptions) has one in six as well: A B C D E F, of which the hypermodel reads
A, C and F, the backbone B and D, and it predicts E. `data.text_split` chooses.

The text is tokenised once into a flat array on disk, so that any chunk is one slice away and batch
s is a function of (seed, s).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import itertools
import json
import lzma
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from hyper_t5.errors import UserError
from hyper_t5.files import cache_root, json_object
from hyper_t5.hosts import slots_of
from hyper_t5.prompts import LAYOUTS
from hyper_t5.taskfile import OnBadRow
from hyper_t5.vocab import EOS_ID, Vocabulary

SUFFIXES = (".jsonl", ".jsonl.xz", ".txt")
MIN_CHUNK = 16  # shorter documents are left out: they cannot make four segments worth reading
MOST_BC = 0.8  # of a chunk; leaves A and D a token each in the shortest one
CACHE_VERSION = 1
DOCUMENTS_AT_ONCE = 256  # handed to the tokeniser's threads together


# ------------------------------------------------------------------------------- documents


def text_files(spec: str) -> list[Path]:
    """The files that `data.text` names: a file, a folder (its .jsonl, .jsonl.xz and .txt), a glob.

    Raises:
        UserError: nothing there, or a file of another kind.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
    elif path.is_file():
        found = [path]
    else:
        found = sorted(Path(p) for p in glob.glob(str(path)) if Path(p).is_file())
    if not found:
        raise UserError(
            f"data.text={spec!r}: no such file, or nothing there that ends in {', '.join(SUFFIXES)}"
        )
    for file in found:
        if not file.name.endswith(SUFFIXES):
            raise UserError(f"{file}: data.text reads {', '.join(SUFFIXES)}, not this kind of file")
    return found


def read_documents(
    file: str | Path, on_bad_row: OnBadRow = "raise", skipped: Counter[str] | None = None
) -> Iterator[str]:
    """Documents of one file: the `text` of each line of a .jsonl[.xz], or a whole .txt.

    Blank lines are passed over. With 'skip', bad lines are counted in `skipped` by kind.

    Raises:
        UserError: names file, line and field; a truncated .xz raises under 'skip' too.
    """
    file = Path(file)
    if file.name.endswith(".txt"):
        yield _utf8(_read(file), file, 1)
        return
    line = 0
    try:
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
    except (EOFError, lzma.LZMAError) as error:
        raise UserError(f"{file}, after line {line}: damaged or truncated .xz ({error})") from None
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


def _open_lines(file: Path) -> IO[bytes]:
    return lzma.open(file, "rb") if file.name.endswith(".xz") else open(file, "rb")


def _document(raw: bytes, file: Path, line: int) -> str:
    where = f"{file}, line {line}"
    value = json_object(raw, where)
    if "text" not in value:
        raise UserError(f"{where}: lacks field text")
    text = value["text"]
    if not isinstance(text, str):
        raise UserError(f"{where}: field text must be text")
    return text


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot read ({error.strerror})") from None


def _utf8(raw: bytes, file: Path, line: int) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        raise UserError(f"{file}, line {line}: not UTF-8") from None


# ----------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenStore:
    """All documents as one array: document i is tokens[offsets[i]:offsets[i + 1]], EOS last."""

    tokens: np.ndarray  # [n] uint16 or int32, memory-mapped when it comes from the cache
    offsets: np.ndarray  # [documents + 1] int64


def tokenise(
    documents: Iterable[str], vocab: Vocabulary, out: IO[bytes] | None = None
) -> TokenStore:
    """Encodes documents in order; with `out` the tokens are written there and not kept."""
    dtype = token_dtype(vocab)
    parts: list[np.ndarray] = []
    lengths: list[int] = []
    waiting: list[str] = []

    def flush() -> None:
        for ids in vocab.encode_batch(waiting):
            array = np.array([*ids, EOS_ID], dtype)
            lengths.append(len(array))
            if out is None:
                parts.append(array)
            else:
                out.write(array.tobytes())
        waiting.clear()

    for document in documents:
        waiting.append(document)
        if len(waiting) == DOCUMENTS_AT_ONCE:
            flush()
    flush()
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    return TokenStore(np.concatenate([np.zeros(0, dtype), *parts]), offsets)


def token_dtype(vocab: Vocabulary) -> np.dtype:
    """The smallest integer type for a vocabulary's ids."""
    return np.dtype(np.uint16 if vocab.size <= 2**16 else np.int32)


def cached_tokens(
    files: Sequence[Path],
    vocab: Vocabulary,
    cache_dir: str | Path = "",
    on_bad_row: OnBadRow = "raise",
) -> TokenStore:
    """Tokens of files, from a cache keyed by the files' bytes, the vocabulary and `on_bad_row`.

    A new entry is written beside its place and moved there whole, so a killed run leaves no half
    entry and two runs may do it at once. Where nothing can be written the tokens stay in memory.

    Args:
        files: as `text_files` gives them.
        vocab: the vocabulary.
        cache_dir: '' is $XDG_CACHE_HOME/hyper_t5, or ~/.cache/hyper_t5.
        on_bad_row: as `read_documents`.
    """
    entry = cache_root(cache_dir) / f"tokens-{_cache_key(files, vocab, on_bad_row)}"
    store = _load_cache(entry, vocab)
    if store is not None:
        return store
    size = sum(file.stat().st_size for file in files)
    print(
        f"tokenising {len(files)} file(s), {size / 1e6:.1f} MB, once; kept in {entry}", flush=True
    )
    skipped: Counter[str] = Counter()
    documents = (d for file in files for d in read_documents(file, on_bad_row, skipped))
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", dir=entry.parent))
    except OSError as error:
        print(f"{entry.parent}: cannot be written ({error.strerror}), so the tokens are not kept")
        return tokenise(documents, vocab)
    try:
        with open(part / "tokens.bin", "wb") as out:
            offsets = tokenise(documents, vocab, out).offsets
        np.save(part / "offsets.npy", offsets)
        if not entry.exists():
            os.replace(part, entry)
    except OSError as error:
        print(f"{entry.parent}: cannot be written ({error.strerror}), so the tokens are not kept")
        again = (d for file in files for d in read_documents(file, on_bad_row))
        return tokenise(again, vocab)
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
    """The cache entry, or None when it is absent or damaged (a damaged one is removed)."""
    try:
        offsets = np.load(entry / "offsets.npy")
        dtype = token_dtype(vocab)
        if (entry / "tokens.bin").stat().st_size != offsets[-1] * dtype.itemsize:
            raise ValueError("tokens.bin has another length than offsets.npy says")
        if not offsets[-1]:
            return TokenStore(np.zeros(0, dtype), offsets)
        return TokenStore(np.memmap(entry / "tokens.bin", dtype, "r"), offsets)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, EOFError) as error:
        print(f"{entry}: damaged ({error}), made anew")
    shutil.rmtree(entry, ignore_errors=True)
    return None


# ----------------------------------------------------------------------------------- chunks


class ChunkSource(Protocol):
    """Chunks of text in an endless, random, repeatable order."""

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Draws first, ..., first + count - 1, each 1-D int32 without EOS at its end."""
        ...


class StoredChunks:
    """Chunks of a TokenStore; every epoch goes through all of them in another order.

    A chunk never leaves its document, so that A and D are always about the same text as B and C.
    A document of n tokens is cut at multiples of the length; its last chunk ends where the document
    does and so may overlap the one before. Shorter documents are one shorter chunk.

    Raises:
        UserError: no document has MIN_CHUNK tokens.
    """

    def __init__(self, store: TokenStore, length: int, seed: int, where: str = "data.text") -> None:
        self._tokens = store.tokens
        self._length = length
        self._seed = seed % 2**63
        self._starts, self._ends = _cut_documents(store.offsets, length)
        self._order: tuple[int, np.ndarray] = (-1, self._starts)
        if not len(self._starts):
            raise UserError(
                f"{where}: no document has {MIN_CHUNK} tokens; there is nothing to train on"
            )

    def __len__(self) -> int:
        """Chunks in an epoch."""
        return len(self._starts)

    def chunks(self, first: int, count: int) -> list[np.ndarray]:
        """Draws first, ..., first + count - 1 (see ChunkSource)."""
        found = []
        for index in range(first, first + count):
            epoch, place = divmod(index, len(self))
            if self._order[0] != epoch:
                rng = np.random.default_rng([self._seed, 1, epoch])
                self._order = (epoch, rng.permutation(len(self)))
            which = self._order[1][place]
            part = self._tokens[self._starts[which] : self._ends[which]]
            found.append(np.asarray(part, np.int32))
        return found


def _cut_documents(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    starts: list[int] = []
    ends: list[int] = []
    for begin, end in zip(offsets[:-1].tolist(), (offsets[1:] - 1).tolist(), strict=True):
        if end - begin < min(MIN_CHUNK, length):
            continue
        cuts = list(range(begin, end - length + 1, length)) or [begin]
        # A remainder of an eighth or less would be a chunk nearly all seen already.
        if end - cuts[-1] > length + length // 8:
            cuts.append(end - length)
        starts += cuts
        ends += [min(cut + length, end) for cut in cuts]
    return np.array(starts, np.int64), np.array(ends, np.int64)


# --------------------------------------------------------------------- the parts of a chunk

# (hyper_inputs, inputs, targets) of a chunk: 1-D, every part of it ending in EOS.
Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def splitter_of(data_config: Any) -> Callable[[np.ndarray, np.random.Generator], Split]:
    """What cuts a chunk as `data.text_split` says.

    Raises:
        UserError: as `SegmentRule.of` or `part_lengths`.
    """
    how = data_config.get("text_split", "caclm")
    if how == "caclm":
        return functools.partial(caclm_split, rule=SegmentRule.of(data_config))
    assert how in READERS, how
    readers = READERS[how]
    return functools.partial(split_parts, readers=readers, most=part_lengths(data_config, readers))


def _ended(*parts: np.ndarray) -> np.ndarray:
    return np.concatenate([ids for part in parts for ids in (part, [EOS_ID])])


@dataclass(frozen=True)
class SegmentRule:
    """How long the segments of a chunk of n tokens may be.

    B is 1 to `b_share * n` tokens, uniformly, and C half of `c_share * n` to all of it (short
    targets would waste the decoder), both within `b_most` and `c_most`; A and D share the rest at a
    uniform cut and are together at most `ad_most`, for which B and C are made longer if need be.
    The paper's own rule is not published; HINT's re-implementation draws three uniform cuts.
    """

    b_share: float
    c_share: float
    b_most: int
    c_most: int
    ad_most: int

    @staticmethod
    def of(data_config: Any) -> SegmentRule:
        """The rule of `data.segment_shares` and the lengths.

        Raises:
            UserError: a chunk of up to `data.chunk_length` cannot fit, or shares out of range.
        """
        c = data_config
        b_share, c_share = c.get("segment_shares", (0.25, 0.25))
        if not (b_share > 0 and c_share > 0 and b_share + c_share <= MOST_BC):
            raise UserError(
                f"data.segment_shares=({b_share}, {c_share}) are B's and C's largest shares of a "
                f"chunk: both above 0, together at most {MOST_BC}"
            )
        rule = SegmentRule(
            b_share, c_share, c.input_length - 1, c.target_length - 1, c.hyper_length - 2
        )
        n = c.chunk_length
        b_most, c_most = rule.most(n)
        # Every length there may be, not the longest alone: shares are rounded down at each.
        rest = max((m - sum(rule.most(m)) for m in range(MIN_CHUNK, n + 1)), default=n)
        if n < MIN_CHUNK or min(rule.b_most, rule.c_most) < 1 or rest > rule.ad_most:
            raise UserError(
                f"data.chunk_length={n} does not fit: B holds {b_most}, C {c_most} and A and D "
                f"{rule.ad_most} tokens (data.input_length, data.target_length, data.hyper_length, "
                f"data.segment_shares), and a chunk needs {MIN_CHUNK}"
            )
        return rule

    def most(self, n: int) -> tuple[int, int]:
        """The longest B and C of a chunk of n tokens."""
        return (
            min(self.b_most, max(1, int(self.b_share * n))),
            min(self.c_most, max(1, int(self.c_share * n))),
        )


def caclm_split(chunk: np.ndarray, rng: np.random.Generator, rule: SegmentRule) -> Split:
    """Cuts a chunk of at least 4 tokens in A, B, C, D: contiguous, none empty, nothing lost.

    Returns:
        A EOS D EOS, B EOS, C EOS.
    """
    n = len(chunk)
    b_most, c_most = rule.most(n)
    need = n - rule.ad_most  # B and C together must leave no more than A and D hold
    b = int(rng.integers(max(1, need - c_most), b_most + 1))
    c = int(rng.integers(max(1, (c_most + 1) // 2, need - b), c_most + 1))
    a = int(rng.integers(1, n - b - c))
    first, second, third = a, a + b, a + b + c
    context = _ended(chunk[:first], chunk[third:])
    return context, _ended(chunk[first:second]), _ended(chunk[second:third])


# Who reads each part of a chunk, in order: 0 the hypermodel, 1 the backbone, 2 is the target.
READERS = {"three_way": (0, 1, 2), "six_way": (0, 1, 0, 1, 2, 0)}
LENGTH_FIELDS = ("data.hyper_length", "data.input_length", "data.target_length")


def part_lengths(data_config: Any, readers: tuple[int, ...]) -> tuple[int, int, int]:
    """The most tokens that each reader's parts have together; the EOS of each is taken off.

    Args:
        data_config: `config.data`.
        readers: a value of READERS.

    Raises:
        UserError: a chunk of up to `data.chunk_length` cannot fit.
    """
    c = data_config
    names = ["".join("ABCDEF"[i] for i, who in enumerate(readers) if who == r) for r in range(3)]
    lengths = (c.hyper_length, c.input_length, c.target_length)
    most = tuple(length - len(parts) for length, parts in zip(lengths, names, strict=True))
    none_empty = all(m >= len(parts) for m, parts in zip(most, names, strict=True))
    if c.chunk_length < MIN_CHUNK or not none_empty or c.chunk_length > sum(most):
        held = ", ".join(
            f"{' '.join(parts)} {m} ({field})"
            for parts, m, field in zip(names, most, LENGTH_FIELDS, strict=True)
        )
        raise UserError(
            f"data.chunk_length={c.chunk_length} does not fit: of its {len(readers)} parts there "
            f"is room for so many tokens: {held}; each part needs one, and a chunk {MIN_CHUNK}"
        )
    return most[0], most[1], most[2]


def split_parts(
    chunk: np.ndarray,
    rng: np.random.Generator,
    readers: tuple[int, ...],
    most: tuple[int, int, int],
) -> Split:
    """Cuts a chunk at different points, each set of them as likely, and gives out the parts.

    So no part is empty. Where a reader would have more tokens than `most`, which together hold the
    chunk, the points are moved no further than is needed.

    Args:
        chunk: [n], with as many tokens as parts or more.
        rng: for the points.
        readers: who reads each part, as in READERS.
        most: as `part_lengths`.

    Returns:
        Of each reader its parts in order, EOS after each.
    """
    n = len(chunk)
    cuts = np.sort(rng.choice(n - 1, len(readers) - 1, replace=False)) + 1
    lengths = np.diff(cuts, prepend=0, append=n).tolist()
    parts = np.split(chunk, np.cumsum(_fit_lengths(lengths, readers, most))[:-1])
    context, read, target = (
        _ended(*(part for part, who in zip(parts, readers, strict=True) if who == reader))
        for reader in range(3)
    )
    return context, read, target


def _fit_lengths(
    lengths: Sequence[int], readers: tuple[int, ...], most: tuple[int, int, int]
) -> list[int]:
    """Lengths of parts, none 0, with each reader's sum at most `most`; the cuts move the least.

    Tokens flow from part to neighbouring part, each at a cost of 1 for every cut it crosses, out of
    readers with too many and into readers with room; so the cost is how far the cuts move. Always
    taking a cheapest path, on which earlier moves may be taken back, gives the least cost.
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
            if readers[p] == readers[q]:  # p keeps what came, q gives as much
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
    """(cost of a token, most tokens) of a step from part p to q; 0 tokens where there is none."""
    if readers[p] == readers[q]:
        return 0, lengths[q] - 1
    if abs(p - q) > 1:
        return 0, 0
    back = -moved[min(p, q)] * (q - p)
    return (-1, back) if back > 0 else (1, sum(lengths))


def _cheapest_path(
    lengths: Sequence[int], moved: Sequence[int], readers: tuple[int, ...], room: Sequence[int]
) -> list[int]:
    """Parts from one whose reader has too many to one whose reader has room (Bellman and Ford)."""
    parts = range(len(lengths))
    paths = {p: (0, [p]) for p in parts if room[readers[p]] < 0 and lengths[p] > 1}
    for _ in parts:
        for p, q in itertools.permutations(parts, 2):
            cost, most = _edge(p, q, lengths, moved, readers)
            if p in paths and most and (q not in paths or paths[p][0] + cost < paths[q][0]):
                paths[q] = (paths[p][0] + cost, [*paths[p][1], q])
    return min(path for p, path in paths.items() if room[readers[p]] > 0)[1]


class TextSampler:
    """Hyperpretraining batches: T chunks, each an episode with G = 1.

    hyper_inputs, inputs and targets are as `data.text_split` has them, in layout "parts" too: every
    part ends in EOS anyway. With "concat", for a backbone that is trained to read it all itself:
    hyper_inputs = EOS alone and inputs = the other layout's hyper_inputs and inputs one after the
    other, which is the order that episodes have too.

    `stats` counts chunks and tokens that were made here.

    Raises:
        UserError: as `splitter_of`.
    """

    def __init__(
        self, chunks: ChunkSource, data_config: Any, seed: int, layout: str = "apart"
    ) -> None:
        assert layout in LAYOUTS, layout
        self.stats: Counter[str] = Counter()
        self.names: tuple[str, ...] = ()
        self._chunks = chunks
        self._config = data_config
        self._seed = seed % 2**63
        self._concat = layout == "concat"
        self._split = splitter_of(data_config)

    def batch(self, step: int, host: int = 0, hosts: int = 1) -> dict[str, np.ndarray]:
        """Batch `step`: hyper_inputs [T, Lh], inputs [T, 1, Li], targets [T, 1, Lt], tasks [T].

        All int32; tasks are zeros, because text has none (`names` is empty).
        With layout "concat", hyper_inputs are [T, 1] and inputs [T, 1, Lh + Li].
        Of several hosts one has its T / hosts slots (hosts.slots_of) and reads only their chunks.

        Raises:
            UserError: T is no multiple of `hosts`, or as the chunks.
        """
        c = self._config
        slots = slots_of(c.tasks_per_batch, host, hosts)
        count = len(slots)
        hyper = np.zeros((count, 1 if self._concat else c.hyper_length), np.int32)
        wide = c.input_length + (c.hyper_length if self._concat else 0)
        inputs = np.zeros((count, 1, wide), np.int32)
        targets = np.zeros((count, 1, c.target_length), np.int32)
        chunks = self._chunks.chunks(step * c.tasks_per_batch + slots.start, count)
        for row, chunk in enumerate(chunks):
            rng = np.random.default_rng([self._seed, 2, step, slots[row]])
            context, read, target = self._split(chunk, rng)
            if self._concat:
                context, read = np.array([EOS_ID]), np.concatenate([context, read])
            hyper[row, : len(context)] = context
            inputs[row, 0, : len(read)] = read
            targets[row, 0, : len(target)] = target
            self.stats["tokens"] += len(chunk)
        self.stats["chunks"] += count
        tasks = np.zeros(count, np.int32)
        return {"tasks": tasks, "hyper_inputs": hyper, "inputs": inputs, "targets": targets}
