"""One rank of a run without the others: its part of the real model, on the meta device, in a world that is faked.

`lightning-llm plan --dry-run` calls it. It cuts as `LLM3DStrategy` does, with the same functions in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.planner import Layout, Plan
from lightning_llm.planner.timeline import stages_of
from lightning_llm.strategies.checks import check_plan
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.pipeline import keep_stage
from lightning_llm.strategies.sharding import apply_sharding
from lightning_llm.strategies.tensor import apply_tensor_parallel

DTYPES = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "32-true": torch.float32}
GIB = 1024**3


@dataclass(frozen=True)
class Rehearsal:
    """What one rank holds.

    Attributes:
        rank: Its global rank.
        parameters: Elements that it stores.
        parameter_bytes: Bytes of these.
        whole: Elements while all its parameters are gathered.
    """

    rank: int
    parameters: int
    parameter_bytes: int
    whole: int


def rehearse(config: DecoderConfig, layout: Layout, precision: str = "bf16-mixed", pipeline_rank: int = 0) -> Rehearsal:
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
    dims = ParallelDims(**layout.sizes())
    rank = pipeline_rank * (dims.world_size // dims.pipeline_parallel_size)
    dist.init_process_group("fake", rank=rank, world_size=dims.world_size, store=FakeStore())
    try:
        return _cut(config, layout, dims, DTYPES[precision], rank)
    finally:
        dist.destroy_process_group()


def _cut(config: DecoderConfig, layout: Layout, dims: ParallelDims, dtype: torch.dtype, rank: int) -> Rehearsal:
    meshes = dims.build("cpu")
    stored = nbytes = whole = 0
    ranks = layout.pipeline_parallel_size
    for stage in stages_of(layout.pipeline_schedule, meshes.stage, ranks, layout.stages_per_rank):
        with torch.device("meta"):
            model = Decoder(config).to(dtype)
        plan = check_plan(model, dims)
        assert plan is not None
        if layout.num_stages > 1:
            keep_stage(model, plan, stage, layout.num_stages)
        if dims.tensor_parallel_size > 1:
            apply_tensor_parallel(model, meshes.tensor, plan, sequence_parallel=layout.sequence_parallel)
        whole += sum(_local(parameter).numel() for parameter in model.parameters())
        if dims.data_parallel_size > 1:
            apply_sharding(model, plan.units(model), meshes.sharding, reshard_after_forward=layout.zero_stage == 3)
        for parameter in model.parameters():
            local = _local(parameter)
            stored += local.numel()
            nbytes += local.numel() * local.element_size()
    return Rehearsal(rank, stored, nbytes, whole)


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def compare(config: DecoderConfig, plan: Plan) -> str:
    """A dry run of a plan's fullest rank, beside what was planned, in a few lines."""
    seen = rehearse(config, plan.layout, plan.workload.precision, plan.estimate.memory_rank)
    planned = plan.estimate.memory.parameters
    return (
        f"dry run: rank {seen.rank} of {plan.layout.world_size} stores {seen.parameters:,} parameters, "
        f"{seen.parameter_bytes / GIB:.3f} GiB; planned {planned / GIB:.3f} GiB "
        f"({planned / seen.parameter_bytes - 1:+.2%})"
    )
