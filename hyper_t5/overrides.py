"""From text to typed values: ``field = value`` overrides and the arguments of config files.

This module knows no field of the config, and imports nothing heavy; ``config`` applies what it
reads. Every mistake is a UserError of one line that names the place, the field and the remedy.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hyper_t5.errors import UserError


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like this one; of dotted names the last part may match by itself."""

    def likeness(other: str) -> float:
        parts = (other, other.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, name, p).ratio() for p in parts)

    return max(known, key=likeness)


def choose(what: str, name: str, known: Collection[str]) -> str:
    """``name`` if it is known, else a UserError with the nearest name and all of them."""
    if name in known:
        return name
    if not known:
        raise UserError(f"unknown {what} {name!r}; there is none")
    raise UserError(
        f"unknown {what} {name!r}, the nearest is {nearest(name, known)!r}; "
        f"known: {', '.join(known)}"
    )


class Override(NamedTuple):
    """One ``field = value`` as typed, and where: ``--gin`` or ``FILE:LINE``."""

    field: str
    text: str
    where: str


def read_overrides(
    overrides: Sequence[str | Override] = (), gin_files: Sequence[str | os.PathLike[str]] = ()
) -> list[Override]:
    """``field=value`` strings and the lines of gin files, files first, as Overrides in order."""
    found = []
    for file in gin_files:
        try:
            lines = Path(file).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--gin_file: cannot read {file}: {e}") from None
        for number, line in enumerate(lines, 1):
            if code := _without_comment(line).strip():
                found.append(_split(code, f"{file}:{number}"))
    for given in overrides:
        found.append(given if isinstance(given, Override) else _split(given, "--gin"))
    return found


def parse_args(arg: str | None, **known: Any) -> SimpleNamespace:
    """``"size=base,flag"`` to typed values; each keyword gives an argument's default and type.

    A bare name sets a flag (an argument whose default is a bool). Anything left over is an error.
    """
    values = dict(known)
    for part in filter(None, (p.strip() for p in (arg or "").split(","))):
        name, equals, text = (x.strip() for x in part.partition("="))
        choose("argument", name, known)
        if not equals and known[name] is not False and known[name] is not True:
            raise UserError(f"argument {name!r} needs a value: {name}=...")
        try:
            values[name] = parse(text, known[name]) if equals else True
        except TypeError as e:
            raise UserError(f"argument {name!r} expects {e}, got {text!r}") from None
    return SimpleNamespace(**values)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """``{"train.steps": 1000, ...}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _without_comment(line: str) -> str:
    """The line up to the first ``#`` outside quotes."""
    match = re.match(r"""(?:[^#'"]|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")*""", line)
    end = match.end() if match else 0
    return line[:end] if line[end : end + 1] == "#" else line


def _split(text: str, where: str) -> Override:
    field, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", field.strip()):
        raise UserError(f"{where}: expected path.to.field = value, got {text!r}")
    return Override(field.strip(), value.strip(), where)


def parse(text: str, like: Any) -> Any:
    """Text to a value of the type of ``like``; TypeError says what is expected."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text[:1] in ("'", '"') or (text[:1] in ("(", "[") and not isinstance(like, str)):
            raise TypeError(f"{_expected(like)} (a quote or bracket is open)") from None
        value = text
    if isinstance(like, str) and not isinstance(value, str):
        return text  # a bare string that happens to be a literal, such as a folder called 2024
    if isinstance(like, tuple) and isinstance(value, str):
        return tuple(parse(part.strip(), like[0]) for part in value.split(",") if part.strip())
    return coerce(value, like)


def coerce(value: Any, like: Any) -> Any:
    """A value as the type of ``like``: an int serves as a float and a list as a tuple, no more."""
    if isinstance(like, tuple) and isinstance(value, (list, tuple)):
        with contextlib.suppress(TypeError):
            return tuple(coerce(v, like[0]) for v in value)
    elif isinstance(like, float) and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is type(like) and not isinstance(like, (float, tuple)):
        return value
    raise TypeError(_expected(like))


def _expected(like: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
    if isinstance(like, tuple):
        return f"a tuple such as {','.join(map(str, like[:2]))}"
    return names[type(like)]


def set_field(
    config: ConfigDict,
    field: str,
    given: Any,
    known: Mapping[str, Any],
    where: str,
    read: Callable[[Any, Any], Any],
) -> None:
    """Set one field in place to ``read(given, default)``; ``known`` has every field's default.

    Raises:
        UserError: no such field (names the nearest), or ``read`` raised TypeError(expected type).
    """
    if field not in known:
        inside = [name for name in known if name.startswith(field + ".")]
        if inside:
            raise UserError(f"{where}: {field} is a section; its fields: {', '.join(inside)}")
        raise UserError(f"{where}: unknown field {field}, the nearest is {nearest(field, known)}")
    try:
        value = read(given, known[field])
    except TypeError as e:
        raise UserError(f"{where}: {field} expects {e}, got {given!r}") from None
    *sections, leaf = field.split(".")
    for section in sections:
        config = config[section]
    config[leaf] = value
