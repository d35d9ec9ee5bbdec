"""Conversion between formats, one array at a time; the result is read back and compared."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hyper_t5.data.vocab import Vocabulary, load_vocab
from hyper_t5.t5 import T5Config
from hyper_t5.utils import memory
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.files import as_path, local_copy, replaced_folder, write_json
from hyper_t5.utils.safetensors_io import as_bytes, blocks
from hyper_t5.weights import hf, native, param_names, t5x
from hyper_t5.weights.load import open_source, storage_dtype
from hyper_t5.weights.param_names import Params, layer_shapes
from hyper_t5.weights.source import TensorSource, Write, from_params

FORMATS = ("t5x", "hf", "native")
SUMMARY = "convert.json"  # in the new folder: the return value of `convert`
PROGRESS_SECONDS = 5.0
Log = Callable[[str], None]


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    source_format: str = "",
    dtype: str = "",
    scanned: bool = False,
    vocab: str = "",
    log: Log = lambda line: None,
) -> dict[str, Any]:
    """Write a backbone in another format or dtype.

    Args:
      source: A folder of one of the three formats or a T5X `checkpoint` file, local or in a bucket.
      out: The new folder; for T5X the checkpoint itself, such as `checkpoint_1000000`.
      to: `t5x`, `hf` or `native`.
      source_format: The format of `source`; empty detects it.
      dtype: `float32` or `bfloat16`; empty keeps the stored dtype.
      scanned: With t5x, write the tree of scalable_t5, whose layers are scanned.
      vocab: `bytes` or a SentencePiece model, for a source without a vocabulary.
      log: Receives lines of progress.

    Returns:
      The content of `convert.json` in the new folder: formats, sizes, digest, seconds, memory.

    Raises:
      UserError: The source is damaged or not finite, the format cannot express it, or the result
        differs when it is read back. `out` is not changed.
    """
    if to not in FORMATS:
        raise UserError(f"--to {to}: is not one of {', '.join(FORMATS)}")
    if scanned and to != "t5x":
        raise UserError(f"--scanned: is a layout of T5X checkpoints; leave it out with --to {to}")
    storage = storage_dtype(dtype, "--dtype") if dtype else None
    root = local_copy(source)
    tensors = open_source(root, source_format).astype(storage)
    vocabulary = _vocabulary(tensors, root, vocab, to)
    sizes = [math.prod(tensor.shape) for tensor in tensors.tensors.values()]
    dtypes = {tensor.dtype for tensor in tensors.tensors.values()}
    summary = {
        "from": {"format": tensors.format, "path": os.fspath(source)},
        "to": {"format": to, "path": os.fspath(out), "scanned": scanned},
        "sizes": dataclasses.asdict(tensors.config),
        "vocab": vocabulary.identity() if vocabulary else None,
        "dtype": "float32" if "float32" in dtypes else "bfloat16",
        "tensors": len(sizes),
        "parameters": sum(sizes),
    }
    return _write(out, to, tensors, vocabulary, summary, log, scanned)


def save(
    folder: str | os.PathLike[str],
    to: str,
    config: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Write a backbone in memory; an existing backbone is replaced atomically.

    `params` (see `param_names.param_shapes`) keep their dtype. The vocabulary is saved in the
    folder, except for T5X.

    Raises:
      UserError: Parameters or vocabulary do not fit, or the folder holds other files.
    """
    _write(folder, to, from_params(config, params).astype(None), vocab)


