"""POST /v1/completions: one or many prompts, `n` answers to each."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.serving.engine.outputs import TokenLogprob, Update
from lightning_llm.serving.server.http.documentation import as_json, events_or
from lightning_llm.serving.server.http.errors import request_id_of
from lightning_llm.serving.server.http.jobs import Job, Tally
from lightning_llm.serving.server.http.limits import ParsedRoute, off_loop
from lightning_llm.serving.server.http.logprobs import CompletionLogprobsWriter
from lightning_llm.serving.server.http.params import completion_params
from lightning_llm.serving.server.http.requests import CompletionRequest
from lightning_llm.serving.server.http.responses import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionResponse,
    UsageInfo,
)
from lightning_llm.serving.server.http.service import Service


def completion_routes(service: Service) -> APIRouter:
    """The router."""
    router = APIRouter(route_class=ParsedRoute)

    @router.post("/v1/completions", response_model=CompletionResponse, responses=events_or(CompletionResponse))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continues texts."""
        service.admit(body.model)
        params = completion_params(body, service.client.default_sampling_params)
        prompts = await service.prompts.encode_all(
            body.prompt, "prompt", n=params.n, add_special_tokens=body.add_special_tokens
        )
        job = service.job(request, body, "cmpl", prompts, params)
        size = sum(map(len, prompts)) if body.echo else 0
        completions = await off_loop(size, lambda: Completions(service, body, job))  # echoes may have to be decoded
        if body.stream:
            return service.stream(completions.chunks(), request_id_of(request))
        return as_json(await completions.complete())

    return router


@dataclass
class _Choice:
    """One of the answers, as far as it has come."""

    writer: CompletionLogprobsWriter
    started: bool = False


class Completions:
    """One request and its answers, whole or piece by piece. Answer `i` of prompt `p` has the index `p * n + i`."""

    def __init__(self, service: Service, body: CompletionRequest, job: Job) -> None:
        self._service = service
        self._body = body
        self._job = job
        self._echoes_only = bool(body.echo) and body.max_tokens == 0
        tokenizer = service.client.tokenizer
        self._echoes = self._texts() if body.echo else [""] * len(job.prompts)
        self._choices = [
            _Choice(CompletionLogprobsWriter(tokenizer, body.logprobs or 0))
            for _ in range(len(job.prompts) * job.params.n)
        ]

    def _texts(self) -> list[str]:
        given = self._body.prompt
        if isinstance(given, str):
            return [given]
        decode = self._service.client.tokenizer.decode
        return [
            given[place] if isinstance(given[place], str) else decode(ids, skip_special_tokens=False)  # type: ignore[misc]
            for place, ids in enumerate(self._job.prompts)
        ]

    async def complete(self) -> CompletionResponse:
        """All of it."""
        answers, tally = await self._service.collect(self._job)
        choices = []
        for place, of_prompt in enumerate(answers):
            for answer in of_prompt:
                completion = answer.completion
                whole = Update(
                    request_id=self._job.id,
                    index=completion.index,
                    token_ids=completion.token_ids,
                    text=completion.text,
                    logprobs=completion.logprobs,
                    finish_reason=completion.finish_reason,
                    stop_reason=completion.stop_reason,
                    prompt_logprobs=of_prompt[0].prompt_logprobs,
                )
                choices.append(self._piece(place, whole))
        return self._response(choices, self._usage(tally))

    async def chunks(self) -> AsyncGenerator[CompletionResponse, None]:
        """Piece by piece, and at last what it cost."""
        options = self._body.stream_options
        with_usage = bool(options and options.include_usage)
        tally = self._job.tally()
        prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        async with aclosing(self._service.run(self._job)) as updates:
            async for place, update in updates:
                tally.add(place, update)
                if update.prompt_logprobs is not None:
                    prompt_logprobs[place] = update.prompt_logprobs
                update.prompt_logprobs = prompt_logprobs.get(place)
                if not (update.text or update.logprobs or update.finish_reason or update.token_ids):
                    continue
                chunk = self._response([self._piece(place, update)])
                if with_usage:
                    chunk.usage = self._usage(tally) if options and options.continuous_usage_stats else None
                yield chunk
        if with_usage:
            yield self._response([], self._usage(tally))

    def _piece(self, place: int, update: Update) -> CompletionChoice:
        """What an update brought, with the prompt before it if it is the first and the prompt is wanted."""
        index = place * self._job.params.n + update.index
        choice = self._choices[index]
        text = "" if self._echoes_only else update.text
        logprobs: CompletionLogprobs | None = None
        if self._body.logprobs is not None:
            tokens: list[int] = []
            values: list[TokenLogprob | None] = []
            if self._body.echo and not choice.started:
                tokens += self._job.prompts[place]
                values += update.prompt_logprobs or [None] * len(tokens)
            if not self._echoes_only:
                tokens += update.token_ids
                values += update.logprobs or []
            logprobs = choice.writer.write(tokens, values)
        if not choice.started:
            text = self._echoes[place] + text
        choice.started = True
        reason = update.finish_reason
        piece = CompletionChoice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason="length" if reason and self._echoes_only else reason,  # type: ignore[arg-type]
        )
        if reason is not None:
            piece.stop_reason = update.stop_reason
        return piece

    def _usage(self, tally: Tally) -> UsageInfo:
        if self._echoes_only:  # the token that was made is not shown
            tally.completion_tokens = 0
        return tally.usage()

    def _response(self, choices: list[CompletionChoice], usage: UsageInfo | None = None) -> CompletionResponse:
        response = CompletionResponse(
            id=self._job.id,
            object="text_completion",
            created=self._job.created,
            model=self._service.client.model_name,
            system_fingerprint=self._service.fingerprint,
            choices=choices,
        )
        if usage is not None:
            response.usage = usage
        return response
