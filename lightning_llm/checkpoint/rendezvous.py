"""How the ranks' background threads agree on the end of a save: over the key-value store that started the run.

Not over the process group, which belongs to training and must not be used from a second thread. Two phases, as in
torchsnapshot's LinearBarrier: all ranks report, rank 0 decides, all ranks learn what it decided; errors travel the same
way, and nobody waits longer than the timeout.
"""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

LATENESS = 30.0  # seconds that ranks may be apart, on top of the time that one has to write its file


class RendezvousError(OSError):
    """Another rank did not come in time."""


class Rendezvous:
    """One conversation of all ranks. Rank 0 leads it.

    Args:
        topic: Unique, and the same on all ranks.
        rank: Of this process.
        world_size: Number of ranks.
        timeout: Seconds that a rank has to do its part. Rank 0 waits for the others that long and a little; they wait
            for it three times as long, since its part comes after theirs.
        store: The run's; None for a single process.
    """

    def __init__(self, topic: str, rank: int, world_size: int, timeout: float, store: dist.Store | None) -> None:
        self.rank = rank
        self._topic = topic
        self._world_size = world_size
        self._patience = LATENESS + (timeout if rank == 0 else 3 * timeout)
        self._store = store if world_size > 1 else None
        self._announced: list[str] = []

    def announce(self, key: str, message: Any = None) -> Any:
        """Rank 0's `message`, on all ranks."""
        if self._store is None:
            return message
        name = f"{self._topic}/{key}"
        if self.rank == 0:
            self._store.set(name, json.dumps(message))
            self._announced.append(name)
            return message
        return self._get(name, f"rank 0 did not announce {key!r}", self._patience)

    def report(self, key: str, message: Any) -> list[Any]:
        """All ranks' messages, on rank 0; elsewhere nothing."""
        if self._store is None:
            return [message]
        if self.rank != 0:
            self._store.set(f"{self._topic}/{key}/{self.rank}", json.dumps(message))
            return []
        deadline = time.monotonic() + self._patience
        messages = [message]
        for rank in range(1, self._world_size):
            name = f"{self._topic}/{key}/{rank}"
            messages.append(self._get(name, f"rank {rank} did not report", deadline - time.monotonic()))
            self._store.delete_key(name)
        return messages

    def forget(self) -> None:
        """Takes what was announced out of the store, once all ranks have heard it."""
        for name in self._announced:
            assert self._store is not None
            self._store.delete_key(name)
        self._announced.clear()

    def _get(self, name: str, complaint: str, timeout: float) -> Any:
        assert self._store is not None
        try:
            self._store.wait([name], timedelta(seconds=max(timeout, 0.001)))
            return json.loads(self._store.get(name))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
            raise RendezvousError(f"{complaint} within {self._patience:.0f} s ({error})") from error
