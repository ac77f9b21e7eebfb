"""The same run in every layout: one loss curve, one gradient."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_llm import DecoderConfig, LLM3DStrategy
from tests.distributed import full, run_distributed
from tests.strategies.training import (
    BATCH_SIZE,
    SMALL,
    Recorder,
    TokenRows,
    loader,
    make_module,
    make_trainer,
    train,
)

TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
LAYOUTS: list[tuple[str, int, dict[str, Any]]] = [
    ("tp2", 2, TP2),
    ("pp2", 2, PP2),
    ("dp2", 2, {}),
    ("dp2 x tp2", 4, TP2),
    ("pp2 x dp2", 4, PP2),
    ("pp4", 4, {"pipeline_parallel_size": 4}),
    ("pp2 x tp2, whole sequence", 4, {**TP2, **PP2, "sequence_parallel": False}),
    ("replicate2 x shard2", 4, {"replicate_size": 2, "zero_stage": 2}),
    ("pp2 x dp2 x tp2", 8, {**TP2, **PP2}),
]
CONFIGS = {
    "plain": SMALL,
    "tied": SMALL.replace(tie_word_embeddings=True),
    "biases": SMALL.replace(attention_bias=True, attention_output_bias=True, mlp_bias=True),
    "qk_norm": SMALL.replace(qk_norm=True, model_type="qwen3"),
}


# Every layout with the plain model; the other models in the layouts where their peculiarity matters. The rest is for
# `make test-all`.
ESSENTIAL = {"tied": ("pp2", "pp2 x dp2 x tp2"), "biases": ("dp2 x tp2",), "qk_norm": ("dp2 x tp2",)}
CASES = [
    pytest.param(
        world_size,
        sizes,
        config_name,
        id=f"{layout}, {config_name}",
        marks=() if config_name == "plain" or layout in ESSENTIAL[config_name] else pytest.mark.slow,
    )
    for layout, world_size, sizes in LAYOUTS
    for config_name in CONFIGS
]


@pytest.fixture(scope="module")
def single() -> dict[str, dict[str, Any]]:
    """The reference: one process, by the strategy's own single-process path."""
    return {name: run_distributed(train, 1, 1, {}, config)[0] for name, config in CONFIGS.items()}


@pytest.mark.parametrize(("world_size", "sizes", "config_name"), CASES)
def test_loss_curve_is_that_of_one_process(
    single: dict[str, dict[str, Any]], world_size: int, sizes: dict[str, Any], config_name: str
) -> None:
    reference = single[config_name]
    assert reference["losses"][-1] < reference["losses"][0] - 0.3, "the reference must learn"
    for seen in run_distributed(train, world_size, world_size, sizes, CONFIGS[config_name]):
        assert seen["losses"] == pytest.approx(reference["losses"], abs=1e-4)
        assert seen["grad_norms"] == pytest.approx(reference["grad_norms"], rel=1e-3)
        assert seen["metrics"]["val_loss"] == pytest.approx(reference["metrics"]["val_loss"], abs=1e-4)
        assert seen["global_step"] == 20


def train_with_ddp(world_size: int) -> list[float]:
    recorder = Recorder()
    trainer = make_trainer("ddp", world_size, callbacks=[recorder])
    rows = DataLoader(TokenRows(), batch_size=BATCH_SIZE // world_size)
    trainer.fit(make_module(), rows)
    return recorder.losses


def test_lightnings_own_strategy_gives_the_same_curve(single: dict[str, dict[str, Any]]) -> None:
    for losses in run_distributed(train_with_ddp, 2, 2):
        assert losses == pytest.approx(single["plain"]["losses"], abs=1e-4)


class GradientsOfFirstStep(Callback):
    """Collects whole gradients, by parameter name, before they are clipped."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if not self.gradients:
            named = module.named_parameters()
            self.gradients = {name: full(p.grad).clone() for name, p in named if p.grad is not None}


def first_gradients(
    world_size: int, sizes: dict[str, Any], config: DecoderConfig, accumulate: int = 1, ignore: bool = True
) -> dict[str, Any]:
    strategy = LLM3DStrategy(**sizes)
    collected = GradientsOfFirstStep()
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[collected],
        max_steps=1,
        precision="64-true",
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    trainer.fit(make_module(config, warmup_steps=0), loader(trainer, strategy, accumulate, ignore=ignore))
    return collected.gradients


@pytest.mark.parametrize(("world_size", "sizes", "config_name"), CASES)
def test_gradients_are_those_of_one_process(world_size: int, sizes: dict[str, Any], config_name: str) -> None:
    config = CONFIGS[config_name]
    reference = run_distributed(first_gradients, 1, 1, {}, config)[0]
    seen: dict[str, torch.Tensor] = {}
    for gradients in run_distributed(first_gradients, world_size, world_size, sizes, config):
        seen |= gradients
    tied_copy = {"model.lm_head.weight"} if config.tie_word_embeddings else set()
    assert seen.keys() - tied_copy == reference.keys()
    for name, gradient in seen.items():
        expected = reference["model.model.embed_tokens.weight" if name in tied_copy else name]
        assert expected.dtype == torch.float64
        assert (gradient - expected).norm() <= 1e-6 * expected.norm(), name


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {}), (4, {**TP2, **PP2}), (4, PP2), (2, {})])
def test_accumulation_is_one_larger_batch(world_size: int, sizes: dict[str, Any]) -> None:
    """Without ignored labels the mean of the parts is the mean of the whole."""
    config = SMALL.replace(tie_word_embeddings=True)
    whole, parts = ({} for _ in range(2))
    for gradients in run_distributed(first_gradients, world_size, world_size, sizes, config, 1, False):
        whole |= gradients
    for gradients in run_distributed(first_gradients, world_size, world_size, sizes, config, 2, False):
        parts |= gradients
    assert whole.keys() == parts.keys()
    for name, gradient in parts.items():
        assert (gradient - whole[name]).norm() <= 1e-6 * whole[name].norm(), name
