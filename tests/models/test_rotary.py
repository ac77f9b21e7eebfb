"""Rotary embeddings against transformers' frequencies, and their algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.rotary import Rope, cos_sin, inverse_frequencies, rotate
from tests.models.conftest import SIZES, VARIANTS

CPU = torch.device("cpu")
SCALED = [name for name, (family, _) in VARIANTS.items() if family == "Llama" and "bias" not in name]


def rope_of(variant: str) -> tuple[Rope, object]:
    import transformers

    _, changes = VARIANTS[variant]
    theirs = transformers.LlamaConfig(**{**SIZES, **changes})
    return Rope.of(DecoderConfig.from_dict(theirs.to_dict())), theirs


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("length", [10, 33, 64, 65, 200])
def test_tables_are_transformers(variant, length):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, theirs = rope_of(variant)
    cos, sin = LlamaRotaryEmbedding(theirs)(torch.zeros(1), torch.arange(length)[None])
    half = rope.head_dim // 2
    # A few units in the last place: transformers computes the dynamic kind's longer theta in float32, we in float64.
    atol = 1e-6 if rope.kind == "dynamic" else 1.2e-7
    for positions in (None, torch.arange(length)):
        actual = cos_sin(rope, positions, length, device=CPU, dtype=torch.float32)
        torch.testing.assert_close(actual[0], cos[0, :, :half], rtol=0, atol=atol)
        torch.testing.assert_close(actual[1], sin[0, :, :half], rtol=0, atol=atol)


@pytest.mark.parametrize("variant", SCALED)
def test_float64_frequencies_refine_float32_ones(variant):
    rope, _ = rope_of(variant)
    exact, factor = inverse_frequencies(rope, 40, device=CPU, dtype=torch.float64)
    rough, same_factor = inverse_frequencies(rope, 40, device=CPU)
    assert (exact.dtype, rough.dtype) == (torch.float64, torch.float32)
    assert factor == same_factor
    torch.testing.assert_close(rough.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("variant", SCALED)
@pytest.mark.parametrize("first", [0, 3, 127, 128, 1000])
def test_an_offset_is_consecutive_positions(variant, first):
    rope, _ = rope_of(variant)
    by_offset = cos_sin(rope, first, 5, device=CPU, dtype=torch.float32)
    by_tensor = cos_sin(rope, torch.arange(first, first + 5), 5, device=CPU, dtype=torch.float32)
    for one, two in zip(by_offset, by_tensor, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_tables_do_not_depend_on_what_was_asked_before():
    rope, _ = rope_of("llama-dynamic")
    short = cos_sin(rope, None, 8, device=CPU, dtype=torch.float32)[0].clone()
    cos_sin(rope, None, 300, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(cos_sin(rope, None, 8, device=CPU, dtype=torch.float32)[0], short, rtol=0, atol=0)


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 100))
def test_scores_depend_on_distance_only(i, j, shift):
    rope = Rope("default", 16, 10000.0, 64, ())
    generator = torch.Generator().manual_seed(i + j)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64, generator=generator)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned = [rotate(x, *cos_sin(rope, at, 1, device=CPU, dtype=torch.float64)) for x, at in ((q, at_q), (k, at_k))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=1e-8, atol=1e-8)
    turned = rotate(q, *cos_sin(rope, i, 1, device=CPU, dtype=torch.float64))
    torch.testing.assert_close(turned.norm(), q.norm())


def test_low_precision_activations_are_turned_in_float32():
    rope = Rope("default", 16, 10000.0, 64, ())
    x = torch.randn(1, 1, 40, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = cos_sin(rope, 3000, 40, device=CPU, dtype=torch.bfloat16)
    assert cos.dtype == torch.float32
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos, sin).bfloat16())
