"""`Observability`: sees every request from its first byte to its last, and tells metrics, log and trace at its end.

It stands around the routes as middleware and before the engine as a client, so that routes need not know of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.logs import log_request
from lightning_llm.serving.server.observability.metrics import ServerMetrics
from lightning_llm.serving.server.observability.record import Operation, RequestRecord, ResponseRecord, joined
from lightning_llm.serving.server.observability.tracing import RequestTracer

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that did not wait for an answer

# The prompts of the HTTP request that is being answered. A list, since tasks of a route have copies of its context.
_records: ContextVar[list[RequestRecord] | None] = ContextVar("records", default=None)
_path: ContextVar[str] = ContextVar("path", default="")


class Engines(Protocol):
    """The engines, as the process that speaks HTTP sees them."""

    @property
    def model_name(self) -> str:
        """What clients call the model."""

    @property
    def tokenizer(self) -> Any:
        """The model's."""

    def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, **options: Any
    ) -> AsyncGenerator[Update, None]:
        """What comes of a prompt until all its answers have ended. Closing the iterator cancels it."""

    async def stats(self) -> Sequence[EngineStats | None]:
        """Of each worker, by its index; None of one that does not answer."""


class Observability:
    """What an API process shows of itself.

        observability = Observability(metrics, tracer=make_tracer())
        attach(app, observability.watch(client), settings)
        observability.attach(app, client)

    Args:
        metrics: Where requests are counted.
        tracer: Where spans go; None: nowhere.
        log_prompts: Put prompts in the log.
    """

    def __init__(
        self, metrics: ServerMetrics, *, tracer: RequestTracer | None = None, log_prompts: bool = False
    ) -> None:
        self.metrics = metrics
        self.tracer = tracer
        self.log_prompts = log_prompts

    def watch(self, client: Engines) -> Any:
        """The same client, except that what it generates is measured."""
        return _WatchedEngines(client, self)

    def attach(self, app: FastAPI, client: Engines) -> None:
        """Adds `GET /metrics`, and the middleware: as the last one that is added, it is around the others."""

        @app.get("/metrics", include_in_schema=False)
        async def show_metrics(request: Request) -> Response:
            return await self.scrape(client, request.headers.get("accept", ""))

        app.add_middleware(ObservabilityMiddleware, observability=self)

    async def scrape(self, client: Engines, accept: str) -> Response:
        """What a scraper gets."""
        try:
            stats = await client.stats()
        except Exception:  # metrics matter most when something does not work
            log.exception("The workers did not say how they stand")
            stats = []
        self.metrics.set_engines({index: one for index, one in enumerate(stats) if one is not None})
        content, content_type = self.metrics.render(accept)
        return Response(content, headers={"content-type": content_type})

    def end(self, records: Sequence[RequestRecord], response: ResponseRecord) -> None:
        """A response went out."""
        self.metrics.count_response(response)
        request = joined(records) if records else None
        if request is not None and self.tracer is not None:
            self.tracer.record(request, response)
        log_request(response, request)


class _WatchedEngines:
    """An engine client of which every request is measured."""

    def __init__(self, client: Engines, observability: Observability) -> None:
        self._client = client
        self._observability = observability

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, **options: Any
    ) -> AsyncGenerator[Update, None]:
        embeds = options.get("pooling") is not None
        record = RequestRecord(
            request_id=request_id,
            model=self._client.model_name,
            operation="embeddings" if embeds else _operation(),
            params=None if embeds else params,
            prompt=self._client.tokenizer.decode(prompt_ids) if self._observability.log_prompts else None,
            prompt_tokens=len(prompt_ids),
        )
        records = _records.get()
        if records is not None:
            records.append(record)
        observer = self._observability.metrics.observe(record)
        try:
            async with aclosing(self._client.generate(prompt_ids, params, request_id=request_id, **options)) as updates:
                async for update in updates:
                    observer.on_update(update)
                    yield update
        finally:
            observer.on_finish()


def _operation() -> Operation:
    return "chat" if "/chat/" in _path.get() else "text_completion"


class ObservabilityMiddleware:
    """ASGI middleware around all routes.

    Args:
        app: What it is around.
        observability: Whom it tells.
    """

    def __init__(self, app: ASGIApp, observability: Observability) -> None:
        self.app = app
        self.observability = observability

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, and tells of it when its response has gone out or cannot."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        records: list[RequestRecord] = []
        tokens = _records.set(records), _path.set(scope["path"])
        seen = _Seen()

        async def received() -> Message:
            message = await receive()
            seen.gone |= message["type"] == "http.disconnect" and not seen.complete
            return message

        async def sent(message: Message) -> None:
            seen.take(message)
            await send(message)

        error_type = None
        try:
            await self.app(scope, received, sent)
        except Exception as error:
            error_type = type(error).__name__
            raise
        finally:
            _records.reset(tokens[0])
            _path.reset(tokens[1])
            response = ResponseRecord(
                method=scope["method"],
                route=getattr(scope.get("route"), "path", "other"),
                path=scope["path"],
                status=seen.status or (500 if error_type is not None and not seen.gone else CLIENT_CLOSED_REQUEST),
                duration=time.monotonic() - began,
                stream=seen.stream,
                disconnected=seen.gone or (error_type is None and not seen.complete),
                error_type=error_type,
                request_id=seen.request_id,
                client=scope["client"][0] if scope.get("client") else None,
                server=tuple(scope["server"]) if scope.get("server") else None,
                headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            )
            self.observability.end(records, response)


class _Seen:
    """How far a response has gone."""

    status = 0
    stream = False
    complete = False
    gone = False
    request_id: str | None = None

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            self.stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            if b"x-request-id" in headers:
                self.request_id = headers[b"x-request-id"].decode("latin-1")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
