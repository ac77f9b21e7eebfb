"""Paged attention by FlashAttention 3 or 4, through `torch.nn.attention.varlen`.

torch passes a block table on to an implementation that is installed beside it and activated; its own FlashAttention 2
does not take one. Read in torch 2.13: `varlen.py`, `_fa3.py` and `_fa4.py` in `torch/nn/attention`.
"""

from __future__ import annotations

import importlib.util
import inspect

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl
from torch.nn.attention.varlen import varlen_attn

from lightning_llm.serving.kernels.batch import PagedBatch
from lightning_llm.serving.kernels.paged import LayerCache

IMPLEMENTATIONS = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute.interface")}
"""Major compute capability -> what torch calls the implementation with paged attention, and the module it is in."""


def missing(device: torch.device) -> str | None:
    """Why this kernel does not run on a CUDA device, as the end of a sentence; None if it does."""
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"needs a torch whose varlen_attn takes a block_table; this is {torch.__version__}"
    major, _ = torch.cuda.get_device_capability(device)
    if major not in IMPLEMENTATIONS:
        return f"needs compute capability 9 or 10, not {major}"
    name, module = IMPLEMENTATIONS[major]
    return None if current_flash_attention_impl() == name or _installed(module) else f"needs {name} ({module})"


def activate(device: torch.device) -> None:
    """Makes torch use the implementation, from now on and for every flash attention of this process."""
    name, _ = IMPLEMENTATIONS[torch.cuda.get_device_capability(device)[0]]
    if current_flash_attention_impl() != name:
        activate_flash_attention_impl(name)


def attend(q: Tensor, cache: LayerCache, batch: PagedBatch, *, scale: float, sliding_window: int | None) -> Tensor:
    """See `PagedKernel`. For float16 and bfloat16, unquantised."""
    cu_seqlens_q, context_lens, block_tables = batch.once(
        "varlen", lambda: (batch.cu_seqlens_q.int(), batch.context_lens.int(), batch.block_tables.int())
    )
    out = varlen_attn(
        q,
        cache.k,
        cache.v,
        cu_seqlens_q,
        None,  # the lengths are `seqused_k`; FlashAttention 3 refuses both
        batch.max_query_len,
        batch.max_context_len,
        scale=scale,
        # Tokens to the left, beside the token itself. Queries are aligned with the last keys.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=True,
        seqused_k=context_lens,
        block_table=block_tables,
    )
    assert isinstance(out, Tensor)  # a pair only where more is asked for
    return out


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its package
        return False
