"""Inputs and outputs that are pipes or devices, and ``-``: stdin and stdout."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hyper_t5.utils.errors import UserError

PathLike = str | os.PathLike[str]
STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1}  # with redirection these may be regular files


def is_stream(path: PathLike) -> bool:
    """Return whether a path is a pipe or a device, which is neither renamed nor read twice."""
    if os.fspath(path) in STANDARD:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def open_stream(path: PathLike, mode: str) -> BinaryIO:
    """Open a stream as 'rb' or 'wb'; stdin and stdout stay open and at their position."""
    number = STANDARD.get(os.fspath(path))
    target = os.fspath(path) if number is None else os.dup(number)
    return open(target, mode)  # type: ignore[return-value]


@contextlib.contextmanager
def readable_twice(path: PathLike) -> Iterator[Path]:
    """Yield a file that can be read again: the input, or a temporary copy of a stream."""
    path = "/dev/stdin" if os.fspath(path) == "-" else path
    if not is_stream(path):
        yield Path(path)
        return
    with tempfile.NamedTemporaryFile(prefix="hyper_t5-") as copy:
        try:
            with open_stream(path, "rb") as stream:
                shutil.copyfileobj(stream, copy)
            copy.flush()
        except OSError as error:
            raise UserError(f"{path}: cannot be copied to {copy.name}: {error.strerror}") from error
        yield Path(copy.name)


@contextlib.contextmanager
def output_path(path: PathLike) -> Iterator[Path]:
    """Yield an output's path, where ``-`` is stdout; messages then go to stderr."""
    path = "/dev/stdout" if os.fspath(path) == "-" else path
    with contextlib.ExitStack() as stack:
        if os.fspath(path) == "/dev/stdout":
            sys.stdout.flush()
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield Path(path)
