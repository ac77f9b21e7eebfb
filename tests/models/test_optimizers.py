"""Optimizers on one process against torch's own; which parameter gets which; the learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_llm import Decoder, DecoderConfig, LLMModule
from lightning_llm.errors import ConfigurationError
from lightning_llm.models.adamw import CastingAdamW
from lightning_llm.models.muon import Muon, orthogonalize
from lightning_llm.models.optimizers import (
    LearningRateFactor,
    LearningRateSchedule,
    OptimizerSettings,
    hidden_matrices,
)

STEPS = 5
MIXTURE = DecoderConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    n_shared_experts=1,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
    use_routing_bias=True,
    qk_norm=True,
)


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def descend(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], first: int = 0, last: int = STEPS) -> None:
    """Steps with gradients that depend on weights and step."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = (torch.randn(weight.shape, generator=generator) + 0.1 * weight.detach().float()).to(
                weight.dtype
            )
        optimizer.step()


def copies(weights: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(weight.detach().clone()) for weight in weights]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
def test_muon_is_torchs_muon_and_adamw_side_by_side(adjust_lr_fn: Any, nesterov: bool) -> None:
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours = parameters(*shapes, (40, 16), (16,))
    theirs = copies(ours)
    optimizer = Muon(
        [
            {"params": ours[:4], "use_muon": True, "lr": 0.02, "weight_decay": 0.1},
            {"params": ours[4:], "weight_decay": 0.2},
        ],
        lr=1e-2,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
    )
    muon = torch.optim.Muon(theirs[:4], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=adjust_lr_fn)
    adamw = torch.optim.AdamW(theirs[4:], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.2, fused=True)
    start = copies(ours)
    descend(optimizer, ours)
    descend(muon, theirs[:4])
    # The generator has given the first four their gradients when it comes to the others.
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for shape in shapes:
            torch.randn(shape, generator=generator)
        for weight in theirs[4:]:
            weight.grad = torch.randn(weight.shape, generator=generator) + 0.1 * weight.detach()
        adamw.step()
    for before, mine, expected in zip(start, ours, theirs, strict=True):
        moved = (expected - before).norm()
        assert moved > 0.05
        # Muon works in bfloat16, where one order of summation or another shows.
        assert (mine - expected).norm() <= (2e-2 if mine.shape in shapes else 0) * moved


def test_stacked_experts_are_orthogonalised_each_by_itself() -> None:
    (stacked,) = parameters((3, 24, 16), dtype=torch.float64)
    single = [nn.Parameter(expert.clone()) for expert in stacked.detach()]
    together = Muon([{"params": [stacked], "use_muon": True}], lr=0.02)
    apart = Muon([{"params": single, "use_muon": True}], lr=0.02)
    descend(together, [stacked])
    for step in range(STEPS):
        gradients = torch.randn(stacked.shape, generator=torch.Generator().manual_seed(step)).double()
        for weight, gradient in zip(single, gradients, strict=True):
            weight.grad = (gradient.float() + 0.1 * weight.detach().float()).double()
        apart.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([weight.detach() for weight in single]))


