"""Which optimizer trains which parameter, with what state, at what rate. `LLMModule` asks for it.

AdamW for everything, or Muon for the hidden matrices and AdamW for the rest, in one optimizer, as Lightning's automatic
optimization takes one. Parameters may be DTensors, sharded in whatever way; plain tensors work the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_llm._torch import full_shape
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.adamw import CastingAdamW, stored_dtype
from lightning_llm.models.moe import Router
from lightning_llm.models.muon import AdjustLearningRate, Muon

OptimizerName = Literal["adamw", "muon"]
StateDtype = Literal["float32", "bfloat16"]
Schedule = Literal["cosine", "wsd", "constant"]

BFLOAT16_DECAY = 2**-8


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """The optimizer's part of `LLMModule`'s arguments; see there.

    Raises:
        ConfigurationError: A setting is out of range, or has no effect.
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    optimizer_state_dtype: StateDtype = "float32"
    muon_learning_rate: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr_fn: AdjustLearningRate = "match_rms_adamw"

    def __post_init__(self) -> None:
        _check_choice("optimizer", self.optimizer, ("adamw", "muon"))
        _check_choice("optimizer_state_dtype", self.optimizer_state_dtype, ("float32", "bfloat16"))
        _check_choice("adjust_lr_fn", self.adjust_lr_fn, ("match_rms_adamw", "original"))
        for name in ("learning_rate", "muon_learning_rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name}={value} must be positive.")
        if self.muon_learning_rate is not None and self.optimizer != "muon":
            raise ConfigurationError(
                f"muon_learning_rate={self.muon_learning_rate} has no effect with optimizer={self.optimizer!r}. Set "
                "optimizer='muon', or leave it out."
            )
        averages = {"betas[0]": self.betas[0], "betas[1]": self.betas[1]}
        if self.optimizer == "muon":
            averages["momentum"] = self.momentum
        for name, factor in averages.items():
            if not 0 <= factor < 1:
                raise ConfigurationError(f"{name}={factor} must be at least 0 and below 1.")
            if self.optimizer_state_dtype == "bfloat16" and 1 - factor < BFLOAT16_DECAY:
                raise ConfigurationError(
                    f"{name}={factor} lets an average fall by 1 - {factor} = {1 - factor:.2g} of itself in a step, "
                    f"which bfloat16 may round away (its 8 bits show changes of {BFLOAT16_DECAY:.2g} and more). Set "
                    f"{name} to at most {1 - BFLOAT16_DECAY:.3f}, or optimizer_state_dtype='float32'."
                )

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's groups, with the parameters that this rank holds of `model` in their order."""
        hidden = hidden_matrices(model) if self.optimizer == "muon" else []
        taken = {id(parameter) for parameter in hidden}
        rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        matrices = [p for p in rest if len(full_shape(p)) >= 2]
        vectors = [p for p in rest if len(full_shape(p)) < 2]
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        if self.optimizer == "muon":
            rate = self.muon_learning_rate or self.learning_rate
            groups.insert(0, {"params": hidden, "use_muon": True, "lr": rate, "weight_decay": self.weight_decay})
        return _filled(groups)

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of what this rank holds of `model`."""
        adam: dict[str, Any] = {"lr": self.learning_rate, "betas": self.betas, "eps": self.eps}
        groups = self.parameter_groups(model)
        state_dtype = getattr(torch, self.optimizer_state_dtype)
        if self.optimizer == "muon":
            return Muon(
                groups,
                **adam,
                state_dtype=state_dtype,
                momentum=self.momentum,
                nesterov=self.nesterov,
                adjust_lr_fn=self.adjust_lr_fn,
            )
        parameters = [parameter for group in groups for parameter in group["params"]]
        if all(stored_dtype(p, state_dtype) == p.dtype for p in parameters):  # which torch's AdamW stores
            return AdamW(groups, **adam, fused=True)
        return CastingAdamW(groups, **adam, state_dtype=state_dtype)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """What Muon is for: matrices between hidden states, stacked ones of experts too.

    Not embedding, head and routers, whose rows are looked up or score one token or expert each: they keep AdamW, as in
    https://kellerjordan.github.io/posts/muon/. Experts hold most of a mixture's parameters, so that leaving them out
    would leave Muon little to do.
    """
    others: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | Router) or name.rpartition(".")[2] == "lm_head":
            others |= {id(parameter) for parameter in module.parameters()}
    return [p for p in model.parameters() if p.requires_grad and len(full_shape(p)) >= 2 and id(p) not in others]


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    # A pipeline stage may have no parameters for a group, and checkpoints know a group by its first one.
    return [group for group in groups if group["params"]] or groups[:1]  # or none at all, where all is frozen


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigurationError(f"{name}={value!r} must be one of {', '.join(choices)}.")


class LearningRateFactor:
    """Learning rate as a fraction of its peak, by optimizer step. See `LLMModule` for the arguments."""

    def __init__(self, schedule: Schedule, warmup: int, total: int, minimum: float, decay_fraction: float) -> None:
        self.schedule = schedule
        self.warmup = warmup
        self.total = total
        self.minimum = minimum
        self.decay_fraction = decay_fraction

    def __call__(self, step: int) -> float:
        """The factor of step `step`, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        if self.schedule == "cosine":
            progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
            return self.minimum + (1 - self.minimum) * 0.5 * (1 + math.cos(math.pi * progress))
        decay = max(1, round(self.total * self.decay_fraction))
        left = max(0, self.total - step)
        return 1.0 if left >= decay else self.minimum + (1 - self.minimum) * left / decay


class LearningRateSchedule(LambdaLR):
    """One factor for all groups of an optimizer.

    Its state is one rank's for all: a pipeline stage may have other groups than the one that saved, so what belongs to
    the groups is read off them, after the optimizer's own state has been loaded.
    """

    def state_dict(self) -> dict[str, Any]:
        """Steps, and the factor's settings."""
        state = super().state_dict()
        state["lr_lambdas"] = state["lr_lambdas"][:1]  # one object for all groups
        return {name: value for name, value in state.items() if name not in ("base_lrs", "_last_lr")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Goes on from there."""
        super().load_state_dict(dict(state_dict))
        self.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
