"""From a model and a cluster to a layout: every valid one is estimated and what does not fit is discarded. The
recommendation matrix' own is taken where it is as fast as the estimate can tell, else the fastest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.dividing import divisors
from lightning_llm.planner.estimate import Cluster, Estimate, estimate, quick_step_seconds
from lightning_llm.planner.layout import Layout, Recompute, Workload
from lightning_llm.planner.memory import GIB, worst_memory
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.planner.shape import Shape, sizes_of
from lightning_llm.planner.timeline import runs

# Estimates of step time are off by 10 to 25% where published figures exist (tests/planner/test_published.py). So the
# matrix' own layout is taken unless another one is faster by more than this; below that, practice is the better judge.
TOLERANCE = 0.15
SIMPLER = 0.02  # what an axis less may cost
SHORTLIST = 16  # layouts that are simulated exactly
LONG_CONTEXT = 32768  # tokens from which a sequence may be shared by several ranks
MAX_PIPELINE = 32
STATE_BYTES = 16  # of a parameter: itself, gradient and two optimizer states, float32 each


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the search may choose from. A fixed size leaves it no choice.

    Attributes:
        tensor_parallel_size, pipeline_parallel_size, context_parallel_size, expert_parallel_size, replicate_size: A
            number of ranks, or None to choose.
        zero_stages: Those that the strategy offers. Sharding gradients beside optimizer states costs FSDP2 nothing, so
            stages 0 and 1 are for estimates alone.
        recomputes: In the order in which they are preferred.
        schedules: Those that are safe with recomputation and compilation; zero-bubble schedules can be estimated, not
            chosen.
        stages_per_rank: Of interleaved schedules.
        microbatch_sizes: Sequences computed at once.
    """

    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    context_parallel_size: int | None = None
    expert_parallel_size: int | None = None
    replicate_size: int | None = None
    zero_stages: tuple[int, ...] = (2, 3)
    recomputes: tuple[Recompute, ...] = ("none", "selective", "full")
    schedules: tuple[str, ...] = ("1F1B", "Interleaved1F1B")
    stages_per_rank: tuple[int, ...] = (2, 4)
    microbatch_sizes: tuple[int, ...] = (1, 2, 4, 8)


@dataclass(frozen=True)
class Row:
    """A row of the recommendation matrix for a model's size."""

    name: str
    tensor: int
    pipelines: tuple[int, int]
    """Smallest and largest pipeline size."""

    def describe(self) -> str:
        """The recommendation in words."""
        low, high = self.pipelines
        if self.tensor == 1 and high == 1:
            return "data parallelism only"
        pipeline = "" if high == 1 else f", pipeline {low}-{high}"
        return f"tensor {self.tensor}{pipeline}, data the rest"


def matrix_row(num_parameters: int) -> Row:
    """The row for a model of so many parameters: what the field does, before anything is computed."""
    billions = num_parameters / 1e9
    if billions < 7:
        return Row("below 7B", 1, (1, 1))
    if billions < 30:
        return Row("7B-30B", 8, (1, 1))
    if billions < 100:
        return Row("30B-100B", 8, (2, 4))
    return Row("100B and more", 8, (8, 16))


def matrix_distance(row: Row, shape: Shape, layout: Layout) -> float:
    """How many doublings a layout is away from a row; for a mixture of experts also from one expert a rank."""
    low, high = row.pipelines
    nearest = min(max(layout.pipeline_parallel_size, low), high)
    distance = abs(math.log2(layout.tensor_parallel_size / row.tensor))
    distance += abs(math.log2(layout.pipeline_parallel_size / nearest))
    if shape.num_experts:
        most = math.gcd(shape.num_experts, layout.foldable_size)
        distance += math.log2(most / layout.expert_parallel_size) if layout.expert_parallel_size <= most else 0.0
    return distance


@dataclass(frozen=True)
class Found:
    """What the search found.

    Attributes:
        layout, estimate: The choice.
        rule: Why it is: "fastest", "tree" (the model fits a device: data parallelism), "matrix" (its own, as fast as
            an estimate can tell) or "simpler" (as fast with fewer axes).
        runner_ups: Next best ones of other sizes, with their estimates.
        considered: How many layouts were looked at.
        fitting: How many of them fit into memory.
        row: The matrix' row.
        in_row: The best layout in that row, if one fits and is valid.
        fastest: The fastest of all.
    """

    layout: Layout
    estimate: Estimate
    rule: str
    runner_ups: tuple[tuple[Layout, Estimate], ...]
    considered: int
    fitting: int
    row: Row
    in_row: tuple[Layout, Estimate] | None
    fastest: tuple[Layout, Estimate]


