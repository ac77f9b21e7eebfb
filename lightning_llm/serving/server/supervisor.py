"""`Supervisor`: what the main process does while a server runs: it replaces workers, and drains the server."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from lightning_llm.serving.errors import ServerFailedError
from lightning_llm.serving.server.board import Board, Phase

log = logging.getLogger(__name__)

_LOOK = 0.2  # seconds between looks; the death of a process is noticed at once
_ABORTING = 2.0  # seconds in which requests that are cut off are told so
_LONGEST_BACKOFF = 30.0


class Supervisor:
    """See above.

    Args:
        board: Of the server.
        workers: Its workers, by their ids; replaced in place.
        frontends: Processes that speak HTTP.
        launch: Starts a worker.
        is_shut_down: Whether LitServe was asked to end, by its own ways.
        drain_timeout, hang_timeout, max_failures: See `EngineServer`.
    """

    def __init__(
        self,
        board: Board,
        workers: list[BaseProcess],
        frontends: list[BaseProcess],
        *,
        launch: Callable[[int], BaseProcess],
        is_shut_down: Callable[[], bool],
        drain_timeout: float,
        hang_timeout: float,
        max_failures: int,
    ) -> None:
        self.board = board
        self.workers = workers
        self.frontends = frontends
        self._launch = launch
        self._is_shut_down = is_shut_down
        self._drain_timeout = drain_timeout
        self._hang_timeout = hang_timeout
        self._max_failures = max_failures
        self._failures = [0] * len(workers)
        self._start_at = [0.0] * len(workers)  # when a dead worker is to be replaced

    def run(self) -> None:
        """Returns when the server has been drained.

        Raises:
            ServerFailedError: It cannot go on.
        """
        while self.board.phase == Phase.SERVING and not self._is_shut_down():
            self._look_after_all()
        self.board.phase = Phase.DRAINING
        log.info("Draining: %d requests in flight", self._in_flight)
        self._wait_for_requests(self._drain_timeout)
        if self._in_flight:
            log.warning("%d requests, not ended in %g seconds, are cut off", self._in_flight, self._drain_timeout)
            self.board.phase = Phase.ABORTING
            self._wait_for_requests(_ABORTING)

    @property
    def _in_flight(self) -> int:
        return sum(self.board.in_flight)

    def _wait_for_requests(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._in_flight and time.monotonic() < until and all(one.is_alive() for one in self.frontends):
            wait([one.sentinel for one in self.frontends], timeout=_LOOK / 4)

    def _look_after_all(self) -> None:
        for worker, process in enumerate(self.workers):
            if not process.is_alive():
                self._replace(worker)
            elif self._hangs(worker):
                self._end(worker)
        for frontend in self.frontends:
            if not frontend.is_alive():
                raise ServerFailedError(f"A process that speaks HTTP has ended with {frontend.exitcode}.")
        alive = [process.sentinel for process in [*self.workers, *self.frontends] if process.is_alive()]
        wait(alive, timeout=_LOOK)

    def _hangs(self, worker: int) -> bool:
        state = self.board.workers[worker]
        return state.ready and self.board.silence(worker) > self._hang_timeout  # idle ones beat, too

    def _end(self, worker: int) -> None:
        process = self.workers[worker]
        log.error("Worker %d (pid %s) made no step for %g s and is ended", worker, process.pid, self._hang_timeout)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGABRT)  # it prints where it is
        process.join(1.0)
        process.kill()
        process.join()

    def _replace(self, worker: int) -> None:
        state, now = self.board.workers[worker], time.monotonic()
        if not self._start_at[worker]:
            was_ready = state.steps > 0 or state.ready
            state.ready = state.busy = False
            self._failures[worker] = 0 if was_ready else self._failures[worker] + 1
            exitcode = self.workers[worker].exitcode
            if self._failures[worker] >= self._max_failures:
                raise ServerFailedError(f"Worker {worker} ended {self._failures[worker]} times before it was ready.")
            delay = min(2.0 ** self._failures[worker] - 1, _LONGEST_BACKOFF)
            log.error("Worker %d ended with %s; another is started in %g seconds", worker, exitcode, delay)
            self._start_at[worker] = now + delay
        if now >= self._start_at[worker]:
            state.steps = 0
            self.workers[worker] = self._launch(worker)
            self._start_at[worker] = 0.0
