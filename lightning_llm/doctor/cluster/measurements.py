"""What was measured, as plain numbers: worker.py makes it, it travels as JSON, judging.py reads it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import median


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a rank computes, before anything was measured.

    Attributes:
        rank: Of all.
        host: Name.
        local_rank: Of this host.
        name: The processor's or the GPU's.
        unit: The same for ranks that compute on the same one.
        free_memory: Bytes.
        versions: Of software.
    """

    rank: int
    host: str
    local_rank: int
    name: str
    unit: str
    free_memory: int
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A matrix product, the same on all ranks.

    Attributes:
        rank: Of all.
        dtype: Of the matrices.
        flops: Of one product.
        seconds: Of one product, by measurement and round.
        digests: Of the result, by round. The matrices hold small integers, so that every right result is the same.
        processor_share: Processor time over wall time, where the product is computed by one thread of a CPU.
    """

    rank: int
    dtype: str
    flops: float
    seconds: list[list[float]]
    digests: list[int]
    processor_share: float | None = None

    @property
    def rate(self) -> float:
        """Floating point operations per second: the median over rounds, the best of what was measured again."""
        return self.flops / min(median(rounds) for rounds in self.seconds)

    def with_another(self, other: Compute) -> Compute:
        """Both."""
        return replace(other, seconds=self.seconds + other.seconds, digests=self.digests + other.digests)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory that was written and read back: bytes that were checked, words that were not as written."""

    rank: int
    checked: int
    wrong: int


@dataclass(frozen=True, kw_only=True)
class Clock:
    """A host's clock minus rank 0's, in seconds, and by how much that may be wrong: half of the round trip."""

    rank: int
    offset: float
    uncertainty: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """What two ranks send each other, in bytes per second, best of some times; whether it came as it was sent."""

    first: int
    second: int
    bandwidth: float
    intact: bool

    @property
    def ranks(self) -> tuple[int, int]:
        """Both."""
        return self.first, self.second

    def with_another(self, other: Link) -> Link:
        """The better of both: others use a network too, now and then."""
        return replace(self, bandwidth=max(self.bandwidth, other.bandwidth), intact=self.intact and other.intact)


@dataclass(frozen=True, kw_only=True)
class AllReduce:
    """Sums over all ranks, or over those of one host.

    Attributes:
        rank: Who measured it.
        host: Whose ranks took part; empty for all ranks.
        participants: How many.
        bandwidth: Bus bandwidth in bytes per second, as nccl-tests defines it: size over time, times 2 (n - 1) / n.
        right: Whether the sum was.
    """

    rank: int
    host: str
    participants: int
    bandwidth: float
    right: bool

    def with_another(self, other: AllReduce) -> AllReduce:
        """The better of both."""
        return replace(self, bandwidth=max(self.bandwidth, other.bandwidth), right=self.right and other.right)


@dataclass(frozen=True, kw_only=True)
class Disk:
    """A file in a folder, written, synchronised and read back, by one rank of a host.

    Attributes:
        rank: Which.
        path: The folder.
        free: Bytes.
        write: Bytes per second until they are on the disk.
        read: Bytes per second, past the cache where the system can be told so.
        intact: Whether it read what it had written.
        shared: Whether it sees a file that rank 0 wrote; None if rank 0 could not write.
        error: What the system said, if it could not.
    """

    rank: int
    path: str
    free: int = 0
    write: float = 0.0
    read: float = 0.0
    intact: bool = True
    shared: bool | None = None
    error: str = ""

    def with_another(self, other: Disk) -> Disk:
        """The better of both, as far as both went well."""
        if self.error or other.error:
            return self if self.error else other
        return replace(
            other,
            write=max(self.write, other.write),
            read=max(self.read, other.read),
            intact=self.intact and other.intact,
        )


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A rank that did not come, hung, ended or failed.

    Attributes:
        rank: Which.
        check: In which.
        why: What is known of it.
    """

    rank: int
    check: str
    why: str


@dataclass
class Measurements:
    """All of them, each list filled by the check of its name.

    Attributes:
        world_size: How many ranks there should be.
        came: Hosts of those that came, by rank.
        lost: Those that something went wrong with.
    """

    world_size: int
    came: dict[int, str] = field(default_factory=dict)
    device: list[Device] = field(default_factory=list)
    compute: list[Compute] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    clock: list[Clock] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    all_reduce: list[AllReduce] = field(default_factory=list)
    disk: list[Disk] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)

    def host_of(self, rank: int) -> str:
        """Name, empty of a rank that did not come."""
        return self.came.get(rank, "")

    def hosts(self) -> dict[str, list[int]]:
        """Ranks by host, in the ranks' order."""
        ranks: dict[str, list[int]] = {}
        for rank in sorted(self.came):
            ranks.setdefault(self.came[rank], []).append(rank)
        return ranks