@pytest.mark.parametrize("shape", [(2, 12, 12), (2, 8, 30), (2, 30, 8)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    aligned = left.mT @ result @ right.mT
    torch.testing.assert_close(aligned, torch.diag_embed(aligned.diagonal(dim1=1, dim2=2)), atol=1e-9, rtol=0)
    assert orthogonalize(torch.zeros(shape)).count_nonzero() == 0


@pytest.mark.parametrize("tied", [False, True])
def test_muon_gets_what_is_between_hidden_states(tied: bool) -> None:
    decoder = Decoder(MIXTURE.replace(tie_word_embeddings=tied))
    hidden = {id(parameter) for parameter in hidden_matrices(decoder)}
    names = {name for name, parameter in decoder.named_parameters() if id(parameter) in hidden}
    projections = {f"self_attn.{x}_proj.weight" for x in "qkvo"}
    mlp = {f"{x}_proj" for x in ("gate", "up", "down")}
    expected = {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in projections}
    expected |= {f"model.layers.0.mlp.{name}.weight" for name in mlp}
    expected |= {f"model.layers.1.mlp.shared_experts.{name}.weight" for name in mlp}
    expected |= {f"model.layers.1.mlp.experts.{name}" for name in mlp}
    assert names == expected


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    decoder = Decoder(MIXTURE)
    for name in ("adamw", "muon"):
        optimizer = OptimizerSettings(optimizer=name, weight_decay=0.3).build(decoder)  # type: ignore[arg-type]
        grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert len(grouped) == len({id(parameter) for parameter in grouped})
        assert {id(parameter) for parameter in grouped} == {id(parameter) for parameter in decoder.parameters()}
        for group in optimizer.param_groups:
            assert {parameter.ndim > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}


def test_the_default_is_torchs_fused_adamw() -> None:
    decoder = Decoder(MIXTURE)
    optimizer = OptimizerSettings().build(decoder)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
    assert type(OptimizerSettings().build(decoder.double())) is torch.optim.AdamW
    assert type(OptimizerSettings().build(decoder.bfloat16())) is CastingAdamW, "torch's would store bfloat16"


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(x.nbytes for state in optimizer.state.values() for name, x in state.items() if name != "step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_moments_have_the_type_that_was_asked_for(dtype: torch.dtype) -> None:
    exact = parameters((32, 8), (8,), dtype=torch.float64)
    reference = torch.optim.AdamW(exact, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    descend(reference, exact)
    element = {torch.float32: 4, torch.bfloat16: 4, torch.float64: 8}[dtype]
    for state_dtype, size in ((torch.float32, element), (torch.bfloat16, 2)):
        weights = parameters((32, 8), (8,), dtype=dtype)
        optimizer = CastingAdamW(weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, state_dtype=state_dtype)
        descend(optimizer, weights)
        assert state_bytes(optimizer) == 2 * (32 * 8 + 8) * size
        rounding = 1e-2 if torch.bfloat16 in (dtype, state_dtype) else 1e-6
        for weight, expected in zip(weights, exact, strict=True):
            assert weight.dtype == dtype
            assert (weight - expected).norm() <= rounding * expected.norm()


def test_bfloat16_keeps_what_the_check_says_it_keeps() -> None:
    """An average that may be 2**-8 smaller always gets smaller; one of AdamW's usual 0.999 stays where it is."""
    values = torch.arange(1, 2, 2**-7).bfloat16()
    assert len(values.unique()) == 128
    assert ((values.float() * (1 - 2**-8)).bfloat16() < values).all()
    assert ((values.float() * 0.999).bfloat16() == values).all()


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_as_if_never_saved(state_dtype: torch.dtype) -> None:
    def make(weights: list[nn.Parameter]) -> Muon:
        groups = [{"params": weights[:1], "use_muon": True}, {"params": weights[1:]}]
        return Muon(groups, lr=1e-2, state_dtype=state_dtype)

    whole = parameters((16, 8), (8,))
    descend(make(whole), whole)
    weights = parameters((16, 8), (8,))
    before = make(weights)
    descend(before, weights, last=2)
    after = make(weights)
    after.load_state_dict(before.state_dict())
    kinds = {name: value.dtype for state in after.state.values() for name, value in state.items()}
    assert kinds == {
        "momentum_buffer": state_dtype,
        "exp_avg": state_dtype,
        "exp_avg_sq": state_dtype,
        "step": torch.float32,
    }
    descend(after, weights, first=2)
    for weight, expected in zip(weights, whole, strict=True):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer='sgd' must be one of adamw, muon"),
        ({"optimizer_state_dtype": "int8"}, "must be one of float32, bfloat16"),
        ({"optimizer": "muon", "adjust_lr_fn": "none"}, "must be one of match_rms_adamw, original"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"optimizer": "muon", "muon_learning_rate": -1.0}, "muon_learning_rate=-1.0 must be positive"),
        ({"muon_learning_rate": 0.02}, "no effect with optimizer='adamw'"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 must be at least 0 and below 1"),
        ({"optimizer": "muon", "momentum": 1.5}, "momentum=1.5 must be"),
        ({"optimizer_state_dtype": "bfloat16", "betas": (0.9, 0.999)}, r"1 - 0.999 = 0.001 .* at most 0.996"),
        ({"schedule": "linear"}, "schedule='linear' must be one of cosine, wsd, constant"),
    ],
)
def test_a_wrong_setting_is_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LLMModule("tiny", **arguments)


def test_the_learning_rate_over_a_run() -> None:
    def rates(schedule: Any) -> Tensor:
        factor = LearningRateFactor(schedule, warmup=10, total=110, minimum=0.1, decay_fraction=0.2)
        return torch.tensor([factor(step) for step in range(111)], dtype=torch.float64)

    for schedule in ("constant", "cosine", "wsd"):
        torch.testing.assert_close(rates(schedule)[:10], torch.arange(1, 11, dtype=torch.float64) / 10)
    assert (rates("constant")[10:] == 1).all()
    cosine = rates("cosine")
    assert cosine[10] == 1 and cosine[60] == pytest.approx(0.55) and cosine[110] == pytest.approx(0.1)
    assert (cosine[10:].diff() <= 0).all()
    wsd = rates("wsd")
    assert (wsd[10:89] == 1).all() and wsd[99] == pytest.approx(0.55) and wsd[110] == pytest.approx(0.1)


def test_a_schedule_goes_on_with_other_groups_than_it_was_saved_with() -> None:
    """As in a pipeline, where the first stage saves for all and has an embedding, which the second has not."""
    factor = LearningRateFactor("cosine", warmup=2, total=10, minimum=0.0, decay_fraction=0.2)
    three, two = ([{"params": parameters((2,)), "lr": 0.1 * (i + 1)} for i in range(n)] for n in (3, 2))
    saved = LearningRateSchedule(torch.optim.SGD(three), factor)
    for _ in range(4):
        saved.optimizer.step()
        saved.step()
    other = torch.optim.SGD(two)
    resumed = LearningRateSchedule(other, LearningRateFactor("cosine", 2, 10, 0.0, 0.2))
    for group, before in zip(other.param_groups, saved.optimizer.param_groups, strict=False):
        group["lr"] = before["lr"]  # as the optimizer's own state brings it along
    resumed.load_state_dict(saved.state_dict())
    assert resumed.get_last_lr() == saved.get_last_lr()[:2]
    for schedule in (saved, resumed):
        schedule.optimizer.step()
        schedule.step()
    assert resumed.get_last_lr() == saved.get_last_lr()[:2] == pytest.approx([0.1 * factor(5), 0.2 * factor(5)])
