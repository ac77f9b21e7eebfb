"""Which layers a stage gets, and a rank's model with the others' parts gone: names, views, sharing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, combinations
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from lightning_llm import Decoder
from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.schedules import SCHEDULES, ScheduleKind, schedule_kind
from lightning_llm.strategies.mesh import ParallelDims
from lightning_llm.strategies.plan import ParallelPlan, plan_of
from lightning_llm.strategies.sharding import Sharding, apply_sharding
from lightning_llm.strategies.stages import (
    balanced_counts,
    even_counts,
    follow_modes,
    keep_stages,
    split_units,
    unit_costs,
)
from tests.distributed import run_distributed
from tests.strategies.test_own_module import OwnNet
from tests.strategies.training import SMALL

UNITS_AND_STAGES = st.integers(1, 40).flatmap(lambda units: st.tuples(st.just(units), st.integers(1, units)))


@settings(deadline=None)
@given(UNITS_AND_STAGES)
def test_even_counts_differ_by_one(units_and_stages: tuple[int, int]) -> None:
    num_units, num_stages = units_and_stages
    counts = even_counts(num_units, num_stages)
    assert sum(counts) == num_units and len(counts) == num_stages and max(counts) - min(counts) <= 1
    if num_stages > 2 and max(counts) > min(counts):
        assert counts[-1] == min(counts), "the last stage has the output layer too"
    if counts[0] > min(counts):
        assert all(count == max(counts) for count in counts[1:-1]), "the first stage has the embedding too"


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.data())
def test_balanced_counts_make_the_largest_stage_as_small_as_can_be(costs: list[int], data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, len(costs)))
    counts = balanced_counts(costs, num_stages)
    assert len(counts) == num_stages and min(counts) >= 1 and sum(counts) == len(costs)

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(costs[start:end]) for start, end in zip((0, *ends), (*ends, len(costs)), strict=True))

    every_cut = combinations(range(1, len(costs)), num_stages - 1)
    assert largest(tuple(accumulate(counts))[:-1]) == min(map(largest, every_cut))


def test_equal_layers_are_dealt_out_evenly() -> None:
    assert sorted(balanced_counts([5] * 10, 4)) == [2, 2, 3, 3]
    assert balanced_counts([9, 1, 1, 1, 1, 9], 4) == [1, 2, 2, 1]


def decoder(layers: int, **changes: Any) -> tuple[Decoder, ParallelPlan]:
    with torch.device("meta"):
        model = Decoder(SMALL.replace(num_hidden_layers=layers, **changes))
    plan = plan_of(model)
    assert plan is not None
    return model, plan


def test_embedding_and_head_count() -> None:
    """Llama's small models: a vocabulary that outweighs the layers leaves the outer stages with few of them."""
    model, plan = decoder(8, vocab_size=1000)
    layer, vocabulary = (
        sum(p.numel() for p in model.model.layers["3"].parameters()),
        model.lm_head.weight.numel(),  # type: ignore[union-attr]
    )
    assert unit_costs(plan, model) == [layer + vocabulary, *[layer] * 6, layer + vocabulary + SMALL.hidden_size]
    assert vocabulary > 3 * layer
    assert [len(units) for units in split_units(plan, model, 4)] == [1, 3, 3, 1]
    assert [len(units) for units in split_units(plan, model, 4, "even")] == [2, 2, 2, 2]


def names(*layers: int) -> list[str]:
    return [f"model.layers.{layer}" for layer in layers]


FIRST, LAST = ["model.embed_tokens"], ["model.norm", "lm_head"]


