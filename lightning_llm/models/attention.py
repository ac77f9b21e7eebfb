"""The attention that a decoder uses unless it is handed another one: torch's scaled dot product, causal.

`AttentionFunction` is what every replacement looks like: context-parallel rings, a KV cache, a paged engine.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionFunction(Protocol):
    """What `Decoder.forward(attention=...)` takes."""

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


def window_mask(queries: int, keys: int, sliding_window: int | None, *, device: torch.device) -> Tensor:
    """Which key each query may see, bool [queries, keys]; the last query stands at the last key."""
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, sliding_window: int | None
) -> Tensor:
    """Causal attention over the sequence at hand (see `AttentionFunction`), with torch's fastest kernel for it."""
    grouped = q.shape[1] != k.shape[1]
    seq = q.shape[2]
    if sliding_window is None or seq <= sliding_window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    mask = window_mask(seq, seq, sliding_window, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
