"""What ranks compare before the first step: batches of any kind, and only those that must be equal."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.checks import check_data, check_schedule, compare_batches
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims
from tests.distributed import run_distributed

DIMS = ParallelDims.resolve(4, tensor_parallel_size=2)
WARNED = "All data ranks were handed the same batch"


def compare(kind: str) -> str:
    rank, part = dist.get_rank(), DIMS.data_rank(dist.get_rank())
    batches: dict[str, Any] = {
        "by data rank": torch.tensor([part]),
        "by world rank": torch.tensor([rank]),
        "all equal": torch.tensor([1]),
        "nested, of many types": {
            "a": [torch.full((2, 3), part, dtype=dtype) for dtype in (torch.bfloat16, torch.bool, torch.float16)],
            "b": (torch.zeros(0), torch.tensor(part), torch.arange(6).view(2, 3).T + part, "text", None),
        },
        "another element deep inside": {"a": [torch.zeros(3), torch.zeros(5).index_fill(0, torch.tensor(4), rank)]},
        "no tensors": ["a", "b"],
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            compare_batches(batches[kind], DIMS)
        except ConfigurationError as error:
            return str(error)
    return "warned" if any(WARNED in str(warning.message) for warning in said) else "fine"


def compare_all(kinds: list[str]) -> dict[str, str]:
    return {kind: compare(kind) for kind in kinds}


def test_peers_must_have_one_batch_and_data_ranks_different_ones() -> None:
    fine, refused = (
        ["by data rank", "nested, of many types", "no tensors"],
        ["by world rank", "another element deep inside"],
    )
    results = run_distributed(compare_all, 4, [*fine, *refused, "all equal"])
    for seen in results:
        assert [seen[kind] for kind in fine] == ["fine"] * 3
        for kind in refused:
            assert seen[kind].startswith("Ranks 0 and 1 work on the same samples (data coordinate 0)")
        assert seen["all equal"] == "warned"


class Data:
    """What a data module may offer."""

    batch_size = 8
    seq_len = 33


@pytest.mark.parametrize(
    ("sizes", "accumulate", "microbatches", "message"),
    [
        (
            {"tensor_parallel_size": 2},
            1,
            "auto",
            r"sequence length\(33\) is not divisible by tensor_parallel_size\(2\)",
        ),
        ({"pipeline_parallel_size": 4}, 8, "auto", r"gets 1 sequences per batch, fewer than the 4 pipeline stages"),
        ({"pipeline_parallel_size": 2}, 1, 3, r"microbatches\(3\) must divide the 4 sequences .* from \[2, 4\]"),
        ({"pipeline_parallel_size": 2}, 16, "auto", r"gets 0 sequences per batch, fewer than the 2 pipeline stages"),
    ],
)
def test_data_that_cannot_be_shared_out_is_refused(
    sizes: dict[str, int], accumulate: int, microbatches: int | str, message: str
) -> None:
    dims = ParallelDims.resolve(8 if "tensor_parallel_size" in sizes else 4, **sizes)
    with pytest.raises(ConfigurationError, match=message):
        check_data(Data(), dims, Layout(microbatches=microbatches), accumulate=accumulate)


def test_v_shaped_schedules_need_a_torch_that_sends_nothing_to_itself() -> None:
    dims = ParallelDims(world_size=2, pipeline_parallel_size=2)
    v, loop = Layout(pipeline_schedule="ZBVZeroBubble"), Layout(pipeline_schedule="Interleaved1F1B")
    with pytest.raises(
        ConfigurationError, match="'ZBVZeroBubble' runs on gloo from torch 2.12 on, and this is torch 2.11"
    ):
        check_schedule(dims, v, "gloo", "2.11.0")
    check_schedule(dims, v, "nccl", "2.11.0")
    check_schedule(dims, loop, "gloo", "2.11.0")
    check_schedule(dims, v, "gloo", "2.13.0")
    check_schedule(ParallelDims(world_size=2, data_parallel_size=2), v, "gloo", "2.11.0")