@pytest.mark.parametrize(
    ("split", "counts"),
    [
        ([1, 2, 1], [1, 2, 1]),
        ([0, 4, 0], [0, 4, 0]),
        ([[*FIRST, *names(0, 1)], names(2), [*names(3), *LAST]], [2, 1, 1]),
        ([FIRST, names(0, 1, 2, 3), LAST], [0, 4, 0]),
    ],
)
def test_a_split_may_be_given(split: Any, counts: list[int]) -> None:
    model, plan = decoder(4)
    cut = split_units(plan, model, 3, split)
    assert [len(units) for units in cut] == counts and [unit for units in cut for unit in units] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("num_stages", "split", "message"),
    [
        (5, "balanced", r"5 pipeline stages are more than the 4 layers of the model\. Use at most 4"),
        (2, "random", r"split='random' must be 'balanced', 'even', or a list"),
        (2, [2, 1, 1], r"The split has 3 entries, but the pipeline has 2 stages"),
        (2, [2, 3], r"The split \[2, 3\] gives out 5 layers, but the model has 4"),
        (3, [2, 0, 2], r"The split \[2, 0, 2\] leaves stage 1 without a layer"),
        (2, [5, -1], r"leaves stage 1 without a layer"),
        (2, [2, names(2, 3)], r"entry 2 must be a list of module names, for example \['model\.layers\.0', "),
        (
            2,
            [[*FIRST, *names(0, 1)], [*names(2, 3), "model.nrom", "lm_head"]],
            r"be given \['model\.nrom'\]\. .* in or",
        ),
        (2, [[*FIRST, *names(0, 1)], [*names(3), *LAST]], r"leaves out \['model\.layers\.2'\]"),
        (2, [[*FIRST, *names(0, 1)], [*names(1, 2, 3), *LAST]], r"more than once \['model\.layers\.1'\]"),
        (2, [names(0, 1), [*FIRST, *names(2, 3), *LAST]], r"elsewhere than on the first stage \['model\.embed_tok"),
        (2, [[*FIRST, *names(0), "lm_head"], [*names(1, 2, 3), "model.norm"]], r"the last stage \['lm_head'\]"),
        (2, [[*FIRST, *names(0, 2)], [*names(1, 3), *LAST]], r"layers\.2 where model\.layers\.1 must come"),
    ],
)
def test_a_split_that_does_not_fit_is_refused(num_stages: int, split: Any, message: str) -> None:
    model, plan = decoder(4)
    with pytest.raises(ConfigurationError, match=message):
        split_units(plan, model, num_stages, split)


