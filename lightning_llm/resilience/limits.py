"""How long a rank may show no progress, by phase: a floor, or several times what was seen."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import Literal

from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.beats import Phase

# Seconds. A first step compiles; a checkpoint waits for storage; at the end ranks wait for each other's files.
FLOORS: dict[Phase, float] = {
    "init": 600.0,
    "first step": 600.0,
    "train": 60.0,
    "validate": 60.0,
    "checkpoint": 900.0,
    "shutdown": 120.0,
}
SAFETY = 5.0  # times the 99th percentile, as in NVIDIA's resiliency extension
WARM_UP = 5  # gaps that must have been seen
KEPT = 500  # of a phase, the newest


class Limits:
    """Seconds without progress after which a rank counts as hung.

    Args:
        progress_timeout: For training and validation steps; "auto": five times the 99th percentile of the gaps seen so
            far, 60 s at least. The other phases have limits of their own, which it lifts where it is larger.

    Raises:
        ConfigurationError: It is no positive number.
    """

    def __init__(self, progress_timeout: float | Literal["auto"] = "auto") -> None:
        if progress_timeout != "auto" and not (isinstance(progress_timeout, int | float) and progress_timeout > 0):
            raise ConfigurationError(f"progress_timeout={progress_timeout!r} must be seconds above 0, or 'auto'.")
        self.progress_timeout = progress_timeout
        self._gaps: dict[Phase, deque[float]] = defaultdict(lambda: deque(maxlen=KEPT))

    def saw(self, phase: Phase, gap: float) -> None:
        """Takes up how long a step of a phase took."""
        self._gaps[phase].append(gap)

    def of(self, phase: Phase) -> float:
        """The limit of a phase, seconds."""
        steps = phase in ("train", "validate")
        if self.progress_timeout != "auto":
            return self.progress_timeout if steps else max(FLOORS[phase], self.progress_timeout)
        gaps = sorted(self._gaps[phase])
        if len(gaps) < WARM_UP:
            # Before that a slow machine must not look like a hung one.
            return max(FLOORS[phase], FLOORS["first step"]) if steps else FLOORS[phase]
        return max(FLOORS[phase], SAFETY * gaps[math.ceil(0.99 * len(gaps)) - 1])
