"""serve.py's sections `http` and `overhead`: our server beside a LitServe server of the usual kind, and beside the
engine without a server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from generation import OurEngine
from servers import LITSERVE, OURS, serving
from taking_turns import print_table, ratios, say, spread, timed
from tokenizers import Tokenizer

from lightning_llm.serving.bench.client import BenchClient, Endpoint
from lightning_llm.serving.bench.datasets import Prompt, as_texts, random_prompts
from lightning_llm.serving.bench.load import Load, arrival_times, closed_loop, open_loop
from lightning_llm.serving.bench.metrics import parse_goodput, summarize

CHAT: Endpoint = "/v1/chat/completions"  # stock LitServe has no other
KEYS = ("p50_ttft_ms", "p90_ttft_ms", "p99_ttft_ms", "p50_tpot_ms", "p90_tpot_ms", "p99_tpot_ms")
KEYS += ("p50_itl_ms", "p90_itl_ms", "p99_itl_ms", "p50_e2el_ms", "output_throughput", "request_goodput", "client_cpu")


def measure_http(
    folder: Path,
    dtype: str,
    *,
    threads: int,
    concurrency: int,
    input_len: int,
    output_len: int,
    rounds: int,
    goodput: Sequence[str],
) -> dict[str, Any]:
    """Both servers with the same chats: so many at a time, and at random times, half as many a second as ours can take.

    Answers are of mixed lengths, between a quarter and all of `output_len`, which is what a server meets.
    """
    limits = parse_goodput(goodput)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    count = 2 * concurrency
    lengths = [output_len * (1 + place % 4) // 4 for place in range(count)]
    closed: dict[str, list[dict[str, Any]]] = {"ours": [], "litserve": []}
    opened: dict[str, list[dict[str, Any]]] = {"ours": [], "litserve": []}
    with ExitStack() as stack:
        urls = {
            name: stack.enter_context(serving(kind, folder, dtype, threads=threads, most=concurrency))
            for name, kind in (("ours", OURS), ("litserve", LITSERVE))
        }
        for url in urls.values():
            ask(url, [Prompt("Hello", 4)], CHAT, concurrency=1)
        rate = 1.0
        for turn in range(rounds):
            ids = random_prompts(
                count, input_len=input_len, output_len=lengths, vocab_size=tokenizer.get_vocab_size(), seed=turn
            )
            prompts = as_texts(ids, tokenizer.decode)
            for name, url in urls.items():
                closed[name].append(_figures(ask(url, prompts, CHAT, concurrency=concurrency), limits))
                if turn == 0 and name == "ours":
                    rate = closed[name][0]["request_throughput"] / 2
        for turn in range(rounds):
            ids = random_prompts(
                count, input_len=input_len, output_len=lengths, vocab_size=tokenizer.get_vocab_size(), seed=100 + turn
            )
            prompts = as_texts(ids, tokenizer.decode)
            for name, url in urls.items():
                opened[name].append(_figures(ask(url, prompts, CHAT, rate=rate, seed=turn), limits))
    return {
        "concurrency": concurrency,
        "request_rate": rate,
        "requests": count,
        "input_len": input_len,
        "output_lens": [min(lengths), max(lengths)],
        "goodput": limits,
        "closed": _compare(closed),
        "open": _compare(opened),
    }


def print_http(found: dict[str, Any]) -> None:
    for kind, words in (
        ("closed", f"{found['concurrency']} at a time"),
        ("open", f"{found['request_rate']:.2f} a second at random"),
    ):
        rows = [[key, *(found[kind][side][key] for side in ("ours", "litserve", "litserve_over_ours"))] for key in KEYS]
        print_table(
            f"Chats over HTTP, {found['requests']} in a run, {words}; min / median / max",
            ["", "ours", "LitServe + transformers", "theirs / ours"],
            rows,
        )


def measure_overhead(
    folder: Path,
    dtype: str,
    *,
    threads: int,
    concurrency: int,
    input_len: int,
    output_len: int,
    rounds: int,
) -> dict[str, Any]:
    """Wall time of the same requests through the server, and by the engine in this process."""
    engine = OurEngine(folder, getattr(torch, dtype), concurrency)
    over_http: list[float] = []
    in_process: list[float] = []
    client_cpu: list[float] = []
    with serving(OURS, folder, dtype, threads=threads, most=concurrency) as url:
        for turn in range(rounds + 1):
            count = 2 * concurrency if turn else 2  # the first is to warm up
            prompts = random_prompts(
                count,
                input_len=input_len,
                output_len=output_len,
                vocab_size=engine.llm.engine.vocab_size,
                seed=turn,
            )
            ids = [prompt.content for prompt in prompts if not isinstance(prompt.content, str)]
            _, took = timed(lambda ids=ids: engine.generate(ids, output_len))
            load = ask(url, prompts, "/v1/completions", concurrency=concurrency)
            if turn:
                in_process.append(took.seconds)
                over_http.append(load.duration)
                client_cpu.append(load.client_cpu)
    return {
        "concurrency": concurrency,
        "requests": 2 * concurrency,
        "input_len": input_len,
        "output_len": output_len,
        "server_s": spread(over_http),
        "engine_s": spread(in_process),
        "server_over_engine": ratios(over_http, in_process),
        "client_cpu": spread(client_cpu),
    }


def print_overhead(found: dict[str, Any]) -> None:
    print_table(
        f"{found['requests']} requests, {found['concurrency']} at a time, {found['input_len']} tokens in, "
        f"{found['output_len']} out; min / median / max",
        ["over HTTP, s", "engine alone, s", "ratio", "the client, cores"],
        [[found[key] for key in ("server_s", "engine_s", "server_over_engine", "client_cpu")]],
    )


def ask(
    url: str,
    prompts: Sequence[Prompt],
    endpoint: Endpoint,
    *,
    concurrency: int | None = None,
    rate: float = math.inf,
    seed: int = 0,
) -> Load:
    """One load on one server; every answer must be whole."""

    async def run() -> Load:
        async with BenchClient(url, "model", endpoint=endpoint, ignore_eos=True) as client:
            if concurrency is not None:
                return await closed_loop(client, prompts, concurrency)
            return await open_loop(client, prompts, arrival_times(len(prompts), rate, seed))

    load = asyncio.run(run())
    say(f"{url}{endpoint}: {len(prompts)} requests in {load.duration:.1f} s")
    for prompt, result in zip(prompts, load.results, strict=True):
        if result.error is not None or result.output_tokens != prompt.max_tokens:
            raise RuntimeError(f"{url}: {result.output_tokens} of {prompt.max_tokens} tokens, {result.error}")
    return load


def _figures(load: Load, limits: Mapping[str, float]) -> dict[str, Any]:
    return {**summarize(load.results, load.duration, limits), "client_cpu": load.client_cpu}


def _compare(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    values = {side: {key: [one[key] for one in runs] for key in KEYS} for side, runs in found.items()}
    compared: dict[str, Any] = {side: {key: spread(of[key]) for key in KEYS} for side, of in values.items()}
    compared["litserve_over_ours"] = {
        key: ratios(values["litserve"][key], values["ours"][key]) if all(values["ours"][key]) else None for key in KEYS
    }
    return compared
