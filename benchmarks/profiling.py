"""`train_overhead.py --profile`: where the CPU time of a Trainer's step goes, and which collectives each side calls."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import lightning
from torch.profiler import ProfilerActivity, profile

import lightning_llm

Function = tuple[str, int, str]  # file, line, name

ROOTS = {"lightning_llm": Path(lightning_llm.__file__).parent, "lightning": Path(lightning.__file__).parent}
WHOLE_STEP = 0.4  # a function with a larger part of the step wraps the model's work, and tells nothing
SHOWN = 30


class Profiles:
    """Profiles of both sides of one rank.

    Functions are timed in CPU time of the process: with more ranks than cores, wall time would mostly show who waits for
    whom. Collectives are counted in the step after the timed ones, by torch's profiler.

    Args:
        first: First step that is profiled.
        last: The step in which collectives are counted.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._functions = {side: cProfile.Profile(timer=time.process_time) for side in ("bare", "trainer")}
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
        """Plain data: per side the functions `{(file, line, name): (calls, own, cumulative seconds)}`, and collectives."""
        functions = {
            side: {key: values[1:4] for key, values in pstats.Stats(found).stats.items()}  # type: ignore[attr-defined]
            for side, found in self._functions.items()
        }
        return {"functions": functions, "collectives": self._collectives}


def print_profile(ranks: list[dict[str, Any]], steps: int) -> None:
    """What `Profiles.results` of all ranks says about the Trainer's side, per step, as the mean over ranks."""
    whole = sum(own for rank in ranks for _, own, _ in rank["functions"]["trainer"].values())
    scale = 1000.0 / (steps * len(ranks))
    found: dict[Function, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for rank in ranks:
        for function, values in rank["functions"]["trainer"].items():
            total = found[function]
            for index, value in enumerate(values):
                total[index] += value
    rows = [
        (cumulative * scale, own * scale, calls / (steps * len(ranks)), place(function))
        for function, (calls, own, cumulative) in found.items()
        if cumulative < WHOLE_STEP * whole and place(function)
    ]
    print(f"\n  CPU time of the Trainer's step under the profiler: {whole * scale:.1f} ms per rank, of which")
    print(f"  {'ms':>8} {'own ms':>8} {'calls':>7}  function (its callees included)")
    for cumulative, own, calls, name in sorted(rows, reverse=True)[:SHOWN]:
        print(f"  {cumulative:>8.2f} {own:>8.2f} {calls:>7.1f}  {name}")
    print("\n  Collectives of one step, rank 0:")
    sides = [ranks[0]["collectives"].get(side, Counter()) for side in ("bare", "trainer")]
    for name in sorted(sides[0] | sides[1]):
        print(f"  {name:<40} bare {sides[0][name]:>4}   trainer {sides[1][name]:>4}")
    print(flush=True)


def place(function: Function) -> str:
    """`strategies/tensor.py:31 name` for functions of lightning and lightning_llm; "" for others."""
    file, line, name = function
    for package, root in ROOTS.items():
        if Path(file).is_relative_to(root):
            return f"{package}/{Path(file).relative_to(root)}:{line} {name}"
    return ""
