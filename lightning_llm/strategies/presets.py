"""The names that `Trainer(strategy=...)` takes: a registered name takes no arguments, so common sizes have one each."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric.strategies import _StrategyRegistry
    from lightning.pytorch.strategies import Strategy

PRESETS: dict[str, dict[str, Any]] = {
    "llm3d": {"tensor_parallel_size": "auto", "pipeline_parallel_size": "auto", "expert_parallel_size": "auto"},
    "llm3d_ddp": {"zero_stage": 0},
    "llm3d_zero1": {"zero_stage": 1},
    "llm3d_zero2": {"zero_stage": 2},
    "llm3d_zero3": {"zero_stage": 3},
    "llm3d_tp2": {"tensor_parallel_size": 2},
    "llm3d_tp4": {"tensor_parallel_size": 4},
    "llm3d_tp8": {"tensor_parallel_size": 8},
    "llm3d_pp2": {"pipeline_parallel_size": 2},
    "llm3d_pp4": {"pipeline_parallel_size": 4},
    "llm3d_cp2": {"context_parallel_size": 2},
    "llm3d_ep2": {"expert_parallel_size": 2},
    "llm3d_ep8": {"expert_parallel_size": 8},
    "llm3d_tp2_pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "llm3d_tp8_pp4": {"tensor_parallel_size": 8, "pipeline_parallel_size": 4},
}

DEEPSPEED_PRESETS: dict[str, dict[str, Any]] = {
    "llm3d_deepspeed": {},
    "llm3d_deepspeed_zero1": {"zero_stage": 1},
    "llm3d_deepspeed_zero2": {"zero_stage": 2},
    "llm3d_deepspeed_zero3": {"zero_stage": 3},
    "llm3d_deepspeed_zero3_offload": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    # Without an argument a preset cannot know the disk: it is the temporary folder's.
    "llm3d_deepspeed_zero3_nvme": {
        "zero_stage": 3,
        "offload_optimizer": "nvme",
        "offload_parameters": "nvme",
        "nvme_path": tempfile.gettempdir(),
    },
}


def register_presets(registry: _StrategyRegistry) -> None:
    """Adds every preset to Lightning's registry; a second import replaces them."""
    for presets, make in ((PRESETS, make_strategy), (DEEPSPEED_PRESETS, make_deepspeed_strategy)):
        for name, arguments in presets.items():
            description = ", ".join(f"{key}={value}" for key, value in arguments.items())
            registry.register(name, make, description=f"3D parallelism: {description}", override=True, **arguments)


def make_strategy(**arguments: Any) -> Strategy:
    """What the registry has in the place of a class: Lightning is still being imported when it is registered."""
    from lightning_llm.strategies.llm3d import LLM3DStrategy

    return LLM3DStrategy(**arguments)


def make_deepspeed_strategy(**arguments: Any) -> Strategy:
    """The same on DeepSpeed's engine."""
    from lightning_llm.strategies.deepspeed.strategy import LLM3DDeepSpeedStrategy

    return LLM3DDeepSpeedStrategy(**arguments)
