"""What offloading costs: bytes of a node's memory and disks, the optimizer's step on the CPU, and the transfers.

Memory is counted with the other states (`fsdp2.py`, `deepspeed.py`); here it is added up over a node, and given time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lightning_llm.planner.hosts import GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import StageBytes, stage_bytes, stages_in
from lightning_llm.planner.shape import Shape, Stage
from lightning_llm.planner.states import StateBytes
from lightning_llm.planner.timeline import stages_of
from lightning_llm.planner.traffic import AxisTraffic, Link, parameter_traffic

# What a process has in host memory besides: interpreter, libraries, the driver's side, data. An allowance.
PROCESS_BYTES = 4 * GIB
ADAM_MOVES = 28  # bytes of a parameter: weights, moments and gradient read, weights and moments written, in float32
MOMENTS_AND_WEIGHTS, GRADIENT = 12, 4  # bytes of a parameter that NVMe has, in float32


class Room(NamedTuple):
    """Bytes that a node needs besides its devices' memory; 0 where nothing is offloaded."""

    host: float
    disk: float


def room_of(shape: Shape, layout: Layout, workload: Workload, per_node: int) -> Room:
    """What offloaded states need of a node whose ranks are all like the fullest."""
    if not layout.offloads:
        return Room(0.0, 0.0)
    ranks = [states_of_rank(shape, layout, workload, rank) for rank in range(layout.pipeline_parallel_size)]
    host = max(sum(cost.host for cost in costs) for costs in ranks)
    disk = max(sum(cost.disk for cost in costs) for costs in ranks)
    return Room(per_node * (host + PROCESS_BYTES), per_node * disk)


def states_of_rank(shape: Shape, layout: Layout, workload: Workload, rank: int) -> list[StageBytes]:
    """Of each stage that a pipeline rank has."""
    ids = stages_of(layout.pipeline_schedule, rank, layout.pipeline_parallel_size, layout.stages_per_rank)
    every = stages_in(shape, layout)
    return [stage_bytes(shape, every[index], layout, workload) for index in ids]


def step_seconds(costs: Iterable[StateBytes], layout: Layout, workload: Workload, links: dict[str, Link]) -> float:
    """The optimizer's step on the host, and what is moved for it when forwards and backwards are over.

    NVMe's reads and writes stand before and behind the CPU's work: DeepSpeed overlaps them only where `pipeline_read`
    and `pipeline_write` are set.
    """
    elements = sum(cost.stored for cost in costs)
    seconds = links["host_memory"].seconds(ADAM_MOVES * elements)
    if layout.offload_optimizer == "nvme":
        moved = (MOMENTS_AND_WEIGHTS + GRADIENT) * elements  # read; moments and weights are written, gradients were
        seconds += links["disk_read"].seconds(moved) + links["disk_write"].seconds(moved)
    weights = workload.compute_bytes * elements
    if layout.offload_parameters == "nvme":
        seconds += links["disk_write"].seconds(weights)
    elif layout.offload_parameters is None:
        seconds += links["host"].seconds(weights)  # back to the device
    return seconds


class CopySeconds(NamedTuple):
    """Time of what one rank copies for some of its elements.

    Attributes:
        gather: Before they are gathered, beside other work.
        reduce: When their gradients are reduced, beside other work.
        waited: Of their gradients, what nothing runs beside.
    """

    gather: float = 0.0
    reduce: float = 0.0
    waited: float = 0.0


def copy_seconds(elements: float, layout: Layout, workload: Workload, links: dict[str, Link]) -> CopySeconds:
    """See `CopySeconds`.

    DeepSpeed moves weights and gradients in the computation's dtype, and adds up gradients of several batches on the
    device. FSDP2 moves them in the stored dtype, and adds up on the CPU, for which the backward waits.
    """
    if not layout.offloads:
        return CopySeconds()
    if layout.engine == "fsdp2":
        copied = links["host"].seconds(workload.parameter_bytes * elements)
        if layout.microbatches == 1 or layout.pipeline_parallel_size > 1:
            return CopySeconds(copied, copied)
        added = links["host_memory"].seconds(3 * workload.parameter_bytes * elements)  # two read, one written
        return CopySeconds(copied, 0.0, copied + added)
    moved = workload.compute_bytes * elements
    gather = links["host"].seconds(moved) if layout.offload_parameters else 0.0
    if layout.offload_parameters == "nvme":
        gather = max(gather, links["disk_read"].seconds(moved))
    return CopySeconds(gather, links["host"].seconds(moved) if layout.offload_optimizer else 0.0)


def offload_traffic(
    shape: Shape, stages: Iterable[Stage], layout: Layout, workload: Workload, links: dict[str, Link]
) -> dict[str, AxisTraffic]:
    """What a rank with these stages copies per step to and from the host, and reads and writes on its disks."""
    host = disk = 0.0
    for stage in stages:
        elements = stage_bytes(shape, stage, layout, workload).stored
        times = parameter_traffic(shape, stage, layout, workload)
        if layout.engine == "fsdp2":
            host += layout.offloads * workload.parameter_bytes * elements * (times.gathers + times.reductions)
            continue
        moved = workload.compute_bytes * elements
        if layout.offload_optimizer:
            host += moved * (2 * times.reductions - 1)  # to the host, and back to be added to
        host += moved * (times.gathers if layout.offload_parameters else bool(layout.offload_optimizer))
        if layout.offload_optimizer == "nvme":
            disk += 2 * (MOMENTS_AND_WEIGHTS + GRADIENT) * elements
        if layout.offload_parameters == "nvme":
            disk += moved * (times.gathers + 1)
    rows = {}
    if host:
        rows["host"] = AxisTraffic(host, 0, *links["host"], "parameters and gradients from and to host memory")
    if disk:
        rows["disk"] = AxisTraffic(disk, 0, *links["disk_read"], "states read and written on NVMe")
    return rows
