"""The check as a whole, on real processes: equal ranks pass, and what is wrong for real is named within its limit."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_llm.doctor.cluster.start  # noqa: F401  imported here once instead of in every rank
from lightning_llm.doctor.cluster.members import Member, connect
from tests.commands import Forked, call_forked, start_forked, wait_for
from tests.ports import free_port

COMMAND = Path(sys.executable).with_name("lightning-llm")
LITTLE = ("--memory-share", "0.01", "--json", "--device", "cpu")


def start(
    ranks: dict[int, Callable[[], object]],
    world_size: int,
    *options: object,
    slurm: bool = False,
    port: int | None = None,
) -> list[Forked]:
    """Some ranks of a group, as a launcher would start them; each calls what is given for it first."""
    address = "127.0.0.1"
    meeting = str(port or free_port())
    commands = []
    for rank, first in ranks.items():
        if slurm:
            environment = {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank % 2),
                "SLURM_STEP_NUM_TASKS": str(world_size),
                "SLURM_STEP_NODELIST": address,
                "SLURM_JOB_ID": "1",
                "MASTER_PORT": meeting,
            }
        else:
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": address,
                "MASTER_PORT": meeting,
            }
        arguments = ("doctor", "--cluster", *LITTLE, *options)
        commands.append(start_forked(*arguments, environment=environment, first=first))
    return commands


def nothing() -> None:
    """Before an ordinary rank begins."""


def all_of(world_size: int, **special: Callable[[], object]) -> dict[int, Callable[[], object]]:
    """Ranks, some of which do something first: `rank1=function`."""
    return {rank: special.get(f"rank{rank}", nothing) for rank in range(world_size)}


def told(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def problems(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [one for one in told(done)["findings"] if one["status"] == "problem"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_equal_ranks_pass_with_everything_measured(tmp_path: Path) -> None:
    first, *others = wait_for(start(all_of(3), 3), 120)
    assert [first.returncode, *(other.returncode for other in others)] == [0, 0, 0], first.stdout + first.stderr
    assert all(other.stdout == other.stderr == "" for other in others), "rank 0 tells it"
    answer = told(first)
    assert answer["ok"]
    measured = answer["measurements"]
    assert [one["rank"] for one in measured["compute"]] == [0, 1, 2]
    assert all(one["dtype"] == "float32" and len(set(one["digests"])) == 1 for one in measured["compute"])
    assert {(one["first"], one["second"]) for one in measured["links"]} == {(0, 1), (0, 2), (1, 2)}
    assert all(one["intact"] and one["bandwidth"] > 1e6 for one in measured["links"])
    assert all(one["right"] and one["participants"] == 3 for one in measured["all_reduce"])
    assert all(one["checked"] > 0 == one["wrong"] for one in measured["memory"])
    [disk] = measured["disk"]
    assert disk["write"] > 0 < disk["read"] and disk["intact"] and disk["path"] == str(tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.fixture
def burner() -> Iterator[Callable[[], None]]:
    """A busy process on one core, and what makes a rank share that core with it, as the lesser of both."""
    core = min(os.sched_getaffinity(0))
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"]
    )

    def share() -> None:
        os.sched_setaffinity(0, {core})
        os.nice(10)

    yield share
    process.kill()
    process.wait()


@pytest.mark.slow
def test_a_rank_on_a_busy_core_is_named_with_host_and_factor(burner: Callable[[], None]) -> None:
    done = wait_for(start(all_of(3, rank1=burner), 3, "--quick", "--check-timeout", 120), 280)
    assert [one.returncode for one in done] == [1, 1, 1]
    [slow] = problems(done[0])
    assert (slow["section"], slow["name"], slow["ranks"]) == ("compute", f"rank 1 on {socket.gethostname()}", [1])
    assert slow["factor"] > 1.3 and "times slower than the median" in slow["detail"]
    assert "of a processor, so others run there too" in slow["detail"]


def test_a_rank_that_does_not_come_is_named_within_the_limit() -> None:
    began = time.monotonic()
    done = wait_for(start({0: nothing, 2: nothing}, 3, "--quick", "--join-timeout", 3), 60)
    assert time.monotonic() - began < 20
    assert [one.returncode for one in done] == [1, 1]
    [missing] = problems(done[0])
    assert (missing["name"], missing["ranks"]) == ("rank 1", [1])
    host = socket.gethostname()
    assert f"did not come within 3 seconds; next to it are rank 0 on {host} and rank 2 on {host}" in missing["detail"]


def stop_in_the_middle(rank: int, number: signal.Signals) -> list[Forked]:
    """Three ranks, of which one gets a signal when products have been ordered."""
    port = free_port()
    commands = start(all_of(3), 3, port=port)
    connect(Member(3, 3, 3, "127.0.0.1", port, listens=False), timeout=60).get("order/1")
    os.kill(commands[rank].pid, number)
    return commands


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_stops_in_the_middle_is_named_and_the_rest_ends(number: signal.Signals) -> None:
    first, stopped, last = stop_in_the_middle(1, number)
    done = wait_for([first, last], 60)
    wait_for([stopped], 0)
    assert [one.returncode for one in done] == [1, 1]
    [lost] = problems(done[0])
    assert lost["ranks"] == [1] and "stopped answering for 15 seconds; it was " in lost["detail"]


@pytest.mark.slow
def test_ranks_do_not_outlive_a_rank_zero_that_stops() -> None:
    """The store is in rank 0's process, and answers nobody then."""
    stopped, *others = stop_in_the_middle(0, signal.SIGSTOP)
    done = wait_for(others, 60)
    wait_for([stopped], 0)
    for rank, one in enumerate(done, start=1):
        assert one.returncode == 1
        assert f"rank {rank} on {socket.gethostname()}: rank 0 (127.0.0.1) has not answered for 15" in one.stderr


