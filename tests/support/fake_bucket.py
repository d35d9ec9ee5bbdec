"""A bucket, `gs://`, without a network: one table of objects for etils and for TensorStore.

TensorStore speaks HTTP to a server of this process; etils' paths get a backend of their own. Like a
real bucket it knows no folders and renames nothing: a rename is an error here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.server
import io
import json
import threading
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest
from etils.epath import backend, gpath, stat_utils

Objects = dict[str, bytes]  # `gs://BUCKET/NAME` -> content


class Paths(backend.Backend):
    """What etils asks of a file system."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def open(self, path: Any, mode: str) -> Any:
        text = "b" not in mode
        if "r" not in mode:
            return self._write(path, text)
        if path not in self.objects:
            raise FileNotFoundError(2, "No such file or directory", path)
        content = self.objects[path]
        return io.StringIO(content.decode()) if text else io.BytesIO(content)

    @contextlib.contextmanager
    def _write(self, path: Any, text: bool) -> Iterator[Any]:
        file: Any = io.StringIO() if text else io.BytesIO()
        yield file
        self.objects[path] = file.getvalue().encode() if text else file.getvalue()

    def exists(self, path: Any) -> bool:
        return path in self.objects or self.isdir(path)

    def isdir(self, path: Any) -> bool:
        return any(name.startswith(f"{path}/") for name in self.objects)

    def listdir(self, path: Any) -> list[str]:
        inside = [name for name in self.objects if name.startswith(f"{path}/")]
        return sorted({name.removeprefix(f"{path}/").split("/")[0] for name in inside})

    def glob(self, path: Any) -> list[str]:
        folder, _, pattern = path.rpartition("/")
        return [f"{folder}/{name}" for name in fnmatch.filter(self.listdir(folder), pattern)]

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        pass

    makedirs = mkdir

    def rmtree(self, path: Any) -> None:
        for name in [name for name in self.objects if name.startswith(f"{path}/")]:
            del self.objects[name]

    def remove(self, path: Any) -> None:
        if path not in self.objects:
            raise FileNotFoundError(2, "No such file or directory", path)
        del self.objects[path]

    def walk(self, top: Any, **_: Any) -> Any:
        raise NotImplementedError

    def rename(self, path: Any, dst: Any) -> None:
        raise AssertionError(f"a bucket cannot rename {path}")

    replace = rename

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        raise NotImplementedError

    def stat(self, path: Any) -> Any:
        if path not in self.objects:
            raise FileNotFoundError(2, "No such file or directory", path)
        content = self.objects[path]
        return stat_utils.StatResult(False, len(content), hash(content) % 2**31)


class Requests(http.server.BaseHTTPRequestHandler):
    """The part of Cloud Storage's JSON interface that TensorStore uses."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    objects: Objects
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, query, _ = self._parts()
        with self.lock:
            if path.endswith("/o"):
                self._list(path, query)
            else:
                self._object(self._name(path))

    def do_POST(self) -> None:
        path, query, body = self._parts()
        with self.lock:
            name = f"gs://{path.split('/b/')[1].split('/')[0]}/{query['name']}"
            if query.get("ifGenerationMatch") == "0" and name in self.objects:
                self._send(412)
                return
            self.objects[name] = body
            self._send(200, json.dumps({"name": query["name"], "generation": "1"}).encode())

    def do_DELETE(self) -> None:
        path, _, _ = self._parts()
        with self.lock:
            value = self.objects.pop(self._name(path), None)
        self._send(404 if value is None else 204)

    def _parts(self) -> tuple[str, dict[str, str], bytes]:
        url = urllib.parse.urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return url.path, dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True)), body

    def _name(self, path: str) -> str:
        bucket, _, name = path.split("/b/")[1].partition("/o/")
        return f"gs://{bucket}/{urllib.parse.unquote(name)}"

    def _object(self, name: str) -> None:
        if name not in self.objects:
            self._send(404)
            return
        content, code, more = self.objects[name], 200, {}
        if wanted := self.headers.get("Range", ""):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start = int(first) if first else len(content) - int(last)
            stop = min(int(last) + 1, len(content)) if first and last else len(content)
            if start >= len(content):
                self._send(416)
                return
            more = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            content, code = content[start:stop], 206
        self._send(code, content, {"x-goog-generation": "1", **more})

    def _list(self, path: str, query: dict[str, str]) -> None:
        prefix = f"gs://{path.split('/b/')[1].split('/')[0]}/"
        start, end = query.get("startOffset", ""), query.get("endOffset", "\U0010ffff")
        names = sorted(name.removeprefix(prefix) for name in self.objects)
        items = [{"name": name, "size": "0"} for name in names if start <= name < end]
        self._send(200, json.dumps({"items": items}).encode())

    def _send(self, code: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextlib.contextmanager
def served(patch: pytest.MonkeyPatch) -> Iterator[Objects]:
    """Inside, every `gs://` path is in this table."""
    objects: Objects = {}
    handler = type("Handler", (Requests,), {"objects": objects})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        # etils would import TensorFlow, whose client of buckets has one address only.
        patch.setattr(gpath, "_is_tf_installed", lambda: False)
        patch.setitem(gpath._PREFIX_TO_BACKEND, "gs", Paths(objects))
        try:
            yield objects
        finally:
            server.shutdown()
