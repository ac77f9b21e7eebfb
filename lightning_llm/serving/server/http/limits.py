"""What a request may be, whatever the route: so large, JSON, so deep, of finite numbers and of valid Unicode.

It is read and checked as a whole before any route sees it, so none has to expect anything else.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn, TypeVar

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_llm.serving.server.http.errors import APIError
from lightning_llm.serving.server.http.settings import HTTPSettings

T = TypeVar("T")
LONG = 32 << 10  # characters or bytes; what takes longer is done in a thread, so that others are answered meanwhile
_PARSED = "lightning_llm.json"  # in the scope
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class BodyLimits:
    """Refuses what no route should see. The rest gets the body as one message, and parsed (`ParsedRoute`)."""

    def __init__(self, app: ASGIApp, settings: HTTPSettings) -> None:
        self.app = app
        self.settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reads and checks the body, and goes on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            self._check_headers(scope)
            body = await self._read(Headers(scope=scope), receive)
            if body is None:
                return  # the client went away before it had said what it wants
            if body:
                scope[_PARSED] = await self._parse(scope, body)
        except APIError as error:
            return await error.response()(scope, receive, send)
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    def _check_headers(self, scope: Scope) -> None:
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.settings.max_header_bytes:
            raise APIError(431, f"The headers are larger than {self.settings.max_header_bytes} bytes.")

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        most = self.settings.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise _too_large(most)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self.settings.body_timeout
            raise APIError(408, f"The body took more than {seconds:g} s.", headers={"Connection": "close"}) from None

    async def _parse(self, scope: Scope, body: bytes) -> Any:
        headers = Headers(scope=scope)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" or headers.get("content-encoding", "identity").lower() != "identity":
            raise APIError(
                415, "Send JSON: Content-Type must be application/json, without Content-Encoding.", code="not_json"
            )
        return await off_loop(len(body), lambda: parse_json(body, self.settings.max_json_depth))


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Does `work` of some size, in a thread if it is long."""
    return await asyncio.to_thread(work) if size > LONG else work()


class ParsedRoute(APIRoute):
    """A route that takes the body as `BodyLimits` has parsed it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI calls this."""
        handle = super().get_route_handler()

        async def handle_parsed(request: Request) -> Response:
            return await handle(_ParsedRequest(request.scope, request.receive))

        return handle_parsed


class _ParsedRequest(Request):
    async def json(self) -> Any:
        return self.scope[_PARSED]


def parse_json(body: bytes, max_depth: int) -> Any:
    """The value; refuses what is not plain JSON.

    Raises:
        APIError: 400: it is no JSON or no UTF-8, it is deeper than `max_depth`, it has a number that is not finite or
            has thousands of digits, or half a character.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except UnicodeDecodeError:
        raise APIError(400, "The body is not valid UTF-8.", code="invalid_json") from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    except json.JSONDecodeError as error:
        where = f"{error.msg} at character {error.pos}"
        raise APIError(400, f"The body is not valid JSON: {where}.", code="invalid_json") from None
    except ValueError:  # Python's own limit
        raise APIError(400, "The body has an integer with too many digits.", code="invalid_json") from None
    if _depth(value, max_depth) > max_depth:
        raise _too_deep(max_depth)
    if _SURROGATE.search(body):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            message = "The body has half of a surrogate pair: text must be valid Unicode."
            raise APIError(400, message, code="invalid_json") from None
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise APIError(400, f"The body has {name}, which is not JSON: numbers must be finite.", code="invalid_json")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise APIError(400, "The body has a number that is too large.", code="invalid_json")
    return number


def _depth(value: Any, enough: int) -> int:
    """Levels of objects and arrays, counted no further than `enough` + 1."""
    depth, level = 0, [value]
    while depth <= enough:
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            break
        depth += 1
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return depth


def _too_deep(most: int) -> APIError:
    return APIError(400, f"The body has more than {most} objects and arrays within each other.", code="invalid_json")


def _too_large(most: int) -> APIError:
    message = f"The body is larger than {most} bytes."
    return APIError(413, message, code="request_too_large", headers={"Connection": "close"})
