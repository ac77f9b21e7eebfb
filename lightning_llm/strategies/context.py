"""Context parallelism: the ranks of the axis share each sequence, so that activations of long ones fit.

llm3d.py shards every batch with a `ContextParallel` and hands its attention to the model. The sequence is cut into
twice as many chunks as there are ranks, and rank r gets chunks r and 2n-1-r (zig-zag), so that all ranks have equal
shares of the causal triangle. Three ways to attend across ranks stand behind one interface (`AttentionFunction`):
`allgather`, `ulysses` and `ring`. They use collectives and point-to-point messages that every backend has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.attention import causal_attention, visible
from lightning_llm.strategies.collectives import all_to_all, gather_first_dim
from lightning_llm.strategies.ring import ring_attention

ContextMethod = Literal["allgather", "ulysses", "ring"]
CONTEXT_METHODS: tuple[str, ...] = get_args(ContextMethod)
SEQUENCE_DIM = 1  # of [batch, seq] and [batch, seq, ...]


def zigzag_positions(seq_len: int, size: int, rank: int) -> Tensor:
    """Where the tokens of a rank stand in the whole sequence: `[seq_len / size]`, ascending."""
    chunk = seq_len // (2 * size)
    first, last = rank * chunk, (2 * size - 1 - rank) * chunk
    return torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])


def natural_order(seq_len: int, size: int) -> Tensor:
    """The permutation that puts the ranks' shares, one after the other, into the sequence's order: `[seq_len]`."""
    return torch.cat([zigzag_positions(seq_len, size, rank) for rank in range(size)]).argsort()


class ContextParallel:
    """Shards batches over the context axis and attends across it.

    Args:
        mesh: The context axis.
        method: `allgather` gathers keys and values, which grouped-query attention makes small (Llama 3,
            https://arxiv.org/abs/2407.21783, section 3.3.2); `ulysses` trades sequence for heads by two all-to-alls
            (https://arxiv.org/abs/2309.14509); `ring` passes keys and values around, computing meanwhile, and never
            holds more than two ranks' share (https://arxiv.org/abs/2310.01889).
    """

    def __init__(self, mesh: DeviceMesh, method: ContextMethod) -> None:
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self.positions: Tensor | None = None  # of this rank's tokens in the batch at hand
        attend: dict[str, Callable[..., Tensor]] = {
            "allgather": allgather_attention,
            "ulysses": ulysses_attention,
            "ring": ring_attention,
        }
        self.attention = partial(attend[method], group=self.group)

    def shard_batch(self, batch: Any) -> dict[str, Any]:
        """This rank's part of `{"input_ids": [batch, seq], "labels": [batch, seq], ...}`.

        Every tensor `[batch, seq, ...]` is cut, and the model is told where its tokens stand.

        Raises:
            ConfigurationError: The batch is no such mapping.
        """
        tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(tokens, Tensor) or tokens.ndim != 2:
            raise ConfigurationError(
                "Context parallelism cuts batches of {'input_ids': [batch, seq], 'labels': [batch, seq], ...}, but a "
                f"batch is a {type(batch).__name__}. Give such batches, or set context_parallel_size to 1."
            )
        mine = zigzag_positions(tokens.shape[SEQUENCE_DIM], self.size, self.rank).to(tokens.device)
        self.positions = mine
        return {
            name: value.index_select(SEQUENCE_DIM, mine)
            if isinstance(value, Tensor) and value.shape[:2] == tokens.shape
            else value
            for name, value in batch.items()
        }

    def gather_sequence(self, output: Tensor) -> Tensor:
        """`[batch, seq / size, ...]` of every rank -> `[batch, seq, ...]` in the sequence's order, on every rank."""
        parts = [torch.empty_like(output) for _ in range(self.size)]
        dist.all_gather(parts, output.contiguous(), group=self.group)
        whole = torch.cat(parts, SEQUENCE_DIM)
        return whole.index_select(SEQUENCE_DIM, natural_order(whole.shape[SEQUENCE_DIM], self.size).to(whole.device))

    def attach(self, model: nn.Module) -> None:
        """Has `model` (or a pipeline stage), whose forward takes `positions` and `attention`, called with ours."""

        def hand_over(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            return args, {"positions": self.positions, "attention": self.attention, **keywords}

        model.register_forward_pre_hook(hand_over, with_kwargs=True)


def check_context(seq_len: int, context_parallel_size: int, tensor_parallel_size: int) -> None:
    """Whether context ranks can share a sequence; `tensor_parallel_size` is 1 without sequence parallelism.

    Raises:
        ConfigurationError: with the arithmetic and the nearest length that works.
    """
    chunks = 2 * context_parallel_size
    divisor = chunks * tensor_parallel_size
    if seq_len % divisor:
        tensor = f" * tensor_parallel_size({tensor_parallel_size})" if tensor_parallel_size > 1 else ""
        nearest = max(divisor, round(seq_len / divisor) * divisor)
        raise ConfigurationError(
            f"sequence length({seq_len}) is not divisible by 2 * context_parallel_size({context_parallel_size}){tensor}"
            f" = {divisor}: each context rank gets two chunks of it. The nearest length that is: {nearest}."
        )


def allgather_attention(
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
    """This rank's queries against everybody's keys and values (see `AttentionFunction`).

    The keys' and values' gradients come back by a reduce-scatter. Each of the two chunks of queries sees only the keys
    up to its end, so no work is masked away except within a chunk.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    grouped = q.shape[1] != k.shape[1]
    seq_len = q.shape[2] * size
    order = natural_order(seq_len, size).to(q.device)
    # [seq, 2, batch, kv_heads, head_dim]: the gathered dim must come first.
    k, v = gather_first_dim(torch.stack([k, v]).movedim(3, 0), group).index_select(0, order).movedim(0, 3)
    documents = None
    if document_ids is not None:
        documents = gather_first_dim(document_ids.mT, group).index_select(0, order).mT
    chunk = q.shape[2] // 2
    parts = []
    for part, first in ((0, rank * chunk), (1, (2 * size - 1 - rank) * chunk)):
        queries, end = q[:, :, part * chunk : (part + 1) * chunk], first + chunk
        positions = torch.arange(end, device=q.device)
        mask = visible(
            positions[first:],
            positions,
            documents[:, first:end] if documents is not None else None,
            documents[:, :end] if documents is not None else None,
            sliding_window,
        )
        mask = mask if documents is None else mask.unsqueeze(1)  # the same for all heads
        keys, values = k[:, :, :end], v[:, :, :end]
        parts.append(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        )
    return torch.cat(parts, 2)


def ulysses_attention(
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
    """Whole sequences for a share of the heads, then back (see `AttentionFunction`).

    Key-value heads that are fewer than the ranks are repeated.

    Raises:
        ConfigurationError: The heads cannot be shared out.
    """
    size = dist.get_world_size(group)
    heads, kv_heads = q.shape[1], k.shape[1]
    check_ulysses(heads, kv_heads, size)
    if kv_heads % size:
        k, v = (x.repeat_interleave(size // kv_heads, dim=1) for x in (k, v))
    order = natural_order(q.shape[2] * size, size).to(q.device)
    # One all-to-all for all three: rank i gets the i-th share of the heads of each.
    shares = torch.cat([_by_share(x, size) for x in (q, k, v)], dim=2)
    # [source rank, batch, heads, seq, head_dim] -> whole sequences in order
    whole = all_to_all(shares, group).permute(1, 2, 0, 3, 4).flatten(2, 3).index_select(2, order)
    q, k, v = whole.split([x.shape[1] // size for x in (q, k, v)], dim=1)
    keywords = {}
    if document_ids is not None:
        keywords["document_ids"] = gather_first_dim(document_ids.mT, group).index_select(0, order).mT
    out = causal_attention(q, k, v, layer=layer, scale=scale, sliding_window=sliding_window, **keywords)
    back = out.index_select(2, order.argsort()).unflatten(2, (size, -1)).permute(2, 0, 1, 3, 4)
    # [share of the heads, batch, heads, seq, head_dim] -> all heads of this rank's tokens
    return all_to_all(back, group).transpose(0, 1).flatten(1, 2)


def check_ulysses(heads: int, kv_heads: int, size: int) -> None:
    """Whether `size` ranks can share these heads, key-value heads repeated where they are fewer.

    Raises:
        ConfigurationError: with the sizes that work.
    """

    def works(ranks: int) -> bool:
        return heads % ranks == 0 and (kv_heads % ranks == 0 or ranks % kv_heads == 0)

    if not works(size):
        raise ConfigurationError(
            f"context_parallel_size({size}) with context_parallel_method='ulysses' must divide the {heads} attention "
            f"heads, and divide the {kv_heads} key-value heads or be a multiple of them (heads of one tensor-parallel "
            f"rank). Use one of {[n for n in range(1, heads + 1) if works(n)]}, or the method 'allgather' or 'ring'."
        )


def _by_share(x: Tensor, size: int) -> Tensor:
    """[batch, heads, seq, head_dim] -> [size, batch, heads / size, seq, head_dim]."""
    return x.unflatten(1, (size, -1)).movedim(1, 0)
