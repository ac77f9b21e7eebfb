"""Attention over a cut sequence is attention over the whole one, whatever the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.attention import visible
from lightning_llm.strategies.context import (
    CONTEXT_METHODS,
    ContextMethod,
    ContextParallel,
    check_context,
    check_ulysses,
    natural_order,
    zigzag_positions,
)
from tests.distributed import run_distributed

SIZES = st.integers(1, 8)


@settings(deadline=None)
@given(size=SIZES, chunk=st.integers(1, 5))
def test_the_shares_are_the_sequence_and_cost_the_same(size: int, chunk: int) -> None:
    seq_len = 2 * size * chunk
    shares = [zigzag_positions(seq_len, size, rank) for rank in range(size)]
    together = torch.cat(shares)
    assert together.sort().values.tolist() == list(range(seq_len))
    assert together[natural_order(seq_len, size)].tolist() == list(range(seq_len))
    assert len({int((share + 1).sum()) for share in shares}) == 1, "equal shares of the causal triangle"


def whole_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    positions = torch.arange(q.shape[2])
    mask = visible(positions, positions, documents, documents, window)
    mask = mask if documents is None else mask.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)


def attend_both_ways(
    method: ContextMethod, heads: int, kv_heads: int, window: int | None, with_documents: bool
) -> dict[str, float]:
    """Largest differences of output and gradients between this rank's share and the whole."""
    generator = torch.Generator().manual_seed(5)
    context = ContextParallel(init_device_mesh("cpu", (dist.get_world_size(),)), method)
    seq_len = 24
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    whole = {
        name: torch.randn(3, count, seq_len, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for name, count in shapes.items()
    }
    documents = torch.randint(0, 2, (3, seq_len), generator=generator).cumsum(1) if with_documents else None
    expected = whole_attention(**whole, window=window, documents=documents)
    weights = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    (expected * weights).sum().backward()

    mine = zigzag_positions(seq_len, context.size, context.rank)
    share = {name: x.detach()[:, :, mine].requires_grad_() for name, x in whole.items()}
    keywords = {"document_ids": documents[:, mine]} if documents is not None else {}
    out = context.attention(**share, layer=0, scale=0.3, sliding_window=window, **keywords)
    (out * weights[:, :, mine]).sum().backward()

    errors = {"out": float((out - expected[:, :, mine]).abs().max())}
    for name in shapes:
        gradient, reference = share[name].grad, whole[name].grad
        assert gradient is not None and reference is not None
        errors[name] = float((gradient - reference[:, :, mine]).abs().max())
    return errors


CASES: list[tuple[ContextMethod, int, int, int, int | None, bool]] = [
    # method, ranks, heads, key-value heads, sliding window, documents
    *((method, 2, 4, 2, None, False) for method in ("allgather", "ulysses", "ring")),
    *((method, 4, 4, 2, None, False) for method in ("allgather", "ulysses", "ring")),
    ("ring", 3, 2, 1, None, False),
    ("allgather", 3, 2, 1, 5, False),
    ("allgather", 2, 2, 2, None, True),
    ("allgather", 2, 2, 2, 7, True),
    ("ulysses", 2, 2, 2, 5, False),
    ("ulysses", 2, 4, 1, None, True),
    ("ulysses", 2, 2, 2, 7, True),
]


@pytest.mark.parametrize(("method", "ranks", "heads", "kv_heads", "window", "documents"), CASES)
def test_output_and_gradients_are_those_of_the_whole_sequence(
    method: ContextMethod, ranks: int, heads: int, kv_heads: int, window: int | None, documents: bool
) -> None:
    for errors in run_distributed(attend_both_ways, ranks, method, heads, kv_heads, window, documents):
        assert max(errors.values()) < 1e-12, errors


def refused_by_the_ring() -> list[str]:
    context = ContextParallel(init_device_mesh("cpu", (dist.get_world_size(),)), "ring")
    q = torch.randn(1, 2, 4, 4)
    messages = []
    for keywords in ({"sliding_window": 3}, {"sliding_window": None, "document_ids": torch.zeros(1, 4)}):
        with pytest.raises(ConfigurationError) as refusal:
            context.attention(q, q, q, layer=0, scale=1.0, **keywords)
        messages.append(str(refusal.value))
    return messages


def test_the_ring_says_what_to_use_for_masks() -> None:
    for messages in run_distributed(refused_by_the_ring, 2):
        assert all("'allgather' or 'ulysses'" in message for message in messages)


def shards(batch: dict[str, Any]) -> dict[str, Any]:
    context = ContextParallel(init_device_mesh("cpu", (dist.get_world_size(),)), "allgather")
    cut = context.shard_batch(batch)
    return {**cut, "whole": context.gather_sequence(cut["input_ids"]), "positions": context.positions}


def test_everything_along_the_sequence_is_cut_together() -> None:
    tokens = torch.arange(16).view(2, 8)
    batch = {
        "input_ids": tokens,
        "labels": tokens + 1,
        "document_ids": tokens // 3,
        "weight": torch.ones(2),
        "name": "x",
    }
    for rank, cut in enumerate(run_distributed(shards, 2, batch)):
        mine = [0, 1, 6, 7] if rank == 0 else [2, 3, 4, 5]
        assert cut["positions"].tolist() == mine
        for name in ("input_ids", "labels", "document_ids"):
            assert torch.equal(cut[name], batch[name][:, mine])
        assert torch.equal(cut["whole"], tokens)
        assert cut["name"] == "x" and torch.equal(cut["weight"], torch.ones(2))


@settings(deadline=None)
@given(seq_len=st.integers(1, 300), context=SIZES, tensor=st.integers(1, 4))
def test_a_length_is_taken_or_the_nearest_one_named(seq_len: int, context: int, tensor: int) -> None:
    try:
        check_context(seq_len, context, tensor)
        assert seq_len % (2 * context * tensor) == 0
    except ConfigurationError as error:
        nearest = int(str(error).rstrip(".").rpartition(" ")[2])
        check_context(nearest, context, tensor)
        assert abs(nearest - seq_len) <= context * tensor or nearest == 2 * context * tensor


@settings(deadline=None)
@given(heads=st.integers(1, 16), groups=st.integers(1, 4), size=SIZES)
def test_ulysses_names_sizes_that_work(heads: int, groups: int, size: int) -> None:
    try:
        check_ulysses(heads * groups, heads, size)
    except ConfigurationError as error:
        for advised in str(error).partition("Use one of [")[2].partition("]")[0].split(", "):
            check_ulysses(heads * groups, heads, int(advised))


def test_methods_are_complete() -> None:
    assert set(CONTEXT_METHODS) == {case[0] for case in CASES}
