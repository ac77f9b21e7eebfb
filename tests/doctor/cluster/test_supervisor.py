"""Who is blamed when a check does not end: ranks of one process, over a store in its memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_llm.doctor.cluster import compute, worker
from lightning_llm.doctor.cluster.measurements import Lost, Measurements
from lightning_llm.doctor.cluster.members import Member
from lightning_llm.doctor.cluster.rank import Rank
from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.doctor.cluster.supervisor import Supervisor, attend

LIMIT = 2.0


def supervise(workers: list[Callable[[Rank], object]], folder: Path) -> Measurements:
    """Measures ranks whose workers are these; each has a main thread that attends, as it should."""
    world_size = len(workers)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=4 * LIMIT))  # what waits for a rank that hangs ends with the test
    settings = ClusterSettings(
        quick=True, device="cpu", memory_share=0.01, path=str(folder), join_timeout=5, check_timeout=LIMIT
    )
    members = [Member(rank, world_size, rank, "", 0, listens=False) for rank in range(world_size)]
    supervisor = Supervisor(store, members[0], "host", settings)
    threads = [
        threading.Thread(target=work, args=(Rank(rank, world_size, rank, store, settings),), daemon=True)
        for rank, work in enumerate(workers)
    ]
    threads += [
        threading.Thread(target=attend, args=(store, member, "host", LIMIT), daemon=True) for member in members[1:]
    ]
    for thread in threads:
        thread.start()
    measured = supervisor.run()
    supervisor.end(1)
    for thread in threads:
        thread.join(5 * LIMIT)
    return measured


def hangs(rank: Rank) -> None:
    """A worker that is never done with its first order."""


def hangs_later(rank: Rank) -> None:
    """A worker that tells what it is, and is never done with its products."""
    rank.store.get("order/0")
    rank.store.set(f"done/0/{rank.rank}", json.dumps([asdict(one) for one in compute.describe(rank)]))
    rank.store.get("order/1")
    rank.tell("computing, in its turn")


def has_no_gpu(rank: Rank) -> None:
    rank.settings = ClusterSettings(device="cuda")
    worker.work(rank)


def test_all_is_measured_where_nobody_hangs(tmp_path: Path) -> None:
    measured = supervise([worker.work, worker.work], tmp_path)
    assert measured.lost == []
    assert [len(each) for each in (measured.device, measured.compute, measured.memory, measured.disk)] == [2, 2, 2, 1]


def test_a_rank_that_hangs_is_named_with_what_it_was_at(tmp_path: Path) -> None:
    measured = supervise([worker.work, hangs], tmp_path)
    why = "was not done within 2 seconds; it was looking at its device"
    assert measured.lost == [Lost(rank=1, check="device", why=why)]


def test_those_who_wait_for_it_are_not(tmp_path: Path) -> None:
    measured = supervise([worker.work, worker.work, hangs_later], tmp_path)
    why = "was not done within 2 seconds; it was computing, in its turn"
    assert measured.lost == [Lost(rank=2, check="compute", why=why)]
    assert [one.rank for one in measured.device] == [0, 1, 2] and measured.compute == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_rank_that_fails_is_named_with_what_it_said(tmp_path: Path) -> None:
    measured = supervise([worker.work, has_no_gpu, worker.work], tmp_path)
    why = "failed: ConfigurationError: --device cuda: torch sees no GPU here."
    assert measured.lost == [Lost(rank=1, check="device", why=why)]
    assert [one.rank for one in measured.device] == [0, 2], "what the others told is kept"
