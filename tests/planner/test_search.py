"""What the search considers, what it takes, and what it says when there is nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner import Options, Plan, Workload, choose_sizes, plan
from lightning_llm.planner.schedules import schedule_kind
from lightning_llm.planner.search import candidates, matrix_distance, matrix_row
from lightning_llm.strategies.mesh import ParallelDims
from tests.planner.shapes import h100s, shape_of


@given(
    st.sampled_from(["llama3-8b", "llama3-70b", "smollm2-135m", "qwen2.5-0.5b"]),
    st.sampled_from([1, 2, 6, 8, 16, 24, 64]),
    st.sampled_from([12, 32, 48, 512]),
    st.sampled_from([2048, 65536]),
)
@settings(max_examples=40, deadline=None)
def test_every_candidate_is_a_layout_that_the_strategy_takes(
    model: str, devices: int, batch: int, seq_len: int
) -> None:
    config, shape = DecoderConfig.preset(model), shape_of(model)
    cluster = h100s(devices)
    if devices % cluster.per_node:
        return
    for layout in candidates(shape, cluster, Workload(seq_len=seq_len), batch, Options()):
        ParallelDims(**layout.sizes())  # raises where sizes do not multiply
        assert layout.world_size == devices and layout.global_batch == batch
        for number in (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size):
            assert number % layout.tensor_parallel_size == 0
        assert cluster.per_node % layout.tensor_parallel_size == 0
        assert layout.num_stages <= config.num_hidden_layers
        if layout.pipeline_parallel_size > 1:
            local = layout.microbatch_size * layout.microbatches
            kind = schedule_kind(layout.pipeline_schedule)
            ranks = layout.pipeline_parallel_size
            assert kind.choose_microbatches(layout.microbatches, local, ranks, layout.stages_per_rank)


@pytest.mark.parametrize(
    ("billions", "row"),
    [(1, "below 7B"), (8, "7B-30B"), (29, "7B-30B"), (70, "30B-100B"), (405, "100B and more")],
)
def test_rows_of_the_matrix(billions: float, row: str) -> None:
    assert matrix_row(int(billions * 1e9)).name == row


# The matrix' rows, and whether the planner follows them. Where it departs it must say so, with the row's own figure.
ROWS = [
    ("llama3.2-1b", 8, True),
    ("llama3-8b", 8, False),
    ("qwen3-14b", 64, False),
    ("llama3-70b", 64, True),
    ("llama3-70b", 512, True),
    ("llama3-405b", 512, True),
    ("llama3-405b", 4096, True),
    ("mixtral-8x7b", 64, True),
    ("qwen3-30b-a3b", 64, False),
]


@pytest.mark.parametrize(("model", "devices", "follows"), ROWS)
def test_the_matrix_is_followed_or_the_departure_is_told(model: str, devices: int, follows: bool) -> None:
    made = plan(model, devices)
    shape = shape_of(model)
    assert made.fits
    assert (matrix_distance(matrix_row(shape.num_parameters), shape, made.layout) == 0) == follows
    told = any("matrix says" in line for line in made.departures)
    assert told != follows
    assert made.reasons and made.runner_ups
    assert all(other.memory_bytes <= made.device_memory for other in made.runner_ups)


def test_fixed_sizes_are_kept() -> None:
    options = Options(tensor_parallel_size=4, pipeline_parallel_size=2)
    made = plan("llama3-8b", 16, options=options)
    assert (made.layout.tensor_parallel_size, made.layout.pipeline_parallel_size) == (4, 2)


def test_long_sequences_are_shared_by_context_ranks() -> None:
    """2 sequences for 64 devices: 2 data ranks, at most 8 tensor ranks, no microbatches for a pipeline."""
    made = plan("llama3.1-8b", 64, seq_len=262144, global_batch=2)
    assert made.layout.context_parallel_size >= 4 and made.fits


def test_what_fits_nowhere_names_the_closest_miss_and_the_way_out() -> None:
    with pytest.raises(ConfigurationError) as refused:
        plan("llama3-70b", 8, host_memory_gib=64)
    message = str(refused.value)
    for part in (
        "70.6B parameters do not fit on 8 x h100 with 80 GiB",
        "needs 1.8x the memory",
        "more devices (16 would do)",
        "Also tried: ZeRO-3 with parameters and optimizer on the CPU needs 1,163 GB of host memory a node, of 69",
    ):
        assert part in message, message
    assert plan("llama3-70b", 16).fits  # the advice holds


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"options": Options(tensor_parallel_size=3)}, "tensor_parallel_size.3. does not divide num_attention_heads"),
        ({"options": Options(pipeline_parallel_size=3)}, "3 does not divide 8 devices"),
        (
            {"global_batch": 1, "options": Options(pipeline_parallel_size=2)},
            "multiple of the data ranks, for example 8",
        ),
        ({"device": "abacus"}, "no device 'abacus'"),
        ({"precision": "fp4"}, "precision='fp4'"),
        ({"devices_per_node": 3}, "not a whole number of nodes"),
        ({"model": "llama9"}, "no preset 'llama9'"),
        ({"devices": 0}, "at least 1"),
        ({"engine": "horovod"}, "must be one of auto, fsdp2, deepspeed"),
    ],
)
def test_refusals(arguments: dict[str, object], why: str) -> None:
    given: dict[str, object] = {"model": "llama3-8b", "devices": 8, **arguments}
    with pytest.raises(ConfigurationError, match=why):
        plan(**given)  # type: ignore[arg-type]


def test_choose_sizes_keeps_what_the_run_has_fixed() -> None:
    config = DecoderConfig.preset("llama3-70b")
    layout = choose_sizes(config, 64, 8, 80 * 2**30, zero_stage=2, recompute="full", pipeline_schedule="1f1b")
    assert layout.world_size == 64 and layout.recompute == "full" and layout.zero_stage == 2
    fixed = choose_sizes(config, 64, 8, recompute="full", tensor_parallel_size=8, pipeline_parallel_size=4)
    assert (fixed.tensor_parallel_size, fixed.pipeline_parallel_size, fixed.data_parallel_size) == (8, 4, 2)


def test_choose_sizes_offloads_where_the_run_does() -> None:
    config = DecoderConfig.preset("llama3-70b")
    with pytest.raises(ConfigurationError, match="optimizer states offloaded to the host"):
        choose_sizes(config, 8, 8, recompute="full")
    for given_settings in (
        {"offload_parameters": "cpu"},
        {"engine": "deepspeed", "zero_stage": None, "offload_optimizer": "cpu"},
    ):
        layout = choose_sizes(config, 8, 8, recompute="full", **given_settings)  # type: ignore[arg-type]
        assert layout.offloads and layout.engine == given_settings.get("engine", "fsdp2")


def test_choose_sizes_gives_small_models_data_parallelism_alone() -> None:
    layout = choose_sizes(DecoderConfig.preset("tiny"), 8, 8, 32 * 2**30, device_name="cpu", seq_len=128)
    assert layout.data_parallel_size == 8


def test_a_plan_survives_json() -> None:
    made = plan("llama3-70b", 64)
    assert Plan.from_json(made.to_json()) == made
