"""Who is there and what is next. `Supervisor` runs on rank 0, `attend` on the others.

Every process counts a beat in the store; whose does not change is stopped or gone, whatever the others wait for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from queue import Empty, Queue
from typing import Any

import torch.distributed as dist

from lightning_llm.doctor.cluster import judging
from lightning_llm.doctor.cluster.measurements import (
    AllReduce,
    Clock,
    Compute,
    Device,
    Disk,
    Link,
    Lost,
    Measurements,
    Memory,
)
from lightning_llm.doctor.cluster.members import Member
from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.doctor.cluster.worker import END
from lightning_llm.errors import EndOfRunError

SILENCE = 15.0  # seconds without a beat; a loaded machine may be slow to let a process run
GRACE = 3.0  # seconds that others get to end a check that one rank has failed in
FAREWELL = 5.0  # seconds until all have heard of the end
AGAIN = 3  # times that all ranks measure again, before one that looks slow is accused

# check -> what each rank tells
RESULTS: dict[str, type] = {
    "device": Device,
    "compute": Compute,
    "memory": Memory,
    "clock": Clock,
    "links": Link,
    "all_reduce": AllReduce,
    "disk": Disk,
}


def interval(world_size: int) -> float:
    """Seconds between beats: one store answers them all."""
    return max(0.1, world_size / 1000)


def attend(store: dist.Store, member: Member, host: str, join_timeout: float) -> int:
    """Beats until rank 0 says that it is over; returns the exit code that it says.

    Raises:
        EndOfRunError: Rank 0 is gone or does not answer.
    """
    signs: Queue[int | dist.DistError | None] = Queue()
    # A thread, since a store that is stopped with its process never answers, whatever time limit it is given.
    threading.Thread(target=_listen, args=(store, member, host, signs), daemon=True).start()
    limit = join_timeout
    while True:
        try:
            sign = signs.get(timeout=limit)
        except Empty:
            raise EndOfRunError(
                f"rank {member.rank} on {host}: rank 0 ({member.address}) has not answered for {limit:g} seconds."
            ) from None
        if isinstance(sign, dist.DistError):
            raise EndOfRunError(f"rank {member.rank} on {host}: rank 0 is gone, and this ends with it.")
        if sign is not None:
            return sign
        limit = SILENCE


def _listen(store: dist.Store, member: Member, host: str, signs: Queue[int | dist.DistError | None]) -> None:
    """Beats; passes on that rank 0 does too, and the exit code when it has said one."""
    beat = 0
    try:
        store.set(f"came/{member.rank}", host)
        while not store.check([END]):
            store.add(f"beat/{member.rank}", 1)
            if (now := store.add("beat/0", 0)) != beat:
                beat = now
                signs.put(None)
            time.sleep(interval(member.world_size))
        code = int(store.get(END))
        store.add("left", 1)
        signs.put(code)
    except dist.DistError as error:
        signs.put(error)


class Watch:
    """Tells whose beat has stopped, by its own clock."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._seen: dict[int, tuple[int, float]] = {}

    def silent(self, ranks: Iterable[int]) -> list[int]:
        """Those among them that have not beaten for too long."""
        now, ranks = time.monotonic(), list(ranks)
        beats = [self._store.add(f"beat/{rank}", 0) for rank in ranks]
        for rank, beat in zip(ranks, beats, strict=True):
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
        return [rank for rank in ranks if now - self._seen[rank][1] > SILENCE]


