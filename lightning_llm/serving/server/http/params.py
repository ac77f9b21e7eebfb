"""A request's body -> `SamplingParams`. What `SamplingParams` refuses is told by the names that the client used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lightning_llm.serving.engine.params import Grammar, SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    JSONObject,
    ModelBody,
    SamplingBody,
)

Defaults = Mapping[str, Any]

# Fields that go to `SamplingParams` as they are.
_PLAIN = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


def chat_params(
    body: ChatCompletionRequest, defaults: Defaults, *, grammar: Grammar | None, special: bool
) -> SamplingParams:
    """Of a chat.

    Args:
        body: The request.
        defaults: Of `SamplingParams`, where the request says nothing.
        grammar: That calls of tools must follow; it goes before the request's own, of which there must be none.
        special: Whether special tokens are needed in the text, to find calls of tools by them.
    """
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    own = grammar_of(body)
    if grammar is not None and own is not None:
        raise RequestError(
            "tool_choice already says what the answer must look like: leave out the other format, or the tool_choice.",
            param="response_format",
        )
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    further: dict[str, Any] = {
        "max_tokens": getattr(body, limit),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "grammar": grammar or own,
    }
    if special:
        further["skip_special_tokens"] = False
    return _params(body, defaults, further, {"max_tokens": limit, "logprobs": "top_logprobs"})


def completion_params(body: CompletionRequest, defaults: Defaults) -> SamplingParams:
    """Of a completion. For nothing but the prompt's echo, `max_tokens` 0, one token is made that is not shown."""
    further = {
        "max_tokens": _or(body.max_tokens, SamplingParams.max_tokens),
        "logprobs": body.logprobs,
        "prompt_logprobs": body.logprobs if body.echo else None,
        "grammar": grammar_of(body),
    }
    if body.suffix:
        raise RequestError("suffix is not supported: the model only continues texts.", param="suffix")
    if body.best_of is not None and body.best_of != 1:
        raise RequestError("best_of is not supported: use n, and choose by logprobs.", param="best_of")
    if body.echo and body.max_tokens == 0:
        further |= {"max_tokens": 1, "logprobs": None}
    return _params(body, defaults, further, {"prompt_logprobs": "logprobs"})


def generate_params(body: GenerateRequest, defaults: Defaults) -> SamplingParams:
    """Of the simple call."""
    further = {"max_tokens": _or(body.max_tokens, SamplingParams.max_tokens), "grammar": grammar_of(body)}
    return _params(body, defaults, further, {})


def _or(value: int | None, default: int | None) -> int | None:
    return default if value is None else value


def _params(
    body: SamplingBody, defaults: Defaults, further: Mapping[str, Any], names: Mapping[str, str]
) -> SamplingParams:
    given = {name: getattr(body, name) for name in _PLAIN if getattr(body, name) is not None}
    if body.logit_bias:
        given["logit_bias"] = {_token_id(token): bias for token, bias in body.logit_bias.items()}
    try:
        return SamplingParams(**{**defaults, **given, **further})
    except RequestError as error:
        name = names.get(error.param or "")
        if name is None:
            raise
        raise RequestError(str(error).replace(str(error.param), name), param=name, code=error.code) from None


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 2**31):
        raise RequestError(f"logit_bias: {text!r} is not a token id.", param="logit_bias")
    return int(text)


def grammar_of(body: SamplingBody) -> Grammar | None:
    """What the answer must look like, in OpenAI's or vLLM's words.

    Raises:
        RequestError: It is said twice, or half.
    """
    found = [(name, grammar) for name, grammar in _grammars(body).items() if grammar is not None]
    if len(found) > 1:
        names = ", ".join(name for name, _ in found)
        raise RequestError(f"Only one of these may say what the answer must look like: {names}.", param=found[1][0])
    return found[0][1] if found else None


def grammar_param(body: ModelBody) -> str:
    """The field of a valid request that says what the answer must look like: a grammar's mistakes are found later."""
    said = _grammars(body) if isinstance(body, SamplingBody) else {}
    return next((name for name, grammar in said.items() if grammar is not None), "tools")


def _grammars(body: SamplingBody) -> dict[str, Grammar | None]:
    one = body.structured_outputs
    return {
        "response_format": _of_response_format(body),
        "guided_json": _schema(body.guided_json),
        "guided_regex": _text("regex", body.guided_regex),
        "guided_choice": _choice(body.guided_choice, "guided_choice"),
        "guided_grammar": _text("lark", body.guided_grammar),
        "structured_outputs.json": _schema(one.json_) if one else None,
        "structured_outputs.regex": _text("regex", one.regex) if one else None,
        "structured_outputs.choice": _choice(one.choice, "structured_outputs.choice") if one else None,
        "structured_outputs.grammar": _text("lark", one.grammar) if one else None,
        "structured_outputs.json_object": Grammar("json_object") if one and one.json_object else None,
    }


def _of_response_format(body: SamplingBody) -> Grammar | None:
    form = body.response_format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object")
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise RequestError(
            'A response_format of type "json_schema" needs json_schema.schema.', param="response_format.json_schema"
        )
    return schema_grammar(form.json_schema.schema_)


def schema_grammar(schema: JSONObject | bool | list[Any]) -> Grammar:
    """JSON that a schema describes."""
    return Grammar("json_schema", json.dumps(schema))


def _schema(schema: JSONObject | str | None) -> Grammar | None:
    if schema is None:
        return None
    return Grammar("json_schema", schema) if isinstance(schema, str) else schema_grammar(schema)


def _text(kind: Any, text: str | None) -> Grammar | None:
    return None if text is None else Grammar(kind, text)


def _choice(texts: list[str] | None, param: str) -> Grammar | None:
    """One of several texts: in Lark's language, whose strings are JSON's."""
    if texts is None:
        return None
    if not all(texts):
        raise RequestError("A choice must not be empty.", param=param)
    return Grammar("lark", "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))
