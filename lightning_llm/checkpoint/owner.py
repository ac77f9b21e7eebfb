"""Whose draft is it? A draft tells which process makes it, so that others can tell leftovers from work in progress."""

from __future__ import annotations

import os
import socket


def machine() -> str:
    """Where process ids mean the same as they do here: this host, and in it this container. Has no dash."""
    try:
        namespace = f".{os.stat('/proc/self/ns/pid').st_ino}"  # containers may share the name of their host
    except OSError:
        namespace = ""
    return socket.gethostname().replace("-", "_") + namespace


def is_running(pid: int) -> bool:
    """Whether there is such a process on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
