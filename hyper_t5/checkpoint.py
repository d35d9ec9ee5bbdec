"""Checkpoints that are whole or do not count. The only module that knows Orbax.

    WORKDIR/checkpoints/STEP/state/          the arrays, as Orbax writes them: each host its part
    WORKDIR/checkpoints/STEP/meta.json       what the caller wants beside them: JSON
    WORKDIR/checkpoints/STEP/COMMITTED.json  dtype and shape of every leaf, CRC-32 of every shard
                                             of it; written last

Everything is written to `STEP.tmp`, which is renamed when it is complete; on `gs://`, which renames
nothing at once, to `STEP` itself, whose record is written last. Orbax alone is not enough: it
restores flipped bytes without a word, casts a leaf of another dtype, and takes an empty folder for
the newest step. So a step counts only when its record is there, and every byte is checked against
the record before it is used.

Orbax writes, TensorStore reads. A shard that was written is a chunk of the stored array, which can
only be read whole. So a reader takes the whole shards that its own overlap, checks them, and cuts
its own from them: the check holds on any mesh and any number of hosts, and reads no byte twice. It
costs 0.4 s of one core a GB, on top of the 1.4 s that reading and decompressing takes.

With several processes, the workdir is a folder that all of them see. `Checkpointer`, `restore` and
`load_subtree` are then for all of them together: they meet in the coordination service, never in
a collective of the devices, so that a save may go on while the devices train.

Leaves are named by their path, `params/encoder/layers/mlp/wo/kernel`; a tuple's items are `0`, `1`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from hyper_t5 import distributed, files
from hyper_t5.errors import UserError

FOLDER, STATE, META, RECORD = "checkpoints", "state", "meta.json", "COMMITTED.json"
FORMAT = "hyper_t5.checkpoint/2"
FORMATS = (FORMAT, "hyper_t5.checkpoint/1")  # the older one holds one CRC-32 for a whole leaf

PathLike = str | os.PathLike[str]
Region = tuple[tuple[int, int], ...]  # (start, stop) in each dimension
HostShards = dict[str, list[tuple[Region, np.ndarray]]]  # by leaf: what this process writes

log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A checkpoint cannot be used; the message is the reason."""


