"""A callback for run files that makes one node of a Slurm cluster compute slowly."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch import Callback


class SlowNode(Callback):
    """Burns time of the processor in each step, on one node.

    Args:
        node: By Slurm's name.
        seconds: In each step.
    """

    def __init__(self, node: str, seconds: float = 0.2) -> None:
        self.here = os.environ["SLURMD_NODENAME"] == node
        self.seconds = seconds

    def on_before_backward(self, *_: Any) -> None:
        until = time.thread_time() + self.seconds * self.here
        while time.thread_time() < until:
            pass
