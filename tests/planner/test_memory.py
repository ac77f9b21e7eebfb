"""What memory must do when a layout changes, and figures small enough to add up by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.planner.activations import logits_bytes
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import (
    ALLOCATOR_OVERHEAD,
    CONTEXT_BYTES,
    Memory,
    memory_of_rank,
    stage_bytes,
    stages_in,
    worst_memory,
)
from tests.planner.shapes import shape_of

POWERS = st.sampled_from([1, 2, 4, 8])
WORKLOAD = Workload(seq_len=4096)


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of llama3-8b, pipelined or not."""
    pipeline = draw(POWERS)
    schedule, virtual = ("1F1B", 1)
    if pipeline > 1:
        schedule, virtual = draw(st.sampled_from([("1F1B", 1), ("GPipe", 1), ("Interleaved1F1B", 2), ("DualPipeV", 2)]))
    return Layout(
        data_parallel_size=draw(POWERS),
        tensor_parallel_size=draw(POWERS),
        pipeline_parallel_size=pipeline,
        pipeline_schedule=schedule,
        stages_per_rank=virtual,
        zero_stage=draw(st.sampled_from([0, 1, 2, 3])),
        microbatch_size=draw(st.sampled_from([1, 2])),
        microbatches=16,
        recompute=draw(st.sampled_from(["none", "selective", "full", 2, 3])),
        sequence_parallel=draw(st.booleans()),
    )


def total(layout: Layout, workload: Workload = WORKLOAD, model: str = "llama3-8b") -> float:
    return worst_memory(shape_of(model), layout, workload)[1].total


@given(layouts(), st.sampled_from(["bf16-mixed", "bf16-true", "32-true"]))
@settings(max_examples=60, deadline=None)
def test_parts_are_not_negative_and_sum_to_the_total(layout: Layout, precision: str) -> None:
    workload = Workload(seq_len=4096, precision=precision)
    for rank in range(layout.pipeline_parallel_size):
        memory = memory_of_rank(shape_of("llama3-8b"), layout, workload, rank)
        assert all(size >= 0 for size in memory.parts().values())
        assert memory.total == pytest.approx(sum(memory.parts().values()))
        moving = memory.total - memory.parameters - memory.optimizer - memory.context - memory.allocator
        assert memory.allocator == pytest.approx(ALLOCATOR_OVERHEAD * moving)
        assert memory.reserved == memory.total - CONTEXT_BYTES


@given(layouts(), st.sampled_from(["data_parallel_size", "tensor_parallel_size"]))
@settings(max_examples=80, deadline=None)
def test_more_shards_never_need_more(layout: Layout, axis: str) -> None:
    wider = replace(layout, **{axis: 2 * getattr(layout, axis)})
    if axis == "tensor_parallel_size" and wider.tensor_parallel_size > 8:
        return
    # From one data rank to two a run begins to stage its gathers and reductions; from one tensor rank to two DTensor's
    # loss makes one temporary more: these are costs of the axis, not of its size.
    if getattr(layout, axis) == 1:
        return
    assert total(wider) <= total(layout) * (1 + 1e-9)


@given(layouts())
@settings(max_examples=60, deadline=None)
def test_a_higher_zero_stage_and_more_recomputation_never_need_more(layout: Layout) -> None:
    if layout.data_parallel_size > 1:
        stored = [
            memory_of_rank(shape_of("llama3-8b"), replace(layout, zero_stage=stage), WORKLOAD, 0) for stage in range(4)
        ]
        for lower, higher in zip(stored, stored[1:], strict=False):
            assert higher.parameters + higher.optimizer <= lower.parameters + lower.optimizer
            assert higher.gathered_parameters <= lower.gathered_parameters * (1 + 1e-9)
    by_mode = [total(replace(layout, recompute=mode)) for mode in ("none", "selective", "full")]
    kept = [
        stage_bytes(shape_of("llama3-8b"), stages_in(shape_of("llama3-8b"), layout)[-1], mode, WORKLOAD).per_microbatch
        for mode in (replace(layout, recompute=m) for m in ("none", "selective", "full"))
    ]
    assert kept[2] < min(kept[:2]) and (kept[1] < kept[0] or layout.tensor_parallel_size > 4)
    assert by_mode[2] <= by_mode[0] * (1 + 1e-9)


def states(memory: Memory) -> float:
    return memory.parameters + memory.optimizer + memory.gradients


