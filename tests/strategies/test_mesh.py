"""Sizes, coordinates and meshes: the grid is one thing, whoever asks for it."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_llm import LLM3DStrategy
from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.mesh import (
    DENSE_AXES,
    EXPERT_AXES,
    GRID_AXES,
    ParallelDims,
    divisors,
)
from tests.distributed import run_distributed
from tests.strategies.training import SMALL, loader, make_module, make_trainer

SIZES = st.integers(1, 4)


@st.composite
def grids(draw: Any) -> ParallelDims:
    """Any sizes that fit each other, expert axis included."""
    pipeline, shard, replicate, context, tensor = (draw(SIZES) for _ in range(5))
    return ParallelDims(
        world_size=pipeline * replicate * shard * context * tensor,
        data_parallel_size=replicate * shard,
        replicate_size=replicate,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        context_parallel_size=context,
        expert_parallel_size=draw(st.sampled_from(divisors(shard * context * tensor))),
    )


@settings(deadline=None)
@given(grids())
def test_every_rank_has_one_place_in_both_views(dims: ParallelDims) -> None:
    views = {GRID_AXES: dims.grid_shape, DENSE_AXES: dims.dense_shape, EXPERT_AXES: dims.expert_shape}
    for axes, shape in views.items():
        assert math.prod(shape) == dims.world_size and len(shape) == len(axes)
    places = [dims.coordinates(rank) for rank in range(dims.world_size)]
    assert len(set(places)) == dims.world_size
    assert all(0 <= at < size for place in places for at, size in zip(place, dims.grid_shape, strict=True))
    # Row-major, the last axis fastest: the same numbering that torch's meshes have, and tensor peers are neighbours.
    grid = torch.arange(dims.world_size).view(dims.grid_shape)
    assert all(grid[place] == rank for rank, place in enumerate(places))


@settings(deadline=None)
@given(grids())
def test_ranks_of_one_data_coordinate_are_those_that_share_a_model(dims: ParallelDims) -> None:
    ranks_of: dict[int, list[int]] = defaultdict(list)
    for rank in range(dims.world_size):
        ranks_of[dims.data_rank(rank)].append(rank)
    assert sorted(ranks_of) == list(range(dims.data_parallel_size))
    for ranks in ranks_of.values():
        assert len(ranks) == dims.model_parallel_size
        places = [dims.coordinates(rank) for rank in ranks]
        assert len({(replicate, shard) for _, replicate, shard, _, _ in places}) == 1
        assert len({(stage, context, tensor) for stage, _, _, context, tensor in places}) == len(ranks)


@settings(deadline=None)
@given(
    world_size=st.integers(1, 64),
    pipeline=SIZES,
    data=st.integers(1, 8),
    context=st.integers(1, 2),
    tensor=st.integers(1, 8),
)
def test_sizes_that_do_not_multiply_are_refused_with_a_way_out(
    world_size: int, pipeline: int, data: int, context: int, tensor: int
) -> None:
    sizes = {
        "pipeline_parallel_size": pipeline,
        "data_parallel_size": data,
        "context_parallel_size": context,
        "tensor_parallel_size": tensor,
    }
    product = pipeline * data * context * tensor
    if product == world_size:
        ParallelDims(world_size=world_size, **sizes)
        return
    with pytest.raises(ConfigurationError) as refused:
        ParallelDims(world_size=world_size, **sizes)
    message = str(refused.value)

    left, right = re.fullmatch(r"(.+) = (\d+) != world size (\d+)\. .*", message).groups()[:2]
    assert math.prod(int(size) for size in re.findall(r"\((\d+)\)", left)) == int(right) == product
    assert f"world size {world_size}." in message

    advised = 0
    if found := re.search(r"Set data_parallel_size to (\d+) or 'auto'", message):
        fixed = ParallelDims(world_size=world_size, **{**sizes, "data_parallel_size": int(found[1])})
        assert fixed == ParallelDims.resolve(world_size, **{**sizes, "data_parallel_size": "auto"})
        advised += 1
    if found := re.search(r"Start (\d+) processes", message):
        ParallelDims(world_size=int(found[1]), **sizes)
        advised += 1
    if found := re.search(r"choose tensor_parallel_size from \[(.+)\] and data_parallel_size 'auto'", message):
        for size in found[1].split(", "):
            ParallelDims.resolve(
                world_size, **{**sizes, "tensor_parallel_size": int(size), "data_parallel_size": "auto"}
            )
        advised += 1
    assert advised, message


@settings(deadline=None)
@given(shard=st.integers(1, 12), context=st.integers(1, 2), tensor=SIZES, wrong=st.integers(2, 13))
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(
    shard: int, context: int, tensor: int, wrong: int
) -> None:
    sizes = {"data_parallel_size": shard, "context_parallel_size": context, "tensor_parallel_size": tensor}
    world_size = shard * context * tensor
    for name, whole in (("replicate_size", shard), ("expert_parallel_size", world_size)):
        if whole % wrong == 0:
            continue
        with pytest.raises(ConfigurationError, match=rf"^{name}\({wrong}\) does not divide .*\({shard}\)") as refused:
            ParallelDims(world_size=world_size, **sizes, **{name: wrong})
        advised = re.search(r"Use one of \[(.+)\]", str(refused.value))
        assert advised is not None
        for size in advised[1].split(", "):
            ParallelDims(world_size=world_size, **sizes, **{name: int(size)})


@pytest.mark.parametrize(
    "name", ["data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size", "replicate_size"]
)
@pytest.mark.parametrize("value", [0, -2, "4", "atuo", 2.0, True, None])
def test_what_is_no_size_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{name}={re.escape(repr(value))} must be a whole number"):
        ParallelDims.resolve(8, **{name: value})


@pytest.mark.parametrize("value", [0, -1, "x", 1.5])
def test_what_is_no_number_of_microbatches_is_named(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="microbatches="):
        LLM3DStrategy(microbatches=value)


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_divisors_are_all_of_them(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


def test_the_drawing_shows_who_is_where() -> None:
    dims = ParallelDims.resolve(8, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert dims.draw().splitlines() == [
        "8 processes = pipeline(2) * data(2) * tensor(2)",
        "  stage 0  data 0  tensor [0 1]",
        "  stage 0  data 1  tensor [2 3]",
        "  stage 1  data 0  tensor [4 5]",
        "  stage 1  data 1  tensor [6 7]",
    ]
    assert ParallelDims(world_size=1).draw().startswith("1 process = ")


@settings(deadline=None)
@given(grids())
def test_the_drawing_leaves_no_rank_out_unheard(dims: ParallelDims) -> None:
    _, *rows = dims.draw().splitlines()
    per_row = dims.tensor_parallel_size * dims.context_parallel_size
    more = re.fullmatch(r"  \.\.\. (\d+) more rows", rows[-1])
    shown = rows[:-1] if more else rows
    ranks = [int(rank) for row in shown for rank in re.search(r"\[(.*)\]", row)[1].split()]
    assert ranks == list(range(len(shown) * per_row))
    assert len(shown) + (int(more[1]) if more else 0) == dims.world_size // per_row
    for row, first in zip(shown, range(0, dims.world_size, per_row), strict=False):
        assert f"stage {dims.coordinates(first)[0]}  data {dims.data_rank(first)} " in row


LAYOUTS: list[dict[str, int]] = [
    {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "expert_parallel_size": 4},
    {"replicate_size": 2, "tensor_parallel_size": 2, "expert_parallel_size": 2},
    {"pipeline_parallel_size": 4, "context_parallel_size": 2},
    {"replicate_size": 4, "expert_parallel_size": 2},
]


def build_and_ask() -> list[dict[str, Any]]:
    """What torch's meshes say about this rank, and whom its groups really reach."""
    answers = []
    for sizes in LAYOUTS:
        dims = ParallelDims.resolve(dist.get_world_size(), **sizes)
        meshes = dims.build("cpu", with_experts=dims.expert_parallel_size > 1)
        axes = {name: meshes.dense[name] for name in DENSE_AXES}
        if meshes.grid is not None:
            axes |= {name: meshes.grid[name] for name in GRID_AXES if name not in axes}
        if meshes.expert is not None:
            axes |= {name: meshes.expert[name] for name in EXPERT_AXES if name not in axes}
        reached = {}
        for name, axis in axes.items():
            found: list[Any] = [None] * axis.size()
            dist.all_gather_object(found, dist.get_rank(), group=axis.get_group())
            reached[name] = found
        answers.append(
            {
                "dense": tuple(meshes.dense.get_coordinate()),
                "grid": meshes.grid and tuple(meshes.grid.get_coordinate()),
                "expert": meshes.expert and tuple(meshes.expert.get_coordinate()),
                "reached": reached,
                "stage": meshes.pipeline_rank,
                "peers": meshes.model_peers(),
                "sharding": meshes.sharding.mesh.flatten().tolist(),
                "tensor": meshes.tensor.mesh.tolist(),
                "pipeline": meshes.pipeline.mesh.tolist(),
            }
        )
    return answers


