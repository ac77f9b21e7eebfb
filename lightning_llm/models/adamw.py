"""AdamW with moments in a type of their own. optimizers.py chooses it; Muon uses it for what is not a hidden matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from lightning_llm.models.moe import local_tensor


class CastingAdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) whose moments have a type of their own; it computes in float32 at least.

    Moments in bfloat16 halve the state of float32 parameters, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437,
    section 3.3.2); moments in float32 serve bfloat16 parameters better than moments of their type. One parameter is
    cast at a time, so that a step needs little memory of its own. Each rank works on its shards alone.

    Args:
        params: Parameters or groups of them. Gradients of DTensors must have their placements.
        lr: Learning rate.
        betas: Moving-average factors.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times the learning rate.
        state_dtype: Of the moments; float64 parameters have float64 ones instead of float32.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: torch.dtype = torch.bfloat16,
        **defaults: Any,
    ) -> None:
        # Not in the groups: they are loaded from checkpoints, whose run may have had another one.
        self.state_dtype = state_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **defaults})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what the closure does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update([parameter for parameter in group["params"] if parameter.grad is not None], group)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            moments = self._moments(parameter, "exp_avg", "exp_avg_sq")
            state = self.state[parameter]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            stored = [local_tensor(tensor) for tensor in (parameter, *moments)]
            weight, exp_avg, exp_avg_sq = (tensor.to(compute_dtype(parameter)) for tensor in stored)
            adamw(
                [weight],
                [local_gradient(parameter)],
                [exp_avg],
                [exp_avg_sq],
                [],
                [state["step"]],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for before, after in zip(stored, (weight, exp_avg, exp_avg_sq), strict=True):
                store(before, after)

    def _moments(self, parameter: nn.Parameter, *names: str) -> list[Tensor]:
        """State tensors of a parameter, sharded as it is; zeros at first."""
        state = self.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=stored_dtype(parameter, self.state_dtype))
        return [state[name] for name in names]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over groups and state. torch's own would store the state in the parameters' type."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                dtype = value.dtype if name == "step" else stored_dtype(parameter, self.state_dtype)
                self.state[parameter][name] = value.to(parameter.device, dtype)


def compute_dtype(parameter: Tensor) -> torch.dtype:
    """In which an optimizer computes: the parameter's, and float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


def stored_dtype(parameter: Tensor, state_dtype: torch.dtype) -> torch.dtype:
    """Of a parameter's state, of which `state_dtype` is asked for: "float32" means at least that."""
    return compute_dtype(parameter) if state_dtype == torch.float32 else state_dtype


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's shard of the gradient, to compute with."""
    gradient = parameter.grad
    assert gradient is not None
    if isinstance(parameter, DTensor):
        assert isinstance(gradient, DTensor) and gradient.placements == parameter.placements, "see align_gradients"
    return local_tensor(gradient).to(compute_dtype(parameter))


def store(stored: Tensor, computed: Tensor) -> None:
    """Puts a result where it belongs, unless it was computed there."""
    if computed is not stored:
        stored.copy_(computed)
