"""Calls of tools: found in text of every format, streamed as they come, and enforced by a grammar."""

from __future__ import annotations

import json

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.serving.server.http.conversation import ToolStyle, conversation_text
from lightning_llm.serving.server.http.requests import Message, Tool
from lightning_llm.serving.server.http.tool_calls import (
    ENFORCED,
    HERMES,
    LLAMA,
    MISTRAL,
    CallPiece,
    ToolCallParser,
    ToolFormat,
)
from tests.serving.server.http.served import MODEL, make_client

NAMES = ("f", "get_weather")
CASES = [
    (
        HERMES,
        'Hi \n<tool_call>\n{"name": "f", "arguments": {"a": "}\\"{", "b": [1, {"c": 2}]} }\n</tool_call>\n'
        '<tool_call>{"arguments": {}, "name": "get_weather"}</tool_call>\n',
        "Hi",
        [("f", '{"a": "}\\"{", "b": [1, {"c": 2}]}'), ("get_weather", "{}")],
    ),
    (HERMES, "no <tool call  ", "no <tool call  ", []),
    (HERMES, '<tool_call>{"name": "x", "arguments": {}}</tool_call>!', None, []),
    (HERMES, "<tool_call>junk", None, []),
    (HERMES, 'a <tool_call>{"name": "f", "argu', None, []),
    (HERMES, 'a <tool_call>{"name": "f", "arguments": {"x": ', "a", [("f", '{"x": ')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    (
        LLAMA,
        '<|python_tag|>{"name": "f", "parameters": {"q": "x"}}; {"name": "get_weather", "parameters": {}}',
        "",
        [("f", '{"q": "x"}'), ("get_weather", "{}")],
    ),
    (LLAMA, '{"title": "x"} and more', None, []),
    (LLAMA, "  plain { text", None, []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "get_weather", "arguments": {}}]',
        "",
        [("f", '{"a": 1}'), ("get_weather", "{}")],
    ),
    (
        MISTRAL,
        'ok[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get_weather{}',
        "ok",
        [("f", '{"a": 1}'), ("get_weather", "{}")],
    ),
    (MISTRAL, '[TOOL_CALLS]nope{"a": 1}', None, []),
    (ENFORCED, '[{"name": "f", "arguments": {"a": "x"}}]', "", [("f", '{"a": "x"}')]),
]


