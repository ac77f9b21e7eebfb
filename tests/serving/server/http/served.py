"""A tiny model behind the HTTP interface: the engine runs in the event loop of a real server on a real port."""

from __future__ import annotations

import asyncio
import queue
import socket
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from lightning_llm.serving.chat_template import ChatTemplate
from lightning_llm.serving.engine.engine import Engine
from lightning_llm.serving.engine.outputs import EngineStats, Update
from lightning_llm.serving.engine.params import SamplingParams
from lightning_llm.serving.errors import EngineDiedError
from lightning_llm.serving.server.http import HTTPSettings, Observer, attach
from lightning_llm.serving.server.http.bounded import BoundedHTTP
from lightning_llm.serving.tokenizer import ModelTokenizer
from tests.serving.engine.models import make_decoder, make_engine, tokenizer

TEMPLATES = Path(__file__).parents[2] / "templates"
MODEL = "tiny"


class LocalClient:
    """An `EngineLike` of an engine in the same event loop, which it moves on by one step at a time.

    Attributes:
        arrived: Requests that came.
        cancelled: Those that were given up before their end.
        waiting: Whether requests are left waiting instead, as if each step took for ever.
    """

    model_name = MODEL

    def __init__(self, engine: Engine, text: ModelTokenizer) -> None:
        self.engine = engine
        self.tokenizer = text
        self.ready = True
        self.draining = False
        self.waiting = False
        self.default_sampling_params: dict[str, object] = {}
        self.arrived: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.cancelled: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._inboxes: dict[str, asyncio.Queue[Update | Exception]] = {}
        self._stepping = False

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def max_model_len(self) -> int:
        return self.engine.max_model_len

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, request_id: str, **fields
    ) -> AsyncGenerator[Update, None]:
        if not self.ready:
            raise EngineDiedError("gone")
        self.engine.add(request_id, prompt_ids, params, **fields)
        inbox = self._inboxes[request_id] = asyncio.Queue()
        self.arrived.put(request_id)
        self.wake()
        left = 1 if fields.get("pooling") else params.n
        try:
            while left:
                update = await inbox.get()
                if isinstance(update, Exception):
                    raise update
                left -= update.finish_reason is not None
                yield update
        finally:
            del self._inboxes[request_id]
            if left:
                self.engine.abort(request_id)
                self.cancelled.put(request_id)

    async def stats(self) -> list[EngineStats]:
        return [self.engine.stats()]

    def die(self) -> None:
        self.ready = False
        for inbox in self._inboxes.values():
            inbox.put_nowait(EngineDiedError("gone"))

    def wake(self) -> None:
        if not self._stepping and not self.waiting:
            self._stepping = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._stepping = False
        if self.engine.has_work:
            for update in self.engine.step():
                if update.request_id in self._inboxes:
                    self._inboxes[update.request_id].put_nowait(update)
            self.wake()


def make_client(template: str | None = "chatml.jinja", **settings) -> LocalClient:
    decoder = make_decoder("llama", torch.float32, max_position_embeddings=1024)
    sizes = {"kv_cache_blocks": 256, "block_size": 16, "max_num_seqs": 16, "max_num_batched_tokens": 512}
    text = (TEMPLATES / template).read_text() if template and template.endswith(".jinja") else template
    chat = None if text is None else ChatTemplate(text)
    return LocalClient(make_engine(decoder, **(sizes | settings)), ModelTokenizer(tokenizer(), chat_template=chat))


class Server:
    """The HTTP interface on a port of this machine.

    Attributes:
        url: Where it is.
        client: The engine behind it.
        app: The app.
    """

    def __init__(self, client: LocalClient, port: int, app: FastAPI, loop: asyncio.AbstractEventLoop) -> None:
        self.client = client
        self.port = port
        self.app = app
        self.url = f"http://127.0.0.1:{port}"
        self._loop = loop

    def call(self, function, *arguments) -> None:
        """Calls a function in the server's event loop and waits for it."""
        done = threading.Event()

        def work() -> None:
            function(*arguments)
            done.set()

        self._loop.call_soon_threadsafe(work)
        assert done.wait(10)


@contextmanager
def serve(
    client: LocalClient, settings: HTTPSettings | None = None, *, observer: Observer | None = None
) -> Iterator[Server]:
    """A running server."""
    app = FastAPI()
    attach(app, client, settings, observer=observer)
    server = uvicorn.Server(uvicorn.Config(app, http=BoundedHTTP, log_level="warning", lifespan="off"))
    listener = socket.create_server(("127.0.0.1", 0))
    started: queue.SimpleQueue[asyncio.AbstractEventLoop] = queue.SimpleQueue()

    async def run() -> None:
        started.put(asyncio.get_running_loop())
        await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    loop = started.get(timeout=10)
    try:
        yield Server(client, listener.getsockname()[1], app, loop)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
