"""`Link`: a worker as an `EngineClient` knows it, and `Ticket`: what the worker has to answer."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import psutil


@dataclass(frozen=True)
class WorkerInfo:
    """How a worker stands.

    Attributes:
        id: LitServe's.
        pid: 0 before it has begun.
        ready: Whether requests go to it.
        busy: Whether it has requests.
        steps: Of its engine.
        silence: Seconds since it last went through its loop; None before it has begun.
        in_flight: Requests of this HTTP process that it has.
    """

    id: int
    pid: int
    ready: bool
    busy: bool
    steps: int
    silence: float | None
    in_flight: int


@dataclass(eq=False)
class Link:
    """A worker that has said hello.

    Attributes:
        worker: Its id.
        process: To see whether it lives.
        address: Of its inbox.
        tickets: What it has to answer, by uid.
        requests: How many of the tickets are requests.
        known: What it last answered, by question.
        asking: Questions that it has not answered yet.
    """

    worker: int
    process: psutil.Process
    address: str
    tickets: dict[str, Ticket] = field(default_factory=dict)
    requests: int = 0
    known: dict[str, Any] = field(default_factory=dict)
    asking: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        """Whether its process is."""
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(eq=False)
class Ticket:
    """A request, or a question, that a worker has to answer.

    Attributes:
        uid: In messages.
        link: Whose it is.
        is_request: And not a question.
        answers: Of a request, those that have not ended.
        arrived: What has come and was not read yet.
    """

    uid: str
    link: Link
    is_request: bool
    answers: int
    arrived: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)

    async def next(self) -> Any:
        """What comes next; raises what comes as an exception."""
        item = await self.arrived.get()
        if isinstance(item, Exception):
            raise item
        return item
