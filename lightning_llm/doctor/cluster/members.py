"""Who this process is among the ranks, by what its launcher says, and how it reaches the others.

Known are torchrun and all that set the same variables, and Slurm's srun. Nothing that could be asked for is guessed.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.errors import ConfigurationError, EndOfRunError

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torchrun's way to say that it listens there itself
FOR_EVER = timedelta(days=2)  # waiting is bounded by the supervisor, which knows whom to blame


@dataclass(frozen=True)
class Member:
    """One process of the group.

    Attributes:
        rank: Of all.
        world_size: How many.
        local_rank: Of its host.
        address: Host of the store by which all meet.
        port: Likewise.
        listens: The store is this process's.
        attempt: Of the launcher, whose store may know the last one's keys.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    listens: bool
    attempt: str = "0"


def member_of(environment: Mapping[str, str], settings: ClusterSettings) -> Member | None:
    """Who we are; None if nobody has started us as one of several.

    Raises:
        ConfigurationError: A launcher's variables are incomplete or contradict each other or the settings.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        member = _of_torchrun(environment, settings)
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        member = _of_slurm(environment, settings)
    elif settings.master_addr is not None or settings.master_port is not None:
        raise ConfigurationError(
            "--master-addr and --master-port are for ranks that a launcher starts (torchrun, srun); none did: "
            "leave them out, or start it by one."
        )
    else:
        return None
    if settings.nproc_per_node is not None:
        raise ConfigurationError(
            f"--nproc-per-node {settings.nproc_per_node}: this is rank {member.rank} of {member.world_size} already, "
            "by what its launcher says; leave the option out."
        )
    if not 0 <= member.rank < member.world_size:
        raise ConfigurationError(f"rank {member.rank} of {member.world_size}: ranks are 0 to {member.world_size - 1}.")
    if member.local_rank < 0:
        raise ConfigurationError(f"LOCAL_RANK={member.local_rank}: it is 0 or more.")
    return member


def _of_torchrun(environment: Mapping[str, str], settings: ClusterSettings) -> Member:
    given = dict(environment)
    if settings.master_addr is not None:
        given["MASTER_ADDR"] = settings.master_addr
    if settings.master_port is not None:
        given["MASTER_PORT"] = str(settings.master_port)
    if missing := [name for name in LAUNCHED if not given.get(name)]:
        there = [name for name in LAUNCHED if name not in missing]
        raise ConfigurationError(
            f"{', '.join(missing)} not set, but {', '.join(there)}: a launcher sets all of them; to start processes on "
            "this machine alone, unset those."
        )
    rank = _number(given, "RANK")
    return Member(
        rank,
        _number(given, "WORLD_SIZE"),
        _number(given, "LOCAL_RANK"),
        given["MASTER_ADDR"],
        _number(given, "MASTER_PORT"),
        listens=rank == 0 and given.get(AGENT_STORE) != "True",
        attempt=given.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _of_slurm(environment: Mapping[str, str], settings: ClusterSettings) -> Member:
    if missing := [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if name not in environment]:
        raise ConfigurationError(f"{', '.join(missing)} not set in a step of Slurm: srun sets it.")
    address = settings.master_addr or environment.get("MASTER_ADDR")
    if address is None:
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
        if not nodes:
            raise ConfigurationError("SLURM_STEP_NODELIST is not set: say where rank 0 runs with --master-addr.")
        address = first_node(nodes)
    port = settings.master_port
    if port is None:
        port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else _port_of_step(environment)
    rank = _number(environment, "SLURM_PROCID")
    return Member(
        rank,
        _number(environment, "SLURM_STEP_NUM_TASKS"),
        _number(environment, "SLURM_LOCALID"),
        address,
        port,
        listens=rank == 0,
        attempt=environment.get("SLURM_RESTART_COUNT", "0"),
    )


def first_node(nodes: str) -> str:
    """The first host of Slurm's short form, where task 0 runs: `rack[2-3]node[07-10,20],login` -> `rack2node07`."""
    first = re.split(r",(?![^\[]*\])", nodes.strip())[0]
    return re.sub(r"\[([^-,\]]+)[^\]]*\]", r"\1", first)


def _port_of_step(environment: Mapping[str, str]) -> int:
    """One that all tasks of a step agree on, and no other step of the job takes."""
    job, step = (int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return 20_000 + (10 * job + step) % 12_000  # below what systems give out by themselves


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigurationError(f"{name}={environment[name]!r}: it must be a whole number.") from None


def connect(member: Member, timeout: float) -> dist.Store:
    """The store by which all meet.

    Raises:
        ConfigurationError: The port is taken.
        EndOfRunError: Rank 0, or whoever started it, does not answer in time.
    """
    if not member.listens:
        _wait_for(member, timeout)
    try:
        store = dist.TCPStore(
            member.address,
            member.port,
            is_master=member.listens,
            wait_for_workers=False,  # it would wait for all, and could not say who is missing
            timeout=timedelta(seconds=max(timeout, 1.0)),
        )
    except dist.DistNetworkError as error:
        if member.listens:
            raise ConfigurationError(
                f"rank 0 cannot listen at port {member.port} ({first_line(error)}): give another one (--master-port)."
            ) from None
        raise EndOfRunError(
            f"rank {member.rank}: {member.address}:{member.port} does not answer as it should: {first_line(error)}"
        ) from None
    store.set_timeout(FOR_EVER)
    return dist.PrefixStore(f"lightning_llm/doctor/{member.attempt}", store)


def another_connection(store: dist.Store) -> dist.Store:
    """To the same store, for another thread: a wait holds up whatever else is asked over one."""
    return store.clone()  # type: ignore[attr-defined]


def _wait_for(member: Member, timeout: float) -> None:
    """Returns when somebody listens: torch's own wait takes up to double its limit, and prints a stack for each try."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            socket.create_connection((member.address, member.port), timeout=max(timeout / 4, 1.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise EndOfRunError(
                    f"rank {member.rank} on {socket.gethostname()}: rank 0 did not come to "
                    f"{member.address}:{member.port} within {timeout:g} seconds ({error}). "
                    "Is it started there, and does this host reach it?"
                ) from None
        time.sleep(0.2)


def first_line(error: Exception) -> str:
    """What an error says, without the C++ stack that torch puts under it; empty where it says nothing."""
    return next(iter(str(error).splitlines()), "")
