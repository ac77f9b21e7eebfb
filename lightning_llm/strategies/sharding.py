"""Sharded data parallelism: parameters, gradients and optimizer states split over the data ranks (FSDP2, ZeRO).

Called once by llm3d.py, after the other axes: a parameter may already be a tensor- or expert-parallel DTensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_llm.errors import ConfigurationError

ZeroStage = Literal[0, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How parameters are stored, gathered and reduced; the keywords of `fully_shard`.

    Attributes:
        mesh: `(fsdp)`, or `(dp_replicate, fsdp)` for replicas of shards.
        reshard_after_forward: Free a unit's whole parameters after its forward (ZeRO-3), or keep them until the
            backward. Under a pipeline keeping them saves a gather for every microbatch.
        mp_policy: In what precision modules compute and gradients are reduced.
        offload_policy: Where the shards are between steps.
    """

    mesh: DeviceMesh
    reshard_after_forward: bool
    mp_policy: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    offload_policy: OffloadPolicy = field(default_factory=OffloadPolicy)

    def apply(self, module: nn.Module, **keywords: Any) -> None:
        """Shards what is not sharded yet of `module`."""
        fully_shard(module, **{**vars(self), **keywords})


def apply_sharding(model: nn.Module, units: Iterable[nn.Module], sharding: Sharding) -> None:
    """Shards each of `units` and what is left of `model`. Gradients are averaged over the ranks of the mesh.

    Args:
        model: Root whose `forward` the training step (or a pipeline) calls.
        units: Modules gathered and freed as one, usually the blocks.
        sharding: How.
    """
    for unit in units:
        sharding.apply(unit)
    # What is left of the root is used at both ends of the forward: it stays gathered, for the backward begins with it.
    sharding.apply(model, reshard_after_forward=False)


def apply_expert_sharding(experts: Iterable[nn.Module], mesh: DeviceMesh, sharding: Sharding) -> None:
    """Shards stacked experts over a mesh of their own, before the blocks that they are in.

    Args:
        experts: Modules with parameters `[experts, ...]`.
        mesh: `(efsdp)` or `(dp_replicate, efsdp)`, of the expert view.
        sharding: As for the rest of the model, its mesh apart.
    """
    shards = mesh["efsdp"].size()

    def placement(parameter: nn.Parameter) -> Shard:
        # Dim 0 is the experts, which may be fewer than the ranks; another dim must divide.
        return Shard(1) if parameter.shape[1] % shards == 0 else Shard(0)

    for module in experts:
        sharding.apply(module, mesh=mesh, shard_placement_fn=placement)


def set_accumulation(roots: Iterable[FSDPModule], zero_stage: ZeroStage, *, last: bool) -> None:
    """What happens between the batches that make up one optimizer step.

    Stages 0 and 1 reduce gradients once a step, after the last batch, and hold whole ones until then; 2 and 3 reduce
    after every batch. Stages below 3 keep the gathered parameters over all batches of a step. Replicas exchange
    gradients once a step in any stage.

    Args:
        roots: Root modules that `apply_sharding` made.
        zero_stage: Of the run.
        last: Whether an optimizer step follows the batch.
    """
    for root in roots:
        root.set_requires_gradient_sync(last or zero_stage >= 2)
        root.set_requires_all_reduce(last)
        root.set_reshard_after_backward(last or zero_stage == 3)


def reshard_all(module: nn.Module) -> None:
    """Frees what evaluations left gathered.

    Whole parameters in the place of their shards would be what an optimizer is made of, or would hide loaded weights.
    """
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard_without_plan(module: nn.Module, sharding: Sharding) -> list[FSDPModule]:
    """Shards a module that offers no plan: each child, with the blocks of its module lists, is a unit of its own.

    Returns:
        The sharded children.

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
    roots: list[nn.Module] = []
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            roots += [element for element in child.modules() if _is_outermost(element, child)]
        elif any(True for _ in child.parameters()):
            roots.append(child)
            for block in blocks_of(child):
                sharding.apply(block)
    # What the module itself computes with their outputs, a loss most of all, is computed in float32.
    mixed = sharding.mp_policy.param_dtype is not None
    policy = replace(sharding.mp_policy, output_dtype=torch.float32) if mixed else sharding.mp_policy
    for root in roots:
        sharding.apply(root, mp_policy=policy)
    return [root for root in roots if isinstance(root, FSDPModule)]


def _is_outermost(element: nn.Module, container: nn.Module) -> bool:
    """Whether an element of nested lists has parameters and a forward of its own."""
    lists = (nn.ModuleList, nn.ModuleDict)
    if isinstance(element, lists) or not any(True for _ in element.parameters()):
        return False
    within = [module for module in container.modules() if isinstance(module, lists)]
    return any(element is child for module in within for child in module.children())


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
