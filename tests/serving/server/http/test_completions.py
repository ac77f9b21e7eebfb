"""Completions, embeddings and the simple calls."""

from __future__ import annotations

import base64
import json
import math
import struct

import httpx
import openai
import pytest

from lightning_llm.serving.engine.outputs import Update
from lightning_llm.serving.server.http import Job
from tests.serving.server.http.served import MODEL, Server, make_client, serve


def test_prompts_come_in_four_forms(client: openai.OpenAI, server: Server) -> None:
    encode = server.client.tokenizer.encode
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 8}
    first, second = (client.completions.create(prompt=text, **asked).choices[0].text for text in ("the", "def main"))
    assert first != second
    for prompts in (["the", "def main"], [encode("the"), encode("def main")]):
        answer = client.completions.create(prompt=prompts, **asked)
        assert [choice.text for choice in answer.choices] == [first, second]
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert answer.usage.prompt_tokens == len(encode("the")) + len(encode("def main"))
    assert client.completions.create(prompt=encode("the"), **asked).choices[0].text == first
    assert client.completions.create(prompt="the", model=MODEL, temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("echo", [False, True])
def test_streams_of_several_prompts_and_answers(client: openai.OpenAI, echo: bool) -> None:
    asked = {"model": MODEL, "prompt": ["the", "def main"], "n": 2, "seed": 2, "max_tokens": 9, "logprobs": 2}
    whole = client.completions.create(**asked, echo=echo)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts = [""] * 4
    offsets: list[list[int]] = [[] for _ in texts]
    for chunk in client.completions.create(**asked, echo=echo, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            offsets[choice.index] += choice.logprobs.text_offset
    assert texts == [choice.text for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert chunk.usage == whole.usage
    assert [text.startswith(prompt) for text, prompt in zip(texts, ["the"] * 2 + ["def main"] * 2, strict=True)] == [
        echo
    ] * 4


def test_logprobs_of_prompt_and_answer(client: openai.OpenAI, server: Server) -> None:
    asked = {"model": MODEL, "prompt": "the fox", "temperature": 0, "logprobs": 1, "echo": True}
    answer = client.completions.create(**asked, max_tokens=3).choices[0]
    logprobs = answer.logprobs
    tokens = server.client.tokenizer.encode("the fox")
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(tokens) + 3
    assert "".join(logprobs.tokens[: len(tokens)]) == "the fox"
    assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    chosen = logprobs.top_logprobs[-1][logprobs.tokens[-1]]
    assert chosen == logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())
    whole = client.completions.create(**asked, max_tokens=0)
    only = whole.choices[0]
    assert whole.usage.completion_tokens == 0 and whole.usage.total_tokens == len(tokens)
    assert only.text == "the fox" and only.logprobs.token_logprobs == pytest.approx(
        logprobs.token_logprobs[: len(tokens)]
    )


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt[0]"),
        ({"prompt": [2**63]}, "prompt[0]"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt[1]"),
        ({"prompt": ["a"] * 2049}, "prompt"),
        ({"model": "other"}, "model"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"guided_regex": "("}, None),
        ({"guided_json": "no json"}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ],
)
def test_what_is_refused(http: httpx.Client, asked: dict, param: str | None) -> None:
    answer = http.post("/v1/completions", json={"prompt": "the", **asked})
    assert answer.status_code == (404 if param == "model" else 400)
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert param is None or error["param"] == param


def test_one_bad_prompt_stops_the_others(http: httpx.Client, server: Server) -> None:
    answer = http.post("/v1/completions", json={"prompt": ["the", "x" * 900], "max_tokens": 500, "ignore_eos": True})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert server.client.cancelled.get(timeout=10).endswith("-0")
    assert server.client.engine.stats().num_requests_running == 0


def test_embeddings(client: openai.OpenAI, server: Server) -> None:
    texts = ["the quick brown fox", "def main", "the quick brown dog"]
    answer = client.embeddings.create(model=MODEL, input=texts, encoding_format="float")
    vectors = [entry.embedding for entry in answer.data]
    assert [entry.index for entry in answer.data] == [0, 1, 2] and {len(vector) for vector in vectors} == {32}
    assert all(math.hypot(*vector) == pytest.approx(1) for vector in vectors)
    assert sum(a * b for a, b in zip(vectors[0], vectors[2], strict=True)) > sum(
        a * b for a, b in zip(vectors[0], vectors[1], strict=True)
    )
    assert answer.usage.total_tokens == sum(len(server.client.tokenizer.encode(text)) for text in texts)
    packed = client.embeddings.create(model=MODEL, input=texts[0])  # the client asks for base64, and unpacks it
    assert packed.data[0].embedding == pytest.approx(vectors[0], abs=1e-6)
    assert client.embeddings.create(model=MODEL, input=texts[0], dimensions=32).data
    with pytest.raises(openai.BadRequestError, match="32 dimensions"):
        client.embeddings.create(model=MODEL, input=texts[0], dimensions=8)


def test_embeddings_in_base64(http: httpx.Client) -> None:
    def ask(form: str) -> list | str:
        body = {"input": [5, 6, 7], "encoding_format": form}
        return http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]

    assert struct.unpack("<32f", base64.b64decode(ask("base64"))) == pytest.approx(ask("float"), abs=1e-6)


