"""DeepSpeed's configuration: what the strategy's arguments and the Trainer say, over what a user's JSON says.

Everything that an argument says comes before the JSON, and is told; everything else in the JSON is handed on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_llm.errors import ConfigurationError
from lightning_llm.strategies.deepspeed.sections import CHOSEN_LATER, LEFT_OUT, read_config, without_effect
from lightning_llm.strategies.mesh import Size
from lightning_llm.strategies.sharding import ZeroStage

OffloadDevice = Literal["cpu", "nvme"]

HALF_PRECISIONS = {"bf16-mixed": "bf16", "bf16-true": "bf16", "16-mixed": "fp16", "16-true": "fp16"}
DEFAULTS: dict[str, Any] = {
    "steps_per_print": None,
    "gradient_clipping": 0.0,  # DeepSpeed's own default is 1.0
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
PIPELINE = {"pipe_partitioned": False, "grad_partitioned": False}


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What the engine does beside the sizes. See `LLM3DDeepSpeedStrategy` for the arguments.

    Raises:
        ConfigurationError: A value that does not exist, or two that exclude each other.
    """

    zero_stage: ZeroStage
    offload_optimizer: OffloadDevice | None = None
    offload_parameters: OffloadDevice | None = None
    nvme_path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def resolve(
        cls,
        *,
        zero_stage: ZeroStage | Literal["auto"],
        offload_optimizer: OffloadDevice | None,
        offload_parameters: OffloadDevice | None,
        nvme_path: str | Path | None,
        config: Mapping[str, Any] | str | Path | None,
        sizes: Mapping[str, Size],
    ) -> EngineSettings:
        """The settings, where what no argument says is the configuration's, and then the layout's."""
        given = read_config(config)
        zero = given.get("zero_optimization", {})
        stage: Any = zero_stage
        if stage == "auto":
            pipelined, mixture = (sizes[f"{axis}_parallel_size"] not in (1, "auto") for axis in ("pipeline", "expert"))
            stage = zero.get("stage", 1 if pipelined else 2 if mixture else 3)
        of_optimizer, of_parameters = zero.get("offload_optimizer") or {}, zero.get("offload_param") or {}
        found = nvme_path or of_optimizer.get("nvme_path") or of_parameters.get("nvme_path")
        return cls(
            zero_stage=stage,
            offload_optimizer=offload_optimizer or _device(of_optimizer),
            offload_parameters=offload_parameters or _device(of_parameters),
            nvme_path=Path(found) if found else None,
            config=given,
        )

    def __post_init__(self) -> None:
        if self.zero_stage not in get_args(ZeroStage):
            raise ConfigurationError(f"zero_stage={self.zero_stage!r} must be 0, 1, 2, 3 or 'auto'.")
        for name in ("offload_optimizer", "offload_parameters"):
            device = getattr(self, name)
            if device not in (None, *get_args(OffloadDevice)):
                raise ConfigurationError(f"{name}={device!r} must be 'cpu', 'nvme' or None.")
        if self.offload_optimizer is not None and self.zero_stage == 0:
            raise ConfigurationError(
                f"offload_optimizer={self.offload_optimizer!r} needs zero_stage 1, 2 or 3: stage 0 leaves the "
                "optimizer where the parameters are."
            )
        if self.offload_optimizer == "nvme" and self.zero_stage != 3:
            raise ConfigurationError(
                f"offload_optimizer='nvme' needs zero_stage=3, not {self.zero_stage}: DeepSpeed's stages 1 and 2 "
                "offload to the CPU alone."
            )
        if self.offload_parameters is not None and self.zero_stage != 3:
            raise ConfigurationError(
                f"offload_parameters={self.offload_parameters!r} needs zero_stage=3, not {self.zero_stage}: only there "
                "are parameters shared out."
            )
        if self.offload_parameters is not None and self.offload_optimizer is None:
            raise ConfigurationError(
                f"offload_parameters={self.offload_parameters!r} without offload_optimizer: the optimizer's states are "
                "six times as large as 16-bit parameters. Set offload_optimizer too."
            )
        zero = self.config.get("zero_optimization", {})
        zero_plus_plus = {
            "zero_hpz_partition_size": 1,
            "zero_quantized_weights": False,
            "zero_quantized_gradients": False,
        }
        for name, off in zero_plus_plus.items():
            if self.zero_stage != 3 and zero.get(name, off) != off:
                raise ConfigurationError(
                    f"config: zero_optimization.{name} (ZeRO++) needs zero_stage=3, not {self.zero_stage}."
                )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and self.nvme_path is None:
            raise ConfigurationError("Offloading to 'nvme' needs nvme_path: a folder on the disk that is to be used.")


