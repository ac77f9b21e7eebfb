"""Boxes and pieces of tensors: nothing twice, nothing missing, and in order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.checkpoint.lazy import Box, LazyTensor, assemble, consecutive_boxes, whole
from lightning_llm.checkpoint.writing import share_out

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def counted(shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + math.prod(shape)).view(shape)


@given(SHAPES, st.data())
def test_consecutive_boxes_are_the_elements_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = counted(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    stop = data.draw(st.integers(start, tensor.numel()))
    boxes = list(consecutive_boxes(shape, start, stop))
    read = LazyTensor.of(tensor).read
    assert [int(element) for box in boxes for element in read(box).flatten()] == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(SHAPES, st.data())
def test_what_is_cut_is_put_together_again(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = counted(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, tensor.numel()), max_size=4)))
    stored = [
        b for a, z in zip([0, *cuts], [*cuts, tensor.numel()], strict=True) for b in consecutive_boxes(shape, a, z)
    ]
    parts = [(box, lambda box=box: LazyTensor.of(tensor).read(box).clone()) for box in stored]
    offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    wanted = Box(offsets, tuple(data.draw(st.integers(1, size - o)) for size, o in zip(shape, offsets, strict=True)))
    found = assemble(wanted, tensor.dtype, parts)
    assert torch.equal(found, tensor[wanted.within(whole(shape))])


def test_what_is_not_stored_is_not_made_up() -> None:
    with pytest.raises(ValueError, match="3 of its 6 elements are not stored"):
        assemble(Box((0, 0), (2, 3)), torch.int64, [(Box((0, 0), (1, 3)), lambda: counted((1, 3)))])


@given(
    st.lists(st.tuples(SHAPES, st.sampled_from([torch.float32, torch.bfloat16, torch.int64])), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_files_are_of_equal_size_and_hold_everything_once(
    forms: list[tuple[tuple[int, ...], torch.dtype]], ranks: int
) -> None:
    tensors = {f"t{i}": LazyTensor.of(torch.empty(shape, dtype=dtype)) for i, (shape, dtype) in enumerate(forms)}
    shares = share_out(tensors, ranks)
    sizes = [sum(math.prod(b.shape) * tensors[b.tensor].dtype.itemsize for b in blocks) for blocks in shares]
    assert max(sizes) - min(sizes) <= 2 * torch.int64.itemsize
    seen = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in tensors.items()}
    for blocks in shares:
        assert len({block.key for block in blocks}) == len(blocks), "a name within a file is unique"
        for block in blocks:
            seen[block.tensor][Box(block.offsets, block.shape).within(whole(tensors[block.tensor].shape))] += 1
            assert block.whole == (block.shape == tensors[block.tensor].shape)
    assert all(bool((count == 1).all()) for count in seen.values())
