"""POST /v1/embeddings: the hidden states of texts, pooled and of length 1."""

from __future__ import annotations

import base64
from contextlib import aclosing

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.documentation import as_json
from lightning_llm.serving.server.http.limits import ParsedRoute
from lightning_llm.serving.server.http.requests import EmbeddingRequest
from lightning_llm.serving.server.http.responses import Embedding, EmbeddingResponse
from lightning_llm.serving.server.http.service import Service


def embedding_routes(service: Service) -> APIRouter:
    """The router."""
    router = APIRouter(route_class=ParsedRoute)
    known: set[int] = set()  # the one number of dimensions, once a text was embedded

    def check_dimensions(wanted: int | None) -> None:
        if wanted is not None and known and wanted not in known:
            raise RequestError(
                f"The model's embeddings have {max(known)} dimensions and cannot be shortened.", param="dimensions"
            )

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Embeds texts."""
        service.admit(body.model)
        texts = await service.prompts.encode_all(body.input, "input")
        params = SamplingParams(max_tokens=1)
        job = service.job(request, body, "embd", texts, params, param="input", pooling=service.settings.pooling)
        vectors: list[list[float]] = [[] for _ in texts]
        tally = job.tally()
        check_dimensions(body.dimensions)
        async with aclosing(service.run(job)) as updates:
            async for place, update in updates:
                tally.add(place, update)
                if update.embedding is not None:
                    vectors[place] = update.embedding
                    known.add(len(update.embedding))
                    check_dimensions(body.dimensions)
        usage = tally.usage()
        answer = EmbeddingResponse(
            object="list",
            data=[
                Embedding(object="embedding", index=place, embedding=_spell(vector, body.encoding_format))
                for place, vector in enumerate(vectors)
            ],
            model=service.client.model_name,
            usage=usage,
        )
        return as_json(answer)

    return router


def _spell(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
