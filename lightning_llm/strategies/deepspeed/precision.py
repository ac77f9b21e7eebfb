"""Precision on DeepSpeed's engine: Lightning's names, 16-bit weights with float32 masters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed.monitoring import printed
from lightning_llm.strategies.deepspeed.settings import HALF_PRECISIONS
from lightning_llm.strategies.deepspeed.zero import Gradients
from lightning_llm.strategies.precision import LLMPrecision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
BY_NORM_ALONE = (
    "gradient_clip_algorithm='value': DeepSpeed's engine clips by the norm alone. Use 'norm', or strategy=\"llm3d\"."
)


class DeepSpeedPrecision(LLMPrecision):
    """Precision of a run on DeepSpeed's engine.

    "bf16-mixed" and "bf16-true" (the same here, as in Lightning's own strategy for DeepSpeed): weights, activations and
    gradients in bfloat16, and float32 masters that the optimizer changes. "16-mixed" and "16-true": float16, with
    DeepSpeed's dynamic loss scale. "32-true".

    Raises:
        ConfigurationError: Another precision.
    """

    engine: Any = None
    gradients: Gradients | None = None

    def __init__(self, precision: str) -> None:
        if precision != "32-true" and precision not in HALF_PRECISIONS:
            raise ConfigurationError(
                f"precision={precision!r} is not available on DeepSpeed's engine. Use one of "
                f"{', '.join(['32-true', *HALF_PRECISIONS])}."
            )
        self.precision = precision  # type: ignore[assignment]
        self.scaler = None
        self._parameter_dtype = torch.float32  # until the engine casts
        self._finish_gradients = lambda: None

    def attach_engine(self, engine: Any, gradients: Gradients, finish_gradients: Callable[[], None]) -> None:
        """Connects it with a run's engine.

        Args:
            engine: DeepSpeed's.
            gradients: Of it.
            finish_gradients: Called once per optimizer step when gradients are complete, before hooks and clipping.
        """
        self.engine, self.gradients, self._finish_gradients = engine, gradients, finish_gradients

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of weights and activations in the engine."""
        return DTYPES.get(HALF_PRECISIONS.get(str(self.precision), ""), torch.float32)

    @property
    @override
    def loss_scale(self) -> float:
        return self.gradients.loss_scale if self.gradients is not None else 1.0

    @property
    def skipped_steps(self) -> int:
        """Steps of this run that were left out, since gradients had overflowed; `global_step` counts them."""
        return self.engine.skipped_steps if self.engine is not None else 0

    @override
    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:  # type: ignore[override]
        """The loss as it is: the engine scales it."""
        return super(LLMPrecision, self).pre_backward(tensor, module)  # type: ignore[return-value]

    @override
    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """The engine's backward, which reduces gradients too."""
        self.engine.backward(tensor, *args, **kwargs)

    @override
    def optimizer_step(self, optimizer: Any, model: Any, closure: Callable[[], Any], **kwargs: Any) -> Any:  # type: ignore[override]
        """Closure, hooks and clipping, then the engine's step, which leaves out one whose gradients overflow."""
        result = closure()
        self._after_closure(model, optimizer)
        assert self.gradients is not None
        with self.gradients.settled(), printed() if self.engine.wall_clock_breakdown() else nullcontext():
            step(self.engine)
        return result

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm over all axes, as `torch.nn.utils.clip_grad_norm_` does."""
        assert self.gradients is not None
        norm = self.gradients.norm()
        if bool(norm.isfinite()):
            self.gradients.scale((clip_val / (norm + 1e-6)).clamp(max=1.0))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Not offered.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(BY_NORM_ALONE)

    @property
    def _dynamic_scaler(self) -> Any:
        """DeepSpeed's, of float16; None where the scale does not change."""
        scaler = getattr(getattr(self.engine, "optimizer", None), "loss_scaler", None)
        return scaler if getattr(scaler, "dynamic", False) else None

    @override
    def state_dict(self) -> dict[str, Any]:
        """The loss scale, as `LossScaler` saves it, and how many overflows DeepSpeed still lets pass."""
        scaler = self._dynamic_scaler
        if scaler is None:
            return {}
        finite_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        if finite_steps > scaler.scale_window:
            finite_steps = (finite_steps - 1) % scaler.scale_window + 1
        return {"scale": scaler.cur_scale, "finite_steps": finite_steps, "hysteresis": scaler.cur_hysteresis}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The loss scale of a checkpoint, of either engine."""
        scaler = self._dynamic_scaler
        if scaler is not None and state_dict:
            scaler.cur_scale = float(state_dict["scale"])
            scaler.cur_iter, scaler.last_overflow_iter = int(state_dict["finite_steps"]), -1
            scaler.cur_hysteresis = int(state_dict.get("hysteresis", scaler.delayed_shift))

    @override
    def main_params(self, optimizer: Optimizer) -> Iterable[nn.Parameter]:  # type: ignore[override]
        return self.engine.module.parameters()


def step(engine: Any) -> None:
    """The engine's step; a pipeline engine has one that is not public, since it expects to run whole batches itself."""
    if engine.pipeline_parallelism:
        engine._exec_optimizer_step()
    else:
        engine.step()
