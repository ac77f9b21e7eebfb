"""Flat ranges of tensors: as boxes, in a checkpoint, and in exchange with every other way to hold a tensor."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.optim import AdamW

from lightning_llm.checkpoint.overlap import stepped_tensors
from lightning_llm.checkpoint.pieces import Piece, Pieces
from lightning_llm.checkpoint.planning import form_of, local_part
from lightning_llm.checkpoint.reading import Checkpoint
from lightning_llm.checkpoint.saver import CheckpointSaver, RunState
from tests.distributed import run_distributed

Held = Tensor | Pieces


# -- from a range to boxes --


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int, tuple[int, ...], tuple[int, ...]]:
    """A tensor's shape, a range of it, and where it lies in which other one."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, math.prod(shape))] * 2)))
    offsets = tuple(draw(st.integers(0, 2)) for _ in shape)
    outer = tuple(offset + length + draw(st.integers(0, 2)) for offset, length in zip(offsets, shape, strict=True))
    return shape, start, stop, offsets, outer


@given(ranges())
def test_boxes_are_the_range_and_views_of_it(
    case: tuple[tuple[int, ...], int, int, tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, start, stop, offsets, outer = case
    buffer = torch.full((stop - start + 2,), -1.0)
    flat = buffer[1:-1]
    flat.copy_(torch.arange(start, stop))
    pieces = Pieces.of_range(flat, start, shape, offsets=offsets, global_shape=outer)
    found = torch.full(outer, -1.0)
    times = torch.zeros(outer)
    for offset, tensor in pieces.pieces:
        place = tuple(slice(o, o + length) for o, length in zip(offset, tensor.shape, strict=True))
        found[place] = tensor
        times[place] += 1
        tensor += 1000
    expected = torch.full(outer, -1.0)
    expected[tuple(slice(o, o + length) for o, length in zip(offsets, shape, strict=True))] = torch.where(
        (torch.arange(math.prod(shape)) >= start) & (torch.arange(math.prod(shape)) < stop),
        torch.arange(math.prod(shape)),
        -1.0,
    ).view(shape)
    assert torch.equal(found, expected) and torch.equal(times, (expected >= 0).float()), "exactly the range, once each"
    assert torch.equal(flat, torch.arange(start, stop) + 1000.0), "they are views"
    assert buffer[0] == buffer[-1] == -1, "of the range alone"
    assert len(pieces.pieces) <= max(1, 2 * len(shape) - 1) and pieces.shape == outer
    assert all(tensor.is_contiguous() for _, tensor in pieces.pieces)


def test_a_range_of_a_matrix_is_a_rest_whole_rows_and_a_begin() -> None:
    pieces = Pieces.of_range(torch.arange(12), 2, (4, 5), offsets=(0, 5), global_shape=(4, 10))
    assert pieces.boxes == (((0, 7), (1, 3)), ((1, 5), (1, 5)), ((2, 5), (1, 4)))
    assert Pieces.of_range(torch.arange(10), 5, (4, 5)).boxes == (((1, 0), (2, 5)),)
    assert Pieces.of_range(torch.arange(1), 0, ()).boxes == (((), ()),)
    assert Pieces.of_range(torch.arange(0), 3, (4, 5)).boxes == ()
    with pytest.raises(KeyError, match=r"no piece begins at \(0, 0\)"):
        pieces.at((0, 0))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: Pieces.of_range(torch.arange(12), 9, (4, 5)),
        lambda: Pieces.of_range(torch.arange(12), -1, (4, 5)),
        lambda: Pieces.of_range(torch.ones(2, 5), 0, (4, 5)),
        lambda: Pieces.of_range(torch.arange(5), 0, (4, 5), offsets=(1, 0), global_shape=(4, 5)),
        lambda: Pieces.of_range(torch.arange(5), 0, (4, 5), global_shape=(4, 5, 1)),
    ],
)
def test_what_is_no_range_of_the_tensor_is_refused(attempt: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"not (within|a range)"):
        attempt()


# -- saved in one way, loaded in every other --


def tensors_of_a_run() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"matrix": (7, 6), "vector": (11,), "experts": (3, 4, 5), "step": (), "row": (1, 9), "empty": (0, 4)}
    return {f"model.{name}": torch.randn(shape) for name, shape in shapes.items()} | {
        "model.half": torch.randn(5, 3).bfloat16(),
        "model.steps": torch.arange(9).view(3, 3),
    }


