"""axes.py's first part: how long the ranks of a pipeline wait, measured, beside what `ScheduleKind` computes.

Stages do not compute: they sleep, so that a machine of two cores can show four ranks at work at once. All else is what
a run uses: `strategies/pipeline.Pipeline`, torch's schedules, autograd, gloo's messages between processes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from train_overhead import spread

from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.strategies.pipeline import Pipeline

SEQ_LEN, HIDDEN = 64, 256  # a message between stages is [1, 64, 256] float32: 64 KiB


class Span(NamedTuple):
    """A piece of work: the forward of a microbatch through a stage, or half of its backward."""

    kind: str
    """"F", "I" (gradients of the stage's inputs) or "W" (of its weights)."""
    stage: int
    microbatch: int
    call: int
    """Pieces of one call of autograd have the same: what waits for one of them waits for all. -1 for forwards."""
    start: float
    """Seconds; likewise `end`."""
    end: float


Step = tuple[list[Span], float, float]  # what this rank did; when it entered the step and left it


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        schedule: Its name.
        ranks: Of the pipeline.
        stages_per_rank: On each.
        microbatches: Per step.
        seconds: That a rank needs for the forward of one microbatch through all its stages, and as long again for the
            gradients of inputs, and for those of weights: schedules are compared at equal work.
    """

    schedule: str
    ranks: int
    stages_per_rank: int
    microbatches: int
    seconds: float


class TimedStage(nn.Module):
    """A stage whose forward, input gradients and weight gradients each take a set time, and are written down.

    The two halves of the backward hang on two nodes of the autograd graph, as those of a linear layer do: a schedule
    that asks for the gradients of inputs alone runs one of them, and the other one later.

    Args:
        stage: Its number. The first one looks token ids up, so that gradients have somewhere to go.
        seconds: Of each of the three.
        spans: Where they are written down.
    """

    def __init__(self, stage: int, seconds: float, spans: list[Span]) -> None:
        super().__init__()
        self.stage, self.seconds, self.spans = stage, seconds, spans
        self.embedding = nn.Parameter(torch.ones(1, HIDDEN)) if stage == 0 else None
        self.scale = nn.Parameter(torch.ones(HIDDEN))

    def forward(self, x: Tensor, *, microbatch: Tensor) -> Tensor:
        """`[1, seq]` token ids or `[1, seq, hidden]` -> `[1, seq, hidden]`."""
        if self.embedding is not None:
            x = F.embedding(x, self.embedding)
        index = int(microbatch)
        scale = _ForWeights.apply(self.scale, self, index)
        return _ForInputs.apply(x, self, index) * scale

    def work(self, kind: str, microbatch: int) -> None:
        """Sleeps and writes down from when to when."""
        call = torch._C._current_graph_task_id()  # -1 outside a backward
        start = time.monotonic()  # one clock for all processes of the machine
        time.sleep(self.seconds)
        self.spans.append(Span(kind, self.stage, microbatch, call, start, time.monotonic()))


class _ForInputs(torch.autograd.Function):
    """The identity: takes the time of a forward, and of the input gradients in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: TimedStage, microbatch: int) -> Tensor:
        ctx.stage, ctx.microbatch = stage, microbatch
        stage.work("F", microbatch)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.stage.work("I", ctx.microbatch)
        return gradients[0], None, None


