"""Simulated schedules against theory, and against torch's own checks of its schedules."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining.schedules import _Action, _validate_schedule, get_schedule_class

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.schedules import SCHEDULES as KINDS
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.planner.timeline import (
    moments,
    order,
    runs,
    simulate,
    stages_of,
)

SCHEDULES = [kind.name for kind in KINDS]
SPLIT_BACKWARD = [kind.name for kind in KINDS if kind.splits_backward]
SIZES = [(2, 4), (4, 8), (4, 16), (8, 16)]  # pipeline ranks, microbatches


def virtual(schedule: str) -> int:
    return 2 if schedule_kind(schedule).multi_stage else 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_every_microbatch_goes_once_through_every_stage(schedule: str, ranks: int, microbatches: int) -> None:
    seen = Counter(
        (action.kind, action.stage, action.microbatch)
        for rank in range(ranks)
        for action in order(schedule, rank, ranks, virtual(schedule), microbatches)
    )
    assert set(seen.values()) == {1}
    for stage in range(ranks * virtual(schedule)):
        for microbatch in range(microbatches):
            assert ("F", stage, microbatch) in seen
            whole = ("B", stage, microbatch) in seen
            split = ("I", stage, microbatch) in seen and ("W", stage, microbatch) in seen
            assert whole != split
            assert schedule in SPLIT_BACKWARD or whole


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_torch_accepts_the_order_as_one_of_its_schedules(schedule: str) -> None:
    """Contract with torch 2.13's private methods: its own validation, on what was taken from them."""
    ranks, stages = 4, virtual(schedule)
    assert get_schedule_class(schedule)
    names = {
        rank: [_Action.from_str(f"{a.stage}{a.kind}{a.microbatch}") for a in order(schedule, rank, ranks, stages, 8)]
        for rank in range(ranks)
    }
    mapping = _validate_schedule(names, ranks, ranks * stages, 8)
    assert mapping == {stage: schedule_kind(schedule).rank_of(stage, ranks) for stage in range(ranks * stages)}
    for rank in range(ranks):
        assert all(mapping[stage] == rank for stage in stages_of(schedule, rank, ranks, stages))


@given(st.sampled_from(["GPipe", "1F1B"]), st.integers(1, 12), st.integers(1, 40), st.floats(0.1, 5))
@settings(max_examples=60, deadline=None)
def test_single_stage_schedules_idle_as_theory_says(schedule: str, ranks: int, extra: int, backward: float) -> None:
    microbatches = ranks + extra - 1
    line = simulate(schedule, ranks, 1, microbatches, forward=[1.0] * ranks, backward=[backward] * ranks)
    assert line.makespan == pytest.approx((microbatches + ranks - 1) * (1 + backward))
    for rank in range(ranks):
        assert line.bubble(rank) == pytest.approx(
            schedule_kind(schedule).bubble_fraction(microbatches, ranks), abs=1e-9
        )


