"""`torch.compile` per block: the blocks are alike, so one compilation serves them all and start-up stays short.

Called by llm3d.py after recomputation and before sharding, whose hooks stay outside of the compiled code.
"""

from __future__ import annotations

from torch import nn


def apply_compile(units: list[nn.Module]) -> None:
    """Compiles each of `units` in place, at its first call; names of parameters stay what they are."""
    for unit in units:
        unit.compile()
