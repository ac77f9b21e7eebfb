"""`Decoder` against transformers, and the promises that its parallel and serving users build on."""

import copy

import pytest
import torch
from torch import nn

from lightning_llm.errors import ConfigurationError
from lightning_llm.models.attention import causal_attention
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from tests.models.conftest import VARIANTS, WITH_EXPERTS

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LENGTHS = (1, 20, 64, 90)  # below, at and beyond max_position_embeddings (64) and every window


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(seed))


def small(**changes: object) -> DecoderConfig:
    return DecoderConfig.preset(
        "tiny",
        **{"vocab_size": 211, "hidden_size": 64, "intermediate_size": 112, "num_attention_heads": 4, **changes},
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(variant, reference):
    model, folder = reference(variant)
    decoder = Decoder.from_pretrained(folder)
    for length in LENGTHS:
        ids = token_ids(2, length)
        with torch.no_grad():
            expected, actual = model(ids).logits, decoder(ids)
        assert expected.abs().max() > 1, "a reference of tiny logits would prove nothing"
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama-biases", "mistral-window", "qwen2", "qwen3", "smollm2", *WITH_EXPERTS])
def test_gradients_equal_transformers(variant, reference):
    model, folder = reference(variant)
    decoder = Decoder.from_pretrained(folder)
    ids = token_ids(2, 24)
    model(ids).logits.square().mean().backward()
    decoder(ids).square().mean().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name in [name for name in expected if name.endswith("experts.gate_up_proj")]:  # transformers fuses the two
        both = expected.pop(name).chunk(2, dim=1)
        expected |= dict(zip((name.replace("gate_up", "gate"), name.replace("gate_up", "up")), both, strict=True))
    assert expected.keys() == dict(decoder.named_parameters()).keys()
    for name, parameter in decoder.named_parameters():
        gradient = expected[name]
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("variant", ["llama-biases", "llama-yarn", "mistral-window", "qwen3"])
def test_float64_end_to_end(variant, reference):
    model, folder = reference(variant)
    decoder = Decoder.from_pretrained(folder, dtype=torch.float64)
    ids = token_ids(2, 24)
    logits = decoder(ids)
    assert logits.dtype == torch.float64
    # transformers keeps norms and rotary angles in float32 even in a float64 model, hence the tolerance.
    torch.testing.assert_close(logits, model.double()(ids).logits, rtol=1e-5, atol=1e-5)
    # Nothing of ours falls back to float32: a float64 logit moves smoothly with a change that float32 would swallow.
    with torch.no_grad():
        decoder.model.embed_tokens.weight.mul_(1 + 1e-12)
        moved = (decoder(ids) - logits).abs()
    assert 0 < moved.max() < 1e-9


def test_float64_gradients_pass_gradcheck():
    torch.manual_seed(0)
    config = small(
        num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1
    )
    config = config.replace(head_dim=4, vocab_size=11, qk_norm=True, model_type=None)
    decoder = Decoder(config).double()
    hidden = torch.randn(1, 5, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: decoder.model.layers["0"](x), (hidden,))


def test_bfloat16_stays_near_float32():
    config = small()
    ids = token_ids(1, 32)
    exact, rough = Decoder(config)(ids), Decoder(config).bfloat16()(ids)
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_stages_chained_equal_the_whole(tied):
    config = small(tie_word_embeddings=tied, sliding_window=6, model_type="mistral")
    whole = Decoder(config)
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    first.lm_head = first.model.norm = None
    second.model.embed_tokens = None
    for layer in ("2", "3"):
        del first.model.layers[layer]
    for layer in ("0", "1"):
        del second.model.layers[layer]
    names = {name for stage in (first, second) for name, _ in stage.named_parameters()}
    assert names - {"lm_head.weight"} == {name for name, _ in whole.named_parameters()} - {"lm_head.weight"}
    ids = token_ids(2, 17)
    hidden = first(ids)
    assert hidden.shape == (2, 17, 64)
    torch.testing.assert_close(second(hidden), whole(ids), rtol=0, atol=0)


def test_partial_decoder_is_not_saved_as_a_whole(tmp_path):
    decoder = Decoder(small())
    del decoder.model.layers["3"]
    with pytest.raises(ConfigurationError, match="30 of 39 parameters"):
        decoder.save_pretrained(tmp_path)


def test_positions_tensor_and_offset_agree():
    decoder = Decoder(small()).double()
    ids = token_ids(2, 12)
    seen = []

    def recording(q, k, v, **options):
        seen.append(k)
        return causal_attention(q, k, v, **options)

    batched = torch.arange(5, 17).expand(2, 12)
    for positions in (5, torch.arange(5, 17), batched):
        decoder(ids, positions=positions, attention=recording)
    offset, flat, batch = seen[:4], seen[4:8], seen[8:]
    for expected, one, two in zip(offset, flat, batch, strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=0)
        torch.testing.assert_close(two, expected, rtol=0, atol=0)
    # Rotary embedding is relative: a common shift changes the keys but not the logits.
    torch.testing.assert_close(decoder(ids, positions=5), decoder(ids), rtol=1e-9, atol=1e-9)
    # ... and reversed positions do change them.
    assert not torch.allclose(decoder(ids, positions=torch.arange(11, -1, -1)), decoder(ids))


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, EXPERTS], ids=["full", "window", "experts"])
def test_packed_documents_are_as_if_alone(changes):
    decoder = Decoder(small(**changes, model_type=None)).double()
    ids = token_ids(2, 20)
    documents = torch.tensor([[4] * 8 + [9] * 12, [1] * 3 + [0] * 17])
    packed = decoder(ids, document_ids=documents)
    for row, cut in ((0, 8), (1, 3)):
        for part in (slice(0, cut), slice(cut, 20)):
            alone = decoder(ids[row : row + 1, part])
            torch.testing.assert_close(packed[row : row + 1, part], alone, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(packed, decoder(ids))
    assert torch.equal(decoder(ids, document_ids=torch.zeros_like(ids)).argmax(-1), decoder(ids).argmax(-1))


def test_document_ids_reach_the_attention_only_where_given():
    keywords = []

    def recording(q, k, v, **options):
        keywords.append(options.keys() - {"layer", "scale", "sliding_window"})
        return causal_attention(q, k, v, **options)

    decoder = Decoder(small(num_hidden_layers=1))
    decoder(token_ids(1, 4), attention=recording)
    decoder(token_ids(1, 4), attention=recording, document_ids=torch.zeros(1, 4, dtype=torch.long))
    assert keywords == [set(), {"document_ids"}]


def test_attention_gets_the_layer_its_window_and_grouped_heads():
    layer_types = ("full_attention", "sliding_attention", "full_attention", "sliding_attention")
    config = small(sliding_window=3, layer_types=layer_types, model_type=None)
    calls = []

    def recording(q, k, v, *, layer, scale, sliding_window):
        calls.append((layer, tuple(q.shape), tuple(k.shape), scale, sliding_window))
        return causal_attention(q, k, v, layer=layer, scale=scale, sliding_window=sliding_window)

    Decoder(config)(token_ids(1, 5), attention=recording)
    windows = [None, 3, None, 3]
    assert calls == [(i, (1, 4, 5, 16), (1, 4, 5, 16), 0.25, window) for i, window in enumerate(windows)]


def test_causality():
    for config in (small(), small(sliding_window=4, model_type=None)):
        decoder = Decoder(config)
        ids = token_ids(1, 16)
        changed = ids.clone()
        changed[0, 10] = (changed[0, 10] + 1) % 211
        before, after = decoder(ids)[0], decoder(changed)[0]
        assert torch.equal(before[:10], after[:10])
        assert not torch.allclose(before[10], after[10])


def test_meta_device_allocates_nothing_and_materialises_to_the_same_weights():
    config = small(tie_word_embeddings=True, qk_norm=True, model_type=None)
    with torch.device("meta"):
        decoder = Decoder(config)
    assert all(p.is_meta for p in decoder.parameters())
    assert not list(decoder.buffers())
    assert decoder(torch.zeros(2, 9, dtype=torch.long, device="meta")).shape == (2, 9, 211)
    decoder.to_empty(device="cpu")
    decoder.tie_weights()
    decoder.reset_parameters()
    ids = token_ids(1, 8)
    torch.testing.assert_close(decoder(ids), Decoder(config)(ids), rtol=0, atol=0)


def test_tied_head_is_the_embedding():
    decoder = Decoder(small(tie_word_embeddings=True))
    assert decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(decoder.named_parameters())
    decoder(token_ids(1, 4)).sum().backward()
    assert decoder.lm_head.weight.grad is decoder.model.embed_tokens.weight.grad


def test_tables_made_in_inference_mode_serve_training():
    config = small(rope_theta=12345.0, sliding_window=4, model_type=None)  # a theta that no other test has cached
    decoder = Decoder(config)
    with torch.inference_mode():
        decoder(token_ids(1, 16))
    decoder(token_ids(1, 16)).sum().backward()
    assert decoder.model.layers["0"].self_attn.q_proj.weight.grad is not None


def test_submodules_get_one_positional_argument():
    decoder = Decoder(small())
    counts = []
    for module in decoder.modules():
        if not isinstance(module, nn.ModuleDict):
            module.register_forward_pre_hook(lambda module, args: counts.append(len(args)))
    decoder(token_ids(1, 4))
    assert set(counts) == {1}


def test_reset_parameters_depends_on_the_seed_alone():
    one, two = Decoder(small()), Decoder(small())
    two.reset_parameters(seed=1)
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)
    two.reset_parameters(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_initial_loss_is_that_of_guessing():
    decoder = Decoder(DecoderConfig.preset("tiny"))
    ids = torch.randint(0, 4096, (2, 65), generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(decoder(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - 8.318) < 0.1  # ln(4096)


def test_compiles_into_one_graph():
    decoder = Decoder(small(sliding_window=5, model_type=None))
    ids = token_ids(2, 12)
    compiled = torch.compile(decoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), decoder(ids), rtol=1e-6, atol=1e-6)
