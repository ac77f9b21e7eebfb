"""The attention that a decoder uses unless it is handed another one: torch's scaled dot product, causal.

`AttentionFunction` is what every replacement looks like: context-parallel rings, a KV cache, a paged engine. `visible`
says who sees whom, once for all of them.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionFunction(Protocol):
    """What `Decoder.forward(attention=...)` takes.

    Where the decoder is given `document_ids`, it hands them on as another keyword, [batch, seq]; an attention that has
    no such argument serves sequences of one document only.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Attends.

        Args:
            q: [batch, heads, seq, head_dim], already rotated.
            k, v: [batch, kv_heads, seq, head_dim]; heads is a multiple of kv_heads.
            layer: index of the layer in the whole model.
            scale: what q . k is multiplied by.
            sliding_window: how many tokens a token sees, itself included; None for all before it.

        Returns:
            [batch, heads, seq, head_dim]
        """
        ...


def visible(
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor | None = None,
    k_documents: Tensor | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Which keys each query sees: those up to its own position, in its window and its document.

    Args:
        q_positions, k_positions: [..., queries] and [..., keys], where they stand in the sequence; any order.
        q_documents, k_documents: [..., queries] and [..., keys], ids of the documents that they belong to; None: one.
        sliding_window: how many tokens a token sees, itself included; None for all before it.

    Returns:
        bool [..., queries, keys], the leading dims broadcast.
    """
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)
    seen = distance >= 0
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    if q_documents is not None and k_documents is not None:
        seen = seen & (q_documents.unsqueeze(-1) == k_documents.unsqueeze(-2))
    return seen


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layer: int,
    scale: float,
    sliding_window: int | None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Causal attention over the sequence at hand (see `AttentionFunction`), with torch's fastest kernel for it."""
    grouped = q.shape[1] != k.shape[1]
    seq = q.shape[2]
    if document_ids is None and (sliding_window is None or seq <= sliding_window):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    positions = torch.arange(seq, device=q.device)
    mask = visible(positions, positions, document_ids, document_ids, sliding_window)
    if document_ids is not None:
        mask = mask.unsqueeze(1)  # the same for all heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
