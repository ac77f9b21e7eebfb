"""The judgement, from made-up measurements: who is named, by how much, and who is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.doctor.cluster.findings import ClusterFinding, low_median, spans
from lightning_llm.doctor.cluster.judging import finds_slow, judge
from lightning_llm.doctor.cluster.measurements import (
    AllReduce,
    Clock,
    Compute,
    Device,
    Disk,
    Link,
    Lost,
    Measurements,
    Memory,
)
from lightning_llm.doctor.cluster.settings import ClusterSettings

SETTINGS = ClusterSettings()
RANKS_OF_HOST = 4


def healthy(world_size: int = 8, factors: dict[int, float] | None = None) -> Measurements:
    """Hosts of four ranks; a rank's factor makes its products take so many times longer."""
    ranks = range(world_size)
    hosts = {rank: f"node{rank // RANKS_OF_HOST}" for rank in ranks}
    leaders = [rank for rank in ranks if rank % RANKS_OF_HOST == 0]
    return Measurements(
        world_size,
        came=hosts,
        device=[
            Device(
                rank=rank,
                host=hosts[rank],
                local_rank=rank % RANKS_OF_HOST,
                name="GPU",
                unit=f"{hosts[rank]}/{rank}",
                free_memory=79 * 2**30,
                versions={"torch": "2.13.0", "NCCL": "2.28.9"},
            )
            for rank in ranks
        ],
        compute=[
            Compute(
                rank=rank,
                dtype="bfloat16",
                flops=1e12,
                seconds=[[(factors or {}).get(rank, 1.0) * 1.5e-3] * 9],
                digests=[17] * 9,
            )
            for rank in ranks
        ],
        memory=[Memory(rank=rank, checked=2**35, wrong=0) for rank in ranks],
        clock=[Clock(rank=rank, offset=0.002, uncertainty=0.0005) for rank in leaders[1:]],
        links=[Link(first=rank, second=rank + 1, bandwidth=2e11, intact=True) for rank in ranks[:-1]],
        all_reduce=[
            AllReduce(rank=rank, host=host, participants=RANKS_OF_HOST, bandwidth=3e11, right=True)
            for rank in ranks
            for host in ("", hosts[rank])
        ],
        disk=[Disk(rank=rank, path="/scratch", free=2**40, write=1e9, read=2e9, shared=True) for rank in leaders],
    )


def problems(measured: Measurements, **settings: Any) -> list[ClusterFinding]:
    return [one for one in judge(measured, replace(SETTINGS, **settings)) if one.status == "problem"]


def with_one(items: list[Any], index: int, **changes: Any) -> list[Any]:
    return [replace(item, **changes) if number == index else item for number, item in enumerate(items)]


def test_a_healthy_cluster_has_no_problems_and_says_what_was_measured() -> None:
    findings = judge(healthy(), SETTINGS)
    assert {one.status for one in findings} == {"ok"}
    text = "\n".join(f"{one.section} {one.name} {one.detail}" for one in findings)
    for part in ("8 of 8 came, from 2 hosts", "667 TFLOP/s", "200 GB/s", "300 GB/s bus bandwidth", "within 2.0 ms"):
        assert part in text, text


def test_a_slow_rank_is_named_with_host_and_factor() -> None:
    [found] = problems(healthy(factors={5: 2.5}))
    assert (found.name, found.host, found.ranks) == ("rank 5 on node1", "node1", (5,))
    assert found.factor == pytest.approx(2.5) and "2.50 times slower than the median" in found.detail


def test_a_host_whose_ranks_are_all_slow_is_named_once() -> None:
    [found] = problems(healthy(factors=dict.fromkeys(range(4, 8), 1.6)))
    assert (found.name, found.host, found.ranks) == ("ranks 4-7 on node1", "node1", (4, 5, 6, 7))
    assert found.factor == pytest.approx(1.6)


