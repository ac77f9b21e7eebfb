"""Starting the processes of one node, and making sure that none of them outlives the run.

llm3d.py uses `ProcessLauncher` when nobody else (torchrun, Slurm, ...) starts the processes.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_llm._processes import die_with

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
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        # A Trainer of the same script may launch again after the first one's run: its processes are there already.
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=end_with, args=(self.procs,), daemon=True, name="process-observer").start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def wait_for(self, rank: int) -> int:
        """Lets a failed process of this node finish by itself, for a few seconds; returns its exit code, or 1."""
        local = rank - self.cluster_environment.node_rank() * self.num_processes
        if not 0 < local <= len(self.procs):
            return 1
        try:
            return self.procs[local - 1].wait(timeout=FAREWELL) or 1
        except subprocess.TimeoutExpired:
            return 1


def end_with(processes: list[subprocess.Popen]) -> None:
    """Ends this process and `processes` some seconds after one of them failed, with its exit code.

    Usually they are gone by then, since they see closed connections; one that hangs in a collective does not.
    (Lightning's own observer kills at once, this process too, whose exit code then tells nothing.)
    """
    while any(process.poll() != 0 for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed:
            time.sleep(FAREWELL + 1)
            for process in processes:
                process.kill()
            os._exit(failed[0] if failed[0] > 0 else 128 - failed[0])
        time.sleep(0.5)


def die_with_launcher() -> None:
    """In a process that `ProcessLauncher` started: see `die_with`."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and int(parent) != os.getpid():
        die_with(int(parent))


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
