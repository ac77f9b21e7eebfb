"""Counts of parameters against the configuration's own, and against the real decoder cut on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.presets import PRESETS
from lightning_llm.planner.shape import Shape, Unit, Weight, balanced_layers, cut_stages, sizes_of
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.stages import keep_stages, split_units


@pytest.mark.parametrize("name", PRESETS)
def test_the_whole_is_the_configurations_count(name: str) -> None:
    config = DecoderConfig.preset(name)
    shape = Shape.of(config)
    assert shape.num_parameters == config.num_parameters()
    (stage,) = cut_stages(shape, (config.num_hidden_layers,))
    assert sum(unit.gathered(1, 1) for unit in (stage.root, *stage.layers)) == config.num_parameters()


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-405b", "qwen2.5-0.5b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("stages", [2, 3, 16])
def test_layers_are_shared_out_as_the_strategy_does(name: str, stages: int) -> None:
    with torch.device("meta"):
        model = Decoder(DecoderConfig.preset(name))
    plan = plan_of(model)
    assert plan is not None
    cut = split_units(plan, model, stages)
    assert balanced_layers(Shape.of(model.config), stages) == tuple(len(units) for units in cut)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="7 pipeline stages are more than the model's 6 layers"):
        balanced_layers(Shape.of(DecoderConfig.preset("small")), 7)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"qk_norm": True, "model_type": "qwen3"},
        {"attention_bias": True, "model_type": "qwen2"},
    ],
)
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_hold_what_the_cut_model_holds(changes: dict[str, Any], stages: int) -> None:
    config = DecoderConfig.preset("small", **changes)
    shape = Shape.of(config)
    planned = cut_stages(shape, balanced_layers(shape, stages))
    for index in range(stages):
        with torch.device("meta"):
            model = Decoder(config)
        plan = plan_of(model)
        assert plan is not None
        if stages > 1:
            keep_stages(model, plan, [index], split_units(plan, model, stages))
        real = sum(parameter.numel() for parameter in model.parameters())
        assert sum(unit.gathered(1, 1) for unit in (planned[index].root, *planned[index].layers)) == real


def test_layers_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"adds up to 5.*6 layers"):
        cut_stages(Shape.of(DecoderConfig.preset("small")), (2, 3))


@given(st.integers(1, 8), st.integers(1, 64))
@settings(deadline=None)
def test_shards_cover_the_whole_and_differ_by_padding_alone(tensor: int, shards: int) -> None:
    weight = Weight("self_attn.q_proj.weight", (840, 48))
    whole = weight.numel // tensor if 840 % tensor == 0 else None
    if whole is not None:
        assert whole <= weight.shard(tensor, shards) * shards < whole + shards * 48


# A mixture of experts as its block would be named; the formulas need no model.
MOE = Unit(
    (
        Weight("self_attn.q_proj.weight", (64, 64)),
        Weight("self_attn.o_proj.weight", (64, 64)),
        Weight("mlp.gate.weight", (8, 64)),
        Weight("mlp.experts.gate_proj", (8, 32, 64)),
        Weight("mlp.experts.up_proj", (8, 32, 64)),
        Weight("mlp.experts.down_proj", (8, 64, 32)),
        Weight("mlp.shared_experts.gate_proj.weight", (96, 64)),
        Weight("mlp.shared_experts.up_proj.weight", (96, 64)),
        Weight("mlp.shared_experts.down_proj.weight", (64, 96)),
    )
)


def test_experts_are_cut_by_expert_parallelism_and_nothing_else() -> None:
    assert sizes_of(MOE) == (96, 8, 32)
    experts, router = 3 * 8 * 32 * 64, 8 * 64
    dense = 2 * 64 * 64 + 3 * 96 * 64
    assert MOE.gathered(tensor=1, expert=1) == dense + router + experts
    assert MOE.gathered(tensor=2, expert=1) == dense // 2 + router + experts  # the router is replicated
    assert MOE.gathered(tensor=2, expert=4) == dense // 2 + router + experts // 4
    assert MOE.stored(1, 4, 4, 2) == (dense + router) // 4 + experts // 8
