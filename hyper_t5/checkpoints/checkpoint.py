"""Atomic, checksummed checkpoints: asynchronous saves, restores onto any mesh.

A checkpoint is written to `STEP.tmp`, which is renamed when it is complete. Buckets (`gs://`) have
no atomic rename: there it is written to `STEP`. Its record is written last, and a step without a
valid record does not count. All bytes are checked against the record before they are used; if a
checkpoint is damaged, the one before it is used.

Orbax writes the arrays (see arrays.py), but not through its AsyncCheckpointer: there, when one
process fails to write, the others wait until a timeout. Here processes exchange their results
through the coordination service, and never in a collective of the devices, which may be training.

With several processes, the workdir is a folder that all of them see, and all of them call
`Checkpointer`, `restore` and `load_subtree`; each of the other functions is for any one process.

Leaves are named by their path, `params/encoder/layers/mlp/wo/kernel`; a tuple's items are `0`, `1`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from hyper_t5.checkpoints import arrays, steps
from hyper_t5.checkpoints.steps import FOLDER, STATE, DamagedError, Specs, Step
from hyper_t5.checkpoints.workdir import PathLike, on_primary
from hyper_t5.parallel import distributed
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

log = logging.getLogger(__name__)


class Checkpointer:
    """Background writer of a run's checkpoints, which also removes old ones.

    A context manager. A failed save raises UserError from the next `poll`, `wait` or `save`, or at
    the exit, on every process even if only one of them could not write. By then its files are
    removed; earlier checkpoints are unchanged.

    Args:
      workdir: folder of the run, local or `gs://`.
      keep: how many of the newest steps to keep; 0 keeps all.
      keep_period: multiples of this step are never removed; 0 for none.
      keep_best: the step with the lowest validation loss in its metadata is never removed.
    """

    def __init__(
        self, workdir: PathLike, keep: int = 3, keep_period: int = 0, keep_best: bool = False
    ) -> None:
        self._root = files.as_path(workdir) / FOLDER
        self._keep, self._keep_period, self._keep_best = keep, keep_period, keep_best
        self._pending: Future[None] | None = None

        def open_root() -> None:
            self._root.mkdir(parents=True, exist_ok=True)
            steps.remove_unfinished(self._root)

        _save_on_primary("checkpoint/open", self._root, open_root)
        self._handler = arrays.make_handler()
        self._pool = ThreadPoolExecutor(1, "checkpoint")

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Copy the state to the host and return; files are written in the background.

        Each process writes the shards that it holds; a replicated shard is written once.

        Args:
          step: name of the checkpoint; an existing one is replaced.
          state: pytree of arrays. Random keys are passed as raw data (`jax.random.key_data`).
            With several processes every jax.Array spans all of them.
          meta: JSON content; `step` is added.
        """
        self.wait()
        content = steps.to_json({**meta, "step": step})
        final = self._root / str(step)
        folder = final.with_name(f"{step}.tmp") if files.is_local(final) else final

        def create_folder() -> None:
            steps.remove(folder)
            (folder / STATE).mkdir(parents=True, exist_ok=True)

        _save_on_primary("checkpoint/begin", final, create_folder)
        leaves = {
            name: leaf if isinstance(leaf, jax.Array) else np.array(leaf, copy=True)
            for name, leaf in _by_name(state).items()
        }
        specs = {k: {"dtype": str(x.dtype), "shape": list(x.shape)} for k, x in leaves.items()}
        shards = arrays.copy_shards(leaves)
        # Orbax starts an event loop; in a notebook this thread has one.
        started = self._pool.submit(arrays.start_write, self._handler, folder / STATE, leaves)
        started.exception()  # wait; an error is raised by `_write`, on all processes
        self._pending = self._pool.submit(
            self._write, folder, final, started, shards, specs, content
        )

    def poll(self) -> None:
        """Raise if the last save has failed; never waits."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.wait()
        except UserError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the first error is the one to raise
        finally:
            self._pool.shutdown()

    def _write(
        self,
        folder: epath.Path,
        final: epath.Path,
        started: Future[list[Any]],
        shards: arrays.Shards,
        specs: Specs,
        meta: bytes,
    ) -> None:
        """Finish a save; it succeeds or fails on all processes alike."""
        failure = ""
        # Too large to be exchanged: megabytes on a pod.
        digests = [folder / f"shards_{i}.json" for i in range(jax.process_count())]
        try:
            content = steps.to_json(arrays.shard_digests(shards))
            arrays.finish_write(started.result())
            files.write_bytes(digests[jax.process_index()], content)
        except Exception as error:
            failure = _of_process(steps.one_line(error))
        failures = [x for x in distributed.gather("checkpoint/written", failure) if x]

        def commit() -> None:
            try:
                if failures:
                    raise OSError(failures[0])
                arrays.add_digests(specs, [json.loads(files.read_bytes(x)) for x in digests])
                for file in digests:
                    file.unlink()
                self._handler.finalize(folder / STATE)
                steps.commit(folder, final, meta, specs)
            except Exception:
                steps.try_remove(folder)
                raise
            self._remove_old(int(final.name))

        _save_on_primary("checkpoint/committed", final, commit)

    def _remove_old(self, step: int) -> None:
        """Remove old steps. Steps after this one do not count: they were abandoned."""
        if not self._keep:
            return
        past = (folder for folder in steps.committed(self._root) if int(folder.name) <= step)
        kept = list(itertools.islice(past, self._keep))
        best = steps.best(self._root) if self._keep_best else None
        for folder in steps.step_folders(self._root):
            number = int(folder.name)
            permanent = self._keep_period and number % self._keep_period == 0
            permanent = permanent or (best is not None and folder == best[0])
            if number < int(kept[-1].name) and not permanent:
                steps.try_remove(folder)


def save(workdir: PathLike, step: int, state: Any, meta: dict[str, Any]) -> None:
    """Write one checkpoint, wait for it, and remove no other. See `Checkpointer`."""
    with Checkpointer(workdir, keep=0) as checkpointer:
        checkpointer.save(step, state, meta)


def latest_step(workdir: PathLike) -> int | None:
    """Return the newest committed step, or None; reads no arrays."""
    folders = steps.committed(files.as_path(workdir) / FOLDER)
    return next((int(folder.name) for folder in folders), None)


def is_step(path: PathLike) -> bool:
    """Return whether a path is a step's folder, WORKDIR/checkpoints/STEP."""
    folder = files.as_path(path)
    return folder.parent.name == FOLDER and folder.name.isdigit()


