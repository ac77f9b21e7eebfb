"""Runs functions on N forked processes each. The benchmarks use it, so that torch is imported once for all."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401  imported once here instead of in every rank


def run_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, accelerator: str = "cpu", timeout: float = 600.0
) -> list[Any]:
    """Calls `function(*args)` on every rank of a group and returns what each returned (plain data), by rank.

    The calling process must not have run torch on several threads before, nor CUDA: those do not survive a fork.

    Args:
        accelerator: "cpu": gloo; "cuda": NCCL too, each rank with the device of its number.
        timeout: Seconds for the whole call; then all ranks are ended.

    Raises:
        RuntimeError: A rank failed or ran out of time; carries the traceback of the first one.
    """
    return run_groups({"ranks": function}, world_size, *args, accelerator=accelerator, timeout=timeout)["ranks"]


def run_groups(
    functions: Mapping[str, Callable[..., Any]],
    world_size: int,
    *args: Any,
    accelerator: str = "cpu",
    timeout: float = 600.0,
) -> dict[str, list[Any]]:
    """The same with several functions at a time, each on ranks of its own that know nothing of the others.

    Returns:
        By the names of the functions.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as root:
        pids: dict[tuple[str, int], int] = {}
        for name, function in functions.items():
            folder = Path(root) / name
            folder.mkdir()
            for rank in range(world_size):
                pids[name, rank] = _fork(rank, world_size, folder, partial(function, *args), accelerator, timeout)
        failed = _wait(pids, timeout)
        if failed:
            # Peers of a failed rank fail too, with closed connections: the earliest traceback is the cause.
            errors = sorted(Path(root).glob("*/error-*"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError(f"{failed}; " + (errors[0].read_text() if errors else "no traceback was left"))
        return {
            name: [pickle.loads((Path(root) / name / f"result-{rank}").read_bytes()) for rank in range(world_size)]
            for name in functions
        }


def _fork(rank: int, size: int, folder: Path, function: Callable[[], Any], accelerator: str, limit: float) -> int:
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
        if accelerator == "cuda":
            torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl" if accelerator == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=limit)
        )
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function()))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the parent registered to run at its own exit is not this process's to run


def _wait(running: dict[tuple[str, int], int], timeout: float) -> str:
    """Waits for all ranks; "" or what went wrong. Leaves no process behind, not even when it is interrupted itself."""
    deadline = time.monotonic() + timeout
    failed = ""
    try:
        while running and time.monotonic() < deadline:
            for (name, rank), pid in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    del running[name, rank]
                    if status:
                        failed = failed or f"{name}: rank {rank} ended with code {os.waitstatus_to_exitcode(status)}"
                        deadline = min(deadline, time.monotonic() + 10)
            time.sleep(0.05)
        late = ", ".join(f"{name} {rank}" for name, rank in sorted(running))
        return failed or (f"ran longer than {timeout:.0f} s: {late}" if running else "")
    finally:
        for pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
