"""`attach`: all routes, limits and errors, put onto a FastAPI app: LitServe's, or any other."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI

from lightning_llm.serving.server.http.chat import chat_routes
from lightning_llm.serving.server.http.client import EngineLike
from lightning_llm.serving.server.http.completions import completion_routes
from lightning_llm.serving.server.http.conversation import ToolStyle
from lightning_llm.serving.server.http.documentation import ERRORS, describe
from lightning_llm.serving.server.http.embeddings import embedding_routes
from lightning_llm.serving.server.http.errors import install
from lightning_llm.serving.server.http.jobs import Observer
from lightning_llm.serving.server.http.limits import BodyLimits
from lightning_llm.serving.server.http.middleware import CancelOnDisconnect, ErrorBoundary, RequestIds
from lightning_llm.serving.server.http.probes import probe_routes
from lightning_llm.serving.server.http.service import Service
from lightning_llm.serving.server.http.settings import HTTPSettings
from lightning_llm.serving.server.http.simple import simple_routes
from lightning_llm.serving.server.http.tokens import token_routes


def attach(
    app: FastAPI, client: EngineLike, settings: HTTPSettings | None = None, *, observer: Observer | None = None
) -> Service:
    """Lets an app answer OpenAI's API with an engine.

    Middleware that is added afterwards is asked first: it knows a request by its headers alone, and may put the tenant
    into `request.state.cache_salt`. Other routers are included as ever.

    Args:
        app: Before it has started.
        client: The engine.
        settings: Limits and choices.
        observer: Is told of every prompt that goes to the engine.

    Returns:
        What the routes share.
    """
    service = Service(client, settings or HTTPSettings(), observer)
    install(app)
    describe(app)
    # The last is the outermost.
    app.add_middleware(CancelOnDisconnect)
    app.add_middleware(BodyLimits, settings=service.settings)
    app.add_middleware(ErrorBoundary, retry_after=service.settings.retry_after)
    app.add_middleware(RequestIds)
    app.include_router(router(service), responses=ERRORS)
    return service


def router(service: Service) -> APIRouter:
    """All routes."""
    style = ToolStyle(service.client, service.settings.tool_parser)
    routes = APIRouter()
    for part in (
        chat_routes(service, style),
        completion_routes(service),
        embedding_routes(service),
        simple_routes(service),
        token_routes(service, style),
        probe_routes(service),
    ):
        routes.include_router(part)
    return routes