def ranks_beside(dims: ParallelDims, rank: int, along: set[str]) -> list[int]:
    """Ranks whose place differs from that of `rank` at most along the axes `along`."""
    others = [axis for axis, name in enumerate(GRID_AXES) if name not in along]
    place = dims.coordinates(rank)
    return [
        other
        for other in range(dims.world_size)
        if all(dims.coordinates(other)[axis] == place[axis] for axis in others)
    ]


def test_built_meshes_put_the_ranks_where_the_arithmetic_says() -> None:
    for rank, answers in enumerate(run_distributed(build_and_ask, 8)):
        for sizes, answer in zip(LAYOUTS, answers, strict=True):
            dims = ParallelDims.resolve(8, **sizes)
            place = dims.coordinates(rank)
            pp, replicate, shard, cp, tp = place
            assert answer["dense"] == (pp, replicate, shard * dims.context_parallel_size + cp, tp)
            assert answer["grid"] == (place if dims.context_parallel_size > 1 else None)
            for name, reached in answer["reached"].items():
                if name not in ("efsdp", "ep"):
                    along = {"dp_shard", "cp"} if name == "fsdp" else {name}
                    assert reached == ranks_beside(dims, rank, along), (sizes, name)
            assert answer["stage"] == place[0]
            assert answer["tensor"] == answer["reached"]["tp"]
            assert answer["pipeline"] == answer["reached"]["pp"]
            assert answer["peers"] == [r for r in range(8) if dims.data_rank(r) == dims.data_rank(rank)]
            holders = ranks_beside(dims, rank, {"dp_replicate", "dp_shard", "cp"})
            assert sorted(answer["sharding"]) == holders, "all that repeat this stage and tensor rank"

            if dims.expert_parallel_size == 1:
                assert answer["expert"] is None
                continue
            grid = torch.arange(8).view(dims.expert_shape)
            assert grid[answer["expert"]] == rank
            assert answer["expert"][:2] == place[:2], "both views agree on stages and replicas"
            assert len(answer["reached"]["ep"]) == dims.expert_parallel_size
            experts_of_layer = set(answer["reached"]["ep"]) | set(answer["reached"]["efsdp"])
            assert all(dims.coordinates(other)[:2] == place[:2] for other in experts_of_layer)


def timeouts() -> list[float]:
    """Of the groups that a strategy uses, seconds."""
    strategy = LLM3DStrategy(tensor_parallel_size=2, pipeline_parallel_size=2, timeout=timedelta(seconds=77))
    trainer = make_trainer(strategy, dist.get_world_size(), max_steps=1, limit_val_batches=0)
    trainer.fit(make_module(SMALL.replace(tie_word_embeddings=True)), loader(trainer, strategy))
    groups = [*strategy.meshes.dense.get_all_groups(), strategy._tied_group]
    backends = [group._get_backend(torch.device("cpu")) for group in groups if group is not None]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_a_hung_peer_is_noticed_after_the_time_that_was_set() -> None:
    for seconds in run_distributed(timeouts, 4):
        assert seconds == [77] * 5, "four axes, and the stages that share a tied tensor"
