"""`EngineClient`: the engines, as seen by a process that speaks HTTP. Routes ask it; it asks the workers.

It lives on that process's event loop, and never holds it up.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.board import Phase
from lightning_llm.serving.server.routing import PrefixRouter
from lightning_llm.serving.server.transport import EngineTransport
from lightning_llm.serving.server.wire import params_to_wire, update_from_wire
from lightning_llm.serving.tokenizer import ModelTokenizer

log = logging.getLogger(__name__)

_WATCH = 0.1  # seconds between looks at the workers and at the server's phase
_PATIENCE = 5.0  # seconds that a worker in a long step may take to answer a question


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
class _Link:
    """A worker that has said hello."""

    worker: int
    process: psutil.Process
    address: str
    tickets: dict[str, _Ticket] = field(default_factory=dict)

    @property
    def alive(self) -> bool:
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(eq=False)
class _Ticket:
    """A request, or a question, that a worker has to answer."""

    uid: str
    link: _Link
    arrived: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)


class EngineClient:
    """See above.

    Args:
        transport: The server's.
        chat_template: A file to use instead of the model's template.
        silence_limit: Seconds without a beat after which a worker does not count as ready.
        router: Chooses workers.
    """

    def __init__(
        self,
        transport: EngineTransport,
        *,
        chat_template: str | Path | None = None,
        silence_limit: float = 10.0,
        router: PrefixRouter | None = None,
    ) -> None:
        self.transport = transport
        self.silence_limit = silence_limit
        self.default_sampling_params: dict[str, Any] = {}
        """What the model's makers say of sampling; empty until a worker is ready."""
        self._board = transport.board
        self._chat_template = chat_template
        self._router = router or PrefixRouter()
        self._links: dict[int, _Link] = {}
        self._facts: dict[str, Any] = {}
        self._tokenizer: ModelTokenizer | None = None
        self._met = asyncio.Event()
        self._numbers = itertools.count()
        self._consumer = 0
        self._in_flight = 0

    # -- what routes ask --

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self._fact("name")

    @property
    def max_model_len(self) -> int:
        """Most tokens of a prompt and its answer."""
        return self._fact("max_model_len")

    @property
    def vocab_size(self) -> int:
        """Tokens that the model knows."""
        return self._fact("vocab_size")

    @property
    def tokenizer(self) -> ModelTokenizer:
        """The model's."""
        if self._tokenizer is None:
            raise EngineDiedError("No worker has loaded the model yet.")
        return self._tokenizer

    @property
    def ready(self) -> bool:
        """Whether a worker is loaded, alive, and not silent for too long."""
        return self._tokenizer is not None and any(worker.ready for worker in self.workers)

    @property
    def draining(self) -> bool:
        """Whether the server is about to end: what runs is finished, nothing new begins."""
        return self._board.phase > Phase.SERVING

    @property
    def num_in_flight(self) -> int:
        """Requests of this process that are being answered."""
        return self._in_flight

    @property
    def workers(self) -> list[WorkerInfo]:
        """All of them, by their ids."""
        return [self._info(worker) for worker in range(len(self._board.workers))]

    async def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        request_id: str,
        priority: int = 0,
        cache_salt: str = "",
        pooling: Literal["mean", "last"] | None = None,
    ) -> AsyncGenerator[Update, None]:
        """What comes of a prompt until all its answers have ended. Closing the iterator cancels it.

        Args:
            prompt_ids: The prompt.
            params: How to answer.
            request_id: In the updates; it need not be unique.
            priority: Lower comes first, where the engine's policy says so.
            cache_salt: Only requests with the same one find each other's prefixes: the tenant.
            pooling: See `Engine.add`.

        Raises:
            RequestError: It cannot be answered as it stands.
            EngineDiedError: There is no engine that could, or its worker has ended meanwhile, or the server has.
        """
        params.check_vocabulary(self.vocab_size)
        link = self._link_for(prompt_ids, cache_salt)
        request = {
            "prompt_ids": list(prompt_ids),
            "params": params_to_wire(params),
            "priority": priority,
            "cache_salt": cache_salt,
            "pooling": pooling,
            "arrival": time.monotonic(),
        }
        left = 1 if pooling else params.n
        ticket = self._register(link)
        self._count(+1)
        try:
            try:
                self.transport.post(link.address, ["add", ticket.uid, request])
            except OverflowError:
                raise RequestError("A number in the request has more than 64 bits.") from None
            while left:
                update = await self._next(ticket)
                update.request_id = request_id
                update.worker = link.worker
                left -= update.finish_reason is not None
                yield update
        finally:
            self._count(-1)
            if link.tickets.pop(ticket.uid, None) is not None and left:
                self.transport.post(link.address, ["abort", ticket.uid])

    async def stats(self) -> dict[int, EngineStats]:
        """Of the engine of each worker that answers within some seconds, by the worker's id."""
        return {worker: EngineStats(**fields) for worker, fields in (await self._ask_all("stats")).items()}

    async def blocks(self) -> dict[int, bytes]:
        """A byte for each block of these engines, see `BlockPool.states`."""
        return await self._ask_all("blocks")

    # -- what workers say --

    def receive(self, worker: int, pid: int, events: list[list[Any]]) -> None:
        """Hands on a worker's message."""
        link = self._links.get(worker)
        for event in events:
            if event[0] == "hello":
                self._meet(worker, pid, *event[1:])
                link = self._links.get(worker)
            elif link is not None and link.process.pid == pid:
                self._hand_on(link, event)

    def _hand_on(self, link: _Link, event: list[Any]) -> None:
        item: Any
        match event:
            case ["update", fields]:
                uid, item = fields[0], update_from_wire(fields)
            case ["refused", uid, message, param, code]:
                item = RequestError(message, param=param, code=code)
            case ["broken", uid, message]:
                item = Update(uid, error=message, finish_reason="error")
            case ["reply", uid, item]:
                pass
            case ["failed"]:
                self._lose(link, "its engine failed")
                return
        # One that was cancelled is not there any more.
        if (ticket := link.tickets.get(uid)) is not None:
            ticket.arrived.put_nowait(item)

    def _meet(self, worker: int, pid: int, address: str, facts: dict[str, Any]) -> None:
        if (before := self._links.get(worker)) is not None:
            self._lose(before, "another has taken its place")
        try:
            self._links[worker] = _Link(worker, psutil.Process(pid), address)
        except psutil.NoSuchProcess:
            return
        self._facts = facts
        self._met.set()
        self._router.block_size = facts["block_size"]
        self.default_sampling_params.update(facts["generation_defaults"])

    def _lose(self, link: _Link, why: str) -> None:
        """A worker is gone: nobody waits for it in vain."""
        if self._links.get(link.worker) is link:
            del self._links[link.worker]
        self._router.forget(link.worker)
        self.transport.forget(link.address)
        if link.tickets and not self.draining:
            log.error("Worker %d (pid %d) is gone, %s", link.worker, link.process.pid, why)
        self._fail(link, f"Worker {link.worker} has ended: {why}.")

    def _fail(self, link: _Link, message: str) -> None:
        tickets, link.tickets = link.tickets, {}
        for ticket in tickets.values():
            ticket.arrived.put_nowait(EngineDiedError(message))

    # -- the process's life --

    @asynccontextmanager
    async def running(self, consumer: int) -> AsyncIterator[None]:
        """While the process with this number serves; begins when a worker is ready."""
        self._consumer = consumer
        watch = asyncio.create_task(self._watch(), name="watch-workers")
        try:
            await self._met.wait()
            self._tokenizer = await asyncio.to_thread(
                ModelTokenizer.load,
                self._facts["folder"],
                eos_token_ids=self._facts["eos_token_ids"],
                chat_template=self._chat_template,
            )
            yield
        finally:
            watch.cancel()
            self.transport.disconnect()

    async def _watch(self) -> None:
        """Finds out what nobody could say: that a worker has died. And what the main process wants."""
        while True:
            for link in list(self._links.values()):
                if not link.alive:
                    self._lose(link, "its process died")
                elif self._board.phase >= Phase.ABORTING:
                    for uid in link.tickets:
                        self.transport.post(link.address, ["abort", uid])
                    self._fail(link, "The server has ended before the answer did.")
            await asyncio.sleep(_WATCH)

    # -- the rest --

    def _fact(self, name: str) -> Any:
        if name not in self._facts:
            raise EngineDiedError("No worker has loaded the model yet.")
        return self._facts[name]

    def _info(self, worker: int) -> WorkerInfo:
        state, link = self._board.workers[worker], self._links.get(worker)
        silence = self._board.silence(worker) if state.beat else None
        return WorkerInfo(
            id=worker,
            pid=state.pid,
            ready=link is not None and state.ready and silence is not None and silence <= self.silence_limit,
            busy=state.busy,
            steps=state.steps,
            silence=silence,
            in_flight=0 if link is None else len(link.tickets),
        )

    def _link_for(self, prompt_ids: Sequence[int], cache_salt: str) -> _Link:
        if self.draining:
            raise EngineDiedError("The server is about to end.")
        # A silent one has long steps, which is better than none.
        loads = {info.id: info.in_flight for info in self.workers if info.ready} or {
            worker: len(link.tickets) for worker, link in self._links.items()
        }
        if not loads:
            raise EngineDiedError("No worker is ready.")
        return self._links[self._router.choose(prompt_ids, cache_salt, loads)]

    def _register(self, link: _Link) -> _Ticket:
        """Before anything is sent, so that no answer comes too early."""
        ticket = _Ticket(f"{self._consumer}.{next(self._numbers)}", link)
        link.tickets[ticket.uid] = ticket
        return ticket

    @staticmethod
    async def _next(ticket: _Ticket) -> Any:
        item = await ticket.arrived.get()
        if isinstance(item, Exception):
            raise item
        return item

    def _count(self, change: int) -> None:
        self._in_flight += change
        self._board.in_flight[self._consumer] = self._in_flight

    async def _ask_all(self, question: str) -> dict[int, Any]:
        links = dict(sorted(self._links.items()))
        answers = await asyncio.gather(*(self._ask(link, question) for link in links.values()), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, EngineDiedError | TimeoutError):
                raise answer
        replies = zip(links, answers, strict=True)
        return {worker: answer for worker, answer in replies if not isinstance(answer, BaseException)}

    async def _ask(self, link: _Link, question: str) -> Any:
        ticket = self._register(link)
        try:
            self.transport.post(link.address, [question, ticket.uid])
            async with asyncio.timeout(_PATIENCE):
                return await self._next(ticket)
        finally:
            link.tickets.pop(ticket.uid, None)


class Fanout:
    """Hands on a worker's messages to the client. To LitServe's dispatcher it is one request's queue and its event."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def append(self, response: Sequence[Any]) -> None:
        """Of the queue: `response` is [data, status]."""
        try:
            self._client.receive(*response[0])
        except Exception:  # the dispatcher would end with it, and with that every answer of this process
            log.exception("A worker's message could not be handed on")

    def set(self) -> None:
        """Of the event; nobody waits for it."""
