"""serve.py's section `effects`: what prefix caching, chunked prefill, kinds of batching and a paged cache change.

The engine alone, in this process and without HTTP; the setting is the only difference between two engines of one model,
and they take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from taking_turns import print_table, ratios, say, spread, timed

from lightning_llm.serving import EngineConfig, SamplingParams
from lightning_llm.serving.bench.datasets import Prompt, random_prompts
from lightning_llm.serving.bench.load import arrival_times
from lightning_llm.serving.bench.metrics import RequestResult, summarize
from lightning_llm.serving.engine.engine import Engine
from lightning_llm.serving.loading import LoadedModel, load_model

VOCABULARY = 49_152


@dataclass
class Driven:
    """What came of some requests.

    Attributes:
        results: Of all, in their order.
        duration: Seconds.
        most_running: Sequences at the same time.
    """

    results: list[RequestResult] = field(default_factory=list)
    duration: float = 0.0
    most_running: int = 0

    def figures(self) -> dict[str, Any]:
        return {**summarize(self.results, self.duration), "most_running": self.most_running}


def drive(engine: Engine, prompts: Sequence[Prompt], arrivals: Sequence[float]) -> Driven:
    """Gives requests to an engine when they are due, in seconds from now, and moves it on until all have ended."""
    began, next_one, driven = time.perf_counter(), 0, Driven()
    while next_one < len(prompts) or engine.has_work:
        while next_one < len(prompts) and began + arrivals[next_one] <= time.perf_counter():
            ids, most = list(prompts[next_one].content), prompts[next_one].max_tokens
            engine.add(str(next_one), ids, SamplingParams(temperature=0, max_tokens=most, ignore_eos=True))
            driven.results.append(RequestResult(began + arrivals[next_one], prompt_tokens=len(ids)))
            next_one += 1
        if not engine.has_work:
            time.sleep(max(0.0, began + arrivals[next_one] - time.perf_counter()))
            continue
        updates = engine.step()
        now = time.perf_counter()
        for update in updates:
            result = driven.results[int(update.request_id)]
            result.times.append(now)
            result.output_tokens += len(update.token_ids)
        driven.most_running = max(driven.most_running, engine.stats().num_requests_running)
    driven.duration = time.perf_counter() - began
    return driven


def join(engine: Engine, prompts: Sequence[Prompt], newcomer: Prompt) -> tuple[list[RequestResult], RequestResult]:
    """Streams that run, and one more prompt that comes when each of them has had eight tokens."""
    found: list[RequestResult] = []

    def add(prompt: Prompt) -> None:
        params = SamplingParams(temperature=0, max_tokens=prompt.max_tokens, ignore_eos=True)
        engine.add(str(len(found)), list(prompt.content), params)
        found.append(RequestResult(time.perf_counter()))

    for prompt in prompts:
        add(prompt)
    while engine.has_work:
        if len(found) == len(prompts) and all(len(one.times) >= 8 for one in found):
            add(newcomer)
        updates = engine.step()
        now = time.perf_counter()
        for update in updates:
            found[int(update.request_id)].times.append(now)
    return found[:-1], found[-1]


class Effects:
    """All of them.

    Args:
        folder: The model.
        dtype: Of its weights.
        rounds: How often each setting has its turn.
        quick: Small sizes.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, rounds: int, quick: bool) -> None:
        self.model: LoadedModel = load_model(folder, dtype=dtype, device="cpu")
        self.rounds = rounds
        self.scale = 4 if quick else 1

    def engine(self, **settings: Any) -> Engine:
        sizes = {"max_model_len": 2048, "kv_cache_blocks": 1024, "max_num_seqs": 32}
        return Engine(self.model.decoder, self.model.tokenizer.backend, EngineConfig(**(sizes | settings)))

    def prompts(self, count: int, input_len: int, output_len: int | Sequence[int], seed: int, prefix: int = 0) -> Any:
        return random_prompts(
            count, input_len=input_len, output_len=output_len, prefix_len=prefix, vocab_size=VOCABULARY, seed=seed
        )

    def prefix_caching(self) -> dict[str, Any]:
        """Time to first token of prompts whose first 1024 tokens somebody has asked before."""
        prefix = 1024 // self.scale
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        engines = {name: self.engine(enable_prefix_caching=name == "on") for name in seconds}
        for turn in range(self.rounds):
            first, *others = self.prompts(4, 32, 1, seed=turn, prefix=prefix)
            for name, engine in engines.items():
                drive(engine, [first], [0.0])
                for other in others:
                    seconds[name].append(drive(engine, [other], [0.0]).results[0].ttft)
        hits = engines["on"].stats()
        return {
            "prefix_len": prefix,
            "ttft_s": {name: spread(values) for name, values in seconds.items()},
            "off_over_on": ratios(seconds["off"], seconds["on"]),
            "hit_share": hits.prefix_cache_hits / hits.prefix_cache_queries,
        }

    def chunked_prefill(self) -> dict[str, Any]:
        """The longest pause in running streams while a prompt of 1024 tokens comes in, and how long that one waits."""
        long, streams, output = 1024 // self.scale, 8 // self.scale, 24
        settings = {
            "whole prompts": {"batching": "continuous", "max_num_batched_tokens": 2048},
            "chunks of 128": {"batching": "chunked", "max_num_batched_tokens": 128},
        }
        engines = {name: self.engine(enable_prefix_caching=False, **one) for name, one in settings.items()}
        pauses: dict[str, list[float]] = {name: [] for name in settings}
        waits: dict[str, list[float]] = {name: [] for name in settings}
        for turn in range(self.rounds):
            prompts = self.prompts(streams, 64, output, seed=turn)
            [newcomer] = self.prompts(1, long, 4, seed=1000 + turn)
            for name, engine in engines.items():
                running, joined = join(engine, prompts, newcomer)
                pauses[name].append(max(b - a for one in running for a, b in pairwise(one.times) if b > joined.start))
                waits[name].append(joined.ttft)
        whole, chunks = settings
        return {
            "prompt_len": long,
            "streams": streams,
            "longest_pause_s": {name: spread(values) for name, values in pauses.items()},
            "newcomer_ttft_s": {name: spread(values) for name, values in waits.items()},
            "pause_whole_over_chunks": ratios(pauses[whole], pauses[chunks]),
            "ttft_chunks_over_whole": ratios(waits[chunks], waits[whole]),
        }

    def batching(self) -> dict[str, Any]:
        """Requests of different lengths that arrive at random, in the four ways to make batches of them."""
        kinds = ("static", "dynamic", "continuous", "chunked")
        count, seats = 24 // self.scale, 8
        engines = {kind: self.engine(batching=kind, max_num_seqs=seats, enable_prefix_caching=False) for kind in kinds}
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for turn in range(self.rounds):
            lengths = [4 + 12 * (place * 7 % 8) for place in range(count)]  # 4 to 88 tokens, mixed
            prompts = self.prompts(count, 64, lengths, seed=turn)
            arrivals = arrival_times(count, 8.0, turn)
            for kind, engine in engines.items():
                found[kind].append(drive(engine, prompts, arrivals).figures())
        keys = ("output_throughput", "mean_ttft_ms", "p90_ttft_ms", "mean_e2el_ms", "p90_itl_ms")
        return {
            "requests": count,
            "seats": seats,
            **{kind: {key: spread([one[key] for one in many]) for key in keys} for kind, many in found.items()},
            "e2el_static_over_chunked": ratios(
                [one["mean_e2el_ms"] for one in found["static"]], [one["mean_e2el_ms"] for one in found["chunked"]]
            ),
        }

    def paging(self) -> dict[str, Any]:
        """Sequences that fit into the same memory: a cache of 512 blocks, sequences of at most 2048 tokens."""
        blocks, length = 512, 2048
        prompts = self.prompts(64 // self.scale, 64, 8, seed=0)
        found = {}
        for kind in ("static", "paged"):
            engine = self.engine(kv=kind, kv_cache_blocks=blocks, max_model_len=length, max_num_seqs=64)
            found[kind] = drive(engine, prompts, [0.0] * len(prompts)).figures()
        return {
            "blocks": blocks,
            "max_model_len": length,
            "requests": len(prompts),
            "at_once": {kind: one["most_running"] for kind, one in found.items()},
            "tok_s": {kind: one["output_throughput"] for kind, one in found.items()},
        }


def measure_effects(folder: Path, dtype: torch.dtype, *, rounds: int, quick: bool) -> dict[str, Any]:
    effects = Effects(folder, dtype, rounds, quick)
    drive(effects.engine(), effects.prompts(2, 16, 4, seed=0), [0.0, 0.0])  # to warm up
    found = {}
    for part in (effects.prefix_caching, effects.chunked_prefill, effects.batching, effects.paging):
        found[part.__name__], took = timed(part)
        say(f"{part.__name__}: {took.seconds:.1f} s")
    return found


def print_effects(found: dict[str, Any]) -> None:
    prefix, chunks, batching, paging = (
        found[name] for name in ("prefix_caching", "chunked_prefill", "batching", "paging")
    )
    print_table(
        f"Prefix cache, {prefix['prefix_len']} tokens known (hits {prefix['hit_share']:.2f}); min / median / max",
        ["prefix caching", "time to first token, s", "off / on"],
        [[name, prefix["ttft_s"][name], prefix["off_over_on"] if name == "on" else None] for name in ("off", "on")],
    )
    print_table(
        f"A prompt of {chunks['prompt_len']} tokens joins {chunks['streams']} streams",
        ["prefill", "longest pause of a stream, s", "its own first token, s"],
        [[name, one, chunks["newcomer_ttft_s"][name]] for name, one in chunks["longest_pause_s"].items()],
    )
    kinds = [kind for kind in batching if isinstance(batching[kind], dict) and "mean_ttft_ms" in batching[kind]]
    columns = list(batching[kinds[0]])
    print_table(
        f"{batching['requests']} requests of 4 to 88 tokens, 8 a second, {batching['seats']} seats",
        ["batching", *columns],
        [[kind, *(batching[kind][column] for column in columns)] for kind in kinds],
    )
    print_table(
        f"{paging['blocks']} blocks, {paging['requests']} requests, at most {paging['max_model_len']} tokens each",
        ["cache", "sequences at once", "output tok/s"],
        [[kind, paging["at_once"][kind], paging["tok_s"][kind]] for kind in ("static", "paged")],
    )
