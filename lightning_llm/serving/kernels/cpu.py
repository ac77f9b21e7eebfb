"""Paged attention on CPUs with torch's own flash attention, over keys and values gathered block by block.

Two things make it fast. Sequences with few new tokens (decoding, checking a draft) are attended to together, those of
similar length with each other. And there the query heads that share a key-value head stand as its rows: several rows
in one matrix product, where `enable_gqa` would make as many products of one row (six times slower in bfloat16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_llm.models.attention import visible
from lightning_llm.serving.kernels.batch import NULL_BLOCK, PagedBatch
from lightning_llm.serving.kernels.paged import LayerCache
from lightning_llm.serving.kernels.quantized import dequantize

FEW_QUERIES = 16
"""Pieces of up to so many tokens are batched with others of as many; longer ones fill the cores by themselves."""
CHUNK = 128
"""Queries of a long piece that are attended to at a time: bounds the mask, and skips most of what is masked out."""
SPARE_BLOCKS = 32
"""Blocks of padding that are cheaper than another call."""


@dataclass(frozen=True)
class _Group:
    """Sequences with equally many new tokens, whose contexts are padded to the longest.

    Attributes:
        rows: [seqs * queries], which tokens of the batch they are.
        blocks: [seqs * blocks], what to gather.
        unused: Gathered tokens that belong to nobody here; they are zeroed, for what another sequence left there may be
            infinite, and weight 0 does not make that 0.
        mask: [seqs, 1, rows or 1, keys], added to the scores.
    """

    queries: int
    rows: Tensor
    blocks: Tensor
    unused: Tensor
    mask: Tensor


class _Long(NamedTuple):
    """A sequence with many new tokens, begin to end of the batch: of what is gathered for it, `skip` tokens are out of
    sight, and `keys` follow."""

    begin: int
    end: int
    blocks: Tensor
    skip: int
    keys: int


@dataclass(frozen=True)
class _Plan:
    """What a step looks like to this kernel; the same for every layer with the same window.

    Attributes:
        mask: [CHUNK, keys], for the queries of a long piece and the keys up to the last of them: aligned at the end, so
            that it serves every chunk.
        gathered: Memory for keys and values, [2, blocks, block].
    """

    groups: list[_Group]
    long: list[_Long]
    mask: Tensor
    gathered: Tensor


def attend(q: Tensor, cache: LayerCache, batch: PagedBatch, *, scale: float, sliding_window: int | None) -> Tensor:
    """See `PagedKernel`."""
    kv_heads = cache.k.shape[2]
    plan = batch.once(("cpu", sliding_window), lambda: _plan(q, cache, batch, sliding_window))
    out = q.new_empty(q.shape)
    grouped = q.unflatten(1, (kv_heads, -1))
    grouped_out = out.unflatten(1, (kv_heads, -1))
    for group in plan.groups:
        k, v = _gather(cache, group.blocks, group.unused, plan.gathered, q.dtype)
        seqs = len(group.rows) // group.queries
        k, v = (x.unflatten(0, (seqs, -1)).transpose(1, 2) for x in (k, v))
        rows = grouped[group.rows].unflatten(0, (seqs, -1)).transpose(1, 2)  # [seqs, kv_heads, queries, group, dim]
        attended = _attend_rows(rows.flatten(2, 3), k, v, group.mask, scale)
        grouped_out[group.rows] = attended.unflatten(2, (group.queries, -1)).transpose(1, 2).flatten(0, 1)
    for piece in plan.long:
        k, v = _gather(cache, piece.blocks, None, plan.gathered, q.dtype)
        for begin in range(piece.begin, piece.end, CHUNK):
            end = min(begin + CHUNK, piece.end)
            last = piece.skip + piece.keys - (piece.end - end)
            first = piece.skip if sliding_window is None else max(piece.skip, last - (end - begin) - sliding_window + 1)
            keys, values = (x[first:last].transpose(0, 1).unsqueeze(0) for x in (k, v))
            attended = F.scaled_dot_product_attention(
                q[begin:end].transpose(0, 1).unsqueeze(0),
                keys,
                values,
                attn_mask=plan.mask[begin - end :, first - last :],
                scale=scale,
                enable_gqa=True,
            )
            out[begin:end] = attended.squeeze(0).transpose(0, 1)
    return out


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    rows = q.shape[2]
    # With an odd number of rows the matrix products in there are slower than with one more (torch 2.13 with AVX-512:
    # 3 rows by a quarter, a single one in bfloat16 by more than half); in float32, one row has a path of its own.
    if rows % 2 and (rows > 1 or q.dtype not in (torch.float32, torch.float64)):
        q = F.pad(q, (0, 0, 0, 1))
        mask = mask if mask.shape[2] == 1 else F.pad(mask, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[:, :, :rows]


def _gather(
    cache: LayerCache, blocks: Tensor, unused: Tensor | None, memory: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys and values of these blocks, [tokens, kv_heads, head_dim] in `dtype`."""
    gathered = []
    for values, scales, target in zip(cache[:2], cache[2:], memory, strict=True):
        target = target[: len(blocks)]
        torch.index_select(values.flatten(1), 0, blocks, out=target)
        x = target.view(-1, *values.shape[2:])
        if x.dtype != dtype:
            x = dequantize(x, None if scales is None else scales[blocks].flatten(0, 1), dtype)
        gathered.append(x if unused is None else x.index_fill_(0, unused, 0))
    return gathered[0], gathered[1]


