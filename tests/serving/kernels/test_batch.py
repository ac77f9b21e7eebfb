from __future__ import annotations

import pytest
import torch

from lightning_llm.serving.kernels.batch import PagedBatch, Piece


def test_pieces_are_laid_out_one_behind_another() -> None:
    pieces = [Piece([7, 8, 9], 2, [5, 3]), Piece([1], 0, [2, 6]), Piece((4, 4), 6, range(7, 9))]
    batch = PagedBatch.of(pieces, block_size=4)
    assert batch.token_ids.tolist() == [7, 8, 9, 1, 4, 4]
    assert batch.positions.tolist() == [2, 3, 4, 0, 6, 7]
    assert batch.slots.tolist() == [5 * 4 + 2, 5 * 4 + 3, 3 * 4, 2 * 4, 8 * 4 + 2, 8 * 4 + 3]
    assert batch.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert batch.context_lens.tolist() == [5, 1, 8]
    assert batch.block_tables.tolist() == [[5, 3], [2, 6], [7, 8]]
    assert (batch.max_query_len, batch.max_context_len) == (3, 8)
    assert batch.positions.dtype == torch.int64


def test_short_block_tables_are_filled_up_with_the_null_block() -> None:
    batch = PagedBatch.of([Piece([1], 0, [4]), Piece([1], 8, [0, 2, 3])], block_size=4)
    assert batch.block_tables.tolist() == [[4, 0, 0], [0, 2, 3]]
    assert batch.first_visible(1, None) == 0
    assert batch.first_visible(1, 3) == 6


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([], "at least one piece"),
        ([Piece([1], 0, [1]), Piece([], 0, [2])], "Piece 1 is 0 tokens"),
        ([Piece([1, 2], 7, [1, 2])], "Piece 0 is 2 tokens from position 7 with 2 blocks of 4: .* blocks for 9"),
        ([Piece([1], -1, [1])], "position -1"),
    ],
)
def test_a_piece_that_cannot_be_is_refused(pieces: list[Piece], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PagedBatch.of(pieces, block_size=4)


def test_what_is_worked_out_once_is_kept_for_the_step() -> None:
    batch = PagedBatch.of([Piece([1], 0, [1])], block_size=4)
    made = [batch.once("sum", lambda: object()) for _ in range(2)]
    assert made[0] is made[1]
    assert batch.once("other", lambda: object()) is not made[0]
