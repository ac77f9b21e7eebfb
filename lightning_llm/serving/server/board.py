"""`Board`: what the processes of a server know of each other at any moment, in memory that they share.

LitServe's main process makes it; workers inherit it when they are spawned, processes that speak HTTP when they are
forked. Each field has one writer. Times are of the monotonic clock, which all processes of a machine have in common.
"""

from __future__ import annotations

import ctypes
import enum
import time
from multiprocessing.sharedctypes import RawArray, RawValue


class Phase(enum.IntEnum):
    """Where a server stands on its way to its end."""

    SERVING = 0
    DRAINING = 1
    """What runs is finished, nothing new begins."""
    ABORTING = 2
    """What still runs is cut off."""
    CLOSING = 3
    """Processes obey SIGTERM now; before, the main process alone decides when they end."""


class WorkerState(ctypes.Structure):
    """Of one worker, written by itself; `ready` also by the main process, when the worker has ended."""

    _fields_ = [
        ("pid", ctypes.c_int),
        ("ready", ctypes.c_bool),  # its engine is loaded
        ("busy", ctypes.c_bool),  # it has requests
        ("beat", ctypes.c_double),  # when it last went through its loop
        ("steps", ctypes.c_uint64),
    ]


class Board:
    """See above.

    Args:
        workers: How many.
        consumers: Processes that speak HTTP.

    Attributes:
        workers: By their LitServe ids.
        in_flight: Requests that each HTTP process waits for.
    """

    def __init__(self, workers: int, consumers: int) -> None:
        self.workers = RawArray(WorkerState, workers)
        self.in_flight = RawArray(ctypes.c_int, consumers)
        self._phase = RawValue(ctypes.c_int, Phase.SERVING)
        self._supervised = RawValue(ctypes.c_bool, False)

    @property
    def phase(self) -> Phase:
        """Of the server; the main process moves it on."""
        return Phase(self._phase.value)

    @phase.setter
    def phase(self, value: Phase) -> None:
        self._phase.value = value

    @property
    def supervised(self) -> bool:
        """Whether an `EngineServer` looks after the processes."""
        return self._supervised.value

    @supervised.setter
    def supervised(self, value: bool) -> None:
        self._supervised.value = value

    def beat(self, worker: int, *, busy: bool, stepped: bool = False) -> None:
        """A worker says that it goes on."""
        state = self.workers[worker]
        state.beat, state.busy = time.monotonic(), busy
        state.steps += stepped

    def silence(self, worker: int) -> float:
        """Seconds since a worker's last beat."""
        return time.monotonic() - self.workers[worker].beat
