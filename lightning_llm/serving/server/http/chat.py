"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.serving.engine.outputs import TokenLogprob, Update
from lightning_llm.serving.server.http.conversation import ToolStyle, ToolUse, conversation_text, tool_use
from lightning_llm.serving.server.http.documentation import as_json, events_or
from lightning_llm.serving.server.http.errors import request_id_of
from lightning_llm.serving.server.http.jobs import Answer, Job
from lightning_llm.serving.server.http.limits import ParsedRoute
from lightning_llm.serving.server.http.logprobs import chat_logprobs
from lightning_llm.serving.server.http.params import chat_params
from lightning_llm.serving.server.http.requests import ChatCompletionRequest, JSONObject, Message, Tool
from lightning_llm.serving.server.http.responses import (
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatLogprobs,
    Delta,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
    UsageInfo,
)
from lightning_llm.serving.server.http.service import Service
from lightning_llm.serving.server.http.tool_calls import CallPiece, ToolCallParser


def chat_routes(service: Service, style: ToolStyle) -> APIRouter:
    """The router."""
    router = APIRouter(route_class=ParsedRoute)

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=events_or(ChatCompletionChunk))
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answers a conversation."""
        service.admit(body.model)
        # What the template does with tools is found out by rendering it, at the first request that has some.
        use = await service.prompts.render(lambda: tool_use(body, style)) if body.tools else tool_use(body, style)
        params = chat_params(
            body, service.client.default_sampling_params, grammar=use.grammar, special=use.form.special
        )
        prompt = await chat_prompt(
            service,
            style,
            body.messages,
            tools=body.tools if use.names else None,
            add_generation_prompt=body.add_generation_prompt,
            variables=body.chat_template_kwargs,
        )
        chat = Chat(service, body, use, service.job(request, body, "chatcmpl", [prompt], params, param="messages"))
        if body.stream:
            return service.stream(chat.chunks(), request_id_of(request))
        return as_json(await chat.complete())

    return router


async def chat_prompt(
    service: Service,
    style: ToolStyle,
    messages: list[Message],
    *,
    tools: list[Tool] | None,
    add_generation_prompt: bool,
    variables: JSONObject | None,
) -> list[int]:
    """The tokens of a conversation. What cannot fit is not rendered."""
    await service.prompts.check_length(sum(map(_characters, messages)), "messages")

    def render() -> str:
        return conversation_text(
            service.client.tokenizer,
            style,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            variables=variables,
        )

    text = await service.prompts.render(render)
    ids = await service.prompts.encode(text, "messages", add_special_tokens=False)
    service.prompts.check(ids, "messages")
    return ids


def _characters(message: Message) -> int:
    if isinstance(message.content, list):
        return sum(len(part.text or "") for part in message.content)
    return len(message.content or "")


@dataclass
class _Choice:
    """One of the answers of a stream, as far as it has come."""

    parser: ToolCallParser | None
    started: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of tokens whose text is still to come."""


class Chat:
    """One request and its answers, whole or piece by piece."""

    def __init__(self, service: Service, body: ChatCompletionRequest, use: ToolUse, job: Job) -> None:
        self._service = service
        self._body = body
        self._use = use
        self._job = job

    async def complete(self) -> ChatCompletion:
        """All of it."""
        answers, tally = await self._service.collect(self._job)
        return ChatCompletion(
            id=self._job.id,
            object="chat.completion",
            created=self._job.created,
            model=self._service.client.model_name,
            system_fingerprint=self._service.fingerprint,
            choices=[self._choice(answer) for answer in answers[0]],
            usage=tally.usage(),
        )

    def _choice(self, answer: Answer) -> ChatChoice:
        completion = answer.completion
        parser = self._use.parser()
        pieces = [completion.text] if parser is None else [*parser.push(completion.text), *parser.finish()]
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls: list[ToolCall] = []
        for piece in pieces:
            if not isinstance(piece, CallPiece):
                continue
            if piece.id is not None:
                function = FunctionCall(name=piece.name or "", arguments="")
                calls.append(ToolCall(id=piece.id, type="function", function=function))
            calls[-1].function.arguments += piece.arguments
        message = AnswerMessage(role="assistant", content=content or (None if calls else ""), refusal=None)
        if calls:
            message.tool_calls = calls
        return ChatChoice(
            index=completion.index,
            message=message,
            logprobs=self._logprobs(completion.logprobs or []),
            finish_reason=self._finish_reason(completion.finish_reason, parser),
            stop_reason=completion.stop_reason,
        )

    def _logprobs(self, tokens: Iterable[TokenLogprob]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._service.client.tokenizer, tokens, self._body.top_logprobs or 0)

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Piece by piece: of each answer its role, then what it says, then why it ended; at last what it cost."""
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        choices = [_Choice(self._use.parser()) for _ in range(self._job.params.n)]
        tally = self._job.tally()
        async with aclosing(self._service.run(self._job)) as updates:
            async for place, update in updates:
                tally.add(place, update)
                for choice in self._pieces(choices[update.index], update):
                    chunk = self._chunk([choice])
                    if with_usage:
                        chunk.usage = tally.usage() if options and options.continuous_usage_stats else None
                    yield chunk
        if with_usage:
            yield self._chunk([], tally.usage())

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageInfo | None = None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._job.id,
            object="chat.completion.chunk",
            created=self._job.created,
            model=self._service.client.model_name,
            system_fingerprint=self._service.fingerprint,
            choices=choices,
        )
        if usage is not None:
            chunk.usage = usage
        return chunk

    def _pieces(self, choice: _Choice, update: Update) -> Iterable[ChatChunkChoice]:
        def piece(delta: Delta, finish_reason: FinishReason | None = None) -> ChatChunkChoice:
            logprobs, choice.logprobs = choice.logprobs, []
            said = ChatChunkChoice(
                index=update.index,
                delta=delta,
                logprobs=self._logprobs(logprobs) if logprobs else None,
                finish_reason=finish_reason,
            )
            if finish_reason is not None:
                said.stop_reason = update.stop_reason
            return said

        if not choice.started:
            choice.started = True
            yield piece(Delta(role="assistant", content=""))
        choice.logprobs += update.logprobs or []
        texts: list[str | CallPiece] = [update.text] if update.text else []
        if choice.parser is not None:
            texts = list(choice.parser.push(update.text))
            if update.finish_reason is not None:
                texts += choice.parser.finish()
        for text in texts:
            yield piece(Delta(content=text) if isinstance(text, str) else _call_delta(text))
        if update.finish_reason is not None:
            yield piece(Delta(), self._finish_reason(update.finish_reason, choice.parser))

    def _finish_reason(self, reason: str | None, parser: ToolCallParser | None) -> FinishReason:
        """As OpenAI has it: an answer that had to be a call of one function has come to its end, no more."""
        if reason == "length":
            return "length"
        called = parser is not None and parser.num_calls and self._use.forced is None
        return "tool_calls" if called else "stop"


def _call_delta(piece: CallPiece) -> Delta:
    function = FunctionDelta(arguments=piece.arguments)
    call = ToolCallDelta(index=piece.index, function=function)
    if piece.id is not None:
        call.id, call.type, function.name = piece.id, "function", piece.name
    return Delta(tool_calls=[call])
