"""How many bytes each rank needs, by part: the peak over every moment of the pipeline's schedule.

What an engine keeps of the states is in `fsdp2.py` and `deepspeed.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

from lightning_llm.planner.activations import LogitsBytes, block_bytes, blocks_of, logits_bytes
from lightning_llm.planner.deepspeed import deepspeed_states
from lightning_llm.planner.fsdp2 import fsdp2_states
from lightning_llm.planner.hosts import GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.shape import Shape, Stage, balanced_layers, cut_stages
from lightning_llm.planner.states import StateBytes
from lightning_llm.planner.timeline import Moment, moments, stages_of

# Two allowances that no formula gives. The first is what the caching allocator holds beyond what tensors need, as a
# share of all that comes and goes: published figures of torchtitan for the same number of tokens a microbatch differ by
# 9% (82.5 and 75.3 GiB, tables 5 and 6 of benchmarks/llama3_h100_202412_torchtitan.md). The second is the driver's
# context and the communicators' buffers, which torch does not count.
ALLOCATOR_OVERHEAD = 0.08
CONTEXT_BYTES = 1.5 * GIB


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at its peak, by part.

    Attributes:
        parameters: What the rank stores: its shard, in the stored dtype.
        optimizer: States of the optimizer.
        gathered_parameters: Whole parameters to compute with, in the computation's dtype.
        gradients: Sharded or whole, as far as they exist at the peak.
        activations: Kept for backwards that are to come.
        working_set: One block's temporaries: what is recomputed, gradients of activations.
        logits: Output layer's logits and the loss.
        communication: Staging of gathers and reductions, receive buffers of the pipeline.
        allocator: What the caching allocator holds beyond that, an allowance (`ALLOCATOR_OVERHEAD`).
        context: Driver and communicators, an allowance (`CONTEXT_BYTES`); not in what torch reports.
    """

    parameters: float = 0.0
    optimizer: float = 0.0
    gathered_parameters: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    working_set: float = 0.0
    logits: float = 0.0
    communication: float = 0.0
    allocator: float = 0.0
    context: float = 0.0

    @property
    def reserved(self) -> float:
        """What torch would report as reserved: all but the context."""
        return self.total - self.context

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Part -> bytes."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


@dataclass(frozen=True, kw_only=True)
class StageBytes(StateBytes):
    """What one stage costs a rank, bytes; the numbers that do not depend on the moment.

    Attributes:
        per_microbatch: Activations of one microbatch in flight.
        working_forward, working_backward: One block's temporaries.
        receive: Buffers that the pipeline receives into: FSDP2's for all microbatches at once.
    """

    per_microbatch: float
    working_forward: float
    working_backward: float
    receive: float


def stages_in(shape: Shape, layout: Layout) -> tuple[Stage, ...]:
    """The model cut as the layout says."""
    return cut_stages(shape, layout.layers_per_stage or balanced_layers(shape, layout.num_stages))


def memory_of_rank(shape: Shape, layout: Layout, workload: Workload, pipeline_rank: int) -> Memory:
    """The peak of one pipeline rank (its fullest data rank, the first)."""
    schedule, ranks, virtual = layout.pipeline_schedule, layout.pipeline_parallel_size, layout.stages_per_rank
    all_stages = stages_in(shape, layout)
    stages = [all_stages[index] for index in stages_of(schedule, pipeline_rank, ranks, virtual)]
    costs = [stage_bytes(shape, stage, layout, workload) for stage in stages]
    logits = logits_bytes(shape, layout, workload) if stages[-1].is_last else None
    receive = sum(cost.receive for cost in costs)
    at_step = Moving(gradients=sum(cost.step_gradients for cost in costs))  # while the optimizer works
    peak, most = at_step, sum(at_step)
    for moment in moments(schedule, pipeline_rank, ranks, virtual, layout.microbatches):
        moving = _at(moment, costs, logits, receive, pipelined=ranks > 1)
        if (total := sum(moving)) > most:
            peak, most = moving, total
    return Memory(
        parameters=sum(cost.parameters for cost in costs),
        optimizer=sum(cost.optimizer for cost in costs),
        **peak._asdict(),
        allocator=ALLOCATOR_OVERHEAD * most,
        context=CONTEXT_BYTES,
    )


