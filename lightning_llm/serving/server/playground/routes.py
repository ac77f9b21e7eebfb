"""`attach_playground`: one static page at `/`, and `/playground/state`, which it asks how the workers stand."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

from lightning_llm.serving.engine.outputs import EngineStats
from lightning_llm.serving.server.http.client import EngineLike

PAGE_PATH, STATE_PATH = "/", "/playground/state"
MAX_CELLS = 4096  # of a map; a larger pool has several blocks to a cell
FRESH = 0.25  # seconds for which a state serves everybody who asks


class Engines(EngineLike, Protocol):
    """What the page shows of. A tokenizer without a `chat_template` completes texts only."""

    async def blocks(self) -> Mapping[int, bytes]:
        """`BlockPool.states()` of each worker that answers."""


def attach_playground(app: FastAPI, client: Engines) -> None:
    """Serves the page at `/`, and the state of the workers for it."""
    page = files(__package__).joinpath("index.html").read_text(encoding="utf-8")
    headers = {
        "content-security-policy": content_security_policy(page),
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    state = _State(client)

    @app.get(PAGE_PATH, include_in_schema=False)
    async def show_playground() -> Response:
        return HTMLResponse(page, headers=headers)

    @app.get(STATE_PATH, include_in_schema=False)
    async def show_state() -> Response:
        return JSONResponse(await state.get(), headers={"cache-control": "no-store"})


def content_security_policy(page: str) -> str:
    """Lets a page run its own script and style, talk to where it came from, and nothing else."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        )

    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {hashes('script')}",
            f"style-src {hashes('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
    )


class _State:
    """What the page shows; the workers are asked at most every `FRESH` seconds, and not at all when nobody looks."""

    def __init__(self, client: Engines) -> None:
        self._client = client
        self._asking = asyncio.Lock()
        self._asked = float("-inf")
        self._state: dict[str, Any] = {}

    async def get(self) -> dict[str, Any]:
        async with self._asking:
            if time.monotonic() - self._asked >= FRESH:
                self._state = await self._ask()
                self._asked = time.monotonic()
            return self._state

    async def _ask(self) -> dict[str, Any]:
        client = self._client
        stats, maps = await asyncio.gather(client.stats(), client.blocks())
        return {
            "model": client.model_name,
            "max_model_len": client.max_model_len,
            "chat": getattr(client.tokenizer, "chat_template", None) is not None,
            "time": time.monotonic(),
            "workers": [_worker(worker, stats[worker], maps[worker]) for worker in sorted(stats.keys() & maps.keys())],
        }


def _worker(worker: int, stats: EngineStats, states: bytes) -> dict[str, Any]:
    cells, blocks_per_cell = block_map(states)
    count = Counter(states)
    return {
        "id": worker,
        "running": stats.num_requests_running,
        "waiting": stats.num_requests_waiting,
        "swapped": stats.num_requests_swapped,
        "preemptions": stats.num_preemptions,
        "prefix_queries": stats.prefix_cache_queries,
        "prefix_hits": stats.prefix_cache_hits,
        "prompt_tokens": stats.prompt_tokens,
        "generation_tokens": stats.generation_tokens,
        "blocks": [count[state] for state in range(4)],
        "map": base64.b64encode(cells).decode(),
        "blocks_per_cell": blocks_per_cell,
    }


def block_map(states: bytes) -> tuple[bytes, int]:
    """At most `MAX_CELLS` cells, each the state that most of its blocks have, and how many blocks a cell stands for."""
    size = max(-(-len(states) // MAX_CELLS), 1)
    if size == 1:
        return states, 1
    groups = (states[start : start + size] for start in range(0, len(states), size))
    return bytes(max(Counter(group).items(), key=lambda item: (item[1], item[0]))[0] for group in groups), size
