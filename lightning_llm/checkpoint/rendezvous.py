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


class RendezvousError(OSError):
    """Another rank did not come in time."""


class Rendezvous:
    """One conversation of all ranks. Rank 0 leads it.

    Args:
        topic: Unique, and the same on all ranks.
        rank: Of this process.
        world_size: Number of ranks.
        timeout: Seconds for each of the steps.
        store: The run's; None for a single process.
    """

    def __init__(self, topic: str, rank: int, world_size: int, timeout: float, store: dist.Store | None) -> None:
        self.rank = rank
        self._topic = topic
        self._world_size = world_size
        self._timeout = timeout
        self._store = store if world_size > 1 else None

    def announce(self, key: str, message: Any = None) -> Any:
        """Rank 0's `message`, on all ranks."""
        if self._store is None:
            return message
        name = f"{self._topic}/{key}"
        if self.rank == 0:
            self._store.set(name, json.dumps(message))
            return message
        return self._get(name, f"rank 0 did not announce {key!r}", self._timeout)

    def report(self, key: str, message: Any) -> list[Any]:
        """All ranks' messages, on rank 0; elsewhere nothing."""
        if self._store is None:
            return [message]
        if self.rank != 0:
            self._store.set(f"{self._topic}/{key}/{self.rank}", json.dumps(message))
            return []
        deadline = time.monotonic() + self._timeout
        messages = [message]
        for rank in range(1, self._world_size):
            name = f"{self._topic}/{key}/{rank}"
            messages.append(self._get(name, f"rank {rank} did not report", deadline - time.monotonic()))
            self._store.delete_key(name)
        return messages

    def _get(self, name: str, complaint: str, timeout: float) -> Any:
        assert self._store is not None
        try:
            self._store.wait([name], timedelta(seconds=max(timeout, 0.001)))
            return json.loads(self._store.get(name))
        except (dist.DistStoreError, dist.DistNetworkError, RuntimeError) as error:
            raise RendezvousError(f"{complaint} within {self._timeout:.0f} s ({error})") from error
