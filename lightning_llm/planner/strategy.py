"""A layout as the strategy of a run file: its class and arguments."""

from __future__ import annotations

from typing import Any

from lightning_llm.planner.layout import Layout

CLASSES = {"fsdp2": "lightning_llm.LLM3DStrategy", "deepspeed": "lightning_llm.LLM3DDeepSpeedStrategy"}
RENAMED = {"stages_per_rank": "pipeline_stages_per_rank"}  # in the strategy's arguments
NVME_PATH = "/local_nvme"  # where the node's disks are mounted; to be changed by whoever pastes the lines
OPTIONAL = {
    "fsdp2": ("zero_stage", "sequence_parallel", "pipeline_schedule", "stages_per_rank", "recompute"),
    "deepspeed": ("recompute",),
}


def strategy_of(layout: Layout) -> dict[str, Any]:
    """`class_path` and `init_args` for `trainer.strategy`."""
    return {"class_path": CLASSES[layout.engine], "init_args": strategy_arguments(layout)}


def strategy_arguments(layout: Layout) -> dict[str, Any]:
    """The `init_args` of the engine's strategy; what is its default is left out."""
    arguments: dict[str, Any] = {
        "data_parallel_size": layout.data_parallel_size,
        "tensor_parallel_size": layout.tensor_parallel_size,
        "pipeline_parallel_size": layout.pipeline_parallel_size,
    }
    if layout.engine == "deepspeed":
        arguments["zero_stage"] = layout.zero_stage  # "auto" by default, which may decide otherwise
    defaults = Layout()
    sizes = ("context_parallel_size", "expert_parallel_size", "replicate_size")
    for name in (*sizes, *OPTIONAL[layout.engine], "offload_optimizer", "offload_parameters"):
        if getattr(layout, name) != getattr(defaults, name):
            arguments[RENAMED.get(name, name)] = getattr(layout, name)
    if "nvme" in (layout.offload_optimizer, layout.offload_parameters):
        arguments["nvme_path"] = NVME_PATH
    if layout.pipeline_parallel_size > 1:
        arguments["microbatches"] = layout.microbatches
    return arguments
