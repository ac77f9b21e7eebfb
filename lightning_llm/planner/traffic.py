"""Bytes that a device sends per optimizer step on each axis, and the time that the axis' link needs for them.

Collectives count with the minimum of a ring (https://arxiv.org/abs/1909.09756, section 2): a gather or a reduce-scatter
of B bytes over n ranks sends `(n-1)/n * B` from each, an all-reduce twice that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lightning_llm.planner.activations import blocks_of
from lightning_llm.planner.devices import Device
from lightning_llm.planner.engines import gradient_bytes
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import stage_bytes
from lightning_llm.planner.shape import Shape, Stage, Unit, sizes_of

LINK_EFFICIENCY = 0.8  # of a link's data-sheet bandwidth that large collectives reach
NODE_HOP, NETWORK_HOP = 1.5e-6, 10e-6  # seconds of a message to a neighbour: a ring of n waits n-1 times
# What is hidden behind compute is not free: the channels of a collective occupy up to 32 of an H100's 132
# multiprocessors while it runs (NCCL_MAX_CTAS), and memory bandwidth with them.
OVERLAP_COST = 0.2
# Of a drive's peak, what DeepSpeed's asynchronous reads and writes reach: 3.69 of 5.6 GB/s and 3.18 of 4.3 GB/s
# (DeepNVMe tutorial, https://www.deepspeed.ai/tutorials/deepnvme).
DISK_EFFICIENCY = 0.7
# Of the host's memory bandwidth, what Adam on the CPU reaches: 10 billion parameters of 28 bytes take CPU-Adam 2.57 s
# on a DGX-2 (ZeRO-Offload, https://arxiv.org/abs/2101.06840, table 4), whose 12 channels of DDR4-2666 have 256 GB/s.
HOST_EFFICIENCY = 0.43
AXES = ("tp", "cp", "ep", "fsdp", "replicate", "pp")


@dataclass(frozen=True)
class AxisTraffic:
    """Traffic of one axis.

    Attributes:
        sends: Bytes that the busiest device sends per step.
        operations: How many operations that is.
        link: "node", "network", "host" or "disk".
        bandwidth: Bytes per second and direction that a device has on this axis.
        latency: Seconds that an operation costs besides.
        note: What travels.
    """

    sends: float
    operations: int
    link: str
    bandwidth: float
    latency: float
    note: str

    @property
    def seconds(self) -> float:
        """Time of all of it, one after the other."""
        return self.sends / self.bandwidth + self.operations * self.latency


def ring(bytes_: float, ranks: int) -> float:
    """Bytes that each rank sends to gather or reduce-scatter `bytes_` (in all) over `ranks`."""
    return bytes_ * (ranks - 1) / ranks


class Link(NamedTuple):
    """What an axis' messages travel over.

    Attributes:
        kind: "node", "network", "host" or "disk".
        bandwidth: Bytes per second and direction that a device has.
        latency: Seconds that one collective waits for messages to go round.
    """

    kind: str
    bandwidth: float
    latency: float

    def seconds(self, bytes_: float, operations: int = 1) -> float:
        """Time to send `bytes_` from each rank in so many operations."""
        return bytes_ / self.bandwidth + operations * self.latency if bytes_ else 0.0


def link_of(device: Device, per_node: int, stride: int, size: int) -> Link:
    """The link of an axis of `size` ranks that are `stride` apart.

    An axis that fits into a node uses the links there. One that leaves it is bound by the network; where several of its
    ranks share a node, a ring enters and leaves the node once, over all their ports.
    """
    if size == 1 or stride * size <= per_node:
        return Link("node", device.node_link * LINK_EFFICIENCY, (size - 1) * NODE_HOP)
    inside = max(1, per_node // stride)
    nodes = -(-size // inside)
    latency = (nodes - 1) * NETWORK_HOP + (size - nodes) * NODE_HOP
    return Link("network", min(device.node_link, inside * device.network_link) * LINK_EFFICIENCY, latency)


def links_of(layout: Layout, device: Device, per_node: int) -> dict[str, Link]:
    """The link of every axis; ranks are arranged as in `ParallelDims`. Besides what offloading uses: a device's way to
    the host ("host"), its share of the node's memory bandwidth ("host_memory") and disks ("disk_read", "disk_write").
    """
    tensor, context, shard = layout.tensor_parallel_size, layout.context_parallel_size, layout.shard_size
    inner, expert = tensor * context * shard, layout.expert_parallel_size
    neighbour = link_of(device, per_node, inner * layout.replicate_size, layout.pipeline_parallel_size)
    hop = NODE_HOP if neighbour.kind == "node" else NETWORK_HOP
    return {
        "tp": link_of(device, per_node, 1, tensor),
        "cp": link_of(device, per_node, tensor, context),
        "ep": link_of(device, per_node, 1, expert),
        "fsdp": link_of(device, per_node, tensor, context * shard),
        "replicate": link_of(device, per_node, inner, layout.replicate_size),
        "pp": neighbour._replace(latency=hop),
        "host": Link("host", device.host_link * LINK_EFFICIENCY, NODE_HOP),
        "host_memory": Link("host", device.host.memory_bandwidth * HOST_EFFICIENCY / per_node, 0.0),
        "disk_read": Link("disk", device.host.disk_read * DISK_EFFICIENCY / per_node, 0.0),
        "disk_write": Link("disk", device.host.disk_write * DISK_EFFICIENCY / per_node, 0.0),
    }


@dataclass(frozen=True)
class BlockTraffic:
    """What one block sends per microbatch in a forward; a backward sends the same, but for `cp`, which sends twice.

    Attributes:
        tp: The gather before and the reduction behind attention and MLP.
        cp: Keys and values once round the ring.
        ep: Tokens to their experts and back.
    """

    tp: float
    cp: float
    ep: float


def block_traffic(shape: Shape, unit: Unit, layout: Layout, workload: Workload) -> BlockTraffic:
    """See `BlockTraffic`."""
    e, tokens, tensor = workload.compute_bytes, layout.tokens(workload), layout.tensor_parallel_size
    hidden = e * tokens * shape.hidden
    keys_values = 2 * e * tokens * shape.kv_heads * shape.head_dim / tensor
    sizes = sizes_of(unit)
    # An MLP of experts alone works on each rank's own tokens: nothing to gather for it.
    gathered = 2 if sizes.intermediate else 1
    routed = hidden / layout.sequence_split * shape.experts_per_token if sizes.experts else 0.0
    return BlockTraffic(
        tp=gathered * 2 * ring(hidden, tensor),
        cp=(layout.context_parallel_size - 1) * keys_values,
        ep=2 * ring(routed, layout.expert_parallel_size),
    )


@dataclass(frozen=True)
class ParameterTraffic:
    """What one stage sends per step for its parameters.

    Attributes:
        gathers: How often each parameter is gathered per step.
        reductions: How often each gradient is reduced.
        gather, reduce: Bytes of one time each, on the sharding axis.
        kept: Bytes of gathers that are saved, since what is around the blocks stays whole from forward to backward.
        replicate: Bytes of the sum over the replicas, once a step.
    """

    gathers: int
    reductions: int
    gather: float
    reduce: float
    replicate: float
    kept: float = 0.0


def parameter_traffic(shape: Shape, stage: Stage, layout: Layout, workload: Workload) -> ParameterTraffic:
    """See `ParameterTraffic`."""
    cost = stage_bytes(shape, stage, layout, workload)
    pipelined = layout.pipeline_parallel_size > 1
    rounds = 1 if pipelined else layout.microbatches
    experts = cost.whole_experts
    # Bytes that one pass over all the stage's elements sends, per byte of an element.
    once = ring(cost.whole - experts, layout.sharding_size) + ring(experts, layout.expert_sharding_size)
    e, p = workload.compute_bytes, gradient_bytes(layout, workload)
    if layout.zero_stage == 0:  # an all-reduce over the data ranks: as much as a reduction and a gather
        replicas = 2 * ring(p * cost.whole, layout.replicate_size)
        return ParameterTraffic(gathers=0, reductions=1, gather=0.0, reduce=2 * p * once, replicate=replicas)
    again = layout.zero_stage == 3 and not pipelined
    root = stage.root.gathered(layout.vocabulary_split, layout.expert_parallel_size)
    return ParameterTraffic(
        gathers=2 * rounds if again else 1,
        kept=rounds * ring(e * root, layout.sharding_size) if again else 0.0,
        reductions=1 if layout.zero_stage == 1 else rounds,
        gather=e * once,
        reduce=p * once,
        replicate=2 * ring(p * cost.stored, layout.replicate_size),
    )


def traffic_of_rank(
    shape: Shape, stages: list[Stage], layout: Layout, workload: Workload, links: dict[str, Link]
) -> dict[str, AxisTraffic]:
    """Traffic of every axis that the layout uses, of a pipeline rank with these stages."""
    m = layout.microbatches
    sends, operations = dict.fromkeys(AXES, 0.0), dict.fromkeys(AXES, 0)
    boundary = workload.compute_bytes * layout.tokens(workload) * shape.hidden / layout.sequence_split
    for stage in stages:
        for kind in blocks_of(stage, layout.recompute):
            block = block_traffic(shape, kind.unit, layout, workload)
            times = m * kind.number * (3 if kind.recompute == "full" else 2)  # forward, backward, forward again
            sends["tp"] += times * block.tp
            sends["cp"] += (times + m * kind.number) * block.cp
            sends["ep"] += times * block.ep
            operations["tp"] += 4 * times
            operations["cp"] += times * (layout.context_parallel_size - 1)
            operations["ep"] += 2 * times
        for is_end in (stage.is_first, stage.is_last):  # embedding and head: one reduction or gather each way
            sends["tp"] += m * 2 * ring(boundary * layout.sequence_split, layout.vocabulary_split) * is_end
        parameters = parameter_traffic(shape, stage, layout, workload)
        sends["fsdp"] += parameters.gathers * parameters.gather - parameters.kept
        sends["fsdp"] += parameters.reductions * parameters.reduce
        sends["replicate"] += parameters.replicate
        units = len(stage.layers) + 1
        operations["fsdp"] += units * (parameters.gathers + parameters.reductions)
        operations["replicate"] += units
        neighbours = (not stage.is_first) + (not stage.is_last)
        sends["pp"] += m * neighbours * boundary
        operations["pp"] += m * neighbours
    notes = {
        "tp": "activations: gathered before and reduced behind attention and MLP",
        "cp": "keys and values round the ring",
        "ep": "tokens to their experts and back",
        "fsdp": "parameters gathered, gradients reduced",
        "replicate": "gradients summed over replicas",
        "pp": "activations and their gradients between stages",
    }
    return {
        axis: AxisTraffic(sends[axis], operations[axis], *links[axis], notes[axis]) for axis in AXES if sends[axis] > 0
    }
