"""What surrounds every route: a name for the request, an answer whatever happens, and an end when nobody listens."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_llm.serving.server.http.errors import as_api_error

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Names each request in `request.state.request_id`: as its X-Request-Id says, or anew. The answer has it too."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Goes on, with a name."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        await self.app(scope, receive, send_named)


class ErrorBoundary:
    """Answers what nobody foresaw with a plain 500, and says no more in the log than where it happened.

    Args:
        app: What may fail.
        retry_after: Seconds, said with every 503.
    """

    def __init__(self, app: ASGIApp, retry_after: int) -> None:
        self.app = app
        self.retry_after = retry_after

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Goes on, and catches what comes back."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start" and message["status"] == 503:
                MutableHeaders(scope=message)["Retry-After"] = str(self.retry_after)
            await send(message)

        try:
            await self.app(scope, receive, watch)
        except Exception as error:
            answer = as_api_error(error, scope["state"]["request_id"])
            if not started:
                await answer.response()(scope, receive, watch)


class CancelOnDisconnect:
    """Cancels what a route does once its client has gone, streaming or not: Starlette does it for streams alone.

    It has to be within `BodyLimits`, which hands on the body as one message.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Goes on until there is an answer, or nobody to hear it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        first = [await receive()]
        gone = asyncio.Event()

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                continue
            gone.set()

        async def replay() -> Message:
            if first:
                return first.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        listener = asyncio.ensure_future(listen())
        try:
            await asyncio.wait({answer, listener}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
            with suppress(asyncio.CancelledError):
                await answer
        finally:
            for task in (answer, listener):
                task.cancel()
            await asyncio.gather(answer, listener, return_exceptions=True)
