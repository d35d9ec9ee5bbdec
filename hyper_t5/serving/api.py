"""The HTTP API: OpenAI's completions and models, adapters, health and metrics, and the page."""

from __future__ import annotations

import asyncio
import hmac
import importlib.resources
import io
import json
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from hyper_t5 import export
from hyper_t5.serving import schemas
from hyper_t5.serving.scheduler import QueueFullError, StoppedError
from hyper_t5.serving.service import Delta, RefusedError, RowStream, Service
from hyper_t5.serving.store import check_name
from hyper_t5.utils.errors import UserError

MOST_BYTES = 2_000_000  # of a request's body
FAILED = "the server has failed; its log says why, and it must be restarted"
T = TypeVar("T", bound=BaseModel)
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Metrics:
    """What /metrics reports."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("hyper_t5_requests", "Requests", ["path", "status"], **options)
        self.seconds = Histogram("hyper_t5_request_seconds", "Latency", ["path"], **options)
        self.tokens = Counter("hyper_t5_generated_tokens", "Generated tokens", **options)
        self.adapters = Counter("hyper_t5_adapters", "Adapters requested", ["cached"], **options)
        scheduler = service.scheduler
        gauge = Gauge("hyper_t5_queued_rows", "Rows that wait for a slot", **options)
        gauge.set_function(lambda: scheduler.queued)
        gauge = Gauge("hyper_t5_batch_fill", "Share of slot steps with a row", **options)
        gauge.set_function(lambda: scheduler.used_slot_steps / max(scheduler.slot_steps, 1))


def create_app(
    service: Service, api_key: str = "", adapter_dir: Path | None = None, log: bool = True
) -> FastAPI:
    """Return the application of a running service.

    Args:
      service: its scheduler has started.
      api_key: required as a bearer token of /v1, unless ''.
      adapter_dir: the folder below which adapters may be loaded; None refuses all.
      log: print one JSON line for each request.
    """
    app = FastAPI(title="hyper_t5", docs_url=None, redoc_url=None)
    metrics = Metrics(service)
    app.state.metrics = metrics

    @app.middleware("http")
    async def handle(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        start = time.monotonic()
        try:
            _authorize(request, api_key)
            response = await call_next(request)
        except RefusedError as refused:
            response = _error(refused)
        route = request.scope.get("route")
        path = getattr(route, "path", "other")
        seconds = time.monotonic() - start
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.seconds.labels(path).observe(seconds)
        if log:
            line: dict[str, Any] = {"method": request.method, "path": request.url.path}
            line |= {"status": response.status_code, "seconds": round(seconds, 4)}
            print(json.dumps(line), file=sys.stderr, flush=True)
        return response

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return _error(error)

    @app.exception_handler(UserError)
    async def invalid(request: Request, error: UserError) -> Response:
        return _error(RefusedError(400, str(error)))

    @app.exception_handler(QueueFullError)
    async def full(request: Request, error: QueueFullError) -> Response:
        refused = RefusedError(429, "the queue is full; try again in a second")
        return _error(refused, {"Retry-After": "1"})

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
        return _error(RefusedError(error.status_code, message))

    @app.exception_handler(StoppedError)
    async def stopped(request: Request, error: StoppedError) -> Response:
        return _error(RefusedError(503, FAILED))

    _add_pages(app, service, metrics)
    _add_models(app, service)
    _add_adapters(app, service, metrics, adapter_dir)
    _add_completions(app, service, metrics)
    return app


def _authorize(request: Request, api_key: str) -> None:
    """Raise RefusedError where /v1 is requested without the key."""
    if not api_key or not request.url.path.startswith("/v1"):
        return
    token = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(token.encode(), api_key.encode()):
        raise RefusedError(401, "no API key, or a wrong one; send Authorization: Bearer KEY")


def _error(error: RefusedError, headers: dict[str, str] | None = None) -> JSONResponse:
    """Return the OpenAI API's error body."""
    kind = TYPES.get(error.status, "invalid_request_error")
    content = {"message": str(error), "type": kind, "param": error.field or None, "code": None}
    return JSONResponse({"error": content}, error.status, headers)


