"""Collectives that autograd knows: what context.py and expert.py send in the forward comes back in the backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_llm._torch import all_gather_single, reduce_scatter_single


def gather_first_dim(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors one after the other: `[n, ...]` -> `[ranks * n, ...]`; gradients are summed over the ranks."""
    return _GatherFirstDim.apply(x, group)


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """Rows of `x` to the ranks they are for: `[sum(send), ...]` -> `[sum(receive), ...]`.

    Args:
        x: Rows in the order of the ranks that get them.
        group: The ranks.
        send: Rows for each rank; None for equal shares.
        receive: Rows from each rank; None for equal shares.
    """
    return _AllToAll.apply(x, group, send, receive)


class _GatherFirstDim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = x.new_empty((x.shape[0] * dist.get_world_size(group), *x.shape[1:]))
        all_gather_single(gathered, x.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        mine = gradient.new_empty((gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:]))
        reduce_scatter_single(mine, gradient.contiguous(), group=ctx.group)
        return mine, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: dist.ProcessGroup, send: list[int] | None, receive: list[int] | None
    ) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchange(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradients[0], ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(x: Tensor, group: dist.ProcessGroup, send: list[int] | None, receive: list[int] | None) -> Tensor:
    x = x.contiguous()
    received = x.new_empty((x.shape[0] if receive is None else sum(receive), *x.shape[1:]))
    dist.all_to_all_single(received, x, receive, send, group=group)
    return received
