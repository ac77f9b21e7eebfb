"""The planner beside torchtitan's published runs on H100s with 96 GB.

Figures: benchmarks/llama3_h100_202412_torchtitan.md of github.com/pytorch/torchtitan, its six tables: peak reserved
memory of bf16 with float8 linear layers, torch.compile and full recomputation; 8B at 8k eager, in bf16, keeping every
second matrix product. That repository's code of the day cuts 126 layers into 15 and 16 (table 5's interleaved run: 7
and 8) and runs as many microbatches as pipeline ranks, 8.
"""

from __future__ import annotations

import pytest

from lightning_llm.planner.estimate import Cluster, estimate
from lightning_llm.planner.hosts import GIB
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import worst_memory
from tests.planner.shapes import h100s, shape_of

PIPELINE = {"tensor_parallel_size": 8, "pipeline_parallel_size": 8, "microbatches": 8, "recompute": "full"}
ONE_STAGE = (15, *[16] * 6, 15)
TWO_STAGES = (7, *[8] * 14, 7)
INTERLEAVED = {"pipeline_schedule": "Interleaved1F1B", "stages_per_rank": 2, "layers_per_stage": TWO_STAGES}

# model, layout, sequence length, GiB, tokens per second and device
PUBLISHED = {
    "405B 1F1B": (
        "llama3-405b",
        Layout(data_parallel_size=8, microbatch_size=4, layers_per_stage=ONE_STAGE, **PIPELINE),
        8192,
        82.5,
        100,
    ),
    "405B Interleaved1F1B": (
        "llama3-405b",
        Layout(data_parallel_size=8, microbatch_size=4, **PIPELINE, **INTERLEAVED),
        8192,
        72.7,
        128,
    ),
    "70B tensor 8": (
        "llama3.1-70b",
        Layout(data_parallel_size=32, tensor_parallel_size=8, microbatch_size=16, recompute="full"),
        8192,
        71.9,
        829,
    ),
    "8B on 8": (
        "llama3.1-8b",
        Layout(data_parallel_size=8, microbatch_size=2, recompute="selective"),
        8192,
        82.4,
        5762,
    ),
    "8B on 128": (
        "llama3.1-8b",
        Layout(data_parallel_size=128, microbatch_size=2, recompute="selective"),
        8192,
        67.0,
        5605,
    ),
    "8B 32k": ("llama3.1-8b", Layout(data_parallel_size=8, recompute="full"), 32768, 83.9, 3890),
    "405B 32k": (
        "llama3-405b",
        Layout(data_parallel_size=8, layers_per_stage=ONE_STAGE, **PIPELINE),
        32768,
        75.3,
        76,
    ),
    "405B 64k context 2": (
        "llama3-405b",
        Layout(data_parallel_size=4, context_parallel_size=2, layers_per_stage=ONE_STAGE, **PIPELINE),
        65536,
        75.9,
        47,
    ),
    "405B 128k context 4": (
        "llama3-405b",
        Layout(data_parallel_size=2, context_parallel_size=4, layers_per_stage=ONE_STAGE, **PIPELINE),
        131072,
        77.1,
        31,
    ),
    "405B 256k context 8": (
        "llama3-405b",
        Layout(data_parallel_size=1, context_parallel_size=8, layers_per_stage=ONE_STAGE, **PIPELINE),
        262144,
        84.9,
        16,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_memory_is_within_15_percent(name: str) -> None:
    model, layout, seq_len, gib, _ = PUBLISHED[name]
    _, memory = worst_memory(shape_of(model), layout, Workload(seq_len=seq_len))
    assert memory.reserved / GIB == pytest.approx(gib, rel=0.15)


def test_interleaving_saves_as_much_as_it_did() -> None:
    """Half of a rank's gradients are whole at a time, since a stage is reduced before the other one's begin."""
    saved = []
    for name in ("405B 1F1B", "405B Interleaved1F1B"):
        model, layout, seq_len, _, _ = PUBLISHED[name]
        saved.append(worst_memory(shape_of(model), layout, Workload(seq_len=seq_len))[1].reserved / GIB)
    assert saved[0] - saved[1] == pytest.approx(82.5 - 72.7, abs=2)


@pytest.mark.parametrize("name", ["405B 1F1B", "405B Interleaved1F1B", "70B tensor 8"])
def test_throughput_is_in_a_sane_bracket(name: str) -> None:
    model, layout, seq_len, _, tokens_per_second = PUBLISHED[name]
    cluster: Cluster = h100s(layout.world_size)
    result = estimate(shape_of(model), layout, Workload(seq_len=seq_len, float8=True), cluster)
    assert 0.9 < result.tokens_per_second_per_device / tokens_per_second < 1.3


def test_interleaving_gains_what_it_gained() -> None:
    seconds = []
    for name in ("405B 1F1B", "405B Interleaved1F1B"):
        model, layout, seq_len, _, _ = PUBLISHED[name]
        workload = Workload(seq_len=seq_len, float8=True)
        seconds.append(estimate(shape_of(model), layout, workload, h100s(512)).step_seconds)
    assert seconds[0] / seconds[1] == pytest.approx(128 / 100, rel=0.05)
