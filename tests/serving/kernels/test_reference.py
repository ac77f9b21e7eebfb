from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_llm.models.attention import causal_attention
from lightning_llm.serving.kernels import reference
from lightning_llm.serving.kernels.paged import LayerCache
from lightning_llm.serving.kernels.quantized import LARGEST, dequantize, quantize
from tests.serving.kernels.cases import LAYER, Case, attend, build

SEQS = ((0, 5), (9, 1), (6, 7), (0, 1))


def contexts(case: Case, cache: LayerCache, table: list[int], end: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, [1, kv_heads, tokens, head_dim], picked from the cache token by token."""
    places = [(table[i // case.block_size], i % case.block_size) for i in range(end)]
    return tuple(torch.stack([part[b, o] for b, o in places]).transpose(0, 1)[None] for part in cache[:2])


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("group", [1, 3])
def test_each_sequence_gets_what_plain_attention_gives_it(window: int | None, group: int) -> None:
    case = Case(SEQS, group=group, sliding_window=window)
    q, cache, batch = build(case, torch.float64)
    out = attend(reference.attend, case, q, cache.layer(LAYER), batch)
    for (before, new), piece, rows, answers in zip(
        SEQS, batch.pieces, q.split([n for _, n in SEQS]), out.split([n for _, n in SEQS]), strict=True
    ):
        k, v = contexts(case, cache.layer(LAYER), list(piece.block_table), before + new)
        full = torch.cat((torch.zeros(before, *rows.shape[1:], dtype=q.dtype), rows)).transpose(0, 1)[None]
        wanted = causal_attention(full, k, v, layer=0, scale=case.head_dim**-0.5, sliding_window=window)
        torch.testing.assert_close(answers, wanted[0, :, before:].transpose(0, 1), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_error_of_eight_bits_is_bounded(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, 16, generator=generator) * torch.logspace(-12, 4, 50)[:, None, None]
    x[7] = 0
    kept, scale = quantize(x, dtype)
    assert kept.dtype == dtype
    error = (dequantize(kept, scale, torch.float64) - x).abs()
    step = scale.double().unsqueeze(-1)
    bound = step / 2 if dtype == torch.int8 else torch.maximum(x.abs().double() / 16, step / 1024)
    assert (error <= bound * (1 + 1e-6)).all()
    assert (dequantize(kept, scale, torch.float32)[7] == 0).all()