def test_generate_and_its_stream(http: httpx.Client) -> None:
    body = {"prompt": "the", "temperature": 0, "max_tokens": 7}
    whole = http.post("/generate", json=body).json()
    assert whole["finish_reason"] == "length" and len(whole["token_ids"]) == 7
    assert whole["usage"]["prompt_tokens"] > 0 and whole["usage"]["completion_tokens"] == 7
    lines = [line.removeprefix("data: ") for line in http.post("/generate_stream", json=body).text.split("\n\n")]
    assert lines[-2:] == ["[DONE]", ""]
    pieces = [json.loads(line) for line in lines[:-2]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    assert sum((piece["token_ids"] for piece in pieces), []) == whole["token_ids"]
    assert pieces[-1]["finish_reason"] == "length" and pieces[-1]["usage"]["completion_tokens"] == 7
    assert http.post("/generate", json={**body, "n": 2}).json()["error"]["param"] == "n"


def test_tokens_and_back(http: httpx.Client, server: Server) -> None:
    tokenized = http.post("/tokenize", json={"prompt": "the fox é", "return_token_strs": True}).json()
    assert tokenized["tokens"] == server.client.tokenizer.encode("the fox é")
    assert tokenized["count"] == len(tokenized["tokens"]) == len(tokenized["token_strs"])
    assert tokenized["max_model_len"] == 1024
    assert http.post("/detokenize", json={"tokens": tokenized["tokens"]}).json() == {"prompt": "the fox é"}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "hi"}]}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert http.post("/detokenize", json={"tokens": [300]}).status_code == 400
    assert http.post("/tokenize", json={}).json()["error"]["param"] == "prompt"


def test_prefixes_are_shared_within_a_salt_only(http: httpx.Client) -> None:
    def cached(**salt: str) -> int:
        body = {"prompt": "the quick brown fox jumps over the lazy dog " * 3, "max_tokens": 1, **salt}
        return http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(cache_salt="one") == 0 < cached(cache_salt="one")
    assert cached(cache_salt="two") == 0


def test_the_models_defaults_and_who_watches() -> None:
    seen: dict[tuple[str, int], list[int]] = {}

    class Seen:
        def __init__(self, job: Job, place: int) -> None:
            self.tokens = seen.setdefault((job.request.url.path, place), [])
            assert job.params.temperature == 0 and job.stream and job.request.state.request_id == "watched"

        def on_update(self, update: Update) -> None:
            self.tokens.extend(update.token_ids)

        def on_error(self, error: Exception) -> None:
            raise error

    client = make_client()
    client.default_sampling_params = {"temperature": 0, "seed": 1}
    with serve(client, observer=Seen) as server:
        body = {"prompt": ["a", "b"], "max_tokens": 3, "stream": True}
        httpx.post(f"{server.url}/v1/completions", json=body, headers={"X-Request-Id": "watched"})
    assert {key: len(tokens) for key, tokens in seen.items()} == {("/v1/completions", n): 3 for n in range(2)}


def test_what_is_served(client: openai.OpenAI, http: httpx.Client) -> None:
    (model,) = client.models.list()
    assert model.id == MODEL and client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("another/one")
    assert missing.value.code == "model_not_found"
    for path in ("/health", "/livez", "/readyz", "/version"):
        assert http.get(path).status_code == 200
    for path in ("/health", "/livez", "/readyz"):
        assert http.head(path).status_code == 200
