"""Load on a server: requests that come when they come (open loop), or as many at a time as there are users (closed)."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_llm.serving.bench.client import BenchClient
from lightning_llm.serving.bench.datasets import Prompt
from lightning_llm.serving.bench.metrics import RequestResult


@dataclass
class Load:
    """What came of it.

    Attributes:
        results: Of all prompts, in their order.
        duration: Seconds from the beginning to the last answer's end.
        client_cpu: Cores that this process kept busy meanwhile: the load generator's own share of the machine.
    """

    results: list[RequestResult]
    duration: float
    client_cpu: float


def arrival_times(count: int, request_rate: float, seed: int) -> list[float]:
    """Seconds at which requests of a Poisson process of `request_rate` a second arrive, the first at 0."""
    if math.isinf(request_rate):
        return [0.0] * count
    gaps = np.random.default_rng([seed, 2]).exponential(1 / request_rate, max(count - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


async def open_loop(
    client: BenchClient,
    prompts: Sequence[Prompt],
    arrivals: Sequence[float],
    seen: Callable[[], object] = lambda: None,
) -> Load:
    """Sends each prompt when it is due, whatever has become of the others.

    Latencies count from when a request was due, so that a client that is late does not make the server look fast.

    Args:
        client: Whom to ask.
        prompts: What.
        arrivals: When, in seconds from now.
        seen: Is called at the end of each.
    """

    results: list[RequestResult | None] = [None] * len(prompts)
    began = time.perf_counter()

    async def ask(place: int) -> None:
        due = began + arrivals[place]
        await asyncio.sleep(due - time.perf_counter())
        results[place] = await client.complete(prompts[place], due)
        seen()

    return await _measure([ask(place) for place in range(len(prompts))], results)


async def closed_loop(
    client: BenchClient, prompts: Sequence[Prompt], concurrency: int, seen: Callable[[], object] = lambda: None
) -> Load:
    """Lets `concurrency` users ask one prompt after the other, until all are asked."""
    results: list[RequestResult | None] = [None] * len(prompts)
    left = iter(enumerate(prompts))

    async def user() -> None:
        for place, prompt in left:
            results[place] = await client.complete(prompt)
            seen()

    return await _measure([user() for _ in range(min(concurrency, len(prompts)))], results)


async def _measure(work: Sequence[Coroutine[None, None, None]], results: Sequence[RequestResult | None]) -> Load:
    """Waits for `work`, which fills `results`."""
    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*work)
    duration = time.perf_counter() - began
    return Load([one for one in results if one is not None], duration, (time.process_time() - cpu) / duration)
