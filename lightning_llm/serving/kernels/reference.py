"""Paged attention written down as it is defined: sequence by sequence, in at least float32.

Runs everywhere and with everything; what the other kernels are tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_llm.models.attention import visible
from lightning_llm.serving.kernels.batch import PagedBatch
from lightning_llm.serving.kernels.paged import LayerCache
from lightning_llm.serving.kernels.quantized import dequantize


def attend(q: Tensor, cache: LayerCache, batch: PagedBatch, *, scale: float, sliding_window: int | None) -> Tensor:
    """See `PagedKernel`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape)
    begin = 0
    for seq, piece in enumerate(batch.pieces):
        end = begin + len(piece.token_ids)
        first = batch.first_visible(seq, sliding_window)
        keys = torch.arange(first, piece.end, device=q.device)
        blocks, offsets = batch.block_tables[seq, keys // batch.block_size], keys % batch.block_size
        k, v = (
            dequantize(values[blocks, offsets], None if scales is None else scales[blocks, offsets], dtype)
            for values, scales in ((cache.k, cache.k_scale), (cache.v, cache.v_scale))
        )
        grouped = q[begin:end].to(dtype).unflatten(1, (k.shape[1], -1))
        scores = torch.einsum("qhgd,khd->hgqk", grouped, k) * scale
        mask = visible(batch.positions[begin:end], keys, sliding_window=sliding_window)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hgqk,khd->qhgd", weights, v).flatten(1, 2).to(q.dtype)
        begin = end
    return out
