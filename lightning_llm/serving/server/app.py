"""Everything that an app of the server has, put together: OpenAI's routes, metrics, traces, logs and the playground."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI

from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.http import HTTPSettings, attach
from lightning_llm.serving.server.keys import ApiKey, key_from_environment
from lightning_llm.serving.server.observability.middleware import Observability
from lightning_llm.serving.server.observability.tracing import make_tracer
from lightning_llm.serving.server.playground.routes import attach_playground


@dataclass(frozen=True, kw_only=True)
class AppSettings:
    """What is shown of the server to those who run it."""

    playground: bool = True
    """A page at / to chat with the model and to watch the engine."""
    vllm_metrics: bool = False
    """Metrics under vLLM's names too, for dashboards that know those."""
    otlp_endpoint: str | None = None
    """Where spans go, as http://host:4318; by default where OTEL_EXPORTER_OTLP_ENDPOINT says, if it does."""
    log_prompts: bool = False
    """Put prompts in the log."""


def put_together(
    app: FastAPI,
    client: EngineClient,
    http: HTTPSettings | None = None,
    shown: AppSettings | None = None,
    api_key: str | None = None,
) -> None:
    """Lets an app that has not started answer with the engines.

    Args:
        app: LitServe's.
        client: The engines.
        http: Limits and choices of the routes.
        shown: What is shown of the server.
        api_key: What clients have to send; None: what `LIT_SERVER_API_KEY` says, if it does.
    """
    shown = shown or AppSettings()
    observability = Observability(
        client,
        vllm_names=shown.vllm_metrics,
        tracer=make_tracer(shown.otlp_endpoint),
        log_prompts=shown.log_prompts,
    )
    attach(app, client, http, observer=observability)
    if shown.playground:
        attach_playground(app, client)
    if key := api_key or key_from_environment():
        app.add_middleware(ApiKey, key=key)
    observability.attach(app)  # around it: who is refused is counted, too
