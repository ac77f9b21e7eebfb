"""How often to save: often enough that a failure costs little, seldom enough that saving does.

J. W. Young, "A first order approximation to the optimum checkpoint interval" (1974); J. T. Daly, "A higher order
estimate of the optimum checkpoint interval for restart dumps" (2006). `AsyncDistributedCheckpoint` advises with what it
measures, the planner with what it estimates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Hours between failures of one accelerator: 419 unexpected interruptions of 16,384 GPUs in 54 days ("The Llama 3 Herd
# of Models", 2024, section 3.3.4) are one in 50,700; Meta's research clusters see one in 8,100 ("Revisiting Reliability
# in Large-Scale Machine Learning Research Clusters", 2024). The worse of the two makes the safer advice.
DEVICE_MTBF_HOURS = 8_100.0


def mtbf(devices: int, device_hours: float = DEVICE_MTBF_HOURS) -> float:
    """Seconds between failures of a run.

    Args:
        devices: Of the run; any of them stops it.
        device_hours: Hours between failures of one.
    """
    return device_hours * 3600 / devices


def best_interval(cost: float, mtbf: float, write: float = 0.0) -> float:
    """Seconds from one save to the next that lose the least time to saving and to failures together.

    Daly's estimate; for a cost far below the MTBF it is Young's sqrt(2 * cost * mtbf).

    Args:
        cost: Seconds that training stands still for a save.
        mtbf: Seconds between failures.
        write: Seconds until a save is committed; the next one does not begin before.
    """
    if cost >= 2 * mtbf:
        return max(mtbf, write)
    ratio = math.sqrt(cost / (2 * mtbf))
    interval = math.sqrt(2 * cost * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - cost
    return max(interval, write)


def lost_share(interval: float, cost: float, mtbf: float, restart: float = 0.0) -> float:
    """Share of the time that goes into saving, and into what is computed again after failures (first order).

    Args:
        interval: Seconds from save to save.
        cost: Seconds that training stands still for a save.
        mtbf: Seconds between failures.
        restart: Seconds from a failure to the first new step.
    """
    return cost / interval + (interval / 2 + restart) / mtbf


# Bytes per second of one device. To host memory: PCIe 4.0 x16, pinned, of which 25 GB/s are usually reached. To
# storage: Llama 3's had 2 TB/s, sustained, for 16,384 devices (arXiv:2407.21783, section 3.3.1).
HOST_LINK = 25e9
STORAGE = 2e12 / 16_384


@dataclass(frozen=True)
class Saving:
    """What checkpoints of a planned run cost, and how often to make one.

    Attributes:
        bytes_per_device: That the fullest rank writes.
        blocked: Seconds that training stands still for the snapshot.
        written: Seconds until it is on storage.
        mtbf: Seconds between failures of the run.
        interval: Seconds from save to save that lose the least.
        lost: Share of the time that goes into saving and into what is computed again.
    """

    bytes_per_device: float
    blocked: float
    written: float
    mtbf: float
    interval: float
    lost: float


def estimate_saving(
    bytes_per_device: float,
    devices: int,
    device_hours: float = DEVICE_MTBF_HOURS,
    blocked: float | None = None,
    written: float | None = None,
) -> Saving:
    """The cost of checkpoints in the background.

    Args:
        bytes_per_device: Parameters and optimizer states of the fullest rank.
        devices: Of the run.
        device_hours: Hours between failures of one.
        blocked: Seconds, where they were measured.
        written: Likewise.
    """
    blocked = bytes_per_device / HOST_LINK if blocked is None else blocked
    written = bytes_per_device / STORAGE if written is None else written
    between = mtbf(devices, device_hours)
    interval = best_interval(blocked, between, written)
    return Saving(bytes_per_device, blocked, written, between, interval, lost_share(interval, blocked, between))
