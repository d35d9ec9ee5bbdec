"""From one format to another, one array in memory at a time; what was written is read back."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5 import metrics, names
from hyper_t5.errors import UserError
from hyper_t5.files import as_path, local_copy, replaced_folder, write_json
from hyper_t5.names import Params
from hyper_t5.t5 import T5Config
from hyper_t5.tensors import as_bytes, blocks
from hyper_t5.vocab import Vocabulary, load_vocab
from hyper_t5.weights import hf, native, t5x
from hyper_t5.weights.compatible import SHAPE_FIELDS
from hyper_t5.weights.load import STORAGE_DTYPES, open_source, storage_dtype
from hyper_t5.weights.source import Source, of_params

KINDS = ("t5x", "hf", "native")
SUMMARY = "convert.json"  # in the folder: what it was made from
# What the shapes of arrays do not tell, and so not a T5X checkpoint.
UNTOLD_BY_T5X = ("mlp_activations", "relpos_max_distance")
EVERY = 5.0  # seconds between lines of progress
Put = Callable[[str, np.ndarray], None]
Say = Callable[[str], None]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    kind: str = "",
    dtype: str = "",
    scanned: bool = False,
    vocab: str = "",
    shard_bytes: int = hf.SHARD_BYTES,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Writes the backbone at ``source`` as the folder ``out`` in another format, or in the same.

    Args:
      source: a folder of one of the three formats, a T5X `checkpoint` file, here or in a bucket.
      out: the new folder; for T5X the checkpoint itself, such as `checkpoint_1000000`.
      to: 't5x', 'hf' or 'native'.
      kind: the format of ``source``; '' is found out.
      dtype: 'float32' or 'bfloat16'; '' is as it is stored.
      scanned: with t5x, the tree of scalable_t5, whose layers are scanned.
      vocab: 'bytes' or a SentencePiece model, for a source that has none.
      shard_bytes: with hf, most in one file.
      say: gets lines of progress.

    Returns:
      What `convert.json` in the new folder says: formats, sizes, digest, seconds, peak memory.

    Raises:
      UserError: the source is damaged, or has numbers that are not finite; the target's format
        cannot say it; what is read back is not what was written. ``out`` is as it was.
    """
    if to not in KINDS:
        raise UserError(f"--to {to}: is not one of {', '.join(KINDS)}")
    if scanned and to != "t5x":
        raise UserError(f"--scanned: is a form of T5X checkpoints; leave it out with --to {to}")
    kept = storage_dtype(dtype, "--dtype") if dtype else None
    root = local_copy(source)
    found = open_source(root, kind)
    vocabulary = _vocabulary(found, root, vocab, to)
    started = time.perf_counter()

    def summary(digest: str) -> dict[str, Any]:
        dtypes = {_dtype_of(found, kept)(path).name for path in found.tensors}
        sizes = [math.prod(tensor.shape) for tensor in found.tensors.values()]
        return {
            "from": {"format": found.kind, "path": os.fspath(source)},
            "to": {"format": to, "path": os.fspath(out), "scanned": scanned},
            "sizes": dataclasses.asdict(found.sizes),
            "vocab": vocabulary.identity() if vocabulary else None,
            "dtype": "float32" if "float32" in dtypes else dtypes.pop(),
            "tensors": len(sizes),
            "parameters": sum(sizes),
            "digest": digest,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_mb": round(metrics.peak_memory_mb(), 1),
        }

    step = t5x.step_of(root) if found.kind == "t5x" else _step_of_name(out)
    options = {"step": step, "scanned": scanned, "shard_bytes": shard_bytes}
    return _write(out, to, found, kept, vocabulary, say, summary, **options)


