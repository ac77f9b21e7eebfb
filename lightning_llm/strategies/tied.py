"""Tied tensors under a pipeline: the first stage has the owner, the last one a copy, and both are kept equal.

llm3d.py calls these; stages.py makes the copies.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_llm.models.weights import WeightSource
from lightning_llm.planner.schedules import ScheduleKind
from lightning_llm.strategies.plan import ParallelPlan


class AliasedSource:
    """A weight source in which the copy of a tied tensor is read under its owner's name."""

    def __init__(self, source: WeightSource, plan: ParallelPlan) -> None:
        self._source = source
        self._owner_of = {copy: owner for owner, copy in plan.tied}

    def read(self, name: str, box: tuple[slice, ...], shape: tuple[int, ...]) -> Tensor:
        """See `WeightSource`."""
        return self._source.read(self._owner_of.get(name, name), box, shape)


def ends_group(
    dense_mesh: DeviceMesh, kind: ScheduleKind, timeout: timedelta | None = None
) -> dist.ProcessGroup | None:
    """The group of the ranks with the first and the last stage of this rank's pipeline. Collective.

    Args:
        dense_mesh: With the pipeline as its first axis.
        kind: The schedule; where it has both stages on one rank no group is needed.
        timeout: Of collectives within the group; None takes torch's default.

    Returns:
        None on ranks between, and where one rank has both.
    """
    loss_rank = kind.loss_rank(dense_mesh.shape[0])
    if loss_rank == 0:
        return None
    grid = dense_mesh.mesh.reshape(dense_mesh.shape[0], -1)
    mine = None
    for first, last in zip(grid[0].tolist(), grid[loss_rank].tolist(), strict=True):
        group = dist.new_group([first, last], timeout=timeout)
        if dist.get_rank() in (first, last):
            mine = group
    return mine


def add_tied_gradients(model: nn.Module, plan: ParallelPlan, ends: dist.ProcessGroup | None) -> None:
    """Sums the gradients of tensors that are tied across the first and the last stage, on both.

    The copies start equal and get equal gradients, so that equal optimizer steps keep them equal (Megatron-LM's
    scheme), be they on two ranks or on one.

    Args:
        model: What this rank has of the model, all its stages together.
        plan: Names the tied pairs.
        ends: What `ends_group` gave.
    """
    parameters = dict(model.named_parameters())
    for pair in plan.tied:
        held = [name for name in pair if name in parameters and parameters[name].requires_grad]
        gradients = [_local_gradient(parameters[name], name) for name in held]
        if len(gradients) == 2:
            total = gradients[0].add_(gradients[1])
            gradients[1].copy_(total)
        elif gradients and ends is not None:
            offloaded = gradients[0].device.type == "cpu" and dist.get_backend(ends) == "nccl"
            summed = gradients[0].cuda() if offloaded else gradients[0]
            dist.all_reduce(summed, group=ends)
            if offloaded:
                gradients[0].copy_(summed)


def _local_gradient(parameter: nn.Parameter, name: str) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, f"no gradient reached the tied tensor {name}"
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