class Shared(OwnNet):
    """Two blocks with one matrix, as ALBERT has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks["second"].mix.up = self.blocks["first"].mix.up


def without_norm() -> OwnNet:
    model = OwnNet()
    model.parallel_plan = replace(model.parallel_plan(), pipeline_last=("head",))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (without_norm, r"gives 2 parameters to no pipeline stage, for example \['norm\.weight', 'norm\.bias'\]"),
        (
            Shared,
            r"\['blocks\.first\.mix\.up\.weight', 'blocks\.second\.mix\.up\.weight'\] of Shared are one parameter",
        ),
    ],
)
def test_what_stages_would_train_apart_is_refused(make: Callable[[], OwnNet], message: str) -> None:
    model = make()
    plan = plan_of(model)
    assert plan is not None
    with pytest.raises(ConfigurationError, match=message):
        split_units(plan, model, 2)


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(SCHEDULES), num_ranks=st.integers(1, 4), data=st.data())
def test_ranks_and_their_stages_share_the_model_out(kind: ScheduleKind, num_ranks: int, data: st.DataObject) -> None:
    stages_per_rank = kind.resolve_stages_per_rank()
    num_stages = num_ranks * stages_per_rank
    layers = data.draw(st.integers(num_stages, 10))
    split = data.draw(st.sampled_from(["balanced", "even"]))
    whole = {name: parameter.shape for name, parameter in decoder(layers)[0].named_parameters()}
    seen: dict[str, torch.Size] = {}
    for rank in range(num_ranks):
        model, plan = decoder(layers)
        cut = split_units(plan, model, num_stages, split)
        stages = keep_stages(model, plan, kind.stage_ids(rank, num_ranks, stages_per_rank), cut)
        kept = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert not kept.keys() & seen.keys(), "each part is on one rank"
        seen |= kept
        of_stages: dict[str, nn.Parameter] = {}
        for stage, module in stages.items():
            parts = dict(module.named_parameters())
            assert {int(name.split(".")[2]) for name in parts if ".layers." in name} == set(cut[stage])
            assert ("model.embed_tokens.weight" in parts) == (stage == 0)
            assert ("lm_head.weight" in parts) == ("model.norm.weight" in parts) == (stage == num_stages - 1)
            assert not parts.keys() & of_stages.keys()
            of_stages |= parts
        assert of_stages.keys() == kept.keys()
        assert all(parameter is of_stages[name] for name, parameter in model.named_parameters())
    assert seen == whole


def test_views_compute_what_the_whole_does_and_follow_its_mode() -> None:
    whole, model = OwnNet().double(), OwnNet().double()
    model.load_state_dict(whole.state_dict())
    plan = plan_of(model)
    assert plan is not None
    called: list[str] = []
    model.register_forward_hook(lambda module, *_: called.append(type(module).__name__))
    stages = keep_stages(model, plan, [0, 1, 2], split_units(plan, model, 3))
    tokens = torch.arange(12).view(2, 6)
    x: Tensor = tokens
    for module in stages.values():
        x = module(x)
    assert torch.equal(x, whole(tokens))
    assert called == ["OwnNet"] * 3, "hooks that were there before the cut stay"
    stages[0].register_forward_hook(lambda *_: called.append("of one stage"))
    stages[1](stages[0](tokens))
    assert called[3:] == ["OwnNet", "of one stage", "OwnNet"]

    for mode in (False, True):
        model.train(mode)
        follow_modes(stages.values())
        assert {module.training for stage in stages.values() for module in stage.modules()} == {mode}


def test_a_tied_copy_is_a_parameter_of_its_own_under_a_pipeline() -> None:
    model = Decoder(SMALL.replace(tie_word_embeddings=True))
    plan = plan_of(model)
    assert plan is not None and model.lm_head is not None and model.model.embed_tokens is not None
    cut = split_units(plan, model, 4)
    keep_stages(model, plan, [0, 3], cut)
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert embedding is not head and torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()


class Nested(nn.Module):
    """Parts at different depths, a buffer at the root, blocks in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.ModuleDict({"embed": nn.Embedding(8, 4)})
        self.trunk = nn.Module()
        self.trunk.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.output = nn.ModuleDict({"head": nn.Linear(4, 8)})
        self.register_buffer("scale", torch.full((), 0.5))

    parallel_plan = ParallelPlan(
        pipeline_first=("input.embed",), pipeline_units="trunk.blocks", pipeline_last=("output.head",)
    )

    def forward(self, x: Tensor) -> Tensor:
        if self.input["embed"] is not None:
            x = self.input["embed"](x)
        for block in self.trunk.blocks:
            x = block(x) * self.scale
        return x if self.output["head"] is None else self.output["head"](x)


def shard_views() -> None:
    """FSDP on each view: names and values of the container stay, gradients reach it, new weights are used."""
    torch.manual_seed(0)
    whole, model = Nested().double(), Nested().double()
    model.load_state_dict(whole.state_dict())
    meshes = ParallelDims.resolve(dist.get_world_size()).build("cpu")
    plan = Nested.parallel_plan
    stages = keep_stages(model, plan, [0, 1, 2], split_units(plan, model, 3))
    for module in stages.values():
        apply_sharding(module, plan.units(module), Sharding(mesh=meshes.sharding, reshard_after_forward=False))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    state = get_model_state_dict(model)
    assert state.keys() == whole.state_dict().keys() == model.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(state[name].full_tensor() if isinstance(state[name], DTensor) else state[name], value), name
    tokens = torch.arange(8).view(2, 4)
    for _ in range(2):
        x: Tensor = tokens
        for module in stages.values():
            x = module(x)
        torch.testing.assert_close(x, whole(tokens))
        x.sum().backward()
        whole(tokens).sum().backward()
        for (name, parameter), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad)  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in (*model.parameters(), *whole.parameters()):
                parameter.mul_(1.5)
        model.zero_grad()
        whole.zero_grad()


def test_views_can_be_sharded() -> None:
    run_distributed(shard_views, 2)


def test_stage_ids_follow_the_schedule() -> None:
    assert [schedule_kind("ZBVZeroBubble").stage_ids(rank, 2, 2) for rank in range(2)] == [(0, 3), (1, 2)]
    assert [schedule_kind("LoopedBFS").stage_ids(rank, 2, 3) for rank in range(2)] == [(0, 2, 4), (1, 3, 5)]
