"""Keys and values in 8 bits: one scale per token and head, so that a token is quantised once and alone.

Called where the KV cache is written, and by the kernels that read it in torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST: dict[torch.dtype, float] = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max,
}
"""What the largest element of a head becomes, by the type that it is kept in."""


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rounds x, [..., head_dim], to `dtype`; returns it and the float32 scales, [...], that it is to be multiplied by.

    The error of an element is at most half a scale for int8; for float8_e4m3fn 1/16 of the element, or 1/1024 of a
    scale where that is more.
    """
    largest = LARGEST[dtype]
    scale = (x.abs().amax(-1).float() / largest).clamp_(min=torch.finfo(torch.float32).tiny)
    scaled = (x / scale.unsqueeze(-1)).clamp_(-largest, largest)
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def dequantize(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Undoes `quantize`, in `dtype`. Without scales, x only changes its type."""
    return x.to(dtype) if scale is None else x.to(dtype) * scale.unsqueeze(-1).to(dtype)
