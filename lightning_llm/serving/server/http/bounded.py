"""`BoundedHTTP`: uvicorn's HTTP protocol, with an end to how long and how large the head of a request may be, and to
how long a client may leave its answer unread.

uvicorn's parser takes headers without end, and waits for them for ever; an app is asked only when they are complete,
which is too late. It waits as patiently for who does not read: the app with it, and the engine's answer in memory.
Written for uvicorn 0.54; given to it as `http=BoundedHTTP`.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of an incomplete head; of a complete one `BodyLimits` wants less, and says so better
HEAD_TIMEOUT = 10.0  # seconds from a connection, or a request's first byte, to the end of the head
WRITE_TIMEOUT = 30.0  # seconds in which a client has to read something, while there is much that it has not read


class BoundedHTTP(HttpToolsProtocol):
    """One connection."""

    _head: int | None = None  # bytes of the head that is coming in; None: none is
    _alarm: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None  # while the client does not keep up

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio calls this."""
        super().connection_made(transport)
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio calls this."""
        self._end_head()
        self._end_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio calls this."""
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

    def pause_writing(self) -> None:
        """asyncio calls this: much is unread."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """asyncio calls this: most was read."""
        self._end_unread()
        super().resume_writing()

    def on_message_begin(self) -> None:
        """The parser calls this."""
        super().on_message_begin()
        if self._head is None:
            self._begin_head()

    def on_headers_complete(self) -> None:
        """The parser calls this."""
        self._end_head()
        super().on_headers_complete()

    def _watch_unread(self) -> None:
        size = self.transport.get_write_buffer_size()

        def look() -> None:
            if self.transport.get_write_buffer_size() < size:
                self._watch_unread()
            else:
                self.transport.abort()  # to close it politely would be to wait until all is read

        self._unread = self.loop.call_later(WRITE_TIMEOUT, look)

    def _end_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _begin_head(self) -> None:
        self._head = 0
        self._alarm = self.loop.call_later(HEAD_TIMEOUT, self.transport.close)

    def _end_head(self) -> None:
        self._head = None
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
