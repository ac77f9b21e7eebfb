"""Which attention kernel runs where. A kernel is one row of `KERNELS`; to add one, add a row.

Called by the runner once, when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.kernels import reference
from lightning_llm.serving.kernels.paged import PagedKernel


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a kernel must be able to do: where, with which types and sizes."""

    device: torch.device
    dtype: torch.dtype
    kv_dtype: str
    block_size: int
    head_dim: int


@dataclass(frozen=True)
class Kernel:
    """A row of the table.

    Attributes:
        name: What users force it by.
        refuses: Why it cannot serve a need, as the end of a sentence; None if it can.
        load: Imports and returns it; called only when it is chosen.
    """

    name: str
    refuses: Callable[[Need], str | None]
    load: Callable[[], PagedKernel]


KERNELS: tuple[Kernel, ...] = (Kernel("reference", lambda need: None, lambda: reference.attend),)
"""The first that does not refuse is "auto"."""


def select_kernel(
    device: torch.device | str,
    dtype: torch.dtype,
    kv_dtype: str = "auto",
    *,
    block_size: int = 16,
    head_dim: int = 64,
    kernel: str = "auto",
) -> tuple[str, PagedKernel]:
    """The best kernel for a device and types, or the one that `kernel` names; its name and itself.

    Raises:
        ConfigurationError: There is no kernel of that name, or it cannot do this; it says why.
    """
    need = Need(device=torch.device(device), dtype=dtype, kv_dtype=kv_dtype, block_size=block_size, head_dim=head_dim)
    names = [row.name for row in KERNELS]
    if kernel != "auto" and kernel not in names:
        raise ConfigurationError(f"There is no attention kernel {kernel!r}: use auto, {', '.join(names)}.")
    for row in KERNELS:
        if kernel in ("auto", row.name):
            reason = row.refuses(need)
            if reason is None:
                return row.name, row.load()
            if kernel != "auto":
                raise ConfigurationError(f"The attention kernel {kernel!r} {reason}: use another, or auto.")
    raise AssertionError("the reference kernel refuses nothing")
