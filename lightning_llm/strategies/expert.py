"""Expert parallelism: each rank of the axis holds some experts of every layer, and tokens travel to theirs.

Two all-to-alls around the stacked experts of a mixture (GShard, https://arxiv.org/abs/2006.16668), with as many tokens
as each expert really gets: nothing is dropped or padded. Called once by llm3d.py on a model on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lightning_llm.models.moe import Experts, Router
from lightning_llm.strategies.collectives import all_to_all
from lightning_llm.strategies.mesh import Meshes, ParallelDims


class _Journey(NamedTuple):
    """How one batch of tokens came to this rank's experts, to send the results back."""

    sent: list[int]
    received: list[int]
    order: Tensor


class TokenExchange:
    """Sends tokens to the ranks that have their experts, and the results back.

    The module is called with `(tokens [n, hidden], counts [experts])`, tokens sorted by expert, and sees
    `(tokens of its own experts, counts [experts / ranks])`.

    Args:
        group: The ranks that the experts are spread over, in order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_world_size(group)

    def attach(self, module: Experts) -> None:
        """Hooks both ways in around a module."""
        module.register_forward_pre_hook(self.dispatch)
        module.register_forward_hook(lambda module, _, output: self.combine(module, output))

    def dispatch(self, module: Any, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What this rank's experts are called with."""
        tokens, counts = inputs
        outgoing = counts.view(self._ranks, -1)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self._group)
        # The splits of the exchange are needed on the host, whatever the device: this waits for it.
        sent, received = outgoing.sum(1).tolist(), incoming.sum(1).tolist()
        tokens = all_to_all(tokens, self._group, sent, received)
        # They come by source rank, then by expert; experts want them together.
        expert = torch.arange(incoming.shape[1], device=counts.device).repeat(self._ranks)
        order = torch.repeat_interleave(expert, incoming.flatten()).argsort(stable=True)
        module.journey = _Journey(sent, received, order)
        return tokens.index_select(0, order), incoming.sum(0)

    def combine(self, module: Any, output: Tensor) -> Tensor:
        """What they returned, where the tokens came from."""
        sent, received, order = module.journey
        module.journey = None
        return all_to_all(output.index_select(0, order.argsort()), self._group, received, sent)


class ExpertParallel(ParallelStyle):
    """Shards the experts (dim 0 of each parameter) as DTensors, with a `TokenExchange` around them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Experts)
        distribute_module(module, device_mesh, self._shard)
        TokenExchange(device_mesh.get_group()).attach(module)
        return module

    @staticmethod
    def _shard(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in module.named_parameters(recurse=False):
            module.register_parameter(
                name,
                nn.Parameter(distribute_tensor(parameter, mesh, [Shard(0)]), requires_grad=parameter.requires_grad),
            )


def apply_expert_parallel(model: nn.Module, meshes: Meshes, *, sequence_parallel: bool) -> None:
    """Spreads the experts of `model` over the expert axis and tells its routers whom they share tokens with.

    Args:
        model: Whole model, or what a rank holds of it.
        meshes: With the expert view.
        sequence_parallel: Tensor ranks hold different tokens between the blocks; otherwise they hold the same.
    """
    assert meshes.expert is not None
    if meshes.expert["ep"].size() > 1:
        for experts in experts_of(model):
            parallelize_module(experts, meshes.expert["ep"], ExpertParallel())
    connect_routers(model, meshes, sequence_parallel=sequence_parallel)


def connect_routers(model: nn.Module, meshes: Meshes, *, sequence_parallel: bool) -> None:
    """Tells the routers of `model` whom they share sequences with, and who has other tokens; see above."""
    split = sequence_parallel and meshes.dims.tensor_parallel_size > 1
    tensor = [meshes.tensor] if split else []
    context = [meshes.context] if meshes.grid is not None else []
    data = [meshes.dense["dp_replicate"], meshes.dense["fsdp"]]
    for module in model.modules():
        if isinstance(module, Router):
            module.sequence_sum = _sum_over([*context, *tensor])
            module.data_sum = _sum_over([*data, *tensor])


def expert_gradient_factor(dims: ParallelDims, *, sequence_parallel: bool) -> float:
    """What FSDP's mean of an expert's gradients is multiplied by, to be the mean over batches that others' are.

    Experts get tokens from every rank of their expert axis, whose gradients their own backward has summed up; FSDP
    averages over the ranks that shard them. Together that is the sum over data, context and tensor ranks, of which
    tensor ranks hold parts of one batch. Without sequence parallelism they hold the same tokens instead.
    """
    parts = dims.tensor_parallel_size if sequence_parallel else 1
    return parts / dims.expert_parallel_size


def experts_of(model: nn.Module) -> list[Experts]:
    """The stacked experts of every layer."""
    return [module for module in model.modules() if isinstance(module, Experts)]


class RouterParallel(ParallelStyle):
    """A router's weight on every tensor rank, its inputs plain tensors: with sequence parallelism a slice each.

    Args:
        sequence_parallel: The ranks route different tokens, so that their gradients add up.
    """

    def __init__(self, sequence_parallel: bool) -> None:
        super().__init__()
        self._gradient = Partial() if sequence_parallel else Replicate()

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Router)
        module.local = self._local
        # The weight alone: the bias is added to plain scores.
        weight = module.weight
        module.weight = nn.Parameter(
            distribute_tensor(weight, device_mesh, [Replicate()]), requires_grad=weight.requires_grad
        )
        return module

    def _local(self, weight: Tensor) -> Tensor:
        assert isinstance(weight, DTensor)
        return weight.to_local(grad_placements=[self._gradient])


def _sum_over(meshes: list[DeviceMesh]) -> Callable[[Tensor], Tensor]:
    """Sums a tensor of counts over every rank that differs in the coordinates of these axes."""
    groups = [mesh.get_group() for mesh in meshes if mesh.size() > 1]

    def total(counts: Tensor) -> Tensor:
        summed = counts.clone()
        for group in groups:
            dist.all_reduce(summed, group=group)
        return summed

    return total