def save_native(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Call `save` for a native folder."""
    save(folder, "native", config, params, vocab)


def save_hf(
    folder: str | os.PathLike[str],
    config: T5Config,
    params: Params,
    vocab: Vocabulary | None = None,
) -> None:
    """Call `save` for a folder that `T5ForConditionalGeneration.from_pretrained` loads."""
    save(folder, "hf", config, params, vocab)


def _vocabulary(source: TensorSource, root: Path, vocab: str, to: str) -> Vocabulary | None:
    """Return the source's vocabulary, or the one of `--vocab`; None for T5X."""
    if vocab and to == "t5x":
        raise UserError("--vocab: a T5X checkpoint stores no vocabulary; leave the flag out")
    if vocab and source.vocab:
        raise UserError(f"--vocab: {root} has its own vocabulary; leave the flag out")
    if to == "t5x" or not (vocab or source.vocab):
        return None
    return load_vocab(source.vocab, root) if source.vocab else load_vocab(vocab)


def _write(
    folder: str | os.PathLike[str],
    to: str,
    source: TensorSource,
    vocab: Vocabulary | None,
    summary: dict[str, Any] | None = None,
    log: Log = lambda line: None,
    scanned: bool = False,
) -> dict[str, Any]:
    """Write a folder, read it back, and add the digest and the cost to its summary."""
    started = time.perf_counter()
    config = source.config
    if vocab and vocab.size > config.vocab_size:
        raise UserError(
            f"vocabulary: has {vocab.size} ids, but model.vocab_size is {config.vocab_size}; use"
            " the vocabulary of the model"
        )
    writer: contextlib.AbstractContextManager[Write]
    with replaced_folder(folder, _replaceable(folder, to, vocab)) as new:
        if to == "t5x":
            step = re.fullmatch(r"checkpoint_(\d+)", Path(folder).name)
            writer = t5x.writer(new, config, source.dtype_of, int(step[1]) if step else 0, scanned)
        else:
            make_writer = hf.writer if to == "hf" else native.writer
            writer = make_writer(new, config, source.dtype_of, vocab)
        with writer as write:
            checksums = _copy(source, write, log)
        digest = _verify(open_source(new, to), checksums, log) or _digest(source)
        if summary is None:
            return {}
        seconds = time.perf_counter() - started
        summary |= {"digest": digest, "seconds": round(seconds, 3)}
        summary |= {"peak_memory_mb": round(memory.peak_memory_mb(), 1)}
        write_json(new / SUMMARY, summary)
    return summary


def _replaceable(folder: str | os.PathLike[str], to: str, vocab: Vocabulary | None) -> set[str]:
    """List the files that an existing folder may hold if it is to be replaced."""
    target = as_path(folder)
    present = {file.name for file in target.iterdir()} if target.is_dir() else set()
    if to == "t5x":
        # T5X's own checkpoints have the same files: only our conversions are replaced.
        return present if SUMMARY in present else set()
    names = {native.CONFIG, native.TENSORS, SUMMARY}
    if to == "hf":
        return names | {hf.SPIECE, hf.TOKENIZER}
    return names | {vocab.identity().get("file", "") if vocab else ""}


def _copy(source: TensorSource, write: Write, log: Log) -> dict[str, int]:
    """Write all arrays, the layers of each one after another; return their checksums."""
    checksums = {}
    for path in _with_progress(layer_shapes(source.config), "written", log):
        array = source.tensors[path].read()
        checksums[path], finite = _scan(array)
        if not finite:
            raise UserError(
                f"{source.tensors[path].file}: {_stored_name(source, path)} is not finite in"
                f" {array.dtype.name}; use an undamaged checkpoint"
            )
        write(path, array)
    return checksums


def _verify(written: TensorSource, checksums: dict[str, int], log: Log) -> str:
    """Compare the written arrays with the checksums; return the digest, empty if scanned."""
    digest = None if written.scanned else hashlib.sha256()
    for path in _with_progress(written.read_order(), "compared", log):
        array = written.tensors[path].read()
        if digest:
            digest.update(param_names.digest_header(path, array.shape))
        if _scan(array, digest)[0] != checksums[path]:
            name = _stored_name(written, path)
            raise UserError(f"{written.path}: {name} differs when it is read back; write it again")
    return digest.hexdigest() if digest else ""


def _scan(array: np.ndarray, digest: Any = None) -> tuple[int, bool]:
    """Return the CRC-32 of an array and whether it is finite; add its values to a digest."""
    checksum, finite = 0, True
    for block in blocks(array):
        data = as_bytes(block)
        checksum = zlib.crc32(data.data, checksum)
        values = data.view(array.dtype).astype("<f4", copy=False)
        finite = finite and bool(np.isfinite(values).all())
        if digest:
            digest.update(as_bytes(values).data)
    return checksum, finite


def _digest(source: TensorSource) -> str:
    """Compute the digest in a pass of its own, for targets that are not read in its order."""
    digest = hashlib.sha256()
    for path in sorted(source.tensors):
        param_names.update_digest(digest, path, source.tensors[path].read())
    return digest.hexdigest()


def _stored_name(source: TensorSource, path: str) -> str:
    return param_names.hf_name(path) if source.format == "hf" else path


def _with_progress(paths: Collection[str], verb: str, log: Log) -> Iterator[str]:
    """Yield the paths, and log lines such as `written: tensor 20/200`."""
    logged = time.perf_counter()
    for count, path in enumerate(paths, 1):
        yield path
        now = time.perf_counter()
        if now - logged > PROGRESS_SECONDS or count == len(paths):
            log(f"{verb}: tensor {count}/{len(paths)}")
            logged = now
