"""Which layouts each engine takes, and which engine is proposed."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.planner import Layout, Options, Plan, Workload, plan
from lightning_llm.planner.activations import logits_bytes
from lightning_llm.planner.candidates import candidates
from lightning_llm.planner.choice import OtherEngine
from lightning_llm.planner.engines import OFFLOADS
from lightning_llm.planner.memory import worst_memory
from lightning_llm.planner.report import render
from tests.planner.shapes import h100s, shape_of

DATA = {"data_parallel_size": 4}


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"engine": "zero"}, "must be one of fsdp2, deepspeed"),
        ({"offload_optimizer": "disk"}, "must be 'cpu', 'nvme' or None"),
        ({"offload_optimizer": "cpu"}, "states alone need DeepSpeed's engine"),
        ({"offload_parameters": "nvme"}, "FSDP2 offloads to the CPU alone"),
        ({"engine": "deepspeed", "pipeline_parallel_size": 2, "zero_stage": 2}, "takes ZeRO 0 and 1 alone"),
        (
            {
                "engine": "deepspeed",
                "pipeline_parallel_size": 2,
                "zero_stage": 1,
                "pipeline_schedule": "Interleaved1F1B",
                "stages_per_rank": 2,
            },
            "schedule 1F1B, one stage a rank",
        ),
        ({"engine": "deepspeed", "expert_parallel_size": 2}, "shares out experts up to ZeRO-2"),
        ({"engine": "deepspeed", "tensor_parallel_size": 2}, "Set sequence_parallel to false"),
        ({"engine": "deepspeed", "offload_parameters": "cpu"}, "without offload_optimizer"),
        ({"engine": "deepspeed", "replicate_size": 2}, "no figures for hybrid sharding"),
        ({"engine": "deepspeed", "zero_stage": 0, "offload_optimizer": "cpu"}, "needs ZeRO"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload_parameters": "cpu"}, "needs zero_stage 3, not 2"),
        ({"engine": "deepspeed", "zero_stage": 2, "offload_optimizer": "nvme"}, "needs zero_stage 3, not 2"),
    ],
)
def test_what_an_engine_does_not_do_is_refused(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        Layout(**{**DATA, **settings})


PLACES = [(engine, *places) for engine, groups in OFFLOADS.items() for group in groups for places in group]


@given(
    st.sampled_from(["llama3-8b", "qwen3-30b-a3b", "qwen2.5-0.5b"]),
    st.sampled_from([1, 6, 8, 16]),
    st.sampled_from(PLACES),
)
@settings(max_examples=30, deadline=None)
def test_every_candidate_is_a_layout_that_the_engine_takes(
    model: str, devices: int, places: tuple[str, str | None, str | None]
) -> None:
    """`Layout` refuses the others; here that there are some, that they multiply, and what tensor ranks divide."""
    cluster, config = h100s(devices), DecoderConfig.preset(model)
    if devices % cluster.per_node:
        return
    options = Options(engine=places[0], offload_optimizer=places[1], offload_parameters=places[2])
    found = list(candidates(shape_of(model), cluster, Workload(seq_len=4096), 48, options))
    assert found
    for layout in found:
        assert layout.world_size == devices and layout.global_batch == 48 and layout.engine == places[0]
        assert config.num_key_value_heads % layout.tensor_parallel_size == 0


def test_embedding_and_head_are_whole_on_deepspeeds_tensor_ranks() -> None:
    shape, workload = shape_of("llama3-8b"), Workload(seq_len=2048)
    layout = Layout(engine="deepspeed", tensor_parallel_size=2, sequence_parallel=False, zero_stage=1)
    ends = sum(weight.numel for unit in (shape.embedding, shape.final) for weight in unit.weights)
    norms = sum(w.numel for unit in shape.layers for w in unit.weights if len(w.shape) == 1)
    memory = worst_memory(shape, layout, workload)[1]
    assert memory.parameters == 2 * (ends + norms + (shape.num_parameters - ends - norms) / 2)
    cut = Layout(tensor_parallel_size=2)
    assert logits_bytes(shape, layout, workload).output == 2 * logits_bytes(shape, cut, workload).output


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"options": Options(replicate_size=2)}, "no figures for hybrid sharding"),
        ({"options": Options(tensor_parallel_size=2), "float8": True}, "AutoTP cuts plain linear layers alone"),
        ({"options": Options(tensor_parallel_size=2, expert_parallel_size=2)}, "shares out experts with"),
        ({"options": Options(pipeline_parallel_size=2, offload_optimizer="cpu")}, "no pipelines with offloading"),
    ],
)
def test_options_that_deepspeed_has_not_are_refused(arguments: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        plan("qwen3-30b-a3b", 8, engine="deepspeed", **arguments)


def test_float8_keeps_deepspeeds_linear_layers_whole() -> None:
    cluster = h100s(8)
    found = candidates(
        shape_of("llama3-8b"), cluster, Workload(seq_len=4096, float8=True), 16, Options(engine="deepspeed")
    )
    assert {layout.tensor_parallel_size for layout in found} == {1}


# -- the choice --


def of_engine(made: Plan, engine: str) -> OtherEngine:
    return next(other for other in made.others if other.engine == engine)


def test_fsdp2_is_proposed_where_it_fits_and_nothing_else_is_said() -> None:
    made = plan("llama3-8b", 8)
    assert made.layout.engine == "fsdp2" and not made.layout.offloads and made.others == ()
    assert (made.estimate.host_bytes, made.estimate.disk_bytes) == (0, 0)
    assert made == plan("llama3-8b", 8, engine="fsdp2")


@pytest.fixture(scope="module")
def offloaded() -> Plan:
    return plan("llama3-8b", 4, "4090", global_batch=64)


def test_what_does_not_fit_is_offloaded_and_both_engines_are_shown(offloaded: Plan) -> None:
    layout, result = offloaded.layout, offloaded.estimate
    assert layout.engine == "deepspeed" and layout.offload_optimizer == "cpu" and offloaded.fits
    assert 16 * offloaded.num_parameters < result.host_bytes < offloaded.host_memory
    assert offloaded.reasons[0].startswith("It does not fit into 4 x 24 GiB with FSDP2: the closest layout needs 1.7x")
    assert "DeepSpeed ZeRO-3 with parameters and optimizer on the CPU fits" in offloaded.reasons[0]
    other = of_engine(offloaded, "fsdp2")
    assert other.layout is not None and other.layout.offload_parameters == "cpu"
    assert other.step_seconds > 1.15 * result.step_seconds
    assert set(offloaded.traffic) == {"fsdp", "host"}


def test_the_winner_of_each_engine_can_be_pasted(offloaded: Plan) -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    render(offloaded, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    run = yaml.safe_load(text.split("\n\n")[1])
    strategy = run["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning_llm.LLM3DDeepSpeedStrategy"
    assert strategy["init_args"]["zero_stage"] == 3 and strategy["init_args"]["offload_parameters"] == "cpu"
    other = yaml.safe_load(text.split("with FSDP2\n")[1].split("\n", 1)[1].split("\n\n")[0])
    assert other["strategy"]["class_path"] == "lightning_llm.LLM3DStrategy"
    assert other["strategy"]["init_args"]["offload_parameters"] == "cpu"
    assert "host memory of a node" in text


def test_both_engines_survive_json(offloaded: Plan) -> None:
    assert Plan.from_json(offloaded.to_json()) == offloaded
    values = json.loads(offloaded.to_json())
    assert values["engine"] == "deepspeed" and values["strategy"]["offload_optimizer"] == "cpu"
    assert values["others"][0]["strategy"]["offload_parameters"] == "cpu"


def test_disks_are_used_when_host_memory_is_not_enough() -> None:
    made = plan("llama3-70b", 8, host_memory_gib=400)
    assert made.layout.offload_optimizer == "nvme" and made.estimate.disk_bytes > 16 * made.num_parameters
    assert made.strategy_arguments()["nvme_path"]
    assert of_engine(made, "fsdp2").layout is None and "host memory" in of_engine(made, "fsdp2").why
    in_memory = plan("llama3-70b", 8)
    assert made.estimate.step_seconds > in_memory.estimate.step_seconds
    assert made.estimate.host_bytes < in_memory.estimate.host_bytes / 4


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_an_engine_can_be_asked_for(engine: str) -> None:
    fits, offloads = (plan("llama3-70b", devices, engine=engine) for devices in (64, 8))
    assert fits.layout.engine == offloads.layout.engine == engine
    assert not fits.layout.offloads and offloads.layout.offloads
    assert fits.others == offloads.others == ()
    assert "On the devices alone it does not fit" in offloads.reasons[0]


def test_offloading_can_be_asked_for() -> None:
    made = plan("llama3-8b", 8, options=Options(offload_optimizer="cpu"))
    assert (made.layout.engine, made.layout.offload_optimizer, made.layout.offload_parameters) == (
        "deepspeed",
        "cpu",
        None,
    )
    assert "FSDP2 offloads parameters and optimizer together" in of_engine(made, "fsdp2").why


def test_deepspeed_is_proposed_where_it_is_clearly_faster() -> None:
    """A slow network, few tokens a step and data ranks alone: half the bytes of each reduction are half of the time."""
    options = Options(tensor_parallel_size=1, pipeline_parallel_size=1, replicate_size=1)
    made = plan("llama3-8b", 32, "4090", seq_len=1024, global_batch=32, options=options)
    assert made.layout.engine == "deepspeed" and not made.layout.offloads
    other = of_engine(made, "fsdp2")
    assert other.step_seconds > 1.15 * made.estimate.step_seconds and other.layout is not None
    assert "it reduces gradients in float32" in made.reasons[0]


def test_muon_stays_with_fsdp2() -> None:
    made = plan("llama3-70b", 8, optimizer="muon")
    assert made.layout.engine == "fsdp2" and made.layout.offloads
    assert "muon does not" in of_engine(made, "deepspeed").why
    with pytest.raises(ConfigurationError, match="muon does not"):
        plan("llama3-8b", 8, optimizer="muon", engine="deepspeed")


def test_a_layout_that_overflows_its_node_is_told_so() -> None:
    layout = Layout(
        engine="deepspeed", data_parallel_size=8, recompute="full", offload_optimizer="nvme", offload_parameters="nvme"
    )
    made = plan("llama3-70b", 8, layout=layout, nvme_gb=1000, seq_len=2048)
    console = Console(file=io.StringIO(), width=200, highlight=False)
    render(made, console)
    assert isinstance(console.file, io.StringIO)
    assert not made.fits and "It does not fit: it needs 1,270 GB of NVMe a node, of 1,000" in console.file.getvalue()