class Supervisor:
    """Leads all ranks through the checks, and knows who is missing when one does not end.

    Args:
        store: A connection of the main thread's own.
        member: Rank 0.
        host: This one.
        settings: As the user gave them.
    """

    def __init__(self, store: dist.Store, member: Member, host: str, settings: ClusterSettings) -> None:
        self._store = store
        self._settings = settings
        self._ranks = range(member.world_size)
        self._pause = interval(member.world_size)
        self._watch = Watch(store)
        self._order = 0
        self.measured = Measurements(member.world_size, came={0: host})

    def run(self) -> Measurements:
        """Everything that could be measured; `lost` names those that it ended with."""
        if self._all_came() and self._measure("device"):
            self._store.set("peers", json.dumps([asdict(one) for one in self.measured.device]))
            for check in self._checks():
                if not (self._measure(check) and self._repeat(check)):
                    break
        self._store.set(f"order/{self._order}", END)
        return self.measured

    def end(self, code: int) -> None:
        """Tells all to end with a code; returns when those that live have heard it, since the store ends with us."""
        self._store.set(END, str(code))
        there = len(self.measured.came.keys() - {lost.rank for lost in self.measured.lost})
        until = time.monotonic() + FAREWELL
        while self._store.add("left", 0) < there - 1 and time.monotonic() < until:
            time.sleep(0.02)

    def _checks(self) -> list[str]:
        """What there is to measure after the devices."""
        units = [device.unit for device in self.measured.device if not device.unit.endswith("/cpu")]
        alone = len(self._ranks) == 1
        among = [] if alone else ["clock"]
        if not (self._settings.quick or alone or len(set(units)) < len(units)):  # NCCL refuses two ranks on one GPU
            among += ["connect", "links", "all_reduce"]
        return ["compute", "memory", *among, "disk"]

    def _all_came(self) -> bool:
        """Waits for all ranks; names those that do not come in time."""
        limit = self._settings.join_timeout
        came = self.measured.came
        self._store.set("came/0", came[0])
        until = time.monotonic() + limit
        keys = [f"came/{rank}" for rank in self._ranks]
        while not (complete := self._store.check(keys)) and time.monotonic() < until:
            self._store.add("beat/0", 1)
            time.sleep(self._pause)
        for rank in self._ranks:
            if self._store.check([keys[rank]]):
                came[rank] = self._store.get(keys[rank]).decode()
        for rank in self._ranks:
            if rank not in came:
                # Nobody knows its host; launchers put neighbours on the same.
                near = [max(one for one in came if one < rank), *sorted(one for one in came if one > rank)[:1]]
                neighbours = " and ".join(f"rank {one} on {came[one]}" for one in near)
                self._lose("join", rank, f"did not come within {limit:g} seconds; next to it are {neighbours}")
        return complete

    def _measure(self, check: str) -> bool:
        """Orders a check and keeps what all tell; False if somebody was lost in it."""
        self._store.set(f"order/{self._order}", check)
        missing = self._wait(check)
        if check in RESULTS:
            setattr(self.measured, check, list(self._results(check, missing)))
        self._order += 1
        return not missing

    def _repeat(self, check: str) -> bool:
        """Measures again as long as somebody looks slow, and keeps it all; False if somebody was lost in it."""
        for _ in range(AGAIN):
            if not judging.finds_slow(check, self.measured, self._settings):
                break
            before = getattr(self.measured, check)
            if not self._measure(check):
                setattr(self.measured, check, before)
                return False
            again = getattr(self.measured, check)
            both = [one.with_another(other) for one, other in zip(before, again, strict=True)]
            setattr(self.measured, check, both)
        return True

    def _wait(self, check: str) -> set[int]:
        """Returns when all have told, or with those that have not and will not."""
        until = time.monotonic() + self._settings.check_timeout
        failed = False
        while not self._store.check([self._done(rank) for rank in self._ranks]):
            if not failed and self._store.check([f"failed/{self._order}"]):
                failed, until = True, time.monotonic() + GRACE
            silent = self._watch.silent(self._ranks[1:])
            if silent or time.monotonic() > until:
                missing = {rank for rank in self._ranks if not self._store.check([self._done(rank)])}
                self._blame(check, missing, silent)
                return missing
            self._store.add("beat/0", 1)
            time.sleep(self._pause)
        return set()

    def _done(self, rank: int) -> str:
        return f"done/{self._order}/{rank}"

    def _results(self, check: str, missing: set[int]) -> Iterable[Any]:
        for rank in self._ranks:
            if rank not in missing:
                for one in json.loads(self._store.get(self._done(rank))):
                    yield RESULTS[check](**one)

    def _blame(self, check: str, missing: set[int], silent: list[int]) -> None:
        """Names those that failed or are silent; without such those that hang, and not those that wait for them."""
        limit = self._settings.check_timeout
        doing = {rank: self._doing(rank) for rank in missing}
        failed = {
            rank: self._store.get(key).decode()
            for rank in missing
            if self._store.check([key := f"failed/{self._order}/{rank}"])
        }
        for rank in silent:
            self._lose(
                check, rank, f"stopped answering for {SILENCE:g} seconds; it was {doing.get(rank, ('idle',))[0]}"
            )
        for rank, why in failed.items():
            self._lose(check, rank, f"failed: {why}")
        if silent or failed:
            return
        hang = [rank for rank in missing if not doing[rank][1]] or missing
        for rank in sorted(hang):
            self._lose(check, rank, f"was not done within {limit:g} seconds; it was {doing[rank][0]}")

    def _doing(self, rank: int) -> tuple[str, bool]:
        key = f"doing/{rank}"
        if not self._store.check([key]):
            return "looking at its device", False
        doing, waits = json.loads(self._store.get(key))
        return doing, waits

    def _lose(self, check: str, rank: int, why: str) -> None:
        self.measured.lost.append(Lost(rank=rank, check=check, why=why))
