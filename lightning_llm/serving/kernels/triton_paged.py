"""Paged attention in one Triton kernel: decoding, prompts in chunks, sliding windows and 8-bit keys and values.

For CUDA devices where torch brings no paged kernel. Each program takes some tokens of one sequence with the query heads
that share one key-value head, walks over the sequence's blocks and keeps a running softmax (FlashAttention,
arXiv:2205.14135). It needs `triton`, which torch's CUDA builds bring along; with TRITON_INTERPRET=1 it runs on CPUs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_llm.serving.kernels.batch import PagedBatch
from lightning_llm.serving.kernels.paged import LayerCache

MANY_ROWS = 64
"""Rows (tokens times heads of a group) of a program that works on a prompt."""
FEW_ROWS = 16
"""The fewest that a tensor core multiplies, for sequences with little to compute."""
KEYS = 64
"""Keys that are looked at in one go."""


@triton.jit
def _paged_attention(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    k_scale,
    v_scale,
    out,
    work,  # [programs, 2]: sequence, first token in the batch
    positions,
    cu_seqlens_q,
    block_tables,
    scale,  # times log2(e)
    window,
    stride_q_token,
    stride_q_head,
    stride_q_dim,
    stride_out_token,
    stride_out_head,
    stride_kv_block,
    stride_kv_token,
    stride_kv_head,
    stride_scale_block,
    stride_scale_token,
    stride_scale_head,
    stride_table,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,  # HEAD_DIM, rounded up to a power of two
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = tl.load(work + 2 * program)
    first_token = tl.load(work + 2 * program + 1)
    tokens = tl.minimum(tl.load(cu_seqlens_q + seq + 1) - first_token, ROWS // GROUP)
    first_position = tl.load(positions + first_token)

    rows = tl.arange(0, ROWS)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    position = first_position + token
    dims = tl.arange(0, DIM)
    wanted = (token < tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    q_rows = (first_token + token) * stride_q_token + head * stride_q_head
    queries = tl.load(q + q_rows[:, None] + dims[None, :] * stride_q_dim, mask=wanted, other=0.0)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    answer = tl.zeros([ROWS, DIM], tl.float32)

    end = first_position + tokens
    begin = end * 0
    if WINDOWED:
        begin = tl.maximum(first_position + 1 - window, 0) // COLUMNS * COLUMNS
    for start in range(begin, end, COLUMNS):
        key = start + tl.arange(0, COLUMNS)
        exists = key < end
        block = tl.load(block_tables + seq * stride_table + key // BLOCK_SIZE, mask=exists, other=0)
        place = block * stride_kv_block + (key % BLOCK_SIZE) * stride_kv_token + kv_head * stride_kv_head
        # Loads leave out what belongs to nobody: weight 0 does not make an infinity 0.
        there = exists[:, None] & (dims < HEAD_DIM)[None, :]
        keys = tl.load(k + place[:, None] + dims[None, :], mask=there, other=0.0).to(queries.dtype)
        values = tl.load(v + place[:, None] + dims[None, :], mask=there, other=0.0).to(queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
        scale_place = block * stride_scale_block + (key % BLOCK_SIZE) * stride_scale_token + kv_head * stride_scale_head
        if QUANTIZED:
            scores *= tl.load(k_scale + scale_place, mask=exists, other=0.0)[None, :]
        seen = exists[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (position[:, None] - key[None, :] < window)
        scores = tl.where(seen, scores, float("-inf"))

        highest = tl.maximum(best, tl.max(scores, 1))
        # Rows that have seen nothing yet keep a weight of 0, not NaN.
        anchor = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - anchor[:, None])
        kept = tl.exp2(best - anchor)
        total = total * kept + tl.sum(weights, 1)
        if QUANTIZED:
            weights *= tl.load(v_scale + scale_place, mask=exists, other=0.0)[None, :]
        answer = answer * kept[:, None] + tl.dot(weights.to(queries.dtype), values, input_precision=PRECISION)
        best = highest

    answer = answer / tl.where(total == 0.0, 1.0, total)[:, None]
    out_rows = (first_token + token) * stride_out_token + head * stride_out_head
    tl.store(out + out_rows[:, None] + dims[None, :], answer.to(queries.dtype), mask=wanted)


def attend(q: Tensor, cache: LayerCache, batch: PagedBatch, *, scale: float, sliding_window: int | None) -> Tensor:
    """See `PagedKernel`. For float16, bfloat16 and float32."""
    kv_heads, head_dim = cache.k.shape[2:]
    group = q.shape[1] // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # Something to point at where there are no scales: the kernel does not read it then.
    k_scale, v_scale = (cache.k, cache.v) if cache.k_scale is None else (cache.k_scale, cache.v_scale)
    assert v_scale is not None
    for rows, work in batch.once(("triton", group), lambda: _divide(batch, group, q.device)):
        _paged_attention[(len(work), kv_heads)](
            q,
            cache.k,
            cache.v,
            k_scale,
            v_scale,
            out,
            work,
            batch.positions,
            batch.cu_seqlens_q,
            batch.block_tables,
            scale * math.log2(math.e),
            sliding_window or 0,
            *q.stride(),
            *out.stride()[:2],
            *cache.k.stride()[:3],
            *k_scale.stride()[:3],
            batch.block_tables.stride(0),
            GROUP=group,
            HEAD_DIM=head_dim,
            DIM=max(16, triton.next_power_of_2(head_dim)),
            BLOCK_SIZE=batch.block_size,
            ROWS=rows,
            COLUMNS=KEYS,
            WINDOWED=sliding_window is not None,
            QUANTIZED=cache.k_scale is not None,
            PRECISION="ieee",
        )
    return out


def _divide(batch: PagedBatch, group: int, device: torch.device) -> list[tuple[int, Tensor]]:
    """Who does what: for each launch, rows per program and [programs, 2] (sequence, first token).

    Prompts and single tokens are launched apart, so that neither works with rows made for the other.
    """
    fewest = max(FEW_ROWS, triton.next_power_of_2(group))
    launches: dict[int, list[tuple[int, int]]] = {}
    begin = 0
    for seq, piece in enumerate(batch.pieces):
        tokens = len(piece.token_ids)
        rows = fewest if tokens * group <= fewest else max(MANY_ROWS, fewest)
        programs = launches.setdefault(rows, [])
        programs.extend((seq, first) for first in range(begin, begin + tokens, rows // group))
        begin += tokens
    return [(rows, torch.tensor(programs, device=device)) for rows, programs in launches.items()]
