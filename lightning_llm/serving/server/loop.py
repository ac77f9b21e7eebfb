"""`EngineLoop`: LitServe's loop in a worker: requests from the inbox, a step of the engine, one message with what came
of it.

Messages to a worker are lists that begin with what is to be done and a request's uid, which begins with the number of
the HTTP process that waits for the answer; see `EngineClient` for the other end.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import zmq
from litserve.loops import LitLoop
from litserve.utils import LitAPIStatus, LoopResponseType

from lightning_llm.serving.engine.engine import Engine
from lightning_llm.serving.engine.grammar import GrammarMatcher
from lightning_llm.serving.errors import RequestError
from lightning_llm.serving.server.processes import end_on_sigterm
from lightning_llm.serving.server.transport import EngineTransport
from lightning_llm.serving.server.wire import pack, params_from_wire, unpack, update_to_wire

if TYPE_CHECKING:
    from lightning_llm.serving.server.api import LLMServeAPI

log = logging.getLogger(__name__)

FANOUT = "*"  # the uid under which LitServe's dispatcher finds what hands on messages for many requests at once
_BEAT = 1.0  # seconds after which an idle worker says that it is alive
_PREPARING = 2  # threads that compile grammars


class EngineLoop(LitLoop):
    """Owns the worker's process: LitServe calls it once, after `LLMServeAPI.setup`."""

    def __call__(  # type: ignore[override]
        self,
        lit_api: LLMServeAPI,
        device: str,
        worker_id: int,
        request_queue: Any,
        transport: EngineTransport,
        workers_setup_status: Any,
        callback_runner: Any,
    ) -> None:
        """Serves until the process is told to end, and ends it: Python would take seconds to tidy torch away."""
        worker = _Worker(worker_id, lit_api.engine, transport)
        end_on_sigterm(transport.board)
        status = 1
        try:
            worker.greet(lit_api.facts)
            worker.serve()
        except SystemExit as end:
            status = int(end.code or 0)
        except Exception:
            log.exception("Worker %d ends", worker_id)
        finally:
            worker.close()
            logging.shutdown()
            os._exit(status)


class _Worker:
    """An engine and its post."""

    def __init__(self, worker_id: int, engine: Engine, transport: EngineTransport) -> None:
        self.worker_id = worker_id
        self.engine = engine
        self.transport = transport
        self.inbox, self.address = transport.open_inbox(worker_id)
        self._outbox: dict[int, list[Any]] = {}  # by HTTP process
        self._preparing: set[str] = set()
        self._prepared: dict[str, GrammarMatcher] = {}  # what the threads leave here before they send a message
        self._threads = ThreadPoolExecutor(_PREPARING, thread_name_prefix="prepare")

    def greet(self, facts: dict[str, Any]) -> None:
        """Tells all HTTP processes where requests go, and what they must know of the model."""
        for consumer in range(self.transport.consumers):
            self._outbox[consumer] = [["hello", self.address, facts]]
        board = self.transport.board
        board.beat(self.worker_id, busy=False)  # before it counts as ready, or it would count as hanging since it began
        board.workers[self.worker_id].ready = True
        self._send()

    def serve(self) -> None:
        """Goes on for ever; sleeps while there is nothing to do."""
        board, engine = self.transport.board, self.engine
        while True:
            busy = engine.has_work
            board.beat(self.worker_id, busy=busy)
            for message in self._receive(0 if busy else _BEAT):
                self._handle(message)
            if engine.has_work:
                board.beat(self.worker_id, busy=True)
                self._step()
                board.beat(self.worker_id, busy=engine.has_work, stepped=True)
            self._send()

    def close(self) -> None:
        """Lets the last messages leave."""
        self.transport.board.workers[self.worker_id].ready = False
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.close()
        self.inbox.close(linger=0)
        self.transport.disconnect()

    def _receive(self, patience: float) -> Iterator[list[Any]]:
        """All messages that are there; waits up to `patience` seconds for the first."""
        if not self.inbox.poll(int(1000 * patience)):
            return
        while True:
            try:
                data = self.inbox.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield unpack(data)

    def _handle(self, message: list[Any]) -> None:
        match message:
            case ["add", uid, request]:
                self._add(uid, request)
            case ["abort", uid]:
                self._preparing.discard(uid)
                self.engine.abort(uid)
            case ["prepared", uid, request]:
                grammar = self._prepared.pop(uid)
                if uid in self._preparing:
                    self._preparing.discard(uid)
                    self._add(uid, request, grammar)
            case ["unprepared", uid, error] if uid in self._preparing:
                self._preparing.discard(uid)
                self._answer(uid, error)
            case ["stats", uid]:
                self._answer(uid, ["reply", uid, dataclasses.asdict(self.engine.stats())])
            case ["blocks", uid]:
                self._answer(uid, ["reply", uid, self.engine.scheduler.pool.states()])

    def _add(self, uid: str, request: dict[str, Any], grammar: GrammarMatcher | None = None) -> None:
        try:
            params = params_from_wire(request["params"])
            if params.grammar is not None and grammar is None:
                # It may take seconds, in which the others would stand still.
                self._preparing.add(uid)
                self._threads.submit(self._prepare, uid, request)
                return
            self.engine.add(
                uid,
                request["prompt_ids"],
                params,
                priority=request["priority"],
                cache_salt=request["cache_salt"],
                pooling=request["pooling"],
                arrival=request["arrival"],
                grammar=grammar,
            )
        except Exception as error:
            self._answer(uid, _refusal(uid, error))

    def _prepare(self, uid: str, request: dict[str, Any]) -> None:
        """In a thread; sends to the worker's own inbox, which wakes it."""
        message = ["prepared", uid, request]
        try:
            grammar = self.engine.prepare(params_from_wire(request["params"]))
            assert grammar is not None  # else there was nothing to prepare
            self._prepared[uid] = grammar
        except Exception as error:
            message = ["unprepared", uid, _refusal(uid, error)]
        socket: zmq.Socket[bytes]
        with zmq.Context.instance().socket(zmq.PUSH) as socket:
            socket.setsockopt(zmq.LINGER, 1000)
            socket.connect(self.address)
            socket.send(pack(message))

    def _step(self) -> None:
        try:
            updates = self.engine.step()
        except Exception:
            log.exception("The engine of worker %d does not work any more; the worker ends", self.worker_id)
            for consumer in range(self.transport.consumers):
                self._outbox.setdefault(consumer, []).append(["failed"])
            self._send()
            raise SystemExit(1) from None
        for update in updates:
            self._answer(update.request_id, ["update", update_to_wire(update)])

    def _answer(self, uid: str, event: list[Any]) -> None:
        self._outbox.setdefault(int(uid.partition(".")[0]), []).append(event)

    def _send(self) -> None:
        for consumer, events in self._outbox.items():
            data = [self.worker_id, os.getpid(), events]
            message = (data, LitAPIStatus.OK, LoopResponseType.STREAMING, self.worker_id)
            self.transport.send((FANOUT, message), consumer)
        self._outbox = {}


def _refusal(uid: str, error: Exception) -> list[Any]:
    """What to tell of a request that the engine did not take."""
    if isinstance(error, RequestError):
        return ["refused", uid, str(error), error.param, error.code]
    log.error("A request could not be added", exc_info=error)
    return ["broken", uid, "The engine could not take this request."]
