"""What a layout costs: memory, time of a step, MFU. Everything is arithmetic on the tables and formulas beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from lightning_llm.planner.activations import blocks_of
from lightning_llm.planner.devices import Device
from lightning_llm.planner.engines import gradient_bytes
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import Memory, stage_bytes, stages_in, worst_memory
from lightning_llm.planner.offload import (
    CopySeconds,
    copy_seconds,
    offload_traffic,
    room_of,
    states_of_rank,
    step_seconds,
)
from lightning_llm.planner.shape import Shape, Stage, Unit, sizes_of
from lightning_llm.planner.states import gathered
from lightning_llm.planner.timeline import Timeline, simulate, stages_of
from lightning_llm.planner.traffic import (
    OVERLAP_COST,
    AxisTraffic,
    Link,
    block_traffic,
    links_of,
    parameter_traffic,
    ring,
    traffic_of_rank,
)

# Shares of the data sheet's peaks that training reaches: matrix products and attention of the sizes that large models
# have, and operations bound by memory. Together they come to 45-50% MFU for a dense model on one node, which is between
# torchtitan's published 33-39% (on H100s held to 500 W) and Megatron-Core's 47%.
COMPUTE_EFFICIENCY = 0.5
BANDWIDTH_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Cluster:
    """Devices and how they are put together.

    Attributes:
        device: What each is.
        count: In all.
        per_node: In one node.
        memory: Bytes of one; the device's own unless said otherwise.
    """

    device: Device
    count: int
    per_node: int
    memory: float

    def share(self, memory: float, host: float, disk: float) -> float:
        """Of what there is, the largest share that is needed; above 1 it does not fit.

        Args:
            memory: Bytes of a device.
            host, disk: Bytes of a node's memory and disks.
        """
        host_share = host / self.device.host.memory if self.device.host.memory else math.inf
        disk_share = disk / self.device.host.disk if self.device.host.disk else math.inf
        return max(memory / self.memory, host_share if host else 0.0, disk_share if disk else 0.0)


@dataclass(frozen=True)
class Estimate:
    """What one layout costs.

    Attributes:
        memory: Of the pipeline rank that needs the most.
        memory_rank: Which rank that is.
        step_seconds: Time of an optimizer step.
        pipeline_seconds: Of that, the schedule: compute and what communication it waits for, idle time included.
        exposed_seconds: Of that, gathers, reductions and sums that nothing hides.
        optimizer_seconds: Of that, the optimizer's own: on the CPU with its transfers, where it is offloaded.
        bubble: Idle share of the schedule, mean over ranks.
        tokens_per_second: Of all devices together.
        tokens_per_second_per_device: Of one.
        mfu: Share of the devices' dense peak that goes into the model's own arithmetic; the bfloat16 peak also where
            layers run in float8.
        saved_bytes: That the fullest rank writes into a checkpoint: parameters and optimizer states, wherever they are.
        host_bytes, disk_bytes: Of a node, that offloaded states need; 0 where nothing is offloaded.
    """

    memory: Memory
    memory_rank: int
    step_seconds: float
    pipeline_seconds: float
    exposed_seconds: float
    optimizer_seconds: float
    bubble: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    mfu: float
    saved_bytes: float
    host_bytes: float = 0.0
    disk_bytes: float = 0.0


@dataclass(frozen=True)
class StageSeconds:
    """Time of one microbatch in one stage."""

    forward: float
    backward: float


def stage_seconds(
    shape: Shape, stage: Stage, layout: Layout, workload: Workload, device: Device, links: dict[str, Link]
) -> StageSeconds:
    """Compute, and what communication it has to wait for.

    Tensor- and expert-parallel collectives stand between matrix products and are waited for. The ring of context
    parallelism runs beside attention, the gathers of ZeRO-3 beside the block before; of these counts what is longer.
    """
    matrix = device.peak("float8" if workload.float8 else "bfloat16" if workload.compute_bytes == 2 else "float32")
    matrix *= COMPUTE_EFFICIENCY
    other = device.peak("bfloat16" if workload.compute_bytes == 2 else "float32") * COMPUTE_EFFICIENCY
    bandwidth = device.memory_bandwidth * BANDWIDTH_EFFICIENCY
    tokens, tensor = layout.tokens(workload), layout.tensor_parallel_size
    forward = backward = 0.0
    for kind in blocks_of(stage, layout.recompute):
        traffic = block_traffic(shape, kind.unit, layout, workload)
        linear = 2 * tokens * _multiplied(shape, kind.unit, tensor, layout.sequence_split) / matrix
        # Causal: a token attends to half of the sequence on average.
        context = min(workload.seq_len / 2, kind.window or workload.seq_len)
        attention = 4 * tokens * context * shape.heads * shape.head_dim / tensor / other
        moved = _moved_bytes(shape, kind.unit, layout, workload) / bandwidth
        hops = layout.context_parallel_size - 1
        attention_forward = max(attention, links["cp"].seconds(traffic.cp, hops))
        attention_backward = max(2.5 * attention, links["cp"].seconds(2 * traffic.cp, hops))
        waits = links["tp"].seconds(traffic.tp, 4) + links["ep"].seconds(traffic.ep, 2)
        one_way = linear + attention_forward + moved + waits
        again = {"none": 0.0, "selective": moved, "full": one_way}[kind.recompute]
        back = 2 * linear + attention_backward + 2 * moved + waits + again
        moves = _block_parameters(kind.unit, layout, workload, links)
        beside = moves.reduce + (moves.gather if layout.zero_stage == 3 else 0.0)
        forward += kind.number * _overlapped(one_way, moves.gather)
        backward += kind.number * (_overlapped(back, beside) + moves.waited)
    if stage.is_last:
        numbers = tokens * shape.vocab / layout.vocabulary_split
        head = 2 * numbers * shape.hidden / other
        loss = numbers * 4 / bandwidth  # one pass in float32; the loss makes about three each way
        forward += head + 3 * loss
        backward += 2 * head + 3 * loss
    return StageSeconds(forward, backward)


def estimate(shape: Shape, layout: Layout, workload: Workload, cluster: Cluster) -> Estimate:
    """Memory and time of one optimizer step."""
    memory_rank, memory = worst_memory(shape, layout, workload)
    links = links_of(layout, cluster.device, cluster.per_node)
    timeline = timeline_of(shape, layout, workload, cluster)
    exposed = optimizer = saved = 0.0
    for rank in range(layout.pipeline_parallel_size):
        stages = stages_of_rank(shape, layout, rank)
        exposed = max(exposed, sum(_exposed(shape, stage, layout, workload, links) for stage in stages))
        costs = states_of_rank(shape, layout, workload, rank)
        seconds = sum(cost.step_moves for cost in costs) / (cluster.device.memory_bandwidth * BANDWIDTH_EFFICIENCY)
        if not seconds:  # it works on the host
            seconds = step_seconds(costs, layout, workload, links)
        optimizer = max(optimizer, seconds)
        saved = max(saved, sum(cost.saved for cost in costs))
    step = timeline.makespan + exposed + optimizer
    tokens = layout.global_batch * workload.seq_len
    dtype = "bfloat16" if workload.compute_bytes == 2 else "float32"
    peak = cluster.device.peak(dtype) * layout.world_size
    room = room_of(shape, layout, workload, cluster.per_node)
    return Estimate(
        memory=memory,
        memory_rank=memory_rank,
        step_seconds=step,
        pipeline_seconds=timeline.makespan,
        exposed_seconds=exposed,
        optimizer_seconds=optimizer,
        bubble=timeline.mean_bubble,
        tokens_per_second=tokens / step,
        tokens_per_second_per_device=tokens / step / layout.world_size,
        mfu=tokens / step * shape.config.flops_per_token(workload.seq_len) / peak,
        saved_bytes=saved,
        host_bytes=room.host,
        disk_bytes=room.disk,
    )


def quick_step_seconds(shape: Shape, layout: Layout, workload: Workload, cluster: Cluster) -> float:
    """A step's time without simulation: the slowest stage's microbatches and the filling of the pipeline.

    Good for ranking: stages are nearly equal, for which it is the simulated time of GPipe, 1F1B and Interleaved1F1B.
    """
    links = links_of(layout, cluster.device, cluster.per_node)
    stages = stages_in(shape, layout)
    last = len(stages) - 1
    distinct = {0: 1, last: 1, min(1, last): 1}  # those between are as long as the second
    times = {i: stage_seconds(shape, stages[i], layout, workload, cluster.device, links) for i in distinct}
    slowest = max(time.forward + time.backward for time in times.values())
    rounds = layout.stages_per_rank * layout.microbatches + layout.pipeline_parallel_size - 1
    rank = min(1, layout.pipeline_parallel_size - 1)
    exposed = sum(_exposed(shape, stage, layout, workload, links) for stage in stages_of_rank(shape, layout, rank))
    return rounds * slowest + exposed


def stages_of_rank(shape: Shape, layout: Layout, rank: int) -> list[Stage]:
    """The stages that a pipeline rank has."""
    every = stages_in(shape, layout)
    ids = stages_of(layout.pipeline_schedule, rank, layout.pipeline_parallel_size, layout.stages_per_rank)
    return [every[index] for index in ids]


def timeline_of(shape: Shape, layout: Layout, workload: Workload, cluster: Cluster) -> Timeline:
    """The pipeline's schedule with this layout's durations."""
    links = links_of(layout, cluster.device, cluster.per_node)
    seconds = [
        stage_seconds(shape, stage, layout, workload, cluster.device, links) for stage in stages_in(shape, layout)
    ]
    boundary = workload.compute_bytes * layout.tokens(workload) * shape.hidden / layout.sequence_split
    return simulate(
        layout.pipeline_schedule,
        layout.pipeline_parallel_size,
        layout.stages_per_rank,
        layout.microbatches,
        forward=[stage.forward for stage in seconds],
        backward=[stage.backward for stage in seconds],
        transfer=links["pp"].seconds(boundary) if layout.pipeline_parallel_size > 1 else 0.0,
    )


def traffic(shape: Shape, layout: Layout, workload: Workload, cluster: Cluster) -> dict[str, AxisTraffic]:
    """By axis, of the pipeline rank that sends the most; "host" and "disk" stand beside the axes where used."""
    links = links_of(layout, cluster.device, cluster.per_node)
    ranks = []
    for rank in range(layout.pipeline_parallel_size):
        given = (shape, stages_of_rank(shape, layout, rank), layout, workload, links)
        ranks.append(traffic_of_rank(*given) | offload_traffic(*given))
    return max(ranks, key=lambda axes: sum(axis.seconds for axis in axes.values()))


def _exposed(shape: Shape, stage: Stage, layout: Layout, workload: Workload, links: dict[str, Link]) -> float:
    """What of a stage's parameter traffic is waited for, seconds per step.

    A pipeline gathers each stage once, before its first forward, and reduces it once, behind its last backward. Without
    one, blocks hide each other's gathers (counted where they do not, in `stage_seconds`), the first gather and the last
    reduction excepted. Sums over replicas follow the reductions.
    """
    traffic = parameter_traffic(shape, stage, layout, workload)
    operations = len(stage.layers) + 1
    replicate = links["replicate"].seconds(traffic.replicate, operations)
    gather = links["fsdp"].seconds(traffic.gather, operations)
    reduce = links["fsdp"].seconds(traffic.reduce, operations)
    if layout.offloads:
        elements = stage_bytes(shape, stage, layout, workload).stored
        copied = copy_seconds(elements, layout, workload, links)
        gather, reduce = max(gather, copied.gather), max(reduce, copied.reduce)
    if layout.pipeline_parallel_size > 1 or layout.zero_stage <= 1:
        return gather + reduce + replicate
    share = 1 / operations
    if layout.engine == "deepspeed" and layout.zero_stage == 2:  # gathers what the step has updated, all at once
        return gather + share * (traffic.reductions * reduce + replicate)
    return share * (traffic.reductions * (gather + reduce) + replicate)


def _block_parameters(unit: Unit, layout: Layout, workload: Workload, links: dict[str, Link]) -> CopySeconds:
    """Time to gather a block's parameters and to reduce its gradients, where each microbatch does so."""
    if layout.pipeline_parallel_size > 1 or layout.zero_stage <= 1:
        return CopySeconds()
    whole = gathered(unit, layout.tensor_parallel_size, layout.expert_parallel_size)
    # Below stage 3 whole parameters stay over all batches of a step: one gather for all of them, which DeepSpeed does
    # behind the step before (see `_exposed`).
    gathers = 1.0 if layout.zero_stage == 3 else 1 / layout.microbatches if layout.engine == "fsdp2" else 0.0
    gather = ring(workload.compute_bytes * whole, layout.sharding_size)
    reduce = ring(gradient_bytes(layout, workload) * whole, layout.sharding_size)
    copied = copy_seconds(whole / layout.sharding_size, layout, workload, links)
    return CopySeconds(
        gathers * max(links["fsdp"].seconds(gather), copied.gather),
        max(links["fsdp"].seconds(reduce), copied.reduce),
        copied.waited,
    )


