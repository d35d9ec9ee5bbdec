"""A run's folder: its config on disk, whether a run may go on in it, and the lock on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5.errors import UserError
from hyper_t5.overrides import Override, read_overrides

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"

# What a resumed run may change: how long it runs, what it keeps and prints, how it is judged, and
# where the same data lie. All else would make the continued run another run than either config's.
RESUME_MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "eval.*",
    "data.sni_dir",
    "data.text",
    "data.cache_dir",
)


def load_config(
    workdir: str | os.PathLike[str], overrides: Sequence[str | Override] = ()
) -> ConfigDict:
    """The config that a run wrote to its workdir, with overrides on top; locked."""
    path = Path(workdir) / CONFIG_FILE
    try:
        text = path.read_text()
    except OSError as e:
        raise UserError(
            f"{path}: {e.strerror}; give a --workdir that `hyper-t5 train` made"
        ) from None
    config = config_lib.from_json(text, str(path))
    config_lib.apply(config, read_overrides(overrides))
    return config


def check_resume(workdir: str | os.PathLike[str], config: ConfigDict) -> list[str]:
    """Write ``config`` to WORKDIR/config.json, or, where checkpoints are, refuse another run's.

    A start that failed before its first checkpoint leaves nothing to resume, and so binds nobody.
    Returns the changes that a resumed run may make (RESUME_MAY_CHANGE), as ``differences`` does.
    """
    folder = Path(workdir)
    path = folder / CONFIG_FILE
    changes: list[str] = []
    if any((folder / "checkpoints").glob("[0-9]*")):
        if not path.exists():
            raise UserError(
                f"{folder} holds checkpoints but no {CONFIG_FILE} that says of what; "
                "restore that file, or give another --workdir"
            )
        old = load_config(folder)
        if refused := config_lib.differences(old, config, RESUME_MAY_CHANGE):
            raise UserError(
                f"{folder} holds a run with another config ({'; '.join(refused)}); "
                "give its own values to resume it, or another --workdir"
            )
        changes = config_lib.differences(old, config)
        if not changes:
            return []
    _write_atomic(path, config_lib.to_json(config))
    return changes


def _write_atomic(path: Path, text: str) -> None:
    fresh = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise UserError(f"cannot write {path}: {e.strerror}") from None


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other processes from training in this workdir; a process that dies lets go of it."""
    folder = Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a+")
    except OSError as e:
        raise UserError(f"--workdir {folder}: {e.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being trained in by process {file.read().strip()}; "
                "wait for it, or give another --workdir"
            ) from None
        except OSError:
            pass  # a file system without locks: as safe as without this function
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
