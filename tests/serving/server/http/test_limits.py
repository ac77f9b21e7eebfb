"""What no route ever sees: bodies that are too large, too slow, too deep, or not JSON at all."""

from __future__ import annotations

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from fastapi.exceptions import RequestValidationError

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.outputs import Update
from lightning_llm.serving.server.http import HTTPSettings, Job, bounded, errors
from lightning_llm.serving.server.http.requests import MAX_PRIORITY
from tests.serving.server.http.served import Server, make_client, serve

ROUTES = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/tokenize", "/detokenize"]
JSON = {"Content-Type": "application/json"}


def error_of(answer: httpx.Response) -> dict:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600
    return error


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"nothing",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -1e999}',
        b'{"prompt": "' + b"\xff\xfe" + b'"}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 70 + b"1" + b"}" * 70,
        b"[" * 65 + b"]" * 65,
        b"[]",
        b"null",
        b"1e308",
        b"",
    ],
)
def test_what_is_no_request_is_400(http: httpx.Client, path: str, body: bytes) -> None:
    answer = http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400 and error_of(answer)["type"] == "invalid_request_error"


def test_valid_json_is_not_refused(http: httpx.Client) -> None:
    pair = '{"prompt": "\\ud83d\\ude00", "x": ' + "[" * 63 + "]" * 63 + ', "y": 1e308}'
    assert (
        http.post("/tokenize", content=pair, headers={"Content-Type": "APPLICATION/JSON; charset=utf-8"}).json()[
            "tokens"
        ]
        == http.post("/tokenize", json={"prompt": "😀"}).json()["tokens"]
    )
    answer = http.post("/generate", content='{"prompt": "a", "temperature": 1e308}', headers=JSON)
    assert answer.status_code == 400 and error_of(answer)["param"] == "temperature"


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "multipart/form-data; boundary=x"},
        {},
        {**JSON, "Content-Encoding": "gzip"},
    ],
)
def test_only_json_is_taken(http: httpx.Client, headers: dict[str, str]) -> None:
    answer = http.post("/generate", content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415 and error_of(answer)["code"] == "not_json"


def test_large_bodies_announced_or_not(http: httpx.Client) -> None:
    size = 4 << 20
    body = json.dumps({"prompt": "x " * (size // 2)}).encode()
    assert len(body) > size
    assert http.post("/generate", content=body, headers=JSON).status_code == 413

    def chunks():
        for start in range(0, len(body), 1 << 16):
            yield body[start : start + (1 << 16)]

    try:
        answer = http.post("/generate", content=chunks(), headers=JSON)
        assert answer.status_code == 413 and error_of(answer)["code"] == "request_too_large"
    except (httpx.WriteError, httpx.RemoteProtocolError):  # the server need not listen until the end
        pass
    fits = json.dumps({"prompt": "x " * 1_000_000}).encode()
    assert error_of(http.post("/generate", content=fits, headers=JSON))["code"] == "context_length_exceeded"
    assert http.get("/livez").status_code == 200


def test_slow_bodies_are_given_up() -> None:
    with serve(make_client(), HTTPSettings(body_timeout=0.1)) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            )
            assert connection.recv(4096).startswith(b"HTTP/1.1 408")


def test_large_headers_are_refused(http: httpx.Client) -> None:
    assert http.get("/livez", headers={"X-Large": "x" * 15_000}).status_code == 200
    assert http.get("/livez", headers={"X-Large": "x" * 17_000}).status_code == 431


def test_headers_without_end_are_cut_off(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Large: ")
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * (1 << 16))
    assert httpx.get(f"{server.url}/livez").status_code == 200


def test_who_never_says_what_it_wants_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "HEAD_TIMEOUT", 0.2)
    with serve(make_client()) as server:
        for said in (b"", b"GET /livez HTTP/1.1\r\nHost: x\r\n", b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(said)
                received = b""
                while part := connection.recv(4096):
                    received += part
            assert received.startswith(b"HTTP/1.1 200") == said.endswith(b"GET")


def test_unknown_paths_and_methods(http: httpx.Client) -> None:
    assert error_of(http.get("/v2/nothing"))["code"] == "not_found"
    answer = http.get("/v1/completions")
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert error_of(answer)["code"] == "method_not_allowed"


@pytest.mark.parametrize("given", ["a\tb", "x" * 129, "é".encode().decode("latin-1"), 'a"b'])
def test_request_ids_are_checked(http: httpx.Client, given: str) -> None:
    answer = http.get("/livez", headers={b"X-Request-Id": given.encode("latin-1")})
    assert answer.headers["x-request-id"] != given and len(answer.headers["x-request-id"]) == 32


def test_the_same_request_id_twice_is_no_mistake(http: httpx.Client) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 2}
    for _ in range(2):
        assert http.post("/v1/completions", json=body, headers={"X-Request-Id": "same"}).status_code == 200


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match="max_body_bytes must be above 0, not 0"):
        HTTPSettings(max_body_bytes=0)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [True] * 50_000}, "prompt[0]"),
        ("/v1/completions", {"prompt": [[True] * 10] * 5_000}, "prompt[0][0]"),
        ("/v1/completions", {"prompt": "a", "stop": [1] * 50_000}, "stop[0]"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [1] * 50_000}, "stop_token_ids"),
        ("/v1/completions", {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(50_000)), "x")}, "logit_bias"),
        ("/v1/chat/completions", {"messages": [{}] * 50_000}, "messages[0].role"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 50_000}, "messages"),
    ],
)
def test_of_many_mistakes_a_few_are_looked_at(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, path: str, body: dict, param: str
) -> None:
    complaints: list[int] = []
    plain = errors._invalid

    def counted(error: RequestValidationError) -> errors.APIError:
        complaints.append(len(error.errors()))
        return plain(error)

    monkeypatch.setattr(errors, "_invalid", counted)
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and error_of(answer)["param"] == param
    assert complaints[0] < 10


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": [300] * 2000, "echo": True}, "prompt"),
        ("/v1/embeddings", {"input": [[1], [300] * 2000]}, "input[1]"),
        ("/tokenize", {"prompt": "x" * 100_000, "return_token_strs": True}, "prompt"),
        ("/detokenize", {"tokens": [1] * 2000}, "tokens"),
    ],
)
def test_what_is_too_long_is_refused_before_anything_else(
    http: httpx.Client, path: str, body: dict, param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"
    assert error_of(answer)["param"] == param


def test_long_chats_are_not_rendered(http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> str:
        raise AssertionError("rendered")

    monkeypatch.setattr(server.client.tokenizer, "apply_chat_template", never)
    for content in ("x" * 100_000, [{"type": "text", "text": "x" * 50_000}] * 2):
        answer = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]})
        assert answer.status_code == 400 and error_of(answer)["code"] == "context_length_exceeded"


