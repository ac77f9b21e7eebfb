"""Compiled blocks train as eager ones do. Slow: a compiler runs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.distributed import run_distributed
from tests.strategies.training import SMALL, train

PP2 = {"pipeline_parallel_size": 2}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("world_size", "strategy"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, {"tensor_parallel_size": 2, "recompute": 0.5}, id="tp2, memory budget"),
        pytest.param(4, {"tensor_parallel_size": 2, **PP2}, id="pp2 x tp2"),
        pytest.param(
            2,
            {**PP2, "pipeline_schedule": "Interleaved1F1B", "recompute": "full"},
            id="pp2 Interleaved1F1B, recomputed",
        ),
    ],
)
def test_compiled_blocks_give_the_same_curve(world_size: int, strategy: dict[str, Any]) -> None:
    run = functools.partial(train, max_steps=4)
    expected = run_distributed(run, 1, 1, {}, SMALL)[0]["losses"]
    for seen in run_distributed(run, world_size, world_size, {"compile": True, **strategy}, SMALL, timeout=500):
        assert seen["losses"] == pytest.approx(expected, abs=1e-4)
