"""Signals and parents: how the processes of a server begin and end together."""

from __future__ import annotations

import multiprocessing
import os
import signal
from types import FrameType
from typing import Any

from lightning_llm._processes import die_with
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.server.board import Board, Phase

_guarded: set[int] = set()  # processes whose forked children are to end with them


def check_main_module() -> None:
    """A worker is spawned: it imports the program that started the server, which must not start one again.

    Raises:
        ConfigurationError: It does.
    """
    # As multiprocessing itself finds out (Python 3.11 to 3.14, spawn._check_not_importing_main).
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise ConfigurationError(
            "A worker has imported the program that starts the server, and so came to start a server itself: "
            'put what starts it under `if __name__ == "__main__":`.'
        )


def end_on_sigterm(board: Board) -> None:
    """In a worker: SIGTERM ends it, but not before the main process says so. Service managers send the signal to all
    processes at once, and Ctrl-C goes to all of a terminal; draining is for the main process to direct."""

    def end(signum: int, frame: FrameType | None) -> None:
        if _obeys(board):
            raise SystemExit(0)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def leave_signals_to_main(board: Board) -> None:
    """In a process that speaks HTTP, after uvicorn has set its handlers: the same, where there is an `EngineServer`."""
    if not board.supervised:
        return
    shut_down: Any = signal.getsignal(signal.SIGTERM)

    def end(signum: int, frame: FrameType | None) -> None:
        if _obeys(board):
            shut_down(signum, frame)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _obeys(board: Board) -> bool:
    return board.phase >= Phase.CLOSING or not board.supervised


def guard_forks() -> None:
    """Processes that this one forks from now on end with it, whatever ends it: LitServe's manager has no other way."""
    _guarded.add(os.getpid())


def unguard_forks() -> None:
    """The end of `guard_forks`."""
    _guarded.discard(os.getpid())


def _after_fork() -> None:
    if os.getppid() in _guarded:
        die_with(os.getppid())


os.register_at_fork(after_in_child=_after_fork)
