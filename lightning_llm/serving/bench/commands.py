"""`lightning-llm bench serve`; cli.py calls `main`."""

from __future__ import annotations

import asyncio
import json as json_module
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from lightning_llm.arguments import run_group
from lightning_llm.data.tokenizer import load_tokenizer
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.bench.client import BenchClient, Endpoint
from lightning_llm.serving.bench.datasets import Prompt, as_texts, prompts_of_file, random_prompts, sharegpt_lengths
from lightning_llm.serving.bench.load import Load, arrival_times, closed_loop, open_loop
from lightning_llm.serving.bench.metrics import parse_goodput, summarize
from lightning_llm.serving.bench.report import render

FAILED = 1

WARMUP = Prompt("Hello", 4)


def serve(
    *,
    url: str = "http://127.0.0.1:8000",
    model: str | None = None,
    endpoint: Endpoint = "/v1/completions",
    dataset: str = "random",
    num_prompts: int = 100,
    request_rate: float | None = None,
    concurrency: int | None = None,
    input_len: int = 128,
    output_len: int = 128,
    prefix_len: int = 0,
    vocab_size: int = 10_000,
    tokenizer: str | None = None,
    ignore_eos: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    goodput: list[str] | None = None,
    timeout: float = 600.0,
    api_key: str | None = None,
    json: str | None = None,
) -> int:
    """Put load on an OpenAI-compatible server, and measure latencies, throughput and goodput.

    Args:
        url: Of the server, ours or any other.
        model: What the server calls it; by default the first that it lists.
        endpoint: /v1/completions or /v1/chat/completions.
        dataset: random; sharegpt-lengths, random tokens in lengths as of ShareGPT's conversations; or a .jsonl file
            whose lines have a "prompt" (text or token ids) and may have "max_tokens".
        num_prompts: How many requests.
        request_rate: Requests per second, arriving at random (Poisson) whatever becomes of the others; inf, the
            default, is all at once.
        concurrency: Instead, so many requests at a time: one begins where another ends.
        input_len: Tokens of a random prompt.
        output_len: Most tokens of an answer.
        prefix_len: Tokens that all random prompts begin with, before input_len others.
        vocab_size: Random token ids are below it: at most the model's.
        tokenizer: A tokenizer.json or a folder with one, whose vocabulary counts instead; chat needs it for random
            prompts, to make texts of them.
        ignore_eos: Answers go on to output_len, if the server knows this extension of OpenAI's API.
        temperature: 0 takes the likeliest token each time.
        seed: Decides prompts and arrivals.
        goodput: Limits in ms that a request must keep to be a good one, such as ttft:200 tpot:50 e2el:9000.
        timeout: Seconds for a whole answer.
        api_key: Sent as a bearer token; by default $OPENAI_API_KEY.
        json: A file to write the results into.
    """
    if request_rate is not None and concurrency is not None:
        raise ConfigurationError(
            "--request-rate sends requests whatever becomes of the others, --concurrency waits for them: give one."
        )
    _check_above(0, num_prompts=num_prompts, input_len=input_len, output_len=output_len, vocab_size=vocab_size)
    _check_above(0, request_rate=request_rate, concurrency=concurrency, timeout=timeout)
    _check_above(-1, prefix_len=prefix_len, seed=seed)
    limits = parse_goodput(goodput or ())
    if dataset.endswith(".jsonl"):
        prompts = prompts_of_file(dataset, num_prompts, output_len=output_len)
    else:
        inputs, outputs = _lengths(dataset, num_prompts, input_len, output_len, seed)
        words = None if tokenizer is None else load_tokenizer(tokenizer)
        prompts = random_prompts(
            num_prompts,
            input_len=inputs,
            output_len=outputs,
            prefix_len=prefix_len,
            vocab_size=vocab_size if words is None else words.get_vocab_size(),
            seed=seed,
        )
        if words is not None and "chat" in endpoint:
            prompts = as_texts(prompts, words.decode)
    if "chat" in endpoint and not all(isinstance(prompt.content, str) for prompt in prompts):
        raise ConfigurationError(f"{endpoint} takes texts, not token ids: give --tokenizer, or a file of texts.")
    client = BenchClient(
        url,
        model,
        endpoint=endpoint,
        api_key=api_key or os.environ.get("OPENAI_API_KEY"),
        ignore_eos=ignore_eos,
        temperature=temperature,
        timeout=timeout,
    )
    arrivals = None if concurrency else arrival_times(num_prompts, request_rate or math.inf, seed)
    load = asyncio.run(_run(client, prompts, concurrency, arrivals))
    results = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "url": url,
        "endpoint": endpoint,
        "model_id": client.model,
        "dataset": dataset,
        "num_prompts": num_prompts,
        "request_rate": None if concurrency else str(request_rate or math.inf),
        "max_concurrency": concurrency,
        "seed": seed,
        "goodput": limits,
        "client_cpu": load.client_cpu,
        **summarize(load.results, load.duration, limits),
    }
    render(results)
    if json is not None:
        _write(json, results)
    return FAILED if results["failed"] else 0


COMMANDS: dict[str, Callable[..., int]] = {"serve": serve}


def main(arguments: list[str]) -> int:
    """Runs one of the commands; returns the exit code: 0 done, 1 requests failed, 2 wrong arguments or no server."""
    return run_group("bench", COMMANDS, arguments)


async def _run(
    client: BenchClient, prompts: list[Prompt], concurrency: int | None, arrivals: list[float] | None
) -> Load:
    async with client:
        # So that the first of those that count does not pay for what a server does but once, and so that a server
        # that answers nobody is found out now. No prompt of the run, or it would be in the prefix cache.
        first = await client.complete(WARMUP)
        if first.error is not None:
            raise ConfigurationError(f"{client.url}{client.endpoint} does not answer: {first.error}")
        with Progress(console=Console(stderr=True), transient=True) as progress:
            bar = progress.add_task("requests", total=len(prompts))

            def seen() -> None:
                progress.advance(bar)

            if arrivals is not None:
                return await open_loop(client, prompts, arrivals, seen)
            return await closed_loop(client, prompts, concurrency or 1, seen)


def _lengths(dataset: str, count: int, input_len: int, output_len: int, seed: int) -> tuple[list[int], list[int]]:
    if dataset == "sharegpt-lengths":
        return sharegpt_lengths(count, seed=seed)
    if dataset != "random":
        raise ConfigurationError(f"--dataset {dataset} is neither random, nor sharegpt-lengths, nor a .jsonl file.")
    return [input_len] * count, [output_len] * count


def _check_above(least: float, **numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not number > least:
            option = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{option} must be above {least}, not {number}.")


def _write(path: str, results: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json_module.dumps(results, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--json {path}: {error}") from error
