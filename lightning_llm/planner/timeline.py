"""Pipeline schedules, simulated exactly: who does what when, how long ranks idle, what is alive at each moment.

The order of actions is torch's own; durations are given by the caller. `memory.py` asks for the moments, `estimate.py`
for the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner._torch_schedules import rank_actions
from lightning_llm.planner.schedules import schedule_kind


class Action(NamedTuple):
    """One piece of work of one stage.

    Attributes:
        kind: "F" forward, "B" backward, or in two parts "I" (of the input) and "W" (of the weights).
    """

    kind: str
    stage: int
    microbatch: int


def runs(schedule: str, num_ranks: int, stages_per_rank: int, microbatches: int) -> bool:
    """Whether a schedule takes these numbers. A pipeline of one rank takes any number of microbatches."""
    return num_ranks == 1 or schedule_kind(schedule).fits(microbatches, num_ranks, stages_per_rank)


@lru_cache(maxsize=4096)
def stages_of(schedule: str, rank: int, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
    """The stages that a pipeline rank has, ascending."""
    return (0,) if num_ranks == 1 else schedule_kind(schedule).stage_ids(rank, num_ranks, stages_per_rank)


@lru_cache(maxsize=4096)
def order(schedule: str, rank: int, num_ranks: int, stages_per_rank: int, microbatches: int) -> tuple[Action, ...]:
    """What a rank does, in order. A pipeline of one rank alternates forward and backward: gradient accumulation.

    Raises:
        ConfigurationError: The schedule does not take these numbers.
    """
    kind = schedule_kind(schedule)
    if num_ranks == 1:
        return _one_f_one_b(0, 1, microbatches)
    kind.resolve_stages_per_rank(stages_per_rank)
    if not kind.fits(microbatches, num_ranks, stages_per_rank):
        raise ConfigurationError(
            f"{kind.name} with {stages_per_rank} stages on each of {num_ranks} ranks does not run {microbatches} "
            "microbatches."
        )
    if not kind.multi_stage:
        return _one_f_one_b(rank, microbatches if kind.name == "GPipe" else num_ranks - rank, microbatches)
    actions = rank_actions(kind.name, rank, num_ranks, stages_per_rank, microbatches)
    return tuple(Action(*action) for action in actions)


def _one_f_one_b(stage: int, in_flight: int, microbatches: int) -> tuple[Action, ...]:
    """Forwards until `in_flight` are under way, then each backward makes room for a forward; GPipe has room for all."""
    actions: list[Action] = []
    forwards = backwards = 0
    while backwards < microbatches:
        if forwards < microbatches and forwards - backwards < in_flight:
            actions.append(Action("F", stage, forwards))
            forwards += 1
        else:
            actions.append(Action("B", stage, backwards))
            backwards += 1
    return tuple(actions)


# -- time --


class Span(NamedTuple):
    """An action and when it runs, seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated step.

    Attributes:
        spans: Of each rank, in order.
    """

    spans: tuple[tuple[Span, ...], ...]

    @property
    def makespan(self) -> float:
        """Seconds from the first action to the last one's end."""
        return max(span.end for rank in self.spans for span in rank)

    def busy(self, rank: int) -> float:
        """Seconds that a rank works."""
        return sum(span.end - span.start for span in self.spans[rank])

    def bubble(self, rank: int) -> float:
        """Share of the step that a rank idles."""
        return 1 - self.busy(rank) / self.makespan

    @property
    def mean_bubble(self) -> float:
        """Share of all ranks' time that is idle."""
        return sum(self.bubble(rank) for rank in range(len(self.spans))) / len(self.spans)

    def in_flight(self, rank: int) -> list[tuple[float, int]]:
        """`(second, microbatches whose activations a rank keeps from then on)`; a virtual stage's count one each."""
        changes: list[tuple[float, int]] = []
        for action, start, end in self.spans[rank]:
            if action.kind == "F":
                changes.append((start, 1))
            elif action.kind in ("B", "W"):
                changes.append((end, -1))
        alive, counts = 0, []
        for second, change in sorted(changes):  # what ends goes before what starts in the same moment
            alive += change
            counts.append((second, alive))
        return counts

    def most_in_flight(self, rank: int) -> int:
        """The most microbatches whose activations a rank keeps."""
        return max(count for _, count in self.in_flight(rank))


