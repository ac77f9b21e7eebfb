"""Clocks against rank 0's, over the store: what is asked for there and answered by rank 0, as in NTP."""

from __future__ import annotations

import time

from lightning_llm.doctor.cluster.measurements import Clock
from lightning_llm.doctor.cluster.rank import Rank

TRIPS = 20


def compare_clocks(rank: Rank) -> list[Clock]:
    """One rank of each host asks rank 0 for its time; the fastest of some round trips says most, halved."""
    if rank.rank == 0:
        for asker in rank.leaders()[1:]:
            rank.tell(f"waiting for rank {asker} to ask for the time", waits=True)
            for trip in range(TRIPS):
                rank.wait(f"ask/{asker}/{trip}")
                rank.store.set(rank.key(f"time/{asker}/{trip}"), repr(time.time()))
        return []
    if not rank.leads_host():
        return []
    rank.tell("asking rank 0 for the time", waits=True)
    trips = []
    for trip in range(TRIPS):
        asked, began = time.time(), time.perf_counter()
        rank.store.set(rank.key(f"ask/{rank.rank}/{trip}"), "")
        answer = float(rank.store.get(rank.key(f"time/{rank.rank}/{trip}")))
        half = (time.perf_counter() - began) / 2
        trips.append((half, asked + half - answer))
    uncertainty, offset = min(trips)
    return [Clock(rank=rank.rank, offset=offset, uncertainty=uncertainty)]
