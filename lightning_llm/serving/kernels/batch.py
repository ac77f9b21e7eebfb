"""`PagedBatch`: the tokens of one engine step, of many requests at once, and where their keys and values lie.

Built by the runner from one `Piece` per request; read by the KV cache and by every attention kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

NULL_BLOCK = 0
"""The block that is nobody's and never read: it fills block tables where a sequence has no block (any more)."""


class Piece(NamedTuple):
    """One request's share of a step: a chunk of its prompt, one token, or a token and its draft.

    Attributes:
        token_ids: The tokens to compute, at least one.
        start: The position of the first of them. Those before it are in the cache; afterwards these are too.
        block_table: The cache blocks of the sequence, in order, for all `start + len(token_ids)` tokens; `NULL_BLOCK`
            for blocks that have left the sliding window of every layer.
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]

    @property
    def end(self) -> int:
        """How many tokens of the sequence are in the cache after the step."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, eq=False)
class PagedBatch:
    """The pieces of a step, one behind another. All tensors are int64 and on one device.

    Attributes:
        pieces: What it was made of: the same numbers where the host can read them without waiting for the device.
        block_size: Tokens per cache block.
        token_ids: [tokens].
        positions: [tokens], of each token in its own sequence.
        slots: [tokens], where its key and value go: block * block_size + offset.
        cu_seqlens_q: [seqs + 1], where each piece begins among the tokens.
        context_lens: [seqs], tokens of each sequence that are in the cache after the step.
        block_tables: [seqs, max_blocks], filled up with `NULL_BLOCK`.
        max_query_len: Tokens of the longest piece.
        max_context_len: The largest of `context_lens`.
    """

    pieces: tuple[Piece, ...]
    block_size: int
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_context_len: int
    _memo: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, pieces: Sequence[Piece], *, block_size: int, device: torch.device | str = "cpu") -> PagedBatch:
        """Lays the pieces out; everything reaches the device in one copy.

        Raises:
            ValueError: There is no piece, one has no tokens, or its block table is too short for its tokens.
        """
        if not pieces:
            raise ValueError("A batch needs at least one piece.")
        lengths = np.array([len(piece.token_ids) for piece in pieces])
        starts = np.array([piece.start for piece in pieces])
        blocks = np.array([len(piece.block_table) for piece in pieces])
        ends = starts + lengths
        for seq in np.flatnonzero((lengths < 1) | (starts < 0) | (blocks * block_size < ends)):
            raise ValueError(
                f"Piece {seq} is {lengths[seq]} tokens from position {starts[seq]} with {blocks[seq]} blocks of "
                f"{block_size}: it needs at least 1 token and blocks for {ends[seq]}."
            )
        seqs, tokens, max_blocks = len(pieces), int(lengths.sum()), int(blocks.max())

        sizes = (tokens, tokens, tokens, seqs + 1, seqs, seqs * max_blocks)
        buffer = np.zeros(sum(sizes), dtype=np.int64)
        token_ids, positions, slots, cu_seqlens, context_lens, tables = np.split(buffer, np.cumsum(sizes)[:-1])
        tables = tables.reshape(seqs, max_blocks)
        for row, piece in zip(tables, pieces, strict=True):
            row[: len(piece.block_table)] = piece.block_table
        token_ids[:] = np.fromiter(chain.from_iterable(piece.token_ids for piece in pieces), np.int64, tokens)
        np.cumsum(lengths, out=cu_seqlens[1:])
        context_lens[:] = ends
        positions[:] = np.arange(tokens) + np.repeat(starts - cu_seqlens[:-1], lengths)
        owner = np.repeat(np.arange(seqs), lengths)
        slots[:] = tables[owner, positions // block_size] * block_size + positions % block_size

        flat = torch.from_numpy(buffer)
        if torch.device(device).type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.split(sizes)
        return cls(
            pieces=tuple(pieces),
            block_size=block_size,
            token_ids=parts[0],
            positions=parts[1],
            slots=parts[2],
            cu_seqlens_q=parts[3],
            context_lens=parts[4],
            block_tables=parts[5].view(seqs, max_blocks),
            max_query_len=int(lengths.max()),
            max_context_len=int(ends.max()),
        )

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a kernel needs in every layer and works out in the first: `make()`, kept under `key` for this step."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def first_visible(self, seq: int, sliding_window: int | None) -> int:
        """The oldest position that any token of a piece sees."""
        return 0 if sliding_window is None else max(0, self.pieces[seq].start + 1 - sliding_window)
