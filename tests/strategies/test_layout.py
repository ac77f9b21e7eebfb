"""Settings that exclude each other are refused where they are made, with what works instead."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm import LLM3DStrategy
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.recompute import check_recompute


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_stage": 4}, r"zero_stage=4 must be 0, 1, 2 or 3"),
        ({"microbatches": 0}, r"microbatches=0 must be a whole number of at least 1, or 'auto'"),
        ({"context_parallel_method": "star"}, r"'star' must be one of allgather, ulysses, ring"),
        ({"recompute": "some"}, r"recompute='some' must be 'none', 'selective', 'full', a whole number"),
        ({"recompute": 0.5}, r"a memory budget, which torch's compiler keeps: set compile to true"),
        ({"offload_parameters": "nvme"}, r"must be 'cpu' or None"),
        ({"offload_optimizer": "cpu"}, r"Set offload_parameters to 'cpu', which offloads both"),
        ({"pipeline_schedule": "2F2B"}, r"no pipeline schedule '2F2B'.*GPipe, 1F1B, Interleaved1F1B"),
        ({"pipeline_schedule": "1F1B", "pipeline_stages_per_rank": 2}, r"one stage on each rank.*Set it to 1"),
        ({"pipeline_schedule": "DualPipeV", "pipeline_stages_per_rank": 3}, r"exactly 2 on each rank"),
        ({"pipeline_schedule": "ZBVZeroBubble", "compile": True}, r"compiled blocks do not offer.*Interleaved1F1B"),
        ({"pipeline_schedule": "DualPipeV", "recompute": "selective"}, r"goes backward twice.*'full' or 'none'"),
    ],
)
def test_impossible_settings_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LLM3DStrategy(**settings)


def test_what_is_legal_but_slow_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="InterleavedZeroBubble.*is slow"):
        Layout(pipeline_schedule="InterleavedZeroBubble", recompute="full")


@given(st.integers(1, 100))
def test_every_nth_block_is_any_whole_number(every: int) -> None:
    check_recompute(every, compile=False)
    with pytest.raises(ConfigurationError):
        check_recompute(-every, compile=False)


def test_experts_fold_over_ranks_that_are_there() -> None:
    with pytest.raises(ConfigurationError, match=r"expert_parallel_size\(3\) does not divide shard\(2\).*\[1, 2, 4\]"):
        ParallelDims.resolve(4, tensor_parallel_size=2, expert_parallel_size=3)
