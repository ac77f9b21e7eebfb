"""Generation: transformers' greedy tokens, a cache that changes nothing, and sampling that does what it says."""

from collections import Counter
from itertools import islice

import pytest
import torch

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.generation import KVCache, generate, sample

PROMPTS = [[5], [7, 7, 7, 1, 2, 3], list(range(50, 90))]
# One per way in which positions, windows or heads could go wrong from step to step.
GREEDY = ["llama", "llama-biases", "llama-dynamic", "llama-yarn", "llama-longrope", "llama-llama3", "smollm2"]
GREEDY += ["mistral-window", "ministral", "qwen2-layer-types", "qwen3", "qwen3-bias-window"]
GREEDY += ["mixtral-window", "qwen3-moe-some-layers", "olmoe", "dots1-window"]
CONFIG = DecoderConfig.preset("tiny", vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3)


def decoder_with(**changes: object) -> Decoder:
    return Decoder(CONFIG.replace(initializer_range=0.1, model_type=None, **changes))


@pytest.mark.parametrize("variant", GREEDY)
@pytest.mark.filterwarnings("ignore:prompt .* tokens, more than:UserWarning")
def test_greedy_equals_transformers_token_for_token(variant, reference):
    model, folder = reference(variant)
    decoder = Decoder.from_pretrained(folder)
    for prompt in PROMPTS:
        # 40 + 30 tokens go beyond max_position_embeddings (64), every window and longrope's switch to its long factors.
        with torch.no_grad():
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None
            )
        tokens = list(generate(decoder, prompt, max_tokens=30))
        assert tokens == expected[0, len(prompt) :].tolist()


def test_references_do_not_all_say_the_same(reference):
    """Otherwise the comparison above would prove little."""
    _, folder = reference("llama")
    decoder = Decoder.from_pretrained(folder)
    outputs = [tuple(generate(decoder, prompt, max_tokens=20)) for prompt in PROMPTS]
    assert len(set(outputs)) == len(PROMPTS)
    assert max(len(set(tokens)) for tokens in outputs) > 5


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("chunks", [(1,) * 24, (10, 1, 1, 12), (24,), (3, 8, 13), (1, 23)])
@pytest.mark.parametrize("kv_heads", [1, 4, 8])
def test_cached_logits_equal_a_full_forward(window, chunks, kv_heads):
    decoder = decoder_with(sliding_window=window, num_key_value_heads=kv_heads).double()
    ids = torch.randint(0, 97, (2, 24), generator=torch.Generator().manual_seed(0))
    cache = KVCache(24)
    parts = []
    with torch.inference_mode():
        for part in ids.split(list(chunks), dim=1):
            parts.append(decoder(part, positions=cache.length, attention=cache))
            cache.advance(part.shape[1])
        full = decoder(ids)
    assert cache.length == 24
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-10, atol=1e-10)


def test_cache_memory_is_set_aside_once():
    decoder = decoder_with(num_key_value_heads=4)
    cache = KVCache(16)
    addresses = []
    with torch.inference_mode():
        for token in range(16):
            decoder(torch.tensor([[token]]), positions=cache.length, attention=cache)
            cache.advance(1)
            addresses.append([(k.data_ptr(), v.data_ptr()) for k, v in cache._layers.values()])
    assert all(step == addresses[0] for step in addresses)
    assert cache._layers[0][0].shape == (1, 4, 16, 8)
    with pytest.raises(ConfigurationError, match=r"16 \+ 1 = 17 tokens do not fit a KV cache of 16"):
        decoder(torch.tensor([[1]]), positions=16, attention=cache)


def test_each_token_is_computed_once():
    decoder = decoder_with()
    seen: list[int] = []
    decoder.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert len(list(generate(decoder, [1, 2, 3, 4], max_tokens=6))) == 6
    assert seen == [4, 1, 1, 1, 1, 1]


def test_tokens_are_streamed():
    decoder = decoder_with()
    passes: list[int] = []
    decoder.model.register_forward_pre_hook(lambda module, args: passes.append(1))
    stream = generate(decoder, [1, 2, 3], max_tokens=1000)
    assert passes == []
    first = list(islice(stream, 3))
    assert len(passes) == 3
    assert first == list(generate(decoder, [1, 2, 3], max_tokens=3))


def test_inference_mode_does_not_leak_to_the_consumer():
    for _ in generate(decoder_with(), [1, 2], max_tokens=3):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()


