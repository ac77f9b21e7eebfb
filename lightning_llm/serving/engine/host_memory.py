"""How much of the host's memory is free for this process: a container may have far less than the machine.

`sizing.py` asks. cgroups: https://docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that can be taken: what the machine has, or less where this process's cgroups allow less.

    Args:
        root: Where `proc` and `sys` are.
    """
    return min([psutil.virtual_memory().available, *_left_in_cgroups(root)])


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup, of both versions, that this process is in and that has a limit."""
    mounts = root / "sys" / "fs" / "cgroup"
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current", "inactive_file"), mounts
        elif "memory" in controllers.split(","):
            names, mount = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), mounts / "memory"
        else:
            continue
        # In a container the path may be the host's, which is not mounted here; the mount's root is its own then.
        place = mount / path.strip("/")
        for folder in (place, *place.parents):
            left = _left(folder, *names)
            if left is not None:
                yield left
            if folder == mount:
                break


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    """None where there is no limit. Pages of files that nobody used lately make room when they are asked to."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most == "max" else max(0, int(most) - used + int(stat.get(reclaimable, 0)))
