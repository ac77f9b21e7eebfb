"""A request is seen from its first byte to its last: answered, refused, failed or given up."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Iterator, Mapping

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.errors import EngineDiedError
from lightning_llm.serving.server.observability.metrics import ServerMetrics
from lightning_llm.serving.server.observability.middleware import Observability
from lightning_llm.serving.server.observability.tracing import make_tracer
from tests.serving.server.observability.test_metrics import STATS, samples
from tests.serving.server.observability.test_tracing import PARENT, TRACE, Collector, attributes, collector  # noqa: F401
from tests.serving.server.observed import PacedClient, make_app, make_paced_client

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "the quick brown fox"}], "max_tokens": 5}


class Lines(logging.Handler):
    """The fields of each request's log line."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append({"level": record.levelname.lower(), **record.fields})


@pytest.fixture
def lines() -> Iterator[list[dict]]:
    logger, handler = logging.getLogger("lightning_llm.serving.requests"), Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler.seen
    logger.removeHandler(handler)
    logger.setLevel(level)


def count(metrics: ServerMetrics, name: str) -> float:
    return samples(metrics)[f"lightning_llm:{name}_count", "0"]


def test_an_answer_that_streams_is_measured_counted_and_logged(lines: list[dict]) -> None:
    app, metrics = make_app(make_paced_client())
    with TestClient(app) as client:
        headers = {"x-request-id": "r-1", "authorization": "Bearer sk-1"}
        answer = client.post("/v1/chat/completions?key=sk-2", json=CHAT | {"stream": True}, headers=headers)
        assert answer.text.endswith("data: [DONE]\n\n")
        served = client.get("/metrics").text
    assert samples(metrics)["lightning_llm:http_requests_total", "/v1/chat/completions", "POST", "200"] == 1
    assert 'lightning_llm:generation_tokens_total{engine="0",model_name="tiny"} 5.0' in served
    names = ("e2e_request_latency_seconds", "time_to_first_token_seconds", "request_decode_time_seconds")
    assert [count(metrics, name) for name in names] == [1, 1, 1]
    assert count(metrics, "inter_token_latency_seconds") == 4
    line = next(line for line in lines if line["route"] == "/v1/chat/completions")
    assert line["response_id"].startswith("chatcmpl-")
    wanted = {
        "request_id": "r-1",
        "status": 200,
        "operation": "chat",
        "stream": True,
        "completion_tokens": 5,
        "finish_reason": "length",
        "client_disconnected": False,
    }
    assert {name: line[name] for name in wanted} == wanted
    assert line["duration"] >= line["time_to_first_token"] > 0
    assert "prompt" not in line and "sk-" not in json.dumps(line)


def test_several_prompts_are_one_line_and_every_prompt_is_measured(lines: list[dict]) -> None:
    app, metrics = make_app(make_paced_client())
    with TestClient(app) as client:
        body = {"model": "tiny", "prompt": [[5, 6, 7], [8], [5, 6]], "max_tokens": 2, "n": 2}
        assert client.post("/v1/completions", json=body).status_code == 200
    (line,) = lines
    assert (line["prompt_tokens"], line["completion_tokens"]) == (6, 12)
    assert (line["operation"], line["stream"], line["finish_reason"]) == (
        "text_completion",
        False,
        "length," * 5 + "length",
    )
    assert count(metrics, "request_prompt_tokens") == 3
    assert count(metrics, "request_generation_tokens") == 6


def test_embeddings_have_no_tokens(lines: list[dict]) -> None:
    app, metrics = make_app(make_paced_client())
    with TestClient(app) as client:
        assert client.post("/v1/embeddings", json={"model": "tiny", "input": "the fox"}).status_code == 200
    (line,) = lines
    assert line["operation"] == "embeddings" and "time_to_first_token" not in line
    assert count(metrics, "e2e_request_latency_seconds") == 1
    assert count(metrics, "request_params_n") == 0


def test_prompts_are_logged_where_an_option_says_so(lines: list[dict]) -> None:
    app, _ = make_app(make_paced_client(), log_prompts=True)
    with TestClient(app) as client:
        client.post("/v1/chat/completions", json=CHAT)
    assert "the quick brown fox" in lines[0]["prompt"]


