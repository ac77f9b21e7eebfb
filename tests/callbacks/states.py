"""Weights and optimizer of a rank, under any strategy."""

from __future__ import annotations

from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.strategies.state import ShardedState


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the parts that this rank holds, by name."""
    strategy = trainer.strategy
    state = {f"model.{name}": value for name, value in strategy.lightning_module_state_dict().items()}
    optimizer = strategy.optimizer_state(trainer.optimizers[0])
    if isinstance(strategy, ShardedState):
        state |= optimizer
    else:
        state |= {f"{n}.{key}": value for n, own in optimizer["state"].items() for key, value in own.items()}
    parts: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Pieces):
            parts |= {f"{name}.{number}": piece.tensor for number, piece in enumerate(value.pieces)}
        elif isinstance(value, Tensor):
            parts[name] = value.to_local() if isinstance(value, DTensor) else value
    return {name: value.clone() for name, value in parts.items()}