class Checkpointer:
    """Writes checkpoints of one run in the background, and removes old ones.

    A failed save raises UserError from the next `poll`, `wait`, `save` or `close`, on every process
    also when only one of them could not write; by then its files are removed, and the checkpoints
    before it are as they were. As a context manager it closes itself.

    Args:
        workdir: folder of the run; a path of this machine or `gs://`.
        keep: how many of the newest steps stay; 0 is all.
        keep_period: steps that are a multiple of it stay for good; 0 is none.
    """

    def __init__(self, workdir: PathLike, keep: int = 3, keep_period: int = 0) -> None:
        self._root = files.as_path(workdir) / FOLDER
        self._keep, self._keep_period = keep, keep_period
        reason = ""
        if distributed.is_first():
            try:
                self._root.mkdir(parents=True, exist_ok=True)
                _remove_stale(self._root)
            except Exception as error:  # each file system has errors of its own
                reason = _one_line(error)
        if reason := distributed.agree("checkpoint/open", reason):
            raise _save_error(self._root, reason)
        self._orbax = _handler()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy the state to the host and return; the files are written in the background.

        Of an array over several hosts each copies and writes the shards that are its own, and of
        those that several devices hold alike, one does.

        Args:
            step: names the folder; a checkpoint that is already there is replaced.
            state: pytree of arrays. Random keys go in as raw data (`jax.random.key_data`). With
                several processes every jax.Array spans all of them.
            meta: anything JSON can hold; `step` is added.
        """
        self.wait()
        text = _json({**meta, "step": step})
        final = self._root / str(step)
        folder = self._begin(final)
        arrays = {
            name: leaf if isinstance(leaf, jax.Array) else np.array(leaf, copy=True)
            for name, leaf in _by_name(state).items()
        }
        shards = _host_shards(arrays)
        # In the pool's thread: a caller in a notebook has an event loop of its own.
        started = self._pool.submit(_start_writing, self._orbax, folder / STATE, arrays)
        started.exception()  # waits; what it raised is raised again where all processes hear of it
        kinds = {name: _kind(leaf) for name, leaf in arrays.items()}
        self._pending = self._pool.submit(self._write, final, folder, started, shards, kinds, text)

    def poll(self) -> None:
        """Raise if a save has failed by now; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, and let the writing thread go."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error on its way is the one to see

    def _begin(self, final: epath.Path) -> epath.Path:
        """The empty folder that all processes write to, made by the first.

        Here and in `_write` any error is a reason to tell: the others wait for this one's word.
        """
        folder = final.with_name(f"{final.name}.tmp") if files.is_local(final) else final
        reason = ""
        if distributed.is_first():
            try:
                _remove(folder)
                (folder / STATE).mkdir(parents=True, exist_ok=True)
            except Exception as error:
                reason = _one_line(error)
        told = distributed.agree("checkpoint/begin", {"step": final.name, "reason": reason})
        if told["step"] != final.name:
            raise ValueError(f"this process saves step {final.name}, the first {told['step']}")
        if told["reason"]:
            raise _save_error(final, told["reason"])
        return folder

    def _write(
        self,
        final: epath.Path,
        folder: epath.Path,
        started: Future[list[Any]],
        shards: HostShards,
        kinds: dict[str, Any],
        meta: bytes,
    ) -> None:
        """Finish one save; the same on every process, and it ends alike on all of them."""
        mine, digests, reason = distributed.index(), b"", ""
        try:
            digests = _json({name: _digests(parts) for name, parts in shards.items()})
            _wait_for_all(started.result())
            if mine:
                files.write_bytes(folder / f"shards_{mine}.json", digests)
        except Exception as error:
            reason = _one_line(error)
        # The digests of a pod are megabytes, too much to pass around: the first process reads them.
        told = distributed.gather("checkpoint/written", {"reason": reason, "crc": _crc(digests)})
        reason = _reason_of([one["reason"] for one in told])
        if distributed.is_first():
            try:
                if not reason:
                    found = _gathered_digests(folder, digests, [one["crc"] for one in told])
                    self._commit(final, folder, _described(kinds, found), meta)
            except Exception as error:
                reason = _one_line(error)
            if reason:
                _remove_quietly(folder)
        if reason := distributed.agree("checkpoint/committed", reason):
            raise _save_error(final, reason)

    def _commit(
        self, final: epath.Path, folder: epath.Path, leaves: dict[str, Any], meta: bytes
    ) -> None:
        """Make a step of what all processes have written, then let old steps go."""
        self._orbax.finalize(folder / STATE)
        files.write_bytes(folder / META, meta)
        step = int(final.name)
        record = {"format": FORMAT, "step": step, "meta": _crc(meta), "leaves": leaves}
        whole = {"record": record, "crc32": _crc(_json(record))}
        files.write_bytes(folder / RECORD, _json(whole))
        if folder != final:
            old = final.with_name(f"{final.name}.old.tmp")
            _remove(old)
            if final.exists():
                final.rename(old)
            folder.rename(final)
            _remove_quietly(old)
        # Later steps belong to a future that was given up, say after damage: they count for nothing
        # here, or the step just written might be the one to go.
        past = (other for other in _step_folders(self._root) if int(other.name) <= step)
        kept = list(itertools.islice(_committed(past, warn=False), self._keep or None))
        for other in _step_folders(self._root) if self._keep else []:
            number = int(other.name)
            for_good = self._keep_period and number % self._keep_period == 0
            if number < int(kept[-1].name) and not for_good and (other / RECORD).exists():
                _remove_quietly(other)


