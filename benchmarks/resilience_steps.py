"""A callback that notes when each optimizer step ends, for resilience.py, which reads it from outside."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback


class StepTimes(Callback):
    """Rank zero's steps, as JSON lines.

    Args:
        path: File, to which all attempts write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if trainer.is_global_zero:
            attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            line = json.dumps({"attempt": attempt, "step": trainer.global_step, "time": time.monotonic()})
            with self.path.open("a") as file:
                file.write(line + "\n")
