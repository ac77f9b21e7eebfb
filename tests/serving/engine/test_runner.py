from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_llm import Decoder, DecoderConfig
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.rotary import Rope, Rotation, cos_sin
from lightning_llm.serving.engine.kv_cache import KVCache
from lightning_llm.serving.engine.runner import Runner
from lightning_llm.serving.kernels.batch import Piece

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,  # large enough for attention to matter
}
CONFIGS = {
    "llama": DecoderConfig(**SMALL),
    "qwen3": DecoderConfig(**SMALL, qk_norm=True, tie_word_embeddings=True),
    "qwen2": DecoderConfig(**SMALL, attention_bias=True),
    "mistral": DecoderConfig(**SMALL, sliding_window=7),
    "ministral": DecoderConfig(
        **SMALL, sliding_window=5, layer_types=("sliding_attention", "full_attention", "sliding_attention")
    ),
    "mixtral": DecoderConfig(**SMALL, num_experts=4, num_experts_per_tok=2),
    "qwen3-moe": DecoderConfig(**SMALL, qk_norm=True, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=16),
}


def decoder_of(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    decoder = Decoder(config).to(dtype)
    decoder.reset_parameters(seed=1)
    return decoder


@torch.no_grad()
def expected(decoder: Decoder, prompts: list[list[int]]) -> list[Tensor]:
    """Hidden states of every prompt, each by itself and in one go."""
    return [decoder.model(torch.tensor([prompt]))[0] for prompt in prompts]


def serve(runner: Runner, prompts: list[list[int]], rng: random.Random, *, longest: int = 12) -> list[Tensor]:
    """Feeds the prompts in chunks of random lengths, in steps of random company, through shuffled blocks."""
    cache = runner.cache
    free = rng.sample(range(1, cache.num_blocks), cache.num_blocks - 1)
    tables: list[list[int]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    states: list[list[Tensor]] = [[] for _ in prompts]
    window = runner.decoder.config.sliding_window if runner.decoder.config.layer_types is None else None
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        company = rng.sample(unfinished, rng.randint(1, len(unfinished)))
        pieces = []
        for i in company:
            tokens = prompts[i][done[i] : done[i] + rng.choice((1, 1, rng.randint(1, longest)))]
            while len(tables[i]) * cache.block_size < done[i] + len(tokens):
                tables[i].append(free.pop())
            if window is not None:  # what no token will see again is given back
                for index in range(max(0, done[i] + 1 - window) // cache.block_size):
                    if tables[i][index]:
                        free.insert(0, tables[i][index])
                        tables[i][index] = 0
            pieces.append(Piece(tokens, done[i], list(tables[i])))
        hidden = runner.forward(pieces)
        for i, part in zip(company, hidden.split([len(piece.token_ids) for piece in pieces]), strict=True):
            states[i].append(part)
            done[i] += len(part)
    return [torch.cat(parts) for parts in states]


def random_prompts(rng: random.Random, count: int, longest: int) -> list[list[int]]:
    return [[rng.randrange(SMALL["vocab_size"]) for _ in range(rng.randint(1, longest))] for _ in range(count)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kernel", "block_size"), [("reference", 3), ("cpu", 16), ("cpu", 5)])
def test_any_batching_gives_what_the_decoder_gives_for_each_prompt_alone(
    name: str, kernel: str, block_size: int
) -> None:
    decoder = decoder_of(CONFIGS[name], torch.float64)
    rng = random.Random(name)
    prompts = random_prompts(rng, 5, 40)
    cache = KVCache(decoder.config, 100, block_size=block_size, dtype=torch.float64)
    runner = Runner(decoder, cache, kernel=kernel)
    for states, wanted in zip(serve(runner, prompts, rng), expected(decoder, prompts), strict=True):
        torch.testing.assert_close(states, wanted, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(runner.logits(states), decoder.lm_head(wanted).float(), atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 2**32), block_size=st.integers(1, 9), window=st.one_of(st.none(), st.integers(1, 30)))
@settings(max_examples=25, deadline=None)
def test_it_does_so_whatever_the_chunks_blocks_and_window(seed: int, block_size: int, window: int | None) -> None:
    decoder = decoder_of(DecoderConfig(**SMALL, sliding_window=window), torch.float64)
    rng = random.Random(seed)
    prompts = random_prompts(rng, 3, 60)
    blocks = 1 + sum(-(-len(prompt) // block_size) for prompt in prompts)  # not one to spare
    runner = Runner(decoder, KVCache(decoder.config, blocks, block_size=block_size, dtype=torch.float64))
    for states, wanted in zip(serve(runner, prompts, rng, longest=40), expected(decoder, prompts), strict=True):
        torch.testing.assert_close(states, wanted, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 0.15)])
def test_it_does_so_in_the_types_that_are_served(dtype: torch.dtype, tolerance: float) -> None:
    decoder = decoder_of(CONFIGS["qwen3"], torch.float64)
    rng = random.Random(3)
    prompts = random_prompts(rng, 4, 80)
    wanted = torch.cat(expected(decoder, prompts))
    decoder = decoder.to(dtype)
    runner = Runner(decoder, KVCache(decoder.config, 60, block_size=8, dtype=dtype))
    error = (torch.cat(serve(runner, prompts, rng)) - wanted).abs().max()
    assert error < tolerance, error


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize(("kv_dtype", "tolerance"), [("int8", 0.03), ("fp8", 0.1)])
def test_keys_and_values_in_eight_bits_cost_little(kv_dtype: str, tolerance: float, kernel: str) -> None:
    decoder = decoder_of(CONFIGS["qwen3"], torch.float64)
    rng = random.Random(4)
    prompts = random_prompts(rng, 4, 80)
    cache = KVCache(decoder.config, 60, block_size=8, dtype=torch.float64, kv_dtype=kv_dtype)
    states = torch.cat(serve(Runner(decoder, cache, kernel=kernel), prompts, rng))
    wanted = torch.cat(expected(decoder, prompts))
    error = (states - wanted).norm() / wanted.norm()
    assert 1e-5 < error < tolerance, error


def test_a_failed_pass_leaves_the_cache_usable() -> None:
    decoder = decoder_of(CONFIGS["llama"], torch.float64)
    cache = KVCache(decoder.config, 9, block_size=4, dtype=torch.float64)
    runner = Runner(decoder, cache)
    prompt = list(range(20))
    first = runner.forward([Piece(prompt[:9], 0, [5, 2, 7])])

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory left")

    hook = decoder.model.layers["2"].mlp.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        runner.forward([Piece([7] * 11, 9, [5, 2, 7, 1, 3])])
    hook.remove()
    rest = runner.forward([Piece(prompt[9:], 9, [5, 2, 7, 1, 3])])
    torch.testing.assert_close(torch.cat((first, rest)), expected(decoder, [prompt])[0], atol=1e-10, rtol=1e-10)


YARN = {"rope_type": "yarn", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize("scaling", [None, YARN, DYNAMIC])
def test_a_rotation_is_bitwise_what_the_positions_give(scaling: dict[str, object] | None) -> None:
    config = DecoderConfig(**SMALL, rope_scaling=scaling)
    rope, positions = Rope.of(config), torch.tensor([3, 0, 17, 90, 4])
    for dtype in (torch.bfloat16, torch.float64):
        rotation = Rotation.of(rope, positions, 96, dtype=dtype)
        plain = cos_sin(rope, positions, 5, device=positions.device, dtype=dtype)
        assert all(map(torch.equal, rotation, plain))
    decoder = decoder_of(config, torch.float32)
    ids = torch.arange(5)[None]
    rotation = Rotation.of(rope, positions, 96, dtype=torch.float32)
    assert torch.equal(decoder(ids, positions=rotation), decoder(ids, positions=positions))


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 96),
        (YARN, 384),
        (YARN | {"original_max_position_embeddings": 32}, 128),
        (YARN | {"original_max_position_embeddings": 16}, 96),
        ({"rope_type": "linear", "factor": 2.0}, 192),
        (DYNAMIC, 96),
        (LONGROPE, 32),
    ],
)
def test_lengths_are_served_as_far_as_earlier_keys_stay_right(scaling: dict[str, object] | None, length: int) -> None:
    config = DecoderConfig(**SMALL, rope_scaling=scaling)
    assert Runner.max_length(config) == length
    decoder = decoder_of(config, torch.float64)
    runner = Runner(decoder, KVCache(config, 20 + length // 8, block_size=8, dtype=torch.float64))
    rng = random.Random(0)
    prompts = [[rng.randrange(61) for _ in range(n)] for n in (length, 5)]
    for states, wanted in zip(serve(runner, prompts, rng, longest=20), expected(decoder, prompts), strict=True):
        torch.testing.assert_close(states, wanted, atol=1e-10, rtol=1e-10)
    if Rope.of(config).depends_on_length:
        with pytest.raises(ValueError, match=f"{length} at most"):
            runner.forward([Piece([1], length, range(1, 20))])


def test_what_does_not_fit_together_is_refused() -> None:
    decoder = decoder_of(CONFIGS["llama"], torch.float32)
    with pytest.raises(ConfigurationError, match="make both alike"):
        Runner(decoder, KVCache(decoder.config, 4, dtype=torch.bfloat16))
    cache = KVCache(decoder.config, 4)
    with pytest.raises(ConfigurationError, match="There is no attention kernel 'fast'"):
        Runner(decoder, cache, kernel="fast")
    decoder.model.norm = None
    with pytest.raises(ConfigurationError, match="pipeline stage"):
        Runner(decoder, cache)
