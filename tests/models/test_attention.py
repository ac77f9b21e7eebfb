"""`causal_attention` against the definition, written out with loops over what each token may see."""

import pytest
import torch

from lightning_llm.models.attention import causal_attention, window_mask


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 50])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("seq", [1, 5, 6])
def test_equals_the_definition(window, kv_heads, seq):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, seq, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, seq, 8, generator=generator, dtype=torch.float64)
    out = causal_attention(q, k, v, layer=0, scale=0.3, sliding_window=window)
    assert out.shape == q.shape
    for head in range(4):
        shared = head // (4 // kv_heads)
        for i in range(seq):
            seen = slice(0 if window is None else max(0, i + 1 - window), i + 1)
            scores = torch.einsum("bd,bkd->bk", q[:, head, i], k[:, shared, seen]) * 0.3
            expected = torch.einsum("bk,bkd->bd", scores.softmax(-1), v[:, shared, seen])
            torch.testing.assert_close(out[:, head, i], expected)


def test_window_mask_of_late_queries_is_the_bottom_of_the_square():
    square = window_mask(9, 9, 4, device=torch.device("cpu"))
    assert torch.equal(window_mask(3, 9, 4, device=torch.device("cpu")), square[-3:])
    assert square.sum(1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4]
