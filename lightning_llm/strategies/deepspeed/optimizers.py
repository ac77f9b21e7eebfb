"""The optimizer that a module configures, made fit for DeepSpeed's engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.muon import Muon

Group = dict[str, Any]


def check_optimizer(optimizer: Optimizer, zero_stage: int, tensor_parallel_size: int) -> None:
    """Refuses optimizers that need whole matrices where each rank has a part of them.

    Raises:
        ConfigurationError: It is one.
    """
    if not isinstance(optimizer, Muon | getattr(torch.optim, "Muon", Muon)):
        return
    name = type(optimizer).__name__
    if zero_stage > 0:
        raise ConfigurationError(
            f"{name} orthogonalises whole matrices, and zero_stage={zero_stage} gives each rank flat ranges of them. "
            'Set zero_stage to 0, use AdamW, or strategy="llm3d".'
        )
    if tensor_parallel_size > 1:
        raise ConfigurationError(
            f"{name} orthogonalises whole matrices, and tensor_parallel_size={tensor_parallel_size} leaves each rank a "
            'shard that does not know the others. Set tensor_parallel_size to 1, use AdamW, or strategy="llm3d".'
        )


def for_host(optimizer: Optimizer) -> Optimizer:
    """Torch's Adam as DeepSpeed's for CPUs, several times faster there; with the same groups, others as they are."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return optimizer
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    decoupled = isinstance(optimizer, torch.optim.AdamW)
    # The very same groups: a schedule goes on setting their learning rates.
    made = DeepSpeedCPUAdam(optimizer.param_groups, adamw_mode=decoupled)
    optimizer._opt_called = True  # type: ignore[attr-defined]  # or the schedule warns that it does not step
    return made


def split_experts(optimizer: Optimizer) -> tuple[Optimizer, list[tuple[Group, Group]]]:
    """Gives experts groups of their own, which DeepSpeed averages over the ranks with the same ones.

    Returns:
        The optimizer with these groups; and which group each was split from. The optimizer as it was, which a schedule
        knows, keeps its list of groups.
    """
    pairs: list[tuple[Group, Group]] = []
    for group in optimizer.param_groups:
        experts = [parameter for parameter in group["params"] if not getattr(parameter, "allreduce", True)]
        if not experts:
            continue
        apart = {"moe": True, "name": experts[0].group_name}
        if len(experts) == len(group["params"]):
            group.update(apart)
            continue
        group["params"] = [parameter for parameter in group["params"] if getattr(parameter, "allreduce", True)]
        pairs.append((group, {**group, **apart, "params": experts}))
    optimizer._opt_called = True  # type: ignore[attr-defined]  # or the schedule warns that it does not step
    made = object.__new__(type(optimizer))
    # A schedule has wrapped `step` in the old one's own dictionary.
    made.__dict__ = {key: value for key, value in vars(optimizer).items() if key != "step"}
    made.param_groups = [*optimizer.param_groups, *(experts for _, experts in pairs)]
    return made, pairs


def follow(pairs: list[tuple[Group, Group]]) -> None:
    """Has groups of experts take over the settings of those that they were split from."""
    for group, experts in pairs:
        experts.update({key: value for key, value in group.items() if key not in ("params", "moe", "name")})


def groups_by_name(optimizer: Optimizer, module: nn.Module) -> dict[str, Group]:
    """The settings of each parameter that is trained, by its name."""
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return {name: group_of[id(p)] for name, p in module.named_parameters() if id(p) in group_of}
