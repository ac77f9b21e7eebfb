"""Mixture of experts: against its definition written with loops, against transformers, and what training builds on."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_llm.models import moe
from lightning_llm.models.config import DecoderConfig
from lightning_llm.models.decoder import Decoder
from lightning_llm.models.initialization import RandomInit
from lightning_llm.models.moe import Experts, MoE, Router, RouterLosses, grouped_linear, permute, unpermute
from lightning_llm.models.weights import load_weights

SOFTMAX = DecoderConfig.preset(
    "tiny-moe",
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
SIGMOID = SOFTMAX.replace(
    model_type="dots1",
    scoring_func="sigmoid",
    use_routing_bias=True,
    n_shared_experts=2,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
)
CONFIGS = {
    "softmax": SOFTMAX,
    "not normalised": SOFTMAX.replace(norm_topk_prob=False),
    "one expert": SOFTMAX.replace(num_experts_per_tok=1, norm_topk_prob=False),
    "all experts": SOFTMAX.replace(num_experts_per_tok=8),
    "sigmoid": SIGMOID,
    "sigmoid not normalised": SIGMOID.replace(norm_topk_prob=False),
}
with_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: DecoderConfig, seed: int = 0) -> MoE:
    """A block's experts in float64, with nothing left at 0."""
    block = MoE(config, RouterLosses(config)).double()
    load_weights(block, RandomInit(config, seed))
    if block.gate.e_score_correction_bias is not None:
        block.gate.e_score_correction_bias.normal_(0, 0.1, generator=generator())
    return block


def hidden(batch: int = 2, seq: int = 7, seed: int = 0) -> Tensor:
    return torch.randn(batch, seq, 32, generator=generator(seed), dtype=torch.float64)


def routers(decoder: Decoder) -> list[Router]:
    return [module for module in decoder.modules() if isinstance(module, Router)]


def token_ids(batch: int = 2, seq: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, (batch, seq), generator=generator(seed))


