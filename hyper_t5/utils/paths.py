"""Paths as users write them: ``~``, environment variables, models of the Hugging Face Hub."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from pathlib import Path

from hyper_t5.utils import hub
from hyper_t5.utils.errors import UserError


def expand(path: str) -> str:
    """Expand ``~``, environment variables and ``hf://``; an existing path is unchanged.

    Every path of a flag, a config field or a config argument goes through this function.

    Raises:
      UserError: a variable is not set; or as `hub.local_folder`.
    """
    if os.path.lexists(path):
        return path
    if path.startswith(hub.SCHEME):
        return hub.local_folder(path)
    expanded = os.path.expandvars(os.path.expanduser(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise UserError(f"{path}: environment variable {unset[0]} is not set; set it")
    return expanded


def exists(path: str) -> bool:
    """Return whether a local path exists, or a glob has a file."""
    return os.path.exists(path) or bool(glob.glob(path))


def record(path: str, folder: str) -> dict[str, str]:
    """Return an existing local path as it is, absolute, and relative to a folder."""
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return {"path": path, "absolute": os.path.abspath(path), "relative": relative}


def resolve(path: str, recorded: Mapping[str, str], folder: str) -> str:
    """Return the first that exists: the absolute path, the one relative to the folder, ``path``.

    A path other than the recorded one, such as after an edit, is unchanged.
    """
    absolute = recorded["absolute"]
    if path != recorded["path"] or (os.path.abspath(path) == absolute and exists(path)):
        return path
    moved = os.path.normpath(os.path.join(os.path.realpath(folder), recorded["relative"]))
    return next((candidate for candidate in (absolute, moved) if exists(candidate)), path)


def expanded_path(path: str) -> Path:
    """Return `expand`'s result as a Path; an argparse type."""
    return Path(expand(path))
