"""`EngineConfig`: how large the engine is and how it shares itself out. Names are vLLM's where vLLM has one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lightning_llm.errors import ConfigurationError

Batching = Literal["static", "dynamic", "continuous", "chunked"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes and policies of an engine.

    Raises:
        ConfigurationError: Sizes that cannot work together; the message gives the arithmetic.
    """

    max_model_len: int | None = None
    """Most tokens of a prompt and its answer; None: what the model was made for, or as many as the cache holds."""
    max_num_seqs: int = 128
    """Most sequences in a step."""
    max_num_batched_tokens: int = 2048
    """Most tokens in a step."""
    block_size: int = 16
    """Tokens of a block of the KV cache."""
    kv_cache_blocks: int | Literal["auto"] = "auto"
    """Blocks of the KV cache; "auto": what `memory_utilization` allows."""
    memory_utilization: float | None = None
    """Share of the memory that is free which the KV cache may take; None: 0.9 on a GPU, 0.4 on a CPU."""
    kv_cache_dtype: Literal["auto", "int8", "fp8"] = "auto"
    """Element type of the KV cache; "auto": the model's."""
    swap_blocks: int = 0
    """Blocks in host memory for sequences that must wait for others."""
    enable_prefix_caching: bool = True
    """Keys and values of equal beginnings are computed once."""
    batching: Batching = "chunked"
    """"static": a batch of what is waiting runs to its end before the next; "dynamic": the same, but it waits
    `batch_timeout` for more to come; "continuous": sequences join and leave at every step; "chunked": long prompts too
    are spread over steps, so that they do not hold up the others."""
    batch_timeout: float = 0.05
    """Seconds that a dynamic batch waits to be filled."""
    kv: Literal["paged", "static"] = "paged"
    """"paged": blocks as they are needed; "static": blocks for `max_model_len` tokens set aside for every sequence."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """"priority": a request's `priority` counts; lower comes first."""
    priority_ageing: float = 10.0
    """Seconds of waiting that are worth one unit of priority, so that nobody waits for ever."""
    preemption: Literal["auto", "swap", "recompute"] = "auto"
    """What becomes of the blocks of a sequence that must make room; "auto": whatever takes less time."""
    attention: str = "auto"
    """The attention kernel, see `lightning_llm.serving.kernels.select`."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            if not _fits(getattr(self, name), hint):
                raise ConfigurationError(f"{name} must be {_in_words(hint)}, not {getattr(self, name)!r}.")
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
            _positive(name, getattr(self, name))
        if self.max_model_len is not None:
            _positive("max_model_len", self.max_model_len)
        if isinstance(self.kv_cache_blocks, int):
            _positive("kv_cache_blocks", self.kv_cache_blocks)
        if self.swap_blocks < 0:
            raise ConfigurationError(f"swap_blocks must be at least 0, not {self.swap_blocks}.")
        if self.memory_utilization is not None and not 0 < self.memory_utilization <= 1:
            raise ConfigurationError(
                f"memory_utilization is a share above 0 and at most 1, not {self.memory_utilization}."
            )
        if self.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigurationError(
                f"max_num_seqs {self.max_num_seqs} > max_num_batched_tokens {self.max_num_batched_tokens}: every "
                "sequence needs a token of each step. Raise the second or lower the first."
            )
        if self.batch_timeout < 0:
            raise ConfigurationError(f"batch_timeout must be at least 0 seconds, not {self.batch_timeout}.")
        if self.priority_ageing <= 0:
            raise ConfigurationError(f"priority_ageing must be above 0 seconds, not {self.priority_ageing}.")
        if self.preemption == "swap" and not self.swap_blocks:
            raise ConfigurationError("preemption='swap' needs swap_blocks above 0: host memory to swap to.")

    @property
    def caches_prefixes(self) -> bool:
        """Whether blocks are looked for before they are computed."""
        return self.enable_prefix_caching and self.kv == "paged"


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ConfigurationError(f"{name} must be a positive integer, not {value!r}.")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; an integer is a number too, but True is no integer."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_args(hint):
        return any(_fits(value, one) for one in get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _in_words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_args(hint):
        return " or ".join(_in_words(one) for one in get_args(hint))
    return {int: "an integer", float: "a number", bool: "True or False", str: "a text"}.get(hint, "None")
