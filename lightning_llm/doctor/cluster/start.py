"""Begins the check: as one rank of a launcher's, or as the launcher of ranks on this machine."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_llm._processes import die_with
from lightning_llm.doctor.cluster import worker
from lightning_llm.doctor.cluster.judging import judge
from lightning_llm.doctor.cluster.members import AGENT_STORE, Member, another_connection, connect, member_of
from lightning_llm.doctor.cluster.rank import Rank
from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.doctor.cluster.supervisor import AGAIN, FAREWELL, Supervisor, attend
from lightning_llm.doctor.report import render
from lightning_llm.errors import ConfigurationError, EndOfRunError

PARENT_VARIABLE = "LIGHTNING_LLM_DOCTOR_PID"
MINUTE = 60.0


def check_cluster(settings: ClusterSettings, as_json: bool = False) -> int:
    """Measures and judges all ranks; rank 0 prints.

    Args:
        settings: As the user gave them.
        as_json: Print JSON instead of a table.

    Returns:
        The exit code, the same on all ranks: 0 all is well, 1 there is a problem.

    Raises:
        ConfigurationError: A launcher's variables or the settings do not go together.
        EndOfRunError: Rank 0 cannot be reached or is gone.
    """
    member = member_of(os.environ, settings)
    return start_all(settings, as_json) if member is None else run(member, settings, as_json)


def longest(settings: ClusterSettings) -> float:
    """Seconds after which whatever still runs is ended."""
    return settings.join_timeout + settings.check_timeout * len(worker.CHECKS) * (1 + AGAIN) + MINUTE


def run(member: Member, settings: ClusterSettings, as_json: bool) -> int:
    """One rank; returns the exit code.

    Raises:
        ConfigurationError: Rank 0 cannot listen at its port.
        EndOfRunError: Rank 0 cannot be reached or is gone.
    """
    # The last resort, which needs no Python: the store's own answers have no time limit.
    faulthandler.dump_traceback_later(longest(settings), exit=True)
    host = socket.gethostname()
    store = connect(member, settings.join_timeout)
    rank = Rank(member.rank, member.world_size, member.local_rank, another_connection(store), settings)
    thread = worker.start(rank)
    try:
        code = (
            attend(store, member, host, settings.join_timeout)
            if member.rank
            else _supervise(store, member, host, settings, as_json)
        )
    except EndOfRunError as error:
        print(f"lightning-llm doctor: {error}", file=sys.stderr)
        code = error.EXIT_CODE
    thread.join(1.0)
    faulthandler.cancel_dump_traceback_later()
    if thread.is_alive():  # it hangs, and so would the end of a process that waits for it
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _supervise(store: dist.Store, member: Member, host: str, settings: ClusterSettings, as_json: bool) -> int:
    supervisor = Supervisor(store, member, host, settings)
    measured = supervisor.run()
    findings = judge(measured, settings)
    problem = any(finding.status == "problem" for finding in findings)
    if as_json:
        told = {"ok": not problem, "findings": [asdict(one) for one in findings], "measurements": asdict(measured)}
        print(json.dumps(told, indent=2), flush=True)
    else:
        render(findings)
        sys.stdout.flush()
    supervisor.end(int(problem))
    return int(problem)


def start_all(settings: ClusterSettings, as_json: bool) -> int:
    """Starts a process for each rank on this machine, as torchrun would; returns rank 0's exit code.

    Raises:
        ConfigurationError: More ranks than GPUs, or none where some are asked for.
    """
    n = _processes(settings)
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=settings.join_timeout)
    )
    common = {
        **os.environ,
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        AGENT_STORE: "True",
        PARENT_VARIABLE: str(os.getpid()),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n)))
    given = json.dumps({**asdict(settings), "nproc_per_node": None})
    command = [
        sys.executable,
        "-m",
        "lightning_llm.doctor.cluster",
        given,
        *(["--json"] if as_json else []),
    ]
    ranks = [subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(n)]
    try:
        return _wait(ranks, longest(settings))
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def _processes(settings: ClusterSettings) -> int:
    """How many to start."""
    devices = 0 if settings.device == "cpu" else torch.cuda.device_count()
    if settings.device == "cuda" and devices == 0:
        raise ConfigurationError("--device cuda: torch sees no GPU here; leave the option out, or give --device cpu.")
    n = settings.nproc_per_node or devices or 2
    if devices and n > devices:
        raise ConfigurationError(
            f"--nproc-per-node {n}: there are {devices} GPUs here; give at most so many, or --device cpu."
        )
    return n


def _wait(ranks: list[subprocess.Popen], limit: float) -> int:
    """Returns when rank 0 has ended, or all others have and it has not."""
    until = time.monotonic() + limit
    first, others = ranks[0], ranks[1:]
    while first.poll() is None and time.monotonic() < until:
        if others and all(process.poll() is not None for process in others):
            until = min(until, time.monotonic() + 2 * FAREWELL)
            others = []
        time.sleep(0.05)
    if first.poll() is None:
        print("lightning-llm doctor: rank 0 hangs, and was ended.", file=sys.stderr)
        return 1
    for process in ranks[1:]:
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            pass  # the caller ends it; rank 0 has told what there is to tell
    if first.returncode < 0:
        print(f"lightning-llm doctor: rank 0 was ended by signal {-first.returncode}.", file=sys.stderr)
        return 1
    return first.returncode


def started() -> int:
    """What `start_all` starts: reads the settings from the command line; returns the exit code."""
    die_with(int(os.environ[PARENT_VARIABLE]))
    settings = ClusterSettings(**json.loads(sys.argv[1]))
    member = member_of(os.environ, settings)
    assert member is not None
    try:
        return run(member, settings, "--json" in sys.argv[2:])
    except EndOfRunError as error:
        print(f"lightning-llm doctor: {error}", file=sys.stderr)
        return error.EXIT_CODE
    except KeyboardInterrupt:
        return 130
