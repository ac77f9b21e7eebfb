"""How processes of one node belong together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent ends.

    Covers even `kill -9` of the parent, after which nothing could clean up. Linux only; elsewhere peers notice by their
    closed connections.
    """
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request was in place
        os._exit(1)


def end_group_with_parent() -> None:
    """Ends this process and all of its group when its stdin ends, as it does with the parent that holds the other end.

    For a thread of a process that leads its group: `die_with` would leave alone what this process started.
    """
    # Not through sys.stdin: its lock, held here, would be copied into forked workers, which close sys.stdin.
    while os.read(0, 1):
        pass
    os.killpg(0, signal.SIGKILL)
