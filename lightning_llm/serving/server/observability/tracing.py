"""OpenTelemetry: one server span per request to a model, made at its end from what was measured.

Names are those of the GenAI semantic conventions, with vLLM's latencies beside them. Without an endpoint there is no
tracer, and `opentelemetry` is not imported.
"""

from __future__ import annotations

import os
import time
from typing import Any

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord

PROVIDER = "lightning_llm"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def make_tracer(endpoint: str | None = None, *, service_name: str = "lightning-llm") -> RequestTracer | None:
    """A tracer, if there is somewhere to send spans to.

    Args:
        endpoint: Of an OTLP/HTTP collector, such as `http://localhost:4318`; None: what OpenTelemetry's own variables
            say, such as `OTEL_EXPORTER_OTLP_ENDPOINT`.
        service_name: Unless `OTEL_SERVICE_NAME` says otherwise.

    Raises:
        ConfigurationError: There is an endpoint, and OpenTelemetry is not installed.
    """
    if endpoint is None and not any(os.environ.get(name) for name in _ENDPOINTS):
        return None
    return RequestTracer(endpoint, service_name)


class RequestTracer:
    """Sends spans to a collector, from a thread of its own.

    Args:
        endpoint: As of `make_tracer`.
        service_name: Who we are.

    Raises:
        ConfigurationError: OpenTelemetry is not installed, or the endpoint is no URL.
    """

    def __init__(self, endpoint: str | None, service_name: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigurationError(
                f"An OTLP endpoint is set, and {error.name} is not installed: pip install 'lightning-llm[serve]', or "
                f"unset {' and '.join(_ENDPOINTS)}."
            ) from error
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(f"The OTLP endpoint {endpoint!r} must begin with http:// or https://.")
        if endpoint is not None and not endpoint.rstrip("/").endswith("/v1/traces"):
            endpoint = endpoint.rstrip("/") + "/v1/traces"
        resource = Resource.create({SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", service_name)})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("lightning_llm")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: RequestRecord, response: ResponseRecord) -> None:
        """Makes the span of a request that has just ended, as a child of what its `traceparent` header names."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        end = time.time_ns()
        span = self._tracer.start_span(
            f"{request.operation} {request.model}",
            context=self._propagator.extract(response.headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(request, response),
            start_time=end - int(response.duration * 1e9),
        )
        error = _error_type(request, response)
        if error is not None:
            span.set_attribute("error.type", error)
        if response.status >= 500 or request.error is not None:  # a client's mistake is no error of the server
            span.set_status(Status(StatusCode.ERROR, request.error))
        span.end(end)

    def shutdown(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _attributes(request: RequestRecord, response: ResponseRecord) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": request.operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": request.model,
        "gen_ai.request.stream": response.stream,
        "gen_ai.response.id": request.request_id,
        "gen_ai.response.model": request.model,
        "gen_ai.response.finish_reasons": request.finish_reasons,
        "gen_ai.response.time_to_first_chunk": request.time_to_first_token,
        "gen_ai.usage.input_tokens": request.prompt_tokens,
        "gen_ai.usage.output_tokens": request.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.cached_tokens,
        "gen_ai.latency.time_to_first_token": request.time_to_first_token,
        "gen_ai.latency.e2e": response.duration,
        "http.request.method": response.method,
        "http.route": response.route,
        "http.response.status_code": response.status,
        "lightning_llm.engine": request.engine,
        "lightning_llm.client_disconnected": response.disconnected,
    }
    if response.server is not None:
        attributes |= {"server.address": response.server[0], "server.port": response.server[1]}
    params = request.params
    if params is not None:
        attributes |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": float(params.temperature),
            "gen_ai.request.top_p": float(params.top_p),
            "gen_ai.request.top_k": params.top_k if params.top_k > 0 else None,
            "gen_ai.request.seed": params.seed,
            "gen_ai.request.frequency_penalty": float(params.frequency_penalty),
            "gen_ai.request.presence_penalty": float(params.presence_penalty),
            "gen_ai.request.choice.count": params.n if params.n != 1 else None,
            "gen_ai.request.stop_sequences": list(params.stop) or None,
        }
    if request.usages:
        usage = request.usages[0]
        attributes |= {
            "gen_ai.latency.time_in_queue": usage.queued,
            "gen_ai.latency.time_in_model_prefill": usage.prefill,
            "gen_ai.latency.time_in_model_decode": usage.decode,
            "gen_ai.latency.time_in_model_inference": usage.prefill + usage.decode,
        }
    return {name: value for name, value in attributes.items() if value is not None}


def _error_type(request: RequestRecord, response: ResponseRecord) -> str | None:
    if response.error_type is not None:
        return response.error_type
    if response.status >= 400:
        return str(response.status)
    return "engine_error" if request.error is not None else None
