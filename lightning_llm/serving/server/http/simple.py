"""POST /generate and /generate_stream: a prompt and `SamplingParams`, and an answer."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.serving.server.http.documentation import as_json, events
from lightning_llm.serving.server.http.errors import request_id_of
from lightning_llm.serving.server.http.jobs import Job
from lightning_llm.serving.server.http.limits import ParsedRoute
from lightning_llm.serving.server.http.params import generate_params
from lightning_llm.serving.server.http.requests import GenerateRequest
from lightning_llm.serving.server.http.responses import GenerateResponse
from lightning_llm.serving.server.http.service import Service


def simple_routes(service: Service) -> APIRouter:
    """The router."""
    router = APIRouter(route_class=ParsedRoute)

    async def prepare(body: GenerateRequest, request: Request) -> Job:
        service.admit(body.model)
        params = generate_params(body, service.client.default_sampling_params)
        prompts = await service.prompts.encode_all([body.prompt], "prompt", add_special_tokens=body.add_special_tokens)  # type: ignore[arg-type]
        return service.job(request, body, "gen", prompts, params)

    @router.post("/generate", response_model=GenerateResponse)
    async def generate(body: GenerateRequest, request: Request) -> Response:
        """Continues a text."""
        answers, tally = await service.collect(await prepare(body, request))
        completion = answers[0][0].completion
        answer = GenerateResponse(
            text=completion.text,
            token_ids=completion.token_ids,
            finish_reason=completion.finish_reason,  # type: ignore[arg-type]
            usage=tally.usage(),
        )
        return as_json(answer)

    @router.post("/generate_stream", responses=events(GenerateResponse), response_class=Response)
    async def generate_stream(body: GenerateRequest, request: Request) -> Response:
        """Continues a text, piece by piece."""
        return service.stream(pieces(await prepare(body, request)), request_id_of(request))

    async def pieces(job: Job) -> AsyncGenerator[GenerateResponse, None]:
        tally = job.tally()
        async with aclosing(service.run(job)) as updates:
            async for place, update in updates:
                tally.add(place, update)
                piece = GenerateResponse(
                    text=update.text,
                    token_ids=update.token_ids,
                    finish_reason=update.finish_reason,  # type: ignore[arg-type]
                )
                if update.finish_reason is not None:
                    piece.usage = tally.usage()
                yield piece

    return router
