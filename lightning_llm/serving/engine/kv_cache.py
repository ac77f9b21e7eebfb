"""`KVCache`: the memory that keys and values live in, cut into blocks, and the copies between blocks.

Which block belongs to whom is the block pool's business. A block spans all layers, so that moving one to the host and
back is a single contiguous copy.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.serving.kernels.batch import PagedBatch
from lightning_llm.serving.kernels.paged import LayerCache
from lightning_llm.serving.kernels.quantized import quantize

KV_DTYPES: dict[str, torch.dtype | None] = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What keys and values may be kept as; "auto" is the model's own type."""

_SCALE_DTYPE = torch.float32
_CPU = torch.device("cpu")


class KVCache:
    """Blocks of keys and values on the device, and a pool of the same blocks on the host.

    Args:
        config: The decoder's.
        num_blocks: Blocks on the device, the null block 0 among them.
        block_size: Tokens per block.
        dtype: The type of the keys and values that come in.
        device: Where the blocks are.
        kv_dtype: What they are kept as: "auto" (`dtype`), or "int8" or "fp8" with a float32 scale per token and head.
        host_blocks: Blocks on the host, for sequences that had to make room.

    Attributes:
        data: [num_blocks, layers, 2, block_size, kv_heads, head_dim], keys and values.
        scales: The same without head_dim; None if nothing is quantised.

    Raises:
        ConfigurationError: A size or type that cannot be.
    """

    def __init__(
        self,
        config: DecoderConfig,
        num_blocks: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kv_dtype: str = "auto",
        host_blocks: int = 0,
    ) -> None:
        if num_blocks < 2:
            raise ConfigurationError(
                f"A KV cache of {num_blocks} blocks holds no token: block 0 belongs to nobody, so give it at least 2."
            )
        if block_size < 1 or host_blocks < 0:
            raise ConfigurationError(
                f"block_size must be at least 1 and host_blocks at least 0, not {block_size} and {host_blocks}."
            )
        self.config = config
        self.num_blocks = num_blocks
        self.host_blocks = host_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.device = torch.device(device)
        shape = _block_shape(config, block_size)
        stored = _stored_dtype(dtype, kv_dtype)
        pinned = self.device.type == "cuda" and host_blocks > 0
        # Ordinary tensors, whoever builds the cache: those of inference mode could not be written outside it. Zeros,
        # because an uninitialised NaN in a slot that is masked out would still spoil the sum that it is weighted 0 in.
        with torch.inference_mode(False):
            self.data = _zeros((num_blocks, *shape), stored, self.device)
            self._host = _zeros((host_blocks, *shape), stored, pinned=pinned)
            self.scales: Tensor | None = None
            self._host_scales: Tensor | None = None
            if stored != dtype:
                self.scales = _zeros((num_blocks, *shape[:-1]), _SCALE_DTYPE, self.device)
                self._host_scales = _zeros((host_blocks, *shape[:-1]), _SCALE_DTYPE, pinned=pinned)
        self._layers = [self._views(layer) for layer in range(config.num_hidden_layers)]

    @staticmethod
    def bytes_per_block(
        config: DecoderConfig, *, block_size: int = 16, dtype: torch.dtype = torch.float32, kv_dtype: str = "auto"
    ) -> int:
        """Bytes of one block over all layers, scales included: what a memory budget is divided by."""
        layers, two, block_size, heads, head_dim = _block_shape(config, block_size)
        stored = _stored_dtype(dtype, kv_dtype)
        scale = _SCALE_DTYPE.itemsize if stored != dtype else 0
        return layers * two * block_size * heads * (head_dim * stored.itemsize + scale)

    def layer(self, layer: int) -> LayerCache:
        """The blocks of one layer, as kernels read them."""
        return self._layers[layer]

    def write(self, layer: int, k: Tensor, v: Tensor, batch: PagedBatch) -> None:
        """Puts k and v, [tokens, kv_heads, head_dim], into the slots of the batch, quantised if need be."""
        blocks, offsets = batch.once("written", lambda: (batch.slots // self.block_size, batch.slots % self.block_size))
        views = self._layers[layer]
        for new, kept, scales in ((k, views.k, views.k_scale), (v, views.v, views.v_scale)):
            if scales is None:
                kept[blocks, offsets] = new.to(kept.dtype)
            else:
                values, scale = quantize(new, kept.dtype)
                # As bytes, so that no device needs an indexing kernel for 8-bit floats.
                kept.view(torch.uint8)[blocks, offsets] = values.view(torch.uint8)
                scales[blocks, offsets] = scale

    def copy(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copies blocks, (source, target), one after another: a block that is shared is copied before it is written."""
        _copy(self.data, self.data, self.scales, self.scales, pairs)

    def swap_out(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copies blocks to the host: (device block, host block)."""
        _copy(self.data, self._host, self.scales, self._host_scales, pairs)

    def swap_in(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copies blocks back: (host block, device block). They come back bit for bit."""
        _copy(self._host, self.data, self._host_scales, self.scales, pairs)

    def _views(self, layer: int) -> LayerCache:
        k, v = self.data[:, layer].unbind(1)
        if self.scales is None:
            return LayerCache(k, v, None, None)
        return LayerCache(k, v, *self.scales[:, layer].unbind(1))


def _block_shape(config: DecoderConfig, block_size: int) -> tuple[int, int, int, int, int]:
    return config.num_hidden_layers, 2, block_size, config.num_key_value_heads, config.head_dim


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device = _CPU, *, pinned: bool = False) -> Tensor:
    """Zeros. On a CPU they are pages of the system's that are taken when they are first written: a cache costs what is
    used of it, where `torch.zeros` would write all of it at once."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or pinned or not size:
        return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(*shape)


def _stored_dtype(dtype: torch.dtype, kv_dtype: str) -> torch.dtype:
    if kv_dtype not in KV_DTYPES:
        raise ConfigurationError(f"kv_dtype {kv_dtype!r} is not known: use one of {', '.join(KV_DTYPES)}.")
    return KV_DTYPES[kv_dtype] or dtype


def _copy(
    source: Tensor,
    target: Tensor,
    source_scales: Tensor | None,
    target_scales: Tensor | None,
    pairs: Iterable[tuple[int, int]],
) -> None:
    # Nothing waits for these: whoever reads the blocks next does so on the same stream.
    for old, new in pairs:
        target[new].copy_(source[old], non_blocking=True)
        if source_scales is not None and target_scales is not None:
            target_scales[new].copy_(source_scales[old], non_blocking=True)
