"""What is said when no layout is valid, or none fits: the closest miss, and what would help."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.candidates import Options, tensor_divides
from lightning_llm.planner.estimate import Cluster
from lightning_llm.planner.hosts import GB, GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import Memory, worst_memory
from lightning_llm.planner.offload import Room, room_of
from lightning_llm.planner.shape import Shape


def nothing_valid(shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options) -> str:
    """Why there is not one layout."""
    wanted = {
        name: size for name, size in vars(options).items() if name.endswith("_parallel_size") and size is not None
    }
    asked = ", ".join(f"{name}={size}" for name, size in wanted.items())
    tensor = options.tensor_parallel_size
    if tensor is not None:
        for label, number in {**tensor_divides(shape, options.engine), "seq_len": workload.seq_len}.items():
            if number % tensor:
                return f"tensor_parallel_size({tensor}) does not divide {label}({number})."
        if cluster.per_node % tensor:
            return (
                f"tensor_parallel_size({tensor}) does not divide the {cluster.per_node} devices of a node, and would "
                "leave its links. Choose a divisor, or say how many devices a node has."
            )
    fixed = math.prod(wanted.values()) // (options.expert_parallel_size or 1)
    if cluster.count % fixed:
        return f"{asked}: {fixed} does not divide {cluster.count} devices."
    if options.engine == "deepspeed":
        if (options.replicate_size or 1) > 1:
            return (
                f"replicate_size={options.replicate_size}: the planner has no figures for hybrid sharding on "
                "DeepSpeed's engine (hpZ). Leave it out."
            )
        if (tensor or 1) > 1 and (workload.float8 or shape.config.qk_norm_whole):
            return (
                f"tensor_parallel_size({tensor}): DeepSpeed's AutoTP cuts plain linear layers alone, not float8 ones, "
                "and has no norm over all heads of a projection. Leave it out, or use FSDP2."
            )
        if (options.expert_parallel_size or 1) > 1 and fixed > (options.context_parallel_size or 1):
            return f"{asked}: DeepSpeed's engine shares out experts with pipeline and tensor sizes of 1 alone."
        if (options.pipeline_parallel_size or 1) > 1 and (options.offload_optimizer or options.offload_parameters):
            return (
                f"{asked}: on DeepSpeed's engine the planner knows no pipelines with offloading. Leave out one of them."
            )
    return (
        f"No layout of {cluster.count} devices{' with ' + asked if asked else ''} divides a global batch of "
        f"{global_batch} sequences into microbatches that a pipeline can run. Choose a global batch that is a multiple "
        f"of the data ranks, for example {math.lcm(cluster.count, global_batch)}."
    )


class DoesNotFitError(ConfigurationError):
    """There are valid layouts, but none fits.

    Attributes:
        closest: The layout that needs the smallest share more than there is.
        ratio: That share.
        lacks: What it lacks: `needs 1.8x the memory`.
    """

    def __init__(
        self, shape: Shape, cluster: Cluster, workload: Workload, closest: Layout, *, may_offload: bool = True
    ) -> None:
        _, memory = worst_memory(shape, closest, workload)
        room = room_of(shape, closest, workload, cluster.per_node)
        parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:3]
        largest = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts)
        self.closest = closest
        self.ratio = cluster.share(memory.total, *room)
        self.lacks = _lacks(memory, room, cluster)
        advice = _advice(shape, cluster, workload, closest, memory, may_offload)
        super().__init__(
            f"{shape.num_parameters / 1e9:.1f}B parameters do not fit on {cluster.count} x {cluster.device.name} with "
            f"{cluster.memory / GIB:.0f} GiB: the closest layout ({closest.describe()}) {self.lacks}, "
            f"{memory.total / GIB:.1f} GiB a device ({largest} GiB). What helps: {'; '.join(advice)}."
        )


def _lacks(memory: Memory, room: Room, cluster: Cluster) -> str:
    """What there is the least of, for the closest miss."""
    host, share = cluster.device.host, cluster.share(memory.total, *room)
    if memory.total >= share * cluster.memory:
        return f"needs {memory.total / cluster.memory:.1f}x the memory"
    if room.host >= share * host.memory:
        return f"needs {room.host / GB:,.0f} GB of host memory a node, of {host.memory / GB:,.0f}"
    return f"needs {room.disk / GB:,.0f} GB of NVMe a node, of {host.disk / GB:,.0f}"


def _advice(
    shape: Shape, cluster: Cluster, workload: Workload, closest: Layout, memory: Memory, may_offload: bool
) -> list[str]:
    """What would help, nearest first."""
    advice = []
    if more := _more_devices(shape, cluster, workload, closest):
        advice.append(more)
    if may_offload and not closest.offloads and memory.parameters + memory.optimizer > cluster.memory / 3:
        advice.append("optimizer states offloaded to the host")
    if workload.precision == "bf16-mixed" and closest.engine == "fsdp2":
        advice.append("precision bf16-true")
    if memory.activations > cluster.memory / 3 and closest.recompute != "full":
        advice.append("recompute: full")
    if memory.activations + memory.logits > cluster.memory / 3:
        advice.append("shorter sequences" if closest.microbatch_size == 1 else "microbatches of 1")
    return advice or ["a smaller model"]


def _more_devices(shape: Shape, cluster: Cluster, workload: Workload, closest: Layout) -> str:
    """How many devices the closest layout would fit on, if more data ranks alone make it fit."""
    for factor in (2**n for n in range(1, 11)):
        wider = replace(closest, data_parallel_size=closest.data_parallel_size * factor, replicate_size=1)
        needs = worst_memory(shape, wider, workload)[1].total, *room_of(shape, wider, workload, cluster.per_node)
        if cluster.share(*needs) <= 1:
            return f"more devices ({cluster.count * factor} would do)"
    return ""
