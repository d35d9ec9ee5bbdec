"""A small server of the Hugging Face Hub's read API: one repository, one commit, its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the repository ``name``; yield the endpoint and the requested paths."""
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, with_body: bool) -> None:
            requests.append(self.path)
            headers = {"X-Repo-Commit": COMMIT}
            if match := re.fullmatch(rf"/{name}/resolve/({COMMIT}|main)/(.+)", self.path):
                content = (folder / match[2]).read_bytes()
                headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
            elif re.match(rf"/api/models/{name}/tree/({COMMIT}|main)", self.path):
                fields = {"type": "file", "oid": "0" * 40}
                tree = [fields | {"path": f, "size": (folder / f).stat().st_size} for f in files]
                content = json.dumps(tree).encode()
            elif re.fullmatch(rf"/api/models/{name}(/revision/({COMMIT}|main))?", self.path):
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings}
                content = json.dumps(info | {"private": False, "tags": [], "downloads": 0}).encode()
            else:
                code = "RevisionNotFound" if f"/api/models/{name}/" in self.path else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
