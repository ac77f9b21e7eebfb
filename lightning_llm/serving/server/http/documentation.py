"""What `/openapi.json` says beyond what FastAPI finds out: streams, and the errors that every route may answer with."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.responses import Response

from lightning_llm.serving.server.http.requests import JSONObject
from lightning_llm.serving.server.http.responses import ChatCompletionChunk, ErrorResponse

_ONLY_IN_EVENTS: tuple[type[BaseModel], ...] = (ChatCompletionChunk,)

Responses = dict[int | str, JSONObject]

_ERRORS = {
    400: "Something is wrong with the request; `param` names the field.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    431: "The headers are too large.",
    500: "The server failed.",
    503: "The server is not ready, full or about to end.",
}
ERRORS: Responses = {
    status: {"description": text, "model": ErrorResponse, "content": {"application/json": {}}}
    for status, text in _ERRORS.items()
}


def events(model: type[BaseModel], description: str = "Events") -> Responses:
    """An answer in server-sent events whose `data` is JSON of this form, or an error, and at last `[DONE]`."""
    data: list[JSONObject] = [
        {"type": "string", "contentMediaType": "application/json", "contentSchema": {"$ref": _place(form)}}
        for form in (model, ErrorResponse)
    ]
    schema = {"type": "object", "properties": {"data": {"anyOf": [*data, {"const": "[DONE]"}]}}, "required": ["data"]}
    return {200: {"description": description, "content": {"text/event-stream": {"schema": schema}}}}


def events_or(model: type[BaseModel]) -> Responses:
    """An answer as a whole, or with `stream` in such events."""
    return events(model, "The answer, or with `stream` its events")


def _place(model: type[BaseModel]) -> str:
    return f"#/components/schemas/{model.__name__}"


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
            named = schema.setdefault("components", {}).setdefault("schemas", {})
            for model in _ONLY_IN_EVENTS:
                form = model.model_json_schema(ref_template="#/components/schemas/{model}")
                named |= {**form.pop("$defs", {}), model.__name__: form}
            for name in ("HTTPValidationError", "ValidationError"):
                named.pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
