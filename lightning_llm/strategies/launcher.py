"""Starting the processes of one node, and making sure that none of them outlives the run.

llm3d.py uses `ProcessLauncher` when nobody else (torchrun, Slurm, ...) starts the processes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

PARENT_VARIABLE = "LIGHTNING_LLM_PARENT_PID"
FAILURE_KEY = "lightning_llm/failures"


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


def die_with_launcher() -> None:
    """In a process that `ProcessLauncher` started: asks the kernel to end this process when the launching one ends.

    Covers even `kill -9` of the launching process, after which nothing could clean up. Linux only; elsewhere peers notice by
    their closed connections.
    """
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or int(parent) == os.getpid() or not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):  # it ended before the request was in place
        os._exit(1)


def first_to_fail() -> bool:
    """Whether no other rank has reported a failure before; reports this one.

    An exception in one rank reaches the others as closed connections a moment later. Only the first one tells what went
    wrong; the store keeps count.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return True
    try:
        return dist.distributed_c10d._get_default_store().add(FAILURE_KEY, 1) == 1
    except RuntimeError:  # the store's host is gone: it failed before us
        return False