@given(
    world_size=st.integers(2, 12),
    slowness=st.floats(1.31, 50),
    noise=st.lists(st.floats(0.9, 1.1), min_size=12, max_size=12),
    data=st.data(),
)
def test_exactly_the_slow_half_or_less_is_named_whatever_the_machine(
    world_size: int, slowness: float, noise: list[float], data: st.DataObject
) -> None:
    """A threshold between the noise and what is slow finds all that are, as long as half are not."""
    slow = data.draw(st.sets(st.integers(0, world_size - 1), max_size=world_size // 2))
    # The fastest of the slow ones is as much slower than the slowest of the others as is said.
    factors = {rank: noise[rank] * (slowness * 1.1 / 0.9 if rank in slow else 1) for rank in range(world_size)}
    named = {rank for found in problems(healthy(world_size, factors)) for rank in found.ranks}
    assert named == slow


@given(disturbed=st.sets(st.integers(0, 8), max_size=4), by=st.floats(1, 100), all_by=st.floats(0.01, 100))
def test_what_passes_moves_nobody(disturbed: set[int], by: float, all_by: float) -> None:
    """Neither what slows one rank in less than half of the rounds, nor what slows all of them in any round."""
    measured = healthy()
    for rank, one in enumerate(measured.compute):
        seconds = [
            second * (all_by if number % 2 else 1) * (by if rank == 3 and number in disturbed else 1)
            for number, second in enumerate(one.seconds[0])
        ]
        measured.compute[rank] = replace(one, seconds=[seconds])
    assert problems(measured) == []


def test_a_rank_is_slow_only_if_it_is_each_time_that_it_was_measured() -> None:
    first, second = healthy(factors={1: 2.0, 5: 3.0}), healthy(factors={1: 2.0})
    first.compute = [one.with_another(other) for one, other in zip(first.compute, second.compute, strict=True)]
    [found] = problems(first)
    assert found.ranks == (1,) and found.factor == pytest.approx(2)


def test_devices_are_compared_with_their_like_only() -> None:
    measured = healthy(factors=dict.fromkeys(range(6, 8), 3.0))
    for rank in (6, 7):
        measured.device[rank] = replace(measured.device[rank], name="older GPU")
    [found] = problems(measured)
    assert "device is older GPU, elsewhere GPU" in found.detail and found.ranks == (6, 7)


def test_a_rate_that_all_fall_short_of_is_found_by_its_own_limit() -> None:
    found = problems(healthy(2), min_tflops=700)
    assert [one.ranks for one in found] == [(0,), (1,)] and found[0].factor == pytest.approx(700 / 666.7, rel=1e-3)
    assert problems(healthy(2), min_tflops=600) == []


def test_a_processor_that_others_use_is_told_as_the_cause() -> None:
    measured = healthy(factors={1: 3.0})
    measured.compute[1] = replace(measured.compute[1], processor_share=0.33)
    [found] = problems(measured)
    assert "it gets 33% of a processor" in found.detail


CHANGES = {
    "a product that comes out wrong": ("compute", 2, {"digests": [17] * 8 + [18]}, "1 of 9 products are wrong"),
    "memory that forgets": ("memory", 2, {"wrong": 3}, "3 words of 32.00 GiB were not as written"),
    "memory that another program has": ("device", 2, {"free_memory": 2**34}, "16.0 GiB free, the median is 79.0"),
    "another version": ("device", 2, {"versions": {"torch": "2.12.0", "NCCL": "2.28.9"}}, "torch is 2.12.0, elsewhere"),
    "no such library": ("device", 2, {"versions": {"torch": "2.13.0"}}, "NCCL is none, elsewhere 2.28.9"),
    "a link that changes what it carries": ("links", 2, {"intact": False}, "did not arrive as sent"),
    "a slow link": ("links", 1, {"bandwidth": 1e11}, "2.00 times slower than the median"),
    "a sum that comes out wrong": ("all_reduce", 2, {"right": False}, "a sum came out wrong"),
    "a clock ahead": ("clock", 0, {"offset": 0.7}, "0.700 s ahead of rank 0's"),
    "a clock behind": ("clock", 0, {"offset": -90.0}, "90.000 s behind rank 0's"),
    "a folder that is not there": ("disk", 1, {"error": "No such file or directory"}, "No such file"),
    "a folder of its own": ("disk", 1, {"shared": False}, "does not see what rank 0 writes"),
    "storage that errs": ("disk", 1, {"intact": False}, "read something else than was written"),
    "slow storage": ("disk", 1, {"write": 1e8}, "write 100 MB/s, 10.00 times slower"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_thing_wrong_is_one_finding_with_its_rank(name: str) -> None:
    check, index, changes, words = CHANGES[name]
    measured = healthy()
    items = with_one(getattr(measured, check), index, **changes)
    setattr(measured, check, items)
    [found] = problems(measured)
    assert words in found.detail and found.fix
    one = items[index]
    assert set(found.ranks) == set(one.ranks if isinstance(one, Link) else [one.rank])
    assert finds_slow(check, measured, SETTINGS) == ("slow" in name), "only what is slow is worth measuring again"


def test_a_clock_is_not_blamed_for_what_the_network_may_have_done() -> None:
    measured = healthy()
    measured.clock = [Clock(rank=4, offset=0.7, uncertainty=0.3)]
    assert problems(measured) == []


def test_a_rank_all_of_whose_links_are_slow_is_named_instead_of_them() -> None:
    measured = healthy()
    measured.links = [replace(one, bandwidth=5e10) if 2 in one.ranks else one for one in measured.links]
    [found] = problems(measured)
    assert (found.name, found.ranks) == ("rank 2 on node0", (2,)) and "all of its links within hosts" in found.detail


def test_links_between_hosts_are_compared_with_each_other() -> None:
    measured = healthy(12)
    measured.links = [replace(one, bandwidth=2e10) if one.first in (3, 7) else one for one in measured.links]
    assert problems(measured) == []
    measured.links = [replace(one, bandwidth=1e10) if one.first == 7 else one for one in measured.links]
    [found] = problems(measured)
    assert found.ranks == (7, 8) and "between hosts" in found.detail


def test_a_host_that_sums_up_slowly_is_named() -> None:
    measured = healthy(12)
    measured.all_reduce = [replace(one, bandwidth=1e11) if one.host == "node1" else one for one in measured.all_reduce]
    [found] = problems(measured)
    assert found.host == "node1" and found.factor == pytest.approx(3)


def test_two_ranks_on_one_gpu_are_a_problem() -> None:
    measured = healthy()
    measured.device[1] = replace(measured.device[1], unit=measured.device[0].unit)
    [found] = problems(measured)
    assert found.ranks == (0, 1) and "use the same GPU" in found.detail


def test_who_was_lost_is_named_and_the_rest_is_judged() -> None:
    measured = healthy(factors={6: 2.0})
    measured.lost = [Lost(rank=3, check="links", why="stopped answering")]
    lost, slow = problems(measured)
    assert lost.name == "rank 3 on node0" and lost.detail == "links: stopped answering"
    assert slow.ranks == (6,)
    nothing = Measurements(2, came={0: "a"}, lost=[Lost(rank=1, check="join", why="did not come")])
    [found] = problems(nothing)
    assert found.name == "rank 1" and found.host == ""


def test_what_is_measured_twice_counts_together() -> None:
    fast, slow = (
        Link(first=0, second=1, bandwidth=2.0, intact=True),
        Link(first=0, second=1, bandwidth=1.0, intact=False),
    )
    assert slow.with_another(fast) == fast.with_another(slow) == replace(fast, intact=False)
    [one, two] = healthy(2).compute
    assert one.with_another(two).seconds == one.seconds + two.seconds
    [disk, _] = healthy().disk
    broken = replace(disk, error="Input/output error")
    assert disk.with_another(broken) == broken.with_another(disk) == broken


def test_spans_and_medians() -> None:
    assert spans([7, 0, 1, 2, 9]) == "0-2, 7, 9"
    assert low_median([4.0, 1.0]) == 1.0 and low_median([3.0, 1.0, 2.0]) == 2.0
