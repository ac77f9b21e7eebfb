"""Runs a plain function on N gloo processes: torch is imported once, then the test process forks. Or on one GPU.

Each rank has a hard time limit, every rank's exception reaches the test, and processes are ended by pid.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.tensor.parallel  # noqa: F401  imported here once instead of in every rank

from lightning_llm.strategies.deepspeed.ops import import_deepspeed


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: int = 120) -> list[Any]:
    """Calls `function(*args)` on `world_size` ranks of a gloo process group; returns what each rank returned, by rank.

    Results travel through files: return plain data or CPU tensors.
    """
    ranks = start_ranks(function, world_size, *args)
    folder, pids = ranks.folder, ranks.pids
    failed = _wait(pids, timeout)
    errors = {rank: (folder / f"error-{rank}").read_text() for rank in pids if (folder / f"error-{rank}").exists()}
    if errors or failed:
        # Peers of a failed rank fail too, with closed connections: the earliest file is the cause.
        first = min(errors, key=lambda rank: (folder / f"error-{rank}").stat().st_mtime_ns, default=None)
        detail = f"first failure, rank {first}:\n{errors[first]}" if first is not None else "no traceback was left"
        raise AssertionError(f"ranks {failed} of {world_size} failed ({sorted(errors)} raised); {detail}")
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in pids]


def run_on_gpu(function: Callable[..., Any], *args: Any) -> Any:
    """Calls `function(*args)` in a process begun anew, since CUDA does not survive a fork; Lightning connects it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


@dataclass
class Ranks:
    """Processes that run, for tests that do something to them."""

    folder: Path
    pids: dict[int, int]

    def end(self, wait: float = 0.0) -> dict[int, str]:
        """Ends all that still run after `wait` seconds; returns those that failed and why."""
        return _wait(self.pids, wait)


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> Ranks:
    """Starts what `run_distributed` waits for."""
    if any(isinstance(argument, dict) and argument.get("engine") == "deepspeed" for argument in args):
        import_engine("cpu")
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    return Ranks(folder, {rank: _fork(rank, world_size, folder, function, args) for rank in range(world_size)})


def import_engine(accelerator: str) -> None:
    """Imports DeepSpeed with what its engine imports later: once here instead of in every rank, seconds each time."""
    import_deepspeed(accelerator)
    import_module("deepspeed.runtime.zero.muon.muon_optimizer")


def _fork(rank: int, world_size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            NODE_RANK="0",
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT="29500",
        )
        torch.cuda.is_available = lambda: False  # what the process may have asked of CUDA does not survive the fork
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
        result = function(*args)
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: dict[int, int], timeout: float) -> dict[int, str]:
    """Waits for all ranks; returns those that did not exit with 0 and why. Ends the rest soon after a first failure."""
    deadline = time.monotonic() + timeout
    running = dict(pids)
    failed: dict[int, str] = {}
    while running:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                code = os.waitstatus_to_exitcode(status)
                if code:
                    failed[rank] = f"exit code {code}"
                    deadline = min(deadline, time.monotonic() + 10)
        if time.monotonic() > deadline:
            for rank, pid in running.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                failed[rank] = "ended by the time limit"
            break
        time.sleep(0.02)
    return failed


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole value of a DTensor, or of a parameter that ZeRO-3 shares out. Collective."""
    if hasattr(tensor, "ds_id"):
        with import_module("deepspeed").zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
