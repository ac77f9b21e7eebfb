"""The table of schedules: held against torch's own, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping
from torch.distributed.pipelining.schedules import _Action, _ComputationType, get_schedule_class

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.schedules import SCHEDULES, ScheduleKind, schedule_kind
from lightning_llm.strategies.mesh import divisors
from tests.distributed import run_distributed

KINDS = st.sampled_from(SCHEDULES)
DURATIONS = {
    _ComputationType.FORWARD: 1,
    _ComputationType.BACKWARD_INPUT: 1,
    _ComputationType.BACKWARD_WEIGHT: 1,
    _ComputationType.FULL_BACKWARD: 2,
}


@pytest.mark.parametrize("kind", SCHEDULES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
def test_names_are_torchs(kind: ScheduleKind, spell: Callable[[str], str]) -> None:
    assert schedule_kind(spell(kind.name)) is kind
    torchs = get_schedule_class(spell(kind.name))
    assert torchs.__name__ == f"Schedule{kind.name}"
    assert kind.multi_stage == any(base.__name__ == "PipelineScheduleMulti" for base in torchs.__mro__)
    assert kind.source.startswith("https://arxiv.org/abs/")


@settings(deadline=None)
@given(kind=KINDS, num_ranks=st.integers(2, 9), stages=st.integers(1, 4))
def test_every_stage_has_one_rank(kind: ScheduleKind, num_ranks: int, stages: int) -> None:
    if not kind.multi_stage:
        stages = 1
    if kind.placement == "V":
        stages = 2
    torchs = generate_stage_to_rank_mapping(num_ranks, num_ranks * stages, style=kind.placement.lower())
    assert {stage: kind.rank_of(stage, num_ranks) for stage in range(num_ranks * stages)} == torchs
    for rank in range(num_ranks):
        ids = kind.stage_ids(rank, num_ranks, stages)
        assert ids == tuple(stage for stage, owner in torchs.items() if owner == rank)
    assert kind.loss_rank(num_ranks) == torchs[num_ranks * stages - 1]
    assert torchs[0] == 0


def simulate(order: dict[int, list[Any]], num_stages: int) -> float:
    """Runs a schedule of torch's on paper; the share of time that ranks wait, until the last one has finished."""
    queues = {
        rank: [part for action in actions if action is not None for part in (action.sub_actions or (action,))]
        for rank, actions in order.items()
    }
    queues = {rank: [a for a in queue if a.computation_type in DURATIONS] for rank, queue in queues.items()}
    work = sum(DURATIONS[action.computation_type] for queue in queues.values() for action in queue)
    clock, done = dict.fromkeys(queues, 0), {}
    while any(queues.values()):
        before = sum(map(len, queues.values()))
        for rank, queue in queues.items():
            while queue:
                kind, stage, index = queue[0].computation_type, queue[0].stage_index, queue[0].microbatch_index
                forward, weights = kind == _ComputationType.FORWARD, kind == _ComputationType.BACKWARD_WEIGHT
                if forward:
                    needed = ("forward", stage - 1, index) if stage else None
                elif weights:
                    needed = None
                elif stage == num_stages - 1:
                    needed = ("forward", stage, index)
                else:
                    needed = ("backward", stage + 1, index)
                if needed is not None and needed not in done:
                    break
                clock[rank] = max(clock[rank], done[needed] if needed else 0) + DURATIONS[kind]
                if not weights:
                    done["forward" if forward else "backward", stage, index] = clock[rank]
                queue.pop(0)
        assert sum(map(len, queues.values())) < before, "the schedule waits for itself"
    whole = max(clock.values()) * len(clock)
    return (whole - work) / whole


def one_forward_one_backward(rank: int, num_ranks: int, count: int) -> list[_Action]:
    ahead = num_ranks - rank
    actions = [_Action(rank, _ComputationType.FORWARD, index) for index in range(ahead)]
    for index in range(count):
        actions.append(_Action(rank, _ComputationType.FULL_BACKWARD, index))
        if index + ahead < count:
            actions.append(_Action(rank, _ComputationType.FORWARD, index + ahead))
    return actions


