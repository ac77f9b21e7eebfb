"""Starting the processes of one node, and making sure that none of them outlives the run.

llm3d.py uses `ProcessLauncher` when nobody else (torchrun, Slurm, ...) starts the processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

PARENT_VARIABLE = "LIGHTNING_LLM_PARENT_PID"
FAILURE_COUNT = "lightning_llm/failures"
FAILED_RANK = "lightning_llm/failed_rank"
FAREWELL = 8.0  # seconds that a failed rank gets to print its traceback and close its loggers


class ProcessLauncher(_SubprocessScriptLauncher):
    """Lightning's subprocess launcher (it runs the script once more for every further device), with a check before it.

    Args:
        cluster_environment: Addresses and ranks.
        num_processes: Processes on this node.
        num_nodes: Nodes of the run.
        check: Called with the arguments of the trainer function before any process is started; raises what is wrong.
    """

    def __init__(
        self, cluster_environment: ClusterEnvironment, num_processes: int, num_nodes: int, check: Callable[..., None]
    ) -> None:
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._check = check

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Checks, starts the other processes, then runs `function` here as local rank 0."""
        self._check(trainer, *args, **kwargs)
        os.environ[PARENT_VARIABLE] = str(os.getpid())
        # A Trainer of the same script may launch again after the first one's run: its processes are there already.
        return super().launch(function, *args, trainer=trainer, **kwargs)

    def wait_for(self, rank: int) -> int:
        """Lets a failed process of this node finish by itself, for a few seconds; returns its exit code, or 1."""
        local = rank - self.cluster_environment.node_rank() * self.num_processes
        if not 0 < local <= len(self.procs):
            return 1
        try:
            return self.procs[local - 1].wait(timeout=FAREWELL) or 1
        except subprocess.TimeoutExpired:
            return 1


def die_with_launcher() -> None:
    """In a process that `ProcessLauncher` started: asks the kernel to end this process when the launching one ends.

    Covers even `kill -9` of the launching process, after which nothing could clean up. Linux only; elsewhere peers
    notice by their closed connections.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or int(parent) == os.getpid() or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the request was in place
        os._exit(1)


def first_to_fail(rank: int) -> int:
    """The rank whose failure came first; reports this one's.

    An exception in one rank reaches the others as closed connections a moment later. Only the first one tells what went
    wrong; the store keeps count.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rank
    try:
        store = dist.distributed_c10d._get_default_store()
        if store.add(FAILURE_COUNT, 1) == 1:
            store.set(FAILED_RANK, str(rank))
            return rank
        return int(store.get(FAILED_RANK))
    except (RuntimeError, dist.DistError):
        return 0  # the store is gone, and rank 0 with it
