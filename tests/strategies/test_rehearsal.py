"""One rank built in a faked world, against what the planner says of it."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner import Layout, plan
from lightning_llm.planner.layout import Workload
from lightning_llm.planner.memory import memory_of_rank, stage_bytes, stages_in
from lightning_llm.planner.shape import Shape
from lightning_llm.planner.timeline import stages_of
from lightning_llm.strategies.rehearsal import compare, rehearse
from tests.distributed import run_distributed

LAYOUTS = {
    "1 rank": ("llama3.2-1b", Layout()),
    "data 8": ("llama3.2-1b", Layout(data_parallel_size=8)),
    "data 6, which divides nothing": ("small", Layout(data_parallel_size=6)),
    "2 replicas of 4": ("llama3-8b", Layout(data_parallel_size=8, replicate_size=2)),
    "tensor 4": ("llama3-8b", Layout(tensor_parallel_size=4)),
    "tensor 2, not along the sequence": ("qwen3-4b", Layout(tensor_parallel_size=2, sequence_parallel=False)),
    "pipeline 4, tied": ("llama3.2-3b", Layout(pipeline_parallel_size=4, microbatches=8)),
    "3 axes": (
        "llama3-70b",
        Layout(data_parallel_size=4, tensor_parallel_size=4, pipeline_parallel_size=4, microbatches=8),
    ),
    "4096 ranks": (
        "llama3-405b",
        Layout(data_parallel_size=32, tensor_parallel_size=8, pipeline_parallel_size=16, microbatches=16),
    ),
    "virtual stages": (
        "llama3-70b",
        Layout(
            data_parallel_size=2,
            tensor_parallel_size=8,
            pipeline_parallel_size=4,
            pipeline_schedule="Interleaved1F1B",
            stages_per_rank=4,
            microbatches=8,
        ),
    ),
    "context 2": ("llama3-8b", Layout(data_parallel_size=2, context_parallel_size=2)),
    "everything replicated": ("llama3.2-1b", Layout(data_parallel_size=4, zero_stage=0)),
    "experts": ("mixtral-8x7b", Layout(data_parallel_size=8, expert_parallel_size=8)),
    "experts and 3 axes": (
        "mixtral-8x7b",
        Layout(
            data_parallel_size=4,
            tensor_parallel_size=4,
            pipeline_parallel_size=2,
            expert_parallel_size=8,
            microbatches=8,
        ),
    ),
    "128 experts over 16 ranks": (
        "qwen3-30b-a3b",
        Layout(data_parallel_size=16, tensor_parallel_size=2, expert_parallel_size=16),
    ),
    "a norm over the whole projection": ("olmoe-1b-7b", Layout(data_parallel_size=4, tensor_parallel_size=2)),
    "a V": (
        "llama3-8b",
        Layout(
            data_parallel_size=2,
            pipeline_parallel_size=4,
            pipeline_schedule="ZBVZeroBubble",
            stages_per_rank=2,
            microbatches=8,
        ),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_plan_and_the_real_model_agree(name: str) -> None:
    """Exactly in what is whole; in what is stored the first data rank has full chunks, as planned."""
    model, layout = LAYOUTS[name]
    config, workload = DecoderConfig.preset(model), Workload(seq_len=2048)
    shape = Shape.of(config)
    ranks = layout.pipeline_parallel_size
    for pipeline_rank in {0, ranks // 2, ranks - 1}:
        seen = rehearse(config, layout, pipeline_rank=pipeline_rank)
        mine = stages_of(layout.pipeline_schedule, pipeline_rank, ranks, layout.stages_per_rank)
        costs = [stage_bytes(shape, stages_in(shape, layout)[stage], layout, workload) for stage in mine]
        if layout.data_parallel_size == 1:
            assert seen.parameters == sum(cost.whole for cost in costs)
        assert seen.parameters == sum(cost.stored for cost in costs)
        assert seen.parameter_bytes == memory_of_rank(shape, layout, workload, pipeline_rank).parameters


def test_bytes_follow_the_precision() -> None:
    config, layout = DecoderConfig.preset("small"), Layout(data_parallel_size=2)
    mixed, true = (rehearse(config, layout, precision) for precision in ("bf16-mixed", "bf16-true"))
    assert mixed.parameter_bytes == 2 * true.parameter_bytes == 4 * true.parameters


def test_the_comparison_is_a_line_for_the_terminal() -> None:
    line = compare(DecoderConfig.preset("llama3-8b"), plan("llama3-8b", 8))
    assert line.startswith("dry run: rank 0 of 8 stores 1,003,782,656 parameters") and line.endswith("(+0.00%)")


def test_the_faked_world_ends_with_the_dry_run_even_when_it_fails() -> None:
    with pytest.raises(ConfigurationError, match="tensor_parallel_size.5. does not divide"):
        rehearse(DecoderConfig.preset("small"), Layout(tensor_parallel_size=5))
    assert not dist.is_initialized()


def _within_a_run() -> str:
    try:
        rehearse(DecoderConfig.preset("small"), Layout())
    except ConfigurationError as error:
        return str(error)
    return ""


def test_a_running_world_is_left_alone() -> None:
    assert "must not run within a distributed run" in run_distributed(_within_a_run, 1)[0]