def compare_with_torch(largest: int) -> dict[str, int]:
    """Every combination of a few ranks, stages and microbatches: does torch take it, and how long do ranks wait?"""
    compared = dict.fromkeys((kind.name for kind in SCHEDULES), 0)
    for num_ranks in range(2, dist.get_world_size() + 1):
        group = dist.new_group(list(range(num_ranks)))
        if dist.get_rank() > 0:
            continue
        for kind in SCHEDULES:
            for stages in (1, 2, 3):
                try:
                    valid_stages = kind.resolve_stages_per_rank(stages) == stages
                except ConfigurationError:
                    valid_stages = False
                for count in range(1, largest + 1):
                    parts = [
                        PipelineStage(nn.Identity(), stage, num_ranks * stages, torch.device("cpu"), group=group)
                        for stage in (kind.stage_ids(0, num_ranks, stages) if valid_stages else range(stages))
                    ]
                    expected = valid_stages and kind.fits(count, num_ranks, stages)
                    if not kind.multi_stage and stages > 1:
                        assert not expected
                        continue
                    make = get_schedule_class(kind.name)
                    try:
                        made = make(parts if kind.multi_stage else parts[0], count, loss_fn=lambda *_: None)
                    except ValueError:
                        made = None
                    assert (made is not None) == expected, (kind.name, num_ranks, stages, count)
                    if made is None:
                        continue
                    order = made.pipeline_order_with_comms if kind.multi_stage else made.pipeline_order
                    if kind.name == "1F1B":  # what torch 2.13 runs; what it shows numbers some forwards from 1
                        order = {rank: one_forward_one_backward(rank, num_ranks, count) for rank in range(num_ranks)}
                    waiting = simulate(order, num_ranks * stages)
                    assert kind.bubble_fraction(count, num_ranks, stages) == pytest.approx(waiting), (
                        kind.name,
                        num_ranks,
                        stages,
                        count,
                    )
                    compared[kind.name] += 1
    return compared


def test_the_table_is_what_torch_does() -> None:
    compared = run_distributed(compare_with_torch, 4, 10)[0]
    assert all(count >= 9 for count in compared.values()), compared


@settings(deadline=None)
@given(
    kind=KINDS,
    wanted=st.integers(1, 24) | st.just("auto"),
    batch_size=st.integers(0, 96),
    num_ranks=st.integers(2, 8),
)
def test_microbatches_are_chosen_or_refused_with_those_that_work(
    kind: ScheduleKind, wanted: int | str, batch_size: int, num_ranks: int
) -> None:
    stages = kind.resolve_stages_per_rank()
    valid = [n for n in divisors(batch_size) if kind.fits(n, num_ranks, stages)] if batch_size else []
    try:
        count = kind.choose_microbatches(wanted, batch_size, num_ranks, stages)
        assert count in valid
        if wanted == "auto":
            many = [n for n in valid if n >= 2 * num_ranks]
            assert count == (many[0] if many else valid[-1])
        else:
            assert count == wanted
    except ConfigurationError as error:
        message = str(error)
        assert f"{batch_size} sequences" in message and wanted not in valid
        if advised := re.search(r"Choose microbatches from \[(.+)\]", message):
            assert [int(size) for size in advised[1].split(", ")] == valid
        else:
            raised = re.search(r"gets at least (\d+), or use fewer stages", message)
            assert raised is not None and not valid
            assert kind.choose_microbatches("auto", int(raised[1]), num_ranks, stages) == int(raised[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: schedule_kind("2F2B"),
            r"no pipeline schedule '2F2B'\. Use one of GPipe, 1F1B, .*, ZBVZeroBubble, DualPipeV\.",
        ),
        (
            lambda: schedule_kind("1f1b").resolve_stages_per_rank(2),
            r"1F1B has one stage on each rank, .* 'auto', or use",
        ),
        (
            lambda: schedule_kind("dualpipev").resolve_stages_per_rank(3),
            r"DualPipeV places .* exactly 2 on each rank, but stages_per_rank=3\. .* Interleaved1F1B, LoopedBFS, Inter",
        ),
        (lambda: schedule_kind("loopedbfs").resolve_stages_per_rank(0), r"stages_per_rank=0 must be a whole number"),
        (
            lambda: schedule_kind("DualPipeV").choose_microbatches("auto", 6, 4, 2),
            r"gets 6 sequences per batch, fewer than the 8 pipeline stages; DualPipeV needs at least 8 microbatches",
        ),
        (
            lambda: schedule_kind("Interleaved1F1B").choose_microbatches(5, 20, 2, 2),
            r"microbatches\(5\) must divide .*in microbatches // 2 rounds, which must be of equal size\. .* \[1, 2, 4",
        ),
        (
            lambda: schedule_kind("GPipe").choose_microbatches("auto", 0, 2),
            r"gets 0 sequences per batch, none; GPipe needs at least 1 microbatches",
        ),
    ],
)
def test_what_does_not_fit_is_said(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("1F1B", 3 / 11), ("Interleaved1F1B", 3 / 19), ("InterleavedZeroBubble", 3 / 51), ("ZBVZeroBubble", 3 / 51)],
)
def test_bubbles_are_those_of_the_papers(name: str, expected: float) -> None:
    kind = schedule_kind(name)
    assert kind.bubble_fraction(8, 4, kind.resolve_stages_per_rank()) == pytest.approx(expected)
