"""`--profile` of train_overhead.py and engines.py: where a Trainer's step goes, what collectives each side calls."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.profiler import ProfilerActivity, profile

import lightning_llm

Function = tuple[str, int, str]  # file, line, name
Figures = tuple[float, float, float]  # calls, own seconds, cumulative seconds

ROOTS = {module.__name__: Path(module.__file__ or "").parent for module in (lightning_llm, lightning, torch)}
ROOTS["deepspeed"] = ROOTS["torch"].parent / "deepspeed"
WRAPPER = 0.15  # a function with a larger part of the step wraps the model's work, and tells nothing
SHOWN = 30
SHOWN_SHARED = 8


class Profiles:
    """Profiles of the sides that one rank runs.

    Functions are timed in CPU time of the process: with more ranks than cores, wall time would mostly show who waits
    for whom. Collectives are counted in the step after the timed ones, by torch's profiler.

    Args:
        sides: Their names.
        first: First step that is profiled.
        last: The step in which collectives are counted.
    """

    def __init__(self, sides: Iterable[str], first: int, last: int) -> None:
        self.first, self.last = first, last
        self._functions = {side: cProfile.Profile(timer=time.process_time) for side in sides}
        self._collectives: dict[str, Counter[str]] = {}
        self._stop: dict[str, Any] = {}

    def start(self, side: str, step: int) -> None:
        """Begins to watch `side`, if `step` is one of those to watch."""
        if self.first <= step < self.last:
            self._functions[side].enable()
            self._stop[side] = self._functions[side].disable
        elif step == self.last:
            watch = profile(activities=[ProfilerActivity.CPU])
            watch.start()

            def stop() -> None:
                watch.stop()
                events = watch.key_averages()
                self._collectives[side] = Counter(
                    {event.key: event.count for event in events if event.key.startswith("c10d::")}
                )

            self._stop[side] = stop

    def stop(self, side: str) -> None:
        """Ends what `start` began."""
        stop = self._stop.pop(side, None)
        if stop is not None:
            stop()

    def results(self) -> dict[str, Any]:
        """Per side plain data: `{(file, line, name): (calls, own seconds, cumulative seconds)}`, and collectives."""
        return {
            side: {
                "functions": {key: values[1:4] for key, values in pstats.Stats(found).stats.items()},  # type: ignore[attr-defined]
                "collectives": self._collectives.get(side, Counter()),
            }
            for side, found in self._functions.items()
        }


def print_profile(sides: Mapping[str, Sequence[dict[str, Any]]], steps: int) -> None:
    """What profiles say about one step, as the mean over ranks.

    Args:
        sides: The bare one and the Trainer's: of each rank, what `Profiles.results` has of the side.
        steps: That were profiled.
    """
    bare, trainer = (_per_step([rank["functions"] for rank in ranks], steps) for ranks in sides.values())
    whole = sum(own for _, own, _ in trainer.values())
    steps_only = {function: values for function, values in trainer.items() if values[2] < WRAPPER * whole}

    print(f"\n  CPU time of the Trainer's step under the profiler: {whole * 1000:.1f} ms per rank.")
    print("  What the Trainer's side alone calls, callees included:")
    print(f"  {'ms':>8} {'own ms':>8} {'calls':>7}  function")
    alone = [(values, place(function)) for function, values in steps_only.items() if function not in bare]
    named = [(values, name) for values, name in alone if name]
    for (calls, own, cumulative), name in sorted(named, key=lambda row: -row[0][2])[:SHOWN]:
        print(f"  {cumulative * 1000:>8.2f} {own * 1000:>8.2f} {calls:>7.1f}  {name}")

    print("\n  What both sides call, by how much more the Trainer's side spends on it:")
    print(f"  {'bare ms':>8} {'trainer':>8} {'calls':>7}  function")
    shared = [(values[2] - bare[function][2], function) for function, values in steps_only.items() if function in bare]
    for _, function in sorted(shared, reverse=True)[:SHOWN_SHARED]:
        calls, _, cumulative = trainer[function]
        name = place(function) or function[2]
        print(f"  {bare[function][2] * 1000:>8.2f} {cumulative * 1000:>8.2f} {calls:>7.1f}  {name}")

    print("\n  Collectives of one step, rank 0:")
    of_bare, of_trainer = (ranks[0]["collectives"] for ranks in sides.values())
    for name in sorted(of_bare | of_trainer):
        print(f"  {name:<40} bare {of_bare[name]:>4}   trainer {of_trainer[name]:>4}")
    print(flush=True)


def _per_step(ranks: list[dict[Function, Figures]], steps: int) -> dict[Function, Figures]:
    """Mean over ranks and steps."""
    sums: dict[Function, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for functions in ranks:
        for function, values in functions.items():
            sums[function] = [total + value for total, value in zip(sums[function], values, strict=True)]
    count = steps * len(ranks)
    return {function: (calls / count, own / count, whole / count) for function, (calls, own, whole) in sums.items()}


def place(function: Function) -> str:
    """`lightning_llm/strategies/tensor.py:31 name` for functions of the packages that matter; "" for others."""
    file, line, name = function
    for package, root in ROOTS.items():
        if Path(file).is_relative_to(root):
            return f"{package}/{Path(file).relative_to(root)}:{line} {name}"
    return ""
