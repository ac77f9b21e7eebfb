"""Spans as a collector gets them: a real OTLP/HTTP receiver decodes what was sent."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import ModuleType

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.outputs import Usage
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.record import RequestRecord, ResponseRecord
from lightning_llm.serving.server.observability.tracing import make_tracer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives spans over HTTP on a port of its own."""

    def __init__(self) -> None:
        self.exports: list[tuple[str, ExportTraceServiceRequest]] = []
        exports = self.exports

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                exports.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def spans(self) -> list[Span]:
        return [
            span
            for _, export in self.exports
            for resource in export.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_SAMPLER"):
        monkeypatch.delenv(name, raising=False)
    one = Collector()
    yield one
    one.close()


def attributes(span: Span) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in span.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        found[pair.key] = [one.string_value for one in value.values] if kind == "array_value" else value
    return found


def answered() -> RequestRecord:
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=20, seed=7, max_tokens=64, stop=("END",))
    record = RequestRecord(request_id="chatcmpl-1", model="tiny", params=params, arrival=10.0)
    record.first_token = 10.25
    record.prompt_tokens, record.completion_tokens, record.cached_tokens = 12, 5, 8
    record.finish_reasons, record.usages = ["stop"], [Usage(12, 5, 8, 0, 0.1, 0.15, 0.75)]
    return record


def response(**kwargs: object) -> ResponseRecord:
    values: dict[str, object] = {"method": "POST", "route": "/v1/chat/completions", "path": "/v1/chat/completions"}
    return ResponseRecord(
        **(values | {"status": 200, "duration": 1.0, "stream": True, "server": ("127.0.0.1", 8000)} | kwargs)
    )


def test_a_span_says_all_there_is_to_say_and_continues_the_clients_trace(collector: Collector) -> None:
    tracer = make_tracer(collector.url)
    assert tracer is not None
    tracer.record(answered(), response(headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": "Bearer k"}))
    tracer.shutdown()
    assert [path for path, _ in collector.exports] == ["/v1/traces"]
    (span,) = collector.spans()
    assert span.name == "chat tiny"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert abs(span.end_time_unix_nano - span.start_time_unix_nano - 1e9) < 1e6
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert attributes(span) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "lightning_llm",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 20,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": "tiny",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.response.time_to_first_chunk": 0.25,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 8,
        "gen_ai.latency.time_in_queue": 0.1,
        "gen_ai.latency.time_to_first_token": 0.25,
        "gen_ai.latency.time_in_model_prefill": 0.15,
        "gen_ai.latency.time_in_model_decode": 0.75,
        "gen_ai.latency.time_in_model_inference": 0.9,
        "gen_ai.latency.e2e": 1.0,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": 8000,
        "lightning_llm.engine": 0,
        "lightning_llm.client_disconnected": False,
    }


def test_errors_and_clients_without_a_trace(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ours")
    tracer = make_tracer()
    assert tracer is not None
    record = RequestRecord(request_id="cmpl-2", model="tiny", operation="text_completion", params=SamplingParams())
    tracer.record(record, response(status=400, headers={"traceparent": "nonsense"}))
    record.error = "The model could not compute this request."
    tracer.record(record, response(status=500, error_type="RuntimeError"))
    tracer.shutdown()
    bad, failed = collector.spans()
    assert bad.name == "text_completion tiny" and not bad.parent_span_id
    assert (bad.status.code, attributes(bad)["error.type"]) == (Status.STATUS_CODE_UNSET, "400")
    assert (failed.status.code, attributes(failed)["error.type"]) == (Status.STATUS_CODE_ERROR, "RuntimeError")
    resource = collector.exports[0][1].resource_spans[0].resource
    assert {pair.key: pair.value.string_value for pair in resource.attributes}["service.name"] == "ours"


def test_a_client_that_does_not_sample_is_not_recorded(collector: Collector) -> None:
    tracer = make_tracer(collector.url)
    assert tracer is not None
    tracer.record(answered(), response(headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}))
    tracer.shutdown()
    assert collector.spans() == []


@pytest.fixture
def without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as it is imported where OpenTelemetry is not installed."""
    name = "lightning_llm.serving.server.observability.tracing"
    for other in [other for other in sys.modules if other.split(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, other, None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, name)
    for variable in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    return importlib.import_module(name)


def test_without_an_endpoint_opentelemetry_is_not_imported(without_opentelemetry: ModuleType) -> None:
    assert without_opentelemetry.make_tracer() is None


def test_an_endpoint_without_opentelemetry_is_a_mistake_that_is_told(without_opentelemetry: ModuleType) -> None:
    with pytest.raises(ConfigurationError, match=r"pip install 'lightning-llm\[serve\]'"):
        without_opentelemetry.make_tracer("http://localhost:4318")


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="must begin with http"):
        make_tracer("localhost:4318")
