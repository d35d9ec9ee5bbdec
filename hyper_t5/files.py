"""Files and folders, here or in a bucket: JSON, text, and folders that appear whole or not.

A run's folder may lie on this machine or in a bucket, `gs://BUCKET/NAME`: `as_path` takes either,
and `read_bytes`, `write_bytes`, `read_json` and the writers of text go through it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from hyper_t5.errors import UserError


def as_path(path: str | os.PathLike[str]) -> epath.Path:
    """An absolute path of this machine, or one in a bucket: `gs://BUCKET/NAME`.

    pathlib makes one slash of two; `gs:/BUCKET` is the bucket all the same.
    """
    text = re.sub(r"^(gs|s3):/+", r"\1://", os.fspath(path))
    made = epath.Path(text)
    return made.resolve() if is_local(made) else made


def cache_root(cache_dir: str | os.PathLike[str] = "") -> Path:
    """The folder that `data.cache_dir` means; '' is hyper_t5 in $XDG_CACHE_HOME, or in ~/.cache."""
    if os.fspath(cache_dir):
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hyper_t5"


def local_copy(path: str | os.PathLike[str]) -> Path:
    """A file or folder as one of this machine's: itself, or, of what lies in a bucket, a copy.

    The copy is kept in the cache folder, under a name made of the sizes and times of what it is of.

    Raises:
      UserError: nothing is there, or it cannot be copied.
    """
    if is_local(path):
        return Path(path)
    source = as_path(path)
    try:
        with as_os_error():
            return _fetched(source)
    except OSError as error:
        raise UserError(f"{source}: cannot be copied from the bucket: {error}") from error


def _fetched(source: epath.Path) -> Path:
    """The copy of `source`, made unless it is there."""
    listing = sorted(_listing(source, ""))
    if not listing:
        raise UserError(f"{source}: no such file or folder in the bucket")
    key = hashlib.sha256(repr([str(source), listing]).encode()).hexdigest()[:16]
    target = cache_root() / "buckets" / key / source.name
    if target.exists():
        return target
    size = sum(length for _, length, _ in listing)
    print(f"{source}: copying {size / 1e9:.2f} GB to {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        new = Path(folder) / source.name
        for name, _, _ in listing:
            place = new / name if name else new
            place.parent.mkdir(parents=True, exist_ok=True)
            with (source / name if name else source).open("rb") as there, place.open("wb") as here:
                shutil.copyfileobj(there, here, 2**24)
        with contextlib.suppress(OSError):  # another process of this machine was faster
            new.rename(target)
    return target


def _listing(path: epath.Path, name: str) -> Iterator[tuple[str, int, int]]:
    """(name, bytes, time) of every file in a folder of a bucket; a file itself has the name ''."""
    if path.is_dir():
        for inner in path.iterdir():
            yield from _listing(inner, f"{name}/{inner.name}" if name else inner.name)
    elif path.exists():
        facts = path.stat()
        yield name, facts.length, facts.mtime


def is_local(path: str | os.PathLike[str]) -> bool:
    """Whether a path is one of this machine's: it can be renamed, locked, and flushed to disk."""
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """OSError for whatever a bucket's client raises; each client has errors of its own."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def read_bytes(file: epath.Path) -> bytes:
    """All of a file; OSError when it cannot be read."""
    with as_os_error():
        return file.read_bytes()


def write_bytes(file: epath.Path, content: bytes | Iterable[bytes]) -> None:
    """Writes a file and sees it to the disk; in a bucket, an object is there whole or not.

    OSError when it cannot be written. Makes its folder. ``content`` may come in pieces.
    """
    with as_os_error():
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as stream:
            for piece in [content] if isinstance(content, bytes) else content:
                stream.write(piece)
            if is_local(file):
                stream.flush()
                os.fsync(stream.fileno())


def read_json(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in `file`; UserError naming the file and line when it is not one."""
    try:
        content = json.loads(read_bytes(as_path(file)).decode("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not a text file") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: is not valid JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; 10,000 brackets
        raise UserError(f"{file}: is no JSON that a program wrote ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object")
    return content


def json_object(line: bytes, where: str) -> dict[str, Any]:
    """The one JSON object of a line of rows; ``where`` names file and line in what is wrong.

    Raises:
        UserError: not UTF-8, not JSON, no object, or half a surrogate pair in it.
    """
    try:
        value = json.loads(line.decode("utf-8-sig"))
        # Of an escaped surrogate JSON may hold half the pair; text may not.
        if b"\\ud" in line or b"\\uD" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        what = "a number of thousands of digits, or nested too deeply"
        raise UserError(f"{where}: not valid JSON ({what})") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a JSON object")
    return value


def check_regular(file: Path, largest: int | None = None) -> None:
    """UserError where what is to be read is a device, pipe or folder, or above `largest` bytes.

    A link to a file is one: caches of downloads are made of them. Of what is not there, nothing.
    """
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is no regular file; give a folder of files")
    if largest is not None and file.exists() and file.stat().st_size > largest:
        raise UserError(f"{file}: has {file.stat().st_size:,} bytes; such a file has few")


def check_writable(file: Path) -> None:
    """UserError where `file` could not be written; for before long work. Makes its folder.

    Of a bucket nothing is known before it is written to.
    """
    if not is_local(as_path(file)):
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    if file.is_dir():
        raise UserError(f"cannot write {file}: is a folder; give the name of a file")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"cannot write {file}: no right to write in its folder")


