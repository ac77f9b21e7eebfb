"""What is found about ranks and hosts, and how it is said. Both files of judgement use it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from lightning_llm.doctor.cluster.measurements import Measurements
from lightning_llm.doctor.report import Finding


@dataclass(frozen=True, kw_only=True)
class ClusterFinding(Finding):
    """One thing that was found about ranks or hosts.

    Attributes:
        host: Whose it is; empty where it is no single one's.
        ranks: Whose it is.
        factor: How many times slower than the median; 0 where it is not about speed.
    """

    host: str = ""
    ranks: tuple[int, ...] = ()
    factor: float = 0.0


def low_median(values: Sequence[float]) -> float:
    """The middle value, of an even number the lower one of two."""
    return sorted(values)[(len(values) - 1) // 2]


def fact(section: str, name: str, detail: str) -> ClusterFinding:
    """What is so."""
    return ClusterFinding(section=section, name=name, status="ok", detail=detail)


def problem(
    section: str, measured: Measurements, ranks: Sequence[int], detail: str, fix: str, factor: float = 0.0
) -> ClusterFinding:
    """What is wrong with some ranks."""
    hosts = list(dict.fromkeys(measured.host_of(rank) for rank in ranks))
    return ClusterFinding(
        section=section,
        name=f"{'rank' if len(ranks) == 1 else 'ranks'} {spans(ranks)} on {', '.join(hosts)}",
        status="problem",
        detail=detail,
        fix=fix,
        host=hosts[0] if len(hosts) == 1 else "",
        ranks=tuple(ranks),
        factor=factor,
    )


def spans(ranks: Sequence[int]) -> str:
    """Ranks in short: `0-3, 7`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][1] + 1:
            parts[-1][1] = rank
        else:
            parts.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def spread(values: dict[int, float] | dict[str, float], unit: str, of: str = "rank ") -> str:
    """Median, and who has least and most."""
    ordered = sorted((value, str(name)) for name, value in values.items())
    if len(ordered) == 1:
        return f"{ordered[0][0]:.3g} {unit}"
    (least, low), (most, high) = ordered[0], ordered[-1]
    return f"median {median(values.values()):.3g} {unit}, {least:.3g} ({of}{low}) to {most:.3g} ({of}{high})"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