def test_while_chats_are_rendered_texts_are_read(
    http: httpx.Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()

    def slow(*_: object, **__: object) -> str:
        stop.wait(30)
        return "a"

    monkeypatch.setattr(server.client.tokenizer, "apply_chat_template", slow)
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    with ThreadPoolExecutor(40) as clients:
        chats = [clients.submit(httpx.post, f"{server.url}/v1/chat/completions", json=body) for _ in range(40)]
        try:  # a body of this size is checked in a thread
            answer = http.post("/generate", json={"prompt": "a", "max_tokens": 1, "unknown": "x" * 50_000}, timeout=10)
        finally:
            stop.set()
        assert answer.status_code == 200 and all(chat.result().status_code == 200 for chat in chats)


def test_prompts_times_answers_are_limited() -> None:
    with serve(make_client(), HTTPSettings(max_inputs=4)) as server:
        body = {"prompt": ["a", "b", "c"], "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body).status_code == 200
        answer = httpx.post(f"{server.url}/v1/completions", json={**body, "n": 2})
        assert answer.status_code == 400 and error_of(answer)["param"] == "n" and "6 answers" in answer.text


def test_priorities_have_ends() -> None:
    seen: list[int] = []

    class Seen:
        def __init__(self, job: Job, place: int) -> None:
            seen.append(job.priority)

        def on_update(self, update: Update) -> None: ...

        def on_error(self, error: Exception) -> None: ...

    with serve(make_client(), observer=Seen) as server:
        for priority in (-1_000_000, -3, 1_000_000):
            body = {"prompt": "a", "max_tokens": 1, "priority": priority}
            assert httpx.post(f"{server.url}/generate", json=body).status_code == 200
    assert seen == [-MAX_PRIORITY, -3, MAX_PRIORITY]


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "WRITE_TIMEOUT", 0.2)
    with serve(make_client()) as server:
        body = {"prompt": "a", "n": 16, "max_tokens": 900, "ignore_eos": True, "logprobs": 20, "stream": True}
        content = json.dumps(body).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            server.client.cancelled.get(timeout=60)


@pytest.mark.parametrize(
    ("form", "param"),
    [
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_choice": [""]}, "guided_choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"grammar": "("}}, "structured_outputs.grammar"),
    ],
)
def test_mistakes_in_forms_are_told_by_their_field(http: httpx.Client, form: dict, param: str) -> None:
    answer = http.post("/v1/completions", json={"prompt": "a", **form})
    assert answer.status_code == 400 and error_of(answer)["param"] == param


def test_a_body_is_parsed_once(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    loads = json.loads

    def counted(text: str | bytes, **options) -> object:
        sizes.append(len(text))
        return loads(text, **options)

    content = json.dumps({"prompt": "the fox"})
    monkeypatch.setattr(json, "loads", counted)
    assert http.post("/tokenize", content=content, headers=JSON).status_code == 200
    assert sizes.count(len(content)) == 1