def write_json(file: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Writes `content` with one field a line and a newline at the end; see `write_text`."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_json_lines(file: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, as they come; see `write_text`."""
    _replace(file, (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows))


def write_text(file: str | os.PathLike[str], text: str) -> None:
    """Writes under another name and moves it there; makes the folder.

    Raises:
      UserError: it cannot be written (no space, no right to); an earlier file is as it was.
    """
    _replace(file, text.encode())


def _replace(file: str | os.PathLike[str], content: bytes | Iterable[bytes]) -> None:
    path = as_path(file)
    new = path.with_name(f".{path.name}.{os.getpid()}") if is_local(path) else path
    try:
        write_bytes(new, content)
        if new != path:
            new.replace(path)
    except OSError as error:
        if new != path:
            with contextlib.suppress(OSError):
                new.unlink()
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


@contextlib.contextmanager
def replaced_folder(folder: str | os.PathLike[str], owned: Collection[str]) -> Iterator[Path]:
    """Gives an empty folder to write into, and moves it to `folder` when the block ends well.

    Args:
      folder: where it goes. An existing folder is replaced when it holds only `owned` names. Into a
        bucket it is copied file by file, the smallest, which describes the others, last.
      owned: the names that the block may write.

    Yields:
      The empty folder, beside `folder`.

    Raises:
      UserError: `folder` holds other things, or writing failed (no space); `folder` is unchanged.
    """
    target = as_path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; give a folder")
    present = {p.name for p in target.iterdir()} if target.is_dir() else set()
    if other := sorted(present - set(owned)):
        raise UserError(
            f"{target}: already holds {other[0]}; give a new folder, so that nothing is lost"
        )
    with (_moved if is_local(target) else _copied)(target) as new:
        yield new


@contextlib.contextmanager
def _moved(target: epath.Path) -> Iterator[Path]:
    new = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield new
        _finish(new)
        if target.exists():
            old = new.with_name(new.name + ".old")
            target.rename(old)
            new.rename(target)
            shutil.rmtree(old)
        else:
            new.rename(target)
    except OSError as error:
        raise UserError(f"{target}: could not be written: {error}; nothing was changed") from error
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _copied(target: epath.Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as place:
        yield Path(place)
        made = [file for file in Path(place).rglob("*") if file.is_file()]
        try:
            for file in sorted(made, key=lambda file: -file.stat().st_size):
                there = target / file.relative_to(place).as_posix()
                with as_os_error(), file.open("rb") as source, there.open("wb") as stream:
                    shutil.copyfileobj(source, stream, 2**24)
        except OSError as error:
            raise UserError(f"{target}: could not be written: {error}; run it again") from error


def _finish(folder: Path) -> None:
    """Flushes the files of a folder to disk and gives it the mode of an ordinary new folder."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # mkdtemp made it private
