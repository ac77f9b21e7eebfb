"""The thread that measures: it does what the supervisor orders and puts the results into the store.

A thread beside the main one, which says that the process lives while a measurement hangs.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from lightning_llm.doctor.cluster.clocks import compare_clocks
from lightning_llm.doctor.cluster.compute import check_memory, describe, multiply
from lightning_llm.doctor.cluster.links import connect_all, measure_links, sum_up
from lightning_llm.doctor.cluster.measurements import Device
from lightning_llm.doctor.cluster.members import first_line
from lightning_llm.doctor.cluster.rank import Rank
from lightning_llm.doctor.cluster.storage import check_disk

CHECKS: dict[str, Callable[[Rank], list[Any]]] = {
    "device": describe,
    "compute": multiply,
    "memory": check_memory,
    "clock": compare_clocks,
    "connect": connect_all,
    "links": measure_links,
    "all_reduce": sum_up,
    "disk": check_disk,
}
END = "end"


def start(rank: Rank) -> threading.Thread:
    """Begins to work; the thread does not keep the process."""
    thread = threading.Thread(target=work, args=(rank,), daemon=True, name="doctor-worker")
    thread.start()
    return thread


def work(rank: Rank) -> None:
    """Does one order after the other until there are no more, or one fails: others may wait for it then."""
    while (check := rank.store.get(f"order/{rank.order}").decode()) != END:
        if not rank.peers and check != "device":
            rank.peers = [Device(**one) for one in json.loads(rank.store.get("peers"))]
        try:
            results = [asdict(one) for one in CHECKS[check](rank)]
        except Exception as error:  # whatever a sick device or network raises is what was asked for
            with suppress(dist.DistError):  # rank 0 is gone, which another thread tells
                rank.store.set(f"failed/{rank.order}/{rank.rank}", f"{type(error).__name__}: {first_line(error)}")
                rank.store.set(f"failed/{rank.order}", "")
            return
        rank.store.set(f"done/{rank.order}/{rank.rank}", json.dumps(results))
        rank.order += 1
    if dist.is_initialized():
        dist.destroy_process_group()
