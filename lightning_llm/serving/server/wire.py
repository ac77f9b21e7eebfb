"""What goes over the wire between HTTP processes and workers: msgpack of plain types, so that no bytes can run code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgpack

from lightning_llm.serving.engine.outputs import TokenLogprob, Update, Usage
from lightning_llm.serving.engine.params import Grammar, SamplingParams

_DEFAULTS = SamplingParams()
_RARE = ("finish_reason", "stop_reason", "error", "embedding")  # of most updates None


def pack(message: Any) -> bytes:
    """Bytes of a message."""
    return msgpack.packb(message, unicode_errors="surrogatepass")


def unpack(data: bytes) -> Any:
    """The message of `pack`; tuples have become lists."""
    return msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogatepass")


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that are not as they are by default."""
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(SamplingParams):
        value = getattr(params, field.name)
        if value != getattr(_DEFAULTS, field.name):
            fields[field.name] = value
    if params.grammar is not None:
        fields["grammar"] = [params.grammar.kind, params.grammar.text]
    return fields


def params_from_wire(fields: Mapping[str, Any]) -> SamplingParams:
    """The params of `params_to_wire`, checked once more."""
    values = dict(fields)
    if "grammar" in values:
        values["grammar"] = Grammar(*values["grammar"])
    return SamplingParams(**values)


def update_to_wire(update: Update) -> list[Any]:
    """[request_id, index, token_ids, text], and a map of everything else that it has."""
    rest = {name: value for name in _RARE if (value := getattr(update, name)) is not None}
    if update.logprobs is not None:
        rest["logprobs"] = [_logprob_to_wire(one) for one in update.logprobs]
    if update.prompt_logprobs is not None:
        rest["prompt_logprobs"] = [one and _logprob_to_wire(one) for one in update.prompt_logprobs]
    if update.usage is not None:
        rest["usage"] = dataclasses.astuple(update.usage)
    common = [update.request_id, update.index, update.token_ids, update.text]
    return [*common, rest] if rest else common


def update_from_wire(fields: list[Any]) -> Update:
    """The update of `update_to_wire`."""
    update = Update(*fields[:4])
    if len(fields) == 4:
        return update
    rest = fields[4]
    for name in _RARE:
        setattr(update, name, rest.get(name))
    if "logprobs" in rest:
        update.logprobs = [_logprob_from_wire(one) for one in rest["logprobs"]]
    if "prompt_logprobs" in rest:
        update.prompt_logprobs = [one and _logprob_from_wire(one) for one in rest["prompt_logprobs"]]
    if "usage" in rest:
        update.usage = Usage(*rest["usage"])
    return update


def _logprob_to_wire(one: TokenLogprob) -> list[Any]:
    return [one.token_id, one.logprob, one.top]


def _logprob_from_wire(fields: list[Any]) -> TokenLogprob:
    token_id, logprob, top = fields
    return TokenLogprob(token_id, logprob, [(token, value) for token, value in top])