@dataclass
class _Count:
    """Why what was not considered was not, for the message when nothing is left."""

    considered: int = 0
    batch: int = 0
    sizes: list[int] = field(default_factory=list)


def candidates(
    shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options, count: _Count | None = None
) -> Iterator[Layout]:
    """Every layout of all devices that the model, the batch and the schedules can be divided into."""
    count = count or _Count()
    for tensor in _tensor_sizes(shape, cluster, workload, options):
        for context in _context_sizes(cluster.count // tensor, workload, options):
            for pipeline in _pipeline_sizes(shape, cluster.count // (tensor * context), options):
                data = cluster.count // (tensor * context * pipeline)
                if global_batch % data:
                    count.batch += 1
                    continue
                for replicate in _replicate_sizes(data, tensor * context, cluster, options):
                    foldable = data // replicate * context * tensor
                    for expert in _expert_sizes(shape, foldable, options):
                        sizes: dict[str, Any] = {
                            "tensor_parallel_size": tensor,
                            "context_parallel_size": context,
                            "pipeline_parallel_size": pipeline,
                            "data_parallel_size": data,
                            "replicate_size": replicate,
                            "expert_parallel_size": expert,
                        }
                        for layout in _ways(shape, sizes, global_batch // data, options):
                            count.considered += 1
                            yield layout


def _ways(shape: Shape, sizes: dict[str, Any], local_batch: int, options: Options) -> Iterator[Layout]:
    """The ways to run one set of sizes: schedule, microbatches, recomputation, ZeRO stage."""
    pipeline = sizes["pipeline_parallel_size"]
    schedules: list[tuple[str, int]] = [("1F1B", 1)]
    stages = options.zero_stages
    if pipeline > 1:
        schedules = [
            (schedule, virtual)
            for schedule in options.schedules
            for virtual in (options.stages_per_rank if schedule_kind(schedule).multi_stage else (1,))
            if pipeline * virtual <= len(shape.layers)
        ]
        stages = (max(options.zero_stages),)  # in a pipeline stages 2 and 3 are one
    for schedule, virtual in schedules:
        for size in options.microbatch_sizes:
            count = local_batch // size
            # Fewer microbatches than ranks leave most of a pipeline idle.
            if local_batch % size or count < pipeline or not runs(schedule, pipeline, virtual, count):
                continue
            for zero_stage in stages:
                for recompute in options.recomputes:
                    yield Layout(
                        **sizes,
                        zero_stage=zero_stage,
                        pipeline_schedule=schedule,
                        stages_per_rank=virtual,
                        microbatch_size=size,
                        microbatches=count,
                        recompute=recompute,
                    )


def search(
    shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options | None = None
) -> Found:
    """The layout to take.

    Raises:
        ConfigurationError: No layout is valid, or none fits; says what is nearest and what would help.
    """
    options = options or Options()
    count = _Count()
    fitting: list[tuple[float, Layout]] = []
    closest: tuple[float, Layout] | None = None
    for layout in candidates(shape, cluster, workload, global_batch, options, count):
        last = layout.pipeline_parallel_size - 1
        _, memory = worst_memory(shape, layout, workload, sorted({0, min(1, last), last}))
        ratio = memory.total / cluster.memory
        if closest is None or ratio < closest[0]:
            closest = (ratio, layout)
        if ratio <= 1:
            fitting.append((quick_step_seconds(shape, layout, workload, cluster), layout))
    if closest is None:
        raise ConfigurationError(_nothing_valid(shape, cluster, workload, global_batch, options))
    row = matrix_row(shape.num_parameters)
    exact = _exact(shape, cluster, workload, fitting, row)
    if not exact:
        raise ConfigurationError(_nothing_fits(shape, cluster, workload, closest[1]))
    in_row = [pair for pair in exact if matrix_distance(row, shape, pair[0]) == 0]
    best_in_row = min(in_row, key=_step, default=None)
    fastest = min(exact, key=_step)
    choice, rule = _choose(shape, cluster, exact, best_in_row, fastest)
    return Found(
        layout=choice[0],
        estimate=choice[1],
        rule=rule,
        runner_ups=_runner_ups(choice[0], exact),
        considered=count.considered,
        fitting=len(fitting),
        row=row,
        in_row=best_in_row,
        fastest=fastest,
    )


Pair = tuple[Layout, Estimate]


def _step(pair: Pair) -> float:
    return pair[1].step_seconds


def states_over_memory(shape: Shape, cluster: Cluster) -> float:
    """How many times over a device's memory parameters, gradients and optimizer states are, 16 bytes a parameter."""
    return shape.num_parameters * STATE_BYTES / cluster.memory


def _choose(shape: Shape, cluster: Cluster, exact: list[Pair], in_row: Pair | None, fastest: Pair) -> tuple[Pair, str]:
    """The layout to take, and by which rule."""
    data_only = [pair for pair in exact if pair[0].world_size == pair[0].data_parallel_size]
    if states_over_memory(shape, cluster) <= 1 and data_only:
        best = min(data_only, key=_step)
        return best, "fastest" if best == fastest else "tree"
    if in_row is not None and _step(in_row) <= _step(fastest) * (1 + TOLERANCE):
        return in_row, "fastest" if in_row == fastest else "matrix"
    near = [pair for pair in exact if _step(pair) <= _step(fastest) * (1 + SIMPLER)]
    best = min(near, key=lambda pair: (_axes(pair[0]), _step(pair)))
    return best, "fastest" if best == fastest else "simpler"


def _exact(
    shape: Shape, cluster: Cluster, workload: Workload, fitting: list[tuple[float, Layout]], row: Row
) -> list[tuple[Layout, Estimate]]:
    """The fastest layouts, the best of each set of sizes, and the matrix' own, simulated and weighed on every rank."""
    fitting.sort(key=lambda pair: pair[0])
    taken: dict[tuple[int, ...], int] = {}
    chosen: list[Layout] = []
    for _, layout in fitting:
        key = tuple(layout.sizes().values())
        in_row = matrix_distance(row, shape, layout) == 0
        if taken.get(key, 0) < 3 and (len(chosen) < SHORTLIST or (in_row and len(chosen) < 2 * SHORTLIST)):
            taken[key] = taken.get(key, 0) + 1
            chosen.append(layout)
    results = [(layout, estimate(shape, layout, workload, cluster)) for layout in chosen]
    return [pair for pair in results if pair[1].memory.total <= cluster.memory]


def _axes(layout: Layout) -> int:
    """How many axes are in use: the fewer, the simpler to run."""
    return sum(size > 1 for name, size in layout.sizes().items() if name not in ("world_size", "data_parallel_size"))


def _runner_ups(chosen: Layout, exact: list[tuple[Layout, Estimate]]) -> tuple[tuple[Layout, Estimate], ...]:
    """The fastest of other sizes, one a set of sizes."""
    others: dict[tuple[int, ...], tuple[Layout, Estimate]] = {}
    for layout, result in sorted(exact, key=_step):
        key = tuple(layout.sizes().values())
        if key != tuple(chosen.sizes().values()):
            others.setdefault(key, (layout, result))
    return tuple(list(others.values())[:4])


# -- sizes --


def _fixed(size: int | None, sizes: list[int]) -> list[int]:
    return sizes if size is None else [s for s in sizes if s == size]


def tensor_divides(shape: Shape) -> dict[str, int]:
    """What the tensor size must divide."""
    widths = {sizes_of(unit).intermediate for unit in shape.layers} - {0}
    return {
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        **{f"intermediate_size {width}": width for width in widths},
    }


def _tensor_sizes(shape: Shape, cluster: Cluster, workload: Workload, options: Options) -> list[int]:
    """Within a node, for its links; dividing heads, widths, vocabulary and the sequence."""
    numbers = (*tensor_divides(shape).values(), workload.seq_len, cluster.count)
    sizes = [size for size in divisors(cluster.per_node) if all(number % size == 0 for number in numbers)]
    return _fixed(options.tensor_parallel_size, sizes)


def _context_sizes(ranks: int, workload: Workload, options: Options) -> list[int]:
    """Only for long sequences: each rank needs two equal pieces, one early and one late, of thousands of tokens."""
    wanted = options.context_parallel_size
    shortest = LONG_CONTEXT // 4 if wanted is None else 1
    sizes = [
        size
        for size in divisors(ranks)
        if size == 1
        or (
            workload.seq_len % (2 * size) == 0
            and workload.seq_len // size >= shortest
            and (wanted is not None or workload.seq_len >= LONG_CONTEXT)
        )
    ]
    return _fixed(wanted, sizes)


def _pipeline_sizes(shape: Shape, ranks: int, options: Options) -> list[int]:
    sizes = [size for size in divisors(ranks) if size <= min(MAX_PIPELINE, len(shape.layers))]
    return _fixed(options.pipeline_parallel_size, sizes)


def _replicate_sizes(data: int, stride: int, cluster: Cluster, options: Options) -> list[int]:
    """One replica, or replicas that are sharded over one, two, four or eight nodes (hybrid sharding)."""
    sizes = [1]
    for nodes in (1, 2, 4, 8):
        shards = nodes * cluster.per_node // stride
        if 1 < shards < data and data % shards == 0:
            sizes.append(data // shards)
    if options.replicate_size is not None and data % options.replicate_size == 0:
        sizes.append(options.replicate_size)
    return _fixed(options.replicate_size, sorted(set(sizes)))


def _expert_sizes(shape: Shape, foldable: int, options: Options) -> list[int]:
    experts = shape.num_experts
    if not experts:
        return _fixed(options.expert_parallel_size, [1])
    return _fixed(options.expert_parallel_size, divisors(math.gcd(experts, foldable)))


# -- when there is nothing --


def _nothing_valid(shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options) -> str:
    wanted = {
        name: size for name, size in vars(options).items() if name.endswith("_parallel_size") and size is not None
    }
    asked = ", ".join(f"{name}={size}" for name, size in wanted.items())
    tensor = options.tensor_parallel_size
    if tensor is not None:
        for label, number in {**tensor_divides(shape), "seq_len": workload.seq_len}.items():
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
    return (
        f"No layout of {cluster.count} devices{' with ' + asked if asked else ''} divides a global batch of "
        f"{global_batch} sequences into microbatches that a pipeline can run. Choose a global batch that is a multiple "
        f"of the data ranks, for example {math.lcm(cluster.count, global_batch)}."
    )


def _nothing_fits(shape: Shape, cluster: Cluster, workload: Workload, closest: Layout) -> str:
    """The closest miss, and what would help."""
    _, memory = worst_memory(shape, closest, workload)
    ratio = memory.total / cluster.memory
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])[:3]
    largest = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in parts)
    fixed = memory.parameters + memory.optimizer
    advice = [_more_devices(shape, cluster, workload, closest)]
    if fixed > cluster.memory / 3:
        advice.append("optimizer states offloaded to the host")
    if workload.precision == "bf16-mixed":
        advice.append("precision bf16-true")
    if memory.activations > cluster.memory / 3 and closest.recompute != "full":
        advice.append("recompute: full")
    if memory.activations + memory.logits > cluster.memory / 3:
        advice.append("shorter sequences" if closest.microbatch_size == 1 else "microbatches of 1")
    return (
        f"{shape.num_parameters / 1e9:.1f}B parameters do not fit on {cluster.count} x {cluster.device.name} with "
        f"{cluster.memory / GIB:.0f} GiB: the closest layout ({closest.describe()}) needs {ratio:.1f}x the memory, "
        f"{memory.total / GIB:.1f} GiB a device ({largest} GiB). What helps: {'; '.join(filter(None, advice))}."
    )


def _more_devices(shape: Shape, cluster: Cluster, workload: Workload, closest: Layout) -> str:
    """How many devices the closest layout would fit on, if more data ranks alone make it fit."""
    for factor in (2**n for n in range(1, 11)):
        wider = replace(closest, data_parallel_size=closest.data_parallel_size * factor, replicate_size=1)
        if worst_memory(shape, wider, workload)[1].total <= cluster.memory:
            return f"more devices ({cluster.count * factor} would do)"
    return ""