def test_ranks_end_with_rank_zero() -> None:
    ended, *others = stop_in_the_middle(0, signal.SIGKILL)
    done = wait_for([*others, ended], 30)
    assert [one.returncode for one in done] == [1, 1, -signal.SIGKILL]
    assert "rank 0 is gone, and this ends with it" in done[0].stderr


CLONE_NEWUTS = 0x04000000
NOT_ALLOWED = 77


@pytest.mark.slow
def test_two_hosts_under_srun_without_a_common_folder(tmp_path: Path) -> None:
    """Rank 0 finds its folder; the other host has one of the same name, but another."""

    def host(name: str) -> Callable[[], None]:
        def begin() -> None:
            # a host name of its own, as the kernel gives containers
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUTS):
                os._exit(NOT_ALLOWED)
            socket.sethostname(name)
            (tmp_path / name).mkdir(exist_ok=True)
            os.chdir(tmp_path / name)

        return begin

    ranks = {rank: host(f"node{rank // 2}") for rank in range(4)}
    first, *others = wait_for(start(ranks, 4, "--quick", slurm=True), 120)
    if first.returncode == NOT_ALLOWED:
        pytest.skip("this system does not let a test change its host name")
    assert [one.returncode for one in (first, *others)] == [1] * 4, first.stderr
    [folder] = problems(first)
    assert (folder["section"], folder["host"], folder["ranks"]) == ("disk", "node1", [2])
    assert "does not see what rank 0 writes" in folder["detail"]
    measured = told(first)["measurements"]
    [clock] = measured["clock"]
    assert clock["rank"] == 2 and abs(clock["offset"]) <= clock["uncertainty"] < 1, "it is the same clock"
    assert [one["rank"] for one in measured["disk"]] == [0, 2], "one of each host"
    assert measured["links"] == measured["all_reduce"] == [], "--quick"


def test_a_folder_that_is_not_there_is_told_with_its_host() -> None:
    [done] = wait_for(start(all_of(1), 1, "--quick", "--path", "nowhere"), 60)
    [found] = problems(done)
    assert done.returncode == 1 and "No such file or directory" in found["detail"] and found["ranks"] == [0]


def test_alone_it_starts_its_own_ranks() -> None:
    done = subprocess.run(
        [COMMAND, "doctor", "--cluster", "--quick", "--nproc-per-node", "2", *LITTLE],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [one["local_rank"] for one in told(done)["measurements"]["device"]] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--path", "x"], "--quick, --path without --cluster"),
        (["--cluster", "--nproc-per-node", "0"], "--nproc-per-node 0: at least one"),
        (["--cluster", "--threshold", "1"], "--threshold 1.0: it must be above 1"),
        (["--cluster", "--master-port", "29500"], "are for ranks that a launcher starts"),
        (["--cluster", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["--cluster", "--nproc", "2"], "unrecognized arguments: --nproc"),
    ],
)
def test_wrong_arguments_end_with_2(arguments: list[str], message: str) -> None:
    done = call_forked("doctor", *arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    done = call_forked("doctor", "--cluster", "--device", "cuda")
    assert done.returncode == 2 and "torch sees no GPU here" in done.stderr


@pytest.mark.gpu
def test_gpus_multiply_in_bfloat16() -> None:
    done = subprocess.run(
        [COMMAND, "doctor", "--cluster", "--quick", "--json", "--memory-share", "0.1"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = told(done)["measurements"]
    assert {one["dtype"] for one in measured["compute"]} == {"bfloat16"}
    assert len(measured["device"]) == torch.cuda.device_count()
    assert all({"CUDA", "NCCL", "driver"} <= one["versions"].keys() for one in measured["device"])