def test_sixteen_bytes_a_parameter_and_how_zero_shares_them() -> None:
    """ZeRO (https://arxiv.org/abs/1910.02054): 16 bytes a parameter on one rank; over N ranks stage 1 shares the stored
    parameters and optimizer states (here with their float32 parameters), stage 2 the gradients too."""
    shape = shape_of("llama3.2-1b")
    n = shape.num_parameters
    whole = [worst_memory(shape, Layout(data_parallel_size=8, zero_stage=z), WORKLOAD)[1] for z in range(4)]
    assert states(whole[0]) == 16 * n
    assert whole[1].parameters + whole[1].optimizer == pytest.approx(12 * n / 8, rel=1e-3)
    assert states(whole[2]) == pytest.approx(16 * n / 8, rel=1e-3)
    assert states(whole[3]) == pytest.approx(16 * n / 8, rel=1e-3)
    # Stages 1 and 2 compute with whole bfloat16 copies, stage 3 with the root's and two blocks'.
    assert whole[2].gathered_parameters == 2 * n
    block = shape.layers[0].gathered(1, 1)
    assert whole[3].gathered_parameters == 2 * (n - 16 * block + 2 * block)


@pytest.mark.parametrize(
    ("precision", "optimizer", "states_per_parameter"),
    [("bf16-mixed", "adamw", 12), ("32-true", "adamw", 12), ("bf16-true", "adamw", 6)],
)
def test_bytes_of_parameters_and_states_by_precision(precision: str, optimizer: str, states_per_parameter: int) -> None:
    shape = shape_of("llama3-8b")
    memory = worst_memory(shape, Layout(), Workload(seq_len=512, precision=precision, optimizer=optimizer))[1]
    assert memory.parameters + memory.optimizer == states_per_parameter * shape.num_parameters
    # Computing in the stored dtype needs no copies; one rank gathers nothing.
    assert (memory.gathered_parameters == 0) == (precision != "bf16-mixed")
    assert memory.communication == 0


def test_muon_keeps_one_state_for_the_blocks_matrices() -> None:
    shape = shape_of("llama3-8b")
    adamw, muon = (
        worst_memory(shape, Layout(), Workload(seq_len=512, optimizer=name))[1] for name in ("adamw", "muon")
    )
    matrices = sum(weight.numel for unit in shape.layers for weight in unit.weights if len(weight.shape) > 1)
    assert adamw.optimizer - muon.optimizer == 4 * matrices


def test_the_first_stage_holds_the_most_microbatches_and_the_last_one_the_logits() -> None:
    layout = Layout(pipeline_parallel_size=4, microbatches=16)
    shape = shape_of("llama3-8b")
    ranks = [memory_of_rank(shape, layout, WORKLOAD, rank) for rank in range(4)]
    assert [rank.activations for rank in ranks] == sorted((rank.activations for rank in ranks), reverse=True)
    assert ranks[0].activations / ranks[3].activations == pytest.approx(4, rel=0.02)
    assert [rank.logits > 0 for rank in ranks] == [False, False, False, True]
    parts = logits_bytes(shape, layout, WORKLOAD)
    assert ranks[3].logits in (parts.output, parts.output + parts.loss + parts.transient)


def test_gpipe_keeps_every_microbatch() -> None:
    shape = shape_of("llama3-8b")
    one, all_ = (
        memory_of_rank(shape, Layout(pipeline_parallel_size=4, microbatches=16, pipeline_schedule=s), WORKLOAD, 0)
        for s in ("1F1B", "GPipe")
    )
    # At its peak GPipe has been through one backward, whose gradients are whole by then; 1F1B has filled up again.
    assert all_.activations / one.activations == pytest.approx(15 / 4)


def test_v_schedules_put_the_loss_on_the_first_rank() -> None:
    layout: dict[str, Any] = {"pipeline_parallel_size": 4, "stages_per_rank": 2, "microbatches": 16}
    memory = [
        memory_of_rank(shape_of("llama3-8b"), Layout(pipeline_schedule="ZBVZeroBubble", **layout), WORKLOAD, rank)
        for rank in range(4)
    ]
    assert [rank.logits > 0 for rank in memory] == [True, False, False, False]


def test_experts_are_shared_over_all_ranks_that_fold() -> None:
    """Expert parallelism changes who stores which expert, not how much is stored in all."""
    layout = Layout(data_parallel_size=4, tensor_parallel_size=2)
    assert layout.expert_sharding_size == 8
    assert replace(layout, expert_parallel_size=4).expert_sharding_size == 2
