"""One rank of the check: where it computes, and how it meets the others. Every check gets it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from lightning_llm.doctor.cluster.measurements import Device
from lightning_llm.doctor.cluster.settings import ClusterSettings


@dataclass
class Rank:
    """This process, for its checks.

    Attributes:
        rank: Of all.
        world_size: How many.
        local_rank: Of this host.
        store: A connection of the worker's own: another thread's waiting would hold it up.
        settings: As the user gave them.
        device: Where it computes.
        peers: All ranks, this one too, by rank; empty until all have told about themselves.
        order: Number of the check that is under way, the same on all ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    store: dist.Store
    settings: ClusterSettings
    device: torch.device = torch.device("cpu")
    peers: Sequence[Device] = field(default_factory=list)
    order: int = 0

    @property
    def own(self) -> Device:
        """What this rank told about itself."""
        return self.peers[self.rank]

    def leads_host(self) -> bool:
        """Whether it is the first rank of its host."""
        return self.rank == min(peer.rank for peer in self.peers if peer.host == self.own.host)

    def leaders(self) -> list[int]:
        """The first rank of each host."""
        first: dict[str, int] = {}
        for peer in self.peers:
            first.setdefault(peer.host, peer.rank)
        return sorted(first.values())

    def tell(self, doing: str, *, waits: bool = False) -> None:
        """Notes what it is about to do, for the case that it never ends.

        Args:
            doing: As the rest of "rank 3 was ...".
            waits: For others, so that it is not to blame.
        """
        self.store.set(f"doing/{self.rank}", json.dumps([doing, waits]))

    def key(self, name: str) -> str:
        """A name in the store that no other check has, nor the same one measured again."""
        return f"{self.order}/{name}"

    def wait(self, name: str) -> None:
        """Returns when somebody has set `key(name)`."""
        self.store.wait([self.key(name)])

    def barrier(self, name: str) -> None:
        """Returns when all ranks are here."""
        if self.store.add(self.key(name), 1) == self.world_size:
            self.store.set(self.key(f"{name}/all"), "")
        self.wait(f"{name}/all")

    @contextmanager
    def in_turn(self, number: int) -> Iterator[None]:
        """Ranks that compute on the same unit do it one after the other; those with one of their own do not wait.

        Args:
            number: Counts the rounds, from 0.
        """
        sharers = [peer.rank for peer in self.peers if peer.unit == self.own.unit]
        turn = number * len(sharers) + sharers.index(self.rank)
        name = f"turn/{sharers[0]}"
        if len(sharers) > 1 and turn > 0:
            before = sharers[turn % len(sharers) - 1]
            self.tell(f"waiting for rank {before}'s turn to end", waits=True)
            self.wait(f"{name}/{turn - 1}")
            self.tell("computing, in its turn")
        yield
        if len(sharers) > 1:
            self.store.set(self.key(f"{name}/{turn}"), "")

    def synchronize(self) -> None:
        """Returns when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
