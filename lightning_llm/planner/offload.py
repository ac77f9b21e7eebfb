"""What offloading costs: bytes of a node's memory and disks, the optimizer's step on the CPU, and the transfers.

Memory is counted with the other states (`fsdp2.py`, `deepspeed.py`); here it is added up over a node, and given time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lightning_llm.planner.devices import Device
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import GIB, StageBytes, stage_bytes, stages_in
from lightning_llm.planner.shape import Shape
from lightning_llm.planner.states import StateBytes
from lightning_llm.planner.timeline import stages_of
from lightning_llm.planner.traffic import Link

# What a process has in host memory besides: interpreter, libraries, the driver's side, data. An allowance.
PROCESS_BYTES = 4 * GIB
# Share of the host's memory bandwidth that Adam on the CPU reaches: 10 billion parameters take CPU-Adam 2.57 s on a DGX-2
# (ZeRO-Offload, table 4), whose 12 channels of DDR4-2666 have 256 GB/s.
HOST_EFFICIENCY = 0.43
ADAM_MOVES = 28  # bytes of a parameter: weights, moments and gradient read, weights and moments written, in float32
MOMENTS_AND_WEIGHTS, GRADIENT = 12, 4  # bytes of a parameter that NVMe has, in float32


class Room(NamedTuple):
    """Bytes that a node needs besides its devices' memory; 0 where nothing is offloaded."""

    host: float
    disk: float


def room_of(
    shape: Shape, layout: Layout, workload: Workload, per_node: int, ranks: Iterable[int] | None = None
) -> Room:
    """What offloaded states need of a node whose ranks are all like the fullest.

    Args:
        ranks: Look at these pipeline ranks alone.
    """
    if not layout.offloads:
        return Room(0.0, 0.0)
    host = disk = 0.0
    for rank in range(layout.pipeline_parallel_size) if ranks is None else ranks:
        costs = states_of_rank(shape, layout, workload, rank)
        host = max(host, sum(cost.host for cost in costs))
        disk = max(disk, sum(cost.disk for cost in costs))
    return Room(per_node * (host + PROCESS_BYTES), per_node * disk)


def states_of_rank(shape: Shape, layout: Layout, workload: Workload, rank: int) -> list[StageBytes]:
    """Of each stage that a pipeline rank has."""
    ids = stages_of(layout.pipeline_schedule, rank, layout.pipeline_parallel_size, layout.stages_per_rank)
    every = stages_in(shape, layout)
    return [stage_bytes(shape, every[index], layout, workload) for index in ids]


def step_seconds(
    costs: Iterable[StateBytes], layout: Layout, workload: Workload, device: Device, per_node: int, links: dict[str, Link]
) -> float:
    """The optimizer's step on the host, and what is moved for it when forwards and backwards are over.

    All ranks of a node share its memory bandwidth and its disks. NVMe's reads and writes stand before and behind the
    CPU's work: DeepSpeed overlaps them only where `pipeline_read` and `pipeline_write` are set.
    """
    elements = sum(cost.stored for cost in costs)
    seconds = per_node * elements * ADAM_MOVES / (device.host.memory_bandwidth * HOST_EFFICIENCY)
    if layout.offload_optimizer == "nvme":
        moved = (MOMENTS_AND_WEIGHTS + GRADIENT) * elements  # read; moments and weights are written, gradients were
        seconds += links["disk_read"].seconds(moved) + links["disk_write"].seconds(moved)
    weights = workload.compute_bytes * elements
    if layout.offload_parameters == "nvme":
        seconds += links["disk_write"].seconds(weights)
    elif layout.offload_parameters is None:
        seconds += links["host"].seconds(weights)  # back to the device
    return seconds


class Copies(NamedTuple):
    """Bytes that one rank copies for one gather and for one reduction of so many of its elements."""

    host_gather: float = 0.0
    host_reduce: float = 0.0
    disk_gather: float = 0.0

    def seconds(self, links: dict[str, Link]) -> tuple[float, float]:
        """Time of a gather's copies and of a reduction's, each beside the other links."""
        gather = max(links["host"].seconds(self.host_gather), links["disk_read"].seconds(self.disk_gather))
        return gather, links["host"].seconds(self.host_reduce)


def copies(elements: float, layout: Layout, workload: Workload) -> Copies:
    """See `Copies`. DeepSpeed moves weights and gradients in the computation's dtype, FSDP2 in the stored one."""
    if not layout.offloads:
        return Copies()
    moved = elements * (workload.parameter_bytes if layout.engine == "fsdp2" else workload.compute_bytes)
    offloaded = layout.offload_parameters is not None
    return Copies(
        host_gather=moved if offloaded else 0.0,
        host_reduce=moved if layout.offload_optimizer or layout.engine == "fsdp2" else 0.0,
        disk_gather=moved if layout.offload_parameters == "nvme" else 0.0,
    )
