"""Sharded data parallelism: parameters, gradients and optimizer states split over the data ranks (FSDP2, ZeRO-3).

Called once by llm3d.py, after the other axes: a parameter may already be a tensor-parallel DTensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

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
        ConfigurationError: Parameters sit on the module itself, where no forward of a child would gather them, or are
            shared by two children, which are gathered at different times.
    """
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if own:
        raise ConfigurationError(
            f"{type(module).__name__} holds the parameters {own} itself. Put them into a submodule (for example "
            "self.model) so that they can be sharded, or give that submodule a ParallelPlan."
        )
    owners: dict[int, str] = {}
    for name, child in module.named_children():
        for parameter in child.parameters():
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ConfigurationError(
                    f"{type(module).__name__}.{other} and .{name} share a parameter, and each is sharded by itself. "
                    "Put both into one submodule (for example self.model)."
                )
    for child in module.children():
        if any(True for _ in child.parameters()):
            apply_sharding(child, blocks_of(child), mesh, reshard_after_forward=reshard_after_forward)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost elements of the module lists in `model`: what is repeated is worth gathering one by one.

    A block that shares a parameter with another part of the model (a tied embedding) is left out; the root gathers it.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))

    def find(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(module, nn.ModuleList) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
                own = Counter(id(parameter) for _, parameter in child.named_parameters(remove_duplicate=False))
                if own and all(uses[parameter] == count for parameter, count in own.items()):
                    yield child
            else:
                yield from find(child)

    return list(find(model))


def local_shard(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...], tuple[int, ...]]:
    """What this rank holds of a parameter: `(local tensor, its place in the global tensor, global shape)`."""
    shape = tuple(parameter.shape)
    if not isinstance(parameter, DTensor):
        return parameter.data, tuple(slice(0, size) for size in shape), shape
    # The protocol by which torch.distributed.checkpoint asks for it; knows uneven and strided (2-D) shards.
    (chunk,) = parameter.__create_chunk_list__()
    box = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    return parameter.to_local().data, box, shape
