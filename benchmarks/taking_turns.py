"""What benchmarks share: sides that take turns, ratios of neighbours, and tables."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Turn:
    """One side's turn.

    Attributes:
        seconds: By the clock.
        cpu: Seconds of all threads of this process.
    """

    seconds: float
    cpu: float


def timed(act: Callable[[], Any]) -> tuple[Any, Turn]:
    """What `act` returns, and how long it took."""
    began, cpu = time.perf_counter(), time.process_time()
    result = act()
    return result, Turn(time.perf_counter() - began, time.process_time() - cpu)


def say(text: str) -> None:
    """What was just done, for whoever waits."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Smallest, middle and largest; None of nothing."""
    if not values:
        return None
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float] | None:
    """Of neighbours in time; where one side gave up, of those rounds that both were in."""
    return spread([a / b for a, b in zip(ours, theirs, strict=False)])


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table, the first column left and the others right."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    print(f"\n{title}")
    for first, *others in cells:
        right = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *right]))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Mapping):
        return " / ".join(_number(value[name]) for name in ("min", "median", "max"))
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    """Three digits that say something, and no more behind the point."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"
