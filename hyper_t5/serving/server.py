"""``hyper-t5 serve``: start the service and uvicorn, and drain at SIGTERM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from hyper_t5.inference import predictor as predictor_lib
from hyper_t5.serving.api import create_app
from hyper_t5.serving.service import Limits, Service
from hyper_t5.utils import files
from hyper_t5.utils.errors import UserError

KEY_VARIABLE = "HYPER_T5_API_KEY"
DRAIN_SECONDS = 60  # for running requests, after SIGTERM
ADAPTERS = "served_adapters"  # in the workdir


def open_service(
    workdir: str, backbone: str, adapters: list[str], limits: Limits, overrides: Any = ()
) -> Service:
    """Open a run, or a backbone with adapter folders given as NAME=FOLDER.

    Raises:
      UserError: an adapter without a name, a folder of another backbone, or no model.
    """
    named: dict[str, Path] = {}
    for text in adapters:
        name, _, path = text.partition("=")
        if not path:
            raise UserError(f"--adapter {text}: write NAME=FOLDER")
        named[name] = Path(path)
    if workdir:
        predictor = predictor_lib.load(workdir, overrides=overrides)
        folder = Path(workdir) / ADAPTERS
    else:
        predictor = predictor_lib.load(backbone)
        folder = files.cache_root() / "serving" / predictor.backbone.digest[:32]
    name = Path(workdir or backbone).resolve().name
    return Service(predictor, name, folder, named, limits)


class _Server(uvicorn.Server):
    """Uvicorn that says when it is ready, and ends with exit code 0 after SIGTERM."""

    def __init__(self, config: uvicorn.Config, banner: str) -> None:
        super().__init__(config)
        self._banner = banner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then print the banner."""
        await super().startup(sockets)
        print(self._banner, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        previous = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound but does not listen yet; UserError where it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(
            f"serve: cannot listen at {host}:{port}: {error.strerror}; choose another --host or "
            "--port"
        ) from None
    return bound


def _banner(name: str, host: str, port: int, key: str) -> str:
    """Return the addresses, and a line of curl that works."""
    header = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if key else ""
    body = json.dumps({"model": name, "prompt": "a b c", "max_tokens": 8})
    command = f"/v1/completions{header} -H 'Content-Type: application/json' -d '{body}'"
    url = f"http://{host}:{port}"
    return f"at {url}/v1, page {url}/\ncurl {url}{command}"


def serve(
    workdir: str,
    backbone: str,
    adapters: list[str],
    limits: Limits,
    *,
    overrides: Any = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str = "",
    adapter_dir: str = "",
    warm_up: bool = True,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish the running requests.

    Args:
      workdir: a run, or '' where ``backbone`` is set.
      backbone: a backbone without a hypermodel.
      adapters: NAME=FOLDER of native adapter folders.
      limits: sizes.
      overrides: of the run's config.
      host: address to listen on.
      port: 0 is any.
      api_key: bearer token of /v1; '' is that of HYPER_T5_API_KEY, or none.
      adapter_dir: the folder below which requests may load adapters; '' is none.
      warm_up: compile all programs first.
    """
    start = time.monotonic()
    with _bind(host, port) as bound:
        service = open_service(workdir, backbone, adapters, limits, overrides)
        if warm_up:
            for line in service.warm_up():
                print(f"serve: compiled {line}", flush=True)
        service.scheduler.start()
        key = api_key or os.environ.get(KEY_VARIABLE, "")
        app = create_app(service, key, Path(adapter_dir) if adapter_dir else None)
        config = uvicorn.Config(
            app, host, port, log_level="warning", timeout_graceful_shutdown=DRAIN_SECONDS
        )
        banner = f"serve: ready after {time.monotonic() - start:.1f} s " + _banner(
            service.name, "127.0.0.1" if host == "0.0.0.0" else host, bound.getsockname()[1], key
        )
        try:
            _Server(config, banner).run([bound])
        finally:
            service.scheduler.stop()
