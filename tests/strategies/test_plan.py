"""What a plan tells and refuses: for the decoder, for a user's own model, for a model without one."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.moe import Experts
from lightning_llm.strategies.checks import check_plan
from lightning_llm.strategies.layout import Layout
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from tests.strategies.training import SMALL

CONFIGS = {
    "plain": SMALL,
    "biases": SMALL.replace(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "qk_norm": SMALL.replace(qk_norm=True, model_type="qwen3"),
    "tied": SMALL.replace(tie_word_embeddings=True),
    "experts": SMALL.replace(
        num_experts=4,
        moe_intermediate_size=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        scoring_func="sigmoid",
        use_routing_bias=True,
        qk_norm=True,
        model_type="dots1",
    ),
}


def decoder(config: DecoderConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_decoders_plan_names_every_parameter_once(config: DecoderConfig) -> None:
    model = decoder(config)
    plan = plan_of(model)
    assert plan is not None
    patterns = [re.compile(pattern.replace(".", r"\.").replace("*", r"[^.]+")) for pattern in plan.tensor_parallel]
    matches = Counter(name for name, _ in model.named_modules() for pattern in patterns if pattern.fullmatch(name))
    experts = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    owners = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)} - experts
    assert all(matches[owner] == 1 for owner in owners), owners - set(matches)
    assert set(matches.values()) == {1}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_decoders_plan_gives_every_module_to_one_stage(config: DecoderConfig) -> None:
    model = decoder(config)
    plan = plan_of(model)
    assert plan is not None
    assert plan.units(model) == [model.model.layers[str(layer)] for layer in range(config.num_hidden_layers)]
    parts = [*plan.pipeline_first, *plan.pipeline_last, plan.pipeline_units]
    for name, _ in model.named_parameters(remove_duplicate=False):
        assert sum(name.startswith(f"{part}.") for part in parts) == 1, name
    parameters = dict(model.named_parameters(remove_duplicate=False))
    assert bool(plan.tied) == config.tie_word_embeddings
    for owner, copy in plan.tied:
        assert parameters[owner] is parameters[copy]
        assert owner.startswith(plan.pipeline_first) and copy.startswith(plan.pipeline_last)


class Small(nn.Module):
    """A user's model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.blocks = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})


PLAN = ParallelPlan(tensor_parallel={"inner": "column"}, tensor_divides={"rows": 6, "heads": 12})


class WithAttribute(Small):
    parallel_plan = PLAN


class WithMethod(Small):
    def parallel_plan(self) -> ParallelPlan:
        rows = {"rows": self.inner.out_features}
        return ParallelPlan(pipeline_first=("inner",), pipeline_units="blocks", tensor_divides=rows)


class Misspelt(Small):
    parallel_plan = ParallelPlan(pipeline_units="blocks", pipeline_first=("inner",), pipeline_last=("outer", "nrom"))


class OtherDecoder(Decoder):
    """Somebody's variant: the plan of its base class is its own."""


def test_a_plan_is_an_attribute_or_a_method_or_none() -> None:
    assert plan_of(WithAttribute()) is PLAN
    expected = ParallelPlan(pipeline_first=("inner",), pipeline_units="blocks", tensor_divides={"rows": 6})
    assert plan_of(WithMethod()) == expected
    assert plan_of(Small()) is None
    assert plan_of(nn.Linear(2, 2)) is None
    with torch.device("meta"):
        assert plan_of(OtherDecoder(SMALL)) == plan_of(Decoder(SMALL))
    model = WithMethod()
    assert WithMethod().parallel_plan().units(model) == list(model.blocks.values())
    assert PLAN.units(model) == []


@pytest.mark.parametrize(
    ("model", "sizes", "message"),
    [
        pytest.param(
            WithAttribute(),
            {"tensor_parallel_size": 4},
            r"tensor_parallel_size\(4\) does not divide rows\(6\)\. Sizes that this model allows: \[1, 2, 3, 6\]\.",
            id="tensor size",
        ),
        pytest.param(
            WithMethod(),
            {"tensor_parallel_size": 2},
            r"tensor_parallel_size=2, but the plan of WithMethod names no tensor-parallel modules\. Add",
            id="no tensor styles",
        ),
        pytest.param(
            WithAttribute(),
            {"pipeline_parallel_size": 2},
            r"pipeline_parallel_size=2, but the plan of WithAttribute names no pipeline units\. Add `pipeline_units`",
            id="no units",
        ),
        pytest.param(
            WithMethod(),
            {"pipeline_parallel_size": 4},
            r"pipeline_parallel_size\(4\) is more than the 3 layers of the model\. Use at most 3\.",
            id="more stages than units",
        ),
        pytest.param(
            Misspelt(),
            {"pipeline_parallel_size": 2},
            r"plan of Misspelt names \['outer', 'nrom'\] for the pipeline, but the model has no such modules",
            id="unknown names",
        ),
        pytest.param(
            Small(),
            {"tensor_parallel_size": 2},
            r"tensor\(2\): only data parallelism needs no plan, and Small has none\. .*`parallel_plan\(\)`",
            id="no plan",
        ),
    ],
)
def test_sizes_that_a_model_cannot_be_cut_into_are_refused(
    model: nn.Module, sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_plan(model, ParallelDims.resolve(24, **sizes), Layout())


def test_what_a_refusal_suggests_is_accepted() -> None:
    for size in (1, 2, 3, 6):
        assert check_plan(WithAttribute(), ParallelDims.resolve(24, tensor_parallel_size=size), Layout()) is PLAN
    assert check_plan(WithMethod(), ParallelDims.resolve(24, pipeline_parallel_size=3), Layout()) is not None
    assert check_plan(Small(), ParallelDims.resolve(24), Layout()) is None, "data parallelism needs no plan"
    model = decoder(SMALL)
    for size in (1, 2):
        assert check_plan(model, ParallelDims.resolve(4, tensor_parallel_size=size), Layout()) is not None
    with pytest.raises(ConfigurationError, match=r"num_key_value_heads\(2\)\. Sizes that this model allows: \[1, 2\]"):
        check_plan(model, ParallelDims.resolve(4, tensor_parallel_size=4), Layout())


def test_rotary_embeddings_that_go_by_length_are_not_cut() -> None:
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ConfigurationError, match=r"rope_scaling 'dynamic' depends on the length"):
        check_plan(
            decoder(SMALL.replace(rope_scaling=scaling)), ParallelDims.resolve(2, context_parallel_size=2), Layout()
        )
