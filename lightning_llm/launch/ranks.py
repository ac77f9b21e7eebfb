"""The processes of one node: started by forking a server that has imported everything, ended with all they started."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import cast

from lightning_llm.launch.worker import run

PRELOAD = "lightning_llm.launch.preload"
PATIENCE = 10.0  # seconds for killed processes to be gone


class Ranks:
    """The ranks of this node, one life after another.

    Args:
        program: See `worker.run`.
        folder: For their reports.
        logs: Folder for their output; None leaves it on the launcher's.
    """

    def __init__(self, program: Sequence[str], folder: Path, logs: Path | None = None) -> None:
        self._program = list(program)
        self._folder = folder
        self._logs = logs
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([PRELOAD])
        _start_tracker()
        self._processes: dict[int, ForkServerProcess] = {}
        self._codes: dict[int, int] = {}

    def start(self, environments: Mapping[int, Mapping[str, str]], attempt: int) -> None:
        """Starts a process for each rank.

        Args:
            environments: By global rank.
            attempt: Its number; output goes to `<logs>/attempt<N>/rank<R>.log`.
        """
        for rank, environment in environments.items():
            log = self._logs / f"attempt{attempt}" / f"rank{rank}.log" if self._logs is not None else None
            process = self._context.Process(
                target=run, args=(self._program, dict(environment), self._folder, log), name=f"rank{rank}"
            )
            process.start()
            self._processes[rank] = process

    @property
    def pids(self) -> dict[int, int]:
        """Of the ranks that run, as far as was looked."""
        return {
            rank: process.pid
            for rank, process in self._processes.items()
            if process.pid is not None and rank not in self._codes
        }

    @property
    def exits(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended, negative for signals, as far as was looked."""
        return self._codes

    def look(self, seconds: float) -> None:
        """Waits for a rank to end, so long at most, and notes the codes of all that have."""
        sentinels = {self._processes[rank].sentinel: rank for rank in self.pids}
        if not sentinels:
            time.sleep(seconds)
        for sentinel in multiprocessing.connection.wait(list(sentinels), seconds):
            rank = sentinels[cast(int, sentinel)]
            code = self._processes[rank].exitcode
            if code is not None:
                self._codes[rank] = code

    def signal(self, signum: int) -> None:
        """Sends a signal to the ranks, not to what they have started: a DataLoader's workers would die of it."""
        for pid in self.pids.values():
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def kill(self, ranks: Iterable[int] | None = None) -> None:
        """Ends ranks (by default all) at once, with all they have started; suspended ones too."""
        for rank in self._processes if ranks is None else ranks:
            pid = self._processes[rank].pid
            with suppress(ProcessLookupError, PermissionError):  # gone, or not yet a group's leader
                os.killpg(pid or 0, signal.SIGKILL) if pid else None
            if rank not in self._codes:
                self._processes[rank].kill()
        deadline = time.monotonic() + PATIENCE
        while self.pids and time.monotonic() < deadline:
            self.look(0.1)

    def clear(self) -> None:
        """Forgets ranks that have ended, and their reports."""
        self._processes.clear()
        self._codes.clear()
        for report in self._folder.glob("failure-rank*.json"):
            report.unlink(missing_ok=True)


def _start_tracker() -> None:
    """Starts what removes the semaphores of ranks that were killed, and has it do so without a warning.

    It is deaf to what a scheduler sends to the launcher's whole group: to SIGTERM of itself, to SIGUSR1 through this.
    """
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, heard)
    if before is None:
        del os.environ["PYTHONWARNINGS"]
    else:
        os.environ["PYTHONWARNINGS"] = before
