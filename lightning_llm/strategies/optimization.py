"""The optimizer's side of a parallel run: gradient norms over mixed meshes and stages, precision, and the loop's order.

llm3d.py installs `LLMPrecision` and `PipelineOptimization`; users keep `Trainer(gradient_clip_val=..., precision=...)`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from lightning.pytorch.plugins.precision import Precision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_llm.errors import ConfigurationError

PARAMETER_DTYPES = {
    "64-true": torch.float64,
    "32-true": torch.float32,
    "bf16-mixed": torch.float32,
    "bf16-true": torch.bfloat16,
}


def align_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Gives every gradient its parameter's placements.

    Autograd leaves a DTensor's gradient as the last operation made it: partial sums, or whole where the parameter is
    sharded.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
            if gradient.placements != parameter.placements:
                parameter.grad = gradient.redistribute(placements=parameter.placements)


def gradient_norm(parameters: Iterable[nn.Parameter], ranks_per_stage: int) -> Tensor:
    """Euclidean norm of all gradients of the model, over every axis: the number a single process would compute.

    `torch.nn.utils.get_total_norm` takes gradients of one mesh only and knows nothing of other pipeline stages. Here
    each rank adds the squares that it holds, divided by the number of ranks that hold the same ones; one all-reduce
    sums them up.

    Args:
        parameters: This rank's parameters, each tensor once (leave out a stage's copy of a tied one).
        ranks_per_stage: World size / pipeline stages.

    Returns:
        Scalar, equal on all ranks.
    """
    by_copies: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            shards = math.prod(
                size
                for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True)
                if not placement.is_replicate()
            )
            by_copies[ranks_per_stage // shards].append(gradient.to_local())
        elif gradient is not None:
            by_copies[ranks_per_stage].append(gradient)
    # Squares are added up in float32 at least: in bfloat16 a hundred ranks' shares would vanish beside their sum.
    norms = [_at_least_float32(torch.nn.utils.get_total_norm(grads)) ** 2 / n for n, grads in by_copies.items()]
    squares = torch.stack(norms).sum() if norms else torch.zeros(())
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scale_gradients(parameters: Iterable[nn.Parameter], max_norm: float, total_norm: Tensor) -> None:
    """Multiplies all gradients by `min(1, max_norm / total_norm)`, as `torch.nn.utils.clip_grads_with_norm_` does."""
    factor = (max_norm / (total_norm + 1e-6)).clamp(max=1.0)
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor.to(gradient.dtype))


class LLMPrecision(Precision):
    """Precision of a parallel run: Lightning's names, with gradient norms that are right on every layout.

    Args:
        precision: "64-true", "32-true", "bf16-true", or "bf16-mixed" (weights in float32, matrices in bfloat16 by
            autocast).
        device_type: Gives the device type of the autocast region. Asked late: Lightning makes the precision before it
            tells the strategy its devices.
        finish_gradients: Called once per optimizer step when this rank's gradients are complete, before hooks and
            clipping.
        norm: Computes the global gradient norm.

    Raises:
        ConfigurationError: Another precision.
    """

    def __init__(
        self,
        precision: str,
        device_type: Callable[[], str],
        finish_gradients: Callable[[], None],
        norm: Callable[[], Tensor],
    ) -> None:
        if precision not in PARAMETER_DTYPES:
            raise ConfigurationError(
                f"precision={precision!r} is not available here. Use one of {', '.join(PARAMETER_DTYPES)}."
            )
        self.precision = precision  # type: ignore[assignment]
        self._parameter_dtype = PARAMETER_DTYPES[precision]
        self._device_type = device_type
        self._finish_gradients = finish_gradients
        self._norm = norm

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Parameters in this precision's dtype."""
        return module.to(self._parameter_dtype)

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

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Autocast for mixed precision; the default dtype for true precision."""
        if self.precision == "bf16-mixed":
            with torch.autocast(self._device_type(), dtype=torch.bfloat16):
                yield
        else:
            with self.tensor_init_context():
                yield

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        self._finish_gradients()
        super()._after_closure(model, optimizer)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips by the norm over all axes (`Trainer(gradient_clip_val=...)`)."""
        scale_gradients(self.main_params(optimizer), float(clip_val), self._norm())

    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clips each element (`Trainer(gradient_clip_algorithm="value")`); needs no other rank."""
        for parameter in self.main_params(optimizer):
            if parameter.grad is not None:
                gradient = parameter.grad
                (gradient.to_local() if isinstance(gradient, DTensor) else gradient).clamp_(-clip_val, clip_val)


class PipelineClosure(Closure):
    """Zeroes the gradients before the step instead of after it.

    Lightning's order is step, zero_grad, backward. A pipeline's step has run the backward already: zeroing after it
    would wipe every gradient without any error.
    """

    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> Any:
        """One zero_grad, step (forward and backward of the schedule), and the hooks of a backward."""
        if self._zero_grad_fn is not None:
            self._zero_grad_fn()
        output = self._step_fn()
        if self._backward_fn is not None and output.closure_loss is not None:
            self._backward_fn(output.closure_loss)
        return output


class PipelineOptimization(_AutomaticOptimization):
    """Lightning's automatic optimization with `PipelineClosure`. Read against lightning 2.6.6; see tests/strategies."""

    @classmethod
    def install(cls, trainer: Any) -> None:
        """Swaps it into the trainer's fit loop, progress included. Idempotent."""
        epoch_loop = trainer.fit_loop.epoch_loop
        if not isinstance(epoch_loop.automatic_optimization, cls):
            loop = cls(trainer)
            loop.optim_progress = epoch_loop.automatic_optimization.optim_progress
            epoch_loop.automatic_optimization = loop

    def _make_closure(self, kwargs: Any, optimizer: Optimizer, batch_idx: int) -> Closure:
        return PipelineClosure(
            step_fn=self._make_step_fn(kwargs),
            backward_fn=self._make_backward_fn(optimizer),
            zero_grad_fn=self._make_zero_grad_fn(batch_idx, optimizer),
        )
