"""`EngineClient` in front of a worker that this process plays, over real sockets."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import time
from contextlib import aclosing, suppress

import pytest

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.transport import EngineTransport
from lightning_llm.serving.server.wire import unpack, update_to_wire

FACTS = {"name": "tiny", "max_model_len": 9, "vocab_size": 9, "block_size": 16, "generation_defaults": {}}


class Worker:
    """Worker 0: its inbox, and its messages to the client."""

    def __init__(self, transport: EngineTransport, client: EngineClient) -> None:
        self.inbox, address = transport.open_inbox(0)
        self.board, self.client = transport.board, client
        self.board.beat(0, busy=False)
        self.board.workers[0].ready = True
        self.say(["hello", address, FACTS])

    def say(self, *events: list) -> None:
        self.client.receive(0, os.getpid(), list(events))

    async def hear(self) -> list:
        assert await asyncio.to_thread(self.inbox.poll, 10_000)
        return unpack(self.inbox.recv())


@pytest.fixture
def transport():
    made = EngineTransport(1, 1)
    yield made
    made.close()


def in_front_of(transport: EngineTransport, play) -> None:
    async def run() -> None:
        client = EngineClient(transport)
        worker = Worker(transport, client)
        try:
            await asyncio.wait_for(play(client, worker), 30)
        finally:
            worker.inbox.close()
            transport.disconnect()

    asyncio.run(run())


def test_a_worker_in_a_long_step_is_ready_and_an_idle_one_that_is_silent_is_not(transport: EngineTransport) -> None:
    async def play(client: EngineClient, worker: Worker) -> None:
        worker.board.beat(0, busy=True)
        worker.board.workers[0].beat = time.monotonic() - 60
        assert client.workers[0].ready and client.workers[0].silence >= 60
        worker.board.workers[0].busy = False
        assert not client.workers[0].ready

    in_front_of(transport, play)


def test_who_does_not_read_holds_up_neither_routing_nor_the_drain(transport: EngineTransport) -> None:
    async def play(client: EngineClient, worker: Worker) -> None:
        updates = client.generate([1, 2], SamplingParams(n=2), request_id="mine")
        async with aclosing(updates):
            first = asyncio.ensure_future(anext(updates))
            _, uid, _ = await worker.hear()
            worker.say(["update", update_to_wire(Update(uid, index=0, text="a"))])
            assert (await first).text == "a"
            assert client.num_in_flight == transport.board.in_flight[0] == client.workers[0].in_flight == 1
            ends = [Update(uid, index=index, text="b", finish_reason="stop") for index in (0, 1)]
            worker.say(*(["update", update_to_wire(end)] for end in ends))
            assert client.num_in_flight == transport.board.in_flight[0] == client.workers[0].in_flight == 0
            assert [update.finish_reason async for update in updates] == ["stop", "stop"]

    in_front_of(transport, play)


def test_a_request_that_no_engine_takes_ends_all_its_answers(transport: EngineTransport) -> None:
    async def play(client: EngineClient, worker: Worker) -> None:
        async def read() -> list:
            return [update async for update in client.generate([1], SamplingParams(n=2), request_id="mine")]

        answer = asyncio.ensure_future(read())
        _, uid, _ = await worker.hear()
        worker.say(["broken", uid, "no"])
        assert [(update.index, update.finish_reason) for update in await answer] == [(0, "error"), (1, "error")]
        assert client.num_in_flight == 0

    in_front_of(transport, play)


def test_of_a_worker_in_a_long_step_what_it_said_last_is_told(transport: EngineTransport) -> None:
    stats = EngineStats(**{field.name: 0 for field in dataclasses.fields(EngineStats)})

    async def play(client: EngineClient, worker: Worker) -> None:
        asked = asyncio.ensure_future(client.stats())
        question, uid = await worker.hear()
        assert question == "stats"
        worker.say(["reply", uid, dataclasses.asdict(stats)])
        assert await asked == {0: stats}
        assert await client.stats() == {0: stats}  # it does not answer
        assert await client.stats() == {0: stats}  # and is not asked once more
        _, uid = await worker.hear()
        worker.say(["reply", uid, dataclasses.asdict(stats) | {"blocks_total": 7}])
        asked = asyncio.ensure_future(client.stats())
        await asyncio.sleep(0)
        assert not worker.inbox.poll(0) and client.workers[0].in_flight == 0
        assert (await asked)[0].blocks_total == 7

    in_front_of(transport, play)


def test_the_watch_goes_on_after_something_unforeseen(transport: EngineTransport) -> None:
    async def play(client: EngineClient, worker: Worker) -> None:
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        process.start()
        client.receive(0, process.pid, [["hello", "ipc:///nowhere", FACTS]])
        transport.board._phase.value = 99  # there is no such phase
        watch = asyncio.ensure_future(client._watch())
        await asyncio.sleep(0.3)
        transport.board._phase.value = 0
        process.kill()
        process.join()
        while client.workers[0].ready:
            await asyncio.sleep(0.02)
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch

    in_front_of(transport, play)