def _plan(q: Tensor, cache: LayerCache, batch: PagedBatch, sliding_window: int | None) -> _Plan:
    size = batch.block_size
    begins = batch.cu_seqlens_q.tolist()
    firsts = [batch.first_visible(seq, sliding_window) // size for seq in range(len(batch.pieces))]
    counts = [-(-piece.end // size) - first for piece, first in zip(batch.pieces, firsts, strict=True)]

    few: dict[int, list[int]] = {}
    long = []
    for seq, piece in enumerate(batch.pieces):
        queries, first = len(piece.token_ids), firsts[seq]
        if queries <= FEW_QUERIES:
            few.setdefault(queries, []).append(seq)
        else:
            blocks = batch.block_tables[seq, first : first + counts[seq]]
            skip = batch.first_visible(seq, sliding_window) - first * size
            long.append(_Long(begins[seq], begins[seq + 1], blocks, skip, piece.end - first * size - skip))
    groups = [
        _group(q, cache, batch, sliding_window, queries, members, firsts, counts)
        for queries, seqs in few.items()
        for members in _similar(seqs, counts)
    ]

    keys = max((piece.keys for piece in long), default=0)
    if sliding_window is not None:
        keys = min(keys, CHUNK + sliding_window - 1)
    chunk = torch.arange(keys - CHUNK if long else keys, keys)
    mask = _additive(visible(chunk, torch.arange(keys), sliding_window=sliding_window), q.dtype)

    most = max([len(group.blocks) for group in groups] + [len(piece.blocks) for piece in long])
    return _Plan(groups, long, mask, torch.empty(2, most, cache.k[0].numel(), dtype=cache.k.dtype))


def _group(
    q: Tensor,
    cache: LayerCache,
    batch: PagedBatch,
    sliding_window: int | None,
    queries: int,
    seqs: list[int],
    firsts: list[int],
    counts: list[int],
) -> _Group:
    """Lays out sequences that are attended to together, from their first visible block on."""
    blocks = torch.full((len(seqs), max(counts[seq] for seq in seqs)), NULL_BLOCK)
    for row, seq in zip(blocks.numpy(), seqs, strict=True):
        row[: counts[seq]] = batch.block_tables.numpy()[seq, firsts[seq] : firsts[seq] + counts[seq]]
    members = torch.tensor(seqs)
    rows = batch.cu_seqlens_q[members].unsqueeze(1) + torch.arange(queries)
    begins = torch.tensor([firsts[seq] * batch.block_size for seq in seqs]).unsqueeze(1)
    keys = begins + torch.arange(blocks.shape[1] * batch.block_size)
    unused = keys >= batch.context_lens[members].unsqueeze(1)
    mask = _additive(visible(batch.positions[rows], keys, sliding_window=sliding_window), q.dtype).unsqueeze(1)
    if queries > 1:
        mask = mask.repeat_interleave(q.shape[1] // cache.k.shape[2], dim=2)
    return _Group(queries, rows.flatten(), blocks.flatten(), unused.flatten().nonzero().squeeze(1), mask)


def _similar(seqs: list[int], counts: list[int]) -> Iterator[list[int]]:
    """Splits sequences so that padding each to the longest of its group adds a quarter at most, or very little.

    Args:
        seqs: Which of the batch.
        counts: Blocks of every sequence of the batch.
    """
    members: list[int] = []
    longest = used = padding = 0
    for seq in sorted(seqs, key=lambda seq: -counts[seq]):
        blocks = counts[seq]
        if members and padding + longest - blocks > SPARE_BLOCKS + used // 4:
            yield sorted(members)
            members, used, padding = [], 0, 0
        if not members:
            longest = blocks
        members.append(seq)
        used += blocks
        padding += longest - blocks
    yield sorted(members)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere: made once, where torch would make it of a bool mask in every layer."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
