"""What `EngineConfig` refuses."""

import pytest

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.config import EngineConfig


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "batching",
            "contiuous",
            "batching must be 'static' or 'dynamic' or 'continuous' or 'chunked', not 'contiuous'",
        ),
        ("kv", "statik", "kv must be 'paged' or 'static', not 'statik'"),
        ("scheduling_policy", "prio", "scheduling_policy must be 'fcfs' or 'priority', not 'prio'"),
        ("preemption", "never", "preemption must be 'auto' or 'swap' or 'recompute', not 'never'"),
        ("kv_cache_dtype", "fp4", "kv_cache_dtype must be 'auto' or 'int8' or 'fp8', not 'fp4'"),
        ("kv_cache_dtype", ["fp8"], "kv_cache_dtype must be"),
        ("kv_cache_blocks", "all", "kv_cache_blocks must be an integer or 'auto', not 'all'"),
        ("kv_cache_blocks", 0, "kv_cache_blocks must be a positive integer, not 0"),
        ("batch_timeout", -3, "batch_timeout must be at least 0 seconds, not -3"),
        ("priority_ageing", float("nan"), "priority_ageing must be a number, not nan"),
        ("swap_blocks", "3", "swap_blocks must be an integer, not '3'"),
        ("swap_blocks", True, "swap_blocks must be an integer, not True"),
        ("max_model_len", 2.5, "max_model_len must be an integer or None, not 2.5"),
        ("memory_utilization", "0.5", "memory_utilization must be a number or None, not '0.5'"),
        ("enable_prefix_caching", 1, "enable_prefix_caching must be True or False, not 1"),
        ("attention", None, "attention must be a text, not None"),
    ],
)
def test_values_that_cannot_be_are_refused(field, value, message):
    with pytest.raises(ConfigurationError, match=message):
        EngineConfig(**{field: value})


def test_values_that_can_be_are_taken():
    config = EngineConfig(
        batch_timeout=0, memory_utilization=1, kv_cache_blocks=3, max_model_len=None, batching="static"
    )
    assert config.kv_cache_blocks == 3
