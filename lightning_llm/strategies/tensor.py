"""Tensor (and sequence) parallelism: each rank of the axis holds a slice of every matrix.

Megatron's column/row scheme (https://arxiv.org/abs/1909.08053) with its sequence parallelism
(https://arxiv.org/abs/2205.05198), by DTensor. Called once by llm3d.py on a model that is still on the meta device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.expert import RouterParallel, experts_of
from lightning_llm.strategies.plan import ParallelPlan, TensorStyle

SEQUENCE_DIM = 1  # of [batch, seq, hidden]
HEADS_DIM = 2  # of [batch, seq, heads, head_dim]
FEATURES_DIM = -1


class ReplicatedModule(ParallelStyle):
    """Parameters replicated over the axis as DTensors, plain tensors in and out.

    Every parameter of a tensor-parallel model is then a DTensor on the same mesh, which keeps gradient norms, optimizer
    states and checkpoints uniform.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            None,
            self._prepare_inputs,  # type: ignore[arg-type]  # the stub leaves out that the hook may return inputs
            lambda _, output, mesh: output.to_local(),
        )

    @staticmethod
    def _prepare_inputs(_: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        return tuple(DTensor.from_local(x, mesh, (Replicate(),), run_check=False) for x in inputs)


class ProjectionNorm(ReplicatedModule):
    """A norm over all features of a column-parallel projection: they are put together for it, and split again."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return distribute_module(
            module,
            device_mesh,
            None,
            self._prepare_inputs,  # type: ignore[arg-type]  # as above
            lambda _, output, mesh: output.redistribute(placements=(Shard(FEATURES_DIM),)).to_local(),
        )

    @staticmethod
    def _prepare_inputs(_: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
        split = (DTensor.from_local(x, mesh, (Shard(FEATURES_DIM),), run_check=False) for x in inputs)
        return tuple(x.redistribute(placements=(Replicate(),)) for x in split)


class GatherSequence(ParallelStyle):
    """A block's hidden states become one DTensor, replicated over the axis; other arguments pass as they are.

    Hidden states are the first positional argument or, as transformers' blocks call each other, the keyword
    `hidden_states` (torch's `PrepareModuleInput` wants to know beforehand which, and how many arguments there are).
    """

    def __init__(self, between: Placement) -> None:
        super().__init__()
        self.between = between

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def whole(x: torch.Tensor) -> DTensor:
            split = DTensor.from_local(x, device_mesh, (self.between,), run_check=False)
            return split.redistribute(placements=(Replicate(),))

        def gather(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if args:
                return (whole(args[0]), *args[1:]), keywords
            return args, {**keywords, "hidden_states": whole(keywords["hidden_states"])}

        module.register_forward_pre_hook(gather, with_kwargs=True)
        return module


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, plan: ParallelPlan, *, sequence_parallel: bool) -> None:
    """Replaces the parameters of `model` by DTensors sharded over `mesh` and hooks the collectives in, as `plan` says.

    Args:
        model: Whole model or one pipeline stage of it. Activations are `[batch, seq, hidden]`.
        mesh: The tensor-parallel axis.
        plan: Names the style of each module.
        sequence_parallel: Between the blocks each rank keeps `seq / tensor_parallel_size` of the sequence, so that
            norms and residuals are not computed `tensor_parallel_size` times; the sequence length must then divide.

    Raises:
        ConfigurationError: The plan leaves out parameters that each rank would train on its part of the sequence alone.
    """
    styles = _styles(sequence_parallel)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, module in list(model.named_modules()):
        for pattern, style in plan.tensor_parallel.items():
            if matches(name, pattern):
                parallelize_module(module, mesh, styles[style])
    for owner, copy in plan.tied:
        retie(model, owner, copy)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)  # torch's styles do not all keep it
    if sequence_parallel:
        experts = {id(p) for module in experts_of(model) for p in module.parameters()}
        plain = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in experts
        ]
        if plain:
            raise ConfigurationError(
                f"The plan of {type(model).__name__} gives no tensor-parallel style to {len(plain)} parameters, for "
                f"example {plain[:3]}. With sequence parallelism each rank would train its copy on a part of the "
                "sequence, and the copies would drift apart. Name their modules in `tensor_parallel` ('norm' is for "
                "whatever works on each position by itself), or set sequence_parallel to false."
            )


def logits_context() -> AbstractContextManager[None]:
    """Within it cross entropy takes logits that are split over the vocabulary. Both forward and backward need it."""
    return loss_parallel()


def retie(model: nn.Module, owner: str, copy: str) -> None:
    """Makes parameter `copy` the same object as `owner` again, if this stage has both."""
    owner_module, copy_module = (_parent(model, name) for name in (owner, copy))
    if owner_module is not None and copy_module is not None:
        parameter = getattr(owner_module, owner.rpartition(".")[2])
        copy_module.register_parameter(copy.rpartition(".")[2], parameter)


def _parent(model: nn.Module, parameter: str) -> nn.Module | None:
    modules = dict(model.named_modules())
    return modules.get(parameter.rpartition(".")[0])


def matches(name: str, pattern: str) -> bool:
    """Like a path: `*` does not cross a dot, so that `layers.*.mlp` is not `layers.0.mlp.gate.mlp`."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _styles(sequence_parallel: bool) -> dict[TensorStyle, ParallelStyle]:
    """What each style of a plan does, with activations split over the sequence or replicated between the blocks."""
    between: Placement = Shard(SEQUENCE_DIM) if sequence_parallel else Replicate()
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "norm": SequenceParallel(sequence_dim=SEQUENCE_DIM, use_local_output=True)
        if sequence_parallel
        else ReplicatedModule(),
        "head_norm": SequenceParallel(sequence_dim=HEADS_DIM, use_local_output=True),
        "projection_norm": ProjectionNorm(),
        "router": RouterParallel(sequence_parallel),
        # The block's projections share one DTensor input: their gradients are summed before the one reduce-scatter.
        "gather": GatherSequence(between),
        "column": ColwiseParallel(),
        "row": RowwiseParallel(output_layouts=between),
        "vocabulary": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }


def to_plain(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's whole value on every rank; other tensors as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
