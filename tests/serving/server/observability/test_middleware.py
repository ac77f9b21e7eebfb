"""A request is seen from its first byte to its last: answered, refused, failed or given up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import StreamingResponse
from starlette.testclient import TestClient

from lightning_llm.serving.engine.outputs import EngineStats, Update, Usage
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.observability.metrics import ServerMetrics
from lightning_llm.serving.server.observability.middleware import Observability
from tests.serving.server.observability.test_metrics import STATS, samples


class Tokenizer:
    """Words are numbers."""

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class Workers:
    """Two workers, of which one does not answer; what the other generates is told by the prompt's first token."""

    model_name = "tiny"
    tokenizer = Tokenizer()
    broken = False
    cancelled = 0

    async def stats(self) -> Sequence[EngineStats | None]:
        if self.broken:
            raise ConnectionError("no workers")
        return [None, STATS]

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, **options: object
    ) -> AsyncGenerator[Update, None]:
        yield Update(request_id, 0, [5], "a")
        if prompt_ids[0] == ENDLESS:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        usage = Usage(len(prompt_ids), 2, 1, 0, 0.0, 0.1, 0.2)
        yield Update(request_id, 0, [6], "b", finish_reason="stop", usage=usage)


ENDLESS = 99


def make_app(observability: Observability, workers: Workers) -> FastAPI:
    app, router, client = FastAPI(), APIRouter(prefix="/v1"), observability.watch(workers)

    @router.post("/chat/completions/{first}")
    async def completions(first: int) -> StreamingResponse:
        async def stream() -> AsyncIterator[str]:
            async for update in client.generate([first, 2, 3], SamplingParams(), request_id="cmpl-1"):
                yield update.text

        return StreamingResponse(stream(), headers={"x-request-id": "r-1"}, media_type="text/event-stream")

    @router.post("/completions")
    async def several() -> list[str]:
        async def one(place: int) -> str:
            updates = client.generate([7] * place, SamplingParams(), request_id=f"cmpl-2-{place}", priority=1)
            return "".join([update.text async for update in updates])

        return await asyncio.gather(one(1), one(2), one(3))

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("nothing here")

    app.include_router(router)
    observability.attach(app, workers)
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
    assert client.post("/v1/chat/completions/1?key=sk-1").text == "ab"
    found = samples(observability.metrics)
    assert found["lightning_llm:http_requests_total", "/v1/chat/completions/{first}", "POST", "200"] == 1
    assert found["lightning_llm:e2e_request_latency_seconds_count", "0"] == 1
    assert found["lightning_llm:inter_token_latency_seconds_count", "0"] == 1
    (line,) = lines
    told = {name: line[name] for name in ("route", "status", "request_id", "response_id", "operation", "stream")}
    assert told == {
        "route": "/v1/chat/completions/{first}",
        "status": 200,
        "request_id": "r-1",
        "response_id": "cmpl-1",
        "operation": "chat",
        "stream": True,
    }
    assert (line["prompt_tokens"], line["completion_tokens"], line["finish_reason"]) == (3, 2, "stop")
    assert not line["client_disconnected"]
    assert "prompt" not in line and "sk-1" not in json.dumps(line)


def test_several_prompts_are_one_line(observability, lines):
    client = TestClient(make_app(observability, Workers()))
    assert client.post("/v1/completions").json() == ["ab", "ab", "ab"]
    (line,) = lines
    assert (line["prompt_tokens"], line["cached_tokens"], line["completion_tokens"]) == (6, 3, 6)
    assert (line["operation"], line["finish_reason"]) == ("text_completion", "stop,stop,stop")
    assert samples(observability.metrics)["lightning_llm:request_prompt_tokens_count", "0"] == 3


def test_prompts_are_logged_where_an_option_says_so(lines):
    observability = Observability(ServerMetrics("tiny", max_model_len=128), log_prompts=True)
    TestClient(make_app(observability, Workers())).post("/v1/chat/completions/1")
    (line,) = lines
    assert line["prompt"] == "1 2 3"


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
    workers = Workers()
    app = make_app(observability, workers)

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
            "path": f"/v1/chat/completions/{ENDLESS}",
            "headers": [],
            "query_string": b"",
        }
        await asyncio.wait_for(app(scope | {"asgi": {"spec_version": "2.3"}}, receive, send), 20)

    asyncio.run(leave())
    (line,) = lines
    assert line["client_disconnected"] and line["status"] == 200 and "finish_reason" not in line
    assert line["completion_tokens"] == 1 and workers.cancelled == 1
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
