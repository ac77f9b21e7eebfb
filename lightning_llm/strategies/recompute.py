"""Activation recomputation: blocks forget what they computed in the forward and compute it again in the backward.

Called by llm3d.py after the tensor axes and before compile and sharding, so that a recomputed block finds its weights
gathered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightning_llm.errors import ConfigurationError

MODES = ("none", "selective", "full")

aten = torch.ops.aten
# Kept by "selective": attention, whose recomputation costs most for the bytes it saves, and everything that would
# communicate again.
_KEPT = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.all_to_all_single.default,
}
_MATRIX_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default}


def check_recompute(recompute: str | int | float, *, compile: bool) -> None:
    """Refuses what is no mode of recomputation.

    Raises:
        ConfigurationError: with the modes.
    """
    ways = "'none', 'selective', 'full', a whole number n (every n-th block), or a memory budget between 0 and 1"
    if isinstance(recompute, str | bool):
        valid = recompute in MODES
    else:
        valid = 0 < recompute < 1 or (recompute >= 1 and recompute == int(recompute))
    if not valid:
        raise ConfigurationError(f"recompute={recompute!r} must be {ways}.")
    if isinstance(recompute, float) and recompute < 1 and not compile:
        raise ConfigurationError(
            f"recompute={recompute} is a memory budget, which torch's compiler keeps: set compile to true, or use "
            "'selective'."
        )


def apply_recompute(units: list[nn.Module], recompute: str | int | float) -> None:
    """Has `units` recomputed in the backward.

    Args:
        units: The blocks, in order.
        recompute: "none"; "full": every block keeps its input alone (https://arxiv.org/abs/1604.06174); n: so does
            every n-th block; "selective": attention, communication and every second matrix product are kept, the rest
            is recomputed (https://arxiv.org/abs/2205.05198); a fraction: the compiler's partitioner chooses what fits
            into that share of the memory that keeping everything takes.
    """
    if recompute == "none":
        return
    if isinstance(recompute, float) and recompute < 1:
        # Read by the partitioner when a block is compiled; there is no argument for it.
        torch._functorch.config.activation_memory_budget = recompute
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True  # meshes; they hold no activations
        return
    every = int(recompute) if isinstance(recompute, int | float) else 1
    keywords: dict[str, Any] = {"context_fn": _selective_contexts} if recompute == "selective" else {}
    for index, unit in enumerate(units):
        if index % every == 0:
            # In place of forward, not around the module: names of parameters stay what they are.
            unit.forward = partial(checkpoint, unit.forward, use_reentrant=False, **keywords)  # type: ignore[method-assign]


def _selective_contexts() -> tuple[Any, Any]:
    return create_selective_checkpoint_contexts(_policy())


def _policy() -> Callable[..., CheckpointPolicy]:
    """One block's policy; it counts matrix products, in the forward and again in the recomputation."""
    seen: Counter[str] = Counter()

    def decide(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in _KEPT:
            return CheckpointPolicy.MUST_SAVE
        if operator in _MATRIX_PRODUCTS:
            phase = "recompute" if context.is_recompute else "forward"
            seen[phase] += 1
            return CheckpointPolicy.MUST_SAVE if seen[phase] % 2 else CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return decide
