"""Sharded data parallelism: parameters, gradients and optimizer states split over the data ranks (FSDP2, ZeRO-3).

Called once by llm3d.py, after the other axes: a parameter may already be a tensor-parallel DTensor.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_llm.errors import ConfigurationError


def apply_sharding(model: nn.Module, units: list[nn.Module], mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Shards each of `units` and what is left of `model` over `mesh`. Gradients are averaged over the data ranks.

    Args:
        model: Root whose `forward` the training step calls.
        units: Modules gathered and freed as one, usually the blocks.
        mesh: `(dp_shard)`, or `(dp_replicate, dp_shard)` for hybrid sharding.
        reshard_after_forward: Free a unit's whole parameters after its forward (ZeRO-3) or keep them until the backward
            (ZeRO-2). Under a pipeline keeping them saves a gather for every microbatch.
    """
    for unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard_after_forward)


def shard_without_plan(module: nn.Module, mesh: DeviceMesh, *, reshard_after_forward: bool) -> None:
    """Shards a module that offers no plan: each child, with the blocks of its module lists, is a unit of its own.

    Raises:
        ConfigurationError: Parameters sit on the module itself, where no forward of a child would gather them.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ConfigurationError(
            f"{type(module).__name__} holds the parameters {own} itself. Put them into a submodule (for example "
            "self.model) so that they can be sharded, or give that submodule a ParallelPlan."
        )
    for child in module.children():
        if any(True for _ in child.parameters()):
            lists = [m for m in child.modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
            units = [unit for container in lists for unit in container.children()]
            apply_sharding(child, units, mesh, reshard_after_forward=reshard_after_forward)


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...], tuple[int, ...]]:
    """What this rank holds of a parameter: `(local tensor, its place in the global tensor, global shape)`."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter.data, tuple(slice(0, size) for size in shape), shape
    # The protocol by which torch.distributed.checkpoint asks for it; knows uneven and strided (2-D) shards.
    (chunk,) = parameter.__create_chunk_list__()
    box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return parameter.to_local().data, box, shape