def step_folder(workdir: PathLike, step: Step) -> epath.Path:
    """Return the folder of a committed step; UserError lists those that there are.

    'best' is the one with the lowest validation loss.
    """
    root = files.as_path(workdir) / FOLDER
    if step == "best":
        best = steps.best(root)
        if best is None:
            raise UserError(
                f"{workdir}: no checkpoint has a validation loss, so none is the best; train with "
                "train.eval_every and train.keep_best=True, or pass --step N"
            )
        return best[0]
    known = [folder.name for folder in steps.committed(root)]
    if str(step) not in known:
        available = f"it has {', '.join(reversed(known))}" if known else "it has none"
        raise UserError(f"{workdir}: has no checkpoint of step {step}; {available}")
    return root / str(step)


def best_step(workdir: PathLike) -> tuple[int, float] | None:
    """Return the committed step with the lowest validation loss, and that loss; None without."""
    best = steps.best(files.as_path(workdir) / FOLDER)
    return best and (int(best[0].name), best[1])


def digest(path: PathLike) -> str:
    """Compute the SHA-256 of the record of a step, or a run's newest one; '' without one."""
    folder = files.as_path(path)
    folders = iter([folder]) if is_step(folder) else steps.committed(folder / FOLDER)
    records = (steps.to_json(steps.read_record(folder)) for folder in folders)
    return next((hashlib.sha256(content).hexdigest() for content in records), "")


def restore(workdir: PathLike, step: int | None, target: Any) -> tuple[Any, dict[str, Any]]:
    """Restore a state, bit for bit, onto any mesh.

    Args:
      workdir: folder of the run.
      step: the step to restore, or None for the newest undamaged one. Damaged ones are skipped
        with a warning, by all processes if one of them detects the damage.
      target: tree of arrays or ShapeDtypeStructs with the structure of the state. A leaf gets the
        sharding of its target; without one it stays uncommitted: a scalar committed to device 0
        could not be passed to a jit over the whole mesh.

    Returns:
      The state, in the structure of the target, and its metadata.

    Raises:
      UserError: there is no undamaged checkpoint, or a leaf, shape or dtype differs from target.
    """
    targets = _by_name(target)

    def read(folder: epath.Path) -> tuple[Any, dict[str, Any]]:
        record = steps.read_record(folder)
        steps.check_leaves(folder, record["leaves"], targets)
        leaves = arrays.read_leaves(folder / STATE, record["leaves"], targets)
        state = jax.tree.unflatten(jax.tree.structure(target), list(leaves.values()))
        return state, steps.read_meta(folder, record)

    root = files.as_path(workdir)
    return _first_undamaged(root if step is None else root / FOLDER / str(step), read)


