"""Who is slow: what ranks and hosts do, compared with the median of their like. judging.py calls it.

The median is a low one (of two the faster), since half of the ranks may be slow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from statistics import median

from lightning_llm.doctor.cluster.findings import ClusterFinding, fact, low_median, problem, spread
from lightning_llm.doctor.cluster.measurements import Compute, Disk, Link, Measurements
from lightning_llm.doctor.cluster.settings import ClusterSettings

GIB = 2**30
GB = 1e9
DISK_FACTOR = 3.0  # times the median; what many write to at once is not shared out evenly
LOOK_AT_DEVICE = "leave it out, or look for its clocks, its temperature and what else runs there"


def compute(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """Ranks and hosts that multiply slowly, and ranks that multiply wrong."""
    section = "compute"
    if not measured.compute:
        return []
    found = _slow(section, measured, compute_factors(measured), settings.threshold, _speed_of(measured))
    rates = {one.rank: one.rate / 1e12 for one in measured.compute}
    if settings.min_tflops is not None:
        found += [
            problem(section, measured, [rank], f"{rate:.3g} TFLOP/s, less than --min-tflops", LOOK_AT_DEVICE, factor)
            for rank, rate in rates.items()
            if (factor := settings.min_tflops / rate) > 1
        ]
    right, _ = Counter((one.dtype, digest) for one in measured.compute for digest in one.digests).most_common(1)[0]
    for one in measured.compute:
        wrong = sum(digest != right[1] for digest in one.digests)
        if wrong and one.dtype == right[0]:
            found.append(
                problem(
                    section,
                    measured,
                    [one.rank],
                    f"{wrong} of {len(one.digests)} products are wrong: it computes other numbers than most",
                    "take this device out of service",
                )
            )
    dtypes = "/".join(dict.fromkeys(one.dtype for one in measured.compute))
    found.append(fact(section, f"products in {dtypes}", spread(rates, "TFLOP/s")))
    return found


def compute_factors(measured: Measurements) -> dict[int, float]:
    """How many times the median's time each rank takes: the median over rounds, each compared with the same one's.

    So what disturbs all ranks for a while moves none, nor does what disturbs one for less than half of the rounds. Of
    measurements that were made again the one that is best for the rank counts.
    """
    names = {device.rank: device.name for device in measured.device}
    factors = {}
    for one in measured.compute:
        alike = [
            peer for peer in measured.compute if (names.get(peer.rank), peer.dtype) == (names.get(one.rank), one.dtype)
        ]
        factors[one.rank] = min(
            median(
                own / low_median([peer.seconds[again][number] for peer in alike]) for number, own in enumerate(rounds)
            )
            for again, rounds in enumerate(one.seconds)
        )
    return factors


def _speed_of(measured: Measurements) -> Callable[[int], str]:
    by_rank: dict[int, Compute] = {one.rank: one for one in measured.compute}

    def tell(rank: int) -> str:
        one = by_rank[rank]
        share = one.processor_share
        cause = f"; it gets {share:.0%} of a processor, so others run there too" if share and share < 0.8 else ""
        return f"{one.rate / 1e12:.3g} TFLOP/s{cause}"

    return tell


def _slow(
    section: str, measured: Measurements, factors: dict[int, float], threshold: float, tell: Callable[[int], str]
) -> list[ClusterFinding]:
    """Names slow ranks, and hosts of which all ranks are slow as one."""
    slow = {rank: factor for rank, factor in factors.items() if factor > threshold}
    found = []
    for host, ranks in measured.hosts().items():
        there = [rank for rank in ranks if rank in factors]
        if len(there) > 1 and all(rank in slow for rank in there):
            factor = median(slow.pop(rank) for rank in there)
            detail = f"all its ranks are {factor:.2f} times slower than the median; rank {there[0]}: {tell(there[0])}"
            found.append(
                problem(section, measured, there, detail, f"leave {host} out, or look for what slows it down", factor)
            )
    for rank, factor in slow.items():
        detail = f"{factor:.2f} times slower than the median: {tell(rank)}"
        found.append(problem(section, measured, [rank], detail, LOOK_AT_DEVICE, factor))
    return found


def links(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """Slow links, among those within hosts and among those between them, and such that change what they carry."""
    section = "links"
    found = [
        problem(
            section,
            measured,
            list(link.ranks),
            "data did not arrive as sent",
            "look for errors of the cards between them",
        )
        for link in measured.links
        if not link.intact
    ]
    for kind in ("within hosts", "between hosts"):
        links = [link for link in measured.links if _kind(measured, link) == kind]
        if not links:
            continue
        usual = 1 / low_median([1 / link.bandwidth for link in links])
        factors = {link.ranks: usual / link.bandwidth for link in links}
        found += _slow_links(measured, kind, factors, settings.threshold)
        speeds = {f"{a}-{b}": link.bandwidth / GB for link in links for a, b in [link.ranks]}
        found.append(fact(section, kind, spread(speeds, "GB/s", "ranks ")))
    return found


def _kind(measured: Measurements, link: Link) -> str:
    one, other = map(measured.host_of, link.ranks)
    return "within hosts" if one == other else "between hosts"


def _slow_links(
    measured: Measurements, kind: str, factors: dict[tuple[int, int], float], threshold: float
) -> list[ClusterFinding]:
    """Names the rank all of whose links of a kind are slow, and pairs otherwise."""
    slow = {pair: factor for pair, factor in factors.items() if factor > threshold}
    found = []
    for rank in sorted({rank for pair in slow for rank in pair}):
        own = [pair for pair in factors if rank in pair]
        if len(own) > 1 and all(pair in slow for pair in own):
            factor = median(slow[pair] for pair in own)
            detail = f"all of its links {kind} are slow, {factor:.2f} times slower than the median"
            fix = "leave it out, or look at its network card and what else runs there"
            found.append(problem("links", measured, [rank], detail, fix, factor))
    named = {rank for finding in found for rank in finding.ranks}
    for pair, factor in slow.items():
        if not named & set(pair):
            detail = f"the link between them ({kind}) is {factor:.2f} times slower than the median"
            found.append(problem("links", measured, list(pair), detail, "look at cables, cards and switches", factor))
    return found


def all_reduce(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """Hosts whose ranks sum up slowly among themselves, and wrong sums."""
    section = "all-reduce"
    wrong = [one.rank for one in measured.all_reduce if not one.right]
    found = [problem(section, measured, wrong, "a sum came out wrong", "take them out one by one")] if wrong else []
    # A sum ends when the slowest has it.
    of: dict[str, float] = {}
    for one in measured.all_reduce:
        of[one.host] = min(of.get(one.host, one.bandwidth), one.bandwidth)
    overall, hosts = of.pop("", None), of
    if hosts:
        usual = 1 / low_median([1 / bandwidth for bandwidth in hosts.values()])
        for host, bandwidth in hosts.items():
            if (factor := usual / bandwidth) > settings.threshold:
                detail = f"a sum over its ranks is {factor:.2f} times slower than the median: {bandwidth / GB:.3g} GB/s"
                ranks = measured.hosts()[host]
                found.append(problem(section, measured, ranks, detail, f"leave {host} out, or look at it", factor))
        speeds = {host: bandwidth / GB for host, bandwidth in hosts.items()}
        found.append(fact(section, "within hosts", spread(speeds, "GB/s", "")))
    if overall is not None:
        found.append(fact(section, "all ranks", f"{overall / GB:.3g} GB/s bus bandwidth"))
    return found


def disk(measured: Measurements, settings: ClusterSettings) -> list[ClusterFinding]:
    """Hosts whose folder is slow, broken, not there, or another than rank 0's."""
    section = "disk"
    found = []
    for one in measured.disk:
        for bad, detail, fix in (
            (bool(one.error), one.error, "mount it there, or give another --path"),
            (not one.intact, f"{one.path}: read something else than was written", "do not use this storage"),
            (
                one.shared is False,
                f"{one.path}: does not see what rank 0 writes",
                "checkpoints need one folder of all hosts: mount it there, or give it as --path",
            ),
        ):
            if bad:
                found.append(problem(section, measured, [one.rank], detail, fix))
    good = [one for one in measured.disk if not one.error]
    directions: tuple[tuple[str, Callable[[Disk], float]], ...] = (
        ("write", lambda one: one.write),
        ("read", lambda one: one.read),
    )
    for direction, speed in directions:
        if not good:
            break
        usual = 1 / low_median([1 / speed(one) for one in good])
        for one in good:
            if (factor := usual / speed(one)) > max(DISK_FACTOR, settings.threshold):
                detail = f"{direction} {speed(one) / 1e6:.0f} MB/s, {factor:.2f} times slower than the median"
                found.append(problem(section, measured, [one.rank], detail, "look at its mount and its disk", factor))
        speeds = {measured.host_of(one.rank): speed(one) / 1e6 for one in good}
        found.append(fact(section, direction, f"{spread(speeds, 'MB/s', '')} in {good[0].path}"))
    if good:
        free = {measured.host_of(one.rank): one.free / GIB for one in good}
        found.append(fact(section, "free", spread(free, "GiB", "")))
    return found
