"""The planner beside what the papers of ZeRO, ZeRO-Offload and ZeRO-Infinity state, on V100s with 32 GB.

ZeRO: https://arxiv.org/abs/1910.02054, ZeRO-Offload: https://arxiv.org/abs/2101.06840, ZeRO-Infinity:
https://arxiv.org/abs/2104.07857. Models are theirs by layers and hidden size (GPT-2's kind, sequences of 1,024), with
this decoder's MLP of as many parameters; microbatches are of 1.
"""

from __future__ import annotations

from typing import Any

import pytest

from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner.deepspeed import PREFETCH, REDUCE_BUCKET, deepspeed_states
from lightning_llm.planner.devices import Device
from lightning_llm.planner.estimate import Cluster, estimate
from lightning_llm.planner.hosts import GIB, Host
from lightning_llm.planner.layout import Layout, Workload
from lightning_llm.planner.memory import stages_in
from lightning_llm.planner.offload import step_seconds
from lightning_llm.planner.shape import Shape
from lightning_llm.planner.traffic import links_of
from tests.planner.shapes import shape_of

WORKLOAD = Workload(seq_len=1024)

# ZeRO-Offload, table 2; ZeRO-Infinity, figure 2b: 28 TB of NVMe, 1.6 GB/s of it for each of 16 devices.
DGX_2 = Host(
    name="DGX-2",
    memory=1536 * GIB,
    memory_bandwidth=12 * 2666e6 * 8,
    disk=28e12,
    disk_read=25.6e9,
    disk_write=25.6e9,
    source="ZeRO-Infinity, figure 2b",
)
V100 = Device(
    name="v100",
    marks=(),
    bfloat16=125e12,  # of float16
    float8=None,
    float32=15.7e12,
    memory=32 * GIB,
    memory_bandwidth=900e9,
    node_link=150e9,
    network_link=12.5e9,
    host_link=3.75e9,
    host=DGX_2,
    per_node=16,
    source="ZeRO-Infinity, figure 2b",
)


def gpt(layers: int, hidden: int, intermediate: int | None = None) -> Shape:
    return Shape.of(
        DecoderConfig(
            vocab_size=50304,
            hidden_size=hidden,
            intermediate_size=intermediate or 8 * hidden // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 128,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
        )
    )


def deepspeed(devices: int, zero_stage: int, **more: Any) -> Layout:
    return Layout(engine="deepspeed", data_parallel_size=devices, zero_stage=zero_stage, recompute="full", **more)


CPU = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
NVME = {"offload_optimizer": "nvme", "offload_parameters": "nvme"}

# Layout, the largest model that the papers trained so, as billions of parameters, layers and hidden size, and the next
# one of their tables.
LARGEST = {
    "data parallelism": (deepspeed(1, 0), (1.4, 28, 2048), (2, 40, 2048)),  # ZeRO-Offload, figure 7
    "ZeRO-2 on 16": (deepspeed(16, 2), (8, 72, 3072), (13, 65, 4096)),  # figure 7; ZeRO-Infinity, figure 6a, says 10
    "ZeRO-Offload on 1": (deepspeed(1, 2, offload_optimizer="cpu"), (13, 65, 4096), (15, 78, 4096)),
    "ZeRO-Offload on 16": (deepspeed(16, 2, offload_optimizer="cpu"), (13, 65, 4096), (15, 78, 4096)),
    "ZeRO-3 on 16": (deepspeed(16, 3), (20, 25, 8192), (40, 50, 8192)),  # ZeRO-Infinity, figure 6a, as the next two
    "ZeRO-3 Offload on 1": (deepspeed(1, 3, **CPU), (40, 50, 8192), (100, 125, 8192)),  # DeepSpeed, 8 March 2021
    "ZeRO-Infinity on CPUs": (deepspeed(16, 3, **CPU), (70, 69, 9216), (100, 125, 8192)),
    "ZeRO-Infinity on NVMe": (deepspeed(16, 3, **NVME), (500, 124, 18432), None),
}


def fits(layout: Layout, model: tuple[float, int, int]) -> bool:
    billions, layers, hidden = model
    shape = gpt(layers, hidden)
    assert shape.num_parameters / 1e9 == pytest.approx(billions, rel=0.1)
    result = estimate(shape, layout, WORKLOAD, Cluster(V100, layout.world_size, layout.world_size, V100.memory))
    return result.memory.total <= V100.memory and result.host_bytes <= DGX_2.memory and result.disk_bytes <= DGX_2.disk


