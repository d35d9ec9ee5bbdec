"""Local files and folders, and those of a bucket (`gs://BUCKET/NAME`): JSON, atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from hyper_t5.utils.errors import UserError
from hyper_t5.utils.streams import is_stream, open_stream

File = str | os.PathLike[str]
LFS_POINTER = b"version https://git-lfs"


def as_path(path: File) -> epath.Path:
    """Return an absolute local path or a bucket's path; pathlib's `gs:/BUCKET` is repaired."""
    absolute = epath.Path(re.sub(r"^(gs|s3):/+", r"\1://", os.fspath(path)))
    return absolute.resolve() if is_local(absolute) else absolute


def _writable_path(path: File) -> epath.Path:
    """Return `as_path`'s path, or where it is a link, the path of the link's target."""
    absolute = as_path(path)
    is_link = is_local(absolute) and os.path.islink(absolute) and not is_stream(absolute)
    return epath.Path(os.path.realpath(absolute)) if is_link else absolute


def is_local(path: File) -> bool:
    """Return whether a path is on this machine, where files can be renamed, locked and synced."""
    return "://" not in os.fspath(path)


def cache_root(cache_dir: File = "") -> Path:
    """Return the folder of `data.cache_dir`, by default hyper_t5 in $XDG_CACHE_HOME or ~/.cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hyper_t5"
    return (Path(cache_dir) if os.fspath(cache_dir) else default).expanduser()


@contextlib.contextmanager
def as_os_error() -> Iterator[None]:
    """Convert exceptions of bucket clients, each of which has its own types, to OSError."""
    try:
        yield
    except (OSError, UserError):
        raise
    except Exception as error:
        raise OSError(str(error)) from error


def local_copy(path: File) -> Path:
    """Return a local path itself, or the cached copy of a bucket's file or folder."""
    source = as_path(path)
    if is_local(source):
        return Path(path)
    try:
        with as_os_error():
            listing = sorted(_listing(source, ""))
            if not listing:
                raise UserError(f"{source}: no such file or folder in the bucket")
            key = hashlib.sha256(repr([str(source), listing]).encode()).hexdigest()[:16]
            target = cache_root() / "buckets" / key / source.name
            if not target.exists():
                _download(source, listing, target)
            return target
    except OSError as error:
        raise UserError(f"{source}: cannot be copied from the bucket: {error}") from error


def _download(source: epath.Path, listing: list[tuple[str, int, float]], target: Path) -> None:
    size = sum(length for _, length, _ in listing)
    print(f"{source}: copying {size / 1e9:.2f} GB to {target}", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        copy = Path(folder) / source.name
        for name, _, _ in listing:
            _copy_file(source / name if name else source, copy / name if name else copy)
        with contextlib.suppress(OSError):  # another process may have renamed its copy first
            copy.rename(target)


def _listing(path: epath.Path, name: str) -> Iterator[tuple[str, int, float]]:
    """Yield (relative name, bytes, modification time) of a folder's files, or of one file, ''."""
    if path.is_dir():
        for child in path.iterdir():
            yield from _listing(child, f"{name}/{child.name}" if name else child.name)
    elif path.exists():
        stat = path.stat()
        yield name, stat.length, stat.mtime


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 2**24)


# ------------------------------------------------------------------------------------- reading


def read_bytes(file: epath.Path) -> bytes:
    """Read a file; OSError when it cannot be read."""
    with as_os_error():
        return file.read_bytes()


