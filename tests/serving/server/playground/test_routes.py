"""What the page is served with, and what it is told of the workers."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lightning_llm.serving.engine.outputs import EngineStats
from lightning_llm.serving.server.playground import routes
from lightning_llm.serving.server.playground.routes import MAX_CELLS, attach_playground, block_map
from tests.serving.server.observed import PacedClient, make_app, make_paced_client


def test_the_page_may_load_nothing_else() -> None:
    app = FastAPI()
    attach_playground(app, make_paced_client())
    client = TestClient(app)
    answer = client.get("/")
    assert answer.text.startswith("<!doctype html>") and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    # `//` after a quote would be another host; the namespace of SVG within the icon is a name, and nothing is loaded.
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", answer.text)
    assert "innerHTML" not in answer.text


class Workers(PacedClient):
    """Two workers, of which one stops answering; counts how often they are asked."""

    asked = 0

    async def stats(self) -> Mapping[int, EngineStats]:
        self.asked += 1
        return {1: self.engine.stats()}

    async def blocks(self) -> Mapping[int, bytes]:
        return {0: b"", 1: self.engine.scheduler.pool.states()}


def make_workers(**kwargs) -> Workers:
    client = make_paced_client(**kwargs)
    client.__class__ = Workers
    return client


def test_the_state_is_that_of_the_engine() -> None:
    workers = make_workers(kv_cache_blocks=33)
    with TestClient(make_app(workers)[0]) as client:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "the quick brown fox"}], "max_tokens": 20}
        client.post("/v1/chat/completions", json=body)
        state = client.get("/playground/state").json()
    (first,) = state["workers"]
    assert first["id"] == 1
    assert (state["model"], state["max_model_len"], state["chat"]) == ("tiny", workers.max_model_len, True)
    assert first["generation_tokens"] == 20 and first["running"] == first["waiting"] == 0
    assert base64.b64decode(first["map"]) == workers.engine.scheduler.pool.states()
    free, cached, used, shared = first["blocks"]
    assert free + cached + used + shared == workers.engine.stats().blocks_total
    assert cached == workers.engine.stats().blocks_cached > 0 and used == shared == 0


@pytest.mark.parametrize(("fresh", "asked"), [(3600.0, 1), (0.0, 5)])
def test_many_who_look_ask_the_workers_once(fresh: float, asked: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "FRESH", fresh)
    workers = make_workers()
    with TestClient(make_app(workers)[0]) as client:
        client.get("/")
        assert workers.asked == 0
        for _ in range(5):
            client.get("/playground/state")
    assert workers.asked == asked


def test_a_model_without_a_template_completes() -> None:
    with TestClient(make_app(make_paced_client(template=None))[0]) as client:
        assert client.get("/playground/state").json()["chat"] is False


@pytest.mark.parametrize("blocks", [0, 1, MAX_CELLS, MAX_CELLS + 1, 3 * MAX_CELLS - 1, 100_000])
def test_a_map_has_room_for_any_pool(blocks: int) -> None:
    states = bytes(at % 4 for at in range(blocks))
    cells, size = block_map(states)
    assert len(cells) == -(-blocks // size) <= MAX_CELLS
    assert size == 1 and cells == states or blocks > MAX_CELLS


def test_a_cell_is_what_most_of_its_blocks_are() -> None:
    states = bytes([0, 2, 2] * MAX_CELLS)
    assert block_map(states) == (bytes([2] * MAX_CELLS), 3)
