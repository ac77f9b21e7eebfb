"""What the planner reasons about: a `Layout` (how a run is spread out) and a `Workload` (what it trains on).

Plain numbers, no process groups; every file of this room takes these two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.engines import refusal

Recompute = str | int
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("bf16-mixed", "bf16-true", "32-true")
OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on, and in which numbers.

    Attributes:
        seq_len: Tokens per sequence.
        precision: Lightning's name. "bf16-mixed" keeps parameters, gradients and optimizer states in float32 and
            gathers bfloat16 copies to compute with (FSDP2's MixedPrecisionPolicy); "bf16-true" has all in bfloat16.
        optimizer: "adamw" (two states per parameter) or "muon" (one per matrix; AdamW for embedding, head and vectors).
        float8: Linear layers multiply in float8 (`FP8Precision`); memory is counted as in bfloat16.
    """

    seq_len: int
    precision: str = "bf16-mixed"
    optimizer: str = "adamw"
    float8: bool = False

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise ConfigurationError(f"seq_len={self.seq_len} must be at least 1.")
        for name, value, known in (
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in known:
                raise ConfigurationError(
                    f"{name}={value!r} is not known to the planner: use one of {', '.join(known)}."
                )

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation or a gathered parameter."""
        return 4 if self.precision == "32-true" else 2

    @property
    def parameter_bytes(self) -> int:
        """Bytes of a stored parameter, of its reduced gradient and of each optimizer state."""
        return 2 if self.precision == "bf16-true" else 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a run is spread over devices. Sizes are those of `LLM3DStrategy` and `LLM3DDeepSpeedStrategy`.

    Attributes:
        engine: "fsdp2" (`LLM3DStrategy`) or "deepspeed" (`LLM3DDeepSpeedStrategy`).
        zero_stage: 0 replicates everything over the data ranks, 1 shards optimizer states (and the stored parameters
            that they update), 2 gradients too, 3 frees gathered parameters after use as well.
        stages_per_rank: Virtual stages of an interleaved schedule.
        microbatch_size: Sequences of a data rank that are computed at once.
        microbatches: Times that this happens per optimizer step: pipelined, or accumulated without a pipeline.
        recompute: "none", "selective" (attention, communication and every second matrix product are kept), "full" (a
            block's input alone is kept), or n: every n-th block is recomputed fully.
        layers_per_stage: Blocks of each stage in order; None balances stages by their parameters.
        offload_optimizer: "cpu" or "nvme": where DeepSpeed keeps optimizer states, which the CPU then updates.
        offload_parameters: "cpu" or "nvme": where parameters are between uses. FSDP2 offers "cpu", and has the
            optimizer states there too.

    Raises:
        ConfigurationError: A setting that does not exist, sizes that do not divide, or what the engine does not do.
    """

    engine: str = "fsdp2"
    data_parallel_size: int = 1
    replicate_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    context_parallel_size: int = 1
    expert_parallel_size: int = 1
    zero_stage: int = 3
    sequence_parallel: bool = True
    pipeline_schedule: str = "1F1B"
    stages_per_rank: int = 1
    microbatch_size: int = 1
    microbatches: int = 1
    recompute: Recompute = "none"
    layers_per_stage: tuple[int, ...] | None = field(default=None)
    offload_optimizer: str | None = None
    offload_parameters: str | None = None

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigurationError(f"zero_stage={self.zero_stage!r} must be 0, 1, 2 or 3.")
        valid = self.recompute >= 1 if isinstance(self.recompute, int) else self.recompute in RECOMPUTE
        if not valid:
            raise ConfigurationError(
                f"recompute={self.recompute!r} must be one of {', '.join(RECOMPUTE)}, or n for every n-th block."
            )
        if self.data_parallel_size % self.replicate_size:
            raise ConfigurationError(
                f"replicate_size({self.replicate_size}) does not divide data_parallel_size({self.data_parallel_size})."
            )
        if self.foldable_size % self.expert_parallel_size:
            raise ConfigurationError(
                f"expert_parallel_size({self.expert_parallel_size}) does not divide shard({self.shard_size}) * "
                f"context({self.context_parallel_size}) * tensor({self.tensor_parallel_size}) = {self.foldable_size}."
            )
        if why := refusal(self):
            raise ConfigurationError(why)

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return (
            self.data_parallel_size
            * self.tensor_parallel_size
            * self.pipeline_parallel_size
            * self.context_parallel_size
        )

    @property
    def shard_size(self) -> int:
        """Data ranks that parameters are sharded over."""
        return self.data_parallel_size // self.replicate_size

    @property
    def sharding_size(self) -> int:
        """Ranks that share the stored parameters of a stage: data and context ranks, which see different tokens."""
        return self.shard_size * self.context_parallel_size

    @property
    def foldable_size(self) -> int:
        """Ranks that experts may be spread over (`efsdp * ep`)."""
        return self.shard_size * self.context_parallel_size * self.tensor_parallel_size

    @property
    def expert_sharding_size(self) -> int:
        """Ranks that share the stored parameters of one expert (`efsdp`)."""
        return self.foldable_size // self.expert_parallel_size

    @property
    def num_stages(self) -> int:
        """Stages in all, virtual ones included."""
        return self.pipeline_parallel_size * self.stages_per_rank

    @property
    def sequence_split(self) -> int:
        """Into how many parts activations between the blocks are cut by sequence parallelism."""
        return self.tensor_parallel_size if self.sequence_parallel else 1

    @property
    def vocabulary_split(self) -> int:
        """Into how many parts embedding and output layer are cut; DeepSpeed's engine replicates them."""
        return self.tensor_parallel_size if self.engine == "fsdp2" else 1

    @property
    def offloads(self) -> bool:
        """Whether anything is kept outside of the devices."""
        return bool(self.offload_optimizer or self.offload_parameters)

    @property
    def global_batch(self) -> int:
        """Sequences per optimizer step over all data ranks."""
        return self.data_parallel_size * self.microbatch_size * self.microbatches

    def sizes(self) -> dict[str, int]:
        """The arguments of `ParallelDims`."""
        return {
            "world_size": self.world_size,
            "data_parallel_size": self.data_parallel_size,
            "replicate_size": self.replicate_size,
            "tensor_parallel_size": self.tensor_parallel_size,
            "pipeline_parallel_size": self.pipeline_parallel_size,
            "context_parallel_size": self.context_parallel_size,
            "expert_parallel_size": self.expert_parallel_size,
        }

    def tokens(self, workload: Workload) -> int:
        """Tokens that a tensor-parallel group computes at once."""
        return self.microbatch_size * math.ceil(workload.seq_len / self.context_parallel_size)

    def describe(self) -> str:
        """The sizes in a few words: `tensor 8, pipeline 4 (1F1B, 32 microbatches of 1), data 16, recompute full`."""
        words = []
        for name, size in (
            ("tensor", self.tensor_parallel_size),
            ("context", self.context_parallel_size),
            ("expert", self.expert_parallel_size),
        ):
            if size > 1:
                words.append(f"{name} {size}")
        if self.pipeline_parallel_size > 1:
            virtual = f", {self.stages_per_rank} stages a rank" if self.stages_per_rank > 1 else ""
            words.append(f"pipeline {self.pipeline_parallel_size} ({self.pipeline_schedule}{virtual})")
        replicas = f" in {self.replicate_size} replicas" if self.replicate_size > 1 else ""
        words.append(f"data {self.data_parallel_size}{replicas}, {self.describe_zero()}")
        words.append(f"{self.microbatches} x {self.microbatch_size} sequences a data rank")
        words.append(f"recompute {self.recompute}")
        return ", ".join(words)

    def describe_zero(self) -> str:
        """ZeRO's stage and what is offloaded: `DeepSpeed ZeRO-3 with the optimizer on the CPU`."""
        places = {"cpu": "the CPU", "nvme": "NVMe"}
        optimizer, parameters = self.offload_optimizer, self.offload_parameters
        if self.engine == "fsdp2":
            optimizer = parameters  # FSDP2 keeps states where the parameters are
        words = []
        if optimizer and optimizer == parameters:
            words.append(f"parameters and optimizer on {places[optimizer]}")
        else:
            words += [f"the optimizer on {places[optimizer]}"] if optimizer else []
            words += [f"parameters on {places[parameters]}"] if parameters else []
        engine = "DeepSpeed " if self.engine == "deepspeed" else ""
        return f"{engine}ZeRO-{self.zero_stage}" + (f" with {' and '.join(words)}" if words else "")
