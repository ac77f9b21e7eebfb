"""Runs a function on N forked gloo processes. The benchmarks use it, so that torch is imported once for all ranks."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401  imported once here instead of in every rank


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Calls `function(*args)` on every rank of a gloo group and returns what each returned (plain data), by rank.

    The calling process must not have run torch on several threads before: those do not survive a fork.

    Args:
        timeout: Seconds for the whole call; then all ranks are ended.

    Raises:
        RuntimeError: A rank failed or ran out of time; carries the traceback of the first one.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        pids = {rank: _fork(rank, world_size, folder, function, args, timeout) for rank in range(world_size)}
        failed = _wait(dict(pids), timeout)
        if failed:
            # Peers of a failed rank fail too, with closed connections: the earliest traceback is the cause.
            errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(f"{failed}; " + (errors[0].read_text() if errors else "no traceback was left"))
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in pids]


def _fork(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": size}
        os.environ.update({key: str(value) for key, value in place.items()})
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit))
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*args)))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent registered to run at its own exit is not this process's to run


def _wait(running: dict[int, int], timeout: float) -> str:
    """Waits for all ranks; "" or what went wrong. Leaves no process behind, not even when it is interrupted itself."""
    deadline = time.monotonic() + timeout
    failed = ""
    try:
        while running and time.monotonic() < deadline:
            for rank, pid in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del running[rank]
                    if status:
                        failed = failed or f"rank {rank} ended with code {os.waitstatus_to_exitcode(status)}"
                        deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.05)
        return failed or (f"ranks {sorted(running)} ran longer than {timeout:.0f} s" if running else "")
    finally:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
