"""Tensors that are read piece by piece, so that no machine has to hold a whole one, wherever they come from.

`reshard` and `import` hand them to writing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Box(NamedTuple):
    """A part of a tensor.

    Attributes:
        offsets: Of its first element, one per dim.
        shape: Of the part.
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Where this part lies in a tensor that holds the part `outer`."""
        starts = (mine - theirs for mine, theirs in zip(self.offsets, outer.offsets, strict=True))
        return tuple(slice(start, start + length) for start, length in zip(starts, self.shape, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """What both have in common; None if that is nothing."""
        starts = tuple(map(max, self.offsets, other.offsets))
        lengths = tuple(map(lambda start, *ends: min(ends) - start, starts, self._ends(), other._ends()))
        return Box(starts, lengths) if all(length > 0 for length in lengths) else None

    def _ends(self) -> Iterator[int]:
        return map(int.__add__, self.offsets, self.shape)


def whole(shape: Sequence[int]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def consecutive_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """The elements `start` to `stop` of a tensor, counted in row-major order, as boxes.

    Each box is consecutive too, and they come in order: their bytes one after the other are the elements'. There are at
    most 2 * dims - 1 of them.
    """
    if not shape:
        if start < stop:
            yield Box((), ())
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, within = divmod(start, row)
        if within == 0 and stop - start >= row:
            rows = (stop - start) // row
            yield Box((index, *(0 for _ in shape[1:])), (rows, *shape[1:]))
            start += rows * row
        else:
            end = min(stop, (index + 1) * row)
            for box in consecutive_boxes(shape[1:], within, within + end - start):
                yield Box((index, *box.offsets), (1, *box.shape))
            start = end


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when, and as far as, it is needed.

    Attributes:
        dtype: Of its elements.
        shape: Of the whole.
        read: Returns a part of it, in host memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[Box], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> LazyTensor:
        """One that is there already, for example in a mapped file."""
        every = whole(tensor.shape)
        return cls(tensor.dtype, tuple(tensor.shape), lambda box: tensor.detach()[box.within(every)])

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return math.prod(self.shape) * self.dtype.itemsize


def assemble(wanted: Box, dtype: torch.dtype, parts: Iterable[tuple[Box, Callable[[], Tensor]]]) -> Tensor:
    """A part of a tensor from the parts that are stored; only those are read that it touches.

    Args:
        wanted: The part.
        dtype: Of the tensor.
        parts: Of the same tensor, without overlaps, each with what reads it.

    Raises:
        ValueError: The parts do not cover it.
    """
    result = torch.empty(wanted.shape, dtype=dtype)
    missing = result.numel()
    for box, read in parts:
        common = box.overlap(wanted)
        if common is None:
            continue
        found = read()[common.within(box)]
        if common == wanted:
            return found
        result[common.within(wanted)] = found
        missing -= math.prod(common.shape)
    if missing:
        raise ValueError(f"{missing} of its {result.numel()} elements are not stored")
    return result
