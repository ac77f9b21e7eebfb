"""`Observability`: sees every request from its first byte to its last, and tells metrics, log and trace at its end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_llm.serving.engine.outputs import EngineStats
from lightning_llm.serving.server.http.client import EngineLike
from lightning_llm.serving.server.http.jobs import Job
from lightning_llm.serving.server.observability.logs import log_request
from lightning_llm.serving.server.observability.metrics import RequestObserver, ServerMetrics
from lightning_llm.serving.server.observability.record import Operation, RequestRecord, ResponseRecord, joined
from lightning_llm.serving.server.observability.tracing import RequestTracer

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's word for a client that did not wait for an answer
_SCOPE = "lightning_llm.seen"


class Observability:
    """What an API process shows of itself.

        observability = Observability(client, tracer=make_tracer())
        attach(app, client, settings, observer=observability)
        observability.attach(app)

    Args:
        client: The engines.
        vllm_names: Expose all metrics under `vllm:` as well.
        tracer: Where spans go; None: nowhere.
        log_prompts: Put prompts in the log.
    """

    def __init__(
        self,
        client: EngineLike,
        *,
        vllm_names: bool = False,
        tracer: RequestTracer | None = None,
        log_prompts: bool = False,
    ) -> None:
        self.client = client
        self.vllm_names = vllm_names
        self.tracer = tracer
        self.log_prompts = log_prompts

    @cached_property
    def metrics(self) -> ServerMetrics:
        """Where requests are counted, in this process: the model's name is known when a worker has loaded it."""
        client = self.client
        return ServerMetrics(client.model_name, max_model_len=client.max_model_len, vllm_names=self.vllm_names)

    def attach(self, app: FastAPI) -> None:
        """Adds `GET /metrics`, and the middleware: as the last one that is added, it is around the others."""

        @app.get("/metrics", include_in_schema=False)
        async def show_metrics(request: Request) -> Response:
            return await self.scrape(request.headers.get("accept", ""))

        app.add_middleware(ObservabilityMiddleware, observability=self)
        if self.tracer is not None:
            _at_end(app, self.tracer.shutdown)

    def __call__(self, job: Job, place: int) -> RequestObserver:
        """A prompt goes to the engine: what this returns is to be shown what comes of it."""
        seen: _Seen = job.request.scope.setdefault(_SCOPE, _Seen())
        prompt = job.prompts[place]
        record = RequestRecord(
            request_id=job.id,
            model=self.client.model_name,
            operation=_operation(job),
            params=None if job.pooling else job.params,
            prompt=self.client.tokenizer.decode(prompt) if self.log_prompts else None,
            arrival=seen.began,
            prompt_tokens=len(prompt),
        )
        observer = RequestObserver(self.metrics, record)
        seen.observers.append(observer)
        return observer

    async def scrape(self, accept: str = "") -> Response:
        """What a scraper gets."""
        stats: Mapping[int, EngineStats]
        try:
            stats = await self.client.stats()
        except Exception:  # metrics matter most when something does not work
            log.exception("The workers did not say how they stand")
            stats = {}
        self.metrics.set_engines(stats)
        content, content_type = self.metrics.render(accept)
        return Response(content, headers={"content-type": content_type})

    def end(self, observers: Sequence[RequestObserver], response: ResponseRecord) -> None:
        """A response went out."""
        self.metrics.count_response(response)
        for observer in observers:
            observer.on_finish()
        request = joined([observer.record for observer in observers]) if observers else None
        if request is not None and self.tracer is not None:
            self.tracer.record(request, response)
        log_request(response, request)


def _at_end(app: FastAPI, work: Callable[[], None]) -> None:
    """Does some work when the app ends."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_work(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            yield state
        await asyncio.to_thread(work)

    app.router.lifespan_context = with_work  # type: ignore[assignment]


def _operation(job: Job) -> Operation:
    if job.pooling:
        return "embeddings"
    return "chat" if "/chat/" in job.request.scope["path"] else "text_completion"


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
        seen = scope[_SCOPE] = _Seen()

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
            if error_type is None and not seen.complete and not seen.gone:
                error_type = "IncompleteResponse"
            response = ResponseRecord(
                method=scope["method"],
                route=_route(scope),
                path=scope["path"],
                status=seen.status or (500 if error_type is not None and not seen.gone else CLIENT_CLOSED_REQUEST),
                duration=time.monotonic() - seen.began,
                stream=seen.stream,
                disconnected=seen.gone,
                error_type=error_type,
                request_id=seen.request_id or scope.get("state", {}).get("request_id"),
                client=scope["client"][0] if scope.get("client") else None,
                server=tuple(scope["server"]) if scope.get("server") else None,
                headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            )
            self.observability.end(seen.observers, response)


def _route(scope: Scope) -> str:
    """The path of the route, as it was declared, also where a request was refused before it got there."""
    if "route" in scope:
        return getattr(scope["route"], "path", "other")
    path = scope["path"]
    declared = scope["app"].openapi()["paths"] if "app" in scope else {}
    return path if scope["method"].lower() in declared.get(path, ()) else "other"


@dataclass
class _Seen:
    """A request that is being answered: its prompts, and how far the response has gone."""

    began: float = field(default_factory=time.monotonic)
    observers: list[RequestObserver] = field(default_factory=list)
    status: int = 0
    stream: bool = False
    complete: bool = False
    gone: bool = False
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