def read(form: ToolFormat, pieces: list[str], **settings) -> tuple[str, list[tuple[str, str]]]:
    parser = ToolCallParser(form, NAMES, **settings)
    found = [piece for text in pieces for piece in parser.push(text)] + list(parser.finish())
    calls: dict[int, list[str]] = {}
    for piece in found:
        if isinstance(piece, CallPiece):
            assert (piece.id is None) == (piece.index in calls), "the first piece has the id, and no other"
            call = calls.setdefault(piece.index, [piece.name or "", ""])
            call[1] += piece.arguments
    assert parser.num_calls >= len(calls)
    return "".join(piece for piece in found if isinstance(piece, str)), [(name, text) for name, text in calls.values()]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_found_however_the_text_is_cut(
    form: ToolFormat, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    for size in (1, 2, 3, 5, 7, 11, len(text)):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert read(form, pieces) == (text if content is None else content, calls)
        assert read(form, pieces, parallel=False)[1] == calls[:1]


@given(st.text('<tool_cal>/{}[]"\\:,; TOLCASnamef1\n'), st.integers(1, 9), st.sampled_from([HERMES, LLAMA, MISTRAL]))
def test_no_text_is_lost_where_there_is_no_call(text: str, size: int, form: ToolFormat) -> None:
    content, calls = read(form, [text[start : start + size] for start in range(0, len(text), size)])
    assert calls or content == text


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = ToolCallParser(HERMES, NAMES)
    assert list(parser.push('<tool_call>{"name": "f", ')) == []
    (head, piece) = parser.push('"arguments": {"city": "Par')
    assert (head.name, head.arguments, piece.arguments) == ("f", "", '{"city": "Par')
    assert [each.arguments for each in parser.push('is"}, ')] == ['is"}']


MISTRAL_TEMPLATE = """{% for message in messages %}{% if message.role == 'user' %}\
{% if loop.first and tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST] {{ message.content }}[/INST]{% elif message.tool_calls is defined %}\
[TOOL_CALLS] [{% for call in message.tool_calls %}\
{% if call.id | length != 9 %}{{ raise_exception('ids have 9 letters') }}{% endif %}\
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}\
{{ "" if loop.last else ", " }}{% endfor %}]</s>{% elif message.role == 'tool' %}\
[TOOL_RESULTS] {"content": {{ message.content | tojson }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]\
{% else %} {{ message.content }}</s>{% endif %}{% endfor %}"""
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Of a place",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"$ref": "#/$defs/unit"}, "days": {"enum": [1, 7]}},
            "required": ["unit", "days"],
            "additionalProperties": False,
            "$defs": {"unit": {"enum": ["c", "f"]}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
ASKED = {"model": MODEL, "messages": [{"role": "user", "content": "?"}], "tools": [WEATHER, TIME], "max_tokens": 400}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_even_a_random_model_calls_what_it_must(client: openai.OpenAI, choice) -> None:
    asked = {**ASKED, "tool_choice": choice, "parallel_tool_calls": False, "seed": 4}
    whole = client.chat.completions.create(**asked).choices[0]
    reason = "tool_calls" if choice == "required" else "stop"  # as OpenAI has it
    assert whole.finish_reason == reason and whole.message.content is None
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    if call.function.name == "get_weather":
        assert arguments["unit"] in "cf" and arguments["days"] in (1, 7) and len(arguments) == 2
    else:
        assert call.function.name == "get_time" and arguments == {}
    assert call.id.startswith("call_") and call.type == "function"

    text, heads, reasons = "", [], []
    for chunk in client.chat.completions.create(**asked, stream=True):
        reasons.append(chunk.choices[0].finish_reason)
        for piece in chunk.choices[0].delta.tool_calls or ():
            text += piece.function.arguments
            heads += [(piece.index, piece.type, piece.function.name)] if piece.id else []
    assert text == call.function.arguments and heads == [(0, "function", call.function.name)]
    assert reasons[-1] == reason and set(reasons[:-1]) == {None}


def test_without_a_call_there_is_text(client: openai.OpenAI) -> None:
    asked = {**ASKED, "temperature": 0, "max_tokens": 10}
    auto = client.chat.completions.create(**asked).choices[0]
    assert auto.message.tool_calls is None and auto.message.content and auto.finish_reason == "length"
    none = client.chat.completions.create(**asked, tool_choice="none")
    untold = client.chat.completions.create(**{**asked, "tools": openai.NOT_GIVEN})
    assert none.choices[0].message.content == untold.choices[0].message.content
    assert none.usage.prompt_tokens == untold.usage.prompt_tokens < 100


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": openai.NOT_GIVEN, "tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TIME, TIME]},
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
    ],
)
def test_choices_that_cannot_be(client: openai.OpenAI, asked: dict) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**{**ASKED, **asked})


@pytest.mark.parametrize(
    ("template", "form", "in_template"),
    [
        ("chatml.jinja", HERMES, False),
        ("qwen3.jinja", HERMES, True),
        ("llama3.jinja", LLAMA, True),
        (MISTRAL_TEMPLATE, MISTRAL, True),
    ],
)
def test_the_template_tells_how_calls_are_written(template: str, form: ToolFormat, in_template: bool) -> None:
    client = make_client(template)
    style = ToolStyle(client, "auto")
    assert (style.form, style.in_template) == (form, in_template)
    call = {"id": "abcdef123", "function": {"name": "get_weather", "arguments": '{"unit": "c"}'}}
    messages = [
        Message(role="user", content="How warm?"),
        Message.model_validate({"role": "assistant", "tool_calls": [call]}),
        Message(role="tool", content="12 degrees", tool_call_id="abcdef123"),
    ]
    text = conversation_text(client.tokenizer, style, messages, tools=[Tool.model_validate(WEATHER)])
    assert all(part in text for part in ("Of a place", '"unit": "c"', "12 degrees"))
    if form is not LLAMA:
        found = ToolCallParser(form, NAMES)
        said = text[text.rindex(form.start) :] if form is HERMES else text[text.index(form.start) :]
        assert [piece.name for piece in found.push(said) if isinstance(piece, CallPiece) and piece.id] == [
            "get_weather"
        ]