def load_subtree(path: PathLike, name: str) -> tuple[Any, dict[str, Any]]:
    """Read one branch of a state, and nothing else of it, as nested dicts of NumPy arrays.

    Args:
      path: folder of a run, for its newest undamaged checkpoint, or of one step.
      name: the branch, such as `params` or `params/heads`.

    Returns:
      The branch, whole on every process, and the metadata.

    Raises:
      UserError: there is no undamaged checkpoint, or no such branch in it.
    """

    def read(folder: epath.Path) -> tuple[Any, dict[str, Any]]:
        record = steps.read_record(folder)
        names = [leaf for leaf in record["leaves"] if f"{leaf}/".startswith(f"{name}/")]
        if not names:
            branches = ", ".join(sorted({leaf.split("/")[0] for leaf in record["leaves"]}))
            raise UserError(f"checkpoint {folder} has no {name!r}; it has: {branches}")
        leaves = arrays.read_leaves(folder / STATE, record["leaves"], dict.fromkeys(names))
        tree = traverse_util.unflatten_dict(leaves, sep="/")
        for key in name.split("/"):
            tree = tree[key]
        return tree, steps.read_meta(folder, record)

    return _first_undamaged(files.as_path(path), read)


def read_meta(path: PathLike) -> dict[str, Any]:
    """Read the metadata of a run's newest undamaged checkpoint, or of one step's folder."""

    def read(folder: epath.Path) -> dict[str, Any]:
        return steps.read_meta(folder, steps.read_record(folder))

    return _first_undamaged(files.as_path(path), read, collective=False)


def _save_on_primary(name: str, folder: epath.Path, work: Callable[[], None]) -> None:
    """Do a part of a save on process 0; raise any error of it on all processes."""

    def attempt() -> None:
        try:
            work()
        except Exception as error:  # each file system has its own error types
            raise UserError(
                f"could not save checkpoint {folder}: {steps.one_line(error)}; make room there, "
                "make it writable, or choose another --workdir (earlier checkpoints are kept)"
            ) from error

    on_primary(name, attempt)


def _first_undamaged(
    path: epath.Path, read: Callable[[epath.Path], Any], collective: bool = True
) -> Any:
    """Return the result of `read` for the newest checkpoint in which it detects no damage.

    Args:
      path: folder of a run or of one step.
      read: raises DamagedError or UserError.
      collective: all processes read; they skip a checkpoint if one of them detects damage.
    """
    root = path.parent if is_step(path) else path / FOLDER
    candidates = steps.committed(root)
    if is_step(path):
        candidates = iter([path] if path.exists() else [])
    leads, reason = distributed.is_primary() or not collective, "there is none"
    while True:
        step = next((folder.name for folder in candidates), "") if leads else ""
        step = distributed.broadcast("checkpoint/step", step) if collective else step
        if not step:
            break
        result, damage, refusal = None, "", ""
        try:
            result = read(root / step)
        except DamagedError as error:
            damage = _of_process(str(error)) if collective else str(error)
        except UserError as error:
            refusal = str(error)
        outcome = (damage, refusal)
        outcomes = distributed.gather("checkpoint/read", outcome) if collective else [outcome]
        damages, refusals = zip(*outcomes, strict=True)
        if any(refusals):
            raise UserError(next(filter(None, refusals)))
        if not any(damages):
            return result
        reason = f"{root / step} is damaged: {next(filter(None, damages))}"
        if leads:
            log.warning("checkpoint %s", reason)
    raise UserError(f"no usable checkpoint at {path} ({reason}); name another folder, or train")


def _by_name(tree: Any) -> dict[str, Any]:
    """Map the path of each leaf to the leaf, in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"two leaves have the same name: {sorted(names)}")
    return {name: leaf for name, (_, leaf) in zip(names, leaves, strict=True)}


def _of_process(message: str) -> str:
    """Add this process to a message where there are several."""
    several = jax.process_count() > 1
    return f"process {jax.process_index()}: {message}" if several else message
