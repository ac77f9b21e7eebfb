"""The optimizer that a module or DeepSpeed's configuration asks for, made fit for DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import nn
from torch.optim import Optimizer

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.adamw import CastingAdamW
from lightning_llm.models.muon import Muon

Group = dict[str, Any]


# Each element of a parameter is changed by what is known of that element alone.
ELEMENTWISE = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
_OTHERS_OF_TORCH = ("Adafactor", "LBFGS", "Muon")


def check_optimizer(optimizer: Optimizer, zero_stage: int, tensor_parallel_size: int) -> None:
    """Refuses optimizers that need whole parameters where each rank has a part of them, and warns of unknown ones.

    Raises:
        ConfigurationError: It is one.
    """
    kind = type(optimizer)
    whole = zero_stage == 0 and tensor_parallel_size == 1
    if whole or kind is CastingAdamW or kind.__module__.startswith("deepspeed."):
        return
    others = tuple(getattr(torch.optim, name) for name in _OTHERS_OF_TORCH if hasattr(torch.optim, name))
    part = (
        f"zero_stage={zero_stage} gives each rank flat ranges of them. Set zero_stage to 0"
        if zero_stage > 0
        else f"tensor_parallel_size={tensor_parallel_size} leaves each rank a shard that does not know the others. Set "
        "tensor_parallel_size to 1"
    )
    if isinstance(optimizer, (Muon, *others)):
        why = "orthogonalises whole matrices" if "Muon" in kind.__name__ else "computes with whole parameters"
        raise ConfigurationError(f'{kind.__name__} {why}, and {part}, use AdamW, or strategy="llm3d".')
    if zero_stage > 0 and not isinstance(optimizer, tuple(getattr(torch.optim, name) for name in ELEMENTWISE)):
        rank_zero_warn(
            f"zero_stage={zero_stage} gives {kind.__name__} flat ranges of parameters. That is right only if it "
            "changes each element by that element alone, and not by the norm or the shape of its parameter."
        )


def optimizer_of_config(
    section: Mapping[str, Any], configured: Optimizer | None, parameters: Iterable[nn.Parameter]
) -> Optimizer:
    """The optimizer of DeepSpeed's JSON, for all parameters alike. "auto" takes a value from the module's optimizer.

    Args:
        section: `{"type": "AdamW", "params": {...}}`.
        configured: What configure_optimizers() returned.
        parameters: Of the module.

    Raises:
        ConfigurationError: A type that is not built here, a value that torch's optimizer does not have, or "auto"
            without one to take it from.
    """
    kind, values = str(section.get("type")), dict(section.get("params") or {})
    if kind.lower() in ("adam", "adamw"):
        # DeepSpeed's Adam is AdamW unless told otherwise.
        decoupled = values.pop("adam_w_mode", True) or kind.lower() == "adamw"
        values = {key: value for key, value in values.items() if key not in ("torch_adam", "fp32_optimizer_states")}
        kind = "AdamW" if decoupled else "Adam"
    if kind not in (*ELEMENTWISE, *_OTHERS_OF_TORCH):
        raise ConfigurationError(
            f"config: optimizer.type={kind!r} is not built here. Use one of {', '.join(('Adam', *ELEMENTWISE))}, or "
            "return the optimizer from configure_optimizers()."
        )
    group = configured.param_groups[0] if configured is not None and configured.param_groups else {}
    for key in [key for key, value in values.items() if value == "auto"]:
        if key not in group:
            raise ConfigurationError(
                f"config: optimizer.params.{key} is 'auto', and configure_optimizers() returned no optimizer that has "
                f"it. Write a value."
            )
        values[key] = group[key]
    try:
        return getattr(torch.optim, kind)([p for p in parameters if p.requires_grad], **values)
    except TypeError as error:
        raise ConfigurationError(f"config: optimizer.params do not fit torch.optim.{kind}: {error}.") from None


def scheduler_of_config(section: Mapping[str, Any], optimizer: Optimizer, trainer: pl.Trainer) -> LRSchedulerConfig:
    """The schedule of DeepSpeed's JSON, DeepSpeed's own or torch's; the Trainer steps it after each optimizer step.

    Args:
        section: `{"type": "WarmupLR", "params": {...}}`. "auto" is filled in for `total_num_steps`, `warmup_max_lr`,
            `warmup_min_lr`.
        optimizer: Whose learning rate it sets.
        trainer: Knows how many steps there are.

    Raises:
        ConfigurationError: A schedule that does not exist, or an "auto" that nothing decides.
    """
    from deepspeed.runtime import lr_schedules

    kind, values = str(section.get("type")), dict(section.get("params") or {})
    made = getattr(lr_schedules if kind in lr_schedules.VALID_LR_SCHEDULES else torch.optim.lr_scheduler, kind, None)
    if made is None:
        raise ConfigurationError(
            f"config: scheduler.type={kind!r} is not in torch.optim.lr_scheduler, and none of DeepSpeed's: "
            f"{', '.join(lr_schedules.VALID_LR_SCHEDULES)}."
        )
    for key in [key for key, value in values.items() if value == "auto"]:
        if key == "total_num_steps":
            values[key] = int(trainer.estimated_stepping_batches)
        elif key in ("warmup_max_lr", "warmup_min_lr"):
            values[key] = optimizer.param_groups[0]["lr"] if key == "warmup_max_lr" else 0.0
        else:
            raise ConfigurationError(
                f"config: scheduler.params.{key} is 'auto', and nothing decides it. Write a value."
            )
    try:
        return LRSchedulerConfig(made(optimizer, **values), interval="step")
    except TypeError as error:
        raise ConfigurationError(f"config: scheduler.params do not fit {kind}: {error}.") from None


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