def uneven(count: int, parts: int, number: int) -> tuple[int, int]:
    """A range of `count` elements, each longer than the one before it, cut anywhere in a row."""
    return count * number**2 // parts**2, count * (number + 1) ** 2 // parts**2


def as_range(tensor: Tensor, parts: int, number: int, **place: Any) -> Pieces:
    start, stop = uneven(tensor.numel(), parts, number)
    buffer = torch.cat([torch.zeros(3, dtype=tensor.dtype), tensor.flatten()[start:stop]])
    return Pieces.of_range(buffer[3:], start, tensor.shape, **place)


def whole(tensor: Tensor) -> Tensor:
    return tensor.clone()


@functools.cache
def mesh(*sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", sizes)


def sharded(tensor: Tensor) -> DTensor:
    return distribute_tensor(tensor, mesh(dist.get_world_size()), [Shard(0) if tensor.ndim else Replicate()])


def grid(tensor: Tensor) -> DTensor:
    """Over two axes, in other dims."""
    world = dist.get_world_size()
    over = mesh(min(2, world), max(1, world // 2))
    return distribute_tensor(tensor, over, [Shard(tensor.ndim - 1), Shard(0)] if tensor.ndim else [Replicate()] * 2)


def flat_ranges(tensor: Tensor) -> Pieces:
    return as_range(tensor, dist.get_world_size(), dist.get_rank())


def backwards(tensor: Tensor) -> Pieces:
    """Each rank has one less than it, and the last rank has nothing."""
    world = dist.get_world_size()
    parts = max(1, world - 1)
    number = world - 2 - dist.get_rank()
    if number < 0 and world > 1:
        return Pieces.of_range(tensor.new_empty(0), 0, tensor.shape)
    return as_range(tensor, parts, max(0, number))


def replicas(tensor: Tensor) -> Pieces:
    """Two ranks each have the same range."""
    return as_range(tensor, max(1, dist.get_world_size() // 2), dist.get_rank() // 2)


def tensor_parallel(tensor: Tensor) -> Pieces:
    """Flat ranges of slices along the last dim."""
    slices = min(2, dist.get_world_size()) if tensor.ndim else 1
    parts = max(1, dist.get_world_size() // 2)
    number, place = divmod(dist.get_rank(), 2)
    if slices == 1:
        return as_range(tensor, parts, number)
    dim = tensor.ndim - 1
    cut = tensor.shape[dim] * 2 // 3
    begin, length = ((0, cut), (cut, tensor.shape[dim] - cut))[place]
    own = tensor.narrow(dim, begin, length).contiguous()
    offsets = [0] * dim + [begin]
    return as_range(own, parts, number, offsets=offsets, global_shape=tensor.shape)


WAYS = (whole, sharded, grid, flat_ranges, backwards, replicas, tensor_parallel)


def contents(held: Held) -> list[Tensor]:
    return [tensor for _, tensor in held.pieces] if isinstance(held, Pieces) else [local_part(held)]


def copies(held: Pieces) -> tuple[Piece, ...]:
    return tuple(Piece(offsets, tensor.clone()) for offsets, tensor in held.pieces)


def save_in_all_ways(folder: Path) -> None:
    saver = CheckpointSaver()  # one: its plan must not be kept when the way changes
    for way in WAYS if dist.get_world_size() > 1 else (whole, flat_ranges):
        held = {name: way(tensor) for name, tensor in tensors_of_a_run().items()}
        saver.save(RunState(1, held), folder / way.__name__)
    saver.save(RunState(1, held), folder / "again")  # and is kept when it does not


def load_in_all_ways(folders: list[Path]) -> None:
    expected = tensors_of_a_run()
    for folder in folders:
        checkpoint = Checkpoint.open(folder)
        for way in WAYS:
            right = {name: way(tensor) for name, tensor in expected.items()}
            held = {name: way(torch.full_like(tensor, 77)) for name, tensor in expected.items()}
            checkpoint.read_into(held)
            for name in expected:
                found, wanted = contents(held[name]), contents(right[name])
                assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), (folder, way, name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folders = {ranks: tmp_path_factory.mktemp(f"saved by {ranks}") for ranks in (1, 2, 4)}
    for ranks, folder in folders.items():
        run_distributed(save_in_all_ways, ranks, folder)
    return folders


@pytest.mark.parametrize(("ranks", "of"), [(4, 4), (1, 4), (2, 4), (4, 2), (2, 1)])
def test_saved_in_any_way_loaded_in_any_other(saved: dict[int, Path], ranks: int, of: int) -> None:
    run_distributed(load_in_all_ways, ranks, sorted(saved[of].iterdir()))


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_each_element_is_stored_once(saved: dict[int, Path], way: str) -> None:
    checkpoint = Checkpoint.open(saved[4] / way, alone=True)
    for name, tensor in tensors_of_a_run().items():
        stored = checkpoint.tensors[name]
        assert sum(math.prod(chunk.sizes) for chunk in stored.chunks) == tensor.numel()
        assert torch.equal(checkpoint.read(name), tensor) and stored.properties.dtype == tensor.dtype


def load_in_other_types(folder: Path) -> None:
    for dtype, other in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        tensor = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
        path = folder / str(dtype).removeprefix("torch.")
        CheckpointSaver().save(RunState(1, {"model.matrix": flat_ranges(tensor)}), path)
        held = backwards(torch.zeros(7, 6, dtype=other))
        Checkpoint.open(path).read_into({"model.matrix": held})
        right = backwards(tensor.to(other))
        assert right.dtype == held.dtype == other and all(map(torch.equal, contents(held), contents(right)))


def test_types_are_converted(tmp_path: Path) -> None:
    run_distributed(load_in_other_types, 2, tmp_path)


def save_what_overlaps(folder: Path) -> None:
    rank = dist.get_rank()
    pieces = Pieces.of_range(torch.zeros(6), 4 * rank, (10,))
    with pytest.raises(ValueError, match="Failed to validate global plan"):
        CheckpointSaver().save(RunState(1, {"model.vector": pieces}), folder / "c")


def test_boxes_that_overlap_are_refused(tmp_path: Path) -> None:
    run_distributed(save_what_overlaps, 2, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_cut_is_another_form() -> None:
    flat = torch.zeros(8)
    whole_rows = {"model.matrix": Pieces.of_range(flat, 0, (4, 4))}
    assert form_of(whole_rows, {}) == form_of({"model.matrix": Pieces.of_range(flat.clone(), 0, (4, 4))}, {})
    assert form_of(whole_rows, {}) != form_of({"model.matrix": Pieces.of_range(flat, 1, (4, 4))}, {})


# -- an optimizer's one buffer --


def test_what_lies_in_an_optimizers_buffer_may_be_copied_later(tmp_path: Path) -> None:
    """And the step waits for the copy; what lies elsewhere is copied at once, as is what does only in part."""
    buffer = torch.nn.Parameter(torch.randn(1 << 20))
    optimizer = AdamW([buffer])
    buffer.grad = torch.ones_like(buffer)
    optimizer.step()
    shape = (1 << 10, 1 << 10)
    state = optimizer.state[buffer]
    own = torch.randn(4)
    tensors = {
        "weight": Pieces.of_range(buffer.data[5 : 5 + (1 << 19)], 7, shape),
        "weight.exp_avg": Pieces.of_range(state["exp_avg"][5:], 5, shape),
        "other": Pieces.of_range(own, 0, (4,)),
        "mixed": Pieces(
            torch.Size((8,)),
            torch.float32,
            Pieces.of_range(own, 0, (8,)).pieces + Pieces.of_range(buffer.data[:4], 4, (8,)).pieces,
        ),
    }
    assert {name: id(owner) for name, owner in stepped_tensors(tensors, [optimizer]).items()} == {
        "weight": id(buffer),
        "weight.exp_avg": id(state["exp_avg"]),
    }
    before = {name: [part.clone() for part in contents(held)] for name, held in tensors.items()}
    saver = CheckpointSaver(background=True, alone=True)
    saver.save(RunState(1, tensors), tmp_path / "c", [optimizer])
    own.zero_()
    optimizer.step()
    saver.close()
    outcome = saver.finished()
    assert outcome is not None and outcome.error is None
    checkpoint = Checkpoint.open(tmp_path / "c", alone=True)
    after = {name: Pieces(held.shape, held.dtype, copies(held)) for name, held in tensors.items()}
    checkpoint.read_into(after)
    for name, parts in before.items():
        assert all(map(torch.equal, contents(after[name]), parts)), name
    assert not torch.equal(buffer.data[5:9], before["weight"][0].flatten()[:4]), "the step was made"
