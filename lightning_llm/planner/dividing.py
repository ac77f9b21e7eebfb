"""Dividing things up in whole numbers: ranks, batches, layers. Strategies cut by it, the planner counts by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def even_counts(num_units: int, num_stages: int) -> list[int]:
    """Numbers of units that differ by at most one; the outer stages, which have other modules too, get the smaller."""
    small, longer = divmod(num_units, num_stages)
    by_load = sorted(range(num_stages), key=lambda stage: (stage == num_stages - 1, stage == 0))
    return [small + (by_load.index(stage) < longer) for stage in range(num_stages)]


def balanced_counts(costs: Sequence[int], num_stages: int) -> list[int]:
    """Numbers of units, at least one a stage, such that the largest stage costs as little as can be.

    Dynamic programming over (stages, units); among cuts that are equal by their largest stage so far, the one with the
    smaller sum of squares is kept, which evens out the others.
    """
    total = [0, *accumulate(costs)]
    # best[end]: (largest stage, sum of squares, counts) of the units before `end`, cut into the stages so far
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for stage in range(num_stages):
        last_end = len(costs) - (num_stages - 1 - stage)
        candidates: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (largest, squares, counts) in best.items():
            for end in range(start + 1, last_end + 1):
                cost = total[end] - total[start]
                found = (max(largest, cost), squares + cost**2, (*counts, end - start))
                if end not in candidates or found[:2] < candidates[end][:2]:
                    candidates[end] = found
        best = candidates
    return list(best[len(costs)][2])
