"""What an engine keeps of one stage's parameters, gradients and optimizer states: the shape of the answer.

`fsdp2.py` and `deepspeed.py` fill it in, `memory.py` adds the activations and finds the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lightning_llm.planner.shape import Unit


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Bytes that one stage's states cost a rank; what does not depend on the moment.

    Attributes:
        stored: Elements that the rank keeps and updates.
        whole: Elements while gathered; of these `whole_experts` in experts, which are shared out differently.
        parameters, optimizer: See `Memory`; what is offloaded is not in them.
        gathered_at_once: Parameters that are whole at a time, in the computation's dtype; 0 where what is stored is
            computed with.
        whole_gradients, sharded_gradients: Before and after their reduction.
        step_gradients: While the optimizer works.
        staging: Buffers of gathers and reductions.
        step_moves: What the optimizer reads and writes on the device; 0 where it works on the host.
        saved: Of parameters and optimizer states, what a checkpoint takes from this rank.
        host, disk: What is offloaded, and the buffers it passes through.
    """

    stored: int
    whole: int
    whole_experts: int
    parameters: float
    optimizer: float
    gathered_at_once: float
    whole_gradients: float
    sharded_gradients: float
    step_gradients: float
    staging: float
    step_moves: float
    saved: float
    host: float = 0.0
    disk: float = 0.0


@lru_cache(maxsize=4096)
def gathered(unit: Unit, tensor: int, expert: int) -> int:
    """`Unit.gathered`, computed once."""
    return unit.gathered(tensor, expert)


@lru_cache(maxsize=4096)
def stored(unit: Unit, tensor: int, shards: int, expert: int, expert_shards: int) -> int:
    """`Unit.stored`, computed once."""
    return unit.stored(tensor, shards, expert, expert_shards)


@lru_cache(maxsize=4096)
def matrices(unit: Unit, tensor: int, shards: int, expert: int, expert_shards: int) -> int:
    """`Unit.matrices`, computed once."""
    return unit.matrices(tensor, shards, expert, expert_shards)
