"""`lightning-llm launch [options] -- fit -c run.yaml`; cli.py calls `main`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from lightning_llm.arguments import parse_arguments
from lightning_llm.errors import ConfigurationError
from lightning_llm.resilience.restarts import REQUEUE, RestartPolicy

DEFAULT_PORT = 29500
SCHEDULERS = ("kubernetes", "slurm")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run what is behind `--` on all devices, again when a rank fails; also: launch slurm, launch kubernetes.

    The program stands behind `--`: a command such as `fit -c run.yaml`, a script, or `-m MODULE`. On several nodes the
    same command is given on each. `fit` goes on from its newest verified checkpoint, at the first start too.

    Args:
        nproc_per_node: Ranks on each node; auto is one per GPU, without GPUs what the run file says, or 1.
        nnodes: Nodes, or MIN:MAX: the run starts with MIN, goes on with fewer when some are lost, and takes in others.
        rdzv_endpoint: HOST:PORT on one of the nodes, where the launchers meet.
        rdzv_id: Of the run, where several share an endpoint.
        local_addr: This node's address as others can reach it; by default its host name.
        rdzv_timeout: Seconds to wait for MIN nodes, at the start and after one was lost.
        last_call: Seconds to wait for more nodes once there are MIN.
        max_restarts: Within the window; 0 never restarts.
        restart_window: Seconds.
        port: Of this node's /healthz and /metrics; by default what the Heartbeat callback says.
        log_dir: A folder for the ranks' output, by attempt and rank; by default it stays on this terminal.

    Raises:
        ConfigurationError: What cannot be.
    """

    nproc_per_node: int | Literal["auto"] = "auto"
    nnodes: str = "1"
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    local_addr: str | None = None
    rdzv_timeout: float = 600.0
    last_call: float = 10.0
    max_restarts: int = 10
    restart_window: float = 3600.0
    port: int | None = None
    log_dir: str | None = None

    def __post_init__(self) -> None:
        if self.nproc_per_node != "auto" and self.nproc_per_node < 1:
            raise ConfigurationError(f"--nproc-per-node {self.nproc_per_node} must be at least 1, or auto.")
        if self.nodes[1] > 1 and self.rdzv_endpoint is None:
            raise ConfigurationError(
                f"--nnodes {self.nnodes} needs --rdzv-endpoint HOST:PORT, the same on all nodes: one of them, and "
                "a free port there."
            )
        self.policy, self.endpoint  # noqa: B018  refuse what cannot be

    @property
    def nodes(self) -> tuple[int, int]:
        """The least and the most."""
        low, colon, high = self.nnodes.partition(":")
        if not (low.isdigit() and (high.isdigit() if colon else True)):
            raise ConfigurationError(f"--nnodes {self.nnodes} must be a number, or MIN:MAX such as 2:4.")
        nodes = int(low), int(high or low)
        if not 1 <= nodes[0] <= nodes[1]:
            raise ConfigurationError(f"--nnodes {self.nnodes} must be from 1 on, and MIN not above MAX.")
        return nodes

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port where the launchers meet."""
        if self.rdzv_endpoint is None:
            return "localhost", 0
        host, _, port = self.rdzv_endpoint.rpartition(":")
        if not host:
            return self.rdzv_endpoint, DEFAULT_PORT
        if not (port.isdigit() and 0 < int(port) < 2**16):
            raise ConfigurationError(f"--rdzv-endpoint {self.rdzv_endpoint} must be HOST:PORT.")
        return host, int(port)

    @property
    def policy(self) -> RestartPolicy:
        """Of restarts."""
        return RestartPolicy(max_restarts=self.max_restarts, window=self.restart_window)


def main(arguments: Sequence[str]) -> int:
    """Runs what the command line says; returns the exit code."""
    if arguments and arguments[0] in SCHEDULERS:
        return import_module(f"lightning_llm.launch.{arguments[0]}").main(arguments[1:])
    own, program = _divide(list(arguments))
    if not program and not {"-h", "--help"} & set(own):
        raise ConfigurationError("launch needs a program behind `--`: lightning-llm launch -- fit -c run.yaml")
    if program and program[0].endswith(".py") and not Path(program[0]).is_file():
        raise ConfigurationError(f"There is no script {program[0]}.")
    options = Options(**parse_arguments(Options, own, "launch"))
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # devices are counted without a context, before forks
    return launch(options, program)


def launch(options: Options, program: Sequence[str]) -> int:
    """Runs a program; see `Options`. Returns the exit code."""
    from lightning_llm.launch.agent import Launcher, Program
    from lightning_llm.launch.group import Address, LostError, Meeting
    from lightning_llm.launch.layouts import device_here, ranks_of_node, usable_nodes
    from lightning_llm.resilience.monitor import Monitor, Settings

    ranks = ranks_of_node(options.nproc_per_node, program)
    (low, high), (host, port) = options.nodes, options.endpoint
    address = Address(
        host=host,
        port=port,
        run_id=options.rdzv_id or "run",
        min_nodes=low,
        max_nodes=high,
        join_timeout=options.rdzv_timeout,
        last_call=options.last_call,
        local_address=options.local_addr,
    )
    usable = usable_nodes(program, ranks, options.nodes, device_here())
    plan = Program(words=program, ranks_per_node=ranks, usable_nodes=usable)
    logs = Path(options.log_dir).absolute() if options.log_dir is not None else None
    with tempfile.TemporaryDirectory(prefix="lightning-llm-", ignore_cleanup_errors=True) as folder:
        settings = Settings(
            folder=folder, reports=folder, ranks=ranks, parent=os.getppid(), on_hang="kill", port=options.port
        )
        with closing(Monitor(settings, launched=True)) as monitor:
            try:
                return Launcher(plan, Meeting(address), monitor, options.policy, logs).run()
            except LostError as error:
                print(f"launch: {error}", file=sys.stderr)
                return REQUEUE


def _divide(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]
