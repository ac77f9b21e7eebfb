"""serve.py's section `offline`: many prompts at once in one process, our engine beside transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation import ContinuousBatching, OurEngine, Side, StaticBatch, TimeIsUpError
from taking_turns import Turn, print_table, ratios, say, spread, timed

from lightning_llm.serving.bench.datasets import random_prompts


def measure_offline(
    folder: Path,
    dtype: torch.dtype,
    *,
    concurrencies: Sequence[int],
    input_len: int,
    output_len: int,
    rounds: int,
    limit: float,
    peers: Sequence[str],
) -> dict[str, Any]:
    """Tokens per second of each side, by how many prompts there are at once.

    A side that takes longer than `limit` seconds once has no further turns, with as many prompts or with more.
    """
    most = max(concurrencies)
    ours = OurEngine(folder, dtype, most)
    sides: list[Side] = [ours]
    if StaticBatch.name in peers:
        sides.append(StaticBatch(folder, dtype))
    if ContinuousBatching.name in peers:
        sides.append(ContinuousBatching(folder, dtype, input_len + output_len + 1, most, limit))
    found: dict[str, Any] = {}
    gave_up: dict[str, str] = {}
    for count in concurrencies:
        turns: dict[str, list[Turn]] = {side.name: [] for side in sides}
        agreed: dict[str, list[float]] = {side.name: [] for side in sides[1:]}
        for turn in range(rounds + 1):  # the first is to warm up, and short
            length = output_len if turn else 4
            prompts = _prompts(count, input_len, length, ours.llm.engine.vocab_size, seed=1000 * count + turn)
            answers: dict[str, list[list[int]]] = {}
            for side in [*sides[turn % len(sides) :], *sides[: turn % len(sides)]]:
                if side.name in gave_up:
                    continue
                try:
                    answers[side.name], took = timed(partial(side.generate, prompts, length))
                except TimeIsUpError as error:
                    gave_up[side.name] = f"with {count}: {error}"
                    continue
                say(f"{count} prompts, turn {turn}, {side.name}: {took.seconds:.1f} s")
                assert all(len(answer) == length for answer in answers[side.name]), side.name
                if turn:
                    turns[side.name].append(took)
            for name, theirs in answers.items():
                if turn and name != ours.name:
                    agreed[name].append(_agreement(answers[ours.name], theirs))
        found[str(count)] = _compare(turns, agreed, count * output_len)
    for side in sides:
        if isinstance(side, ContinuousBatching):
            side.close()
    return {"sides": found, "gave_up": gave_up, "input_len": input_len, "output_len": output_len}


def print_offline(found: dict[str, Any]) -> None:
    rows = [
        [f"{side}, {count}", *(one[key] for key in ("tok_s", "ours_over_it", "ours_over_it_cpu", "same_answers"))]
        for count, sides in found["sides"].items()
        for side, one in sides.items()
    ]
    title = f"Offline, {found['input_len']} tokens in, {found['output_len']} out; min / median / max"
    columns = ["side, prompts at once", "output tok/s", "ours / it", "the same per CPU second", "same answers"]
    print_table(title, columns, rows)
    for side, why in found["gave_up"].items():
        print(f"{side} gave up {why}")


def _prompts(count: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> list[list[int]]:
    made = random_prompts(count, input_len=input_len, output_len=output_len, vocab_size=vocab_size, seed=seed)
    return [prompt.content for prompt in made if not isinstance(prompt.content, str)]


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the answers that are the same to their end; float32 should give 1."""
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _compare(turns: dict[str, list[Turn]], agreed: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    ours = turns[OurEngine.name]
    compared: dict[str, Any] = {}
    for side, theirs in turns.items():
        other = side != OurEngine.name
        compared[side] = {
            "tok_s": spread([tokens / one.seconds for one in theirs]),
            "tok_cpu_s": spread([tokens / one.cpu for one in theirs]),
            "ours_over_it": ratios([a.seconds for a in theirs], [b.seconds for b in ours]) if other else None,
            "ours_over_it_cpu": ratios([a.cpu for a in theirs], [b.cpu for b in ours]) if other else None,
            "same_answers": sum(agreed[side]) / len(agreed[side]) if other and agreed[side] else None,
        }
    return compared
