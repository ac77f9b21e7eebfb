"""Bytes that one block keeps for its backward, and what it needs for a moment; derived term by term.

The method is that of Korthikanti et al. (https://arxiv.org/abs/2205.05198, section 4), for this decoder: SwiGLU,
grouped-query attention, flash attention (no score matrix), no dropout. `memory.py` adds the blocks up.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import NamedTuple

from lightning_llm.planner.layout import Layout, Recompute, Workload
from lightning_llm.planner.shape import Shape, Stage, Unit, sizes_of

FLOAT32 = 4


class BlockBytes(NamedTuple):
    """Activations of one block for one microbatch, bytes on one rank.

    Attributes:
        kept: Without recomputation, from the forward to the backward.
        kept_selective: Where attention, communication and every second matrix product are kept.
        kept_full: Where only the block's input is kept.
        gradients: Gradients of activations that are alive together at most, while the backward passes through.
        forward: Alive for a moment in a forward that keeps nothing.
    """

    kept: float
    kept_selective: float
    kept_full: float
    gradients: float
    forward: float

    def keeps(self, mode: str) -> float:
        """What is kept under one way of recomputation: "none", "selective" or "full"."""
        return {"none": self.kept, "selective": self.kept_selective, "full": self.kept_full}[mode]


class Blocks(NamedTuple):
    """Equal blocks of a stage."""

    number: int
    unit: Unit
    window: int | None
    recompute: str


@lru_cache(maxsize=4096)
def blocks_of(stage: Stage, recompute: Recompute) -> tuple[Blocks, ...]:
    """A stage's blocks, equal ones together: most models have one kind."""
    counts: Counter[tuple[Unit, int | None, str]] = Counter()
    for index, (unit, window) in enumerate(zip(stage.layers, stage.windows, strict=True)):
        if isinstance(recompute, int):
            counts[unit, window, "full" if index % recompute == 0 else "none"] += 1
        else:
            counts[unit, window, recompute] += 1
    return tuple(Blocks(number, *kind) for kind, number in counts.items())


def block_bytes(shape: Shape, unit: Unit, layout: Layout, workload: Workload) -> BlockBytes:
    """See `BlockBytes`.

    Between the blocks each rank has `tokens / split` of the sequence (sequence parallelism, split = tensor size);
    within attention and MLP it has all tokens and `1 / tensor` of the heads or columns. Per token, in elements:

    ====================================  ==============================  =========================================
    kept for                              elements                        why
    ====================================  ==============================  =========================================
    input of each of the two norms        2 * hidden / split              also the residual stream
    input of q/k/v and of gate/up         2 * hidden                      the norm's output; under tensor parallelism
                                                                          gathered, which DTensor keeps whole
    attention: q, k, v, output            (2 heads + 2 kv) * d / tensor   rotated q and k; the output is o_proj's input
    before qk-norm                        (heads + kv) * d / tensor       only with qk_norm
    gate, silu(gate), up, their product   4 * intermediate / tensor       the product is down_proj's input
    ====================================  ==============================  =========================================

    In float32 besides: log-sum-exp of each head, 1 / rms of each norm, and the block's own cosines and sines. A mixture
    of experts has instead of the MLP, per token that this rank's experts get (`top_k * tokens / split` with even
    routing): the token, gate, silu, up and product, and the output that is weighted; and the router's logits and
    probabilities in float32.
    """
    e = workload.compute_bytes
    tokens, tensor, split = layout.tokens(workload), layout.tensor_parallel_size, layout.sequence_split
    hidden = shape.hidden
    heads, kv = shape.heads * shape.head_dim / tensor, shape.kv_heads * shape.head_dim / tensor
    widths = sizes_of(unit)
    inner = widths.intermediate / tensor

    norms = 2 * hidden / split
    gathered = hidden + (hidden if inner else hidden / split)  # experts alone work on each rank's own tokens
    attention = 2 * heads + 2 * kv + (heads + kv if shape.qk_norm else 0)
    float32 = shape.heads / tensor + 2 / split + ((shape.heads + shape.kv_heads) / tensor if shape.qk_norm else 0)
    feed_forward = 4 * inner
    # "selective" keeps, of the matrix products q, k, v, o, gate, up and down in their order, every second one from the
    # first on (a row-parallel product is whole until it is reduced), attention's output, and what was communicated:
    # both gathered inputs and both reduced outputs. The block's input is kept as in "full".
    communicated = ((2 * hidden if split > 1 else 0) + 2 * hidden / split) if tensor > 1 else 0
    selective = hidden / split + 2 * heads + kv + (inner + hidden if inner else 0) + communicated
    gradients = 2 * hidden + max(3 * inner, heads + 2 * kv)

    if widths.experts:
        routed = shape.experts_per_token / split
        expert_width = widths.expert_intermediate
        feed_forward += routed * (2 * hidden + 4 * expert_width)
        # Grouped products are not among those that are counted; tokens that travelled to their experts are kept.
        selective += 2 * routed * hidden if layout.expert_parallel_size > 1 else 0
        gradients += routed * (2 * hidden + 3 * expert_width)
        float32 += 2 * widths.experts / split

    rotary = FLOAT32 * shape.head_dim * tokens / layout.microbatch_size
    kept = tokens * (e * (norms + gathered + attention + feed_forward) + FLOAT32 * float32) + rotary
    return BlockBytes(
        kept=kept,
        kept_selective=tokens * (e * selective + FLOAT32 * shape.heads / tensor),
        kept_full=tokens * e * hidden / split,
        gradients=tokens * e * gradients,
        forward=tokens * e * (hidden + max(3 * inner, heads + 2 * kv, feed_forward - 4 * inner)),
    )


class LogitsBytes(NamedTuple):
    """Of the output layer and the loss, for one microbatch.

    Attributes:
        output: The logits, in the computation's dtype. A pipeline keeps them until the microbatch's backward is done.
        loss: Log-probabilities in float32, kept from the loss to its backward.
        transient: Alive only within the loss's backward, in float32.
    """

    output: float
    loss: float
    transient: float


def logits_bytes(shape: Shape, layout: Layout, workload: Workload) -> LogitsBytes:
    """See `LogitsBytes`. FSDP2's vocabulary is split over the tensor axis and stays split in the loss.

    The backward of torch's cross entropy has two gradients alive, that of the log-probabilities and that of the logits.
    `loss_parallel` computes `(one_hot + exp(x)) * gradient` in separate operations, of which three tensors are alive.
    """
    numbers = layout.tokens(workload) * shape.vocab / layout.vocabulary_split
    temporaries = 3 if layout.vocabulary_split > 1 else 2
    return LogitsBytes(workload.compute_bytes * numbers, FLOAT32 * numbers, temporaries * FLOAT32 * numbers)
