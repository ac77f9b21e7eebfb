"""The key that a server may want."""

from __future__ import annotations

import os

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.app import put_together
from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.transport import EngineTransport

KEY = "s3cret-\u00fc"


FACTS = {"name": "tiny", "max_model_len": 9, "vocab_size": 9, "block_size": 16, "generation_defaults": {}}


def app_in_front_of_a_worker():
    """Which has said hello, and no more."""
    app, transport = FastAPI(), EngineTransport(1, 1)
    client = EngineClient(transport)
    client.receive(0, os.getpid(), [["hello", "ipc:///nowhere", FACTS]])
    put_together(app, client)
    try:
        yield TestClient(app)
    finally:
        transport.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch):
    """The whole app, with the key that LitServe documents."""
    monkeypatch.setenv("LIT_SERVER_API_KEY", KEY)
    yield from app_in_front_of_a_worker()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}".encode()},
        {"Authorization": "Bearer"},
        {"X-API-Key": b"\xff\xfe"},
        {"X-API-Key": ""},
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/version", "/metrics", "/openapi.json", "/playground/state", "/none"])
def test_without_the_key_nothing_is_told(asked: TestClient, path: str, headers: dict) -> None:
    answer = asked.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("headers", [{"Authorization": f"Bearer {KEY}".encode()}, {"X-API-Key": KEY.encode()}])
def test_with_it_as_openais_clients_or_litserves_send_it_everything_is(asked: TestClient, headers: dict) -> None:
    assert asked.get("/version", headers=headers).status_code == 200
    assert asked.post("/v1/completions", headers=headers, json={"prompt": "a"}).status_code == 503  # no engine


def test_probes_and_the_page_need_none(asked: TestClient) -> None:
    assert asked.get("/livez").status_code == asked.get("/").status_code == 200
    assert asked.get("/readyz").status_code == asked.get("/health").status_code == 503


def test_without_a_key_everybody_may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_SERVER_API_KEY", raising=False)
    for open_to_all in app_in_front_of_a_worker():
        assert open_to_all.get("/version").status_code == 200


def test_litserves_own_hook_would_do_nothing_and_is_refused(tmp_path) -> None:
    class Guarded(LLMServeAPI):
        def authorize(self) -> None: ...

    with pytest.raises(ConfigurationError, match="LIT_SERVER_API_KEY"):
        Guarded(tmp_path)
