"""Stages, microbatches, and the schedule: whatever shape a batch has, the values are those of the whole model."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.mesh import ParallelDims, divisors
from lightning_llm.strategies.pipeline import Pipeline, choose_microbatches, keep_stage, stage_units
from lightning_llm.strategies.plan import plan_of
from lightning_llm.strategies.tensor import apply_tensor_parallel, logits_context
from tests.distributed import full, run_distributed
from tests.strategies.training import SMALL, VOCAB

UNITS_AND_STAGES = st.integers(1, 40).flatmap(lambda units: st.tuples(st.just(units), st.integers(1, units)))


@settings(deadline=None)
@given(UNITS_AND_STAGES)
def test_stages_share_out_the_units_evenly(units_and_stages: tuple[int, int]) -> None:
    num_units, num_stages = units_and_stages
    stages = stage_units(num_units, num_stages)
    assert [unit for stage in stages for unit in stage] == list(range(num_units)), "contiguous and complete"
    sizes = [len(stage) for stage in stages]
    assert len(sizes) == num_stages and max(sizes) - min(sizes) <= 1
    if num_stages > 2 and max(sizes) > min(sizes):
        assert sizes[-1] == min(sizes), "the last stage has the output layer too"
    if sizes[0] > min(sizes):
        assert all(size == max(sizes) for size in sizes[1:-1]), "the first stage has the embedding too"


@settings(deadline=None, max_examples=25)
@given(UNITS_AND_STAGES.filter(lambda counts: counts[0] <= 8))
def test_a_stage_keeps_its_parts_under_their_names(units_and_stages: tuple[int, int]) -> None:
    num_units, num_stages = units_and_stages
    config = SMALL.replace(num_hidden_layers=num_units)

    def build() -> Decoder:
        with torch.device("meta"):
            return Decoder(config)

    plan = plan_of(build())
    assert plan is not None
    whole = {name: parameter.shape for name, parameter in build().named_parameters()}
    seen: dict[str, torch.Size] = {}
    for stage in range(num_stages):
        model = build()
        keep_stage(model, plan, stage, num_stages)
        kept = {name: parameter.shape for name, parameter in model.named_parameters()}
        assert not kept.keys() & seen.keys(), "each part is on one stage"
        assert ("model.embed_tokens.weight" in kept) == (stage == 0)
        assert ("lm_head.weight" in kept) == ("model.norm.weight" in kept) == (stage == num_stages - 1)
        seen |= kept
    assert seen == whole


@settings(deadline=None)
@given(batch_size=st.integers(1, 96), num_stages=st.integers(1, 8))
def test_auto_finds_microbatches_wherever_there_are_any(batch_size: int, num_stages: int) -> None:
    if batch_size < num_stages:
        with pytest.raises(ConfigurationError, match=rf"at least {num_stages}, or use fewer stages"):
            choose_microbatches("auto", batch_size, num_stages)
        return
    count = choose_microbatches("auto", batch_size, num_stages)
    assert batch_size % count == 0 and count >= num_stages
    many = [size for size in divisors(batch_size) if size >= 2 * num_stages]
    assert count == (many[0] if many else batch_size)


@settings(deadline=None)
@given(wanted=st.integers(1, 20), batch_size=st.integers(1, 96), num_stages=st.integers(1, 8))
def test_a_number_of_microbatches_is_taken_or_refused_with_those_that_work(
    wanted: int, batch_size: int, num_stages: int
) -> None:
    try:
        assert choose_microbatches(wanted, batch_size, num_stages) == wanted
        assert batch_size % wanted == 0 and wanted >= num_stages
    except ConfigurationError as error:
        message = str(error)
        assert f"{batch_size} sequences" in message and f"{num_stages} pipeline stages" in message
        if advised := re.search(r"Choose microbatches from \[(.+)\]", message):
            for size in advised[1].split(", "):
                assert choose_microbatches(int(size), batch_size, num_stages) == int(size)
        else:
            raised = re.search(r"at least (\d+)", message)
            assert raised is not None
            assert choose_microbatches("auto", int(raised[1]), num_stages) == int(raised[1])


@settings(deadline=None)
@given(wanted=st.integers(1, 20) | st.just("auto"), batch_size=st.integers(1, 96), num_stages=st.integers(1, 8))
def test_a_smaller_last_batch_is_always_cut(wanted: int | str, batch_size: int, num_stages: int) -> None:
    count = choose_microbatches(wanted, batch_size, num_stages, strict=False)
    assert 1 <= count <= batch_size and batch_size % count == 0
    try:
        assert count == choose_microbatches(wanted, batch_size, num_stages)
    except ConfigurationError:
        assert wanted == "auto" or count <= int(wanted)


def sum_loss(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.to_local() if hasattr(loss, "to_local") else loss


def decoder(config: DecoderConfig) -> Decoder:
    model = Decoder(config).double()
    model.reset_parameters(seed=3)
    return model


def batch(batch_size: int, seq_len: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, VOCAB, (batch_size, seq_len + 1), generator=torch.Generator().manual_seed(seq_len))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: full(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def walk(calls: list[tuple[str, int, int]], sizes: dict[str, int], microbatches: int | str) -> list[tuple[str, float]]:
    """Runs the calls in a row on one pipeline; returns each one's largest relative error against the whole model."""
    torch.set_default_dtype(torch.float64)
    dims = ParallelDims.resolve(dist.get_world_size(), **sizes)
    meshes = dims.build("cpu")
    whole, model = decoder(SMALL), decoder(SMALL)
    plan = plan_of(model)
    assert plan is not None
    keep_stage(model, plan, meshes.stage, dims.pipeline_parallel_size)
    if dims.tensor_parallel_size > 1:
        apply_tensor_parallel(model, meshes.tensor, plan, sequence_parallel=True)
    pipeline = Pipeline(model, meshes.pipeline, torch.device("cpu"), microbatches)
    errors = []
    for kind, batch_size, seq_len in calls:
        tokens, labels = batch(batch_size, seq_len)
        if kind == "forward":
            expected, seen = [whole(tokens).detach()], [pipeline.forward(tokens)]
        else:
            with torch.set_grad_enabled(kind == "train"):
                loss = sum_loss(whole(tokens), labels)
                with logits_context():
                    seen = [pipeline.run(tokens, labels, sum_loss)]
            expected = [loss.detach()]
            assert not seen[0].requires_grad
            if kind == "train":
                loss.backward()
                of_whole, of_stage = gradients(whole), gradients(model)
                assert of_stage.keys() == {name for name, _ in model.named_parameters()}
                expected += [of_whole[name] for name in of_stage]
                seen += list(of_stage.values())
            assert not gradients(model), "evaluation leaves no gradients"
        for want, got in zip(expected, seen, strict=True):
            assert want.shape == got.shape and got.dtype == torch.float64
        pairs = zip(expected, seen, strict=True)
        errors.append((kind, max(float((want - got).norm() / want.norm()) for want, got in pairs)))
    return errors