def _overlapped(compute: float, communication: float) -> float:
    """Seconds of both side by side: the longer one, and what communication takes from compute."""
    return max(compute + OVERLAP_COST * communication, communication)


@lru_cache(maxsize=4096)
def _multiplied(shape: Shape, unit: Unit, tensor: int, split: int) -> float:
    """Weights that a token is multiplied with on one rank; experts work on a rank's own part of the sequence."""
    dense = sum(w.numel for w in unit.weights if len(w.shape) > 1 and not w.is_expert) / tensor
    sizes = sizes_of(unit)
    if not sizes.experts:
        return dense
    stacked = sum(w.numel for w in unit.weights if w.is_expert)
    return dense + stacked / sizes.experts * shape.experts_per_token / split


def _moved_bytes(shape: Shape, unit: Unit, layout: Layout, workload: Workload) -> float:
    """Bytes that the operations between the matrix products read and write in one forward.

    Per token: two norms and two residual sums (read and write, read twice and write: 10 hidden), rotation of q and k
    (read and write: 2 each), silu and product (5 intermediate); of experts also the sorting and weighting of tokens.
    """
    tensor, split = layout.tensor_parallel_size, layout.sequence_split
    sizes = sizes_of(unit)
    elements = 10 * shape.hidden / split + 2 * (shape.heads + shape.kv_heads) * shape.head_dim / tensor
    elements += 5 * sizes.intermediate / tensor
    if sizes.experts:
        elements += shape.experts_per_token / split * (4 * shape.hidden + 5 * sizes.expert_intermediate)
    return workload.compute_bytes * layout.tokens(workload) * elements
