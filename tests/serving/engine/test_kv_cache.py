from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_llm import DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.kernels.batch import PagedBatch, Piece

CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
KINDS = [("auto", torch.float64), ("auto", torch.bfloat16), ("int8", torch.float32), ("fp8", torch.bfloat16)]


def bits(cache: KVCache) -> list[Tensor]:
    """Everything on the device, comparable whatever its type."""
    return [part.clone().view(torch.uint8) for part in (cache.data, cache.scales) if part is not None]


def filled(kv_dtype: str, dtype: torch.dtype, **sizes: int) -> KVCache:
    """A cache whose blocks all hold something of their own."""
    cache = KVCache(CONFIG, sizes.pop("num_blocks", 6), block_size=4, dtype=dtype, kv_dtype=kv_dtype, **sizes)
    tokens = (cache.num_blocks - 1) * 4
    batch = PagedBatch.of([Piece([0] * tokens, 0, range(1, cache.num_blocks))], block_size=4)
    generator = torch.Generator().manual_seed(0)
    for layer in range(CONFIG.num_hidden_layers):
        k, v = torch.randn(2, tokens, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
        cache.write(layer, k, v, batch)
    return cache


@pytest.mark.parametrize(("kv_dtype", "dtype"), KINDS)
def test_a_block_is_one_contiguous_piece_of_the_size_that_was_reckoned(kv_dtype: str, dtype: torch.dtype) -> None:
    cache = KVCache(CONFIG, 5, block_size=4, dtype=dtype, kv_dtype=kv_dtype)
    parts = [part for part in (cache.data, cache.scales) if part is not None]
    assert all(part[2].is_contiguous() for part in parts)
    assert sum(part[2].nbytes for part in parts) == KVCache.bytes_per_block(
        CONFIG, block_size=4, dtype=dtype, kv_dtype=kv_dtype
    )


def test_what_is_written_lies_in_its_slots_and_nowhere_else() -> None:
    cache = KVCache(CONFIG, 5, block_size=4, dtype=torch.float64)
    batch = PagedBatch.of([Piece([1, 2, 3], 2, [3, 1]), Piece([4], 0, [2])], block_size=4)
    k, v = torch.randn(2, 4, 2, 8, dtype=torch.float64)
    cache.write(1, k, v, batch)
    expected = torch.zeros(5, 4, 2, 8, dtype=torch.float64), torch.zeros(5, 4, 2, 8, dtype=torch.float64)
    for new, kept in zip((k, v), expected, strict=True):
        for token, (block, offset) in enumerate([(3, 2), (3, 3), (1, 0), (2, 0)]):
            kept[block, offset] = new[token]
    assert torch.equal(cache.layer(1).k, expected[0])
    assert torch.equal(cache.layer(1).v, expected[1])
    assert not cache.layer(0).k.any() and not cache.layer(2).v.any()


@pytest.mark.parametrize(("kv_dtype", "dtype"), KINDS)
def test_blocks_come_back_from_the_host_bit_for_bit(kv_dtype: str, dtype: torch.dtype) -> None:
    cache = filled(kv_dtype, dtype, host_blocks=3)
    before = bits(cache)
    cache.swap_out([(2, 1), (5, 0)])
    cache.data[[2, 5]] = cache.data[[1, 1]]
    if cache.scales is not None:
        cache.scales[[2, 5]] = 0
    assert not torch.equal(bits(cache)[0], before[0])
    cache.swap_in([(1, 2), (0, 5)])
    assert all(map(torch.equal, bits(cache), before))
    cache.swap_in([(1, 3)])  # into another block than it came from
    assert all(torch.equal(now[3], then[2]) for now, then in zip(bits(cache), before, strict=True))


@pytest.mark.parametrize(("kv_dtype", "dtype"), KINDS)
def test_copies_are_made_one_after_another(kv_dtype: str, dtype: torch.dtype) -> None:
    cache = filled(kv_dtype, dtype)
    before = bits(cache)
    cache.copy([(1, 4), (4, 5)])
    for now, then in zip(bits(cache), before, strict=True):
        assert torch.equal(now[4], then[1]) and torch.equal(now[5], then[1])
        assert torch.equal(now[:4], then[:4])


def test_a_cache_made_in_inference_mode_is_written_outside_it_and_the_other_way_round() -> None:
    batch = PagedBatch.of([Piece([0], 0, [1])], block_size=4)
    k = torch.ones(1, 2, 8)
    with torch.inference_mode():
        cache = KVCache(CONFIG, 3, block_size=4, host_blocks=1)
    cache.write(0, k, k, batch)
    cache.swap_out([(1, 0)])
    with torch.inference_mode():
        cache.write(0, 2 * k, k, batch)
        cache.swap_in([(0, 1)])
    assert cache.layer(0).k[1, 0].eq(1).all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_blocks": 1}, "at least 2"),
        ({"num_blocks": 4, "block_size": 0}, "block_size"),
        ({"num_blocks": 4, "kv_dtype": "int3"}, "auto, int8, fp8"),
    ],
)
def test_a_cache_that_cannot_be_is_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        KVCache(CONFIG, **settings)
