"""Server-sent events: `data: {json}`, a comment while there is nothing to say, `data: [DONE]`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_llm.serving.server.http.errors import as_api_error

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come.

    What goes wrong before the first is an HTTP status like any other, unless that takes longer than `ping_interval`;
    after it, an event with the error object, and the end. The generator is closed whatever happens.

    Args:
        events: What to send.
        request_id: For what is said of errors.
        ping_interval: Seconds without an event after which a comment is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[BaseModel, None], *, request_id: str, ping_interval: float) -> None:
        self.status_code = 200
        self.background = None
        self.events = events
        self.request_id = request_id
        self.ping_interval = ping_interval
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all events."""
        async with aclosing(self.events) as events:
            first = asyncio.ensure_future(anext(events))
            try:
                await asyncio.wait({first}, timeout=self.ping_interval)
                if first.done() and (error := first.exception()) is not None:
                    answer = as_api_error(error, self.request_id)
                    return await answer.response()(scope, receive, send)
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._send_all(first, events, send)
            finally:
                first.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await first

    async def _send_all(
        self, first: asyncio.Future[BaseModel], events: AsyncGenerator[BaseModel, None], send: Send
    ) -> None:
        loop = asyncio.get_running_loop()
        last = loop.time()

        async def write(data: bytes) -> None:
            nonlocal last
            last = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def ping() -> None:
            while True:
                idle = loop.time() - last
                if idle >= self.ping_interval:
                    await write(PING)
                else:
                    await asyncio.sleep(self.ping_interval - idle)

        pings = asyncio.ensure_future(ping())
        try:
            await write(encode(await first))
            async for event in events:
                await write(encode(event))
        except Exception as error:
            body = as_api_error(error, self.request_id).body
            await write(b"data: " + body.encode() + b"\n\n")
        finally:
            pings.cancel()
            with suppress(asyncio.CancelledError):
                await pings
        await send({"type": "http.response.body", "body": DONE, "more_body": False})


def encode(event: BaseModel) -> bytes:
    """One event; fields that were not set are left out."""
    return b"data: " + event.model_dump_json(exclude_unset=True).encode() + b"\n\n"
