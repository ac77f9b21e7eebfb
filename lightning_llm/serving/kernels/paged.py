"""Paged attention (arXiv:2309.06180) as a decoder sees it: one object per step, called by every layer.

    decoder.model(batch.token_ids[None], positions=..., attention=PagedAttention(cache, batch, kernel))

`PagedKernel` is what every kernel of this room looks like.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from lightning_llm.serving.kernels.batch import PagedBatch


class LayerCache(NamedTuple):
    """Views of what one layer keeps. The blocks lie apart, but each is contiguous.

    Attributes:
        k, v: [num_blocks, block_size, kv_heads, head_dim].
        k_scale, v_scale: [num_blocks, block_size, kv_heads] float32, what quantised keys and values are multiplied by;
            None if they are not quantised.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


class PagedCache(Protocol):
    """What `PagedAttention` needs of a KV cache."""

    def write(self, layer: int, k: Tensor, v: Tensor, batch: PagedBatch) -> None:
        """Puts k and v, [tokens, kv_heads, head_dim], into the slots of the batch."""
        ...

    def layer(self, layer: int) -> LayerCache:
        """The blocks of one layer."""
        ...


class PagedKernel(Protocol):
    """Attends from the tokens of a batch to everything before them in their own sequences, themselves included."""

    def __call__(
        self, q: Tensor, cache: LayerCache, batch: PagedBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Attends.

        Args:
            q: [tokens, heads, head_dim], any strides; heads is a multiple of kv_heads.
            cache: The layer's blocks, with the keys and values of these tokens.
            batch: Whose tokens they are, and where their sequences lie.
            scale: What q . k is multiplied by.
            sliding_window: How many tokens a token sees, itself included; None for all before it.

        Returns:
            [tokens, heads, head_dim] in q's type.
        """
        ...


class PagedAttention:
    """The `AttentionFunction` of one step: tokens of many sequences, flat, as a batch of one."""

    def __init__(self, cache: PagedCache, batch: PagedBatch, kernel: PagedKernel) -> None:
        self.cache = cache
        self.batch = batch
        self.kernel = kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, layer: int, scale: float, sliding_window: int | None
    ) -> Tensor:
        """Writes k and v, [1, kv_heads, tokens, head_dim], into the cache; then q, [1, heads, ...], attends."""
        self.cache.write(layer, k[0].transpose(0, 1), v[0].transpose(0, 1), self.batch)
        q = q[0].transpose(0, 1)
        out = self.kernel(q, self.cache.layer(layer), self.batch, scale=scale, sliding_window=sliding_window)
        return out.transpose(0, 1).unsqueeze(0)
