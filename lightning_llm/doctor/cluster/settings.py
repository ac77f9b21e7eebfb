"""What `lightning-llm doctor --cluster` can be told, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_llm.errors import ConfigurationError

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    """How ranks are measured, and what is a problem.

    Attributes:
        nproc_per_node: Processes to start on this machine, when nobody else starts them; by default one for each GPU,
            2 without.
        quick: Only compute, memory, clocks and disk, and less of each: seconds, for a Slurm prolog or a health check.
        threshold: A rank that takes more than so many times the median is slow.
        min_tflops: What each rank has to reach, whatever the others do; by default ranks are only compared.
        memory_share: Part of the free memory to write and read back, as far as there is time.
        max_clock_skew: Seconds that a host's clock may differ from rank 0's.
        path: A folder of every host, to write into and read from; where checkpoints will be is a good one.
        device: auto is a GPU if there is one.
        join_timeout: Seconds until all ranks must have come.
        check_timeout: Seconds that each check may take.
        master_addr: Where rank 0 runs; by default MASTER_ADDR, under srun the first node of the step.
        master_port: Where it listens; by default MASTER_PORT, under srun one that follows from the job's number.
    """

    nproc_per_node: int | None = None
    quick: bool = False
    threshold: float = 1.3
    min_tflops: float | None = None
    memory_share: float = 0.5
    max_clock_skew: float = 0.5
    path: str = "."
    device: Literal["auto", "cpu", "cuda"] = "auto"
    join_timeout: float = 60.0
    check_timeout: float = 60.0
    master_addr: str | None = None
    master_port: int | None = None

    def __post_init__(self) -> None:
        if self.nproc_per_node is not None and self.nproc_per_node < 1:
            raise ConfigurationError(f"--nproc-per-node {self.nproc_per_node}: at least one process is needed.")
        if not self.threshold > 1:
            raise ConfigurationError(f"--threshold {self.threshold}: it must be above 1, the median itself.")
        if self.min_tflops is not None and not self.min_tflops > 0:
            raise ConfigurationError(f"--min-tflops {self.min_tflops}: it must be above 0.")
        if not 0 < self.memory_share <= 0.9:
            raise ConfigurationError(
                f"--memory-share {self.memory_share}: it must be above 0 and at most 0.9; the rest is for the machine."
            )
        if not self.max_clock_skew > 0:
            raise ConfigurationError(f"--max-clock-skew {self.max_clock_skew}: it must be above 0 seconds.")
        for name in ("join_timeout", "check_timeout"):
            if not 0 < getattr(self, name) <= 86_400:
                raise ConfigurationError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: it must be above 0 seconds and at most a day."
                )
        if self.master_port is not None and not 0 < self.master_port < 65_536:
            raise ConfigurationError(f"--master-port {self.master_port}: ports are 1 to 65535.")

    @property
    def rounds(self) -> int:
        """How often a product is timed; the median counts."""
        return 5 if self.quick else 9

    @property
    def memory_seconds(self) -> float:
        """Seconds in which as much of the memory is checked as there is time for."""
        return min(2.0 if self.quick else 15.0, self.check_timeout / 3)

    @property
    def file_size(self) -> int:
        """Bytes of the file that is written."""
        return (64 if self.quick else 256) * MIB