def simulate(
    schedule: str,
    num_ranks: int,
    stages_per_rank: int,
    microbatches: int,
    *,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float = 0.0,
) -> Timeline:
    """Runs a schedule on paper.

    An action starts when its rank is free and what it needs is there: a forward needs the forward of the stage before,
    a backward that of the stage behind, and where these are on other ranks the transfer.

    Args:
        schedule: See `schedules.SCHEDULES`.
        num_ranks: Ranks of the pipeline axis.
        stages_per_rank: Virtual stages.
        microbatches: Per step.
        forward: Seconds of one microbatch, by stage.
        backward: Seconds of one microbatch's whole backward, by stage. Split, half of it is for the weights.
        transfer: Seconds from a rank to the next.
    """
    geometry = schedule_kind(schedule)
    queues = [order(schedule, rank, num_ranks, stages_per_rank, microbatches) for rank in range(num_ranks)]
    last = num_ranks * stages_per_rank - 1
    home = [geometry.rank_of(stage, num_ranks) for stage in range(last + 1)]
    duration = {
        "F": list(forward),
        "B": list(backward),
        "I": [seconds / 2 for seconds in backward],
        "W": [seconds / 2 for seconds in backward],
    }
    done: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in queues]
    clock = [0.0] * num_ranks
    position = [0] * num_ranks
    pending = sum(map(len, queues))
    while pending:
        before = pending
        for rank, queue in enumerate(queues):
            while position[rank] < len(queue):
                action = queue[position[rank]]
                kind, stage, microbatch = action
                start = clock[rank]
                needed: tuple[str, int] | None = None
                if kind == "F":
                    needed = ("F", stage - 1) if stage > 0 else None
                elif kind != "W":
                    needed = ("B", stage + 1) if stage < last else ("F", last)
                if needed is not None:
                    ready = done.get((*needed, microbatch))
                    if ready is None:
                        break
                    start = max(start, ready + (transfer if home[needed[1]] != rank else 0.0))
                end = start + duration[kind][stage]
                spans[rank].append(Span(action, start, end))
                clock[rank] = end
                position[rank] += 1
                pending -= 1
                if kind != "W":
                    done["F" if kind == "F" else "B", stage, microbatch] = end
        assert pending < before, f"{schedule} with {num_ranks} ranks and {microbatches} microbatches never ends"
    return Timeline(tuple(map(tuple, spans)))


# -- memory --


class Held(NamedTuple):
    """What a rank holds of one of its stages at some moment.

    Attributes:
        in_flight: Microbatches whose activations are kept.
        gradients: 0 none yet, 1 whole on this rank, 2 reduced to its shard.
        gathered: Whether the parameters are whole on this rank.
    """

    in_flight: int
    gradients: int
    gathered: bool


class Moment(NamedTuple):
    """A moment that may be a rank's peak: what it holds, and what its active stage (by local index) is doing: "F", "B",
    or "R" (reducing its gradients)."""

    held: tuple[Held, ...]
    kind: str
    active: int


@lru_cache(maxsize=4096)
def moments(schedule: str, rank: int, num_ranks: int, stages_per_rank: int, microbatches: int) -> tuple[Moment, ...]:
    """Every moment of a rank that no other one exceeds in all it holds.

    Memory depends on a rank's order alone, not on time. Within a backward activations fall and gradients grow block by
    block, so that one of its two ends is the peak; both are here. A stage's parameters are whole from its first forward
    to its last backward, after which its gradients are reduced (torch's pipeline stages with FSDP2).
    """
    stages = stages_of(schedule, rank, num_ranks, stages_per_rank)
    local = {stage: i for i, stage in enumerate(stages)}
    alive, backwards = [0] * len(stages), [0] * len(stages)
    gradients, gathered = [0] * len(stages), [False] * len(stages)
    seen: dict[Moment, None] = {}

    def note(kind: str, active: int) -> None:
        seen[Moment(tuple(map(Held, alive, gradients, gathered)), kind, active)] = None

    for kind, stage, _ in order(schedule, rank, num_ranks, stages_per_rank, microbatches):
        i = local[stage]
        if kind == "F":
            gathered[i] = True
            alive[i] += 1
            note("F", i)
            continue
        note("B", i)
        if kind == "I":  # activations stay for the weights' part
            continue
        alive[i] -= 1
        gradients[i] = max(gradients[i], 1)
        note("B", i)
        backwards[i] += 1
        if backwards[i] == microbatches:
            note("R", i)
            gradients[i], gathered[i] = 2, False
    return tuple(_maximal(seen))


def _maximal(seen: Iterable[Moment]) -> list[Moment]:
    """The moments that are not exceeded by one that is alike but for more microbatches in flight."""
    groups: dict[tuple[object, ...], list[Moment]] = {}
    for moment in seen:
        alike = (moment.kind, moment.active, tuple((h.gradients, h.gathered) for h in moment.held))
        groups.setdefault(alike, []).append(moment)
    kept = []
    for group in groups.values():
        for moment in group:
            counts = [h.in_flight for h in moment.held]
            exceeded = any(
                other is not moment and all(h.in_flight >= n for h, n in zip(other.held, counts, strict=True))
                for other in group
            )
            if not exceeded:
                kept.append(moment)
    return kept
