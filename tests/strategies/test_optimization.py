"""Gradient norms, clipping and the order of a step: what one process computes, every layout computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from lightning.pytorch.loops.optimization.automatic import Closure, ClosureResult
from torch import Tensor, nn

from lightning_llm import Decoder, LLM3DStrategy
from lightning_llm.strategies.optimization import PipelineClosure, PipelineOptimization, gradient_norm
from lightning_llm.strategies.precision import LLMPrecision
from tests.distributed import full, run_distributed
from tests.strategies.training import BATCH_SIZE, SMALL, loader, make_module, make_trainer

TIED = SMALL.replace(tie_word_embeddings=True)
TP2 = {"tensor_parallel_size": 2}
PP2 = {"pipeline_parallel_size": 2}
MAX_NORM = 0.05
MAX_VALUE = 1e-3
CLIPPING: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": MAX_NORM},
    "value": {"gradient_clip_val": MAX_VALUE, "gradient_clip_algorithm": "value"},
}


class Gradients(Callback):
    """Keeps the batch, the norm before clipping, and the gradients after it."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen["norm"] = float(trainer.strategy.gradient_norm())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.seen["batch"] = batch
        named = module.named_parameters()
        self.seen["gradients"] = {name.removeprefix("model."): full(p.grad) for name, p in named if p.grad is not None}


def one_step(world_size: int, sizes: dict[str, Any], tied: bool) -> dict[str, Any]:
    """For each way of clipping: the norm before it, what was logged, the gradients after it."""
    seen = {}
    for algorithm, options in CLIPPING.items():
        strategy, collected = LLM3DStrategy(**sizes), Gradients()
        trainer = make_trainer(
            strategy,
            world_size,
            callbacks=[collected],
            max_steps=1,
            precision="64-true",
            limit_val_batches=0,
            **options,
        )
        trainer.fit(make_module(TIED if tied else SMALL), loader(trainer, strategy))
        logged = float(trainer.callback_metrics["grad_norm"])
        seen[algorithm] = collected.seen | {"logged": logged, "data_rank": trainer.distributed_sampler_kwargs["rank"]}
    return seen


def plain_torch(tied: bool, batches: list[dict[str, Tensor]]) -> Decoder:
    """The same model after the backward of the same sequences, without Lightning and without any strategy."""
    model = Decoder(TIED if tied else SMALL).double()
    model.reset_parameters(seed=0)
    batch = {name: torch.cat([part[name] for part in batches]) for name in ("input_ids", "labels")}
    assert len(batch["labels"]) == BATCH_SIZE
    F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten()).backward()
    return model


@pytest.mark.parametrize(
    ("sizes", "tied"),
    [
        pytest.param({**TP2, **PP2}, True, id="pp2 x tp2, tied"),
        pytest.param(TP2, False, id="dp2 x tp2"),
        pytest.param({**PP2, "replicate_size": 2}, True, id="pp2 x replicate2, tied"),
    ],
)
def test_norm_and_clipping_are_those_of_plain_torch(sizes: dict[str, Any], tied: bool) -> None:
    results = run_distributed(one_step, 4, 4, sizes, tied)
    clip: dict[str, Callable[[Any], Any]] = {
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, MAX_NORM),
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, MAX_VALUE),
    }
    for algorithm, clipper in clip.items():
        batch_of = {result[algorithm]["data_rank"]: result[algorithm]["batch"] for result in results}
        model = plain_torch(tied, list(batch_of.values()))
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        assert norm > 2 * MAX_NORM, "clipping must have something to do"
        clipper(model.parameters())
        expected = {name: p.grad for name, p in model.named_parameters(remove_duplicate=False)}
        unseen = set(expected) - ({"lm_head.weight"} if tied else set())
        for result in results:
            seen = result[algorithm]
            assert seen["norm"] == pytest.approx(norm, rel=1e-6)
            assert seen["logged"] == pytest.approx(norm, rel=1e-6)
            for name, gradient in seen["gradients"].items():
                assert (gradient - expected[name]).norm() <= 1e-6 * expected[name].norm(), (algorithm, name)
            unseen -= set(seen["gradients"])
        assert not unseen, "every parameter was compared"


def test_clipping_is_that_of_torch() -> None:
    for max_norm in (0.5, 100.0):
        ours, theirs = (nn.Parameter(torch.zeros(3)) for _ in range(2))
        ours.grad, theirs.grad = torch.tensor([1.0, -2.0, 2.0]), torch.tensor([1.0, -2.0, 2.0])
        plugin = LLMPrecision("32-true")
        plugin.attach(lambda: None, lambda _: torch.tensor(3.0))
        plugin.clip_grad_by_norm(torch.optim.SGD([ours]), max_norm)
        nn.utils.clip_grad_norm_([theirs], max_norm)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_squares_of_low_precision_gradients_are_summed_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.1)
    norm = gradient_norm([parameter], 1, torch.device("cpu"))
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(float(parameter.grad.double().norm()), rel=2**-8)
    assert gradient_norm([nn.Parameter(torch.zeros(2))], 1, torch.device("cpu")) == 0, "without gradients"


def order_of(kind: type[Closure]) -> list[str]:
    calls: list[str] = []

    def step() -> ClosureResult:
        calls.append("step")
        assert torch.is_grad_enabled()
        return ClosureResult.from_training_step_output(torch.tensor(2.0, requires_grad=True), 1)

    with torch.no_grad():  # as optimizers call a closure
        loss = kind(step, lambda _: calls.append("backward"), lambda: calls.append("zero"))()
    assert float(loss) == 2.0
    return calls


def test_gradients_are_zeroed_before_a_pipelines_step() -> None:
    assert order_of(PipelineClosure) == ["zero", "step", "backward"]
    # What makes it necessary: if Lightning ever changes its order, PipelineOptimization can go.
    assert order_of(Closure) == ["step", "zero", "backward"]


def test_within_an_accumulation_nothing_is_zeroed() -> None:
    calls: list[str] = []

    def step() -> ClosureResult:
        calls.append("step")
        return ClosureResult.from_training_step_output(torch.tensor(1.0), 2)

    PipelineClosure(step, lambda _: calls.append("backward"), None)()
    assert calls == ["step", "backward"]


def test_the_loop_is_swapped_once_and_keeps_its_progress() -> None:
    trainer = make_trainer("auto", 1)
    epoch_loop = trainer.fit_loop.epoch_loop
    before = epoch_loop.automatic_optimization
    before.optim_progress.optimizer.step.total.completed = 7
    PipelineOptimization.install(trainer)
    installed = epoch_loop.automatic_optimization
    assert type(installed) is PipelineOptimization
    assert installed.optim_progress is before.optim_progress and trainer.global_step == 7
    PipelineOptimization.install(trainer)
    assert epoch_loop.automatic_optimization is installed
