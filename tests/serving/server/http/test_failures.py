"""Clients that leave, engines that fail or are gone, and what is said of it."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator

import httpx
import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.http import HTTPSettings
from tests.serving.server.http.served import Server, make_client, serve

LONG = {"max_tokens": 900, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "hello"}], **LONG}
SECRET = "canary-7f3a"


@pytest.fixture
def own() -> Iterator[Server]:
    """A server that a test may break."""
    with serve(make_client(), HTTPSettings(ping_interval=0.05)) as running:
        yield running


def post(server: Server, path: str, body: dict) -> socket.socket:
    """A connection on which a request was sent, and nothing is read."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    connection.sendall(head.encode() + content)
    return connection


def all_blocks_are_free(server: Server) -> bool:
    stats = server.client.engine.stats()
    return stats.blocks_free == stats.blocks_total and not server.client.engine.has_work


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 3}, 1),
        ("/v1/completions", {"prompt": ["a", "b", "c"], **LONG}, 3),
        ("/generate_stream", {"prompt": "a", **LONG}, 1),
    ],
)
def test_leaving_a_stream_cancels_it(own: Server, path: str, body: dict, requests: int) -> None:
    with httpx.stream("POST", own.url + path, json={**body, "stream": True}, timeout=30) as answer:
        assert next(answer.iter_lines()).startswith("data: {")
    for _ in range(requests):
        own.client.cancelled.get(timeout=10)
    own.call(lambda: None)
    assert all_blocks_are_free(own)


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        ("/v1/chat/completions", CHAT, 1),
        ("/v1/completions", {"prompt": ["a", "b", "c"], **LONG}, 3),
        ("/v1/embeddings", {"input": ["a", "b"]}, 2),
        ("/generate", {"prompt": "a", **LONG}, 1),
    ],
)
def test_leaving_before_the_answer_cancels_it(own: Server, path: str, body: dict, requests: int) -> None:
    own.client.waiting = True
    with post(own, path, body):
        for _ in range(requests):
            own.client.arrived.get(timeout=10)
    for _ in range(requests):
        own.client.cancelled.get(timeout=10)
    own.call(lambda: None)
    assert all_blocks_are_free(own)


