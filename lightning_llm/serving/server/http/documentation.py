"""What `/openapi.json` says beyond what FastAPI finds out: streams, and the errors that every route may answer with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from lightning_llm.serving.server.http.responses import ErrorResponse

Responses = dict[int | str, dict[str, Any]]

_ERRORS = {
    400: "Something is wrong with the request; `param` names the field.",
    401: "The key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "Too many requests or tokens of this client.",
    500: "The server failed.",
    503: "The server is not ready, full or about to end.",
}
STREAM: Responses = {200: {"description": "Events", "content": {"text/event-stream": {"schema": {"type": "string"}}}}}
STREAM_OR: Responses = {
    200: {"description": "The answer, or with `stream` its events", "content": STREAM[200]["content"]}
}
ERRORS: Responses = {
    status: {"description": text, "model": ErrorResponse, "content": {"application/json": {}}}
    for status, text in _ERRORS.items()
}


def as_json(body: BaseModel) -> Response:
    """An answer; fields that were not set are left out."""
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def describe(app: FastAPI) -> None:
    """Lets `/openapi.json` say that mistakes are 400 and look like OpenAI's: FastAPI takes its own 422 for granted."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema.get("components", {}).get("schemas", {}).pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
