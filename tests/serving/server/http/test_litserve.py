"""The whole way: OpenAI's client, LitServe's processes, the engine in a worker. Run as a module this is the server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.http import attach
from lightning_llm.serving.server.server import EngineServer
from tests.serving.server.serving import ROOT, eventually, save_tiny_model
from tests.serving.smollm2 import smollm2_folder

TEMPLATE = Path(__file__).parents[2] / "templates" / "chatml.jinja"
MESSAGES = [{"role": "user", "content": "Hello!"}]


def main() -> None:
    model, template, port = sys.argv[1:]
    api = LLMServeAPI(
        model, name="served", dtype="float32", chat_template=template or None, attach=attach, kv_cache_blocks=512
    )
    EngineServer(api, accelerator="cpu").run("127.0.0.1", int(port), log_level="warning")


@contextmanager
def served(model: Path, template: Path | None, folder: Path, seconds: float) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(model), str(template or ""), str(port)]
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, *arguments],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(folder)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: process.poll() is not None or httpx.get(f"{url}/readyz").status_code == 200, seconds)
        assert process.poll() is None, log.read_text()
        yield url
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("served")
    with served(save_tiny_model(folder / "model"), TEMPLATE, folder, 60) as where:
        yield where


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_chats_and_completions(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["served"]
    asked = {"model": "served", "messages": MESSAGES, "seed": 1, "max_tokens": 12, "n": 2}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    texts = ["", ""]
    for chunk in client.chat.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert [len(choice.logprobs.content) for choice in whole.choices] == [12, 12]
    both = client.completions.create(model="served", prompt=["the", "fox"], temperature=0, max_tokens=5, echo=True)
    assert [choice.text[:3] for choice in both.choices] == ["the", "fox"]
    assert len(client.embeddings.create(model="served", input=["a", "b"]).data) == 2


def test_calls_of_tools(client: openai.OpenAI) -> None:
    parameters = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tool = {
        "type": "function",
        "function": {"name": "light", "parameters": {**parameters, "additionalProperties": False}},
    }
    answer = client.chat.completions.create(
        model="served", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "light" and json.loads(call.function.arguments)["on"] in (True, False)
    assert answer.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/completions", {"prompt": "a", "max_tokens": 10**6}, 400),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [300]}, 400),
        ("/v1/completions", {"prompt": "a", "guided_regex": "("}, 400),
        ("/v1/completions", {"prompt": "a", "model": "b"}, 404),
        ("/v1/nothing", {}, 404),
        ("/livez", {}, 405),
    ],
)
def test_mistakes(url: str, path: str, body: dict, status: int) -> None:
    answer = httpx.post(url + path, json=body)
    assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_limits_and_probes(url: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert httpx.post(f"{url}/generate", content=b"[" * 9999, headers=headers).status_code == 400
    assert httpx.post(f"{url}/generate", content=b"x" * (5 << 20), headers=headers).status_code == 413
    assert httpx.post(f"{url}/generate", content=b"{}").status_code == 415
    for path in ("/health", "/livez", "/readyz", "/version", "/openapi.json"):
        assert httpx.get(url + path, headers={"X-Request-Id": "me"}).headers["x-request-id"] == "me"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_model(tmp_path: Path) -> None:
    with (
        served(smollm2_folder(), None, tmp_path, 200) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"model": "served", "temperature": 0, "max_tokens": 40}
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = client.chat.completions.create(**asked, messages=question).choices[0]
        assert "Paris" in answer.message.content and answer.finish_reason == "stop"
        pieces = client.chat.completions.create(**asked, messages=question, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == answer.message.content
        country = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}}
        schema = {"name": "country", "schema": {**country, "required": ["capital"], "additionalProperties": False}}
        form = {"type": "json_schema", "json_schema": schema}
        shaped = client.chat.completions.create(**asked, messages=question, response_format=form).choices[0]
        assert "Paris" in json.loads(shaped.message.content)["capital"]
        function = {"name": "look_up", "description": "Look up a fact.", "parameters": schema["schema"]}
        called = client.chat.completions.create(
            **asked, messages=question, tools=[{"type": "function", "function": function}], tool_choice="required"
        ).choices[0]
        assert called.finish_reason == "tool_calls"
        assert set(json.loads(called.message.tool_calls[0].function.arguments)) == {"capital"}


if __name__ == "__main__":
    main()
