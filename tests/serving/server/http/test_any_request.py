"""Whatever a client sends, the answer is one of ours, and the next client's is what it would have been."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode

from lightning_llm.serving.server.http.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerateRequest,
    TokenizeRequest,
)
from tests.serving.server.http.served import Server, make_client, serve

BODIES = {
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}, ChatCompletionRequest),
    "/v1/completions": ({"prompt": "a", "max_tokens": 2}, CompletionRequest),
    "/v1/embeddings": ({"input": "a"}, EmbeddingRequest),
    "/generate": ({"prompt": "a", "max_tokens": 2}, GenerateRequest),
    "/generate_stream": ({"prompt": "a", "max_tokens": 2}, GenerateRequest),
    "/tokenize": ({"prompt": "a"}, TokenizeRequest),
    "/detokenize": ({"tokens": [1]}, DetokenizeRequest),
}
CANARY = {"prompt": "the quick brown fox", "temperature": 0, "max_tokens": 6}

extremes = st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63), 2**64, 10**40, 1e308, -1e308, 5e-324, 0.5, 299, 300, ""])
scalars = st.none() | st.booleans() | extremes | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
keys = st.text(max_size=4) | st.sampled_from(
    ["type", "function", "name", "schema", "json_schema", "role", "content", "5"]
)
anything = st.recursive(
    scalars | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid body of which some fields are anything, or anything at all."""
    path = draw(st.sampled_from(sorted(BODIES)))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(anything)
    valid, model = BODIES[path]
    fields = [field.alias or name for name, field in model.model_fields.items()]
    changes = draw(st.dictionaries(st.sampled_from(fields) | st.text(max_size=5), anything, min_size=1, max_size=3))
    return path, {**valid, **changes}


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """With a context so small that no answer takes long."""
    with serve(make_client(max_model_len=64)) as running:
        yield running


@pytest.fixture(scope="module")
def http_small(small: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=small.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def expected(http_small: httpx.Client) -> list[int]:
    return http_small.post("/generate", json=CANARY).json()["token_ids"]


@given(asked=requests())
@example(asked=("/v1/completions", {"prompt": "a", "logit_bias": {"0": 1e308}}))
@example(asked=("/v1/completions", {"prompt": "a", "guided_regex": "(a+)+$" * 50, "max_tokens": 3}))
@example(asked=("/v1/completions", {"prompt": ["a"] * 50, "n": 8, "max_tokens": 2}))
@example(asked=("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 64}))
@example(asked=("/v1/chat/completions", {"messages": [{"role": "tool", "content": "a"}], "tools": []}))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_body_is_a_server_error(
    small: Server, http_small: httpx.Client, expected: list[int], asked: tuple[str, Any]
) -> None:
    path, body = asked
    answer = http_small.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code == 200 and answer.headers["content-type"] == "application/json":
        assert "error" not in answer.json()
    elif answer.status_code == 200:
        assert answer.text.endswith("data: [DONE]\n\n") and '"server_error"' not in answer.text
    else:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and len(answer.text) < 2000
    assert http_small.post("/generate", json=CANARY).json()["token_ids"] == expected
    stats = small.client.engine.stats()
    assert stats.blocks_free == stats.blocks_total


def test_openapi_describes_all_routes(small: Server) -> None:
    document = httpx.get(f"{small.url}/openapi.json").json()
    assert {*BODIES, "/v1/models", "/v1/models/{model}", "/health", "/livez", "/readyz", "/version"} == set(
        document["paths"]
    )
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "400" in operation["responses"], path
            assert operation["responses"]["200"]["content"], path
    events = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["text/event-stream"]
    (said, failed, _) = events["schema"]["properties"]["data"]["anyOf"]
    assert said["contentSchema"]["$ref"].endswith("/ChatCompletionChunk")
    assert failed["contentSchema"]["$ref"].endswith("/ErrorResponse")
    assert "delta" in document["components"]["schemas"]["ChatChunkChoice"]["properties"]
    chat = document["components"]["schemas"]["ChatCompletionRequest"]
    assert {"messages", "tools", "stream_options", "top_k", "response_format"} <= set(chat["properties"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_schemathesis(small: Server, mode: GenerationMode) -> None:
    """Requests made from /openapi.json, valid and not: none is a server error, and answers are as described."""
    schema = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    checks = [
        schemathesis.checks.not_a_server_error,
        schemathesis.specs.openapi.checks.status_code_conformance,
        schemathesis.specs.openapi.checks.content_type_conformance,
        schemathesis.specs.openapi.checks.response_schema_conformance,
    ]
    tested = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=checks)

        ask()
        tested += 1
    assert tested == (13 if mode is GenerationMode.POSITIVE else 7)
