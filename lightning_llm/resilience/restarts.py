"""Whether a run that has failed is started again, when, and with which exit code it ends if not. No input or output.

The launcher asks after every failure. The rules, in this order: exit codes that say what to do are obeyed; an exception
that comes back in the same step will come back for ever; restarts that get no further are of no use; and there is a
budget of restarts in any window of time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_llm.errors import ConfigurationError

Kind = Literal["exit", "signal", "hang", "node lost"]

FAILED, USAGE_ERROR, REQUEUE, DIVERGED, NO_GOOD_CHECKPOINT, DO_NOT_RESTART = 1, 2, 75, 76, 77, 93
FINAL_CODES = (USAGE_ERROR, REQUEUE, DIVERGED, NO_GOOD_CHECKPOINT, DO_NOT_RESTART)

STALLED_RESTARTS = 3  # without progress, as in NVIDIA's resiliency extension
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why an attempt has ended.

    Attributes:
        kind: "exit": with a code; "signal": killed by one; "hang": ended by the monitor; "node lost": its launcher is
            heard no more.
        code: Exit code, negative for a signal.
        who: Rank and host, for people.
        text: What happened, for people.
        place: Exception and stack without line values, the same whenever the same happens; empty where there is none.
        step: Optimizer steps that were done.
        consequence: Whether it looks like that of another rank's failure: an error of communication.
    """

    kind: Kind
    code: int
    who: str
    text: str
    place: str = ""
    step: int = 0
    consequence: bool = False


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One life of the ranks.

    Attributes:
        failure: Its end.
        progress: The step that a restart goes on from, as far as is known: of the newest checkpoint, or of its start.
        ended: Seconds, by the monotonic clock of whoever decides.
    """

    failure: Failure
    progress: int
    ended: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What comes next.

    Attributes:
        restart: Or the run ends.
        code: To end with.
        delay: Seconds before the restart.
        reason: For people.
    """

    restart: bool
    code: int = 0
    delay: float = 0.0
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """The rules.

    Args:
        max_restarts: Within `window`.
        window: Seconds.
        jitter: Gives a number in [0, 1): delays differ by half, so that many jobs do not come back at once.

    Raises:
        ConfigurationError: A number out of its range.
    """

    max_restarts: int = 10
    window: float = 3600.0
    jitter: Callable[[], float] = random.random

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or self.window <= 0:
            raise ConfigurationError(
                f"--max-restarts {self.max_restarts} must be at least 0, --restart-window {self.window:g} above 0 "
                "seconds."
            )

    def decide(self, history: Sequence[Attempt]) -> Decision:
        """What comes after the last attempt of `history`, which is of all attempts in their order."""
        now = history[-1]
        failure = now.failure
        if failure.code in FINAL_CODES:
            return Decision(restart=False, code=failure.code, reason=failure.text)
        if self.max_restarts == 0:
            return Decision(restart=False, code=ending_code(failure), reason=failure.text)
        if len(history) > 1 and _same_error(failure, history[-2].failure):
            return Decision(
                restart=False,
                code=DO_NOT_RESTART,
                reason=f"the same error twice in step {failure.step}: a restart will not help",
            )
        stalled = stalled_restarts(history)
        if stalled >= STALLED_RESTARTS:
            return Decision(
                restart=False,
                code=DO_NOT_RESTART,
                reason=f"{stalled} restarts have got no further than step {now.progress}",
            )
        recent = sum(now.ended - attempt.ended < self.window for attempt in history)
        if recent > self.max_restarts:
            return Decision(
                restart=False,
                code=ending_code(failure),
                reason=f"{self.max_restarts} restarts within {self.window:g} s, as many as --max-restarts allows",
            )
        return Decision(restart=True, delay=self._delay(stalled), reason=failure.text)

    def _delay(self, stalled: int) -> float:
        """None after progress; then doubled each time, so that what is overloaded can recover."""
        if stalled == 0:
            return 0.0
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0 ** (stalled - 1)) * (0.5 + self.jitter())


def stalled_restarts(history: Sequence[Attempt]) -> int:
    """Restarts at the end of `history` since which nothing has been gained."""
    best = max(attempt.progress for attempt in history)
    first = next(index for index, attempt in enumerate(history) if attempt.progress == best)
    return len(history) - 1 - first


def root_cause(failures: Sequence[Failure]) -> Failure:
    """Of what several nodes or ranks report, in the order of time, the one that the others follow from.

    A hang that names a rank beats one in which all wait, an error of a rank's own beats a lost connection, and among
    equals the first one counts.
    """

    def weight(failure: Failure) -> tuple[bool, bool, bool]:
        return failure.consequence, failure.code not in FINAL_CODES, failure.kind == "node lost"

    return min(failures, key=weight)


def ending_code(failure: Failure) -> int:
    """What a program ends with for its ranks' failure, as a shell counts signals."""
    return 128 - failure.code if failure.code < 0 else failure.code or FAILED


def _same_error(failure: Failure, before: Failure) -> bool:
    return bool(failure.place) and (failure.place, failure.step) == (before.place, before.step)
