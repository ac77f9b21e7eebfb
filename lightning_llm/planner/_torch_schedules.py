"""The order in which torch's pipeline schedules run their actions, without a process group.

torch.distributed.pipelining builds the order in private methods of schedule objects that need connected stages. They
were read in torch 2.13; tests/planner/test_timeline.py holds what is relied on. This file is the only one that does.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining.schedules import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)

_SCHEDULES: dict[str, Any] = {
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "LoopedBFS": ScheduleLoopedBFS,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBVZeroBubble": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}


def rank_actions(
    schedule: str, rank: int, num_ranks: int, stages_per_rank: int, microbatches: int
) -> list[tuple[str, int, int]]:
    """What one rank does, in order: `(kind, stage, microbatch)` with kind "F", "B" (whole backward), "I" or "W" (the
    backward of inputs or of weights alone). Idle slots are left out: they follow from what an action waits for.

    Args:
        schedule: One of torch's multi-stage schedules.
        rank: Of the pipeline axis.
        num_ranks: Ranks of the pipeline axis.
        stages_per_rank: Virtual stages.
        microbatches: Per optimizer step. The caller has seen to it that the schedule takes this number.
    """
    kind = _SCHEDULES[schedule]
    rounds = max(1, microbatches // num_ranks)
    instance = SimpleNamespace(
        _stages=[None] * stages_per_rank,
        _n_microbatches=microbatches,
        n_local_stages=stages_per_rank,
        num_stages=num_ranks * stages_per_rank,
        pp_group_size=num_ranks,
        number_of_rounds=rounds,
        microbatches_per_round=microbatches // rounds,
    )
    return list(_flat(kind._calculate_single_rank_operations(instance, rank)))


def _flat(actions: Any) -> Iterator[tuple[str, int, int]]:
    for action in actions:
        if action is None:
            continue
        # An overlapped forward and backward are two actions, one after the other: no gain is assumed.
        for one in action.sub_actions or (action,):
            yield one.computation_type.value, one.stage_index, one.microbatch_index
