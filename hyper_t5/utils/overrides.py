"""Typed parsing of ``field = value`` overrides and of the arguments of config files.

This module is independent of the config's fields and imports no JAX; ``config`` applies the parsed
overrides. Every error is a UserError of one line that names the source, the field and the remedy.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from hyper_t5.utils.errors import UserError

INT64_END = 2**63
SEED_END = 2**32  # JAX's keys ignore higher bits


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name most similar to ``name``, in full or by its last dotted part."""

    def similarity(candidate: str) -> float:
        parts = (candidate, candidate.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, name, part).ratio() for part in parts)

    return max(known, key=similarity)


def choose(kind: str, name: str, known: Collection[str]) -> str:
    """Return ``name`` if it is known; otherwise raise a UserError that names the nearest one."""
    if name in known:
        return name
    if not known:
        raise UserError(f"unknown {kind} {name!r}; there is none")
    raise UserError(
        f"unknown {kind} {name!r}, the nearest is {nearest(name, known)!r}; "
        f"known: {', '.join(known)}"
    )


class Override(NamedTuple):
    """Unparsed ``field = value`` override and its source: ``--gin`` or ``FILE:LINE``."""

    field: str
    text: str
    source: str


def read_overrides(
    overrides: Sequence[str | Override] = (), gin_files: Sequence[str | os.PathLike[str]] = ()
) -> list[Override]:
    """Read the lines of gin files, then ``field=value`` strings, as Overrides in this order."""
    result = []
    for file in gin_files:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"--gin_file: cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"--gin_file {file}: not UTF-8; save it as UTF-8") from None
        for number, line in enumerate(lines, 1):
            if code := _without_comment(line).strip():
                result.append(_split(code, f"{file}:{number}"))
    for override in overrides:
        result.append(override if isinstance(override, Override) else _split(override, "--gin"))
    return result


def parse_args(arg: str | None, **defaults: Any) -> SimpleNamespace:
    """Parse the argument string of a config file, such as ``"size=base,flag"``.

    Args:
      arg: comma-separated ``name=value`` pairs; a bare name sets a boolean argument to True. A
        value with commas is quoted: ``task='a,b.json'``.
      **defaults: the default of each argument, which also sets its type.
    """
    values = dict(defaults)
    parts = re.findall(r"""(?:=\s*(?:'[^']*'|"[^"]*")|[^,])+""", arg or "")
    for part in filter(None, (p.strip() for p in parts)):
        name, equals, text = (x.strip() for x in part.partition("="))
        default = defaults[choose("argument", name, defaults)]
        if not equals and not isinstance(default, bool):
            raise UserError(f"argument {name!r} needs a value: {name}=...")
        try:
            values[name] = parse(text, default) if equals else True
        except TypeError as error:
            raise UserError(f"argument {name!r} expects {error}, got {text!r}") from None
    return SimpleNamespace(**values)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Flatten nested sections to dotted fields: ``{"train.steps": 1000, ...}``."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _without_comment(line: str) -> str:
    """Return the line up to the first ``#`` outside quotes."""
    match = re.match(r"""(?:[^#'"]|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")*""", line)
    end = match.end() if match else 0
    return line[:end] if line[end : end + 1] == "#" else line


def _split(text: str, source: str) -> Override:
    field, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", field.strip()):
        raise UserError(f"{source}: expected path.to.field = value, got {text!r}")
    return Override(field.strip(), value.strip(), source)


def parse(text: str, default: Any) -> Any:
    """Parse text to the type of ``default``; a TypeError names the expected type."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text[:1] in ("'", '"') or (text[:1] in ("(", "[") and not isinstance(default, str)):
            raise TypeError(f"{_expected(default)} (a quote or bracket is open)") from None
        value = text
    if isinstance(default, str) and not isinstance(value, str):
        return text  # a bare string that is also a literal, such as a directory named 2024
    if isinstance(default, tuple) and isinstance(value, str):
        return tuple(parse(part.strip(), default[0]) for part in value.split(",") if part.strip())
    return coerce(value, default)


def coerce(value: Any, default: Any) -> Any:
    """Convert a value to the type of ``default``: int to float and list to tuple, nothing else."""
    if type(value) is int and not -INT64_END <= value < INT64_END:
        raise TypeError(f"{_expected(default)} that fits in 64 bits")
    if isinstance(default, tuple) and isinstance(value, (list, tuple)):
        with contextlib.suppress(TypeError):
            return tuple(coerce(item, default[0]) for item in value)
    elif isinstance(default, float) and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif type(value) is type(default) and not isinstance(default, (float, tuple)):
        return value
    raise TypeError(_expected(default))


def _expected(default: Any) -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
    if isinstance(default, tuple):
        return f"a tuple such as {','.join(map(str, default[:2]))}"
    return names[type(default)]


def set_field(
    config: ConfigDict,
    field: str,
    value: Any,
    defaults: Mapping[str, Any],
    source: str,
    convert: Callable[[Any, Any], Any],
) -> None:
    """Set one field of ``config`` in place.

    Args:
      config: the config to change.
      field: dotted name.
      value: the new value, before conversion.
      defaults: the default of every field by its dotted name.
      source: the file or flag that error messages name.
      convert: ``parse`` for text or ``coerce`` for values.

    Raises:
      UserError: no such field, or ``convert`` raised a TypeError.
    """
    if field not in defaults:
        fields = [name for name in defaults if name.startswith(f"{field}.")]
        if fields:
            raise UserError(f"{source}: {field} is a section; its fields: {', '.join(fields)}")
        raise UserError(
            f"{source}: unknown field {field}, the nearest is {nearest(field, defaults)}"
        )
    try:
        converted = convert(value, defaults[field])
    except TypeError as error:
        got = reprlib.repr(value)  # shortened
        raise UserError(f"{source}: {field} expects {error}, got {got}") from None
    *sections, leaf = field.split(".")
    for section in sections:
        config = config[section]
    config[leaf] = converted
