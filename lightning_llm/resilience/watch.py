"""Whether each rank of a node lives and gets on: beats and the receiver's clock in, verdicts out. No input or output.

Only the receiver's monotonic clock counts, so that no clock that is set and no other machine's can raise an alarm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_llm.resilience.beats import Beat, Phase
from lightning_llm.resilience.limits import Limits

Cause = Literal["died", "stopped", "interpreter held", "behind", "hung together"]

ALIVE_TIMEOUT = 10.0


@dataclass(frozen=True)
class Verdict:
    """What is wrong.

    Attributes:
        cause: "died": the process is gone without a goodbye; "stopped": it is suspended (SIGSTOP, a debugger);
            "interpreter held": it runs, but no Python thread does; "behind": it lives, and others wait for it, a step
            further or in another phase; "hung together": all wait, none is behind the others.
        ranks: That are to blame; for "hung together" all.
        phase: Of the first of them.
        step: Likewise.
        seconds: For how long there was no sign.
        limit: How long there may be none.
    """

    cause: Cause
    ranks: tuple[int, ...]
    phase: Phase
    step: int
    seconds: float
    limit: float

    def __str__(self) -> str:
        return f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}: {self.text}"

    @property
    def text(self) -> str:
        """What it is, without the ranks."""
        what = {
            "died": "ended without a word",
            "stopped": "suspended",
            "interpreter held": "running, but no Python thread answers: something holds the interpreter's lock",
            "behind": "no progress, and the others wait for it",
            "hung together": "no progress, and none is behind the others",
        }[self.cause]
        return (
            f"{what} (phase {self.phase!r}, step {self.step}, {self.seconds:.1f} s without a sign, limit "
            f"{self.limit:.1f} s)"
        )


@dataclass
class RankState:
    """What is known of a rank; times are of the receiver's clock."""

    pid: int
    phase: Phase
    step: int
    alive_at: float
    progress_at: float
    began: int = 0  # step that it has started from
    ended: bool = False


@dataclass
class Watch:
    """The ranks of one node.

    Args:
        limits: Without progress.
        alive_timeout: Seconds without any sign.
    """

    limits: Limits = field(default_factory=Limits)
    alive_timeout: float = ALIVE_TIMEOUT
    ranks: dict[int, RankState] = field(default_factory=dict)

    def take(self, beat: Beat, now: float) -> None:
        """A beat has arrived."""
        rank = self.ranks.get(beat.rank)
        if rank is None or rank.pid != beat.pid:  # another process has its place: nothing of the old one counts
            self.ranks[beat.rank] = RankState(beat.pid, beat.phase, beat.step, now, now)
            return
        rank.alive_at = now
        rank.ended = beat.kind == "end"
        if beat.phase == "first step":
            rank.began = beat.step
        if beat.kind == "progress":
            if beat.phase == rank.phase:
                self.limits.saw(beat.phase, now - rank.progress_at)
            rank.phase, rank.step, rank.progress_at = beat.phase, beat.step, now

    def forgive(self, seconds: float) -> None:
        """Nobody listened for so long, so that nobody's silence in that time counts."""
        for rank in self.ranks.values():
            rank.alive_at += seconds
            rank.progress_at += seconds

    @property
    def began(self) -> int:
        """The step that the ranks have started from."""
        return min((rank.began for rank in self.ranks.values()), default=0)

    def judge(self, now: float, processes: Mapping[int, str]) -> list[Verdict]:
        """What is wrong now.

        Args:
            now: By the clock of `take`.
            processes: State letter of each rank's process, as Linux has it ("T": suspended); a rank that is missing has
                none any more.
        """
        running = {number: rank for number, rank in self.ranks.items() if not rank.ended}
        dead = [number for number in running if number not in processes]
        if dead:
            return [self._verdict("died", dead, now - running[dead[0]].alive_at, 0.0)]
        silent = [n for n, rank in running.items() if now - rank.alive_at > self.alive_timeout]
        if silent:
            suspended = [number for number in silent if processes[number] in "Tt"]
            held = [number for number in silent if number not in suspended]
            causes: dict[Cause, list[int]] = {"stopped": suspended, "interpreter held": held}
            return [
                self._verdict(cause, group, now - running[group[0]].alive_at, self.alive_timeout)
                for cause, group in causes.items()
                if group
            ]
        late = [n for n, rank in running.items() if now - rank.progress_at > self.limits.of(rank.phase)]
        if not late:
            return []
        first = running[late[0]]
        seconds, limit = now - first.progress_at, self.limits.of(first.phase)
        behind = _behind(running)
        return [self._verdict("behind" if behind else "hung together", behind or running, seconds, limit)]

    def _verdict(self, cause: Cause, ranks: Iterable[int], seconds: float, limit: float) -> Verdict:
        ranks = tuple(sorted(ranks))
        rank = self.ranks[ranks[0]]
        return Verdict(cause, ranks, rank.phase, rank.step, seconds, limit)


def _behind(ranks: Mapping[int, RankState]) -> list[int]:
    """Who is waited for: those with fewer steps than others, or in a phase of their own; none if all are alike."""
    steps = [rank.step for rank in ranks.values()]
    if min(steps) < max(steps):
        return [number for number, rank in ranks.items() if rank.step == min(steps)]
    alike = Counter(rank.phase for rank in ranks.values())
    return [number for number, rank in ranks.items() if alike[rank.phase] * 2 < len(ranks)]
