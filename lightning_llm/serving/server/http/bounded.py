"""`BoundedHTTP`: uvicorn's HTTP protocol, with an end to how long and how large the head of a request may be.

Its parser takes headers without end, and waits for them for ever; an app is asked only when they are complete, which is
too late. Written for uvicorn 0.54; given to it as `http=BoundedHTTP`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of an incomplete head; of a complete one `BodyLimits` wants less, and says so better
HEAD_TIMEOUT = 10.0  # seconds from a connection, or a request's first byte, to the end of the head


class BoundedHTTP(HttpToolsProtocol):
    """One connection."""

    _head: int | None = None  # bytes of the head that is coming in; None: none is
    _alarm: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio calls this."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this."""
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio calls this."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        """The parser calls this."""
        super().on_message_begin()
        if self._head is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        """The parser calls this."""
        self._end_head()
        super().on_headers_complete()

    def _begin_head(self) -> None:
        self._head = 0
        self._alarm = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def _end_head(self) -> None:
        self._head = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
