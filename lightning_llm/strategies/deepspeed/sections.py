"""A user's DeepSpeed configuration: how it is read, which of its sections cannot work here, which have no effect.

settings.py merges what is left with what the strategy's arguments and the Trainer say. Names are those of DeepSpeed
0.19.8, which ignores at its top level what it does not know.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_llm.errors import ConfigurationError

# What a run has from elsewhere, and from where.
LEFT_OUT = {
    "train_batch_size": "the data module's and accumulate_grad_batches",
    "tensor_parallel": "tensor_parallel_size",
    "sequence_parallel_size": "context_parallel_size",
    "pipeline": "pipeline_parallel_size, pipeline_split and recompute",
    "checkpoint": "checkpoints, which are this project's with either engine",
    "data_types.param_dtype": "Trainer(precision=...)",
}

# Sections that do something else than a run under a Trainer can, and what to do instead. A section with `enabled` is
# refused where that is true.
REFUSED = {
    "torch_autocast": 'the precision is the Trainer\'s. Set Trainer(precision="bf16-mixed")',
    "autotuning": "it starts runs of its own and ends this process. Use `lightning-llm plan`",
    "hybrid_engine": "its engine is one for generation within RLHF, which this strategy does not drive",
    "expert_parallel": "DeepSpeed would replace the model's experts. Set expert_parallel_size",
    "data_efficiency": (
        "its sampling needs DeepSpeed's own data loader, and its routing layers of its own in the model; the Trainer's "
        "loader would go on with neither"
    ),
}

# With the reasons that DeepSpeed gives, which it would give in the middle of the start.
REMOVED = frozenset(
    (
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    )
)
REMOVED_OF_ZERO = frozenset(("mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"))

KNOWN = frozenset(
    (
        *LEFT_OUT,
        *REFUSED,
        *REMOVED,
        "activation_checkpointing",
        "aio",
        "bf16",
        "comet",
        "comms_logger",
        "communication_data_type",
        "compile",
        "csv_monitor",
        "data_types",
        "dataloader_drop_last",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "gradient_predivide_factor",
        "log_level",
        "managed_gradient_accumulation",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "steps_per_print",
        "tensorboard",
        "timers",
        "train_micro_batch_size_per_gpu",
        "use_data_before_expert_parallelism",
        "vocabulary_size",
        "wall_clock_breakdown",
        "wandb",
        "weight_quantization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    )
)

CHOSEN_LATER = ("optimizer", "scheduler")  # whose "auto" optimizers.py replaces


def read_config(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """A user's configuration, without values that are "auto" and with today's names.

    Hugging Face and Accelerate fill "auto" in from their arguments; here it is as if the key were not there, so that
    the strategy's arguments, the Trainer's or DeepSpeed's default decide.

    Raises:
        ConfigurationError: There is no such file, it holds no JSON object, or a section cannot work under a Trainer.
    """
    found = _load(config)
    found = {key: value if key in CHOSEN_LATER else _decided(value) for key, value in found.items() if value != "auto"}
    if "bfloat16" in found:
        found.setdefault("bf16", found.pop("bfloat16"))
    zero = found.get("zero_optimization")
    if isinstance(zero, dict):
        for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
            if zero.pop(old, False):
                zero.setdefault(new, {"device": "cpu"})
    _check(found)
    return found


def without_effect(config: Mapping[str, Any]) -> Iterator[str]:
    """A line for each thing that a user wrote and that does nothing."""
    for key, instead in LEFT_OUT.items():
        if _value(config, key) is not None:
            yield f"{key} is left out: that comes from {instead}"
    for key in sorted(config.keys() - KNOWN):
        near = difflib.get_close_matches(key, KNOWN, n=1)
        yield f"{key} is no key of DeepSpeed's" + (f": did you mean {near[0]}?" if near else "")
    if "activation_checkpointing" in config:
        yield (
            "activation_checkpointing reaches a model that calls deepspeed.checkpointing.checkpoint(); what blocks of "
            "a plan keep is decided by recompute"
        )


def _load(config: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return copy.deepcopy(dict(config))
    path = Path(config)
    if not path.is_file():
        raise ConfigurationError(f"config={str(config)!r}: there is no such file. Give DeepSpeed's JSON, or a mapping.")
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigurationError(f"config={str(config)!r} is no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"config={str(config)!r} must hold a JSON object, not a {type(found).__name__}.")
    return found


def _decided(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _decided(inner) for key, inner in value.items() if inner != "auto"}
    return value


def _value(config: Mapping[str, Any], path: str) -> Any:
    found: Any = config
    for key in path.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _check(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization", {})
    for key in ("zero_optimization", "fp16", "bf16", "optimizer", "scheduler"):
        if not isinstance(config.get(key, {}), Mapping):
            raise ConfigurationError(f"config: {key} must be an object, not {config[key]!r}.")
    for key in (
        *sorted(REMOVED & config.keys()),
        *(f"zero_optimization.{k}" for k in sorted(REMOVED_OF_ZERO & zero.keys())),
    ):
        raise ConfigurationError(f"config: {key} has been removed from DeepSpeed. Take it out of the configuration.")
    for key, reason in REFUSED.items():
        section = config.get(key)
        if isinstance(section, Mapping) and section.get("enabled", False):
            raise ConfigurationError(f"config: {key} does not work under a Trainer: {reason}.")
    if config.get("managed_gradient_accumulation") is False:
        raise ConfigurationError(
            "config: managed_gradient_accumulation=false leaves accumulation to the code that steps, which is the "
            "Trainer's already. Take it out and set accumulate_grad_batches."
        )
    if _value(config, "compile.deepcompile"):
        raise ConfigurationError(
            "config: compile.deepcompile replaces the backward that this strategy's norms and clipping rely on. Take "
            'it out, or use strategy="llm3d" with compile=true.'
        )
    offload = zero.get("offload_optimizer") or {}
    if zero.get("zenflow") or offload.get("super_offload"):
        name = "zenflow" if zero.get("zenflow") else "offload_optimizer.super_offload"
        raise ConfigurationError(
            f"config: zero_optimization.{name} changes weights while gradients are still computed, before the Trainer "
            "clips them and tokens are weighed. Use offload_optimizer='cpu' without it."
        )
    if offload.get("ratio", 1.0) != 1.0:
        raise ConfigurationError(
            f"config: zero_optimization.offload_optimizer.ratio={offload['ratio']} splits the states over two "
            "optimizers, of which checkpoints would hold one. Set it to 1.0."
        )
    if zero.get("zero_quantized_nontrainable_weights"):
        raise ConfigurationError(
            "config: zero_optimization.zero_quantized_nontrainable_weights keeps frozen weights in 8 bits, and so "
            "would checkpoints. Take it out."
        )
