"""What ranks send each other: between pairs, and in sums over all of them and over those of a host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_llm.doctor.cluster.measurements import AllReduce, Link
from lightning_llm.doctor.cluster.members import another_connection
from lightning_llm.doctor.cluster.rank import Rank

MIB = 2**20
SUMS = 5  # times

Pair = tuple[int, int]


def connect_all(rank: Rank) -> list[None]:
    """Makes the process group: NCCL between GPUs, gloo between CPUs."""
    rank.tell("connecting with the others", waits=True)
    cuda = rank.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", another_connection(rank.store)),
        rank=rank.rank,
        world_size=rank.world_size,
        # The supervisor's limit comes first; NCCL ends the process at its own.
        timeout=timedelta(seconds=2 * rank.settings.check_timeout + 60),
        device_id=rank.device if cuda else None,
    )
    dist.all_reduce(torch.ones(1, device=rank.device))
    rank.synchronize()
    return []


def measure_links(rank: Rank) -> list[Link]:
    """Sends to and fro between pairs, as many at a time as do not share anything."""
    # A message between processes of a CPU is the processor's work, so the best of more times is a steady number.
    size, times = (64 * MIB, 8) if rank.device.type == "cuda" else (8 * MIB, 20)
    sent = torch.arange(size // 4, dtype=torch.int32, device=rank.device)
    rounds = rounds_of(pairs_of([peer.host for peer in rank.peers]), [peer.unit for peer in rank.peers])
    found = []
    for number, pairs in enumerate(rounds):
        rank.tell("waiting for the other pairs", waits=True)
        rank.barrier(f"round/{number}")
        for pair in pairs:
            if rank.rank in pair:
                found += _send(rank, pair, sent, times)
    return found


def _send(rank: Rank, pair: Pair, sent: Tensor, times: int) -> list[Link]:
    """The first of the pair sends, the second sends back what it got; the first tells."""
    first, peer = rank.rank == pair[0], pair[0] if rank.rank == pair[1] else pair[1]
    rank.tell(f"exchanging data with rank {peer}", waits=True)
    buffer = sent.clone() if first else torch.empty_like(sent)

    def to_and_fro() -> None:
        for sends in (first, not first):
            if sends:
                dist.send(buffer, peer)
            else:
                dist.recv(buffer, peer)

    seconds = _times(rank, times, to_and_fro)
    size = 2 * buffer.nbytes
    return (
        [Link(first=pair[0], second=pair[1], bandwidth=size / min(seconds), intact=torch.equal(buffer, sent))]
        if first
        else []
    )


def sum_up(rank: Rank) -> list[AllReduce]:
    """Sums over all ranks, and where there are several hosts over those of each, at once on all of them."""
    everyone = range(rank.world_size)
    found = [_sum_up(rank, "", everyone, None)]
    beside = [peer.rank for peer in rank.peers if peer.host == rank.own.host]
    if 1 < len(beside) < rank.world_size:
        # Only its own ranks take part in making it: with a thousand hosts there would be a thousand to make.
        group = dist.new_group(beside, use_local_synchronization=True, device_id=_index(rank.device))
        found.append(_sum_up(rank, rank.own.host, beside, group))
    return found


def _index(device: torch.device) -> torch.device | None:
    return device if device.type == "cuda" else None


def _sum_up(rank: Rank, host: str, ranks: Sequence[int], group: dist.ProcessGroup | None) -> AllReduce:
    rank.tell(f"summing up with {f'the ranks of {host}' if host else 'all ranks'}", waits=True)
    elements = (256 if rank.device.type == "cuda" else 16) * MIB // 4
    own = torch.full((elements,), float(rank.rank % 8), device=rank.device)
    buffer = torch.empty_like(own)

    def all_reduce() -> None:
        dist.all_reduce(buffer, group=group)

    seconds = _times(rank, SUMS, all_reduce, lambda: buffer.copy_(own))
    expected = float(sum(one % 8 for one in ranks))
    n = len(ranks)
    return AllReduce(
        rank=rank.rank,
        host=host,
        participants=n,
        bandwidth=buffer.nbytes / median(seconds) * 2 * (n - 1) / n,
        right=bool((buffer == expected).all()),
    )


def _times(
    rank: Rank, times: int, run: Callable[[], None], prepare: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each time; the first one connects, and does not count."""
    seconds = []
    for _ in range(times + 1):
        prepare()
        rank.synchronize()
        began = time.perf_counter()
        run()
        rank.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def pairs_of(hosts: Sequence[str]) -> list[Pair]:
    """Neighbours in the ring of all ranks, and in the rings of the ranks with the same place on each host.

    So every rank's way to another of its host is measured, and that to another host.

    Args:
        hosts: By rank.
    """
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)
    pairs = set(_ring(range(len(hosts))))
    for place in range(max(map(len, ranks_of.values()))):
        pairs.update(_ring([ranks[place] for ranks in ranks_of.values() if place < len(ranks)]))
    return sorted(pairs)


def _ring(ranks: Sequence[int]) -> Iterable[Pair]:
    for one, other in zip(ranks, [*ranks[1:], *ranks[:1]], strict=True):
        if one != other:
            yield min(one, other), max(one, other)


def rounds_of(pairs: Iterable[Pair], units: Sequence[str]) -> list[list[Pair]]:
    """Pairs that may be measured at a time: no unit is in two of them.

    Args:
        pairs: Of ranks.
        units: What each rank computes on, and so sends from; ranks of one CPU share it.
    """
    rounds: list[list[Pair]] = []
    busy: list[set[str]] = []
    for pair in pairs:
        needed = {units[rank] for rank in pair}
        number = next((number for number, others in enumerate(busy) if not needed & others), len(rounds))
        if number == len(rounds):
            rounds.append([])
            busy.append(set())
        rounds[number].append(pair)
        busy[number] |= needed
    return rounds
