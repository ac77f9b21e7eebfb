"""Why a layout was chosen, and where it departs from the recommendation matrix and from the decision tree of memory."""

from __future__ import annotations

from dataclasses import replace

from lightning_llm.planner.estimate import Cluster, estimate
from lightning_llm.planner.hosts import GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import worst_memory
from lightning_llm.planner.search import Found, states_over_memory
from lightning_llm.planner.shape import Shape


def reasons(found: Found, shape: Shape, workload: Workload, cluster: Cluster) -> tuple[str, ...]:
    """Why the first is first, a sentence each."""
    layout, result = found.layout, found.estimate
    lines = []
    if found.rule == "fastest":
        lines.append(
            f"It is the fastest of the {found.fitting:,} layouts that fit, of {found.considered:,} considered."
        )
    else:
        slower = result.step_seconds / found.fastest[1].step_seconds - 1
        lines.append(
            f"The fastest of {found.fitting:,} that fit ({found.fastest[0].describe()}) is {slower:.0%} faster; "
            + {
                "tree": "but the model fits a device, and data parallelism alone is the simplest to run.",
                "matrix": "that is less than such estimates can tell apart, and this is the matrix' own layout.",
                "simpler": "that is next to nothing, and this layout needs fewer axes.",
            }[found.rule]
        )
    lines.append(
        f"The fullest rank needs {result.memory.total / GIB:.1f} of {cluster.memory / GIB:.1f} GiB"
        + (f" (pipeline rank {result.memory_rank})." if layout.pipeline_parallel_size > 1 else ".")
    )
    if layout.tensor_parallel_size > 1:
        lines.append(
            f"Tensor parallelism of {layout.tensor_parallel_size} stays on a node's links "
            f"({cluster.device.node_link / 1e9:.0f} GB/s, the network has {cluster.device.network_link / 1e9:.0f})."
        )
    if layout.pipeline_parallel_size > 1:
        lines.append(_pipeline_reason(layout, result.bubble, shape, workload, cluster))
    lines += _recompute_reason(layout, shape, workload, cluster)
    if layout.replicate_size > 1:
        lines.append(
            f"{layout.replicate_size} replicas of {layout.shard_size} shards keep gathers within "
            f"{max(1, layout.shard_size * layout.tensor_parallel_size // cluster.per_node)} nodes."
        )
    return tuple(lines)


def departures(found: Found, shape: Shape, workload: Workload, cluster: Cluster) -> tuple[str, ...]:
    """Where the choice is not what matrix and tree say, and why."""
    return (*_from_matrix(found), *_from_tree(found.layout, shape, workload, cluster))


def _from_matrix(found: Found) -> list[str]:
    row, layout = found.row, found.layout
    if found.in_row is None:
        return [f"The matrix says {row.describe()} for {row.name}: no such layout is valid here and fits."]
    if found.in_row[0] == layout:
        return []
    ratio = found.in_row[1].step_seconds / found.estimate.step_seconds
    return [
        f"The matrix says {row.describe()} for {row.name}: the best such layout ({found.in_row[0].describe()}) takes "
        f"{ratio:.2f}x the time of a step, MFU {found.in_row[1].mfu:.1%} instead of {found.estimate.mfu:.1%}."
    ]


def tree_advice(shape: Shape, cluster: Cluster) -> tuple[float, str]:
    """How many times over a device's memory the model's states are, and what the decision tree says then."""
    over = states_over_memory(shape, cluster)
    if over <= 1:
        return over, "data parallelism with ZeRO-1"
    if over <= 4:
        return over, "ZeRO-2 and recomputation"
    if over <= 10:
        return over, "ZeRO-3"
    return over, "ZeRO-3 with offload, or more devices"


def _from_tree(layout: Layout, shape: Shape, workload: Workload, cluster: Cluster) -> list[str]:
    over, advice = tree_advice(shape, cluster)
    lines = []
    if over <= 1 and layout.zero_stage > 1 and layout.engine == "fsdp2":
        lines.append(
            f"The tree says {advice} for a model whose states fit ({over:.1f}x a device): FSDP2 shards gradients and "
            f"optimizer states together at no cost, so this is ZeRO-{layout.zero_stage}."
        )
    elif 1 < over <= 4 and layout.recompute == "none":
        lines.append(
            f"The tree says {advice} for a model {over:.1f}x over a device: sharded over {cluster.count} devices its "
            "activations fit without recomputation."
        )
    if 1 < over <= 4 and layout.zero_stage == 3 and layout.pipeline_parallel_size == 1:
        lines.append("ZeRO-3 instead of ZeRO-2: whole parameters of all layers at once would not leave room for more.")
    return lines


def _pipeline_reason(layout: Layout, bubble: float, shape: Shape, workload: Workload, cluster: Cluster) -> str:
    text = f"The pipeline of {layout.pipeline_parallel_size} idles {bubble:.1%} of the time"
    if layout.stages_per_rank > 1:
        plain = replace(layout, pipeline_schedule="1F1B", stages_per_rank=1)
        other = estimate(shape, plain, workload, cluster)
        return f"{text} with {layout.stages_per_rank} stages a rank; 1F1B with one would idle {other.bubble:.1%}."
    return f"{text} with {layout.microbatches} microbatches."


def _recompute_reason(layout: Layout, shape: Shape, workload: Workload, cluster: Cluster) -> list[str]:
    lighter = {"selective": "none", "full": "selective"}.get(str(layout.recompute))
    if lighter is None:
        return []
    _, memory = worst_memory(shape, replace(layout, recompute=lighter), workload)
    if memory.total <= cluster.memory:
        return []
    return [
        f"Recomputation is {layout.recompute}, since {lighter} would need {memory.total / GIB:.0f} GiB with "
        f"microbatches of {layout.microbatch_size}."
    ]
