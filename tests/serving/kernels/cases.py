"""Batches with caches filled at random, for every kernel to be measured against the reference on."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lightning_llm import DecoderConfig
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.kernels import reference
from lightning_llm.serving.kernels.batch import PagedBatch, Piece
from lightning_llm.serving.kernels.paged import LayerCache, PagedKernel

LAYER = 1  # of 2: a layer that does not begin where the cache begins


@dataclass(frozen=True)
class Case:
    """Sequences of (tokens before, new tokens), and the sizes of a model."""

    seqs: tuple[tuple[int, int], ...]
    block_size: int = 4
    kv_heads: int = 2
    group: int = 3
    head_dim: int = 8
    sliding_window: int | None = None
    kv_dtype: str = "auto"
    seed: int = 0


cases = st.builds(
    Case,
    seqs=st.lists(st.tuples(st.integers(0, 50), st.one_of(st.just(1), st.integers(1, 24))), min_size=1, max_size=6).map(
        tuple
    ),
    block_size=st.sampled_from([1, 3, 4, 16]),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8, 10]),
    sliding_window=st.one_of(st.none(), st.integers(1, 30)),
    kv_dtype=st.sampled_from(["auto", "auto", "int8", "fp8"]),
    seed=st.integers(0, 99),
)


def build(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, KVCache, PagedBatch]:
    """q, a cache that holds the sequences in shuffled blocks, and the batch. Slots of nobody hold NaN."""
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=case.kv_heads * case.group,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
    )
    rng, generator = random.Random(case.seed), torch.Generator().manual_seed(case.seed)
    counts = [-(-(before + new) // case.block_size) for before, new in case.seqs]
    cache = KVCache(
        config, 2 + sum(counts), block_size=case.block_size, dtype=dtype, device=device, kv_dtype=case.kv_dtype
    )
    with torch.inference_mode():
        for part in (cache.data, cache.scales):
            if part is not None and part.dtype != torch.int8:
                part.fill_(torch.nan)
    free = rng.sample(range(1, cache.num_blocks), cache.num_blocks - 1)
    tables = [[free.pop() for _ in range(count)] for count in counts]

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, case.head_dim, generator=generator, dtype=torch.float64).to(device, dtype)

    def batch_of(pieces: list[Piece]) -> PagedBatch:
        return PagedBatch.of(pieces, block_size=case.block_size, device=device)

    whole = batch_of([Piece([0] * (b + n), 0, table) for (b, n), table in zip(case.seqs, tables, strict=True)])
    tokens = len(whole.token_ids)
    cache.write(LAYER, normal(tokens, case.kv_heads), normal(tokens, case.kv_heads), whole)
    batch = batch_of([Piece([0] * n, b, table) for (b, n), table in zip(case.seqs, tables, strict=True)])
    return normal(len(batch.token_ids), case.kv_heads * case.group), cache, batch


def attend(kernel: PagedKernel, case: Case, q: Tensor, cache: LayerCache, batch: PagedBatch) -> Tensor:
    # As the decoder hands it over: heads before tokens in memory.
    q = q.transpose(0, 1).contiguous().transpose(0, 1)
    return kernel(q, cache, batch, scale=case.head_dim**-0.5, sliding_window=case.sliding_window)


def check(kernel: PagedKernel, case: Case, dtype: torch.dtype, *, device: str = "cpu", **tolerance: Any) -> None:
    """The kernel gives what the reference gives on the same cache."""
    q, cache, batch = build(case, dtype, device)
    layer = cache.layer(LAYER)
    expected = attend(reference.attend, case, q, layer, batch)
    assert expected.isfinite().all()
    torch.testing.assert_close(attend(kernel, case, q, layer, batch), expected, **tolerance)
