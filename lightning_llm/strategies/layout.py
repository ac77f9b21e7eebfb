"""The settings of a layout beside its sizes: plain data that the strategy, the checks and the planner read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_llm.errors import ConfigurationError
from lightning_llm.planner.schedules import ScheduleKind, schedule_kind
from lightning_llm.strategies.context import CONTEXT_METHODS, ContextMethod
from lightning_llm.strategies.recompute import check_recompute
from lightning_llm.strategies.sharding import ZeroStage
from lightning_llm.strategies.stages import Split

Recompute = str | int | float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything about a layout but its sizes. See `LLM3DStrategy` for the arguments.

    Raises:
        ConfigurationError: A setting that does not exist, or two that exclude each other.
    """

    zero_stage: ZeroStage = 3
    pipeline_schedule: str = "1F1B"
    pipeline_stages_per_rank: int | Literal["auto"] = "auto"
    pipeline_split: Split = "balanced"
    microbatches: int | Literal["auto"] = "auto"
    sequence_parallel: bool = True
    context_parallel_method: ContextMethod = "allgather"
    recompute: Recompute = "none"
    compile: bool = False
    offload_parameters: Literal["cpu"] | None = None
    offload_optimizer: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        if self.zero_stage not in get_args(ZeroStage):
            raise ConfigurationError(f"zero_stage={self.zero_stage!r} must be 0, 1, 2 or 3.")
        if self.microbatches != "auto" and (not isinstance(self.microbatches, int) or self.microbatches < 1):
            raise ConfigurationError(
                f"microbatches={self.microbatches!r} must be a whole number of at least 1, or 'auto'."
            )
        if self.compile and self.schedule.splits_backward:
            raise ConfigurationError(
                f"pipeline_schedule={self.schedule.name!r} computes the gradients of weights apart from the others, "
                "which compiled blocks do not offer. Set compile to false, or use the schedule 'Interleaved1F1B'."
            )
        if self.recompute == "selective" and self.schedule.splits_backward:
            raise ConfigurationError(
                f"pipeline_schedule={self.schedule.name!r} goes backward twice through a block, which "
                "recompute='selective' does not allow. Set recompute to 'full' or 'none', or use the schedule "
                "'Interleaved1F1B'."
            )
        if self.recompute != "none" and self.schedule.splits_backward:
            rank_zero_warn(
                f"recompute={self.recompute!r} with pipeline_schedule={self.schedule.name!r} is slow: a block is run "
                "3 to 11 times instead of twice, since each part of its backward recomputes it. Consider "
                "recompute='none', or the schedule 'Interleaved1F1B'."
            )
        if self.context_parallel_method not in CONTEXT_METHODS:
            raise ConfigurationError(
                f"context_parallel_method={self.context_parallel_method!r} must be one of {', '.join(CONTEXT_METHODS)}."
            )
        _ = self.stages_per_rank  # refuses what the schedule does not take
        check_recompute(self.recompute, compile=self.compile)
        if self.offload_parameters not in (None, "cpu"):
            raise ConfigurationError(
                f"offload_parameters={self.offload_parameters!r} must be 'cpu' or None. NVMe needs DeepSpeed's engine."
            )
        if self.offload_optimizer is not None and self.offload_optimizer != self.offload_parameters:
            raise ConfigurationError(
                f"offload_optimizer={self.offload_optimizer!r}: FSDP keeps optimizer states where the parameters are. "
                "Set offload_parameters to 'cpu', which offloads both; states alone need DeepSpeed's engine."
            )

    @property
    def schedule(self) -> ScheduleKind:
        """The pipeline's schedule."""
        return schedule_kind(self.pipeline_schedule)

    @property
    def stages_per_rank(self) -> int:
        """Stages that each rank of a pipeline has."""
        return self.schedule.resolve_stages_per_rank(self.pipeline_stages_per_rank)

    @property
    def replicates_all(self) -> bool:
        """Whether nothing is sharded over data ranks."""
        return self.zero_stage == 0
