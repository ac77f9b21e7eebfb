"""One rank of a run without the others: its part of the real model, on the meta device, in a world that is faked.

`lightning-llm plan --dry-run` calls it. The model is cut by `parallelize`, as a run cuts it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_llm import planner
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.planner.hosts import GIB
from lightning_llm.strategies.checks import check_plan
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.parallelize import parallelize
from lightning_llm.strategies.precision import LLMPrecision


@dataclass(frozen=True)
class Rehearsal:
    """What one rank holds.

    Attributes:
        rank: Its global rank.
        parameters: Elements that it stores.
        parameter_bytes: Bytes of these.
    """

    rank: int
    parameters: int
    parameter_bytes: int


def rehearse(
    config: DecoderConfig, layout: planner.Layout, precision: str = "bf16-mixed", pipeline_rank: int = 0
) -> Rehearsal:
    """Builds the first rank of a pipeline rank at the layout's world size. Nothing is allocated or sent.

    Args:
        config: The model.
        layout: The sizes.
        precision: Lightning's name.
        pipeline_rank: Which part of the pipeline.

    Raises:
        ConfigurationError: The model cannot be cut so, or this process is part of a run already.
    """
    if dist.is_initialized():
        raise ConfigurationError("A dry run fakes its process group, so it must not run within a distributed run.")
    if layout.engine != "fsdp2" or layout.offloads:
        raise ConfigurationError(
            f"A dry run builds what LLM3DStrategy keeps on its devices, and this plan is {layout.describe_zero()}. "
            "Leave out the dry run, or plan without offloading for the engine fsdp2."
        )
    dims = ParallelDims(**layout.sizes())
    rank = pipeline_rank * dims.ranks_per_stage
    dist.init_process_group("fake", rank=rank, world_size=dims.world_size, store=FakeStore())
    try:
        return _cut(config, dims, strategy_layout(layout), LLMPrecision(precision), rank)
    finally:
        dist.destroy_process_group()


def strategy_layout(layout: planner.Layout) -> Layout:
    """The planner's layout in the strategy's terms."""
    return Layout(
        zero_stage=layout.zero_stage,  # type: ignore[arg-type]
        pipeline_schedule=layout.pipeline_schedule,
        pipeline_stages_per_rank=layout.stages_per_rank if layout.pipeline_parallel_size > 1 else "auto",
        pipeline_split="balanced" if layout.layers_per_stage is None else layout.layers_per_stage,
        sequence_parallel=layout.sequence_parallel,
        recompute=layout.recompute,
    )


def _cut(config: DecoderConfig, dims: ParallelDims, layout: Layout, precision: LLMPrecision, rank: int) -> Rehearsal:
    with torch.device("meta"):
        model = Decoder(config)
    plan = check_plan(model, dims, layout)
    meshes = dims.build("cpu", with_experts=bool(config.num_experts), replicate_all=layout.replicates_all)
    precision.convert_module(model)
    parallelize(model, plan, meshes, layout, device=torch.device("cpu"), mp_policy=precision.mp_policy)
    shards = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return Rehearsal(rank, sum(p.numel() for p in shards), sum(p.numel() * p.element_size() for p in shards))


def compare(config: DecoderConfig, plan: planner.Plan) -> str:
    """A dry run of a plan's fullest rank, beside what was planned, in a few lines."""
    seen = rehearse(config, plan.layout, plan.workload.precision, plan.estimate.memory_rank)
    planned = plan.estimate.memory.parameters
    return (
        f"dry run: rank {seen.rank} of {plan.layout.world_size} stores {seen.parameters:,} parameters, "
        f"{seen.parameter_bytes / GIB:.3f} GiB; planned {planned / GIB:.3f} GiB "
        f"({planned / seen.parameter_bytes - 1:+.2%})"
    )