def read_file(file: File) -> bytes:
    """Read a file; UserError when it cannot be read or is a Git LFS pointer."""
    try:
        content = read_bytes(as_path(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    check_no_pointer(file, content)
    return content


def check_no_pointer(file: File, start: bytes | None = None) -> None:
    """Raise UserError for a Git LFS pointer; ``start``: the first bytes where they are known."""
    if start is None:
        with epath.Path(file).open("rb") as stream:
            start = stream.read(len(LFS_POINTER))
    if start.startswith(LFS_POINTER):
        raise UserError(f"{file}: is a Git LFS pointer, not the file itself; run `git lfs pull`")


def read_text(file: File) -> str:
    """Read UTF-8 with any line ends and an optional byte order mark; UserError if it cannot."""
    try:
        return read_file(file).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8; save it as UTF-8") from None


def read_json(file: File) -> dict[str, Any]:
    """Read a file that contains one JSON object; UserError names the file and line."""
    return json_object(read_file(file), str(file), multiline=True)


def json_object(raw: bytes, location: str, multiline: bool = False) -> dict[str, Any]:
    """Parse one JSON object, a line of a file or, with ``multiline``, a whole file.

    UserError, with the prefix ``location``: not UTF-8, not JSON, no object, or an invalid string.
    """
    check_no_pointer(location, raw)
    try:
        value = json.loads(raw.decode("utf-8-sig"))
        if b"\\ud" in raw or b"\\uD" in raw:  # JSON can escape half a pair; text cannot hold it
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        number = raw.count(b"\n", 0, error.start) + 1
        line = f", line {number}" if multiline else ""
        raise UserError(f"{location}{line}: not UTF-8; save it as UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{location}: holds half a surrogate pair, which is no character") from None
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if multiline else ""
        raise UserError(f"{location}{line}: not valid JSON ({error.msg})") from None
    except (ValueError, RecursionError):
        reason = "a number of thousands of digits, or nested too deeply"
        raise UserError(f"{location}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{location}: must be a JSON object")
    return value


def check_regular(file: Path, max_bytes: int | None = None) -> None:
    """Raise UserError for a device, a pipe, a folder, or a file of more than ``max_bytes``."""
    if file.exists() and not file.is_file():
        raise UserError(f"{file}: is no regular file; pass a folder of files")
    if max_bytes is not None and file.exists() and file.stat().st_size > max_bytes:
        raise UserError(
            f"{file}: has {file.stat().st_size:,} bytes; at most {max_bytes:,} are read"
        )


# ------------------------------------------------------------------------------------- writing


def check_writable(file: Path) -> None:
    """Raise UserError where a local file, whose folder may not exist, cannot be written."""
    if not is_local(as_path(file)) or is_stream(file):
        return
    if file.is_dir():
        raise UserError(f"cannot write {file}: is a folder; pass the name of a file")
    try:
        folder = _writable_path(file).parent
        while not folder.exists():
            folder = folder.parent
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error


def write_bytes(file: epath.Path, content: bytes | Iterable[bytes]) -> None:
    """Write and sync a file, not atomically, and make its folder; OSError when it cannot."""
    with as_os_error():
        file.parent.mkdir(parents=True, exist_ok=True)
        with open_stream(file, "wb") if is_stream(file) else file.open("wb") as stream:
            for chunk in [content] if isinstance(content, bytes) else content:
                stream.write(chunk)
            if is_local(file) and not is_stream(file):
                stream.flush()
                os.fsync(stream.fileno())


def write_atomic(file: File, content: bytes | Iterable[bytes]) -> None:
    """Write under a temporary name and rename; UserError when it cannot, an old file is intact.

    Pipes and devices are written to directly.
    """
    path = _writable_path(file)
    temporary = _temporary(path) if is_local(path) and not is_stream(path) else path
    try:
        write_bytes(temporary, content)
        if temporary != path:
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error
    finally:
        if temporary != path:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text(file: File, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomic(file, text.encode())


def write_json(file: File, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, one field per line."""
    write_text(file, json.dumps(content, indent=1) + "\n")


def write_json_lines(file: File, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomic(file, (f"{json.dumps(row, ensure_ascii=False)}\n".encode() for row in rows))


@contextlib.contextmanager
def replaced_folder(folder: File, owned: Collection[str]) -> Iterator[Path]:
    """Yield an empty local folder that replaces, or is uploaded to, ``folder`` at the end.

    UserError: ``folder`` contains other files than ``owned``, or writing failed; then a local
    ``folder`` is unchanged.
    """
    target = _writable_path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target}: is a file; pass a folder")
    present = {child.name for child in target.iterdir()} if target.is_dir() else set()
    if other := sorted(present - set(owned)):
        raise UserError(f"{target}: already holds {other[0]}; pass a new folder to keep it")
    parent = target.parent if is_local(target) else epath.Path(tempfile.gettempdir())
    new = Path(_temporary(parent / target.name))
    try:
        new.mkdir(parents=True)
        yield new
        (_move_folder if is_local(target) else _upload_folder)(new, target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written: {error}; run it again") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _temporary(path: epath.Path) -> epath.Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:16]}")


def _move_folder(new: Path, target: epath.Path) -> None:
    for file in new.rglob("*"):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    old = _temporary(target)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _upload_folder(new: Path, target: epath.Path) -> None:
    """Upload the largest files first: the smallest one describes the others."""
    files = [file for file in new.rglob("*") if file.is_file()]
    with as_os_error():
        for file in sorted(files, key=lambda file: -file.stat().st_size):
            _copy_file(file, target / file.relative_to(new).as_posix())
