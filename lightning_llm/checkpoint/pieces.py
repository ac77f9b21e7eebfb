"""Flat ranges of tensors in the checkpoint: what an engine holds that cuts one long buffer, whatever tensors lie in it.

DeepSpeed's ZeRO gives each rank the elements `[start, stop)` of a parameter in row-major order, as a view into a buffer
of many. A checkpoint knows boxes, so a range becomes a few. planning.py, saver.py and reading.py take `Pieces` wherever
they take a tensor of a run; torch.distributed.checkpoint does so by the two methods that it asks any object for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lightning_llm.checkpoint.lazy import Box, consecutive_boxes, whole


class Piece(NamedTuple):
    """A box of a tensor.

    Attributes:
        offsets: Of its first element in the global tensor, one per dim.
        tensor: Its content, in its shape. A view: what is loaded is written into the memory behind it.
    """

    offsets: tuple[int, ...]
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Pieces:
    """The parts of a global tensor that a rank holds, as a `DTensor` is where there is but one.

    Ranks may hold the same boxes, as replicas do; they are stored once. Boxes that overlap without being equal must not
    occur, neither on a rank nor among ranks: such a save is refused.

    Attributes:
        shape: Of the global tensor.
        dtype: Of the parts.
        pieces: The boxes; none where this rank has nothing of the tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @classmethod
    def of_range(
        cls,
        flat: Tensor,
        start: int,
        local_shape: Sequence[int],
        *,
        offsets: Sequence[int] | None = None,
        global_shape: Sequence[int] | None = None,
    ) -> Pieces:
        """Consecutive elements of a tensor, which may itself be a box of a larger one.

        They become boxes that are consecutive too: of a matrix the rest of a row, whole rows, and the begin of a row;
        of a tensor with n dims at most 2n - 1.

        Args:
            flat: `[elements]`, the tensor's elements `start` to `start + len(flat)` in row-major order.
            start: Where they begin.
            local_shape: Of the tensor.
            offsets: Where it lies in the global tensor; at the origin by default.
            global_shape: Of that; the tensor is all of it by default. With tensor parallelism, `local_shape` is that
                of the rank's slice.

        Raises:
            ValueError: The range reaches out of the tensor, or that out of the global one.
        """
        shape = tuple(local_shape) if global_shape is None else tuple(global_shape)
        origin = (0,) * len(shape) if offsets is None else tuple(offsets)
        if not len(origin) == len(local_shape) == len(shape) or any(
            offset < 0 or offset + length > size
            for offset, length, size in zip(origin, local_shape, shape, strict=True)
        ):
            raise ValueError(f"a box of {tuple(local_shape)} at {origin} is not within a tensor of {shape}")
        stop, count = start + flat.numel(), math.prod(local_shape)
        if flat.ndim != 1 or start < 0 or stop > count:
            raise ValueError(
                f"{tuple(flat.shape)} elements from {start} on are not a range of the {count} of {tuple(local_shape)}"
            )
        flat = flat.detach()
        if not math.prod(shape):  # it has no elements, so whoever has it has all of it
            return cls(torch.Size(shape), flat.dtype, (Piece(whole(shape).offsets, flat.view(shape)),))
        pieces, taken = [], 0
        for box in consecutive_boxes(local_shape, start, stop):
            size = math.prod(box.shape)
            place = tuple(map(int.__add__, origin, box.offsets))
            pieces.append(Piece(place, flat[taken : taken + size].view(box.shape)))
            taken += size
        return cls(torch.Size(shape), flat.dtype, tuple(pieces))

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Where the pieces lie."""
        return tuple(Box(piece.offsets, tuple(piece.tensor.shape)) for piece in self.pieces)

    def at(self, offsets: Sequence[int]) -> Tensor:
        """The content of the box that begins at `offsets`.

        Raises:
            KeyError: None does.
        """
        for piece in self.pieces:
            if piece.offsets == tuple(offsets):
                return piece.tensor
        raise KeyError(f"no piece begins at {tuple(offsets)}")

    # -- what torch.distributed.checkpoint asks for, as of torch 2.13 (planner_helpers.py and default_planner.py) --

    def size(self) -> torch.Size:
        """The global shape, for its comparison with what is stored."""
        return self.shape

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(self.dtype), self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.shape)) for box in self.boxes]
