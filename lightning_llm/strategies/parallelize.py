"""The one order in which a model is taken apart; each step is a file of its own.

llm3d.py calls `parallelize` with a run's real process groups, the planner's dry run with made-up ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.moe import Experts
from lightning_llm.strategies.compile import apply_compile, settle_outputs
from lightning_llm.strategies.context import ContextParallel
from lightning_llm.strategies.expert import apply_expert_parallel, experts_of
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import Meshes
from lightning_llm.strategies.plan import ParallelPlan
from lightning_llm.strategies.recompute import apply_recompute
from lightning_llm.strategies.sharding import (
    Sharding,
    apply_expert_sharding,
    apply_sharding,
    blocks_of,
    shard_without_plan,
)
from lightning_llm.strategies.stages import keep_stages, split_units
from lightning_llm.strategies.tensor import apply_tensor_parallel


@dataclass(kw_only=True)
class Parts:
    """What this rank has of a model.

    Attributes:
        stages: Pipeline stages by number, in the order of the model; without a pipeline the model is stage 0.
        roots: FSDP root modules.
        context: The context axis, if there is one.
        experts: Stacked experts that are sharded over a mesh of their own.
    """

    stages: dict[int, nn.Module]
    roots: list[FSDPModule] = field(default_factory=list)
    context: ContextParallel | None = None
    experts: list[Experts] = field(default_factory=list)


def parallelize(
    model: nn.Module,
    plan: ParallelPlan | None,
    meshes: Meshes,
    layout: Layout,
    *,
    device: torch.device,
    mp_policy: MixedPrecisionPolicy,
) -> Parts:
    """Cuts `model` in place: stages -> context -> tensor -> experts -> recompute -> compile -> shard.

    Args:
        model: Whole, on the meta device or with equal weights on all ranks.
        plan: Its plan; None shards it over the data ranks alone.
        meshes: The process groups.
        layout: How.
        device: Where this rank computes.
        mp_policy: Mixed precision.
    """
    dims = meshes.dims
    sharding = Sharding(
        mesh=meshes.sharding,
        reshard_after_forward=layout.zero_stage == 3 and dims.pipeline_parallel_size == 1,
        mp_policy=mp_policy,
        offload_policy=_offload_policy(layout, device),
    )
    # With one rank on its mesh FSDP is still what computes in mixed precision and offloads.
    sharded = dims.gradient_ranks > 1 or mp_policy.param_dtype is not None or layout.offload_parameters is not None
    if plan is None:
        parts = Parts(stages={0: model})
        blocks = [block for child in model.children() for block in blocks_of(child)]
        apply_recompute(blocks, layout.recompute)
        if layout.compile:
            apply_compile(blocks or list(model.children()))
        if sharded:
            parts.roots = shard_without_plan(model, sharding)
        return parts

    parts = Parts(stages=_stages(model, plan, meshes, layout))
    if plan.forward is not None and dims.model_parallel_size > 1:
        sequence_ranks = dims.tensor_parallel_size if layout.sequence_parallel else 1
        for stage in parts.stages.values():
            stage.forward = partial(plan.forward, stage, sequence_ranks=sequence_ranks)  # type: ignore[method-assign]
    if dims.context_parallel_size > 1:
        parts.context = ContextParallel(meshes.context, layout.context_parallel_method)
        for stage in parts.stages.values():
            parts.context.attach(stage)
    if dims.tensor_parallel_size > 1:
        for stage in parts.stages.values():
            apply_tensor_parallel(stage, meshes.tensor, plan, sequence_parallel=layout.sequence_parallel)
    experts = experts_of(model)
    if experts and meshes.expert is None and dims.world_size > 1:
        raise ConfigurationError(
            "The model has experts, which was not known when the processes were arranged. Give the LightningModule a "
            "method build_model() that returns the model, or build it in __init__."
        )
    if experts and meshes.expert is not None:
        apply_expert_parallel(model, meshes, sequence_parallel=layout.sequence_parallel)
    units = plan.units(model)
    apply_recompute(units, layout.recompute)
    if layout.compile:
        if dims.tensor_parallel_size > 1:
            modules = dict(model.named_modules())
            settle_outputs([modules[name] for name in plan.pipeline_first if name in modules])
        apply_compile(units)
    if experts and meshes.expert is not None:
        apply_expert_sharding(experts, meshes.expert_sharding, sharding)
        parts.experts = experts
        sharded = True  # a pipeline holds gradients back until its last microbatch only where a stage is sharded
    if sharded:
        for stage in parts.stages.values():
            apply_sharding(stage, plan.units(stage), sharding)
        parts.roots = [stage for stage in parts.stages.values() if isinstance(stage, FSDPModule)]
    return parts


def _stages(model: nn.Module, plan: ParallelPlan, meshes: Meshes, layout: Layout) -> dict[int, nn.Module]:
    ranks = meshes.dims.pipeline_parallel_size
    if ranks == 1:
        return {0: model}
    stage_ids = layout.schedule.stage_ids(meshes.pipeline_rank, ranks, layout.stages_per_rank)
    cut = split_units(plan, model, ranks * layout.stages_per_rank, layout.pipeline_split)
    return keep_stages(model, plan, stage_ids, cut)


def _offload_policy(layout: Layout, device: torch.device) -> OffloadPolicy:
    if layout.offload_parameters is None:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type != "cpu")  # pinned memory is for copies to an accelerator


def place_the_rest(module: LightningModule, model: nn.Module, device: torch.device) -> None:
    """Buffers of `model`, and what `module` has beside it, go where the computation is."""
    for part in model.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
    if model is not module:
        for child in module.children():
            if child is not model:
                child.to(device)
    module._device = device  # what `LightningModule.to` would note (lightning 2.6)
