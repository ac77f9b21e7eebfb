"""Numbers that all ranks agree on, and that the host reads without waiting for its device.

`Preemption` and `SpikeGuard` decide by them at the same step on every rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def maximum_over_ranks(tensor: Tensor) -> Tensor:
    """The largest value of any rank, on all, in place; queued on the device like any other work."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


class Reading:
    """A tensor on its way to the host.

    On CUDA it is copied into pinned memory behind what the device has queued by now; who asks for it a step later does
    not wait. On a CPU it is there.

    Args:
        tensor: On any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.detach()
        self._copied: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    @property
    def costs_a_wait(self) -> bool:
        """Whether who asks at once waits for the device."""
        return self._copied is not None

    @property
    def ready(self) -> bool:
        """Whether the device has come to it."""
        return self._copied is None or self._copied.query()

    def value(self) -> Tensor:
        """The tensor, on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