def next_token_loss(decoder: Decoder, ids: Tensor) -> Tensor:
    return F.cross_entropy(decoder(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


# -- what goes in and out


@with_configs
def test_equals_the_definition(config):
    block, x = build(config), hidden()
    expected = torch.zeros_like(x)
    for place in ((b, s) for b in range(2) for s in range(7)):
        logits = block.gate.weight @ x[place]
        scores = logits.softmax(0) if config.scoring_func == "softmax" else logits.sigmoid()
        wanted = scores if block.gate.e_score_correction_bias is None else scores + block.gate.e_score_correction_bias
        chosen = sorted(range(8), key=lambda expert: -wanted[expert].item())[: config.num_experts_per_tok]
        total = sum(scores[expert] for expert in chosen) if config.norm_topk_prob else 1
        for expert in chosen:
            gate, up, down = (
                weight[expert] for weight in (block.experts.gate_proj, block.experts.up_proj, block.experts.down_proj)
            )
            weight = config.routed_scaling_factor * scores[expert] / total
            expected[place] += weight * (down @ (F.silu(gate @ x[place]) * (up @ x[place])))
        if block.shared_experts is not None:
            expected[place] += block.shared_experts(x[place])
    torch.testing.assert_close(block(x), expected)


def test_the_bias_chooses_but_does_not_weigh():
    block, x = build(SIGMOID), hidden()
    assert block.gate.e_score_correction_bias is not None
    block.gate.e_score_correction_bias.zero_()
    block.gate.e_score_correction_bias[3:5] = 10.0
    routing = block.gate(x)
    assert set(routing.experts.unique().tolist()) == {3, 4}
    weights = routing.scores.gather(-1, routing.experts)
    torch.testing.assert_close(routing.weights, 2.5 * weights / weights.sum(-1, keepdim=True))
    assert routing.counts.tolist() == [[0, 0, 0, 7, 7, 0, 0, 0]] * 2


def test_gradients_pass_gradcheck():
    config = SIGMOID.replace(hidden_size=8, moe_intermediate_size=4, num_attention_heads=2, num_key_value_heads=1)
    block = build(config)
    x = torch.randn(1, 3, 8, generator=generator(), dtype=torch.float64, requires_grad=True)
    parameters = tuple(block.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: block(x), (x, *parameters))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(0, 9), experts=st.integers(1, 6))
def test_permute_sorts_and_unpermute_undoes_it(data, n, experts):
    top_k = data.draw(st.integers(1, experts))
    choice = st.permutations(range(experts)).map(lambda order: order[:top_k])
    chosen = torch.tensor(data.draw(st.lists(choice, min_size=n, max_size=n)), dtype=torch.long).view(n, top_k)
    x = torch.randn(n, 3, dtype=torch.float64)
    tokens, order = permute(x, chosen)
    assert sorted(order.tolist()) == list(range(n * top_k))
    sorted_experts = chosen.flatten()[order]
    assert torch.equal(sorted_experts, chosen.flatten().sort().values)
    assert torch.equal(tokens, x[order // top_k])
    weights = torch.rand(n, top_k, dtype=torch.float64)
    # Expert e multiplies by e + 1.
    out = unpermute(tokens * (sorted_experts + 1)[:, None], order, weights)
    torch.testing.assert_close(out, x * (weights * (chosen + 1)).sum(1, keepdim=True))


COUNTS = [[3, 0, 4, 0], [0, 0, 7, 0], [0, 0, 0, 0], [1, 2, 3, 4]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_grouped_products_equal_one_by_one(counts, dtype):
    tokens = torch.randn(sum(counts), 16, generator=generator()).to(dtype).requires_grad_()
    weight = torch.randn(4, 24, 16, generator=generator(1)).to(dtype).requires_grad_()
    assert moe._grouped_mm_takes(tokens, weight) == (dtype != torch.float64), "both ways are meant to be tried"
    out = grouped_linear(tokens, weight, torch.tensor(counts))
    assert out.shape == (sum(counts), 24) and out.dtype == dtype
    out.sum().backward()  # an expanded gradient, which the kernel's own backward would refuse
    exact_tokens, exact_weight = (t.detach().double().requires_grad_() for t in (tokens, weight))
    parts = zip(exact_tokens.split(counts), exact_weight, strict=True)
    exact = torch.cat([part @ matrix.T for part, matrix in parts])
    exact.sum().backward()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2e-2)
    pairs = [(out, exact), (tokens.grad, exact_tokens.grad), (weight.grad, exact_weight.grad)]
    for found, expected in pairs:
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance * 4)
    for expert, count in enumerate(counts):
        assert count or not weight.grad[expert].any()


def test_widths_that_the_kernel_refuses_take_the_other_way():
    tokens, weight = torch.randn(5, 6), torch.randn(2, 3, 6)
    assert not moe._grouped_mm_takes(tokens, weight)
    out = grouped_linear(tokens, weight, torch.tensor([2, 3]))
    torch.testing.assert_close(out, torch.cat([tokens[:2] @ weight[0].T, tokens[2:] @ weight[1].T]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_without_tokens_get_zero_gradients(dtype):
    block = MoE(SIGMOID, RouterLosses(SIGMOID)).to(dtype)
    load_weights(block, RandomInit(SIGMOID))
    block.gate.e_score_correction_bias[:2] = 10.0
    block(hidden().to(dtype)).square().sum().backward()
    for weight in block.experts.parameters():
        assert weight.grad is not None
        assert weight.grad[:2].abs().amax((1, 2)).all() and not weight.grad[2:].any()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 0), (0, 4)])
def test_any_number_of_tokens(shape):
    block = build(SIGMOID)
    x = hidden(*shape).requires_grad_()
    block.gate.losses.scale = 1.0
    out = block(x)
    assert out.shape == (*shape, 32)
    out.sum().backward()
    for parameter in block.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


@pytest.mark.parametrize("seq", [4, 8, 13])
def test_forced_balance(seq):
    block = build(SOFTMAX)
    block.gate.force_balance = True
    routing = block.gate(hidden(3, seq))
    assert int(routing.counts.max() - routing.counts.min()) <= 1
    assert all(len(set(chosen)) == 2 for chosen in routing.experts.flatten(0, 1).tolist())
    block(hidden(3, seq)).sum().backward()
    assert block.gate.weight.grad.abs().sum() > 0, "the scores still weigh"


# -- the losses


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_load_balancing_loss_is_transformers(top_k):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    block = build(SOFTMAX.replace(num_experts_per_tok=top_k))
    routing = block.gate(hidden(1, 40))
    aux, z, share = block.gate.losses_of(routing)
    expected = load_balancing_loss_func((routing.logits[0],), 8, top_k)
    torch.testing.assert_close(aux.float(), expected.float().view(1))
    assert aux.item() > top_k * 1.01, "perfect balance would prove little"
    torch.testing.assert_close(z, routing.logits.exp().sum(-1).log().square().mean(1))
    assert share.tolist() == [1.0]


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_balance_is_the_least_loss(config):
    block = build(config)
    torch.nn.init.zeros_(block.gate.weight)  # uniform probabilities: exactly top_k, however the ties are broken
    aux, z, _ = block.gate.losses_of(block.gate(hidden()))
    torch.testing.assert_close(aux, torch.full((2,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(z, torch.full((2,), 8.0, dtype=torch.float64).log().square())


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_slices_of_a_sequence_add_up_to_the_whole(config):
    x = hidden(2, 11)
    whole = build(config)
    whole.gate.losses.scale, whole.gate.losses.z_loss_coef, whole.gate.losses.aux_loss_coef = 0.7, 0.3, 0.5
    whole(x).square().sum().backward()
    counts = whole.gate(x).counts
    parts = copy.deepcopy(whole)
    parts.zero_grad()
    parts.gate.statistics = None
    parts.gate.sequence_sum = lambda own: counts  # what the ranks that hold the slices would sum up to
    for part in x.split([4, 0, 7], dim=1):
        parts(part).square().sum().backward()
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad)
    torch.testing.assert_close(parts.gate.statistics, whole.gate.statistics)
    assert whole.gate.statistics.sequences == 2
    assert whole.gate.statistics.tokens_per_expert.tolist() == counts.sum(0).tolist()


@pytest.mark.parametrize("scale", [0.25, torch.tensor(0.25)], ids=["float", "tensor"])
@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_injected_gradients_are_those_of_the_loss_written_out(config, scale):
    injected = Decoder(config).double()
    injected.router_losses.aux_loss_coef, injected.router_losses.z_loss_coef = 0.4, 0.2
    explicit = copy.deepcopy(injected)
    ids = token_ids()

    injected.router_losses.scale = scale
    next_token_loss(injected, ids).backward()

    routings = []
    for router in routers(explicit):
        router.register_forward_hook(lambda router, _, routing: routings.append(router.losses_of(routing)))
    loss = next_token_loss(explicit, ids)
    layers = len(routings)
    assert layers == config.num_moe_layers
    aux, z = (sum(routing[i].sum() for routing in routings) / layers for i in (0, 1))
    (loss + 0.25 * (0.4 * aux + 0.2 * z)).backward()

    plain = copy.deepcopy(explicit)
    plain.zero_grad()
    next_token_loss(plain, ids).backward()
    for (name, one), other, without in zip(
        injected.named_parameters(), explicit.parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12)
        if name.endswith("gate.weight"):
            assert (one.grad - without.grad).abs().max() > 1e-3, "the losses must have made a difference"


def test_batches_may_be_cut_at_will():
    ids = token_ids(6)
    gradients = []
    for parts in ([6], [3, 3], [1, 4, 1]):
        decoder = Decoder(SOFTMAX).double()
        decoder.router_losses.scale, decoder.router_losses.aux_loss_coef = 1 / 6, 0.5
        for part in ids.split(parts):
            next_token_loss(decoder, part).backward()
        gradients.append([parameter.grad for parameter in decoder.parameters()])
        statistics = routers(decoder)[0].statistics
        assert statistics.sequences == 6 and statistics.tokens_per_expert.sum() == ids.numel() * 2
    for other in gradients[1:]:
        for expected, found in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_scale_of_zero_counts_but_changes_no_gradient():
    ids = token_ids()
    off, none = Decoder(SOFTMAX).double(), Decoder(SOFTMAX).double()
    off.router_losses.aux_loss_coef = 5.0
    none.router_losses.aux_loss_coef = 0.0
    none.router_losses.scale = 1.0
    for decoder in (off, none):
        next_token_loss(decoder, ids).backward()
    for one, other in zip(off.parameters(), none.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(routers(off), routers(none), strict=True):
        torch.testing.assert_close(one.statistics, other.statistics)
        assert one.statistics.aux_loss > 2 * 2


def test_evaluation_counts_nothing():
    decoder = Decoder(SIGMOID)
    decoder.router_losses.scale = 1.0
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            decoder(token_ids())
    decoder(token_ids())  # nor does a forward alone
    assert all(router.statistics is None for router in routers(decoder))


@pytest.mark.parametrize("config", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_change_nothing(config, reentrant):
    results = []
    for recompute in (False, True):
        decoder = Decoder(config).double()
        decoder.router_losses.scale, decoder.router_losses.z_loss_coef = 0.5, 0.1
        calls = []
        routers(decoder)[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x = decoder.model.embed_tokens(token_ids())
        for block in decoder.model.layers.values():
            x = checkpoint(block, x, use_reentrant=reentrant) if recompute else block(x)
        decoder.lm_head(x).square().mean().backward()
        decoder.router_losses.scale = 0.0  # what was set for the forward holds for its backward
        results.append((decoder, len(calls)))
    (plain, once), (recomputed, twice) = results
    assert (once, twice) == (1, 2)
    for one, other in zip(plain.model.layers.parameters(), recomputed.model.layers.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(routers(plain), routers(recomputed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.statistics, other.statistics, strict=True))
        assert one.statistics.sequences == 2


def test_compiles():
    decoder = Decoder(SOFTMAX.replace(num_hidden_layers=1))
    decoder.router_losses.scale = 0.5
    compiled, plain = torch.compile(decoder, backend="eager"), copy.deepcopy(decoder)
    for model in (compiled, plain):
        next_token_loss(model, token_ids()).backward()
    for one, other in zip(decoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    for one, other in zip(routers(decoder), routers(plain), strict=True):
        torch.testing.assert_close(one.statistics, other.statistics)


# -- balance without a loss


def test_update_bias_goes_by_the_sign_of_what_is_missing():
    block = build(SIGMOID)
    router, bias = block.gate, block.gate.e_score_correction_bias
    block(hidden(3, 9)).sum().backward()
    block(hidden(3, 9, seed=1)).sum().backward()
    counts = block.gate(hidden(3, 9)).counts.sum(0) + block.gate(hidden(3, 9, seed=1)).counts.sum(0)
    before = bias.clone()
    router.update_bias(0.01)
    mean = 2 * 27 * 2 / 8
    expected = [0.01 if count < mean else -0.01 if count > mean else 0.0 for count in counts.tolist()]
    torch.testing.assert_close(bias - before, torch.tensor(expected), rtol=0, atol=1e-7)
    assert router.statistics is None
    before = bias.clone()
    router.update_bias(0.01)
    assert torch.equal(bias, before), "nothing was routed since"


def test_update_bias_sums_over_ranks():
    router = build(SIGMOID).gate
    router.data_sum = lambda counts: counts + torch.tensor([5, 3, 3, 3, 3, 3, 3, 1])
    before = router.e_score_correction_bias.clone()
    router.update_bias(0.5)  # a rank that saw no token takes part, too
    change = (router.e_score_correction_bias - before).tolist()
    assert change == pytest.approx([-0.5, 0, 0, 0, 0, 0, 0, 0.5])


def test_update_bias_balances():
    block, x = build(SIGMOID), hidden(4, 32) + 0.5  # what tokens have in common makes some experts popular
    block.gate.e_score_correction_bias.zero_()
    loads = []
    for _ in range(120):
        block(x).sum().backward()
        loads.append(int(block.gate.statistics.tokens_per_expert.max()))
        block.gate.update_bias(0.01)
    mean = 4 * 32 * 2 / 8
    assert loads[0] > 1.3 * mean
    assert loads[-1] < 1.1 * mean


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64])
def test_the_bias_stays_in_float32(cast):
    router = build(SIGMOID).gate
    exact = router.e_score_correction_bias.clone()
    router.to(cast)
    assert router.weight.dtype == cast
    assert router.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(router.e_score_correction_bias, exact)
    assert "e_score_correction_bias" in router.state_dict()
    router.to(device="meta", dtype=cast)
    assert router.e_score_correction_bias.is_meta and router.e_score_correction_bias.dtype == torch.float32
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(cast)
        assert Router(SIGMOID, RouterLosses(SIGMOID)).e_score_correction_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


# -- as part of a decoder


def test_meta_device_allocates_nothing_and_materialises_to_the_same_weights():
    with torch.device("meta"):
        decoder = Decoder(SIGMOID)
    assert all(tensor.is_meta for tensor in decoder.state_dict().values())
    for dtype in (torch.float32, torch.bfloat16):
        ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
        assert decoder.to(dtype)(ids).shape == (2, 9, 97)
    decoder.float().to_empty(device="cpu")
    for router in routers(decoder):
        router.e_score_correction_bias.fill_(float("nan"))  # as uninitialised memory may be
    decoder.reset_parameters()
    torch.testing.assert_close(decoder(token_ids()), Decoder(SIGMOID)(token_ids()), rtol=0, atol=0)


def test_copies_share_losses_among_their_own_routers_only():
    decoder = Decoder(SIGMOID)
    next_token_loss(decoder, token_ids()).backward()
    buffer = io.BytesIO()
    torch.save(decoder, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder)), torch.load(buffer, weights_only=False)]
    for other in copies:
        assert other.router_losses is not decoder.router_losses
        assert all(router.losses is other.router_losses for router in routers(other))
        assert torch.equal(other(token_ids()), decoder(token_ids()))
        other.router_losses.scale = 1.0
        next_token_loss(other, token_ids()).backward()
    assert decoder.router_losses.scale == 0.0
    assert routers(decoder)[0].statistics.sequences == 2


def test_autocast_keeps_the_router_exact():
    decoder = Decoder(SOFTMAX)
    seen = []
    routers(decoder)[0].register_forward_hook(lambda router, args, routing: seen.append(routing.logits.dtype))
    decoder.model.layers["0"].mlp.experts.register_forward_hook(lambda experts, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = decoder(token_ids())
    assert seen == [torch.float32, torch.bfloat16]
    logits.float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in decoder.parameters())
    assert (logits - decoder(token_ids())).abs().max() < 0.1 * logits.abs().max()


def test_modules_get_the_positional_arguments_that_parallelism_hooks():
    decoder = Decoder(SIGMOID)
    counts = {}
    for name, module in decoder.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: counts.update({name: len(args)}))
    decoder(token_ids())
    assert all(
        count == (2 if name.endswith("experts") and "shared" not in name else 1) for name, count in counts.items()
    )
    assert counts["model.layers.1.mlp.experts"] == 2


def test_experts_read_their_number_off_the_tensors():
    whole = Experts(8, 32, 16).double()
    for weight in whole.parameters():
        torch.nn.init.normal_(weight)
    share = Experts(8, 32, 16).double()
    for name, weight in whole.named_parameters():
        setattr(share, name, torch.nn.Parameter(weight.detach()[5:]))
    counts = torch.tensor([1, 0, 2, 3, 1, 2, 0, 4])
    tokens = torch.randn(13, 32, dtype=torch.float64)
    torch.testing.assert_close(share(tokens[7:], counts[5:]), whole(tokens, counts)[7:])


def test_trains():
    config = DecoderConfig.preset("tiny-moe", vocab_size=97, hidden_size=64, moe_intermediate_size=32)
    decoder = Decoder(config)
    decoder.router_losses.scale = 1 / 4
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
    ids = token_ids(4, 24)
    losses = []
    for _ in range(25):
        loss = next_token_loss(decoder, ids) / (4 * 23)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4 and losses[-1] < 1
