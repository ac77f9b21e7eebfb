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
from pathlib import Path
from typing import Any, Literal

import psutil

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.board import Phase
from lightning_llm.serving.server.links import Link, Ticket, WorkerInfo
from lightning_llm.serving.server.routing import PrefixRouter
from lightning_llm.serving.server.transport import EngineTransport
from lightning_llm.serving.server.wire import params_to_wire, update_from_wire
from lightning_llm.serving.tokenizer import ModelTokenizer

log = logging.getLogger(__name__)

_WATCH = 0.1  # seconds between looks at the workers and at the server's phase
_PATIENCE = 1.0  # seconds that a question waits for a worker; one in a long step answers later


class EngineClient:
    """See above.

    Args:
        transport: The server's.
        chat_template: A file to use instead of the model's template.
        silence_limit: Seconds without a beat after which an idle worker does not count as ready. A busy one is in a
            long step, or hangs: that is for the main process to find out.
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
        self._links: dict[int, Link] = {}
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
        """Whether a worker is loaded and alive."""
        return self._tokenizer is not None and any(worker.ready for worker in self.workers)

    @property
    def draining(self) -> bool:
        """Whether the server is about to end: what runs is finished, nothing new begins."""
        return self._board.phase > Phase.SERVING

    @property
    def num_in_flight(self) -> int:
        """Requests of this process that workers have not ended; a client may still read what has come."""
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
        ticket = self._register(link, answers=left)
        try:
            try:
                self.transport.post(link.address, ["add", ticket.uid, request])
            except OverflowError:
                raise RequestError("A number in the request has more than 64 bits.") from None
            while left:
                update = await ticket.next()
                update.request_id = request_id
                update.worker = link.worker
                left -= update.finish_reason is not None
                yield update
        finally:
            if self._settle(ticket):
                self.transport.post(link.address, ["abort", ticket.uid])

    async def stats(self) -> dict[int, EngineStats]:
        """Of each worker's engine, by the worker's id; of one in a step of more than a second, what it last said."""
        return {worker: EngineStats(**fields) for worker, fields in (await self._ask_all("stats")).items()}

    async def blocks(self) -> dict[int, bytes]:
        """A byte for each block of these engines; see `BlockPool.states`."""
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

    def _hand_on(self, link: Link, event: list[Any]) -> None:
        match event:
            case ["update", fields]:
                self._update(link, fields[0], update_from_wire(fields))
            case ["refused", uid, message, param, code]:
                self._conclude(link, uid, RequestError(message, param=param, code=code))
            case ["broken", uid, message] if (ticket := link.tickets.get(uid)) is not None:
                for index in range(ticket.answers):
                    self._update(link, uid, Update(uid, index=index, error=message, finish_reason="error"))
            case ["reply", uid, answer]:
                self._conclude(link, uid, answer)
            case ["failed"]:
                self._lose(link, "its engine failed")

    # A request that was cancelled has no ticket any more.

    def _update(self, link: Link, uid: str, update: Update) -> None:
        if (ticket := link.tickets.get(uid)) is None:
            return
        ticket.answers -= update.finish_reason is not None
        ticket.arrived.put_nowait(update)
        if not ticket.answers:
            self._settle(ticket)  # whenever its client reads it: neither routing nor draining waits for that

    def _conclude(self, link: Link, uid: str, item: Any) -> None:
        if (ticket := link.tickets.get(uid)) is not None:
            self._settle(ticket)
            ticket.arrived.put_nowait(item)

    def _meet(self, worker: int, pid: int, address: str, facts: dict[str, Any]) -> None:
        if (before := self._links.get(worker)) is not None:
            self._lose(before, "another has taken its place")
        try:
            self._links[worker] = Link(worker, psutil.Process(pid), address)
        except psutil.NoSuchProcess:
            return
        self._facts = facts
        self._met.set()
        self._router.block_size = facts["block_size"]
        self.default_sampling_params.update(facts["generation_defaults"])

    def _lose(self, link: Link, why: str) -> None:
        """A worker is gone: nobody waits for it in vain."""
        if self._links.get(link.worker) is link:
            del self._links[link.worker]
        self._router.forget(link.worker)
        self.transport.forget(link.address)
        if link.tickets and not self.draining:
            log.error("Worker %d (pid %d) is gone, %s", link.worker, link.process.pid, why)
        self._fail(link, f"Worker {link.worker} has ended: {why}.")

    def _fail(self, link: Link, message: str) -> None:
        for ticket in list(link.tickets.values()):
            self._settle(ticket)
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
            try:
                self._look()
            except Exception:  # without this task nobody would hear of a death any more
                log.exception("The workers could not be looked at")
            await asyncio.sleep(_WATCH)

    def _look(self) -> None:
        for link in list(self._links.values()):
            if not link.alive:
                self._lose(link, "its process died")
            elif self._board.phase >= Phase.ABORTING:
                for uid in link.tickets:
                    self.transport.post(link.address, ["abort", uid])
                self._fail(link, "The server has ended before the answer did.")

    # -- the rest --

    def _fact(self, name: str) -> Any:
        if name not in self._facts:
            raise EngineDiedError("No worker has loaded the model yet.")
        return self._facts[name]

    def _info(self, worker: int) -> WorkerInfo:
        state, link = self._board.workers[worker], self._links.get(worker)
        silence = self._board.silence(worker) if state.beat else None
        goes_on = state.busy or (silence is not None and silence <= self.silence_limit)
        return WorkerInfo(
            id=worker,
            pid=state.pid,
            ready=link is not None and state.ready and goes_on,
            busy=state.busy,
            steps=state.steps,
            silence=silence,
            in_flight=0 if link is None else link.requests,
        )

    def _link_for(self, prompt_ids: Sequence[int], cache_salt: str) -> Link:
        if self.draining:
            raise EngineDiedError("The server is about to end.")
        loads = {info.id: info.in_flight for info in self.workers if info.ready}
        if not loads:
            raise EngineDiedError("No worker is ready.")
        return self._links[self._router.choose(prompt_ids, cache_salt, loads)]

    def _register(self, link: Link, answers: int = 0) -> Ticket:
        """Before anything is sent, so that no answer comes too early."""
        ticket = Ticket(f"{self._consumer}.{next(self._numbers)}", link, answers > 0, answers)
        link.tickets[ticket.uid] = ticket
        if answers:
            self._count(link, +1)
        return ticket

    def _settle(self, ticket: Ticket) -> bool:
        """Its last message has come, or nobody waits for it any more; whether it was still open."""
        if ticket.link.tickets.pop(ticket.uid, None) is None:
            return False
        if ticket.is_request:
            self._count(ticket.link, -1)
        return True

    def _count(self, link: Link, change: int) -> None:
        link.requests += change
        self._in_flight += change
        self._board.in_flight[self._consumer] = self._in_flight

    async def _ask_all(self, question: str) -> dict[int, Any]:
        links = [link for _, link in sorted(self._links.items())]
        for link in links:
            if question not in link.asking:
                link.asking[question] = asyncio.create_task(self._learn(link, question))
        if links:
            await asyncio.wait([link.asking[question] for link in links], timeout=_PATIENCE)
        return {link.worker: link.known[question] for link in links if question in link.known}

    async def _learn(self, link: Link, question: str) -> None:
        """However long it takes: what is asked next finds the answer."""
        ticket = self._register(link)
        try:
            self.transport.post(link.address, [question, ticket.uid])
            link.known[question] = await ticket.next()
        except EngineDiedError:
            link.known.clear()
        finally:
            self._settle(ticket)
            del link.asking[question]


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