@pytest.mark.parametrize("name", LARGEST)
def test_the_largest_model_fits_and_the_next_one_does_not(name: str) -> None:
    layout, largest, next_one = LARGEST[name]
    assert fits(layout, largest)
    assert next_one is None or not fits(layout, next_one)


def test_a_trillion_parameters_on_one_node() -> None:
    """ZeRO-Infinity, figure 6a and table 1: 128 layers of 25K. The devices and 28 TB of NVMe are enough. Host memory is
    not: the paper's gradients were on NVMe too, DeepSpeed 0.19 keeps them in host memory (`grad_partitions_flat_buffer`
    of `runtime/zero/stage3.py`), 2 TB of them."""
    shape, layout = gpt(128, 25600), deepspeed(16, 3, **NVME)
    result = estimate(shape, layout, WORKLOAD, Cluster(V100, 16, 16, V100.memory))
    assert shape.num_parameters == pytest.approx(1.01e12, rel=0.01)
    assert result.memory.total <= V100.memory
    assert result.disk_bytes == pytest.approx(18 * shape.num_parameters, rel=1e-3) and result.disk_bytes < DGX_2.disk
    assert 2 * shape.num_parameters < result.host_bytes < 2.4 * shape.num_parameters
    assert result.host_bytes > DGX_2.memory


# ZeRO, table 1: GB on a device for 7.5 billion parameters, by data ranks, with stages 1, 2 and 3.
ZERO = {1: (120, 120, 120), 4: (52.5, 41.3, 30), 16: (35.6, 21.6, 7.5), 64: (31.4, 16.6, 1.88), 256: (30.4, 15.4, 0.47)}


@pytest.mark.parametrize("ranks", ZERO)
def test_states_are_zeros_table(ranks: int) -> None:
    shape = shape_of("llama3-8b")
    for zero_stage, gigabytes in enumerate(ZERO[ranks], start=1):
        layout = deepspeed(ranks, zero_stage)
        states = deepspeed_states(stages_in(shape, layout)[0], layout, WORKLOAD)
        bytes_ = states.parameters + states.sharded_gradients + states.optimizer
        assert bytes_ / shape.num_parameters * 7.5 == pytest.approx(gigabytes, rel=0.01)


@pytest.mark.parametrize(("hidden", "gib"), [(20480, 6.25), (25600, 9.77), (65536, 64.0)])
def test_working_memory_is_the_largest_matrix_and_its_gradient(hidden: int, gib: float) -> None:
    """ZeRO-Infinity, figure 2a: of a linear layer from hidden to four times that."""
    shape, layout = gpt(2, hidden, 4 * hidden), deepspeed(16, 3, **NVME)
    states = deepspeed_states(stages_in(shape, layout)[0], layout, WORKLOAD)
    buffers = 2 * (PREFETCH + 2 * REDUCE_BUCKET)
    assert (states.gathered_at_once + states.staging - buffers) / GIB == pytest.approx(gib, rel=0.01)


def test_twenty_bytes_a_parameter_are_offloaded() -> None:
    """ZeRO-Infinity, section 3: weights and gradients in 16 bits, and in float32 moments, weights and gradients."""
    shape, layout = shape_of("llama3-8b"), deepspeed(16, 3, **CPU)
    states = deepspeed_states(stages_in(shape, layout)[0], layout, WORKLOAD)
    assert 16 * states.host == pytest.approx(20 * shape.num_parameters, rel=1e-3)
    assert states.parameters == states.optimizer == states.sharded_gradients == 0


@pytest.mark.parametrize(("billions", "seconds"), [(1, 0.22), (2, 0.51), (4, 1.03), (8, 2.41), (10, 2.57)])
def test_adam_on_the_cpu_takes_what_it_took(billions: int, seconds: float) -> None:
    """ZeRO-Offload, table 4, where the CPU's work is measured alone; here without the copy of weights to the device."""
    shape, layout = shape_of("llama3-8b"), deepspeed(1, 3, **CPU)
    states = deepspeed_states(stages_in(shape, layout)[0], layout, WORKLOAD)
    planned = step_seconds([states], layout, WORKLOAD, links_of(layout, V100, 1))
    assert planned / states.stored * billions * 1e9 == pytest.approx(seconds, rel=0.17)