def check_engine(sizes: Mapping[str, Size], settings: EngineSettings) -> None:
    """Refuses layouts that DeepSpeed's engine does not run. A size of "auto" is looked at once it is decided.

    Raises:
        ConfigurationError: with DeepSpeed's reason, and what runs it.
    """
    size = {name: 1 if value == "auto" else value for name, value in sizes.items()}
    stage = settings.zero_stage
    pipeline, experts = size["pipeline_parallel_size"], size["expert_parallel_size"]
    if pipeline > 1 and stage > 1:
        raise ConfigurationError(
            f"pipeline_parallel_size={pipeline} with zero_stage={stage}: DeepSpeed's pipeline needs each gradient "
            "whole until the last microbatch, so ZeRO-2 and ZeRO-3 are incompatible with it. Set zero_stage to 1 or 0, "
            'or use strategy="llm3d", whose pipeline runs with every stage.'
        )
    profiled = settings.config.get("flops_profiler", {}).get("enabled", False)
    if pipeline > 1 and (profiled or settings.config.get("wall_clock_breakdown", False)):
        raise ConfigurationError(
            f"config: {'flops_profiler' if profiled else 'wall_clock_breakdown'} with pipeline_parallel_size="
            f"{pipeline}: DeepSpeed's pipeline starts timers that its engine has started, and fails. Take it out, or "
            "measure with pipeline_parallel_size=1."
        )
    if experts > 1 and stage == 3:
        raise ConfigurationError(
            f"expert_parallel_size={experts} with zero_stage=3: DeepSpeed shards expert groups by ZeRO 1 and 2 alone. "
            'Set zero_stage to 2, or use strategy="llm3d".'
        )
    if experts > 1 and pipeline * size["tensor_parallel_size"] > 1:
        raise ConfigurationError(
            f"expert_parallel_size={experts} with pipeline_parallel_size={pipeline} and tensor_parallel_size="
            f"{size['tensor_parallel_size']}: on DeepSpeed's engine experts are spread over data ranks alone. Set the "
            'other two to 1, or use strategy="llm3d", where they go together.'
        )
    if size["replicate_size"] > 1 and stage != 3:
        raise ConfigurationError(
            f"replicate_size={size['replicate_size']} needs zero_stage=3, not {stage}: it keeps a second copy of the "
            "parameters' shards within each replica (DeepSpeed's hpZ), which other stages do not share out."
        )


def engine_config(
    settings: EngineSettings,
    *,
    precision: str,
    batch_size: int,
    secondary_shards: int,
    clips: bool,
    trains: bool,
) -> tuple[dict[str, Any], list[str]]:
    """What `deepspeed.initialize` gets.

    Args:
        settings: The strategy's.
        precision: Lightning's name.
        batch_size: Sequences of a data rank's batch; DeepSpeed counts samples with it.
        secondary_shards: Ranks of a replica, with hybrid sharding; else 1.
        clips: Whether the Trainer clips gradients, and the engine must not.
        trains: Whether there is an optimizer.

    Returns:
        The configuration, and what of the user's was overridden or does nothing, one line each.
    """
    zero: dict[str, Any] = {"stage": settings.zero_stage if trains or settings.zero_stage == 3 else 0}
    for key, device in (
        ("offload_optimizer", settings.offload_optimizer),
        ("offload_param", settings.offload_parameters),
    ):
        if device is not None:
            zero[key] = {"device": device}
            if device == "nvme":
                zero[key]["nvme_path"] = str(settings.nvme_path)
    if secondary_shards > 1:
        zero["zero_hpz_partition_size"] = secondary_shards
    half = HALF_PRECISIONS.get(precision)
    decided: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": 1,  # the Trainer accumulates
        "zero_optimization": zero,
        "bf16": {"enabled": half == "bf16"},
        "fp16": {"enabled": half == "fp16"},
    }
    if clips:
        decided["gradient_clipping"] = 0.0  # the Trainer says by how much, in each step
    merged, changes = merge(merge(DEFAULTS, settings.config)[0], decided)
    for key in (*LEFT_OUT, *CHOSEN_LATER):
        section, _, name = key.rpartition(".")
        (merged.get(section, {}) if section else merged).pop(name, None)
    merged["pipeline"] = PIPELINE
    return merged, [*without_effect(settings.config), *changes]


def check_by_deepspeed(config: dict[str, Any], mpu: Any) -> None:
    """Has DeepSpeed read a configuration, before anything is built with it.

    Raises:
        ConfigurationError: with its reason, where it refuses a key or a value.
    """
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    try:
        DeepSpeedConfig(copy.deepcopy(config), mpu=mpu)
    except (DeepSpeedConfigError, ValueError, AssertionError) as error:
        raise ConfigurationError(f"DeepSpeed does not take its configuration: {error}") from None


def configure_checkpointing(section: Mapping[str, Any], mpu: Any) -> None:
    """Tells `deepspeed.checkpointing.checkpoint()`, which a user's model may call, of `activation_checkpointing`."""
    import deepspeed

    deepspeed.checkpointing.configure(
        mpu_=mpu,
        partition_activations=section.get("partition_activations"),
        contiguous_checkpointing=section.get("contiguous_memory_optimization"),
        num_checkpoints=section.get("number_checkpoints"),
        checkpoint_in_cpu=section.get("cpu_checkpointing"),
        synchronize=section.get("synchronize_checkpoint_boundary"),
        profile=section.get("profile"),
    )


def merge(base: Mapping[str, Any], over: Mapping[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """`base` with `over` laid on it, and a line for each value that was another one."""
    merged, changes = copy.deepcopy(dict(base)), []
    for key, value in over.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            merged[key], within = merge(before, value, f"{prefix}{key}.")
            changes += within
        else:
            if before is not None and before != value:
                changes.append(f"{prefix}{key}={before!r} becomes {value!r}")
            merged[key] = copy.deepcopy(value)
    return merged, changes


def _device(offload: Mapping[str, Any]) -> Any:
    device = offload.get("device")
    return None if device == "none" else device
