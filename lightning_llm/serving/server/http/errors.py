"""Errors as OpenAI's clients know them: every answer that is none is `{"error": {"message", "type", "param", "code"}}`.

A client is told what is wrong with its request, and nothing of ours: that goes to the log, by request id.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.http.responses import ErrorObject, ErrorResponse

log = logging.getLogger(__name__)

_TYPES = {
    500: "server_error",
    503: "service_unavailable_error",
}
_MOST_COMPLAINTS = 32  # that are looked at
_LONGEST_VALUE = 40  # characters of a field's value in a message


class APIError(Exception):
    """An answer with an HTTP status of 400 or above.

    Args:
        status: HTTP's.
        message: For whoever sent the request.
        param: The field that is wrong.
        code: OpenAI's word for it.
        headers: Of the answer, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> str:
        """As JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = ErrorObject(message=self.message, type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=error).model_dump_json()

    def response(self) -> Response:
        """As an answer."""
        return Response(self.body, self.status, self.headers, media_type="application/json")


class EngineFailedError(Exception):
    """The engine could not compute a request, or gave it up; the text is the engine's, for the log."""


def unavailable(message: str, *, code: str = "service_unavailable") -> APIError:
    """503: nothing is wrong with the request, but this server cannot take it now; another may."""
    return APIError(503, message, code=code, headers={"Connection": "close"})


def as_api_error(error: BaseException, request_id: str) -> APIError:
    """What to tell a client of an exception. What is not its own fault is logged, without the request's content."""
    match error:
        case APIError():
            return error
        case RequestError():
            return APIError(400, str(error), param=error.param, code=error.code)
        case RequestValidationError():
            return _invalid(error)
        case HTTPException():
            return _of_http(error)
        case EngineDiedError():
            log.error("Request %s was not answered: %s", request_id, error)
            return unavailable(f"{error} Try again (request {request_id}).")
        case EngineFailedError():
            log.error("Request %s failed in the engine: %s", request_id, error)
        case ConfigurationError():  # the operator's mistake, in our own words
            log.error("Request %s failed: %s", request_id, error)
        case _:
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("Request %s failed with %s:\n%s", request_id, type(error).__name__, frames)
    return APIError(500, f"The server failed to answer (request {request_id}).", code="internal_error")


def _of_http(error: HTTPException) -> APIError:
    messages = {404: "There is nothing at this path.", 405: "This path does not take this method."}
    message = messages.get(error.status_code, str(error.detail))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    return APIError(error.status_code, message, code=code, headers=error.headers)


def _invalid(error: RequestValidationError) -> APIError:
    """The most deeply nested of pydantic's complaints; where a union has one for each of its branches, all of them."""
    found: dict[tuple[int | str, ...], list[dict[str, Any]]] = {}
    for complaint in error.errors()[:_MOST_COMPLAINTS]:
        found.setdefault(_path(complaint, error.body), []).append(complaint)
    path = max(found, key=len)
    complaints = found[path]
    param = _spell(path) or None
    if any(complaint["type"] == "json_invalid" for complaint in complaints):
        return APIError(400, "The body is not valid JSON.", code="invalid_json")
    if any(complaint["type"] == "missing" for complaint in complaints):
        message = f"{param} is missing." if param else "The body is missing: send a JSON object."
        return APIError(400, message, param=param, code="missing_required_parameter")
    text = " / ".join(dict.fromkeys(str(complaint["msg"]) for complaint in complaints))
    return APIError(400, f"{param or 'body'}: {text}{_quote(complaints[0].get('input'))}.", param=param)


def _path(complaint: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Where a complaint is in the body: pydantic's location without the names of unions' branches."""
    where, *steps = complaint["loc"]
    if where != "body":
        return tuple(complaint["loc"][1:])
    path: list[int | str] = []
    for step in steps:
        inside = (isinstance(body, dict) and step in body) or (
            isinstance(body, list) and isinstance(step, int) and step < len(body)
        )
        if inside:
            path.append(step)
            body = body[step]
    if complaint["type"] == "missing" and steps:
        path.append(steps[-1])
    return tuple(path)


def _spell(path: Sequence[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")[:200]


def _quote(value: Any) -> str:
    if not isinstance(value, str | int | float | bool):
        return ""
    text = repr(value)
    return f", not {text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE] + '...'}"


def request_id_of(request: Request) -> str:
    """What `RequestIds` named it."""
    return request.scope.get("state", {}).get("request_id", "unknown")


def install(app: FastAPI) -> None:
    """Answers what routes raise with error objects. What nobody foresaw is `ErrorBoundary`'s."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error, request_id_of(request)).response()

    for kind in (APIError, RequestError, RequestValidationError, HTTPException, EngineDiedError, EngineFailedError):
        app.add_exception_handler(kind, answer)
