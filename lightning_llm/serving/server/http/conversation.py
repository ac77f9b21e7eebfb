"""A chat's messages and tools -> the prompt, the grammar of a forced call, and who reads calls out of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_llm.serving.engine.params import Grammar
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.client import EngineLike, Tokenizer
from lightning_llm.serving.server.http.params import schema_grammar
from lightning_llm.serving.server.http.requests import (
    ChatCompletionRequest,
    FunctionDefinition,
    JSONObject,
    Message,
    NamedToolChoice,
    Tool,
)
from lightning_llm.serving.server.http.settings import ToolParserName
from lightning_llm.serving.server.http.tool_calls import ENFORCED, FORMATS, HERMES, ToolCallParser, ToolFormat

_MOST_CALLS = 16  # that a grammar lets through
_NO_PARAMETERS: JSONObject = {"type": "object", "properties": {}, "additionalProperties": False}

# Of models whose template knows nothing of tools: what Hermes and Qwen are told.
_INSTRUCTIONS = """You may call these functions, described in JSON:
<tools>
{tools}
</tools>
To call one, answer with
<tool_call>
{{"name": <name of the function>, "arguments": <object with its arguments>}}
</tool_call>"""

_PROBE = "probe_of_the_template"


class ToolStyle:
    """How the served model takes tools and writes calls, found out from its chat template.

    Args:
        client: Its tokenizer has the template; it may be there only once the model is loaded.
        chosen: What the operator says; "auto": look.
    """

    def __init__(self, client: EngineLike, chosen: ToolParserName) -> None:
        self._client = client
        self._chosen = chosen

    @cached_property
    def _rendered(self) -> str:
        """A conversation with a call, as the template has it; empty where it cannot."""
        call = {"type": "function", "id": "probe0000", "function": {"name": _PROBE, "arguments": {}}}
        tool = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": _NO_PARAMETERS}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "!", "tool_call_id": "probe0000", "name": _PROBE},
        ]
        try:
            return self._client.tokenizer.apply_chat_template(messages, tools=[tool], add_generation_prompt=False)
        except RequestError:
            return ""

    @property
    def in_template(self) -> bool:
        """Whether the template tells the model of tools."""
        return _PROBE in self._rendered

    @property
    def form(self) -> ToolFormat:
        """How calls are written."""
        if self._chosen != "auto":
            return FORMATS[self._chosen]
        for name in ("hermes", "mistral"):
            if FORMATS[name].start in self._rendered:
                return FORMATS[name]
        return FORMATS["llama3_json"] if self.in_template else HERMES


@dataclass(frozen=True)
class ToolUse:
    """What tools mean for one request.

    Attributes:
        form: How its calls are written.
        names: Of the functions; empty: there will be no calls.
        forced: The function that must be called, if one alone.
        parallel: Whether several may be called.
        grammar: That enforces it.
    """

    form: ToolFormat
    names: tuple[str, ...] = ()
    forced: str | None = None
    parallel: bool = True
    grammar: Grammar | None = None

    def parser(self) -> ToolCallParser | None:
        """For one answer; None where none is needed."""
        if not self.names:
            return None
        return ToolCallParser(self.form, self.names, forced=self.forced, parallel=self.parallel)


def tool_use(body: ChatCompletionRequest, style: ToolStyle) -> ToolUse:
    """What a request's tools, `tool_choice` and `parallel_tool_calls` come to.

    Raises:
        RequestError: A choice without tools, of an unknown function, or two functions of one name.
    """
    tools = {tool.function.name: tool.function for tool in body.tools or ()}
    if len(tools) < len(body.tools or ()):
        raise RequestError("Two tools have the same name.", param="tools")
    choice = body.tool_choice or "auto"
    parallel = body.parallel_tool_calls is not False
    if not tools:
        if choice not in ("auto", "none"):
            raise RequestError("tool_choice needs tools to choose from.", param="tool_choice")
        return ToolUse(HERMES)
    if choice == "none":
        return ToolUse(HERMES)
    if choice == "auto":
        return ToolUse(style.form, tuple(tools), parallel=parallel)
    if isinstance(choice, NamedToolChoice):
        name = choice.function.name
        if name not in tools:
            raise RequestError("tool_choice names a function that is not among tools.", param="tool_choice")
        grammar = schema_grammar(_parameters(tools[name]))
        return ToolUse(ENFORCED, (name,), forced=name, parallel=False, grammar=grammar)
    return ToolUse(ENFORCED, tuple(tools), parallel=parallel, grammar=_calls_grammar(list(tools.values()), parallel))


def _parameters(function: FunctionDefinition) -> JSONObject:
    return {"type": "object", **function.parameters} if function.parameters else _NO_PARAMETERS


def _calls_grammar(functions: Sequence[FunctionDefinition], parallel: bool) -> Grammar:
    """An array of calls of any of the functions. Definitions that their schemas refer to are put where `$ref` looks."""
    shared: dict[str, JSONObject] = {}
    calls = []
    for function in functions:
        parameters = dict(_parameters(function))
        for place in ("$defs", "definitions"):
            inner = parameters.pop(place, None)
            for name, schema in inner.items() if isinstance(inner, dict) else ():
                if shared.setdefault(place, {}).setdefault(name, schema) != schema:
                    raise RequestError(
                        f"Two tools define {name[:40]!r} differently under {place}: give them different names.",
                        param="tools",
                    )
        properties = {"name": {"const": function.name}, "arguments": parameters}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    most = _MOST_CALLS if parallel else 1
    return schema_grammar({"type": "array", "minItems": 1, "maxItems": most, "items": {"anyOf": calls}, **shared})


def conversation_text(
    tokenizer: Tokenizer,
    style: ToolStyle,
    messages: Sequence[Message],
    *,
    tools: Sequence[Tool] | None,
    add_generation_prompt: bool = True,
    variables: JSONObject | None = None,
) -> str:
    """The prompt of a chat; blocking, and for long chats long.

    Raises:
        RequestError: A message is not text, or the template refuses the conversation.
    """
    plain = [_plain(message, place) for place, message in enumerate(messages)]
    described = [tool.model_dump(exclude_none=True) for tool in tools or ()]
    if described and not style.in_template:
        text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in described))
        plain = _instruct(plain, text)
        described = []
    given = dict(variables or {})
    if reserved := sorted(given.keys() & {"messages", "tools", "add_generation_prompt", "self"}):
        raise RequestError(f"{reserved[0]} cannot be set here.", param=f"chat_template_kwargs.{reserved[0]}")
    return tokenizer.apply_chat_template(
        plain, tools=described or None, add_generation_prompt=add_generation_prompt, **given
    )


def _plain(message: Message, place: int) -> dict[str, Any]:
    """As templates take it: content is text, arguments are objects."""
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": _text(message, place)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            plain[name] = getattr(message, name)
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"messages[{place}].tool_calls[{number}]"),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    return plain


def _text(message: Message, place: int) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise RequestError(f"messages[{place}].content is missing.", param=f"messages[{place}].content")
        return ""
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise RequestError(
                f"messages[{place}].content[{number}]: only text is understood, as "
                '{"type": "text", "text": ...}; this model takes no images, audio or files.',
                param=f"messages[{place}].content[{number}].type",
            )
    return "\n".join(part.text or "" for part in message.content)


def _arguments(text: str, where: str) -> JSONObject:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.function.arguments is not a JSON object.", param=f"{where}.function.arguments")
    return arguments


def _instruct(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """With the tools in the system message. What was called and answered before becomes text."""
    if messages[0]["role"] == "system":
        first, rest = messages[0], messages[1:]
        content = f"{first['content']}\n\n{text}"
    else:
        content, rest = text, messages
    return [{"role": "system", "content": content}, *map(_spelled_out, rest)]


def _spelled_out(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in message.get("tool_calls", ())
    ]
    return {"role": message["role"], "content": "\n".join(filter(None, [message["content"], *calls]))}