class _ForWeights(torch.autograd.Function):
    """The identity: takes the time of the weight gradients in the backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, stage: TimedStage, microbatch: int) -> Tensor:
        ctx.stage, ctx.microbatch = stage, microbatch
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        ctx.stage.work("W", ctx.microbatch)
        return gradients[0], None, None


def run_steps(cases: list[Case], steps: int) -> list[list[Step]]:
    """Runs the cases on this rank, each for one step that nobody looks at (it asks what stages send) and `steps` more.

    Returns:
        For each case, what this rank did in each step.
    """
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("pp",))
    return [_run_case(case, mesh, steps) for case in cases]


def _run_case(case: Case, mesh: Any, steps: int) -> list[Step]:
    kind = schedule_kind(case.schedule)
    spans: list[Span] = []
    stage_ids = kind.stage_ids(mesh.get_local_rank(), case.ranks, case.stages_per_rank)
    stages = {stage: TimedStage(stage, case.seconds / case.stages_per_rank, spans) for stage in stage_ids}
    pipeline = Pipeline(stages, mesh, torch.device("cpu"), schedule=case.schedule, microbatches=case.microbatches)
    inputs = torch.zeros(case.microbatches, SEQ_LEN, dtype=torch.long)
    microbatch = torch.arange(case.microbatches)
    results: list[Step] = []
    for _ in range(1 + steps):
        spans.clear()
        dist.barrier()
        start = time.monotonic()
        pipeline.run(inputs, inputs, lambda output, _: output.mean(), microbatch=microbatch)
        results.append((list(spans), start, time.monotonic()))
    return results[1:]


def summarize(case: Case, ranks: list[list[Step]]) -> dict[str, Any]:
    """One row of the table, from what each rank did in each step.

    Raises:
        RuntimeError: A stage did not do each microbatch's forward, input gradients and weight gradients exactly once.
    """
    worst, mean, wall, stretch = [], [], [], []
    for step in zip(*ranks, strict=True):
        for rank, (spans, _, _) in enumerate(step):
            _check_complete(case, rank, spans)
        seconds = max(end for _, _, end in step) - min(start for _, start, _ in step)
        busy = [sum(span.end - span.start for span in spans) for spans, _, _ in step]
        idle = [1 - one / seconds for one in busy]
        worst.append(max(idle))
        mean.append(statistics.fmean(idle))
        wall.append(seconds)
        stretch.append(max(busy) / (3 * case.microbatches * case.seconds))
    return {
        **asdict(case),
        "theory": schedule_kind(case.schedule).bubble_fraction(case.microbatches, case.ranks, case.stages_per_rank),
        "order": replay([rank[0][0] for rank in ranks]),
        "mean_rank": spread(mean),
        "worst_rank": spread(worst),
        "wall_seconds": spread(wall),
        "sleep_over_asked": spread(stretch),
    }


def replay(ranks: list[list[Span]]) -> float:
    """Share of the time that ranks would wait if they did these pieces of work, in the order in which each rank did
    them, all of one length and with messages that take no time.

    What a schedule's order is worth, whatever the machine was doing: it can be compared with theory to the last digit.

    Raises:
        RuntimeError: The ranks would wait for each other for ever, so something was not recorded.
    """
    waiting = [_calls(spans) for spans in ranks]
    clocks = [0] * len(ranks)
    finished: dict[tuple[str, int, int], int] = {}
    last_stage = max(span.stage for spans in ranks for span in spans)
    while any(waiting):
        before = len(finished)
        for rank, calls in enumerate(waiting):
            while calls:
                needed = [need for span in calls[0] if (need := _needs(span, last_stage)) is not None]
                if not all(need in finished for need in needed):
                    break
                clocks[rank] = max([clocks[rank], *(finished[need] for need in needed)]) + len(calls[0])
                finished |= {(span.kind, span.stage, span.microbatch): clocks[rank] for span in calls.pop(0)}
        if len(finished) == before:
            raise RuntimeError(f"the recorded orders wait for each other: {[calls[:1] for calls in waiting]}")
    return 1 - sum(map(len, ranks)) / (len(ranks) * max(clocks))


def _calls(spans: list[Span]) -> list[list[Span]]:
    """Pieces of work together with those of the same call."""
    calls: list[list[Span]] = []
    for span in spans:
        if calls and span.call != -1 and calls[-1][0].call == span.call:
            calls[-1].append(span)
        else:
            calls.append([span])
    return calls


def _needs(span: Span, last_stage: int) -> tuple[str, int, int] | None:
    """The other stage's piece of work that this one's input comes from."""
    if span.kind == "F" and span.stage > 0:
        return "F", span.stage - 1, span.microbatch
    if span.kind == "I" and span.stage < last_stage:
        return "I", span.stage + 1, span.microbatch
    return None


def timeline(ranks: list[list[Step]]) -> list[list[Span]]:
    """What each rank did in the shortest step, in seconds from its start."""
    steps = list(zip(*ranks, strict=True))
    begins = [min(start for _, start, _ in step) for step in steps]
    lengths = [max(end for _, _, end in step) - begin for step, begin in zip(steps, begins, strict=True)]
    chosen = lengths.index(min(lengths))
    begin = begins[chosen]
    return [
        [span._replace(start=span.start - begin, end=span.end - begin) for span in spans]
        for spans, _, _ in steps[chosen]
    ]


def _check_complete(case: Case, rank: int, spans: list[Span]) -> None:
    stage_ids = schedule_kind(case.schedule).stage_ids(rank, case.ranks, case.stages_per_rank)
    wanted = sorted((kind, stage, index) for kind in "FIW" for stage in stage_ids for index in range(case.microbatches))
    done = sorted((span.kind, span.stage, span.microbatch) for span in spans)
    if done != wanted:
        raise RuntimeError(f"{case}: rank {rank} did {len(done)} pieces of work instead of {len(wanted)}")
