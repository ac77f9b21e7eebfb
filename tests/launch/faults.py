"""A callback for run files that does harm to its own rank, at one place; what happened is written to a file."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from lightning.pytorch import Callback

Phase = Literal["init", "first step", "train", "validate", "checkpoint", "shutdown"]
Kind = Literal["kill", "stop", "hang", "gil", "barrier", "raise", "terminate", "nothing"]


class Fault(Callback):
    """Notes each rank's start and steps in `events`, and does its harm once, or at each attempt.

    Args:
        events: File of JSON lines.
        kind: What to do.
        phase: Where.
        rank: Who.
        step: In which optimizer step, where the phase has steps.
        seconds: Of a pause.
        again: In each attempt.
    """

    def __init__(
        self,
        events: str,
        kind: Kind = "nothing",
        phase: Phase = "train",
        rank: int = 0,
        step: int = 0,
        seconds: float = 600.0,
        again: bool = False,
    ) -> None:
        self.events, self.kind, self.phase, self.rank, self.step = Path(events), kind, phase, rank, step
        self.seconds, self.again = seconds, again

    def note(self, trainer: Any, what: str) -> None:
        entry = {
            "what": what,
            "rank": trainer.global_rank,
            "pid": os.getpid(),
            "step": trainer.global_step,
            "attempt": int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)),
            "world": trainer.world_size,
            "time": time.monotonic(),
            "date": time.time(),
        }
        with self.events.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def act(self, trainer: Any, phase: Phase) -> None:
        at_step = phase in ("init", "shutdown") or trainer.global_step == self.step
        if self.kind == "nothing" or phase != self.phase or trainer.global_rank != self.rank or not at_step:
            return
        done = self.events.with_suffix(".done")
        if done.exists() and not self.again:
            return
        done.touch()
        self.note(trainer, self.kind)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.kind == "hang":
            time.sleep(self.seconds)
        elif self.kind == "barrier":  # instead of the collective that the others call
            dist.barrier()
        elif self.kind == "gil":
            ctypes.PyDLL(None).sleep(int(self.seconds))  # PyDLL does not give up the interpreter's lock
        elif self.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise ArithmeticError("this batch cannot be learnt")

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        self.note(trainer, "start")
        self.act(trainer, "init")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        self.note(trainer, "step")
        self.act(trainer, "first step")

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.act(trainer, "train")

    def on_validation_batch_start(self, trainer: Any, *_: Any, **__: Any) -> None:
        self.act(trainer, "validate")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        self.act(trainer, "checkpoint")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.act(trainer, "shutdown")
