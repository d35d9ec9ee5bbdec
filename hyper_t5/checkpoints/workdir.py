"""Folder of a run: its config on disk, the check of a resumed run's config, and a lock.

With several processes all call `lock` and `write_or_check_config`. Process 0 does the work; all get
its result or its error.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.parallel import distributed
from hyper_t5.utils import files, paths
from hyper_t5.utils.errors import UserError
from hyper_t5.utils.overrides import Override, flatten, read_overrides

PathLike = str | os.PathLike[str]

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
PATHS_FILE = "paths.json"  # of the config's inputs, absolute and relative to the workdir
TOKEN_FILE = ".seen"  # written by process 0, read by all
TOKEN_READS = 200  # in 20 s: a network file system may show a new file late

# Fields that a resumed run may change: its length, its records, its evaluation and its mesh. With
# any other change the run would be reproduced by neither config. The paths of its inputs may change
# too: the checkpoint has digests of the backbone, the vocabulary and the tasks.
RESUME_MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_period",
    "train.keep_best",
    "train.profile*",
    "mesh.*",
    "eval.*",
    "data.sni_dir",
    "data.text",
    "data.cache_dir",
)


def load_config(workdir: PathLike, overrides: Sequence[str | Override] = ()) -> ConfigDict:
    """Load the config of a run and apply overrides; the ConfigDict is locked.

    Where inputs have moved along with the workdir, the paths are the new ones.
    """
    path = files.as_path(workdir) / CONFIG_FILE
    try:
        text = files.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: {reason}; give a --workdir of `hyper-t5 train`") from None
    _check_no_backbone(path)
    config = config_lib.from_json(text, str(path))
    recorded = files.read_json(path.with_name(PATHS_FILE)) if _has_paths(path) else {}
    for field, value in _local_paths(config).items():
        if field in recorded:
            section, _, name = field.partition(".")
            config[section][name] = paths.resolve(value, recorded[field], str(path.parent))
    if changes := read_overrides(overrides):
        config_lib.apply(config, changes)
        config_lib.validate(config, needs_backbone=False)  # its folder may be gone by now
    return config


def _check_no_backbone(path: epath.Path) -> None:
    """Raise UserError where a config.json is that of a backbone, native or of Hugging Face."""
    content: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # a damaged config is reported, or overwritten, elsewhere
        content = files.read_json(path)
    if content.keys() & {"format", "model_type"}:
        raise UserError(
            f"{path.parent}: is a backbone, not a run; give a --workdir of `hyper-t5 train`, and"
            " this folder as --backbone or backbone.path"
        )


def _has_paths(path: epath.Path) -> bool:
    return files.is_local(path) and path.with_name(PATHS_FILE).exists()


def _local_paths(config: ConfigDict) -> dict[str, str]:
    values = {field: flatten(config)[field] for field in config_lib.path_fields()}
    return {field: value for field, value in values.items() if value and files.is_local(value)}


def _write_config(folder: epath.Path, config: ConfigDict) -> None:
    files.write_text(folder / CONFIG_FILE, config_lib.to_json(config))
    if files.is_local(folder):
        existing = {k: v for k, v in _local_paths(config).items() if paths.exists(v)}
        content = {k: paths.record(v, str(folder)) for k, v in existing.items()}
        if content or (folder / PATHS_FILE).exists():
            files.write_json(folder / PATHS_FILE, content)


def write_or_check_config(workdir: PathLike, config: ConfigDict) -> list[str]:
    """Write the config of a new run, or check that of a resumed one.

    A run without checkpoints has nothing to resume: its config is overwritten.

    Returns:
      The changes of a resumed run, as from `config.differences`.

    Raises:
      UserError: fields other than RESUME_MAY_CHANGE and paths differ; or the folder is a
        backbone.
    """
    folder = files.as_path(workdir)
    path = folder / CONFIG_FILE

    def write_or_check() -> list[str]:
        names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
        if not names:
            _check_no_backbone(path)
            _write_config(folder, config)
            return []
        if not path.exists():
            raise UserError(
                f"{folder} holds checkpoints but no {CONFIG_FILE}; restore that file, or give "
                "another --workdir"
            )
        old = load_config(folder)
        before, after = flatten(old), flatten(config)
        moved = [k for k in config_lib.path_fields() if bool(before[k]) == bool(after[k])]
        if refused := config_lib.differences(old, config, [*RESUME_MAY_CHANGE, *moved]):
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(refused)}); give its "
                "values to resume it, or another --workdir"
            )
        if max((int(name) for name in names if name.isdecimal()), default=0) > config.train.steps:
            return []  # nothing to train: config.json stays the config of the checkpoint
        if changes := config_lib.differences(old, config):
            _write_config(folder, config)
        return changes

    return on_primary("workdir/config", write_or_check)


def training_seconds(workdir: PathLike) -> float | None:
    """Compute how long a run has trained, from metrics.jsonl; None without that file.

    `seconds` starts at 0 in each process; those of a resumed run are added.
    """
    path = files.as_path(workdir) / METRICS_FILE
    if not path.exists():
        return None
    total, last, last_time = 0.0, 0.0, -float("inf")
    for line in files.read_bytes(path).decode(errors="replace").splitlines():
        try:
            values = json.loads(line)
            seconds, now = float(values["seconds"]), float(values["time"])
        except (ValueError, TypeError, KeyError):  # cut off by a kill
            continue
        # The process started after the line before was written. Both times are rounded.
        if now - seconds > last_time - 1e-2:
            total, last = total + last, 0.0
        last, last_time = seconds, now
    return total + last


@contextlib.contextmanager
def lock(workdir: PathLike) -> Iterator[None]:
    """Lock a workdir against other runs while the context is open; create it if necessary.

    The lock ends with the process. Buckets (`gs://`) have no locks.

    Raises:
      UserError: another run has the lock, or a process cannot write or see the folder.
    """
    folder = files.as_path(workdir)
    with contextlib.ExitStack() as stack:
        on_primary("workdir/lock", lambda: _lock(folder, stack))
        if jax.distributed.is_initialized():
            _check_shared(folder)
        yield


def _lock(folder: epath.Path, stack: contextlib.ExitStack) -> None:
    try:
        with files.as_os_error():
            folder.mkdir(parents=True, exist_ok=True)
        if not files.is_local(folder):
            return
        file = stack.enter_context(open(folder / LOCK_FILE, "a+"))  # noqa: SIM115  epath has no "a+"
    except OSError as error:
        raise UserError(f"--workdir {folder}: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{folder} is being trained in by process {file.read().strip()}; "
            "wait for it, or give another --workdir"
        ) from None
    except OSError:
        pass  # a file system without locks
    # Unbuffered, and only for the message above: a full disk is reported by what is written next.
    with contextlib.suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), str(os.getpid()).encode())


def on_primary(name: str, work: Callable[[], Any]) -> Any:
    """Run `work` on process 0; return its result or raise its UserError on all processes."""
    result, failure = None, ""
    if distributed.is_primary():
        try:
            result = work()
        except UserError as error:
            failure = str(error)
    result, failure = distributed.broadcast(name, [result, failure])
    if failure:
        raise UserError(failure)
    return result


def _check_shared(folder: epath.Path) -> None:
    """Raise UserError, on all processes, if one does not see what process 0 writes to a folder."""
    token = distributed.broadcast("workdir/token", secrets.token_hex(8))
    if distributed.is_primary():
        files.write_text(folder / TOKEN_FILE, token)
    distributed.barrier("workdir/written")
    sees = _has_token(folder / TOKEN_FILE, token)
    reports = distributed.gather("workdir/seen", {"sees": sees, "host": socket.gethostname()})
    blind = [f"process {i} ({x['host']})" for i, x in enumerate(reports) if not x["sees"]]
    if blind:
        raise UserError(
            f"--workdir {folder}: {', '.join(blind)} does not see what process 0 writes there; "
            "give a folder on a disk that all hosts share, or gs://"
        )


def _has_token(file: epath.Path, token: str) -> bool:
    for _ in range(TOKEN_READS):
        with contextlib.suppress(OSError):
            if files.read_bytes(file).decode() == token:
                return True
        time.sleep(0.1)
    return False
