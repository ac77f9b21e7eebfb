"""`choose_sizes`: tensor and pipeline sizes for a run whose other settings are fixed, for a strategy's "auto"."""

from __future__ import annotations

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner.candidates import Options
from lightning_llm.planner.devices import device
from lightning_llm.planner.estimate import Cluster
from lightning_llm.planner.layout import Layout, Recompute, Workload
from lightning_llm.planner.plan import default_global_batch
from lightning_llm.planner.search import search
from lightning_llm.planner.shape import Shape


def choose_sizes(
    config: DecoderConfig,
    world_size: int,
    devices_per_node: int,
    memory_bytes: float | None = None,
    *,
    device_name: str = "h100",
    seq_len: int | None = None,
    global_batch: int | None = None,
    precision: str = "bf16-mixed",
    zero_stage: int | None = 3,
    recompute: Recompute = "none",
    pipeline_schedule: str = "1F1B",
    engine: str = "fsdp2",
    offload_optimizer: str | None = None,
    offload_parameters: str | None = None,
    tensor_parallel_size: int | None = None,
    pipeline_parallel_size: int | None = None,
    context_parallel_size: int | None = 1,
    expert_parallel_size: int | None = 1,
    replicate_size: int | None = 1,
) -> Layout:
    """Sizes for "auto": the fastest by estimate that fits, with everything else as the run has it.

    Args:
        config: The model.
        world_size: Processes in all.
        devices_per_node: Tensor parallelism stays within a node.
        memory_bytes: Of one device; None takes the table's.
        device_name: The row of the device table that speeds and links are taken from.
        seq_len: Tokens per sequence; None: what the model is meant for, up to 8,192.
        global_batch: Sequences per optimizer step; None: a usual one for the model's size.
        zero_stage: As the run has it, or None to choose.
        precision, recompute, pipeline_schedule: As the run has them.
        engine, offload_optimizer, offload_parameters: As the run has them; see `Layout`.
        tensor_parallel_size, pipeline_parallel_size, context_parallel_size, expert_parallel_size, replicate_size: A
            size that is given, or None to choose.

    Returns:
        The layout; its sizes multiply to `world_size`.

    Raises:
        ConfigurationError: Nothing valid fits.
    """
    row = device(device_name)
    shape = Shape.of(config)
    workload = Workload(seq_len=seq_len or min(8192, config.max_position_embeddings), precision=precision)
    options = Options(
        engine=engine,
        offload_optimizer=offload_optimizer,
        offload_parameters=offload_parameters,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        context_parallel_size=context_parallel_size,
        expert_parallel_size=expert_parallel_size,
        replicate_size=replicate_size,
        zero_stages=None if zero_stage is None else (zero_stage,),
        recomputes=(recompute,),
        schedules=(pipeline_schedule,),
        stages_per_rank=(2,),
    )
    per_node = min(world_size, devices_per_node)
    if world_size % per_node:
        raise ConfigurationError(f"{world_size} processes are not a whole number of nodes of {per_node}.")
    cluster = Cluster(row, world_size, per_node, row.memory if memory_bytes is None else memory_bytes)
    batch = global_batch or default_global_batch(shape.num_parameters, workload.seq_len, world_size)
    return search(shape, cluster, workload, batch, options).layout
