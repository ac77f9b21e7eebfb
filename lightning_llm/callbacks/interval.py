"""How often a run should save, from what its first checkpoint has cost. `AsyncDistributedCheckpoint` says it once."""

from __future__ import annotations

import time

from lightning_llm.checkpoint.saver import Outcome
from lightning_llm.planner.saving import best_interval, mtbf


class IntervalAdvice:
    """Advice that is given once.

    Args:
        mtbf_hours: Hours between failures of the whole run; None takes what is published for clusters of its size.
    """

    def __init__(self, mtbf_hours: float | None) -> None:
        self._mtbf_hours = mtbf_hours
        self._began = 0.0
        self._first_step = 0
        self._given = False

    def start(self, step: int) -> None:
        """Training begins at this step."""
        self._began, self._first_step = time.monotonic(), step

    def of(self, outcome: Outcome, step: int, devices: int) -> str | None:
        """What to say after a save; None if it was said, or if no step was taken by which to measure.

        Args:
            outcome: Of the save.
            step: That training has come to.
            devices: Of the run.
        """
        steps = step - self._first_step
        if self._given or steps <= 0:
            return None
        self._given = True
        between = mtbf(devices) if self._mtbf_hours is None else self._mtbf_hours * 3600
        seconds = best_interval(outcome.blocked, between, outcome.written)
        per_step = (time.monotonic() - self._began) / steps
        return (
            f"A checkpoint stops training for {outcome.blocked:.2f} s and is committed {outcome.written:.1f} s later. "
            f"At one failure in {between / 3600:.0f} h the least is lost with one every {seconds:.0f} s "
            f"(every_n_train_steps={max(1, round(seconds / per_step))}; Young and Daly)."
        )
