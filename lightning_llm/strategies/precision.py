"""Precision of a parallel run: Lightning's names, FSDP's mixed precision, and gradients that are finite on every rank.

llm3d.py puts `LLMPrecision` in the place of the precision that Lightning made of `Trainer(precision=...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.optimization import local_gradients, scale_gradients

PARAMETER_DTYPES = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.float32,
    "16-mixed": torch.float32,
}
COMPUTE_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class LossScaler:
    """Keeps float16 gradients within range: the loss is multiplied by a power of two that follows what overflows.

    The scheme of `torch.amp.GradScaler` (https://arxiv.org/abs/1710.03740), for gradients that are spread over ranks:
    whether a step is finite is read off the gradient norm over all axes, so every rank decides the same.

    Args:
        scale: To begin with.
        growth_interval: Finite steps after which the scale doubles; an overflow halves it.
    """

    def __init__(self, scale: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.scale = scale
        self.growth_interval = growth_interval
        self.finite_steps = 0

    def update(self, finite: bool) -> None:
        """Adapts the scale after a step."""
        self.finite_steps = self.finite_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.finite_steps >= self.growth_interval:
            self.scale *= 2
            self.finite_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"scale": self.scale, "finite_steps": self.finite_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.scale, self.finite_steps = float(state["scale"]), int(state["finite_steps"])


class LLMPrecision(Precision):
    """Precision of a parallel run.

    Mixed precision is FSDP's: shards in float32, computation and gathered weights in 16 bits, gradients reduced in
    float32. It holds on every layout, one process included, so that a layout does not change the run.

    Args:
        precision: "64-true", "32-true", "bf16-true", "bf16-mixed", or "16-mixed" (with a `LossScaler`).

    Raises:
        ConfigurationError: Another precision.
    """

    def __init__(self, precision: str) -> None:
        if precision not in PARAMETER_DTYPES:
            raise ConfigurationError(
                f"precision={precision!r} is not available here. Use one of {', '.join(PARAMETER_DTYPES)}."
            )
        self.precision = precision  # type: ignore[assignment]
        self.scaler = LossScaler() if precision == "16-mixed" else None
        self._parameter_dtype = PARAMETER_DTYPES[precision]
        self._finish_gradients: Callable[[], None] = lambda: None
        self._norm: Callable[[list[nn.Parameter] | None], Tensor] | None = None

    def attach(self, finish_gradients: Callable[[], None], norm: Callable[[list[nn.Parameter] | None], Tensor]) -> None:
        """Connects it with a strategy.

        Args:
            finish_gradients: Called once per optimizer step when this rank's gradients are complete, before hooks and
                clipping.
            norm: Computes the gradient norm over all axes, of some parameters or, for None, of all.
        """
        self._finish_gradients = finish_gradients
        self._norm = norm

    @property
    def mp_policy(self) -> MixedPrecisionPolicy:
        """What `fully_shard` gets."""
        dtype = COMPUTE_DTYPES.get(str(self.precision))
        return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()

    @property
    def is_mixed(self) -> bool:
        """Whether computation has another dtype than the stored parameters."""
        return str(self.precision) in COMPUTE_DTYPES

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before a backward."""
        return self.scaler.scale if self.scaler is not None else 1.0

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Parameters in this precision's dtype."""
        return module.to(self._parameter_dtype)

    @override
    @contextmanager
    def tensor_init_context(self) -> Generator[None, None, None]:
        """New tensors get this precision's parameter dtype."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self._parameter_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    module_init_context = tensor_init_context
    forward_context = tensor_init_context

    @override
    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:  # type: ignore[override]
        """The loss, scaled for float16."""
        return super().pre_backward(tensor * self.loss_scale if self.scaler is not None else tensor, module)  # type: ignore[return-value]

    @override
    def optimizer_step(  # type: ignore[override]  # Fabric calls it without model and closure, the Trainer with them
        self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """A step; in float16 one that is left out where a gradient overflowed on any rank."""
        if self.scaler is None:
            return super().optimizer_step(optimizer, model, closure, **kwargs)
        assert self._norm is not None
        result = closure()
        self._after_closure(model, optimizer)
        finite = bool(self._norm(None).isfinite())
        if finite:
            optimizer.step(**kwargs)
        self.scaler.update(finite)
        return result

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        if self.scaler is not None:
            scale_gradients(self.main_params(optimizer), 1 / self.scaler.scale)
        self._finish_gradients()
        if self.scaler is not None and self._norm is not None:
            self._norm(None)  # as the gradients are, infinite or not, before anything clips them
        super()._after_closure(model, optimizer)

    @override
    def clip_gradients(
        self, optimizer: Any, clip_val: int | float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clips finished gradients, also where the user calls it (manual optimization)."""
        self._finish_gradients()
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm over all axes (`Trainer(gradient_clip_val=...)`), as `torch.nn.utils.clip_grad_norm_`."""
        assert self._norm is not None
        parameters = list(self.main_params(optimizer))
        scale_gradients(parameters, (clip_val / (self._norm(parameters) + 1e-6)).clamp(max=1.0))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips each element (`Trainer(gradient_clip_algorithm="value")`); needs no other rank."""
        for gradient in local_gradients(self.main_params(optimizer)):
            gradient.clamp_(-clip_val, clip_val)

    @override
    def state_dict(self) -> dict[str, Any]:
        """The loss scale."""
        return self.scaler.state_dict() if self.scaler is not None else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The loss scale of a checkpoint."""
        if self.scaler is not None and state_dict:
            self.scaler.load_state_dict(state_dict)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The loss scale that the other engine's strategy saved; Lightning keeps it under the plug-in's name."""
        for name in {"LLMPrecision", "DeepSpeedPrecision"} & checkpoint.keys() - {type(self).__qualname__}:
            self.load_state_dict(checkpoint[name])