CALLS = [
    ("eval", 6, 8),  # Lightning's sanity check comes before training
    ("train", 8, 16),
    ("train", 8, 16),
    ("eval", 8, 16),
    ("train", 8, 12),  # another length
    ("train", 4, 16),  # another batch size
    ("forward", 8, 16),
    ("forward", 6, 8),
    ("train", 8, 16),
    ("eval", 1, 8),  # fewer sequences than stages, as a loader's last batch may have
    ("train", 1, 16),
    ("train", 7, 16),
    ("forward", 1, 8),
    ("train", 8, 16),
]


@pytest.mark.parametrize(
    ("world_size", "sizes", "microbatches"),
    [
        pytest.param(2, {"pipeline_parallel_size": 2}, "auto", id="pp2"),
        pytest.param(2, {"pipeline_parallel_size": 2}, 2, id="pp2, 2 microbatches"),
        pytest.param(4, {"pipeline_parallel_size": 4}, 8, id="pp4, 8 microbatches"),
        pytest.param(4, {"pipeline_parallel_size": 2, "tensor_parallel_size": 2}, "auto", id="pp2 x tp2"),
    ],
)
def test_shapes_and_kinds_of_call_may_change_from_one_to_the_next(
    world_size: int, sizes: dict[str, int], microbatches: int | str
) -> None:
    for errors in run_distributed(walk, world_size, CALLS, sizes, microbatches):
        assert [kind for kind, _ in errors] == [kind for kind, _, _ in CALLS]
        assert max(error for _, error in errors) < 1e-12, errors


def test_the_first_batch_is_refused_where_it_does_not_fit() -> None:
    with pytest.raises(AssertionError, match=r"Each data rank gets 1 sequences per batch, fewer than the 2 pipeline"):
        run_distributed(walk, 2, [("train", 1, 16)], {"pipeline_parallel_size": 2}, "auto")
