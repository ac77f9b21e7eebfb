"""Chats, asked for with OpenAI's own client from a real server."""

from __future__ import annotations

import json
import math

import httpx
import openai
import pytest

from tests.serving.server.http.served import MODEL, Server

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_is_the_completion_of_its_templates_text(client: openai.OpenAI, server: Server) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0, max_tokens=12)
    plain = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12)
    assert chat.choices[0].message.content == plain.choices[0].text != ""
    assert chat.object == "chat.completion" and chat.id.startswith("chatcmpl-") and chat.model == MODEL
    assert chat.choices[0].message.role == "assistant" and chat.choices[0].finish_reason == "length"
    assert chat.usage.prompt_tokens == len(server.client.tokenizer.encode(PROMPT))
    assert chat.usage.completion_tokens == 12 and chat.usage.total_tokens == chat.usage.prompt_tokens + 12
    assert plain.usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_brings_the_same_in_openais_order(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, MODEL, "chat.completion.chunk")
    }
    *said, end, usage = chunks
    assert said[0].choices[0].delta.role == "assistant" and said[0].choices[0].delta.content == ""
    assert all(chunk.choices[0].delta.role is None for chunk in said[1:])
    assert "".join(chunk.choices[0].delta.content for chunk in said) == whole.choices[0].message.content
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in said)
    assert end.choices[0].finish_reason == "length" and end.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage.completion_tokens == 20


def test_the_bytes_of_a_stream(http: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True, "temperature": 0}
    with http.stream("POST", "/v1/chat/completions", json=body, headers={"X-Request-Id": "my.own-1"}) as answer:
        text = answer.read().decode()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache" and answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"] == "my.own-1"
    *events, rest = text.split("\n\n")
    assert rest == "" and events[-1] == "data: [DONE]"
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""} and "usage" not in first
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"


def test_several_answers_come_interleaved(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "seed": 1, "max_tokens": 15, "n": 3}
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in whole.choices}) == 3
    assert whole.usage.completion_tokens == 45
    texts = ["", "", ""]
    order, ends = [], 0
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        order.append(choice.index)
        texts[choice.index] += choice.delta.content or ""
        ends += choice.finish_reason is not None
    assert texts == [choice.message.content for choice in whole.choices] and ends == 3
    assert order != sorted(order), "one after the other"


def test_logprobs(client: openai.OpenAI) -> None:
    asked = {"model": MODEL, "messages": MESSAGES, "temperature": 0, "max_tokens": 6, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=3)
    content = whole.choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        likeliest = token.top_logprobs
        assert len(likeliest) == 3 and (likeliest[0].token, likeliest[0].logprob) == (token.token, token.logprob)
        assert sorted((top.logprob for top in likeliest), reverse=True) == [top.logprob for top in likeliest]
        assert sum(math.exp(top.logprob) for top in likeliest) < 1
    said = b"".join(bytes(token.bytes) for token in content)
    assert said.decode(errors="replace") == whole.choices[0].message.content
    streamed = [
        token
        for chunk in client.chat.completions.create(**asked, top_logprobs=3, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert [token.bytes for token in streamed] == [token.bytes for token in content]
    assert client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs == []


def test_seeds_repeat_and_stops_end(client: openai.OpenAI) -> None:
    def ask(**more) -> openai.types.chat.chat_completion.Choice:
        return client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=30, **more).choices[0]

    answer = ask(seed=3).message.content
    assert ask(seed=3).message.content == answer != ask(seed=4).message.content
    stop = answer[8:10]
    cut = ask(seed=3, stop=[stop, "never in there"])
    assert cut.message.content == answer[: answer.index(stop)]
    assert cut.finish_reason == "stop" and cut.model_extra["stop_reason"] == stop


@pytest.mark.parametrize(
    "asked",
    [
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "pick",
                    "schema": {
                        "type": "object",
                        "properties": {"unit": {"enum": ["c", "f"]}},
                        "required": ["unit"],
                        "additionalProperties": False,
                    },
                },
            }
        },
        {"extra_body": {"structured_outputs": {"regex": r'\{"unit":"[cf]"\}'}}},
        {"extra_body": {"guided_choice": ['{"unit": "c"}', '{"unit": "f"}']}},
    ],
)
def test_answers_follow_a_grammar(client: openai.OpenAI, asked: dict) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=300, **asked).choices[0]
    assert json.loads(answer.message.content)["unit"] in "cf" and answer.finish_reason == "stop"


def test_content_may_come_in_parts_of_text(client: openai.OpenAI) -> None:
    def ask(content) -> str:
        messages = [{"role": "user", "content": content}]
        return client.chat.completions.create(model=MODEL, messages=messages, temperature=0, max_tokens=8)

    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert ask(parts).choices[0].message.content == ask("one\ntwo").choices[0].message.content
    image = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}
    with pytest.raises(openai.BadRequestError, match="only text") as refused:
        ask([parts[0], image])
    assert refused.value.param == "messages[0].content[1].type"


def test_limits_are_told_by_the_names_that_were_used(client: openai.OpenAI) -> None:
    def refusal(**asked) -> openai.BadRequestError:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=MODEL, messages=MESSAGES, **asked)
        return refused.value

    assert refusal(max_completion_tokens=0).param == "max_completion_tokens"
    assert refusal(max_tokens=0).param == "max_tokens"
    assert refusal(logprobs=True, top_logprobs=21).param == "top_logprobs"
    assert refusal(top_logprobs=2).param == "top_logprobs"
    assert refusal(logit_bias={"12.5": 1}).param == "logit_bias"
    assert refusal(logit_bias={"300": 1}).param == "logit_bias"
    assert refusal(extra_body={"stop_token_ids": [2**40]}).param == "stop_token_ids[0]"
    assert refusal(extra_body={"chat_template_kwargs": {"messages": []}}).param == "chat_template_kwargs.messages"
    assert refusal(extra_body={"chat_template_kwargs": {"tokenize": True}}).param == "chat_template_kwargs"
    long = refusal(max_tokens=5000)
    assert long.code == "context_length_exceeded" and long.param == "messages"
    double = {"response_format": {"type": "json_object"}, "extra_body": {"guided_regex": "a"}}
    assert refusal(**double).param == "guided_regex"


def test_bias_and_banned_ends(client: openai.OpenAI, server: Server) -> None:
    token = server.client.tokenizer.encode("x")[0]
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 5, "logit_bias": {str(token): 100}}
    assert client.chat.completions.create(**asked).choices[0].message.content == "xxxxx"
    ended = client.chat.completions.create(**asked, extra_body={"stop_token_ids": [token]})
    assert ended.choices[0].message.content == "" and ended.choices[0].finish_reason == "stop"