async def _read(request: Request, kind: type[T]) -> T:
    """Read and validate a JSON body of at most MOST_BYTES."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            raise RefusedError(413, f"the body is larger than {MOST_BYTES:,} bytes")
    try:
        return kind.model_validate_json(bytes(body))
    except ValidationError as error:
        raise RefusedError(400, *schemas.first_problem(error)) from None


# ------------------------------------------------------------------------------- pages, models


def _add_pages(app: FastAPI, service: Service, metrics: Metrics) -> None:
    page = (importlib.resources.files("hyper_t5.serving") / "page.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page)

    @app.get("/health")
    async def health() -> Response:
        alive = service.scheduler.is_alive
        return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")


def _add_models(app: FastAPI, service: Service) -> None:
    def describe(name: str, parent: str | None) -> dict[str, Any]:
        fields = {"id": name, "object": "model", "created": service.created}
        sizes = {"max_output_tokens": service.limits.max_output}
        return fields | {"owned_by": "hyper_t5", "parent": parent} | sizes

    @app.get("/v1/models")
    async def models() -> Any:
        adapters = [describe(name, service.name) for name in service.store.names()]
        return {"object": "list", "data": [describe(service.name, None), *adapters]}

    @app.get("/v1/models/{name}")
    async def model(name: str) -> Any:
        service.find(name)
        return describe(name, None if name == service.name else service.name)

    @app.get("/v1/tasks")
    async def tasks() -> Any:
        return {"object": "list", "data": await asyncio.to_thread(service.sample_tasks)}


# ------------------------------------------------------------------------------- adapters


def _add_adapters(
    app: FastAPI, service: Service, metrics: Metrics, adapter_dir: Path | None
) -> None:
    def existing(name: str) -> str:
        if name not in service.store.names():
            raise RefusedError(404, f"no adapter {name[:100]!r}; GET /v1/adapters lists them")
        return name

    @app.post("/v1/adapters")
    async def create(request: Request) -> Any:
        body = await _read(request, schemas.AdapterRequest)
        if body.name:
            check_name(body.name)
        result = await adapt(service, metrics, body, body.name)
        return {"object": "adapter", **result}

    @app.get("/v1/adapters")
    async def adapters() -> Any:
        names = service.store.names()
        described = [await asyncio.to_thread(service.store.describe, name) for name in names]
        return {"object": "list", "data": described}

    @app.get("/v1/adapters/{name}")
    async def adapter(name: str) -> Any:
        return await asyncio.to_thread(service.store.describe, existing(name))

    @app.delete("/v1/adapters/{name}")
    async def delete(name: str) -> Any:
        return {"name": name, "deleted": service.store.remove(existing(name))}

    @app.get("/v1/adapters/{name}/peft")
    async def peft(name: str) -> Response:
        content = await asyncio.to_thread(_peft_zip, service, existing(name))
        disposition = {"Content-Disposition": f'attachment; filename="{name}.zip"'}
        return Response(content, media_type="application/zip", headers=disposition)

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        body = await _read(request, schemas.LoadRequest)
        if adapter_dir is None:
            raise RefusedError(403, "start the server with --adapter_dir to load adapters")
        folder = (adapter_dir / body.lora_path).resolve()
        if not folder.is_relative_to(adapter_dir.resolve()):
            raise RefusedError(403, "lora_path: must be inside --adapter_dir", "lora_path")
        await asyncio.wrap_future(
            service.scheduler.call(lambda: service.load(check_name(body.lora_name), folder))
        )
        return {"name": body.lora_name}

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        body = await _read(request, schemas.UnloadRequest)
        service.store.remove(existing(body.lora_name))
        return {"name": body.lora_name}


async def adapt(
    service: Service, metrics: Metrics, task: schemas.Task, name: str = ""
) -> dict[str, Any]:
    """Generate or find the adapter of a task."""
    content = task.content()
    if not content:
        raise RefusedError(400, "an instruction or examples are required", "instruction")
    result = await asyncio.wrap_future(service.adapt(content, name))
    metrics.adapters.labels(str(result["cached"]).lower()).inc()
    return result


def _peft_zip(service: Service, name: str) -> bytes:
    """Return a zip of the adapter as a PEFT folder; RefusedError where PEFT cannot express it."""
    adapter = service.store.get(name)
    assert adapter is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        try:
            export.export_peft(folder, adapter.adapters, service.predictor.backbone.sizes, "")
        except UserError as error:
            raise RefusedError(409, str(error)) from None
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"{name}/{file.name}")
        return content.getvalue()


# ------------------------------------------------------------------------------- completions


def _add_completions(app: FastAPI, service: Service, metrics: Metrics) -> None:
    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await _read(request, schemas.CompletionRequest)
        _refuse_penalties(body)
        if len(body.prompts) * body.n > schemas.MOST_ROWS:
            raise RefusedError(400, f"n: prompts times n is at most {schemas.MOST_ROWS}", "n")
        model = body.model
        if body.task is not None:
            if model and model != service.name:
                raise RefusedError(400, "task: leave model out, or name the base model", "task")
            model = (await adapt(service, metrics, body.task))["name"]
        adapter = service.find(model)
        first_seed = body.seed if body.seed is not None else uuid.uuid4().int % 2**31
        streams, prompt_tokens = service.submit(
            body.prompts,
            adapter,
            max_tokens=body.max_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seeds=[first_seed + i for i in range(body.n)],
            stops=body.stops,
            top_logprobs=body.logprobs or 0,
        )
        completion = _Completion(body, model, streams, prompt_tokens, metrics)
        if body.stream:
            return StreamingResponse(completion.events(), media_type="text/event-stream")
        return JSONResponse(await completion.whole(request))


def _refuse_penalties(body: schemas.CompletionRequest) -> None:
    for field in ("presence_penalty", "frequency_penalty"):
        if getattr(body, field):
            raise RefusedError(400, f"{field}: not served; leave it out", field)


class _Completion:
    """One completion request, and its rows."""

    def __init__(
        self,
        body: schemas.CompletionRequest,
        model: str,
        streams: list[RowStream],
        prompt_tokens: int,
        metrics: Metrics,
    ) -> None:
        self._body, self._streams, self._metrics = body, streams, metrics
        self._prompt_tokens = prompt_tokens
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def _usage(self) -> dict[str, int]:
        generated = sum(stream.tokens for stream in self._streams)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self._prompt_tokens + generated,
        }

    def _choice(self, index: int, deltas: list[Delta], offset: int = 0) -> dict[str, Any]:
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs is not None:
            lengths = [len(token.text) for token in tokens]
            logprobs = {
                "tokens": [token.text for token in tokens],
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": [token.top for token in tokens],
                "text_offset": [offset + sum(lengths[:i]) for i in range(len(lengths))],
            }
        return {
            "index": index,
            "text": "".join(delta.text for delta in deltas),
            "logprobs": logprobs,
            "finish_reason": deltas[-1].reason or None,
        }

    async def whole(self, request: Request) -> dict[str, Any]:
        """Return the response when all rows have ended; cancel them where the client has gone."""
        watch = asyncio.create_task(self._cancel_on_disconnect(request))
        try:
            rows = [[delta async for delta in stream] for stream in self._streams]
        finally:
            watch.cancel()
            self._end()
        if any(deltas[-1].reason == "error" for deltas in rows):
            raise RefusedError(503, FAILED)
        choices = [self._choice(i, deltas) for i, deltas in enumerate(rows)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def _cancel_on_disconnect(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.2)
        self._cancel()

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()

    def _end(self) -> None:
        self._cancel()  # of rows that are not at their end
        self._metrics.tokens.inc(sum(stream.tokens for stream in self._streams))

    async def events(self) -> AsyncIterator[str]:
        """Yield server-sent events of all rows as they come."""
        merged: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()

        async def forward(index: int, stream: RowStream) -> None:
            async for delta in stream:
                await merged.put((index, delta))

        jobs = [asyncio.create_task(forward(i, s)) for i, s in enumerate(self._streams)]
        running, offsets = len(jobs), [0] * len(jobs)
        try:
            while running:
                index, delta = await merged.get()
                running -= bool(delta.reason)
                if delta.reason == "error":
                    yield _event({"error": {"message": FAILED, "type": "server_error"}})
                    return
                if delta.text or delta.reason or self._body.logprobs is not None:
                    choice = self._choice(index, [delta], offsets[index])
                    offsets[index] += len(delta.text)
                    yield _event({**self._head, "choices": [choice]})
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _event({**self._head, "choices": [], "usage": self._usage()})
            yield "data: [DONE]\n\n"
        finally:
            for job in jobs:
                job.cancel()
            self._end()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
