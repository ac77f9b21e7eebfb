"""The judgement: measurements in, findings out, and nothing else. What is about speed is in judging_speed.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import median

from lightning_llm.doctor.cluster import judging_speed
from lightning_llm.doctor.cluster.findings import ClusterFinding, count, fact, problem, spread
from lightning_llm.doctor.cluster.measurements import Measurements
from lightning_llm.doctor.cluster.settings import ClusterSettings

GIB = 2**30
LESS_MEMORY = 0.8  # of the median: another program holds the rest


def judge(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """All findings: what was measured where all is well, and each problem with host, ranks and by how much."""
    return [finding for section in SECTIONS.values() for finding in section(measured, settings)]


def finds_slow(check: str, measured: Measurements, settings: ClusterSettings) -> bool:
    """Whether a check has found somebody slow, as a passing disturbance can make it find."""
    return check in SECTIONS and any(one.factor for one in SECTIONS[check](measured, settings))


def _ranks(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    found = []
    for lost in measured.lost:
        host = measured.host_of(lost.rank)
        found.append(
            ClusterFinding(
                section="ranks",
                name=f"rank {lost.rank} on {host}" if host else f"rank {lost.rank}",
                status="problem",
                detail=f"{lost.check}: {lost.why}",
                fix="see whether it was started, and reaches rank 0"
                if lost.check == "join"
                else f"leave {host} out, or look at it",
                host=host,
                ranks=(lost.rank,),
            )
        )
    came = f"{len(measured.came)} of {measured.world_size} came, from {count(len(measured.hosts()), 'host')}"
    found.append(fact("ranks", "ranks", came))
    return found


def _devices(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """What ranks have must be the same for all, and not taken already."""
    section = "devices"
    found = []
    units = Counter(device.unit for device in measured.device if not device.unit.endswith("/cpu"))
    for unit, number in units.items():
        if number > 1:
            sharers = [device for device in measured.device if device.unit == unit]
            found.append(
                problem(
                    section,
                    measured,
                    [device.rank for device in sharers],
                    f"use the same GPU, {unit.partition('/')[2]}; links were not measured",
                    "give each process a GPU of its own: LOCAL_RANK, or the launcher's binding of GPUs",
                )
            )
    facts = {device.rank: {"device": device.name, **device.versions} for device in measured.device}
    for what in dict.fromkeys(name for own in facts.values() for name in own):
        values = {rank: own.get(what, "none") for rank, own in facts.items()}
        # Of equally many rank 0's is the one that others differ from.
        usual = max(Counter(values[rank] for rank in sorted(values)).items(), key=lambda item: item[1])[0]
        for value in sorted(set(values.values()) - {usual}):
            ranks = [rank for rank in values if values[rank] == value]
            found.append(
                problem(section, measured, ranks, f"{what} is {value}, elsewhere {usual}", "make them the same")
            )
        found.append(fact(section, what, usual))
    return found + _free_memory(measured)


def _free_memory(measured: Measurements) -> list[ClusterFinding]:
    found = []
    for name in dict.fromkeys(device.name for device in measured.device):
        alike = [device for device in measured.device if device.name == name]
        usual = median(device.free_memory for device in alike)
        for device in alike:
            if device.free_memory < LESS_MEMORY * usual:
                found.append(
                    problem(
                        "devices",
                        measured,
                        [device.rank],
                        f"{device.free_memory / GIB:.1f} GiB free, the median is {usual / GIB:.1f}",
                        "something else runs there: nvidia-smi, ps",
                    )
                )
    if measured.device:
        free = {device.rank: device.free_memory / GIB for device in measured.device}
        found.append(fact("devices", "free memory", spread(free, "GiB")))
    return found


def _memory(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    if not measured.memory:
        return []
    wrong = [
        problem(
            "memory",
            measured,
            [one.rank],
            f"{one.wrong} words of {one.checked / GIB:.2f} GiB were not as written",
            "take this memory out of service",
        )
        for one in measured.memory
        if one.wrong
    ]
    checked = {one.rank: one.checked / GIB for one in measured.memory}
    return [*wrong, fact("memory", "written and read back", spread(checked, "GiB"))]


def _clock(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    found = [
        problem(
            "clocks",
            measured,
            [one.rank],
            f"the clock is {abs(one.offset):.3f} s {'ahead of' if one.offset > 0 else 'behind'} rank 0's",
            "synchronise it: chronyc tracking, timedatectl",
        )
        for one in measured.clock
        if abs(one.offset) - one.uncertainty > settings.max_clock_skew
    ]
    if measured.clock:
        worst = max(measured.clock, key=lambda one: abs(one.offset))
        detail = f"within {1000 * abs(worst.offset):.1f} ms of rank 0's, give or take {1000 * worst.uncertainty:.1f}"
        found.append(fact("clocks", "clocks", detail))
    return found


# by the checks' names
SECTIONS: dict[str, Callable[[Measurements, ClusterSettings], list[ClusterFinding]]] = {
    "ranks": _ranks,
    "device": _devices,
    "compute": judging_speed.compute,
    "memory": _memory,
    "clock": _clock,
    "links": judging_speed.links,
    "all_reduce": judging_speed.all_reduce,
    "disk": judging_speed.disk,
}
