"""`torch.compile` per block: the blocks are alike, so one compilation serves them all and start-up stays short.

Called by llm3d.py after recomputation and before sharding, whose hooks stay outside of the compiled code.
"""

from __future__ import annotations

from torch import nn


def settle_outputs(modules: list[nn.Module]) -> None:
    """Has modules in front of compiled blocks return plain tensors.

    Under tensor parallelism their output is on its way still, in an `AsyncCollectiveTensor`, and a compiled block would
    send the gradient past the autograd function that made it (torch 2.13). A copy is what waits for it.
    """
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, output: output.clone())


def apply_compile(units: list[nn.Module]) -> None:
    """Compiles each of `units` in place, at its first call; names of parameters stay what they are."""
    for unit in units:
        unit.compile()
