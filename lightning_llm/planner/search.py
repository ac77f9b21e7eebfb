"""From a model and a cluster to a layout on one engine: every valid one is estimated, what does not fit is discarded.
The recommendation matrix' own is taken where it is as fast as the estimate can tell, else the fastest."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.candidates import Count, Options, candidates
from lightning_llm.planner.engines import workload_refusal
from lightning_llm.planner.estimate import Cluster, Estimate, estimate, quick_step_seconds
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import worst_memory
from lightning_llm.planner.offload import room_of
from lightning_llm.planner.refusals import DoesNotFitError, nothing_valid
from lightning_llm.planner.shape import Shape

# Estimates of step time are off by 10 to 25% where published figures exist (tests/planner/test_published.py). So the
# matrix' own layout is taken unless another one is faster by more than this; below that, practice is the better judge.
TOLERANCE = 0.15
SIMPLER = 0.02  # what an axis less may cost
SHORTLIST = 16  # layouts that are simulated exactly
STATE_BYTES = 16  # of a parameter: itself, gradient and two optimizer states, float32 each


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


Pair = tuple[Layout, Estimate]


@dataclass(frozen=True)
class Weighed:
    """Every layout of one engine, weighed quickly.

    Attributes:
        fitting: Time of a step by `quick_step_seconds`, and the layout.
        closest: The layout that needs the smallest share of what there is.
        considered: How many layouts were looked at.
    """

    fitting: list[tuple[float, Layout]]
    closest: Layout
    considered: int


def weigh(shape: Shape, cluster: Cluster, workload: Workload, global_batch: int, options: Options) -> Weighed:
    """See `Weighed`.

    Raises:
        ConfigurationError: No layout is valid.
    """
    count = Count()
    fitting: list[tuple[float, Layout]] = []
    closest: tuple[float, float, Layout] | None = None
    for layout in candidates(shape, cluster, workload, global_batch, options, count):
        last = layout.pipeline_parallel_size - 1
        _, memory = worst_memory(shape, layout, workload, sorted({0, min(1, last), last}))
        ratio = cluster.share(memory.total, *room_of(shape, layout, workload, cluster.per_node))
        if closest is None or (ratio, memory.total) < closest[:2]:
            closest = (ratio, memory.total, layout)
        if ratio <= 1:
            fitting.append((quick_step_seconds(shape, layout, workload, cluster), layout))
    if closest is None:
        raise ConfigurationError(nothing_valid(shape, cluster, workload, global_batch, options))
    return Weighed(fitting, closest[2], count.considered)


def search(
    shape: Shape,
    cluster: Cluster,
    workload: Workload,
    global_batch: int,
    options: Options | None = None,
    *,
    may_offload: bool = True,
) -> Found:
    """The layout to take.

    Args:
        options: What to choose from.
        may_offload: Whether to advise offloading where nothing fits: not if that is tried anyhow.

    Raises:
        DoesNotFitError: There are valid layouts, but none fits; says which is nearest and what would help.
        ConfigurationError: No layout is valid, or the engine does not train the workload.
    """
    options = options or Options()
    if why := workload_refusal(options.engine, workload):
        raise ConfigurationError(why)
    weighed = weigh(shape, cluster, workload, global_batch, options)
    return settle(shape, cluster, workload, weighed, may_offload=may_offload)


def settle(shape: Shape, cluster: Cluster, workload: Workload, weighed: Weighed, *, may_offload: bool = True) -> Found:
    """The layout to take of those that were weighed.

    Args:
        may_offload: Whether to advise it where nothing fits.

    Raises:
        DoesNotFitError: None fits.
    """
    row = matrix_row(shape.num_parameters)
    exact = _exact(shape, cluster, workload, weighed.fitting, row)
    if not exact:
        raise DoesNotFitError(shape, cluster, workload, weighed.closest, may_offload=may_offload)
    in_row = [pair for pair in exact if matrix_distance(row, shape, pair[0]) == 0]
    best_in_row = min(in_row, key=_step, default=None)
    fastest = min(exact, key=_step)
    choice, rule = _choose(shape, cluster, exact, best_in_row, fastest)
    return Found(
        layout=choice[0],
        estimate=choice[1],
        rule=rule,
        runner_ups=_runner_ups(choice[0], exact),
        considered=weighed.considered,
        fitting=len(weighed.fitting),
        row=row,
        in_row=best_in_row,
        fastest=fastest,
    )


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
    return [
        pair for pair in results if cluster.share(pair[1].memory.total, pair[1].host_bytes, pair[1].disk_bytes) <= 1
    ]


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
