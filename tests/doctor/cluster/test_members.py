"""Who a process is, by what torchrun or srun set; what is missing or contradicts itself is told."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from lightning_llm.doctor.cluster.members import Member, connect, first_node, member_of
from lightning_llm.doctor.cluster.settings import ClusterSettings
from lightning_llm.errors import ConfigurationError, EndOfRunError
from tests.ports import free_port

SETTINGS = ClusterSettings()
LAUNCHED = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[03-04,7]",
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
}


def test_nobody_started_us() -> None:
    assert member_of({}, SETTINGS) is None
    # what a batch script and `srun --pty bash` see: a job, but no tasks beside
    assert member_of({"SLURM_PROCID": "0", "SLURM_JOB_ID": "1"}, SETTINGS) is None
    assert member_of({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, SETTINGS) is None


def test_torchrun_and_others_like_it() -> None:
    assert member_of(LAUNCHED, SETTINGS) == Member(3, 8, 1, "head", 29500, listens=False)
    first = {**LAUNCHED, "RANK": "0", "LOCAL_RANK": "0"}
    assert member_of(first, SETTINGS) == Member(0, 8, 0, "head", 29500, listens=True)
    agents = {**first, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert member_of(agents, SETTINGS) == Member(0, 8, 0, "head", 29500, listens=False, attempt="2")
    elsewhere = replace(SETTINGS, master_addr="other", master_port=1234)
    assert member_of(LAUNCHED, elsewhere) == Member(3, 8, 1, "other", 1234, listens=False)


def test_srun() -> None:
    ours = member_of(STEP, SETTINGS)
    assert ours is not None
    assert (ours.rank, ours.world_size, ours.local_rank, ours.address) == (5, 8, 1, "node03")
    others = [member_of({**STEP, "SLURM_PROCID": str(rank)}, SETTINGS) for rank in range(8)]
    assert {other.port for other in others if other} == {ours.port}, "all tasks of a step agree"
    next_step = member_of({**STEP, "SLURM_STEP_ID": "3"}, SETTINGS)
    assert next_step is not None and next_step.port != ours.port
    given = member_of(STEP, replace(SETTINGS, master_addr="10.0.0.1", master_port=4000))
    assert given is not None and (given.address, given.port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("head", "head"),
        ("a,b", "a"),
        ("node[3-10]", "node3"),
        ("node[007,20-30],login", "node007"),
        ("rack[2-3]node[07-10,20],x", "rack2node07"),
        ("gpu-[1,3]-ib", "gpu-1-ib"),
    ],
)
def test_the_first_node_of_slurms_short_form(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


WITHOUT_NODES = {name: value for name, value in STEP.items() if name != "SLURM_STEP_NODELIST"}


@pytest.mark.parametrize(
    ("environment", "settings", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, {}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set, but RANK, WORLD_SIZE"),
        ({**LAUNCHED, "RANK": "x"}, {}, "RANK='x'"),
        ({**LAUNCHED, "RANK": "8"}, {}, "rank 8 of 8: ranks are 0 to 7"),
        ({**LAUNCHED, "LOCAL_RANK": "-1"}, {}, "LOCAL_RANK=-1"),
        (LAUNCHED, {"nproc_per_node": 2}, "--nproc-per-node 2: this is rank 3 of 8 already"),
        ({}, {"master_addr": "head"}, "--master-addr and --master-port are for ranks that a launcher starts"),
        (WITHOUT_NODES, {}, "--master-addr"),
        ({**STEP, "MASTER_PORT": "no"}, {}, "MASTER_PORT='no'"),
    ],
)
def test_what_does_not_go_together_is_told(environment: dict, settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        member_of(environment, replace(SETTINGS, **settings))
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc_per_node": 0}, "--nproc-per-node 0"),
        ({"threshold": 1.0}, "--threshold 1.0"),
        ({"threshold": float("nan")}, "--threshold nan"),
        ({"min_tflops": 0.0}, "--min-tflops 0.0"),
        ({"memory_share": 1.0}, "--memory-share 1.0"),
        ({"max_clock_skew": 0.0}, "--max-clock-skew 0.0"),
        ({"join_timeout": 0.0}, "--join-timeout 0.0"),
        ({"check_timeout": float("inf")}, "--check-timeout inf"),
        ({"master_port": 70_000}, "--master-port 70000"),
    ],
)
def test_settings_out_of_range_are_refused_by_the_options_name(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ClusterSettings(**settings)


def test_rank_zero_that_does_not_come_is_told_within_the_limit() -> None:
    began = time.monotonic()
    with pytest.raises(EndOfRunError) as raised:
        connect(Member(1, 2, 1, "127.0.0.1", free_port(), listens=False), timeout=1.0)
    assert time.monotonic() - began < 5
    assert "rank 0 did not come to 127.0.0.1:" in str(raised.value) and "within 1 seconds" in str(raised.value)


def test_a_port_that_is_taken_is_told() -> None:
    member = Member(0, 2, 0, "127.0.0.1", free_port(), listens=True)
    first = connect(member, timeout=5.0)
    first.set("key", "value")
    with pytest.raises(ConfigurationError, match=f"port {member.port}.*--master-port"):
        connect(member, timeout=5.0)
    assert connect(replace(member, rank=1, listens=False), timeout=5.0).get("key") == b"value"