def test_a_span_continues_the_clients_trace(collector: Collector) -> None:  # noqa: F811
    tracer = make_tracer(collector.url)
    app, _ = make_app(make_paced_client(), tracer=tracer)
    with TestClient(app) as client:
        client.post("/v1/chat/completions", json=CHAT, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        client.get("/livez")
    (span,) = collector.spans()
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("chat tiny", TRACE, PARENT)
    assert attributes(span)["gen_ai.usage.output_tokens"] == 5
    assert attributes(span)["gen_ai.latency.time_in_model_decode"] > 0


def test_refused_requests_and_unknown_paths_are_counted(lines: list[dict]) -> None:
    app, metrics = make_app(make_paced_client())
    with TestClient(app) as client:
        for number in range(3):
            client.get(f"/made/up/{number}")
        client.post("/v1/chat/completions", json=CHAT | {"model": "other"})
    found = samples(metrics)
    assert found["lightning_llm:http_requests_total", "other", "GET", "404"] == 3
    assert found["lightning_llm:http_requests_total", "/v1/chat/completions", "POST", "404"] == 1
    assert [line["status"] for line in lines] == [404] * 4


async def leave(app: FastAPI, body: dict) -> None:
    """A client that goes away after the first piece of its answer."""
    got_one = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict:
        if messages:
            return messages.pop()
        await got_one.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        if message.get("body"):
            got_one.set()

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
    scope |= {"headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"}}
    await asyncio.wait_for(app(scope, receive, send), 30)


def test_a_client_that_goes_away_is_noticed(lines: list[dict]) -> None:
    client = make_paced_client(pace=0.001)
    app, metrics = make_app(client)
    asyncio.run(leave(app, CHAT | {"stream": True, "max_tokens": 900}))
    (line,) = lines
    assert line["client_disconnected"] and line["status"] == 200 and "finish_reason" not in line
    assert 1 <= line["completion_tokens"] < 900
    assert client.cancelled.get(timeout=10) == line["response_id"]
    assert count(metrics, "time_to_first_token_seconds") == 1
    assert count(metrics, "e2e_request_latency_seconds") == 0


def test_refusals_count_for_their_route_and_not_as_parameters(lines: list[dict]) -> None:
    app, metrics = make_app(make_paced_client())
    with TestClient(app) as client:
        assert client.post("/v1/chat/completions", content=b"{", headers={"content-type": "text/plain"}).is_error
        assert client.post("/generate", json={"prompt": "a", "max_tokens": 5000}).status_code == 400
    found = samples(metrics)
    assert found["lightning_llm:http_requests_total", "/v1/chat/completions", "POST", "415"] == 1
    assert count(metrics, "request_params_max_tokens") == 0
    assert [line["level"] for line in lines] == ["info"] * 2


def test_who_leaves_before_the_answer_is_logged_with_an_id(lines: list[dict]) -> None:
    app, _ = make_app(make_paced_client(pace=0.2))

    async def leave_at_once() -> None:
        messages = [{"type": "http.request", "body": json.dumps(CHAT).encode(), "more_body": False}]

        async def receive() -> dict:
            return messages.pop() if messages else {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            raise AssertionError(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "root_path": ""}
        headers = [(b"content-type", b"application/json"), (b"x-request-id", b"mine")]
        scope |= {"headers": headers, "asgi": {"version": "3.0", "spec_version": "2.3"}}
        await asyncio.wait_for(app(scope, receive, send), 30)

    asyncio.run(leave_at_once())
    (line,) = lines
    assert (line["status"], line["request_id"]) == (499, "mine")


def test_an_answer_cut_off_by_a_dead_worker_is_an_error(lines: list[dict]) -> None:
    class Dying(PacedClient):
        async def generate(self, *given, **fields) -> AsyncGenerator[Update, None]:
            async for update in super().generate(*given, **fields):
                yield update
                raise EngineDiedError("Worker 0 has ended.")

    client = make_paced_client()
    client.__class__ = Dying
    app, metrics = make_app(client)
    with TestClient(app) as http:
        assert "service_unavailable_error" in http.post("/v1/chat/completions", json=CHAT | {"stream": True}).text
    line = lines[-1]
    assert (line["level"], line["status"], line["error"]) == ("error", 200, "Worker 0 has ended.")
    assert 'request_success_total{engine="0",finished_reason="error",model_name="tiny"} 1.0' in (
        metrics.render()[0].decode()
    )


def test_failures_have_a_name(lines: list[dict]) -> None:
    observability = Observability(make_paced_client())
    app = FastAPI()

    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("nothing here")

    observability.attach(app)
    assert TestClient(app, raise_server_exceptions=False).get("/broken").status_code == 500
    (line,) = lines
    assert (line["status"], line["error_type"], line["route"]) == (500, "KeyError", "/broken")


class Workers(PacedClient):
    """Two workers, of which one does not answer, or nobody does."""

    broken = False

    async def stats(self) -> Mapping[int, EngineStats]:
        if self.broken:
            raise ConnectionError("no workers")
        return {1: STATS}


def test_metrics_are_served_whether_or_not_the_workers_answer() -> None:
    client = make_paced_client()
    client.__class__ = Workers
    app, _ = make_app(client)
    with TestClient(app) as http:
        assert 'num_requests_running{engine="1",model_name="tiny"} 3.0' in http.get("/metrics").text
        client.broken = True
        answer = http.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert "num_requests_running{" not in answer.text
    assert 'generation_tokens_total{engine="1",model_name="tiny"} 80.0' in answer.text
    assert answer.text.endswith("# EOF\n")
