"""What the monitor shows of the training: `Heartbeat` sends it with a beat of a node's first rank, now and then."""

from __future__ import annotations

import time

import lightning.pytorch as pl
import torch

from lightning_llm.callbacks._lightning import metrics_of_last_batch
from lightning_llm.callbacks.agreement import Reading
from lightning_llm.callbacks.checkpoint import AsyncDistributedCheckpoint
from lightning_llm.callbacks.stragglers import Stragglers
from lightning_llm.checkpoint.saver import Outcome
from lightning_llm.resilience.status import CHECKPOINT_AGE, CHECKPOINT_STEP, STRAGGLER_RANK, STRAGGLER_SCORE

# As modules and callbacks log it -> as the monitor shows it.
LOGGED = {
    "train_loss": "train_loss",
    "val_loss": "val_loss",
    "grad_norm": "grad_norm",
    "tokens_per_second": "tokens_per_second",
    "step_time": "step_time_seconds",
    "mfu": "mfu_ratio",
}


class Figures:
    """Reads figures of a run at most once in a while, and without waiting for a device.

    What is on a device is asked for at the end of one step and read at that of a later one, when the device has come
    to it.

    Args:
        every: Seconds between readings.
    """

    def __init__(self, every: float = 1.0) -> None:
        self._every = every
        self._due = 0.0
        self._asked: tuple[list[str], Reading] | None = None
        self._committed: tuple[Outcome, float] | None = None  # and when it was first seen

    def read(self, trainer: pl.Trainer) -> dict[str, float]:
        """What is new, by the names that the monitor knows; mostly nothing."""
        now = time.monotonic()
        if self._asked is not None:
            names, reading = self._asked
            if not reading.ready:
                return {}
            self._asked = None
            return dict(zip(names, reading.value().tolist(), strict=True))
        if now < self._due:
            return {}
        self._due = now + self._every
        return self._logged(trainer) | self._checkpoint(trainer, now) | _straggler(trainer)

    def _logged(self, trainer: pl.Trainer) -> dict[str, float]:
        metrics = metrics_of_last_batch(trainer)
        found = {shown: metrics[name] for name, shown in LOGGED.items() if name in metrics}
        queued = {name: value for name, value in found.items() if value.device.type == "cuda"}
        if queued:
            self._asked = list(queued), Reading(torch.stack([value.double().squeeze() for value in queued.values()]))
        return {name: float(value) for name, value in found.items() if name not in queued}

    def _checkpoint(self, trainer: pl.Trainer, now: float) -> dict[str, float]:
        """Step and age of the newest that this run has committed, however many callbacks save."""
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, AsyncDistributedCheckpoint)]
        committed = [saver.latest for saver in savers if saver.latest is not None and saver.latest.error is None]
        if not committed:
            return {}
        newest = max(committed, key=lambda outcome: outcome.step)
        if self._committed is None or self._committed[0] is not newest:
            self._committed = newest, now
        return {CHECKPOINT_STEP: float(newest.step), CHECKPOINT_AGE: now - self._committed[1]}


def _straggler(trainer: pl.Trainer) -> dict[str, float]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Stragglers) and callback.found is not None:
            scores = callback.found.scores
            rank = min(range(len(scores)), key=scores.__getitem__)
            return {STRAGGLER_SCORE: scores[rank], STRAGGLER_RANK: float(rank)}
    return {}