def test_generation_between_training_steps():
    decoder = decoder_with(sliding_window=4)
    list(generate(decoder, [1, 2, 3, 4, 5, 6], max_tokens=5))
    decoder(torch.arange(12)[None]).sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_stops_at_the_end_of_text():
    decoder = decoder_with()
    free = list(generate(decoder, [1, 2, 3], max_tokens=12))
    stop = free[4]
    until = free[: free.index(stop) + 1]
    assert list(generate(decoder, [1, 2, 3], max_tokens=12, eos_token_ids=[stop])) == until
    assert list(generate(decoder, [1, 2, 3], max_tokens=12, eos_token_ids=(96, stop))) == until or 96 in until


@pytest.mark.parametrize("top_p", [1.0, 0.95])
def test_sampling_is_reproducible_by_seed(top_p):
    decoder = decoder_with()

    def run(seed: int | None) -> list[int]:
        return list(generate(decoder, [1, 2, 3], max_tokens=24, temperature=1.0, top_p=top_p, seed=seed))

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert run(None) != run(None)


def test_sampling_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    for top_p in (0.9, 1.0):
        list(generate(decoder_with(), [1], max_tokens=5, temperature=1.0, top_p=top_p))
    assert torch.equal(torch.random.get_rng_state(), before)


LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])[[3, 0, 4, 1, 2]].log()  # most likely: 1, 3, 4, 0, 2


DRAWS = 4000


def frequencies(draws: int = DRAWS, **options: float) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sample(LOGITS, generator=generator, **options) for _ in range(draws))
    return {token: count / draws for token, count in counts.items()}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1.0, {1: 0.5, 3: 0.25, 4: 0.15, 0: 0.07, 2: 0.03}),
        (0.85, {1: 0.5 / 0.9, 3: 0.25 / 0.9, 4: 0.15 / 0.9}),
        (0.7, {1: 2 / 3, 3: 1 / 3}),
        (0.4, {1: 1.0}),
        (1e-9, {1: 1.0}),
    ],
)
def test_top_p_keeps_the_nucleus_and_its_proportions(top_p, expected):
    drawn = frequencies(temperature=1.0, top_p=top_p)
    assert drawn.keys() == expected.keys()
    for token, probability in expected.items():
        assert drawn[token] == pytest.approx(probability, abs=5 * (0.25 / DRAWS) ** 0.5)


def test_temperature_sharpens_and_flattens():
    tempered = torch.softmax(LOGITS / 2, -1)
    drawn = frequencies(temperature=2.0, top_p=1.0)
    for token, probability in enumerate(tempered.tolist()):
        assert drawn[token] == pytest.approx(probability, abs=5 * (0.25 / DRAWS) ** 0.5)
    assert frequencies(draws=200, temperature=1e-6, top_p=1.0) == {1: 1.0}
    assert frequencies(draws=20, temperature=0, top_p=0.1) == {1: 1.0}


def test_bfloat16_decoder_generates():
    tokens = list(generate(decoder_with().bfloat16(), [1, 2, 3], max_tokens=8, temperature=0.8, top_p=0.9, seed=0))
    assert len(tokens) == 8 and all(0 <= token < 97 for token in tokens)


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "The prompt has no tokens"),
        ([1, 97], {}, "Token id 97 is not in the vocabulary of 97"),
        ([-1], {}, "Token id -1"),
        ([1], {"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ([1], {"temperature": -0.1}, "temperature must be 0"),
        ([1], {"temperature": float("nan")}, "temperature must be 0"),
        ([1], {"top_p": 0.0}, "top_p is a probability"),
        ([1], {"top_p": 1.5}, "top_p is a probability"),
    ],
)
def test_bad_requests_are_refused_on_the_call(prompt, options, message):
    with pytest.raises(ConfigurationError, match=message):
        generate(decoder_with(), prompt, **{"max_tokens": 4, **options})


def test_a_stage_cannot_generate():
    decoder = decoder_with()
    decoder.lm_head = None
    with pytest.raises(ConfigurationError, match="only a pipeline stage"):
        generate(decoder, [1], max_tokens=1)


def test_going_beyond_the_trained_length_warns_with_the_arithmetic():
    with pytest.warns(UserWarning, match=r"prompt 3 \+ max_tokens 2046 = 2049 tokens, more than the 2048"):
        generate(decoder_with(), [1, 2, 3], max_tokens=2046)


def test_an_empty_cache_is_refused():
    with pytest.raises(ConfigurationError, match="at least 1 token, not 0"):
        KVCache(0)
