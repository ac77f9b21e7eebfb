"""How many blocks the KV cache has, and how long a sequence may be."""

from __future__ import annotations

import logging

import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.serving.engine.config import EngineConfig
from lightning_llm.serving.engine.host_memory import available_memory
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.engine.runner import Runner

log = logging.getLogger(__name__)

_SHARE_OF_GPU = 0.9
_SHARE_OF_HOST = 0.4
_LEAST_LENGTH = 16  # tokens; a cache that cannot hold a sequence of so many is of no use


def window_of(model: DecoderConfig) -> int | None:
    """Tokens that a token sees in the layer that sees most, itself included; None if one sees all before it."""
    windows = [model.layer_window(layer) for layer in range(model.num_hidden_layers)]
    known = [window for window in windows if window is not None]
    return max(known) if len(known) == len(windows) else None


def block_bytes(config: EngineConfig, model: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of a block of the KV cache, over all layers."""
    return KVCache.bytes_per_block(model, block_size=config.block_size, dtype=dtype, kv_dtype=config.kv_cache_dtype)


def cache_blocks(
    config: EngineConfig, model: DecoderConfig, dtype: torch.dtype, device: torch.device, *, sharing: int = 1
) -> int:
    """Blocks of the KV cache, the null block included.

    Args:
        config: Of the engine.
        model: Of the decoder.
        dtype: Of its weights.
        device: Where the cache is to be.
        sharing: Engines that share the device and the host, this one included: each takes its part of what is free.

    Raises:
        ConfigurationError: The memory that is free has no room for a useful number, or not for what was asked for.
    """
    size = block_bytes(config, model, dtype)
    host = available_memory() // sharing
    on_host = device.type != "cuda"
    asked = 0 if config.kv_cache_blocks == "auto" else config.kv_cache_blocks + 1
    _check_host(config, size, asked if on_host else 0, host, sharing)
    if asked:
        return asked
    free = host if on_host else torch.cuda.mem_get_info(device)[0] // sharing
    share = config.memory_utilization or (_SHARE_OF_HOST if on_host else _SHARE_OF_GPU)
    swap = config.swap_blocks * size if on_host else 0
    affordable = (int(free * share) - swap) // size - 1
    longest = -(-_length(config, model) // config.block_size)
    if affordable * config.block_size < _LEAST_LENGTH:
        raise ConfigurationError(
            f"The KV cache may take {share:g} of the {_gib(free)} of memory that is free{_of_engines(sharing)}"
            + (f", {config.swap_blocks} swap_blocks take {_gib(swap)} of that" if swap else "")
            + f", and a block of {config.block_size} tokens takes {size / 2**20:.2f} MiB: no room for a sequence. Free "
            "some memory, raise memory_utilization, or use kv_cache_dtype='int8'."
        )
    return min(affordable, config.max_num_seqs * longest) + 1


def _check_host(config: EngineConfig, size: int, blocks: int, free: int, sharing: int) -> None:
    """Refuses more blocks on the host than it has room for: pages are taken when they are first used, so that it would
    show in the middle of serving."""
    needed = (config.swap_blocks + blocks) * size
    if needed > free:
        raise ConfigurationError(
            f"{config.swap_blocks} swap_blocks"
            + (f" and {blocks - 1} kv_cache_blocks (and one that belongs to nobody)" if blocks else "")
            + f" of {size / 2**20:.2f} MiB take {_gib(needed)} of the host's memory, of which {_gib(free)} are free"
            f"{_of_engines(sharing)}: lower them."
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _of_engines(sharing: int) -> str:
    return f" for each of {sharing} engines" if sharing > 1 else ""


def longest_sequence(config: EngineConfig, model: DecoderConfig, num_blocks: int) -> int:
    """Most tokens of a sequence: as configured, or what model and cache have room for.

    Raises:
        ConfigurationError: What was asked for is more than that.
    """
    fits = (num_blocks - 1) * config.block_size
    length = _length(config, model)
    if length <= fits:
        return length
    if config.max_model_len is not None:
        raise ConfigurationError(
            f"max_model_len {length} needs {-(-length // config.block_size)} blocks of {config.block_size} tokens, the "
            f"KV cache has {num_blocks - 1}, for {fits} tokens: lower it, or give the cache more memory."
        )
    log.warning("The KV cache holds %d tokens: sequences end there, not at the model's %d.", fits, length)
    return fits


def _length(config: EngineConfig, model: DecoderConfig) -> int:
    made_for = Runner.max_length(model)
    if config.max_model_len is None:
        return made_for
    if config.max_model_len > made_for:
        raise ConfigurationError(
            f"max_model_len {config.max_model_len} is more than the {made_for} tokens that the model can be used for."
        )
    return config.max_model_len
