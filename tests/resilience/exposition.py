"""Prometheus' text format, and a state of a node in which everything that can be shown is."""

from __future__ import annotations

import time

from lightning_llm.resilience.beats import Beat, Kind
from lightning_llm.resilience.status import FIGURES, Status
from lightning_llm.resilience.watch import Verdict, Watch

EVERYTHING = {
    **dict.fromkeys(FIGURES, 1.5),
    "checkpoint_step": 40.0,
    "checkpoint_age_seconds": 5.0,
    "straggler_worst_score": 0.5,
    "straggler_rank": 3.0,
}


def beat(rank: int = 0, pid: int = 100, kind: Kind = "progress", **figures: float) -> Beat:
    return Beat(rank=rank, pid=pid, kind=kind, phase="train", step=7, figures=figures)


def told(*beats: Beat) -> Status:
    watch = Watch()
    status = Status(watch)
    for each in beats:
        watch.take(each, time.monotonic())
        status.take(each, time.monotonic())
    return status


def full_status() -> Status:
    """With a sample of every metric that there is."""
    status = told(beat(**EVERYTHING), beat(rank=1, pid=101))
    status.restarted("hang")
    verdict = Verdict("stopped", (1,), "train", 7, 12.0, 10.0)
    status.verdicts = [verdict]
    status.count(verdict)
    return status


def samples_of(text: str) -> dict[str, float]:
    """Name with labels -> value; a sample that stands there twice is an error."""
    pairs = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    found = {name: float(value) for name, value in pairs}
    assert len(found) == len(pairs), "a sample stands there twice"
    return found


def names_of(text: str) -> set[str]:
    """Of the metrics that have samples."""
    return {sample.partition("{")[0] for sample in samples_of(text)}