@given(st.sampled_from(["Interleaved1F1B", "LoopedBFS"]), st.integers(2, 6), st.integers(2, 4), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_interleaved_schedules_idle_as_theory_says(schedule: str, ranks: int, stages: int, rounds: int) -> None:
    microbatches = ranks * rounds
    line = simulate(
        schedule, ranks, stages, microbatches, forward=[1.0] * ranks * stages, backward=[2.0] * ranks * stages
    )
    assert line.mean_bubble == pytest.approx(
        schedule_kind(schedule).bubble_fraction(microbatches, ranks, stages), abs=1e-9
    )


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_a_split_backward_idles_less_than_interleaving(schedule: str) -> None:
    arguments = {"forward": [1.0] * 8, "backward": [2.0] * 8}
    split = simulate(schedule, 4, 2, 16, **arguments)
    assert split.mean_bubble < simulate("Interleaved1F1B", 4, 2, 16, **arguments).mean_bubble


@given(st.sampled_from(SCHEDULES), st.sampled_from(SIZES), st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_starts_before_what_it_needs(schedule: str, sizes: tuple[int, int], data: st.DataObject) -> None:
    ranks, microbatches = sizes
    stages = ranks * virtual(schedule)
    seconds = st.lists(st.floats(0.01, 3), min_size=stages, max_size=stages)
    transfer = data.draw(st.floats(0, 0.5))
    line = simulate(
        schedule,
        ranks,
        virtual(schedule),
        microbatches,
        forward=data.draw(seconds),
        backward=data.draw(seconds),
        transfer=transfer,
    )
    kind_of = schedule_kind(schedule)
    at = {tuple(span.action): span for spans in line.spans for span in spans}
    end_of_backward = {(s, m): span.end for (kind, s, m), span in at.items() if kind in "BI"}
    for (kind, stage, microbatch), span in at.items():
        if kind == "F" and stage > 0:
            moves = kind_of.rank_of(stage, ranks) != kind_of.rank_of(stage - 1, ranks)
            wire = transfer if moves else 0
            assert span.start >= at["F", stage - 1, microbatch].end + wire - 1e-9
        if kind in "BI":
            assert span.start >= at["F", stage, microbatch].end - 1e-9
            if stage < stages - 1:
                assert span.start >= end_of_backward[stage + 1, microbatch] - 1e-9
        if kind == "W":
            assert span.start >= at["I", stage, microbatch].end - 1e-9
    for spans in line.spans:
        assert all(a.end <= b.start + 1e-9 for a, b in zip(spans, spans[1:], strict=False))


def test_microbatches_in_flight_are_those_of_the_papers() -> None:
    def most(schedule: str, stages: int = 1) -> list[int]:
        count = 4 * stages
        line = simulate(schedule, 4, stages, 16, forward=[1.0] * count, backward=[2.0] * count)
        return [line.most_in_flight(rank) for rank in range(4)]

    assert most("1F1B") == [4, 3, 2, 1]
    assert most("GPipe") == [16] * 4
    # (v - 1) * p of the later stages, two more for each rank that follows, and the one at work
    assert most("Interleaved1F1B", 2) == [11, 9, 7, 5]
    assert most("ZBVZeroBubble", 2) == [8, 8, 8, 8]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_hold_the_peak_of_every_weighting(schedule: str) -> None:
    """What is kept of the moments must give the peak that a walk over all of them gives."""
    ranks, microbatches = 4, 8
    for rank in range(ranks):
        kept = moments(schedule, rank, ranks, virtual(schedule), microbatches)
        peak = max(sum(held.in_flight for held in moment.held) for moment in kept)
        alive = most = 0
        for action in order(schedule, rank, ranks, virtual(schedule), microbatches):
            alive += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            most = max(most, alive)
        assert peak == most
        # At the end each stage has been reduced, and is whole while it is.
        assert {moment.active for moment in kept if moment.kind == "R"} == set(range(virtual(schedule)))
        assert all(moment.held[moment.active].gathered for moment in kept)


@pytest.mark.parametrize(
    ("schedule", "ranks", "stages", "microbatches", "why"),
    [
        ("1F1B", 4, 2, 8, "one stage on each rank"),
        ("ZBVZeroBubble", 4, 1, 8, "exactly 2 on each rank"),
        ("1F1B", 4, 1, 3, "does not run 3 microbatches"),
        ("Interleaved1F1B", 4, 2, 9, "does not run 9 microbatches"),
        ("DualPipeV", 4, 2, 7, "does not run 7 microbatches"),
    ],
)
def test_what_torch_would_refuse_is_refused(
    schedule: str, ranks: int, stages: int, microbatches: int, why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why):
        order(schedule, 0, ranks, stages, microbatches)


@given(st.sampled_from([kind.name for kind in KINDS if kind.multi_stage]), st.integers(2, 6), st.integers(1, 30))
@settings(max_examples=80, deadline=None)
def test_what_is_not_refused_runs(schedule: str, ranks: int, microbatches: int) -> None:
    assume(runs(schedule, ranks, 2, microbatches))
    line = simulate(schedule, ranks, 2, microbatches, forward=[1.0] * 2 * ranks, backward=[2.0] * 2 * ranks)
    assert line.busy(0) == pytest.approx(2 * microbatches * 3)
