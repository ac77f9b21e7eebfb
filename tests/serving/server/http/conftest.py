from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from tests.serving.server.http.served import Server, make_client, serve


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    with serve(make_client()) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's own client; at the end nothing is left of what it asked for."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made
    stats = server.client.engine.stats()
    assert stats.blocks_free == stats.blocks_total


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made