def save(workdir: PathLike, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Write one checkpoint, delete none, and return when it is on the disk. See `Checkpointer`."""
    with Checkpointer(workdir, keep=0) as checkpointer:
        checkpointer.save(step, state, meta)


def latest_step(workdir: PathLike) -> int | None:
    """The newest committed step, or None. Its arrays are not read yet. For any one process."""
    folders = _committed(_step_folders(files.as_path(workdir) / FOLDER))
    return next((int(folder.name) for folder in folders), None)


def digest(workdir: PathLike) -> str:
    """Of all that the newest committed step holds, by its record; '' without one.

    Its arrays are not read. For any one process.
    """

    def read(folder: epath.Path) -> str:
        return hashlib.sha256(_json(_read_record(folder))).hexdigest()

    if latest_step(workdir) is None:
        return ""
    return _first_good(files.as_path(workdir), read, together=False)


def restore(workdir: PathLike, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
    """Read a whole state back, bit for bit, onto any mesh and any number of hosts.

    Args:
        workdir: folder of the run.
        step: the step to read, and no other; None is the newest that is not damaged. Damaged ones
            are passed over with a warning, by all processes when one of them finds damage.
        target: the state's tree of arrays or ShapeDtypeStructs. Each leaf goes where its target's
            sharding says, and a leaf without one is left uncommitted: a scalar bound to device 0
            could not enter a jit over the whole mesh.

    Returns:
        The state, in the target's structure, and meta.

    Raises:
        UserError: there is no undamaged checkpoint, or leaves, shapes or dtypes differ from target.
    """
    wanted = _by_name(target)
    root = files.as_path(workdir)
    path = root / FOLDER / str(step) if step is not None else root

    def read(folder: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
        record = _read_record(folder)
        _compare(folder, record["leaves"], wanted)
        return _read_leaves(folder, record["leaves"], wanted), _read_meta(folder, record)

    leaves, meta = _first_good(path, read)
    return jax.tree.unflatten(jax.tree.structure(target), list(leaves.values())), meta


def load_subtree(path: PathLike, name: str, target: Any = None) -> tuple[Any, dict[str, Any]]:
    """Read one branch of a state, and nothing else of it: how one run takes over from another.

    Args:
        path: folder of a run (its newest undamaged checkpoint), or of one step.
        name: `params`, or deeper: `params/heads`.
        target: the branch's tree of arrays or ShapeDtypeStructs, as of `restore`; None is numpy
            arrays, whole on every process.

    Returns the branch, in the target's structure or as nested dicts, and meta. Raises UserError
    when there is no undamaged checkpoint, no such branch in it, or it is not as the target.
    """

    def read(folder: epath.Path) -> tuple[Any, dict[str, Any]]:
        record = _read_record(folder)
        inside = {k: v for k, v in record["leaves"].items() if f"{k}/".startswith(f"{name}/")}
        if not inside:
            top = ", ".join(sorted({leaf.split("/")[0] for leaf in record["leaves"]}))
            raise UserError(f"checkpoint {folder} has no {name!r}; it has: {top}")
        wanted: dict[str, Any] = dict.fromkeys(inside)
        if target is not None:
            wanted = {f"{name}/{k}".rstrip("/"): like for k, like in _by_name(target).items()}
            _compare(folder, inside, wanted)
        leaves = _read_leaves(folder, inside, wanted)
        if target is not None:
            tree = jax.tree.unflatten(jax.tree.structure(target), list(leaves.values()))
        else:
            tree = _nested(leaves)
            for key in name.split("/"):
                tree = tree[key]
        return tree, _read_meta(folder, record)

    return _first_good(files.as_path(path), read)


def read_meta(path: PathLike) -> dict[str, Any]:
    """Meta alone, of a run's newest checkpoint or of one step's folder; UserError if none.

    For any one process: it waits for no other.
    """

    def read(folder: epath.Path) -> dict[str, Any]:
        return _read_meta(folder, _read_record(folder))

    return _first_good(files.as_path(path), read, together=False)


# ------------------------------------------------------------------------------ which step is good


def _first_good(path: epath.Path, read: Callable[[epath.Path], Any], together: bool = True) -> Any:
    """What `read` makes of the newest folder in which it finds no damage.

    ``together``: all processes read, and pass over a folder in which any of them finds damage.
    """
    reason = "there is none"
    for folder in _agreed(path, together):
        damage, refused, made = "", "", None
        try:
            made = read(folder)
        except _DamagedError as error:
            damage = str(error)
        except UserError as error:
            refused = str(error)
        if together:
            told = distributed.gather("checkpoint/read", {"damage": damage, "refused": refused})
            damage = _reason_of([one["damage"] for one in told])
            refused = next((one["refused"] for one in told if one["refused"]), "")
        if refused:
            raise UserError(refused)
        if not damage:
            return made
        reason = f"{folder} is damaged: {damage}"
        if distributed.is_first() or not together:
            log.warning("checkpoint %s", reason)
    raise UserError(f"no usable checkpoint at {path} ({reason}); name another folder, or train")


def _agreed(path: epath.Path, together: bool) -> Iterator[epath.Path]:
    """The folders that may be read, best first, as process 0 sees them where all read together."""
    is_step = path.parent.name == FOLDER and path.name.isdigit()
    folders: Iterator[epath.Path] = iter([path] if is_step and path.exists() else [])
    if not is_step and (distributed.is_first() or not together):
        folders = _committed(_step_folders(path / FOLDER))
    while True:
        name = next((folder.name for folder in folders), "")
        if together:
            name = distributed.agree("checkpoint/step", name)
        if not name:
            return
        yield path if is_step else path / FOLDER / name


def _step_folders(root: epath.Path) -> list[epath.Path]:
    """Folders named like steps, newest first."""
    found = (folder for folder in root.iterdir()) if root.exists() else ()
    steps = [folder for folder in found if folder.name.isdigit()]
    return sorted(steps, key=lambda folder: int(folder.name), reverse=True)


def _committed(folders: Iterable[epath.Path], warn: bool = True) -> Iterator[epath.Path]:
    """Those that hold a step with a sound record. Read one by one, as they are asked for."""
    for folder in folders:
        try:
            _read_record(folder)
        except _DamagedError as error:
            if warn:
                log.warning("checkpoint %s does not count: %s", folder, error)
            continue
        yield folder


def _remove_stale(root: epath.Path) -> None:
    """Remove what a run that was killed while it wrote has left; it can be large."""
    for folder in list(root.iterdir()):
        local = files.is_local(root)
        unfinished = folder.name.isdigit() and not local and not (folder / RECORD).exists()
        if folder.name.endswith(".tmp") or unfinished:
            _remove_quietly(folder)


def _remove(folder: epath.Path) -> None:
    """Remove a step's folder, its record first: half a folder must not count."""
    if folder.exists():
        (folder / RECORD).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)  # the clients of buckets remember what was for seconds


