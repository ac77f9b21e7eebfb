"""What is served, and whether it can be: /v1/models, /version, and the probes of load balancers and Kubernetes."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from lightning_llm import __version__
from lightning_llm.serving.server.http.documentation import as_json
from lightning_llm.serving.server.http.errors import unavailable
from lightning_llm.serving.server.http.responses import ModelCard, ModelList, StatusResponse, VersionResponse
from lightning_llm.serving.server.http.service import Service


def probe_routes(service: Service) -> APIRouter:
    """The router."""
    router = APIRouter()

    def card() -> ModelCard:
        name = service.client.model_name
        return ModelCard(
            id=name,
            object="model",
            created=service.started,
            owned_by="lightning-llm",
            root=name,
            parent=None,
            max_model_len=service.client.max_model_len,
        )

    @router.get("/v1/models", response_model=ModelList)
    async def list_models() -> Response:
        """The models that are served: one."""
        return as_json(ModelList(object="list", data=[card()]))

    @router.get("/v1/models/{model:path}", response_model=ModelCard)
    async def retrieve_model(model: str) -> Response:
        """The model, by its name."""
        service.check_model(model)
        return as_json(card())

    @router.get("/version", response_model=VersionResponse)
    async def show_version() -> Response:
        """The package's version."""
        return as_json(VersionResponse(version=__version__))

    @router.head("/livez", include_in_schema=False)
    @router.get("/livez", response_model=StatusResponse)
    async def show_liveness() -> Response:
        """Whether this process answers; it does while it drains, too."""
        return as_json(StatusResponse(status="alive"))

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_model=StatusResponse)
    async def show_health() -> Response:
        """Whether there is an engine."""
        if not service.client.ready:
            raise unavailable("The model is not loaded.", code="not_ready")
        return as_json(StatusResponse(status="ok"))

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", response_model=StatusResponse)
    async def show_readiness() -> Response:
        """Whether new requests are taken."""
        service.admit(None)
        return as_json(StatusResponse(status="ready"))

    return router
