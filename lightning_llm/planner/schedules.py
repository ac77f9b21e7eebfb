"""The pipeline schedules: which stages a rank has, which numbers of microbatches they take, how long ranks are idle.

Plain arithmetic, for checks before any process is started, for the planner, and for pipeline.py, which runs them with
torch's classes of the same names. The constraints are those of torch.distributed.pipelining.schedules in torch 2.13;
tests/strategies/test_schedules.py holds this table against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.dividing import divisors

Placement = Literal["loop", "V"]


def _idle_full_backward(ranks: int, stages_per_rank: int, microbatches: int) -> int:
    return 3 * (ranks - 1) + 3 * (stages_per_rank - 1) * max(0, ranks - microbatches)


def _idle_interleaved_zero_bubble(ranks: int, stages_per_rank: int, microbatches: int) -> int:
    if microbatches >= ranks:
        return ranks - 1
    missing = ranks - microbatches
    return ranks - 1 + missing + (stages_per_rank - 1) * max(missing, 2 * ranks - 3 * microbatches)


def _idle_zbv(ranks: int, stages_per_rank: int, microbatches: int) -> int:
    return max(ranks - 1, 4 * ranks - 2 - 2 * microbatches)


def _idle_dualpipe_v(ranks: int, stages_per_rank: int, microbatches: int) -> int:
    return ranks - 1


@dataclass(frozen=True)
class ScheduleKind:
    """One way to order the forwards and backwards of microbatches over the stages of a pipeline.

    Stages are numbered in the order of the layers, `ranks * stages_per_rank` of them. "loop" deals them out in turns
    (rank 0 of 2 has stages 0 and 2), "V" goes down the ranks and comes back (rank 0 of 2 has stages 0 and 3).

    Attributes:
        name: As torch spells it.
        idle: `(ranks, stages_per_rank, microbatches) ->` time that a rank waits in one step, in forwards of one
            microbatch through one stage, if forward and the two halves of the backward take the same time and
            messages none. Counted until the last rank has finished, as a synchronous optimizer step sees it.
        multi_stage: A rank may have several stages.
        placement: How stages are dealt out to the ranks.
        splits_backward: Gradients of weights are computed later than those of inputs, to fill waiting time ("zero
            bubble"): incompatible with torch.compile on the whole stage.
        microbatch_per_stage: Needs at least as many microbatches as stages.
        in_rounds: `microbatches // ranks` rounds of equal size.
        source: The paper.
    """

    name: str
    idle: Callable[[int, int, int], int]
    multi_stage: bool = False
    placement: Placement = "loop"
    splits_backward: bool = False
    microbatch_per_stage: bool = False
    in_rounds: bool = False
    source: str = ""

    # -- stages --

    def resolve_stages_per_rank(self, stages_per_rank: int | Literal["auto"] = "auto") -> int:
        """A valid number of stages per rank; "auto" is 2 where a rank may have several, else 1.

        Raises:
            ConfigurationError: The schedule does not take that number.
        """
        if stages_per_rank == "auto":
            return 2 if self.multi_stage else 1
        if not isinstance(stages_per_rank, int) or isinstance(stages_per_rank, bool) or stages_per_rank < 1:
            raise ConfigurationError(
                f"stages_per_rank={stages_per_rank!r} must be a whole number of at least 1, or 'auto'."
            )
        if self.placement == "V" and stages_per_rank != 2:
            raise ConfigurationError(
                f"{self.name} places the stages as a V, exactly 2 on each rank, but stages_per_rank={stages_per_rank}. "
                "Set it to 2 or 'auto', or use a schedule that takes other numbers: "
                f"{_names(kind for kind in SCHEDULES if kind.multi_stage and kind.placement == 'loop')}."
            )
        if not self.multi_stage and stages_per_rank != 1:
            raise ConfigurationError(
                f"{self.name} has one stage on each rank, but stages_per_rank={stages_per_rank}. Set it to 1 or "
                f"'auto', or use one of {_names(kind for kind in SCHEDULES if kind.multi_stage)}."
            )
        return stages_per_rank

    def stage_ids(self, rank: int, num_ranks: int, stages_per_rank: int) -> tuple[int, ...]:
        """Stages of a rank, ascending."""
        if self.placement == "V":
            return (rank, 2 * num_ranks - 1 - rank)
        return tuple(range(rank, num_ranks * stages_per_rank, num_ranks))

    def rank_of(self, stage: int, num_ranks: int) -> int:
        """The rank that has a stage."""
        turn, position = divmod(stage, num_ranks)
        return num_ranks - 1 - position if self.placement == "V" and turn == 1 else position

    def loss_rank(self, num_ranks: int) -> int:
        """The rank of the last stage, which has the output and the loss. Stage 0 is on rank 0 always."""
        return 0 if self.placement == "V" else num_ranks - 1

    # -- microbatches --

    def minimum_microbatches(self, num_ranks: int, stages_per_rank: int) -> int:
        """Fewest microbatches that the schedule runs with."""
        return num_ranks * stages_per_rank if self.microbatch_per_stage else 1

    def fits(self, microbatches: int, num_ranks: int, stages_per_rank: int) -> bool:
        """Whether the schedule runs with this number of microbatches."""
        if microbatches < self.minimum_microbatches(num_ranks, stages_per_rank):
            return False
        return not self.in_rounds or microbatches % max(1, microbatches // num_ranks) == 0

    def choose_microbatches(self, wanted: int | str, batch_size: int, num_ranks: int, stages_per_rank: int = 1) -> int:
        """Number of microbatches for a data rank's batch: `wanted`, or for "auto" the fewest from `2 * num_ranks` up.

        1F1B idles `(ranks - 1) / (microbatches + ranks - 1)` of the time, so more are better until each is too small
        to keep the device busy (https://arxiv.org/abs/2104.04473, section 2.2).

        Args:
            wanted: A number, or "auto".
            batch_size: Sequences that each data rank gets.
            num_ranks: Of the pipeline.
            stages_per_rank: See `resolve_stages_per_rank`.

        Raises:
            ConfigurationError: The batch cannot be split so, or the schedule does not run with that number.
        """
        minimum = self.minimum_microbatches(num_ranks, stages_per_rank)
        if batch_size < minimum:
            compared = f"fewer than the {minimum} pipeline stages" if self.microbatch_per_stage else "none"
            raise ConfigurationError(
                f"Each data rank gets {batch_size} sequences per batch, {compared}; {self.name} needs at least "
                f"{minimum} microbatches. Raise the batch size so that each data rank gets at least {minimum}, or use "
                "fewer stages."
            )
        fitting = [count for count in divisors(batch_size) if self.fits(count, num_ranks, stages_per_rank)]
        if wanted == "auto":
            return next((count for count in fitting if count >= 2 * num_ranks), fitting[-1])
        if wanted not in fitting:
            raise ConfigurationError(
                f"microbatches({wanted}) must divide the {batch_size} sequences that each data rank gets per batch"
                f"{self._requirement(num_ranks, stages_per_rank)}. Choose microbatches from {fitting}."
            )
        return int(wanted)

    def bubble_fraction(self, microbatches: int, num_ranks: int, stages_per_rank: int = 1) -> float:
        """Share of the ranks' time in which they wait, by the assumptions of `idle`."""
        waiting = self.idle(num_ranks, stages_per_rank, microbatches)
        return waiting / (waiting + 3 * stages_per_rank * microbatches)

    def _requirement(self, num_ranks: int, stages_per_rank: int) -> str:
        if self.microbatch_per_stage:
            return f", and be at least the {num_ranks * stages_per_rank} pipeline stages"
        if self.in_rounds:
            return f", and {self.name} runs them in microbatches // {num_ranks} rounds, which must be of equal size"
        return ""


SCHEDULES = (
    ScheduleKind("GPipe", _idle_full_backward, source="https://arxiv.org/abs/1811.06965"),
    ScheduleKind("1F1B", _idle_full_backward, microbatch_per_stage=True, source="https://arxiv.org/abs/1806.03377"),
    ScheduleKind(
        "Interleaved1F1B",
        _idle_full_backward,
        multi_stage=True,
        in_rounds=True,
        source="https://arxiv.org/abs/2104.04473",
    ),
    ScheduleKind("LoopedBFS", _idle_full_backward, multi_stage=True, source="https://arxiv.org/abs/2211.05953"),
    ScheduleKind(
        "InterleavedZeroBubble",
        _idle_interleaved_zero_bubble,
        multi_stage=True,
        splits_backward=True,
        in_rounds=True,
        source="https://arxiv.org/abs/2401.10241",
    ),
    ScheduleKind(
        "ZBVZeroBubble",
        _idle_zbv,
        multi_stage=True,
        placement="V",
        splits_backward=True,
        source="https://arxiv.org/abs/2401.10241",
    ),
    ScheduleKind(
        "DualPipeV",
        _idle_dualpipe_v,
        multi_stage=True,
        placement="V",
        splits_backward=True,
        microbatch_per_stage=True,
        source="https://arxiv.org/abs/2412.19437",
    ),
)


def schedule_kind(name: str) -> ScheduleKind:
    """The schedule of a name, in upper or lower case.

    Raises:
        ConfigurationError: There is none; lists them.
    """
    for kind in SCHEDULES:
        if isinstance(name, str) and kind.name.lower() == name.lower():
            return kind
    raise ConfigurationError(f"There is no pipeline schedule {name!r}. Use one of {_names(SCHEDULES)}.")


def _names(kinds: Iterable[ScheduleKind]) -> str:
    return ", ".join(kind.name for kind in kinds)
