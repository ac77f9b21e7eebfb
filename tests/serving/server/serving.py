"""A server of a tiny random model in processes of its own, and a client of it.

Its routes are the thinnest that there can be, one for each thing that an `EngineClient` does: what is tested here is
what lies below OpenAI's interface.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import httpx
import litserve
import psutil
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lightning_llm.data.tokenizer import train_tokenizer
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.serving.errors import EngineDiedError, RequestError
from lightning_llm.serving.server.api import LLMServeAPI
from lightning_llm.serving.server.client import EngineClient
from lightning_llm.serving.server.server import EngineServer
from lightning_llm.serving.server.wire import params_from_wire

VOCABULARY = 300
CONTEXT = 4096
POISON = 299  # a prompt with this token cannot be computed, as if the device failed


def save_tiny_model(folder: Path) -> Path:
    decoder = Decoder(
        DecoderConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            eos_token_id=0,
            initializer_range=0.4,
        )
    )
    decoder.reset_parameters(7)
    decoder.save_pretrained(folder)
    train_tokenizer(["the quick brown fox jumps over the lazy dog"], VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


# -- the server's process --


class FragileAPI(LLMServeAPI):
    """Its device fails whenever it meets the poison."""

    def setup(self, device: str) -> None:
        super().setup(device)
        forward = self.engine.runner.forward

        def fragile(pieces: Any) -> Any:
            if any(POISON in piece.token_ids for piece in pieces):
                raise RuntimeError("the device failed")
            return forward(pieces)

        self.engine.runner.forward = fragile


def attach(app: FastAPI, client: EngineClient) -> None:
    @app.post("/generate")
    async def generate(request: Request) -> StreamingResponse:
        body = await request.json()
        params = params_from_wire(body.get("params", {}))
        updates = client.generate(
            body["prompt_ids"], params, request_id="mine", cache_salt=body.get("salt", ""), pooling=body.get("pooling")
        )

        async def lines() -> AsyncIterator[str]:
            try:
                async with aclosing(updates):
                    async for update in updates:
                        yield json.dumps(dataclasses.asdict(update)) + "\n"
            except RequestError as error:
                yield json.dumps({"refused": str(error), "param": error.param, "code": error.code}) + "\n"
            except EngineDiedError as error:
                yield json.dumps({"died": str(error)}) + "\n"

        return StreamingResponse(lines())

    @app.get("/readyz")
    async def ready() -> JSONResponse:
        return JSONResponse({}, status_code=200 if client.ready and not client.draining else 503)

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"ours": True})

    @app.get("/state")
    async def state() -> JSONResponse:
        stats, blocks = await client.stats(), await client.blocks()
        return JSONResponse(
            {
                "workers": [dataclasses.asdict(worker) for worker in client.workers],
                "stats": [dataclasses.asdict(one) for one in stats.values()],
                "blocks": [list(one) for one in blocks.values()],
                "in_flight": client.num_in_flight,
                "pid": os.getpid(),
                "model": [client.model_name, client.max_model_len, client.vocab_size, client.tokenizer.encode("fox")],
                "defaults": client.default_sampling_params,
            }
        )

    @app.get("/lag")
    async def lag() -> JSONResponse:
        """The longest that the event loop did not come round in half a second."""
        longest, end = 0.0, time.monotonic() + 0.5
        while (before := time.monotonic()) < end:
            await asyncio.sleep(0.005)
            longest = max(longest, time.monotonic() - before)
        return JSONResponse({"longest": longest})


def _serve(options: dict[str, Any], log: Path) -> None:
    os.setsid()
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    logging.basicConfig(level=logging.WARNING, force=True)  # not pytest's
    tempfile.tempdir = str(log.parent)
    api = FragileAPI(options["model"], attach=attach, name="tiny", block_size=16, **options["engine"])
    settings = {"accelerator": "cpu", "workers_per_device": options["workers"]}
    if options["stock"]:
        litserve.LitServer(api, **settings).run(
            host="127.0.0.1", port=options["port"], num_api_servers=1, generate_client_file=False, log_level="warning"
        )
    else:
        EngineServer(api, **settings, **options["server"]).run("127.0.0.1", options["port"], log_level="warning")


# -- its client --


@dataclasses.dataclass
class Server:
    process: BaseProcess
    url: str
    log: Path
    http: httpx.Client

    def ask(self, path: str = "/state") -> Any:
        return self.http.get(path).json()

    def status(self, path: str = "/readyz") -> int:
        return self.http.get(path).status_code

    @contextmanager
    def stream(self, prompt_ids: list[int], **body: Any) -> Iterator[Iterator[dict[str, Any]]]:
        with self.http.stream("POST", "/generate", json={"prompt_ids": prompt_ids, **body}) as answer:
            yield (json.loads(line) for line in answer.iter_lines())

    def generate(self, prompt_ids: list[int], **body: Any) -> list[dict[str, Any]]:
        with self.stream(prompt_ids, **body) as updates:
            return list(updates)

    def start(self, prompt_ids: list[int], **body: Any) -> Background:
        return Background(self, prompt_ids, body)

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> None:
        family = self.family() if self.process.is_alive() else []
        self.process.kill()
        self.process.join()
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()


class Background:
    """A stream that is read by a thread."""

    def __init__(self, server: Server, prompt_ids: list[int], body: dict[str, Any]) -> None:
        self.updates: list[dict[str, Any]] = []
        self.ended_at = 0.0
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(server, prompt_ids, body), daemon=True)
        self._thread.start()

    def _read(self, server: Server, prompt_ids: list[int], body: dict[str, Any]) -> None:
        try:
            with server.stream(prompt_ids, **body) as updates:
                for update in updates:
                    self.updates.append(update)
                    self._began.set()
        finally:
            self.ended_at = time.monotonic()
            self._began.set()

    def wait_for_first(self) -> Background:
        assert self._began.wait(30) and self.updates
        return self

    def result(self, timeout: float = 60) -> list[dict[str, Any]]:
        self._thread.join(timeout)
        assert not self._thread.is_alive(), "the stream did not end"
        return self.updates


def eventually(what: Callable[[], bool], seconds: float = 30.0) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while True:
        with suppress(httpx.TransportError):
            if what():
                return time.monotonic() - began
        assert time.monotonic() - began < seconds, "it never came to be"
        time.sleep(0.02)


@contextmanager
def serving(model: Path, log: Path, *, workers: int = 1, stock: bool = False, wait: bool = True, **server: Any):
    engine = server.pop("engine", {"kv_cache_blocks": 600, "max_num_seqs": 16})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "model": str(model),
        "port": port,
        "workers": workers,
        "stock": stock,
        "engine": engine,
        "server": server,
    }
    # Forked, since torch is imported here already; the workers that LitServe spawns begin anew.
    process = multiprocessing.get_context("fork").Process(target=_serve, args=(options, log))
    process.start()
    url = f"http://127.0.0.1:{port}"
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # an old one may be closed
    found = Server(process, url, log, httpx.Client(base_url=url, timeout=60, limits=limits, trust_env=False))
    try:
        if wait:
            eventually(lambda: not process.is_alive() or found.status() == 200, 90)
            assert process.is_alive(), log.read_text()
        yield found
    finally:
        found.end()
        found.http.close()
