"""`Observability`: sees every request from its first byte to its last, and tells metrics, log and trace at its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_llm.serving.engine.outputs import EngineStats
from lightning_llm.serving.server.observability.logs import log_request
from lightning_llm.serving.server.observability.metrics import RequestObserver, ServerMetrics
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord
from lightning_llm.serving.server.observability.tracing import RequestTracer

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that did not wait for an answer
_SCOPE = "lightning_llm.observers"  # a list, so that what a route adds is seen even if the scope was copied on the way


class StatsSource(Protocol):
    """Who knows how the workers stand."""

    async def stats(self) -> Sequence[EngineStats | None]:
        """Of each worker, by its index; None of one that does not answer."""
        ...


class Observability:
    """What an API process shows of itself.

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

    def begin(self, request: Request, record: RequestRecord) -> RequestObserver:
        """Watches a request to the model; the route shows its updates to what this returns, and need not end it."""
        if not self.log_prompts:
            record.prompt = None
        observer = self.metrics.observe(record)
        request.scope.setdefault(_SCOPE, []).append(observer)
        return observer

    async def scrape(self, source: StatsSource, request: Request) -> Response:
        """`GET /metrics`."""
        try:
            stats = await source.stats()
        except Exception:  # metrics matter most when something does not work
            log.exception("The workers did not say how they stand")
            stats = []
        self.metrics.set_engines({index: one for index, one in enumerate(stats) if one is not None})
        content, content_type = self.metrics.render(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": content_type})

    def end(self, observers: Sequence[RequestObserver], response: ResponseRecord) -> None:
        """A response went out."""
        self.metrics.count_response(response)
        for observer in observers:
            observer.on_finish()
            if self.tracer is not None:
                self.tracer.record(observer.record, response)
            log_request(response, observer.record)
        if not observers:
            log_request(response)


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
        observers: list[RequestObserver] = []
        scope[_SCOPE] = observers
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
            response = ResponseRecord(
                method=scope["method"],
                route=getattr(scope.get("route"), "path", "other"),
                path=scope["path"],
                status=seen.status or (500 if error_type is not None and not seen.gone else CLIENT_CLOSED_REQUEST),
                duration=time.monotonic() - began,
                disconnected=seen.gone or (error_type is None and not seen.complete),
                error_type=error_type,
                request_id=seen.request_id,
                client=scope["client"][0] if scope.get("client") else None,
                server=tuple(scope["server"]) if scope.get("server") else None,
                headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            )
            self.observability.end(observers, response)


class _Seen:
    """How far a response has gone."""

    status = 0
    complete = False
    gone = False
    request_id: str | None = None

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", ()))
            if b"x-request-id" in headers:
                self.request_id = headers[b"x-request-id"].decode("latin-1")
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