def test_others_are_not_touched_by_who_leaves(own: Server) -> None:
    body = {"prompt": "the quick", "temperature": 0, "max_tokens": 60, "ignore_eos": True}
    alone = httpx.post(f"{own.url}/generate", json=body).json()["token_ids"]
    with httpx.stream("POST", f"{own.url}/generate_stream", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        tokens = json.loads(next(lines).removeprefix("data: "))["token_ids"]
        with httpx.stream("POST", f"{own.url}/generate_stream", json={"prompt": "a", **LONG}, timeout=30) as other:
            next(other.iter_lines())
        own.client.cancelled.get(timeout=10)
        for line in lines:
            if line.startswith("data: {"):
                tokens += json.loads(line.removeprefix("data: "))["token_ids"]
    assert tokens == alone


def test_a_stream_with_nothing_to_say_is_kept_open(own: Server) -> None:
    own.client.waiting = True
    body = {"prompt": "the", "max_tokens": 2}
    with httpx.stream("POST", f"{own.url}/generate_stream", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": ping", "", ": ping", ""]
        own.client.waiting = False
        own.call(own.client.wake)
        rest = [line for line in lines if line and line != ": ping"]
    assert rest[-1] == "data: [DONE]" and json.loads(rest[-2].removeprefix("data: "))["finish_reason"] == "length"


def test_leaving_a_stream_before_its_first_event_cancels_it(own: Server) -> None:
    own.client.waiting = True
    with httpx.stream("POST", f"{own.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=30) as answer:
        assert next(answer.iter_lines()) == ": ping"
    own.client.cancelled.get(timeout=10)
    own.call(lambda: None)
    assert all_blocks_are_free(own)


def break_model(server: Server) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError(f"CUDA error at 0x7f00 with {SECRET}")

    server.client.engine.runner.forward = fail


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_is_500_and_says_nothing(own: Server, stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="lightning_llm.serving.server")
    break_model(own)
    body = {**CHAT, "messages": [{"role": "user", "content": SECRET}], "stream": stream}
    answer = httpx.post(f"{own.url}/v1/chat/completions", json=body, headers={"X-Request-Id": "number-7"})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert error["type"] == "server_error" and "number-7" in error["message"] and SECRET not in answer.text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("lightning_llm.serving.server")]
    assert any("number-7" in line for line in ours) and not any(SECRET in line for line in ours)


def test_a_failure_within_a_stream_is_an_event_and_the_end(own: Server) -> None:
    with httpx.stream("POST", f"{own.url}/v1/chat/completions", json={**CHAT, "stream": True}, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        own.call(break_model, own)
        rest = [line for line in lines if line]
    assert answer.status_code == 200 and rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "server_error"


def test_a_bug_is_500_and_the_log_has_no_content(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise KeyError(SECRET)

    own.client.tokenizer.encode = fail
    answer = httpx.post(f"{own.url}/generate", json={"prompt": SECRET})
    assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
    assert "KeyError" in caplog.text and SECRET not in caplog.text + answer.text


def test_without_an_engine_it_is_503(own: Server) -> None:
    body = {**CHAT, "stream": True}
    with httpx.stream("POST", f"{own.url}/v1/chat/completions", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        own.call(own.client.die)
        rest = [line for line in lines if line]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["type"] == "service_unavailable_error"
    for path in ("/health", "/readyz"):
        assert httpx.get(own.url + path).status_code == 503
    assert httpx.get(f"{own.url}/livez").status_code == 200
    refused = httpx.post(f"{own.url}/v1/chat/completions", json=CHAT)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1


def test_of_an_engine_that_is_gone_its_own_words_are_told(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    for draining in (False, True):
        own.client.ready, own.client.waiting, own.client.draining = True, True, False
        caplog.clear()
        with httpx.stream("POST", f"{own.url}/generate_stream", json={"prompt": "a"}, timeout=30) as answer:
            lines = (line for line in answer.iter_lines() if line and line != ": ping")
            own.client.arrived.get(timeout=10)
            own.client.draining = draining
            own.call(own.client.die)
            error = json.loads(next(lines).removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error" and error["message"].startswith("gone")
        assert any(record.levelno >= logging.ERROR for record in caplog.records) != draining


def test_an_operators_mistake_is_500_and_in_the_log(own: Server, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object, **__: object) -> str:
        raise ConfigurationError("What renders does not start")

    own.client.tokenizer.apply_chat_template = fail
    answer = httpx.post(f"{own.url}/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
    assert "renders" in caplog.text and "renders" not in answer.text


def test_draining_finishes_what_runs_and_takes_no_more(own: Server) -> None:
    body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
    with httpx.stream("POST", f"{own.url}/generate_stream", json=body, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        own.client.draining = True
        assert httpx.post(f"{own.url}/generate", json=body).status_code == 503
        assert httpx.get(f"{own.url}/readyz").status_code == 503
        assert httpx.get(f"{own.url}/livez").status_code == httpx.get(f"{own.url}/health").status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_errors_quote_no_more_than_a_short_value(own: Server) -> None:
    answer = httpx.post(f"{own.url}/generate", json={"prompt": "a", "max_tokens": "private " * 50})
    assert answer.status_code == 400 and len(answer.text) < 250
    nested = httpx.post(
        f"{own.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": {"x": SECRET}}]}
    )
    assert nested.json()["error"]["param"] == "messages[0].content" and SECRET not in nested.text


def test_a_model_without_a_template_takes_prompts_only() -> None:
    with serve(make_client(None)) as server:
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=CHAT)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages"
        assert httpx.post(f"{server.url}/generate", json={"prompt": "a"}).status_code == 200
