"""The bodies of requests: OpenAI's, with vLLM's additional fields. Unknown fields are passed over, as in vLLM.

Types and structure are checked here, ranges by `SamplingParams`. Whatever is wrong is a 400 that names the field.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from lightning_llm.serving.engine.params import MAX_N, MAX_STOP_STRINGS

_INT32 = 2**31 - 1
MAX_PRIORITY = 100
_MOST_TOKENS = 1024  # that a request may name one by one
_MOST_MESSAGES = 4096


def _few(given: Any) -> Any:
    """pydantic counts a dictionary's entries only when it has complained about each of them."""
    if isinstance(given, dict) and len(given) > _MOST_TOKENS:
        raise PydanticCustomError("too_long", f"has {len(given)} entries; {_MOST_TOKENS} at most")
    return given


TokenId = Annotated[int, Field(ge=0, le=_INT32)]
Integer = Annotated[int, Field(ge=-_INT32, le=_INT32)]
LongInteger = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# Of a list only the first bad element is told: a body of some megabytes would otherwise have millions of complaints,
# times the branches of a union.
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Inputs = str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=1024)]
JSONObject = dict[str, Any]


class Body(BaseModel):
    """What all bodies have in common: "1" is no number, and true is none either."""

    model_config = ConfigDict(strict=True, extra="ignore", populate_by_name=True)


class ModelBody(Body):
    """A body that may say which model it is for."""

    model: Annotated[str, Field(max_length=512)] | None = None


class JSONSchemaFormat(Body):
    """A named JSON schema."""

    name: str = "answer"
    schema_: JSONObject | bool | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to say what an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None


class StructuredOutputs(Body):
    """vLLM's way to say it; one of them."""

    json_: JSONObject | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    """What else a stream says."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingBody(ModelBody):
    """How tokens are chosen; see `SamplingParams`. What is left out or null has its default."""

    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[Annotated[str, Field(max_length=16)], float], BeforeValidator(_few)] | None = None
    seed: LongInteger | None = None
    min_tokens: Integer | None = None
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=_MOST_TOKENS)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JSONObject | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    priority: Integer = 0
    """Lower comes first, where the server schedules by priority; what is beyond ±`MAX_PRIORITY` counts as that."""
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; all are functions."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class CalledFunction(Body):
    """What the model called; `arguments` is JSON."""

    name: str
    arguments: str = "{}"


class CalledTool(Body):
    """A call in a conversation."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ContentPart(Body):
    """A part of a message. Only text can be answered; the others are named to be refused by their name."""

    type: str
    text: str | None = None


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True, max_length=1024)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(fail_fast=True, max_length=128)] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)]
Tools = Annotated[list[Tool], Field(fail_fast=True, max_length=128)]


class ChatCompletionRequest(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Integer | None = None
    max_tokens: Integer | None = None
    logprobs: bool | None = None
    top_logprobs: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: Tools | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: JSONObject | None = None


class CompletionRequest(SamplingBody):
    """POST /v1/completions."""

    prompt: Inputs
    suffix: str | None = None
    max_tokens: Integer | None = None
    best_of: Integer | None = None
    echo: bool | None = None
    logprobs: Integer | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    add_special_tokens: bool = True


class GenerateRequest(SamplingBody):
    """POST /generate and /generate_stream: one prompt, one answer."""

    prompt: str | TokenIds
    n: Literal[1] | None = None
    max_tokens: Integer | None = None
    add_special_tokens: bool = True


class EmbeddingRequest(ModelBody):
    """POST /v1/embeddings."""

    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Integer | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    priority: Integer = 0
    """Lower comes first, where the server schedules by priority; what is beyond ±`MAX_PRIORITY` counts as that."""
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class TokenizeRequest(ModelBody):
    """POST /tokenize, of a text or of a conversation."""

    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    chat_template_kwargs: JSONObject | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ModelBody):
    """POST /detokenize."""

    tokens: TokenIds
    skip_special_tokens: bool = False
