"""Sizes that are "auto": decided from the model, the number of processes and the device they run on.

processes.py asks before any process is started. A known device and a `Decoder` are the planner's case; everything else
goes by the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import nn

from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner import choose_sizes
from lightning_llm.planner.devices import device_named
from lightning_llm.planner.layout import PRECISIONS
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import IN_WORLD_SIZE, ParallelDims, Size, check_size
from lightning_llm.strategies.plan import ParallelPlan, plan_of

# What the planner counts bytes by. Others, float64, go by the number of parameters.
_PLANNED_AS = {**{name: name for name in PRECISIONS}, "16-mixed": "bf16-mixed"}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the planner needs to know of a run beside its model.

    Attributes:
        device_name: A row of the planner's device table.
        memory_bytes: Of one device.
        layout: The settings beside the sizes.
        precision: Lightning's name.
        seq_len: Tokens per sequence, if known.
        global_batch: Sequences per optimizer step, if known.
    """

    device_name: str
    memory_bytes: float
    layout: Layout
    precision: str
    seq_len: int | None = None
    global_batch: int | None = None

    @classmethod
    def on(cls, device: torch.device, **settings: Any) -> Workload | None:
        """On a device of this machine; None where it is not in the planner's table, as a CPU is not."""
        if device.type != "cuda":
            return None
        row = device_named(torch.cuda.get_device_name(device))
        memory = torch.cuda.get_device_properties(device).total_memory
        return None if row is None else cls(device_name=row.name, memory_bytes=memory, **settings)


def resolve_dims(
    model: nn.Module | None,
    sizes: Mapping[str, Size],
    *,
    world_size: int,
    devices_per_node: int,
    workload: Workload | None = None,
) -> ParallelDims:
    """The sizes of a run, with each "auto" decided.

    Args:
        model: In outline; None where it is not known yet.
        sizes: The arguments of `ParallelDims` by name, but for the world size.
        world_size: Processes in all.
        devices_per_node: Tensor parallelism stays within a node.
        workload: What the planner computes with; None goes by the number of parameters.

    Raises:
        ConfigurationError: A size that is no size, sizes that do not fit, or nothing that fits into memory.
    """
    for name, size in sizes.items():
        if size != "auto":
            check_size(name, size)
    chosen: dict[str, Any] = dict(sizes)
    undecided = {name for name, size in sizes.items() if size == "auto"} - {"data_parallel_size"}
    plan = plan_of(model) if model is not None else None
    config = getattr(model, "config", None)
    plannable = workload is not None and workload.precision in _PLANNED_AS and _data_is_free(sizes)
    if undecided and workload is not None and plannable and isinstance(config, DecoderConfig):
        chosen |= _by_planner(config, sizes, undecided, workload, world_size, devices_per_node)
    elif undecided:
        chosen |= dict.fromkeys(undecided, 1)
        if model is not None and plan is not None:
            chosen |= _by_matrix(model, plan, sizes, undecided, world_size, devices_per_node)
    return ParallelDims.resolve(world_size, **chosen)


def _data_is_free(sizes: Mapping[str, Size]) -> bool:
    return sizes.get("data_parallel_size", "auto") == "auto"


def _by_planner(
    config: DecoderConfig,
    sizes: Mapping[str, Size],
    undecided: set[str],
    workload: Workload,
    world_size: int,
    devices_per_node: int,
) -> dict[str, int]:
    given = {name: None if size == "auto" else size for name, size in sizes.items() if name != "data_parallel_size"}
    settings = workload.layout
    found = choose_sizes(
        config,
        world_size,
        devices_per_node,
        workload.memory_bytes,
        device_name=workload.device_name,
        seq_len=workload.seq_len,
        global_batch=workload.global_batch,
        precision=_PLANNED_AS[workload.precision],
        zero_stage=settings.zero_stage,
        recompute="selective" if isinstance(settings.recompute, float) else settings.recompute,
        pipeline_schedule=settings.schedule.name,
        offload_parameters=settings.offload_parameters,
        **given,  # type: ignore[arg-type]
    )
    return {name: getattr(found, name) for name in undecided}


def _by_matrix(
    model: nn.Module,
    plan: ParallelPlan,
    sizes: Mapping[str, Size],
    undecided: set[str],
    world_size: int,
    devices_per_node: int,
) -> dict[str, int]:
    taken = 1
    for name in IN_WORLD_SIZE:
        size = sizes.get(name, 1)
        taken *= 1 if isinstance(size, str) else size
    tensor, pipeline = recommended_sizes(
        sum(parameter.numel() for parameter in model.parameters()),
        max(1, world_size // taken),
        devices_per_node,
        tensor_divides=plan.tensor_divides.values()
        if plan.tensor_parallel and "tensor_parallel_size" in undecided
        else (1,),
        num_units=len(plan.units(model)) or 1,
    )
    found = {"tensor_parallel_size": tensor, "pipeline_parallel_size": pipeline}
    if "expert_parallel_size" in undecided and plan.num_experts:
        chosen = {**sizes, **{name: size for name, size in found.items() if name in undecided}}
        pipelined = chosen.get("pipeline_parallel_size", 1)
        foldable = world_size // (int(pipelined) * int(sizes.get("replicate_size", 1)))
        found["expert_parallel_size"] = gcd(foldable, plan.num_experts)
    return {name: size for name, size in found.items() if name in undecided}


def recommended_sizes(
    num_parameters: int,
    world_size: int,
    devices_per_node: int,
    *,
    tensor_divides: Iterable[int] = (),
    num_units: int = 1,
) -> tuple[int, int]:
    """Tensor and pipeline sizes for a model of a size.

    Data parallel below 7 billion parameters, then tensor parallel within a node, then pipeline stages, as large dense
    models are trained in practice (https://arxiv.org/abs/2104.04473).

    Args:
        num_parameters: Of the whole model.
        world_size: Processes in all.
        devices_per_node: Tensor parallelism stays within a node, for its links.
        tensor_divides: Numbers that the tensor size must divide (heads, intermediate size, ...).
        num_units: Blocks that stages can share out.

    Returns:
        `(tensor_parallel_size, pipeline_parallel_size)`; the data ranks are what is left.
    """
    billions = num_parameters / 1e9
    tensor = 1 if billions < 7 else 8
    pipeline = 1 if billions < 30 else 4 if billions < 100 else 16
    numbers = [world_size, devices_per_node, *tensor_divides]
    tensor = max(size for size in range(1, tensor + 1) if all(number % size == 0 for number in numbers))
    left = world_size // tensor
    pipeline = max(size for size in range(1, min(pipeline, num_units) + 1) if left % size == 0)
    return tensor, pipeline
