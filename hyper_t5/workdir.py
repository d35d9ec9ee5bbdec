"""A run's folder: its config on disk, whether a run may go on in it, and the lock on it.

With several processes all call `hold` and `check_resume`; the first does the work, and all of them
have its result or its error. The folder must be one that all of them see, which `hold` checks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from etils import epath
from ml_collections import ConfigDict

from hyper_t5 import config as config_lib
from hyper_t5 import distributed, files
from hyper_t5.errors import UserError
from hyper_t5.overrides import Override, read_overrides

CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"
SEEN_FILE = ".seen"  # written by the first process, read by all
SEEN_SECONDS = 20.0  # a network's file system may show a new file late

# What a resumed run may change: how long it runs, what it keeps and prints, how it is judged, on
# which mesh, and where the same data lie. All else would make the continued run another run than
# either config's.
RESUME_MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.keep",
    "train.keep_period",
    "train.profile*",
    "mesh.*",
    "eval.*",
    "data.sni_dir",
    "data.text",
    "data.cache_dir",
)


def load_config(
    workdir: str | os.PathLike[str], overrides: Sequence[str | Override] = ()
) -> ConfigDict:
    """The config that a run wrote to its workdir, with overrides on top; locked."""
    path = files.as_path(workdir) / CONFIG_FILE
    try:
        text = files.read_bytes(path).decode()
    except OSError as e:
        raise UserError(
            f"{path}: {e.strerror or e}; give a --workdir that `hyper-t5 train` made"
        ) from None
    config = config_lib.from_json(text, str(path))
    config_lib.apply(config, read_overrides(overrides))
    return config


def check_resume(workdir: str | os.PathLike[str], config: ConfigDict) -> list[str]:
    """Write ``config`` to WORKDIR/config.json, or, where checkpoints are, refuse another run's.

    A start that failed before its first checkpoint leaves nothing to resume, and so binds nobody.
    Returns the changes that a resumed run may make (RESUME_MAY_CHANGE), as ``differences`` does.
    """
    return _first_alone("workdir/resume", lambda: _check_resume(files.as_path(workdir), config))


def _check_resume(folder: epath.Path, config: ConfigDict) -> list[str]:
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
    files.write_text(path, config_lib.to_json(config))
    return changes


@contextlib.contextmanager
def hold(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Keep other runs from training in this workdir; a process that dies lets go of it.

    A bucket (`gs://`) has no locks: there it is for the user to start a run once.

    Raises:
        UserError: another run is in it, it cannot be written, or not all processes see it.
    """
    folder = files.as_path(workdir)
    with contextlib.ExitStack() as held:

        def take() -> None:
            _make(folder)
            if files.is_local(folder):
                held.enter_context(_locked(folder))

        _first_alone("workdir/hold", take)
        if distributed.count() > 1:
            _check_shared(folder)
        yield


def _make(folder: epath.Path) -> None:
    try:
        with files.as_os_error():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir {folder}: {e.strerror or e}") from None


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    try:
        file: IO[str] = open(folder / LOCK_FILE, "a+")  # noqa: SIM115  epath opens no "a+"
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


def _first_alone(name: str, work: Callable[[], Any]) -> Any:
    """What ``work`` gives the first process, on all of them; its UserError too."""
    made, refused = None, ""
    if distributed.is_first():
        try:
            made = work()
        except UserError as error:
            if distributed.count() == 1:
                raise
            refused = str(error)
    told = distributed.agree(name, {"made": made, "refused": refused})
    if told["refused"]:
        raise UserError(told["refused"])
    return told["made"]


def _check_shared(folder: epath.Path) -> None:
    """UserError, on all processes, where one does not see what the first writes to the folder."""
    token = distributed.agree("workdir/token", secrets.token_hex(8))
    if distributed.is_first():
        files.write_text(folder / SEEN_FILE, token)
    distributed.barrier("workdir/written")
    seen = _sees(folder / SEEN_FILE, token)
    told = distributed.gather("workdir/seen", {"seen": seen, "host": socket.gethostname()})
    blind = [f"process {i} ({one['host']})" for i, one in enumerate(told) if not one["seen"]]
    if blind:
        raise UserError(
            f"--workdir {folder}: {', '.join(blind)} does not see what process 0 writes there; "
            "give a folder on a disk that all hosts share, or gs://"
        )


def _sees(file: epath.Path, token: str) -> bool:
    until = time.monotonic() + SEEN_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if files.read_bytes(file).decode() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
