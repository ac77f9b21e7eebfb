"""`causal_attention` against the definition, written out with loops over what each token may see."""

import pytest
import torch

from lightning_llm.models.attention import causal_attention, visible


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


@pytest.mark.parametrize("window", [None, 1, 4])
def test_visible_is_the_definition(window):
    generator = torch.Generator().manual_seed(0)
    # As a context-parallel rank asks: some of the positions, in any order, and a document per token.
    q_positions, k_positions = torch.randperm(12, generator=generator)[:5], torch.randperm(12, generator=generator)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 7, 7]])
    q_documents, k_documents = documents[:, q_positions], documents[:, k_positions]
    seen = visible(q_positions, k_positions, q_documents, k_documents, window)
    assert seen.shape == (2, 5, 12)
    for batch in range(2):
        for i, q in enumerate(q_positions.tolist()):
            for j, k in enumerate(k_positions.tolist()):
                expected = k <= q and (window is None or q - k < window) and documents[batch, q] == documents[batch, k]
                assert seen[batch, i, j] == expected
    assert torch.equal(visible(q_positions, k_positions), q_positions[:, None] >= k_positions)


@pytest.mark.parametrize("window", [None, 3])
def test_documents_attend_to_themselves_only(window):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 9, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, 9, 8, generator=generator, dtype=torch.float64)
    documents = torch.tensor([[0] * 4 + [1] * 5, [3] * 9])
    options = {"layer": 0, "scale": 0.3, "sliding_window": window}
    out = causal_attention(q, k, v, document_ids=documents, **options)
    for batch, start, end in ((0, 0, 4), (0, 4, 9), (1, 0, 9)):
        part = (slice(batch, batch + 1), slice(None), slice(start, end))
        torch.testing.assert_close(out[part], causal_attention(q[part], k[part], v[part], **options))
