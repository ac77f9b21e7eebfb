"""POST /v1/embeddings: the hidden states of texts, pooled and of length 1."""

from __future__ import annotations

import base64

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.http.documentation import as_json
from lightning_llm.serving.server.http.requests import EmbeddingRequest
from lightning_llm.serving.server.http.responses import Embedding, EmbeddingResponse
from lightning_llm.serving.server.http.service import Service


def embedding_routes(service: Service) -> APIRouter:
    """The router."""
    router = APIRouter()

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def create_embedding(body: EmbeddingRequest, request: Request) -> Response:
        """Embeds texts."""
        service.admit(body.model)
        texts = await service.encode_all(body.input, "input")
        params = SamplingParams(max_tokens=1)
        job = service.job(request, body, "embd", texts, params, param="input", pooling=service.settings.pooling)
        vectors: list[list[float]] = [[] for _ in texts]
        tally = job.tally()
        async for place, update in service.run(job):
            vectors[place] = update.embedding or vectors[place]
            tally.add(place, update)
            if body.dimensions not in (None, len(vectors[place])):
                raise RequestError(
                    f"The model's embeddings have {len(vectors[place])} dimensions and cannot be shortened.",
                    param="dimensions",
                )
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
