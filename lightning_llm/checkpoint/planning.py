"""Which rank writes which part of which tensor: each part once, shared out evenly, and all parts of all tensors.

torch.distributed.checkpoint finds each rank's parts and removes what several ranks have; the plan is kept from save to
save as long as no rank's state changes its form, since making it takes messages between all ranks.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import _TYPES
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.planner import SavePlan as TorchPlan
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.tensor import DTensor

from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.errors import ConfigurationError

DTYPES: dict[str, torch.dtype] = {name: dtype for name, dtype in _TYPES.items() if dtype is not None}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Block:
    """A box of a tensor, which lies in one file.

    Attributes:
        tensor: The tensor's global name.
        offsets: Of the box's first element.
        shape: Of the box.
        whole: Whether it is all of the tensor.
    """

    tensor: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: bool

    @property
    def key(self) -> str:
        """Its name within a file."""
        return self.tensor if self.whole else f"{self.tensor}@{','.join(map(str, self.offsets))}"


@dataclass(frozen=True)
class SavePlan:
    """One rank's part in a save.

    Attributes:
        uuid: The same on all ranks.
        blocks: That this rank writes.
        values: Names of plain values that this rank reports.
        index: On rank 0: name -> dtype, shape and blocks, each with the rank that writes it.
    """

    uuid: str
    blocks: tuple[Block, ...]
    values: tuple[str, ...]
    index: Mapping[str, Any] | None = None


def rank_file(rank: int) -> str:
    """The file that a rank writes."""
    return f"rank_{rank:05d}.safetensors"


def dtype_name(tensor: str, dtype: torch.dtype) -> str:
    """A type in safetensors' words.

    Raises:
        ConfigurationError: There is none; `tensor` is named.
    """
    if dtype not in DTYPE_NAMES:
        raise ConfigurationError(
            f"{tensor} is {dtype}, for which safetensors has no word. Keep it in one that it has, a complex tensor as "
            "torch.view_as_real does for example."
        )
    return DTYPE_NAMES[dtype]


def make_index(
    described: Mapping[str, tuple[torch.dtype, Sequence[int]]], shares: Sequence[Sequence[Block]]
) -> dict[str, Any]:
    """What `index.json` holds: name -> dtype, shape and blocks, each with the rank that writes it.

    Args:
        described: Type and shape of each tensor.
        shares: The blocks of each rank.
    """
    index: dict[str, Any] = {
        name: {"dtype": dtype_name(name, dtype), "shape": list(shape), "blocks": []}
        for name, (dtype, shape) in described.items()
    }
    for rank, blocks in enumerate(shares):
        for block in blocks:
            index[block.tensor]["blocks"].append([rank, list(block.offsets), list(block.shape)])
    return index


def form_of(tensors: Mapping[str, Tensor | Pieces], values: Mapping[str, Any]) -> int:
    """Equal as long as a plan stays right."""
    placed = ((name, tensor.dtype, tensor.shape, _placement(tensor)) for name, tensor in tensors.items())
    return hash((tuple(placed), tuple(values)))


def _placement(tensor: Tensor | Pieces) -> object:
    if isinstance(tensor, Pieces):
        return tensor.boxes
    return tensor.placements if isinstance(tensor, DTensor) else None


def make_plan(tensors: Mapping[str, Tensor | Pieces], values: Mapping[str, Any], *, alone: bool) -> SavePlan:
    """Agrees with the other ranks on a plan. Collective.

    Args:
        tensors: What this rank has of the run's tensors, by global name.
        values: What it has of the plain values that differ between stages.
        alone: There are no others.
    """
    local = create_default_local_save_plan({**tensors, **dict.fromkeys(values, 0)}, is_coordinator=True)
    items = [i for i in local.items if i.tensor_data is None or _has_elements(i.tensor_data)]
    rank = 0 if alone else dist.get_rank()
    plans: list[Any] = [TorchPlan(items)]
    if not alone:
        plans = [None] * dist.get_world_size()
        dist.gather_object(TorchPlan(items), plans if rank == 0 else None)
    mine: list[Any] = [None]
    shares: list[Any] | None = None
    if rank == 0:
        try:
            plans, metadata = DefaultSavePlanner(flatten_state_dict=False).create_global_plan(plans)
            name = uuid.uuid4().hex
            shares = [(name, _blocks(plan), _values(plan)) for plan in plans]
            stored: Mapping[str, Any] = metadata.state_dict_metadata
            names = dict.fromkeys(block.tensor for _, blocks, _ in shares for block in blocks)
            described = {name: (stored[name].properties.dtype, stored[name].size) for name in names}
            shares[0] = (*shares[0], make_index(described, [blocks for _, blocks, _ in shares]))
        except Exception as error:  # the others wait for their share
            shares = [error] * len(plans)
    if alone:
        assert shares is not None
        mine = shares
    else:
        dist.scatter_object_list(mine, shares)
    if isinstance(mine[0], Exception):
        raise mine[0]
    return SavePlan(*mine[0])


def _has_elements(data: Any) -> bool:
    """Whether a rank has something of a tensor; of one without elements it counts as having all."""
    return math.prod(data.chunk.sizes) > 0 or math.prod(data.size) == 0


def _blocks(plan: TorchPlan) -> tuple[Block, ...]:
    blocks = []
    for item in plan.items:
        if item.type != WriteItemType.BYTE_IO:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            whole = chunk.sizes == item.tensor_data.size
            blocks.append(Block(item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes), whole))
    return tuple(blocks)


def _values(plan: TorchPlan) -> tuple[str, ...]:
    return tuple(item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO)


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor | Pieces, offsets: Sequence[int]) -> Tensor:
    """What this rank holds of a tensor in the box that begins at `offsets`, one of those that it has."""
    return tensor.at(offsets) if isinstance(tensor, Pieces) else local_part(tensor)


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes of a block, `dtype` in safetensors' words."""
    return math.prod(shape) * DTYPES[dtype].itemsize
