"""Ring attention over zig-zag shards: keys and values travel around the context axis while each rank computes.

The third attention of context.py. By the zig-zag order every block is causal or whole, never masked: rank r holds
chunks r and 2n-1-r, so of a rank before it only the first half of the keys is visible, to all queries; of a rank after
it all keys are, to the second half of the queries. Blocks are merged by their log-sum-exps
(https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_llm.errors import ConfigurationError

aten = torch.ops.aten


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    layer: int,
    scale: float,
    sliding_window: int | None,
    document_ids: Tensor | None = None,
) -> Tensor:
    """Attends across the ranks of `group` (see `AttentionFunction`).

    Raises:
        ConfigurationError: Documents, or a sliding window shorter than the sequence: both need masks.
    """
    size = dist.get_world_size(group)
    if document_ids is not None or (sliding_window is not None and sliding_window < q.shape[2] * size):
        raise ConfigurationError(
            "context_parallel_method='ring' has no masks, which sliding windows and document masks need. "
            "Set context_parallel_method to 'allgather' or 'ulysses'."
        )
    return _Ring.apply(q, k, v, group, scale)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, scale: float) -> Tensor:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        half = q.shape[2] // 2
        travelling = torch.stack([k, v])
        out, lse = _attend(q, k, v, causal=True, scale=scale)
        # Summed up at least in float32: a ring has as many roundings as ranks.
        out = out.to(lse.dtype)
        for step in range(1, size):
            travelling = _pass_on(travelling, group)
            keys, values = travelling
            if step <= rank:  # from a rank before this one
                block, block_lse = _attend(q, keys[:, :, :half], values[:, :, :half], causal=False, scale=scale)
                out, lse = _merge(out, lse, block, block_lse)
            else:
                block, block_lse = _attend(q[:, :, half:], keys, values, causal=False, scale=scale)
                merged, merged_lse = _merge(out[:, :, half:], lse[:, :, half:], block, block_lse)
                out = torch.cat([out[:, :, :half], merged], 2)
                lse = torch.cat([lse[:, :, :half], merged_lse], 2)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.group, ctx.scale = group, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, lse = ctx.saved_tensors
        group, scale = ctx.group, ctx.scale
        (gradient,) = gradients
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        half = q.shape[2] // 2
        travelling = torch.stack([k, v])
        dq, dk, dv = (g.to(lse.dtype) for g in _differentiate(gradient, q, k, v, out, lse, causal=True, scale=scale))
        # Gradients go around with the keys and values that they belong to; those of this rank's own wait at home.
        d_travelling = torch.zeros_like(travelling, dtype=lse.dtype)
        for step in range(1, size):
            travelling = _pass_on(travelling, group)
            d_travelling = _pass_on(d_travelling, group) if step > 1 else d_travelling
            keys, values = travelling
            if step <= rank:
                dq_block, *d_block = _differentiate(
                    gradient, q, keys[:, :, :half], values[:, :, :half], out, lse, causal=False, scale=scale
                )
                dq += dq_block
                d_travelling[:, :, :, :half] += torch.stack(d_block)
            else:
                late = (slice(None), slice(None), slice(half, None))
                dq_block, *d_block = _differentiate(
                    gradient[late], q[late], keys, values, out[late], lse[late], causal=False, scale=scale
                )
                dq[:, :, half:] += dq_block
                d_travelling += torch.stack(d_block)
        from_others = _pass_on(d_travelling, group)  # the last step home
        dk, dv = dk + from_others[0], dv + from_others[1]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def _pass_on(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends `x` to the next rank of the ring and returns what the previous one sent."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    received = torch.empty_like(x)
    following = dist.get_global_rank(group, (rank + 1) % size)
    previous = dist.get_global_rank(group, (rank - 1) % size)
    operations = [
        dist.P2POp(dist.isend, x.contiguous(), following, group),
        dist.P2POp(dist.irecv, received, previous, group),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return received


def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Two softmaxes over disjoint keys -> the one over all of them."""
    total = torch.logaddexp(lse, block_lse)
    return out * (lse - total).exp().unsqueeze(-1) + block * (block_lse - total).exp().unsqueeze(-1), total


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """One block: `(output [batch, heads, queries, head_dim], log-sum-exp [batch, heads, queries])`."""
    k, v = _as_many_heads(k, q), _as_many_heads(v, q)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def _differentiate(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one block's q, k and v, given output and log-sum-exp over all blocks."""
    kv_heads = k.shape[1]
    queries, keys = q.shape[2], k.shape[2]
    arguments = [x.contiguous() for x in (gradient, q, _as_many_heads(k, q), _as_many_heads(v, q), out, lse)]
    if q.device.type == "cpu":
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(*arguments, 0.0, causal, scale=scale)
    else:
        unused = torch.empty(0, dtype=torch.long, device=q.device)  # no dropout, no packed sequences
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            *arguments, None, None, queries, keys, 0.0, causal, unused, unused, scale=scale
        )
    return dq, *(g.unflatten(1, (kv_heads, -1)).sum(2) for g in (dk, dv))


def _as_many_heads(x: Tensor, q: Tensor) -> Tensor:
    """Key-value heads repeated until every query head has its own."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
