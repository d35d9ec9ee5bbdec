"""Checkpoints that are whole or do not count. The only module that knows Orbax.

    WORKDIR/checkpoints/STEP/state/          the arrays, as Orbax writes them
    WORKDIR/checkpoints/STEP/meta.json       what the caller wants beside them: JSON
    WORKDIR/checkpoints/STEP/COMMITTED.json  shape, dtype and CRC-32 of every leaf; written last

Everything is written to `STEP.tmp`, which is renamed when it is complete. Orbax alone is not
enough: it restores flipped bytes without a word, casts a leaf of another dtype, and takes an empty
folder for the newest step. So a step counts only when its record is there, and every leaf is
checked against the record before it is used.

Leaves are named by their path, `params/encoder/layers/mlp/wo/kernel`; a tuple's items are `0`, `1`.

One process only, so far: `_snapshot` and `_place` are the two places that would see shards.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util

from hyper_t5.errors import UserError

FOLDER, STATE, META, RECORD = "checkpoints", "state", "meta.json", "COMMITTED.json"
FORMAT = "hyper_t5.checkpoint/1"

log = logging.getLogger(__name__)


class _DamagedError(Exception):
    """A checkpoint cannot be used; the message is the reason."""


class Checkpointer:
    """Writes checkpoints of one run in the background, and keeps the newest `keep` (0: all).

    A failed save raises UserError from the next `poll`, `wait`, `save` or `close`; by then its
    files are removed, and the checkpoints before it are as they were. As a context manager it
    closes itself.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 3) -> None:
        self._root, self._keep = Path(workdir) / FOLDER, keep
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _save_error(self._root, error) from error
        # A run that was killed while it wrote leaves these behind, and they can be large.
        for stale in self._root.glob("*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy the state to the host and return; the files are written in the background.

        Args:
            step: names the folder; a checkpoint that is already there is replaced.
            state: pytree of arrays. Random keys go in as raw data (`jax.random.key_data`).
            meta: anything JSON can hold; `step` is added.
        """
        self.wait()
        text = _json({**meta, "step": step})
        self._pending = self._pool.submit(self._write, step, _snapshot(state), text)

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

    def _write(self, step: int, arrays: dict[str, np.ndarray], meta: bytes) -> None:
        final = self._root / str(step)
        temporary, old = self._root / f"{step}.tmp", self._root / f"{step}.old.tmp"
        try:
            temporary.mkdir()
            _write_arrays(temporary / STATE, arrays)
            _write_synced(temporary / META, meta)
            record = {
                "format": FORMAT,
                "step": step,
                "meta": _crc(meta),
                "leaves": {name: _describe(array) for name, array in arrays.items()},
            }
            whole = {"record": record, "crc32": _crc(_json(record))}
            _write_synced(temporary / RECORD, _json(whole))
            if final.exists():
                final.rename(old)
            temporary.rename(final)
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _save_error(final, error) from error
        shutil.rmtree(old, ignore_errors=True)
        # Later steps belong to a future that was given up, say after damage: they count for nothing
        # here, or the step just written might be the one to go.
        past = [folder for folder in _committed(self._root, warn=False) if int(folder.name) <= step]
        for folder in past[self._keep :] if self._keep else []:
            shutil.rmtree(folder, ignore_errors=True)


def save(workdir: str | os.PathLike[str], step: int, state: Any, meta: dict[str, Any]) -> None:
    """Write one checkpoint, delete none, and return when it is on the disk. See `Checkpointer`."""
    with Checkpointer(workdir, keep=0) as checkpointer:
        checkpointer.save(step, state, meta)


def latest_step(workdir: str | os.PathLike[str]) -> int | None:
    """The newest committed step, or None. Its arrays are not read yet."""
    folders = _committed(Path(workdir) / FOLDER)
    return int(folders[0].name) if folders else None


def restore(
    workdir: str | os.PathLike[str], step: int | None, target: Any
) -> tuple[Any, dict[str, Any]]:
    """Read a whole state back, bit for bit.

    Args:
        workdir: folder of the run.
        step: the step to read, and no other; None is the newest that is not damaged. Damaged ones
            are passed over with a warning.
        target: the state's tree of arrays or ShapeDtypeStructs. Each leaf goes where its target's
            sharding says, and a leaf without one is left uncommitted: a scalar bound to device 0
            could not enter a jit over the whole mesh.

    Returns:
        The state, in the target's structure, and meta.

    Raises:
        UserError: there is no undamaged checkpoint, or leaves, shapes or dtypes differ from target.
    """
    wanted = _by_name(target)
    path = Path(workdir) / FOLDER / str(step) if step is not None else Path(workdir)

    def read(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        record = _read_record(folder)
        _compare(folder, record["leaves"], wanted)
        return _read_arrays(folder, record["leaves"]), _read_meta(folder, record)

    arrays, meta = _first_good(path, read)
    placed = [_place(arrays[name], like) for name, like in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(target), placed), meta


def load_subtree(path: str | os.PathLike[str], name: str) -> tuple[Any, dict[str, Any]]:
    """Read one branch of a state, and nothing else of it: how one run takes over from another.

    Args:
        path: folder of a run (its newest undamaged checkpoint), or of one step.
        name: `params`, or deeper: `params/heads`.

    Returns the branch as nested dicts of numpy arrays, and meta. Raises UserError when there is no
    undamaged checkpoint, or no such branch in it.
    """

    def read(folder: Path) -> tuple[Any, dict[str, Any]]:
        record = _read_record(folder)
        inside = {k: v for k, v in record["leaves"].items() if f"{k}/".startswith(f"{name}/")}
        if not inside:
            top = ", ".join(sorted({leaf.split("/")[0] for leaf in record["leaves"]}))
            raise UserError(f"checkpoint {folder} has no {name!r}; it has: {top}")
        tree: Any = _nested(_read_arrays(folder, inside))
        for key in name.split("/"):
            tree = tree[key]
        return tree, _read_meta(folder, record)

    return _first_good(Path(path), read)


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Meta alone, of a run's newest checkpoint or of one step's folder; UserError if none."""
    return _first_good(Path(path), lambda folder: _read_meta(folder, _read_record(folder)))


def _first_good(path: Path, read: Callable[[Path], Any]) -> Any:
    """What `read` makes of the newest folder in which it finds no damage."""
    is_step = path.parent.name == FOLDER and path.name.isdigit()
    folders = ([path] if path.exists() else []) if is_step else _committed(path / FOLDER)
    reason = "there is none"
    for folder in folders:
        try:
            return read(folder)
        except _DamagedError as error:
            reason = f"{folder} is damaged: {error}"
            log.warning("checkpoint %s", reason)
    raise UserError(f"no usable checkpoint at {path} ({reason}); name another folder, or train")


def _committed(root: Path, warn: bool = True) -> list[Path]:
    """Folders of the committed steps, newest first."""
    found = []
    steps = (folder for folder in root.glob("*") if folder.name.isdigit())
    for folder in sorted(steps, key=lambda folder: int(folder.name), reverse=True):
        try:
            _read_record(folder)
            found.append(folder)
        except _DamagedError as error:
            if warn:
                log.warning("checkpoint %s does not count: %s", folder, error)
    return found


def _compare(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
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


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"two leaves have one name: {sorted(names)}")
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(leaves, sep="/")


def _snapshot(state: Any) -> dict[str, np.ndarray]:
    """Host copies of all leaves: the next train step may take the devices' buffers over."""
    if jax.process_count() > 1:
        raise UserError("checkpoints of a run with several processes are not supported yet")
    return {name: np.array(leaf, copy=True) for name, leaf in _by_name(state).items()}


def _place(array: np.ndarray, like: Any) -> Any:
    if isinstance(like, np.ndarray | np.generic):
        return array
    floating = isinstance(like, jax.Array) and not like.committed
    return jax.device_put(array, None if floating else like.sharding)


def _write_arrays(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        orbax.save(folder.absolute(), args=ocp.args.PyTreeSave(_nested(arrays)))


def _read_arrays(folder: Path, leaves: dict[str, Any]) -> dict[str, np.ndarray]:
    """The named leaves, each of them checked against its line in the record."""
    wanted = _nested(dict.fromkeys(leaves, ocp.RestoreArgs(restore_type=np.ndarray)))
    request = ocp.args.PyTreeRestore(item=wanted, restore_args=wanted, partial_restore=True)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            arrays = _by_name(orbax.restore((folder / STATE).absolute(), args=request))
    except Exception as error:  # Orbax raises whatever its layers raise
        raise _DamagedError(_one_line(error)) from error
    for name, line in leaves.items():
        if name not in arrays or _describe(arrays[name]) != line:
            raise _DamagedError(f"leaf {name} is not as it was written")
    return arrays


def _read_meta(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        content = (folder / META).read_bytes()
    except OSError as error:
        raise _DamagedError(_one_line(error)) from error
    if _crc(content) != record["meta"]:
        raise _DamagedError(f"{META} is not as it was written")
    return json.loads(content)


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        whole = json.loads((folder / RECORD).read_bytes())
        if whole["crc32"] != _crc(_json(whole["record"])):
            raise ValueError("its checksum is wrong")
        if whole["record"]["format"] != FORMAT:
            raise ValueError(f"its format is {whole['record']['format']}, not {FORMAT}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _DamagedError(f"{RECORD} is missing or broken: {_one_line(error)}") from error
    return whole["record"]


def _describe(array: np.ndarray) -> dict[str, Any]:
    digest = _crc(np.ascontiguousarray(array).view(np.uint8).data)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": digest}


def _crc(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


def _json(content: Any) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _one_line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]


def _save_error(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"could not save checkpoint {folder}: {_one_line(error)}; make room there, make it "
        "writable, or choose another --workdir (earlier checkpoints are kept)"
    )
