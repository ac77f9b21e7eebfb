"""Whose draft is it? A draft tells which process makes it, so that others can tell leftovers from work in progress."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine() -> str:
    """Where process ids mean the same as they do here: this host, and in it this container. Has no dash."""
    try:
        namespace = f".{os.stat('/proc/self/ns/pid').st_ino}"  # containers may share the name of their host
    except OSError:
        namespace = ""
    return socket.gethostname().replace("-", "_") + namespace


def this_process() -> str:
    """This process's id and, where it can be had, when it started: a container that starts anew gives ids anew."""
    started = _start_of(os.getpid())
    return str(os.getpid()) if started is None else f"{os.getpid()}.{started}"


def is_running(process: str) -> bool:
    """Whether there is this process on this machine, named as `this_process` does; without its start, any of its id."""
    pid, _, started = process.partition(".")
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not started or _start_of(int(pid)) in (None, started)


def _start_of(pid: int) -> str | None:
    """Clock ticks from the machine's start to the process's; None where the kernel does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    return stat.rpartition(b")")[2].split()[19].decode()  # field 22; the second may have spaces, and ends with ")"
