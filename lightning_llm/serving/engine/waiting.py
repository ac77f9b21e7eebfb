"""The queue in front of the engine."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.request import Request

Place = tuple[float, int]


class WaitingQueue:
    """Requests in the order in which they are let in.

    First come, first served; where priorities count, a request stands as if it had come `priority * priority_ageing`
    seconds later. So those before it are known when it comes, and nobody waits for ever. One that had to make room
    comes back to its old place.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._worth = config.priority_ageing if config.scheduling_policy == "priority" else 0.0
        self._numbers = itertools.count(1)
        self._heap: list[tuple[Place, Request]] = []
        self._members: set[Request] = set()

    def place(self, request: Request) -> Place:
        """What requests are ordered by, waiting or running."""
        if not request.order:
            request.order = next(self._numbers)
        return request.arrival + request.priority * self._worth, request.order

    def add(self, request: Request) -> None:
        """Lets a request wait."""
        heapq.heappush(self._heap, (self.place(request), request))
        self._members.add(request)

    def head(self) -> Request | None:
        """Who is next."""
        while self._heap and self._heap[0][1] not in self._members:  # it was removed from the middle
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def remove(self, request: Request) -> None:
        """Takes a request out, wherever it stands."""
        self._members.discard(request)
        if len(self._heap) > 2 * len(self._members) + 16:
            self._heap = [entry for entry in self._heap if entry[1] in self._members]
            heapq.heapify(self._heap)

    def __contains__(self, request: object) -> bool:
        return request in self._members

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._members)
