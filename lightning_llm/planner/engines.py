"""What the two engines do and do not do: FSDP2, on which `LLM3DStrategy` stands, and DeepSpeed's.

A `Layout` asks here whether its engine takes it; the search asks what is worth trying, in which order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_llm.planner.layout import Layout, Workload

ENGINES = ("fsdp2", "deepspeed")
TITLES = {"fsdp2": "FSDP2", "deepspeed": "DeepSpeed"}
PLACES = (None, "cpu", "nvme")

Places = tuple[str | None, str | None]
"""Where the optimizer's states are, and where the parameters are."""

# In groups: a later one is for what does not fit with those before; within a group the faster one is taken.
OFFLOADS: dict[str, tuple[tuple[Places, ...], ...]] = {
    "fsdp2": (((None, None),), ((None, "cpu"),)),
    "deepspeed": (((None, None),), (("cpu", None), ("cpu", "cpu")), (("nvme", "cpu"), ("nvme", "nvme"))),
}


def offloads(engine: str, optimizer: str | None, parameters: str | None) -> tuple[tuple[Places, ...], ...]:
    """Groups of places to try: all that the engine has, or the one that is asked for, or none if it has not."""
    if optimizer is None and parameters is None:
        return OFFLOADS[engine]
    if engine == "fsdp2":
        return (((None, "cpu"),),) if parameters == "cpu" and optimizer in (None, "cpu") else ()
    return (((optimizer or parameters, parameters),),)  # parameters alone are not worth it


def refusal(layout: Layout) -> str | None:
    """Why an engine does not take a layout, and what to change; None if it does."""
    for name in ("offload_optimizer", "offload_parameters"):
        if getattr(layout, name) not in PLACES:
            return f"{name}={getattr(layout, name)!r} must be 'cpu', 'nvme' or None."
    if layout.engine == "fsdp2":
        return _fsdp2_refusal(layout)
    if layout.engine == "deepspeed":
        return _deepspeed_refusal(layout)
    return f"engine={layout.engine!r} must be one of {', '.join(ENGINES)}."


def _fsdp2_refusal(layout: Layout) -> str | None:
    if layout.offload_parameters == "nvme":
        return "offload_parameters='nvme' needs DeepSpeed's engine; FSDP2 offloads to the CPU alone."
    if layout.offload_optimizer != layout.offload_parameters and layout.offload_optimizer is not None:
        return (
            f"offload_optimizer={layout.offload_optimizer!r}: FSDP2 keeps optimizer states where the parameters are. "
            "Set offload_parameters to 'cpu', which offloads both; states alone need DeepSpeed's engine."
        )
    return None


def _deepspeed_refusal(layout: Layout) -> str | None:
    stage, pipeline, tensor = layout.zero_stage, layout.pipeline_parallel_size, layout.tensor_parallel_size
    if pipeline > 1 and stage > 1:
        return f"zero_stage({stage}) with pipeline({pipeline}): DeepSpeed's pipeline takes ZeRO 0 and 1 alone."
    if pipeline > 1 and (layout.pipeline_schedule != "1F1B" or layout.stages_per_rank > 1):
        return (
            f"pipeline_schedule={layout.pipeline_schedule!r} with {layout.stages_per_rank} stages a rank: DeepSpeed's "
            "pipeline has the schedule 1F1B, one stage a rank."
        )
    if layout.expert_parallel_size > 1 and (stage > 2 or pipeline > 1 or tensor > 1):
        return (
            f"expert({layout.expert_parallel_size}) with ZeRO-{stage}, pipeline({pipeline}) and tensor({tensor}): "
            "DeepSpeed's engine shares out experts up to ZeRO-2, with pipeline and tensor sizes of 1."
        )
    if tensor > 1 and layout.sequence_parallel:
        return (
            f"tensor({tensor}) with sequence_parallel: on DeepSpeed's engine activations between the blocks are whole "
            "on each tensor rank. Set sequence_parallel to false."
        )
    if layout.offload_optimizer and stage == 0:
        return f"offload_optimizer={layout.offload_optimizer!r} needs ZeRO: set zero_stage to 1, 2 or 3."
    if layout.offload_parameters and stage < 3:
        return f"offload_parameters={layout.offload_parameters!r} needs zero_stage 3, not {stage}."
    if layout.offload_parameters and not layout.offload_optimizer:
        return (
            f"offload_parameters={layout.offload_parameters!r} without offload_optimizer: the optimizer's states are "
            "six times as large. Set offload_optimizer too."
        )
    if layout.replicate_size > 1:
        return (
            f"replicate_size({layout.replicate_size}): the planner has no figures for hybrid sharding on DeepSpeed's "
            "engine (hpZ). Set it to 1."
        )
    if layout.offload_optimizer == "nvme" and stage < 3:
        return f"offload_optimizer='nvme' needs zero_stage 3, not {stage}; below, DeepSpeed offloads to the CPU alone."
    return None


def workload_refusal(engine: str, workload: Workload) -> str | None:
    """Why an engine does not train a workload; None if it does."""
    if engine == "deepspeed" and workload.optimizer == "muon":
        return (
            "DeepSpeed's ZeRO flattens parameters into one vector a rank, so that optimizers must work element by "
            "element: muon does not. Use adamw, or FSDP2."
        )
    return None


def gradient_bytes(layout: Layout, workload: Workload) -> int:
    """Bytes of a gradient as it is reduced: FSDP2 reduces in the stored parameters' dtype, DeepSpeed in the
    computation's (`communication_data_type`, by default the model's)."""
    return workload.parameter_bytes if layout.engine == "fsdp2" else workload.compute_bytes
