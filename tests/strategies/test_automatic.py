"""Sizes that are "auto" can be built, follow the model, and leave what is given as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.automatic import Workload, recommended_sizes, resolve_dims
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims

AUTOMATIC = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")


@settings(deadline=None)
@given(
    num_parameters=st.integers(1, 10**12),
    nodes=st.integers(1, 64),
    devices_per_node=st.sampled_from([1, 2, 3, 4, 6, 8, 16]),
    heads=st.integers(1, 128),
    num_units=st.integers(1, 128),
)
def test_recommended_sizes_can_be_built(
    num_parameters: int, nodes: int, devices_per_node: int, heads: int, num_units: int
) -> None:
    world_size = nodes * devices_per_node
    tensor, pipeline = recommended_sizes(
        num_parameters, world_size, devices_per_node, tensor_divides=[heads], num_units=num_units
    )
    dims = ParallelDims.resolve(world_size, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
    assert dims.world_size == world_size
    assert heads % tensor == 0 and devices_per_node % tensor == 0 and pipeline <= num_units
    if num_parameters < 7e9:
        assert (tensor, pipeline) == (1, 1)


def auto(preset: str, world_size: int, **given: Any) -> tuple[int, int, int]:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.preset(preset))
    sizes: dict[str, Any] = {**dict.fromkeys(AUTOMATIC, "auto"), **given}
    dims = resolve_dims(model, sizes, world_size=world_size, devices_per_node=min(8, world_size))
    return dims.data_parallel_size, dims.tensor_parallel_size, dims.pipeline_parallel_size


def test_auto_goes_by_the_models_size_and_by_what_is_given() -> None:
    assert auto("tiny", 8) == (8, 1, 1)
    assert auto("llama3-8b", 16) == (2, 8, 1)
    assert auto("llama3-70b", 64) == (2, 8, 4)
    assert auto("llama3-405b", 256) == (2, 8, 16)
    # A size that is given takes its ranks away from what "auto" may choose.
    assert auto("llama3-8b", 8, pipeline_parallel_size=4) == (1, 2, 4)
    assert auto("llama3-8b", 8, data_parallel_size=2) == (2, 4, 1)
    assert auto("llama3-70b", 16, tensor_parallel_size=2) == (2, 2, 4)
    assert auto("qwen2.5-7b", 8) == (2, 4, 1), "28 heads and 4 key-value heads leave 4"


def test_experts_are_spread_over_all_ranks_that_can_hold_them() -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.preset("tiny-moe"))
    sizes: dict[str, Any] = {"tensor_parallel_size": 2, "expert_parallel_size": "auto"}
    assert resolve_dims(model, sizes, world_size=4, devices_per_node=4).expert_parallel_size == 4
    assert resolve_dims(model, sizes, world_size=6, devices_per_node=6).expert_parallel_size == 2, "8 experts, 6 ranks"


H100 = {"device_name": "h100", "memory_bytes": 80 * 10**9}


def planned(preset: str, world_size: int, layout: Layout, precision: str = "bf16-mixed", **sizes: Any) -> ParallelDims:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.preset(preset))
    workload = Workload(layout=layout, seq_len=8192, precision=precision, **H100)  # type: ignore[arg-type]
    automatic: dict[str, Any] = {**dict.fromkeys(AUTOMATIC, "auto"), **sizes}
    return resolve_dims(model, automatic, world_size=world_size, devices_per_node=8, workload=workload)


def test_on_a_known_device_the_planner_decides() -> None:
    selective = Layout(recompute="selective")
    assert planned("llama3.2-1b", 8, selective).data_parallel_size == 8
    large = planned("llama3-70b", 512, selective)
    assert large.tensor_parallel_size > 1 and large.world_size == 512
    fixed = planned("llama3-70b", 512, selective, tensor_parallel_size=4)
    assert fixed.tensor_parallel_size == 4
    experts = planned("mixtral-8x7b", 64, selective, expert_parallel_size=8)
    assert experts.expert_parallel_size == 8 and experts.world_size == 64
    with pytest.raises(ConfigurationError, match="memory"):
        planned("llama3-405b", 8, selective)


@pytest.mark.parametrize("precision", ["16-mixed", "64-true"])
def test_precisions_that_the_planner_does_not_count_in_have_sizes_too(precision: str) -> None:
    for preset in ("tiny", "llama3-70b"):
        found = planned(preset, 64, Layout(recompute="selective"), precision=precision)
        assert found.world_size == 64 and (found.tensor_parallel_size > 1) == (preset != "tiny")


def test_a_device_that_is_in_no_table_is_left_to_the_models_size() -> None:
    assert Workload.on(torch.device("cpu"), layout=Layout(), precision="32-true") is None
