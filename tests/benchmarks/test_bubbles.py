"""What benchmarks/axes.py says of bubbles: the order in which the real schedules do their work against theory."""

from __future__ import annotations

import pytest
from axes import bubble_cases
from bubbles import Case, Span, Step, replay, run_steps, summarize, timeline

from lightning_llm.planner.schedules import schedule_kind
from tests.distributed import run_distributed


def piece(kind: str, stage: int, microbatch: int, start: float, end: float, call: int = -1) -> Span:
    return Span(kind, stage, microbatch, call, start, end)


# One microbatch through two ranks: only one of them works at any time.
RANKS: list[Step] = [
    ([piece("F", 0, 0, 0, 1), piece("I", 0, 0, 4, 5, 1), piece("W", 0, 0, 5, 6, 1)], 0.0, 6.0),
    ([piece("F", 1, 0, 1, 2), piece("I", 1, 0, 2, 3, 1), piece("W", 1, 0, 3, 4, 1)], 0.0, 8.0),
]


def test_replay_of_one_microbatch() -> None:
    assert replay([spans for spans, _, _ in RANKS]) == pytest.approx(1 / 2)


def test_replay_lets_weights_wait_where_they_are_a_call_of_their_own() -> None:
    (first, _, _), (last, _, _) = RANKS
    apart = [span._replace(call=call) for span, call in zip(last, (-1, 1, 2), strict=True)]
    assert replay([first, apart]) == pytest.approx(1 - 6 / (2 * 5))


def test_replay_refuses_orders_that_cannot_be() -> None:
    (first, _, _), (last, _, _) = RANKS
    with pytest.raises(RuntimeError, match="wait for each other"):
        replay([first[::-1], last])


def test_summary_counts_waiting_until_the_last_rank_leaves() -> None:
    case = Case(schedule="GPipe", ranks=2, stages_per_rank=1, microbatches=1, seconds=1.0)
    row = summarize(case, [[step] for step in RANKS])
    assert row["mean_rank"]["median"] == pytest.approx(1 - 3 / 8)
    assert row["theory"] == row["order"] == pytest.approx(1 / 2)
    assert timeline([[step] for step in RANKS])[1][-1].end == 4


def test_summary_refuses_a_step_with_work_left_out() -> None:
    case = Case(schedule="GPipe", ranks=2, stages_per_rank=1, microbatches=2, seconds=1.0)
    with pytest.raises(RuntimeError, match="3 pieces of work instead of 6"):
        summarize(case, [[step] for step in RANKS])


def check_order(ranks: int, microbatches: list[int]) -> None:
    cases = bubble_cases(ranks, microbatches, seconds=1e-4)
    results = run_distributed(run_steps, ranks, cases, 1, timeout=200)
    for index, case in enumerate(cases):
        row = summarize(case, [rank[index] for rank in results])
        assert row["order"] == pytest.approx(row["theory"], abs=1e-9), case
        spans = [span for rank in results for span in rank[index][0][0] if span.kind != "F"]
        fused = [len({span.call for span in pair}) == 1 for pair in _pairs(spans)]
        assert all(fused) != schedule_kind(case.schedule).splits_backward, case


def _pairs(spans: list[Span]) -> list[tuple[Span, Span]]:
    """The two halves of each backward."""
    inputs = {(span.stage, span.microbatch): span for span in spans if span.kind == "I"}
    return [(inputs[span.stage, span.microbatch], span) for span in spans if span.kind == "W"]


def test_real_schedules_are_worth_what_theory_says() -> None:
    """Every schedule, run by torch on real processes: its order of work has the bubble of `ScheduleKind`."""
    check_order(2, [4])


@pytest.mark.slow
@pytest.mark.parametrize("ranks, microbatches", [(2, [2, 3, 6, 12]), (3, [2, 3, 6]), (4, [2, 4, 8])])
def test_other_sizes_are_worth_what_theory_says(ranks: int, microbatches: list[int]) -> None:
    check_order(ranks, microbatches)