def _wait_for_all(writings: list[Any]) -> None:
    """Raise the first error once all have ended: while one writes, its folder cannot be removed."""
    errors = []
    for writing in writings:
        try:
            writing.result()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _remove_quietly(folder: epath.Path) -> None:
    """Remove a folder that nobody needs; what cannot be removed now goes at the next start."""
    try:
        if folder.name.isdigit() and files.is_local(folder):
            # First to a name that counts for nothing: a kill may come at any moment.
            folder = folder.rename(folder.with_name(f"{folder.name}.old.tmp"))
        _remove(folder)
    except Exception as error:  # each file system has errors of its own
        log.info("could not remove %s: %s", folder, _one_line(error))


def _read_record(folder: epath.Path) -> dict[str, Any]:
    try:
        whole = json.loads(files.read_bytes(folder / RECORD))
        if whole["crc32"] != _crc(_json(whole["record"])):
            raise ValueError("its checksum is wrong")
        if whole["record"]["format"] not in FORMATS:
            raise ValueError(f"its format is {whole['record']['format']}, not {FORMAT}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _DamagedError(f"{RECORD} is missing or broken: {_one_line(error)}") from error
    return whole["record"]


def _read_meta(folder: epath.Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        content = files.read_bytes(folder / META)
    except OSError as error:
        raise _DamagedError(_one_line(error)) from error
    if _crc(content) != record["meta"]:
        raise _DamagedError(f"{META} is not as it was written")
    return json.loads(content)


def _compare(folder: epath.Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise UserError at the first leaf that is in one of the two only, or of another kind."""
    advice = "give the config it was made with, or another workdir"
    for name in sorted(found.keys() | wanted.keys()):
        here = need = "no such leaf"
        if name in found:
            here = f"{found[name]['dtype']}{found[name]['shape']}"
        if name in wanted:
            need = f"{wanted[name].dtype}{list(wanted[name].shape)}"
        if here != need:
            raise UserError(f"checkpoint {folder}: {name} is {here}, expected {need}; {advice}")


# -------------------------------------------------------------------------------------- the writing


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Orbax, without its barriers: it has those in the classes around the handler.

    A shard is written by the one process that holds its replica 0. Orbax would cut replicas among
    the processes, and its chunks would no longer be the shards that we have digests of.
    """
    logging.getLogger("absl").addFilter(_is_news)
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=False, enable_write_sharding_file=False
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=registry, enable_pinned_host_transfer=False
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Not so what Orbax logs: an error, with its traceback, comes to us as an exception too."""
    return "orbax" not in record.pathname


def _start_writing(
    orbax: ocp.PyTreeCheckpointHandler, folder: epath.Path, arrays: dict[str, Any]
) -> list[Any]:
    """Have Orbax copy the arrays to the host and begin to write; what is to be waited for."""
    request = ocp.args.PyTreeSave(_nested(arrays))
    return asyncio.run(orbax.async_save(folder, args=request)) or []


def _host_shards(leaves: dict[str, Any]) -> HostShards:
    """Host copies of the shards of all leaves that are this process's to write."""
    shards: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            shards[name] = [(_whole(leaf.shape), leaf)] if distributed.is_first() else []
            continue
        if distributed.count() > 1 and leaf.is_fully_addressable:
            raise ValueError(f"{name} lies on one of the processes only; give it a global sharding")
        mine = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
        for shard in mine:
            shard.data.copy_to_host_async()
        shards[name] = [(_region(shard.index, leaf.shape), shard.data) for shard in mine]
    # JAX keeps the host's copy of a shard, which is the one that Orbax will write.
    return {name: [(at, np.asarray(x)) for at, x in parts] for name, parts in shards.items()}


def _digests(parts: list[tuple[Region, np.ndarray]]) -> dict[str, str]:
    """CRC-32 of each shard of a leaf, by its place."""
    return {_place_name(region): _crc(_bytes_of(array)) for region, array in parts}


def _gathered_digests(
    folder: epath.Path, own: bytes, checks: list[str]
) -> dict[str, dict[str, str]]:
    """The digests of all processes; of the others from the files that they left."""
    found: dict[str, dict[str, str]] = json.loads(own)
    for process, check in enumerate(checks[1:], start=1):
        file = folder / f"shards_{process}.json"
        content = files.read_bytes(file)
        if _crc(content) != check:
            raise ValueError(f"{file} is not as process {process} wrote it")
        for name, parts in json.loads(content).items():
            found[name].update(parts)
        file.unlink()
    return found


def _described(kinds: dict[str, Any], found: dict[str, dict[str, str]]) -> dict[str, Any]:
    """The record's lines: every leaf with its kind and its shards, which must be all of it."""
    lines = {}
    for name, kind in kinds.items():
        line = kind | {"shards": found[name]}
        covered = sum(math.prod(b - a for a, b in region) for region in _shards_of(line))
        if covered != math.prod(line["shape"]):
            raise ValueError(f"{name}: the processes wrote {covered} numbers of {line['shape']}")
        lines[name] = line
    return lines


def _kind(array: Any) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


# -------------------------------------------------------------------------------------- the reading


def _read_leaves(
    folder: epath.Path, lines: dict[str, Any], wanted: dict[str, Any]
) -> dict[str, Any]:
    """The wanted leaves, each checked against its line in the record and put where it belongs.

    ``wanted``: by name an array or ShapeDtypeStruct; None: numpy.
    """
    import tensorstore

    context = tensorstore.Context({"cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})

    def read(name: str) -> dict[Region, np.ndarray]:
        regions = _regions_of(wanted[name], tuple(lines[name]["shape"]))
        return _read_leaf(folder, name, lines[name], regions, context)

    # Opening a leaf, its CRC and its copies take their time beside the reading of others.
    with ThreadPoolExecutor(4, "restore") as pool:
        parts = zip(wanted.items(), pool.map(read, wanted), strict=True)
        return {name: _placed(regions, like) for (name, like), regions in parts}


def _read_leaf(
    folder: epath.Path, name: str, line: dict[str, Any], wanted: set[Region], context: Any
) -> dict[Region, np.ndarray]:
    """The wanted regions of a leaf, from its stored shards, of which each is checked."""
    made: dict[Region, np.ndarray] = {}
    try:
        store = _open_leaf(folder, name, context)
        dtype = store.dtype.numpy_dtype
        if (str(dtype), list(store.shape)) != (line["dtype"], line["shape"]):
            raise _DamagedError(f"leaf {name} is stored as {dtype}{list(store.shape)}")
        touched = {
            stored: check
            for stored, check in _shards_of(line).items()
            if any(_overlap(stored, region) is not None for region in wanted)
        }
        reads = [store[_slices(stored)].read(order="C") for stored in touched]
        for (stored, check), reading in zip(touched.items(), reads, strict=True):
            array = np.asarray(reading.result())
            if _crc(_bytes_of(array)) != check:
                at = f" at [{_place_name(stored)}]" if len(line.get("shards", ())) > 1 else ""
                raise _DamagedError(f"leaf {name}{at} is not as it was written")
            _cut(array, stored, wanted, made)
    except _DamagedError:
        raise
    except Exception as error:  # TensorStore raises whatever its layers raise
        raise _DamagedError(f"leaf {name}: {_one_line(error)}") from error
    return made


def _open_leaf(folder: epath.Path, name: str, context: Any) -> Any:
    """A leaf as a TensorStore, where Orbax puts it."""
    import tensorstore

    place = f"{os.fspath(folder / STATE)}/"
    store = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": place} if files.is_local(folder) else place,
        "path": f"{name.replace('/', '.')}/",
        "cache_pool": "cache_pool#ocdbt",
    }
    spec = {"driver": "zarr", "kvstore": store}
    return tensorstore.open(spec, open=True, read=True, context=context).result()


def _cut(
    array: np.ndarray, stored: Region, wanted: set[Region], made: dict[Region, np.ndarray]
) -> None:
    """Copy what a stored shard holds of the wanted regions into them."""
    if stored in wanted:
        made[stored] = array  # on the mesh that it was written on, nothing is copied
    for region in wanted - {stored}:
        common = _overlap(stored, region)
        if common is None:
            continue
        if region not in made:
            made[region] = np.empty([b - a for a, b in region], array.dtype)
        made[region][_within(common, region)] = array[_within(common, stored)]


def _regions_of(like: Any, shape: tuple[int, ...]) -> set[Region]:
    """Which regions of a leaf this process needs for its target."""
    sharding = _sharding_of(like)
    if sharding is None:
        return {_whole(shape)}
    return {_region(at, shape) for at in sharding.addressable_devices_indices_map(shape).values()}


def _placed(regions: dict[Region, np.ndarray], like: Any) -> Any:
    """A leaf made of its regions, where its target is."""
    sharding = _sharding_of(like)
    if sharding is None:
        [array] = regions.values()
        return array if like is None or _is_numpy(like) else jax.device_put(array)
    shape = tuple(like.shape)
    return jax.make_array_from_callback(
        shape, sharding, lambda at: regions[_region(at or (), shape)]
    )


def _sharding_of(like: Any) -> Any:
    """The sharding that a target binds its leaf to, or None."""
    floating = isinstance(like, jax.Array) and not like.committed
    return None if like is None or _is_numpy(like) or floating else like.sharding


def _is_numpy(like: Any) -> bool:
    return isinstance(like, np.ndarray | np.generic)


# ------------------------------------------------------------------------------ regions of an array


def _region(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    """A region from JAX's slices, which leave ends open."""
    cuts = [cut.indices(size) for cut, size in zip(index, shape, strict=True)]
    return tuple((start, stop) for start, stop, _ in cuts)


def _whole(shape: tuple[int, ...]) -> Region:
    return tuple((0, size) for size in shape)


def _overlap(one: Region, other: Region) -> Region | None:
    """What two regions have in common; None: nothing."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(start >= stop for start, stop in common) else common


def _within(part: Region, region: Region) -> tuple[slice, ...]:
    """Where a part lies in an array that holds a region."""
    pairs = zip(part, region, strict=True)
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in region)


def _place_name(region: Region) -> str:
    """`0:4,8:16`, as in Python; of a scalar it is empty."""
    return ",".join(f"{start}:{stop}" for start, stop in region)


def _shards_of(line: dict[str, Any]) -> dict[Region, str]:
    """Region and CRC-32 of each stored shard of a leaf."""
    if "shards" not in line:
        return {_whole(tuple(line["shape"])): line["crc32"]}
    return {
        tuple((int(a), int(b)) for a, b in (cut.split(":") for cut in place.split(",") if cut)): crc
        for place, crc in line["shards"].items()
    }


# ------------------------------------------------------------------------------------ small helpers


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"two leaves have one name: {sorted(names)}")
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(leaves, sep="/")


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _crc(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _reason_of(reasons: list[str]) -> str:
    """The first reason that a process gave, and which one, where there are several."""
    for process, reason in enumerate(reasons):
        if reason:
            return f"process {process}: {reason}" if len(reasons) > 1 else reason
    return ""


def _one_line(error: BaseException) -> str:
    # TensorStore appends its whole specification, and where in its source it was.
    text = str(error).split(" [tensorstore_spec")[0].split(" [source locations")[0]
    return " ".join((text or type(error).__name__).split())[:300]


def _save_error(folder: epath.Path, reason: str) -> UserError:
    return UserError(
        f"could not save checkpoint {folder}: {reason}; make room there, make it writable, or "
        "choose another --workdir (earlier checkpoints are kept)"
    )
