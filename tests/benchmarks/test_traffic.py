"""What benchmarks/axes.py says of bytes: the counting against known sums and two witnesses, layouts against theory."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from axes import LAYOUTS
from layout_traffic import TrafficCase, gloo_factor, run_layout, summarize_traffic
from traffic import count_traffic, profile_calls, socket_bytes

from lightning_llm import DecoderConfig
from tests.distributed import run_distributed

RANKS = 3
ELEMENTS = 30_000  # float32
WHOLE = 4 * ELEMENTS
OVERHEAD = 1024  # bytes of gloo's own that a call may cost a rank: headers, and the receivers' answers


# -- the counting --


def one_of_each() -> None:
    """Collectives by the ways in which they are called in a training step."""
    rank, group = dist.get_rank(), dist.group.WORLD
    x = torch.ones(ELEMENTS)
    dist.all_reduce(x)
    dist.all_reduce(x, async_op=True).wait()
    functional.all_reduce(x.requires_grad_(), "sum", group).sum().backward()  # two: there and back
    x = x.detach()
    dist.all_gather_into_tensor(x.new_empty(RANKS * ELEMENTS), x)
    dist.all_gather([torch.empty_like(x) for _ in range(RANKS)], x)
    dist.reduce_scatter_tensor(x.new_empty(ELEMENTS // RANKS), x)
    functional.reduce_scatter_tensor(x, "sum", 0, group).sum()
    dist.all_to_all_single(torch.empty_like(x), x)
    uneven = [10_000 if other == rank else 5_000 for other in range(RANKS)]
    dist.all_to_all_single(x.new_empty(20_000), x[:20_000], uneven, uneven)
    dist.broadcast(x, src=1)
    operations = [
        dist.P2POp(dist.isend, x, (rank + 1) % RANKS),
        dist.P2POp(dist.irecv, torch.empty_like(x), (rank - 1) % RANKS),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


def count_one_of_each() -> dict[str, Any]:
    one_of_each()  # connects every pair
    dist.barrier()
    before = socket_bytes() if sys.platform == "linux" else 0
    with profile_calls() as profiled, count_traffic() as calls:
        one_of_each()
        dist.barrier()  # all has arrived
    after = socket_bytes() if sys.platform == "linux" else 0
    outside = len(calls)
    dist.all_reduce(torch.ones(1))
    assert len(calls) == outside, "counted after the end"
    return {"calls": calls, "profiled": profiled, "socket_bytes": after - before}


@pytest.fixture(scope="module")
def counted() -> list[dict[str, Any]]:
    return run_distributed(count_one_of_each, RANKS)


def test_counts_every_way_to_call_a_collective(counted: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(counted):
        sent = Counter[str]()
        for call in result["calls"]:
            sent[call.kind] += call.sent
        assert sent == {
            "all_reduce": pytest.approx(4 * 2 * 2 / 3 * WHOLE),
            "all_gather": 2 * 2 * WHOLE,
            "reduce_scatter": pytest.approx(2 * 2 / 3 * WHOLE),
            "all_to_all": pytest.approx(2 / 3 * WHOLE + 4 * 10_000),
            "broadcast": 2 * WHOLE if rank == 1 else 0,
            "send": WHOLE,
            "receive": 0,
            "barrier": 0,
        }


def test_the_profiler_sees_the_same_calls(counted: list[dict[str, Any]]) -> None:
    for result in counted:
        assert Counter(call.kind for call in result["calls"]) == result["profiled"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's count is Linux's")
def test_the_sockets_carry_what_is_counted(counted: list[dict[str, Any]]) -> None:
    for result in counted:
        expected = sum(gloo_factor(call) * call.sent for call in result["calls"])
        assert expected <= result["socket_bytes"] <= expected + OVERHEAD * len(result["calls"])


# -- the layouts --

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DENSE = DecoderConfig(**SIZES)
EXPERTS = DecoderConfig(**SIZES, qk_norm=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
BOOKKEEPING = 512  # bytes per rank: the count of tokens, the logged loss, the gradient norm, Lightning's signal flag;
# with experts what their routers report, and how many tokens go where
FAST = ("dp2 zero3", "dp2 zero1", "dp2 zero0", "tp2", "pp2", "cp2 allgather", "cp2 ring", "dp2 ep2")


LARGER = [name for name, _, _ in LAYOUTS if name not in FAST]


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_a_layout_sends_what_it_must(name: str) -> None:
    ranks, settings = next((ranks, settings) for other, ranks, settings in LAYOUTS if other == name)
    config = EXPERTS if "expert_parallel_size" in settings else DENSE
    case = TrafficCase(name=name, ranks=ranks, settings=settings, config=config, batch_size=8, seq_len=32)
    row = summarize_traffic(case, run_distributed(run_layout, ranks, case))
    for part in row["rows"]:
        assert -0.01 <= part["sent"] - part["least"] <= BOOKKEEPING, part
    if sys.platform == "linux":
        calls = sum(part["calls"] for part in row["rows"])
        assert abs(row["on_sockets"] - row["on_sockets_expected"]) <= OVERHEAD * calls