def worst_memory(
    shape: Shape, layout: Layout, workload: Workload, ranks: Iterable[int] | None = None
) -> tuple[int, Memory]:
    """The pipeline rank that needs the most, and its memory.

    Args:
        ranks: Look at these alone. The first two and the last one are usually worse than those between.
    """
    memories = {
        rank: memory_of_rank(shape, layout, workload, rank)
        for rank in (range(layout.pipeline_parallel_size) if ranks is None else ranks)
    }
    worst = max(memories, key=lambda rank: memories[rank].total)
    return worst, memories[worst]


class Moving(NamedTuple):
    """The parts of `Memory` that come and go within a step."""

    gathered_parameters: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    working_set: float = 0.0
    logits: float = 0.0
    communication: float = 0.0


def _at(
    moment: Moment, costs: list[StageBytes], loss: LogitsBytes | None, receive: float, *, pipelined: bool
) -> Moving:
    """What is alive at one moment; `loss` on the rank of the last stage."""
    gathered = gradients = activations = 0.0
    for held, cost in zip(moment.held, costs, strict=True):
        activations += held.in_flight * cost.per_microbatch
        if not pipelined:
            # Lightning empties the gradients of a step after the next forward, so they are there all the time.
            gathered += cost.gathered_at_once
            gradients += cost.sharded_gradients
            continue
        if held.gathered:
            gathered += cost.gathered_at_once
        if held.gradients:
            gradients += cost.whole_gradients if held.gradients == 1 else cost.sharded_gradients
    cost, logits = costs[moment.active], 0.0
    working = {"F": cost.working_forward, "B": cost.working_backward, "R": 0.0}[moment.kind]
    if loss is not None and (in_flight := moment.held[-1].in_flight):
        output = loss.output if pipelined else 0.0  # without a pipeline nobody holds the logits once there is a loss
        logits = in_flight * (output + loss.loss)
        if moment.active == len(costs) - 1:
            # First the loss and its gradient, then the blocks: the loss's part is gone by then.
            at_loss, at_blocks = logits + loss.transient, logits - loss.loss + working
            logits, working = (at_loss, 0.0) if at_loss > at_blocks else (logits - loss.loss, working)
    return Moving(gathered, gradients, activations, working, logits, cost.staging + receive)


@lru_cache(maxsize=4096)
def stage_bytes(shape: Shape, stage: Stage, layout: Layout, workload: Workload) -> StageBytes:
    """See `StageBytes`: the engine's states, and activations, which are the same on both engines."""
    states = (fsdp2_states if layout.engine == "fsdp2" else deepspeed_states)(stage, layout, workload)
    kinds = blocks_of(stage, layout.recompute)
    blocks = [(kind, block_bytes(shape, kind.unit, layout, workload)) for kind in kinds]
    pipelined = layout.pipeline_parallel_size > 1
    boundary = layout.tokens(workload) * shape.hidden * workload.compute_bytes / layout.sequence_split
    received = (not stage.is_first) + (not stage.is_last)
    buffers = layout.microbatches
    if layout.engine == "deepspeed":  # `TrainSchedule.num_pipe_buffers`: as many as are in flight
        buffers = min(buffers, max(2, layout.pipeline_parallel_size - stage.index))
    per_microbatch = sum(kind.number * block.keeps(kind.recompute) for kind, block in blocks)
    if pipelined:
        per_microbatch += 0.0 if stage.is_last else boundary  # the output is kept to be sent and for its backward
        per_microbatch -= 0.0 if stage.is_first else boundary  # the first block's input is the receive buffer
    return StageBytes(
        **vars(states),
        per_microbatch=max(0.0, per_microbatch),
        working_forward=max((block.forward for _, block in blocks), default=0.0),
        # What a block's backward brings back, and the gradients of what passes through it.
        working_backward=max(
            (block.kept - block.keeps(kind.recompute) + block.gradients for kind, block in blocks), default=0.0
        ),
        receive=received * buffers * boundary if pipelined else 0.0,
    )
