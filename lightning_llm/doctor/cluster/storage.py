"""The folder that a run writes to: how fast, how much room, and whether all hosts have the same one."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from dataclasses import replace
from pathlib import Path

from lightning_llm._disk import sync
from lightning_llm.doctor.cluster.measurements import Disk
from lightning_llm.doctor.cluster.rank import Rank

BLOCK = 16 * 2**20
PATIENCE = 5.0  # seconds until a network file system shows another host's file


def check_disk(rank: Rank) -> list[Disk]:
    """One rank of each host writes and reads, all hosts at once as in training."""
    if not rank.leads_host():
        return []
    folder = Path(rank.settings.path)
    own = folder / f".lightning-llm-doctor-{uuid.uuid4().hex}"
    try:
        found = _write_and_read(rank, folder, own)
    except OSError as error:
        found = Disk(rank=rank.rank, path=str(folder.absolute()), error=str(error))
    finally:
        shared = _is_shared(rank, own)
    return [found if found.error else replace(found, shared=shared)]


def _write_and_read(rank: Rank, folder: Path, file: Path) -> Disk:
    """Writes random bytes, which nothing on the way can make smaller, synchronises, reads them past the cache."""
    rank.tell(f"writing to {folder.absolute()}")
    block = os.urandom(BLOCK)
    blocks = rank.settings.file_size // BLOCK
    free = shutil.disk_usage(folder).free
    try:
        began = time.perf_counter()
        with file.open("xb", buffering=0) as output:
            for _ in range(blocks):
                output.write(block)
            os.fsync(output.fileno())
        written = time.perf_counter() - began
        rank.tell(f"reading from {folder.absolute()}")
        with file.open("rb", buffering=0) as source:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            intact = sum(source.read(BLOCK) == block for _ in range(blocks)) == blocks
            taken = time.perf_counter() - began
    finally:
        file.unlink(missing_ok=True)
    size = blocks * BLOCK
    return Disk(
        rank=rank.rank,
        path=str(folder.absolute()),
        free=free,
        write=size / written,
        read=size / taken,
        intact=intact,
    )


def _is_shared(rank: Rank, sign: Path) -> bool | None:
    """Whether a file that rank 0 writes is there for this host too; rank 0 takes it away when all have looked."""
    if rank.rank == 0:
        try:
            sign.write_text(sign.name)
            sync(sign)
            sync(sign.parent)
            name = sign.name
        except OSError:
            name = ""
        rank.store.set(rank.key("sign"), name)
        try:
            for leader in rank.leaders()[1:]:
                rank.tell(f"waiting for rank {leader} to look for rank 0's file", waits=True)
                rank.wait(f"looked/{leader}")
        finally:
            sign.unlink(missing_ok=True)
        return True if name else None
    rank.tell("waiting for rank 0's file", waits=True)
    name = rank.store.get(rank.key("sign")).decode()
    rank.tell("looking for rank 0's file")
    until = time.monotonic() + PATIENCE
    while not (seen := bool(name) and (sign.parent / name).is_file()) and name and time.monotonic() < until:
        time.sleep(0.2)
    rank.store.set(rank.key(f"looked/{rank.rank}"), "")
    return seen if name else None
