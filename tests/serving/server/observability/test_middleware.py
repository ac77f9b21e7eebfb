"""A request is seen from its first byte to its last: answered, refused, failed or given up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence

import pytest
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from starlette.responses import Response
from starlette.testclient import TestClient

from lightning_llm.serving.engine.outputs import EngineStats, Update, Usage
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.metrics import ServerMetrics
from lightning_llm.serving.server.observability.middleware import Observability, ObservabilityMiddleware
from lightning_llm.serving.server.observability.record import RequestRecord
from tests.serving.server.observability.test_metrics import STATS, samples


class Workers:
    """Two workers, of which one does not answer."""

    broken = False

    async def stats(self) -> Sequence[EngineStats | None]:
        if self.broken:
            raise ConnectionError("no workers")
        return [None, STATS]


def make_app(observability: Observability, workers: Workers) -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/v1")

    @router.post("/completions/{name}")
    async def completions(request: Request, name: str) -> StreamingResponse:
        record = RequestRecord(
            request_id="cmpl-1", model="tiny", operation="text_completion", params=SamplingParams(), prompt="secret"
        )
        observer = observability.begin(request, record)

        async def stream() -> AsyncIterator[str]:
            observer.on_update(Update("cmpl-1", 0, [5], "a"))
            yield "a"
            if name == "endless":
                await asyncio.Event().wait()
            usage = Usage(3, 2, 0, 0, 0.0, 0.1, 0.2)
            observer.on_update(Update("cmpl-1", 0, [6], "b", finish_reason="stop", usage=usage))
            yield "b"

        return StreamingResponse(stream(), headers={"x-request-id": "from-the-client"})

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("nothing here")

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return await observability.scrape(workers, request)

    app.include_router(router)
    app.add_middleware(ObservabilityMiddleware, observability=observability)
    return app


@pytest.fixture
def observability() -> Observability:
    return Observability(ServerMetrics("tiny", max_model_len=128))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> list[dict]:
    """The fields of each request's log line, as they come."""
    caplog.set_level(logging.INFO, logger="lightning_llm")
    logging.getLogger("lightning_llm").propagate = True

    class Fields(list):
        def __iter__(self):
            return iter([record.fields for record in caplog.records if hasattr(record, "fields")])

    return Fields()


def test_an_answered_request_is_measured_counted_and_logged(observability, lines):
    client = TestClient(make_app(observability, Workers()))
    assert client.post("/v1/completions/x?key=sk-1").text == "ab"
    found = samples(observability.metrics)
    assert found["lightning_llm:http_requests_total", "/v1/completions/{name}", "POST", "200"] == 1
    assert found["lightning_llm:e2e_request_latency_seconds_count", "0"] == 1
    assert found["lightning_llm:inter_token_latency_seconds_count", "0"] == 1
    (line,) = lines
    assert line["route"] == "/v1/completions/{name}" and line["status"] == 200 and line["request_id"] == "cmpl-1"
    assert line["completion_tokens"] == 2 and line["finish_reason"] == "stop" and not line["client_disconnected"]
    assert "secret" not in json.dumps(line) and "sk-1" not in json.dumps(line)


def test_prompts_are_logged_where_an_option_says_so(lines):
    observability = Observability(ServerMetrics("tiny", max_model_len=128), log_prompts=True)
    TestClient(make_app(observability, Workers())).post("/v1/completions/x")
    (line,) = lines
    assert line["prompt"] == "secret"


def test_unknown_paths_are_one_route_and_failures_have_a_name(observability, lines):
    client = TestClient(make_app(observability, Workers()), raise_server_exceptions=False)
    for number in range(3):
        client.get(f"/made/up/{number}")
    assert client.get("/broken").status_code == 500
    found = samples(observability.metrics)
    assert found["lightning_llm:http_requests_total", "other", "GET", "404"] == 3
    assert found["lightning_llm:http_requests_total", "/broken", "GET", "500"] == 1
    assert list(lines)[-1]["error_type"] == "KeyError"


def test_a_client_that_goes_away_is_noticed(observability, lines):
    app = make_app(observability, Workers())

    async def leave() -> None:
        first = asyncio.Event()
        messages = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await first.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message.get("body"):
                first.set()

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions/endless",
            "headers": [],
            "query_string": b"",
        }
        await asyncio.wait_for(app(scope | {"asgi": {"spec_version": "2.3"}}, receive, send), 20)

    asyncio.run(leave())
    (line,) = lines
    assert line["client_disconnected"] and line["status"] == 200 and "finish_reason" not in line
    found = samples(observability.metrics)
    assert found["lightning_llm:time_to_first_token_seconds_count", "0"] == 1
    assert found["lightning_llm:e2e_request_latency_seconds_count", "0"] == 0


def test_metrics_are_served_whether_or_not_the_workers_answer(observability):
    workers = Workers()
    client = TestClient(make_app(observability, workers))
    assert 'num_requests_running{engine="1",model_name="tiny"} 3.0' in client.get("/metrics").text
    workers.broken = True
    text = client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert text.headers["content-type"].startswith("application/openmetrics-text")
    assert "num_requests_running{" not in text.text
    assert 'generation_tokens_total{engine="1",model_name="tiny"} 80.0' in text.text
    assert text.text.endswith("# EOF\n")
