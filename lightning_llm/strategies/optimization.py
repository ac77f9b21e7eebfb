"""The optimizer's side of a parallel run: gradient norms over mixed meshes and stages, and the loop's order.

llm3d.py and precision.py call it; users keep `Trainer(gradient_clip_val=...)`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.loops.optimization.automatic import Closure, _AutomaticOptimization
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


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


def gradient_norm(parameters: Iterable[nn.Parameter], ranks_per_stage: int, device: torch.device) -> Tensor:
    """Euclidean norm of all gradients of the model, over every axis: the number a single process would compute.

    `torch.nn.utils.get_total_norm` takes gradients of one mesh only and knows nothing of other pipeline stages. Here
    each rank adds the squares that it holds, divided by the number of ranks that hold the same ones; one all-reduce
    sums them up.

    Args:
        parameters: This rank's parameters, each tensor once (leave out a stage's copy of a tied one).
        ranks_per_stage: World size / pipeline stages.
        device: Where collectives run; gradients may be elsewhere (offloaded).

    Returns:
        Scalar on `device`, equal on all ranks.
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
    squares = (torch.stack(norms).sum() if norms else torch.zeros(())).to(device)
    if dist.is_initialized():
        dist.all_reduce(squares)
    return squares.sqrt()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def local_gradients(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """What this rank holds of each gradient, to be changed in place."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    """Multiplies all gradients by one number."""
    for gradient in local_gradients(parameters):
        gradient.mul_(factor.to(gradient.device, gradient.dtype) if isinstance(factor, Tensor) else factor)


def one_optimizer_has_all(optimizers: list[Optimizer], module: nn.Module) -> bool:
    """Whether this rank's trainable parameters are all in one optimizer."""
    trainable = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    return len(optimizers) == 1 and trainable <= {
        id(parameter) for group in optimizers[0].param_groups for parameter in group["params"]
    }


class AccumulatedTokens:
    """Makes several batches that lead to one optimizer step count by their tokens, as one large batch would.

    Lightning averages the batches' mean losses, which is the mean over all tokens only where batches have equally many.
    Here each batch's loss is weighted by its tokens over the first batch's, so that gradients keep their magnitude, and
    the sum is put right at the end, when all counts are known.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._total: Tensor | None = None

    def add(self, tokens: Tensor) -> Tensor:
        """Takes up a batch of so many tokens; returns the weight of its mean loss."""
        if self._first is None or self._total is None:
            # A batch without any is possible; whatever the first is, it cancels out in the end.
            self._first, self._total = tokens.clamp(min=1), tokens
        else:
            self._total = self._total + tokens
        return tokens / self._first

    def close(self, divisor: int) -> Tensor | None:
        """Ends the step; returns what its gradients are multiplied by, or None where nothing was added.

        Args:
            divisor: What each batch's loss was divided by (`accumulate_grad_batches`).
        """
        if self._first is None or self._total is None:
            return None
        factor = divisor * self._first / self._total
        self._first = self._total = None
        return factor


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