def save(
    folder: str | os.PathLike[str],
    to: str,
    sizes: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Writes a backbone that is in memory; arrays keep their dtype.

    Args:
      folder: written under another name and then moved here; an earlier backbone here is replaced.
      to: 't5x', 'hf' or 'native'.
      sizes: the backbone's.
      params: its arrays (see `param_shapes`).
      vocab: its vocabulary, whose file goes into the folder too; not with T5X.

    Raises:
      UserError: `params` or `vocab` do not fit `sizes`, the format has no such network, the folder
        holds other files, no space is left.
    """
    _write(folder, to, of_params(sizes, params), None, vocab)


def save_native(
    folder: str | os.PathLike[str], sizes: T5Config, params: Params, vocab: Vocabulary | None = None
) -> None:
    """`save` as a native folder."""
    save(folder, "native", sizes, params, vocab)


def save_hf(
    folder: str | os.PathLike[str], sizes: T5Config, params: Params, vocab: Vocabulary | None = None
) -> None:
    """`save` as a Hugging Face folder, for `T5ForConditionalGeneration.from_pretrained`.

    Load it with `from_pretrained`: a model that transformers 5 builds from the config alone ties
    output and embedding whatever the config says.
    """
    save(folder, "hf", sizes, params, vocab)


def _vocabulary(found: Source, root: Path, given: str, to: str) -> Vocabulary | None:
    """The vocabulary that goes along: the source's own, else the given one; none with T5X."""
    if to == "t5x":
        if given:
            raise UserError("--vocab: a T5X checkpoint keeps no vocabulary; leave the flag out")
        return None
    if found.vocab is None:
        return load_vocab(given) if given else None
    if given:
        raise UserError(f"--vocab: {root} has a vocabulary of its own; leave the flag out")
    return load_vocab(found.vocab, root)


def _step_of_name(out: str | os.PathLike[str]) -> int:
    """The step that T5X's name of a checkpoint folder says."""
    match = re.fullmatch(r"checkpoint_(\d+)", Path(out).name)
    return int(match[1]) if match else 0


# ------------------------------------------------------------------------- writing, reading back


def _write(
    folder: str | os.PathLike[str],
    to: str,
    source: Source,
    dtype: np.dtype | None,
    vocab: Vocabulary | None,
    say: Say = lambda line: None,
    summary: Callable[[str], dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    if vocab and vocab.size > source.sizes.vocab_size:
        raise UserError(
            f"vocabulary: has {vocab.size} ids, but model.vocab_size is {source.sizes.vocab_size};"
            " a model needs a row of its embedding for each id"
        )
    with replaced_folder(folder, _owned(folder, to, vocab)) as new:
        with _writer(to, new, source, _dtype_of(source, dtype), vocab, options) as put:
            by_path = source.scanned or options.get("scanned", False)
            sums = _copy(source, _dtype_of(source, dtype), put, say, by_path)
        made = open_source(new, to)
        _compare_sizes(source, made, to)
        digest = _read_back(made, sums, say) or _digest(source, _dtype_of(source, dtype))
        content = summary(digest) if summary else {}
        if summary:
            write_json(new / SUMMARY, content)
    return content


@contextlib.contextmanager
def _writer(
    to: str,
    folder: Path,
    source: Source,
    dtype_of: Callable[[str], np.dtype],
    vocab: Vocabulary | None,
    options: dict[str, Any],
) -> Iterator[Put]:
    how = {"t5x": ("step", "scanned"), "hf": ("shard_bytes",), "native": ()}[to]
    more = {name: options[name] for name in how if name in options}
    make: Callable[..., contextlib.AbstractContextManager[Put]]
    if to == "t5x":
        made = t5x.writer(folder, source.sizes, dtype_of, **more)
    else:
        make = hf.writer if to == "hf" else native.writer
        made = make(folder, source.sizes, dtype_of, vocab, **more)
    with made as put:
        yield put


def _dtype_of(source: Source, dtype: np.dtype | None) -> Callable[[str], np.dtype]:
    """The dtype that an array is written in: the one asked for, else its own."""

    def of(path: str) -> np.dtype:
        own = STORAGE_DTYPES.get(source.tensors[path].dtype, STORAGE_DTYPES["float32"])
        return own if dtype is None else dtype

    return of


def _owned(folder: str | os.PathLike[str], to: str, vocab: Vocabulary | None) -> set[str]:
    """Which files an earlier folder of this kind may hold; such a folder is replaced."""
    target = as_path(folder)
    present = {p.name for p in target.iterdir()} if target.is_dir() else set()
    if to == "t5x":
        # A checkpoint of T5X itself has the same files: only what was converted is replaced.
        return present if SUMMARY in present else set()
    owned = {native.CONFIG, native.TENSORS, SUMMARY}
    if to == "native":
        return owned | {vocab.identity().get("file", "") if vocab else ""}
    shards = {name for name in present if hf.SHARD.fullmatch(name)}
    return owned | shards | {hf.INDEX, hf.SPIECE, hf.TOKENIZER}


def _copy(
    source: Source, dtype_of: Callable[[str], np.dtype], put: Put, say: Say, by_path: bool
) -> dict[str, int]:
    """Writes every array; a checksum of each. ``by_path``: its layers follow each other."""
    sums = {}
    progress = _Progress(source, "written", say)
    for path in names.t5x_paths(source.sizes) if by_path else sorted(source.tensors):
        array, dtype = source.tensors[path].read(), dtype_of(path)
        sums[path], finite = _examine(path, array, dtype)
        if not finite:
            name = source.describe(path, ())[0]
            raise UserError(
                f"{source.tensors[path].file}: {name} holds numbers that are not finite in"
                f" {dtype.name}; such a model computes nothing: take an undamaged checkpoint"
            )
        put(path, array)
        progress.did(path)
    return sums


def _examine(path: str, array: np.ndarray, dtype: np.dtype, digest: Any = None) -> tuple[int, bool]:
    """(checksum, whether all is finite) of an array as it is stored; added to a digest, if any."""
    checksum, finite = 0, True
    if digest:
        digest.update(names.digest_head(path, array.shape))
    for block in blocks(array):
        kept = as_bytes(block.astype(dtype, copy=False))
        checksum = zlib.crc32(kept.data, checksum)
        wide = kept.view(dtype).astype("<f4", copy=False)
        finite = finite and bool(np.isfinite(wide).all())
        if digest:
            digest.update(as_bytes(wide).data)
    return checksum, finite


def _compare_sizes(source: Source, made: Source, to: str) -> None:
    """UserError where a reader of what was written would take it for another network."""
    ours, theirs = dataclasses.asdict(source.sizes), dataclasses.asdict(made.sizes)
    shape = [field for field in SHAPE_FIELDS if ours[field] != theirs[field]]
    if to == "t5x" and set(shape) <= set(UNTOLD_BY_T5X):
        return
    if shape:
        raise UserError(f"{made.where}: {shape[0]} was read back as {theirs[shape[0]]}")


def _digest(source: Source, dtype_of: Callable[[str], np.dtype]) -> str:
    """The digest in a pass of its own; slow where each layer is cut from an array of all."""
    result = hashlib.sha256()
    for path in sorted(source.tensors):
        _examine(path, source.tensors[path].read(), dtype_of(path), result)
    return result.hexdigest()


def _read_back(made: Source, sums: dict[str, int], say: Say) -> str:
    """Compares every array with what was to be written; the digest, where the order is that."""
    result = None if made.scanned else hashlib.sha256()
    progress = _Progress(made, "compared", say)
    for path in made.order():
        array = made.tensors[path].read()
        if _examine(path, array, array.dtype, result)[0] != sums[path]:
            name = made.describe(path, ())[0]
            raise UserError(f"{made.where}: {name} was read back otherwise than it was written")
        progress.did(path)
    return result.hexdigest() if result else ""


class _Progress:
    """Lines such as `written: tensor 20/200, 1.1 of 44.5 GB, 12 s left`, now and then."""

    def __init__(self, source: Source, what: str, say: Say) -> None:
        self._what, self._say = what, say
        self._bytes = {
            path: math.prod(t.shape) * STORAGE_DTYPES.get(t.dtype, np.dtype("float32")).itemsize
            for path, t in source.tensors.items()
        }
        self._total, self._count, self._done = sum(self._bytes.values()), 0, 0
        self._started = self._said = time.perf_counter()

    def did(self, path: str) -> None:
        self._count += 1
        self._done += self._bytes[path]
        now = time.perf_counter()
        if now - self._said < EVERY and self._count < len(self._bytes):
            return
        self._said = now
        left = (now - self._started) * (self._total / max(1, self._done) - 1)
        self._say(
            f"{self._what}: tensor {self._count}/{len(self._bytes)},"
            f" {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {left:.0f} s left"
        )
