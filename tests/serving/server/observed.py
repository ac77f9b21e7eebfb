"""A tiny model behind the whole HTTP interface, with everything that shows what it does."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import uvicorn
from fastapi import FastAPI

from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.server.http import attach
from lightning_llm.serving.server.observability.metrics import ServerMetrics
from lightning_llm.serving.server.observability.middleware import Observability
from lightning_llm.serving.server.playground import attach_playground
from tests.serving.server.http.served import LocalClient, make_client


class PacedClient(LocalClient):
    """Takes its time for a step, as a larger model does, and writes until it may write no more."""

    pace = 0.0

    def wake(self) -> None:
        if not self._stepping:
            self._stepping = True
            asyncio.get_running_loop().call_later(self.pace, self._step)

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, **fields
    ) -> AsyncGenerator[Update, None]:
        endless = replace(params, ignore_eos=True)
        async for update in super().generate(prompt_ids, endless, request_id=request_id, **fields):
            yield update

    async def stats(self) -> dict[int, EngineStats]:
        return {0: self.engine.stats()}

    async def blocks(self) -> dict[int, bytes]:
        return {0: self.engine.scheduler.pool.states()}


def make_paced_client(template: str | None = "chatml.jinja", pace: float = 0.0, **settings) -> PacedClient:
    client = make_client(template, **settings)
    paced = PacedClient(client.engine, client.tokenizer)
    paced.pace = pace
    return paced


def make_app(client: PacedClient, **settings) -> tuple[FastAPI, ServerMetrics]:
    observability = Observability(client, **settings)
    app = FastAPI()
    attach(app, client, observer=observability)
    attach_playground(app, client)
    observability.attach(app)
    return app, observability.metrics


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """A server on a port of this machine; its URL."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
