"""What a rank holds of weights and optimizer states under DeepSpeed's ZeRO, by global names, as checkpoints take it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.strategies.deepspeed.cutting import Shard


class Fragment(NamedTuple):
    """What a rank's optimizer has of a parameter: elements of it, flat, from `start` on.

    Attributes:
        start: The first one's index in the parameter's row-major elements.
        weight: Float32; the optimizer's own memory.
        states: By the optimizer's names, likewise.
    """

    start: int
    weight: Tensor
    states: dict[str, Tensor]


def fragments(engine: Any, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Fragment]]:
    """This rank's fragments of the parameters that are trained, by name."""
    stage = engine.zero_optimization_stage()
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        if stage == 3:
            yield name, _of_stage_3(engine.optimizer, parameter)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            mapping = parameter._hp_mapping
            yield (
                name,
                Fragment(
                    mapping.lp_fragment_address.start, mapping.get_hp_fragment(), dict(mapping.optim_fragment or {})
                ),
            )


def _of_stage_3(optimizer: Any, parameter: nn.Parameter) -> Fragment:
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    flat = optimizer.fp32_partitioned_groups_flat[group]
    start = length * parameter.ds_tensor_rank if hasattr(parameter, "ds_tensor_rank") else 0
    own = min(length, max(0, parameter.ds_numel - start))
    states = {
        key: value.narrow(0, offset, own)
        for key, value in optimizer.optimizer.state.get(flat, {}).items()
        if torch.is_tensor(value) and value.shape == flat.shape
    }
    return Fragment(start, flat.narrow(0, offset, own), states)


def global_pieces(fragment: Tensor, start: int, shape: tuple[int, ...], shard: Shard | None) -> Pieces:
    """A fragment's place in the global tensor."""
    if shard is None:
        return Pieces.of_range(fragment, start, shape)
    return Pieces.of_range(fragment, start, shape, offsets=shard.offsets(shape), global_shape=shard.global_shape(shape))
