"""What users do beside the straight path: evaluate first, freeze, fit again, optimize by hand, bring odd modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_llm import LLMModule
from tests.distributed import run_distributed
from tests.strategies.test_parity import CP2, EP2, MODELS, PP2, TP2
from tests.strategies.training import (
    SMALL,
    VOCAB,
    Recorder,
    TokenRows,
    loader,
    make_module,
    make_strategy,
    make_trainer,
    on_deepspeed,
)


def evaluate_then_fit(world_size: int, sizes: dict[str, Any], first: str) -> list[float]:
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=4, limit_val_batches=1)
    module = make_module(MODELS["moe" if "expert_parallel_size" in sizes else "tied"])
    if first:
        getattr(trainer, first)(module, loader(trainer, strategy, rows=8))
    trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return [*recorder.losses, *recorder.grad_norms]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"zero_stage": 0}, id="ZeRO-0"),
        pytest.param({"zero_stage": 2}, id="ZeRO-2"),
        pytest.param({}, id="ZeRO-3"),
        pytest.param(on_deepspeed(0), id="DeepSpeed ZeRO-0", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(1), id="DeepSpeed ZeRO-1", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(2, **EP2), id="DeepSpeed ep2 ZeRO-2", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(3), id="DeepSpeed ZeRO-3"),
        pytest.param(on_deepspeed(1, **PP2), id="DeepSpeed pp2", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("first", ["validate", "predict"])
def test_an_evaluation_before_changes_nothing(sizes: dict[str, Any], first: str) -> None:
    expected = run_distributed(evaluate_then_fit, 2, 2, sizes, "")
    assert run_distributed(evaluate_then_fit, 2, 2, sizes, first) == expected


def fit_on_from_a_checkpoint(world_size: int, sizes: dict[str, Any], folder: Path, same: bool) -> list[float]:
    """Fits, saves, and goes on from there: with the same trainer, or with a new one."""
    recorders = []
    trainer: Any = None
    for steps, path in ((3, None), (6, folder / "ckpt")):
        strategy, recorder = make_strategy(sizes), Recorder()
        if trainer is None or not same:
            trainer = make_trainer(strategy, world_size, max_steps=steps, limit_val_batches=0)
            module = make_module(schedule="constant")
        trainer.callbacks.append(recorder)
        trainer.fit_loop.epoch_loop.max_steps = steps
        trainer.fit(module, loader(trainer, trainer.strategy), ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(folder / "ckpt")
        trainer.callbacks.remove(recorder)
        recorders.append(recorder)
    return recorders[1].losses


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(2, {}, id="dp2"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(2, on_deepspeed(0, **TP2), id="DeepSpeed tp2", marks=pytest.mark.slow),
        pytest.param(2, on_deepspeed(1, **PP2), id="DeepSpeed pp2", marks=pytest.mark.slow),
        pytest.param(2, on_deepspeed(2), id="DeepSpeed ZeRO-2", marks=pytest.mark.slow),
        pytest.param(2, on_deepspeed(3), id="DeepSpeed ZeRO-3"),
    ],
)
def test_a_second_fit_of_one_trainer_resumes_with_optimizer_states(
    tmp_path: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    anew = run_distributed(fit_on_from_a_checkpoint, world_size, world_size, sizes, tmp_path / "anew", False)
    same = run_distributed(fit_on_from_a_checkpoint, world_size, world_size, sizes, tmp_path / "same", True)
    assert len(anew[0]) == 3 and same == anew


def one_after_another(world_size: int, *layouts: dict[str, Any]) -> list[list[float]]:
    runs = []
    for sizes in layouts:
        strategy, recorder = make_strategy(sizes), Recorder()
        trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=4, limit_val_batches=0)
        trainer.fit(make_module(MODELS["tied"]), loader(trainer, strategy))
        runs.append(recorder.losses)
    return runs


@pytest.mark.slow
def test_trainers_in_one_process_do_not_see_each_other() -> None:
    """DeepSpeed keeps groups of ranks in global variables."""
    layouts = [
        on_deepspeed(0, **PP2),
        on_deepspeed(3),
        on_deepspeed(2, **TP2),
        on_deepspeed(3, replicate_size=4),
        on_deepspeed(3, **TP2),
        {**TP2, **PP2},
        on_deepspeed(1, **CP2),
        on_deepspeed(1, **TP2, **PP2),
        on_deepspeed(3, replicate_size=2),
    ]
    (expected,) = run_distributed(one_after_another, 1, 1, {})[0]
    for runs in run_distributed(one_after_another, 4, 4, *layouts):
        assert len(runs) == len(layouts)
        for losses in runs:
            assert losses == pytest.approx(expected, abs=1e-4)


class Frozen(LLMModule):
    """Trains nothing but embedding and head."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            assert self.model is not None
            self.model.model.layers.requires_grad_(False)
            assert self.model.model.norm is not None
            self.model.model.norm.requires_grad_(False)


class SeenGradients(Callback):
    names: set[str] = set()

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.names = {name for name, parameter in module.named_parameters() if parameter.grad is not None}


def train_frozen(world_size: int, sizes: dict[str, Any], model: str) -> dict[str, Any]:
    strategy, seen, recorder = make_strategy(sizes), SeenGradients(), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[seen, recorder], max_steps=3, limit_val_batches=0)
    module = Frozen(MODELS[model], learning_rate=5e-3, warmup_steps=1)
    trainer.fit(module, loader(trainer, strategy))
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {"gradients": seen.names, "trainable": trainable, "losses": recorder.losses, "norms": recorder.grad_norms}


@pytest.mark.parametrize(
    ("world_size", "sizes", "model"),
    [
        pytest.param(2, TP2, "qk_norm", id="tp2"),
        pytest.param(2, EP2, "moe", id="ep2"),
        pytest.param(4, {**TP2, **EP2}, "shared", id="dp2 x tp2 x ep2"),
        pytest.param(2, PP2, "tied", id="pp2 tied"),
        pytest.param(2, on_deepspeed(3), "tied", id="DeepSpeed ZeRO-3"),
        pytest.param(2, on_deepspeed(1, **EP2), "moe", id="DeepSpeed ep2", marks=pytest.mark.slow),
        pytest.param(4, on_deepspeed(1, **TP2, **PP2), "tied", id="DeepSpeed pp2 x tp2", marks=pytest.mark.slow),
        pytest.param(2, on_deepspeed(0, **TP2), "qk_norm", id="DeepSpeed tp2", marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_stays_frozen(world_size: int, sizes: dict[str, Any], model: str) -> None:
    ends = {"model.model.embed_tokens.weight", "model.lm_head.weight"}
    one = run_distributed(train_frozen, 1, 1, {}, model)[0]
    assert one["gradients"] == one["trainable"] == ends - ({"model.lm_head.weight"} if model == "tied" else set())
    for seen in run_distributed(train_frozen, world_size, world_size, sizes, model):
        assert seen["gradients"] <= ends and seen["trainable"] <= ends
        if "engine" not in sizes:  # DeepSpeed's ZeRO has gradients elsewhere
            assert seen["gradients"] == seen["trainable"]
        assert seen["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert seen["norms"] == pytest.approx(one["norms"], rel=1e-3)


class WithGain(LLMModule):
    def __init__(self) -> None:
        super().__init__(SMALL)
        self.gain = nn.Linear(VOCAB, 1)


class WithAnotherLoss(LLMModule):
    def __init__(self) -> None:
        super().__init__(SMALL)

    def forward_loss(self, batch: Any) -> Tensor:
        return super().forward_loss(batch) * 3


def fit(world_size: int, sizes: dict[str, Any], module_class: Any) -> None:
    strategy = make_strategy(sizes)
    trainer = make_trainer(strategy, world_size, max_steps=1, limit_val_batches=0)
    trainer.fit(module_class(), loader(trainer, strategy))


@pytest.mark.parametrize(
    ("sizes", "module_class", "message"),
    [
        ({}, WithGain, "parameters beside self.model, for example"),
        (PP2, WithAnotherLoss, r"Override loss\(\)"),
        (on_deepspeed(0, **TP2), WithGain, "parameters beside self.model, for example"),
        (on_deepspeed(0, **PP2), WithAnotherLoss, r"Override loss\(\)"),
    ],
)
def test_what_would_train_wrongly_is_refused(sizes: dict[str, Any], module_class: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=rf"ConfigurationError: .*{message}"):
        run_distributed(fit, 2, 2, sizes, module_class)


class FirstRowsIgnored(TokenRows):
    """The first batch of every window has no label that counts."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        if index % 8 < 4:
            row["labels"][:] = -100
        return row


def accumulate_over_nothing(world_size: int, sizes: dict[str, Any], accumulate: int) -> list[float]:
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(
        strategy,
        world_size,
        callbacks=[recorder],
        max_steps=3,
        limit_val_batches=0,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(make_module(), DataLoader(FirstRowsIgnored(), batch_size=8 // accumulate))
    return recorder.step_norms


@pytest.mark.parametrize(
    ("world_size", "sizes"),
    [
        pytest.param(1, {}, id="one process"),
        pytest.param(2, PP2, id="pp2"),
        pytest.param(2, on_deepspeed(0, **PP2), id="DeepSpeed pp2", marks=pytest.mark.slow),
        pytest.param(1, on_deepspeed(3), id="DeepSpeed ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_a_batch_without_labels_may_open_a_window(world_size: int, sizes: dict[str, Any]) -> None:
    expected = run_distributed(accumulate_over_nothing, 1, 1, {}, 1)[0]
    for norms in run_distributed(accumulate_over_nothing, world_size, world_size, sizes, 2):
        assert norms == pytest.approx(expected, rel=1e-3)


class ByHand(LLMModule):
    def __init__(self, model: str) -> None:
        super().__init__(MODELS[model], learning_rate=5e-3, warmup_steps=2)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = self.forward_loss(batch)
        self.log("train_loss", loss.detach(), sync_dist=True)
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.3, "norm")
        optimizer.step()


def train_by_hand(world_size: int, sizes: dict[str, Any], model: str) -> list[float]:
    strategy, recorder = make_strategy(sizes), Recorder()
    trainer = make_trainer(
        strategy, world_size, callbacks=[recorder], max_steps=4, limit_val_batches=0, gradient_clip_val=None
    )
    trainer.fit(ByHand(model), loader(trainer, strategy, ignore=False))
    return recorder.losses


@pytest.mark.parametrize(
    ("sizes", "model"),
    [
        pytest.param(TP2, "plain", id="tp2"),
        pytest.param(EP2, "moe", id="dp2 x ep2"),
        pytest.param(on_deepspeed(0, **TP2), "plain", id="DeepSpeed tp2", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(2, **EP2), "moe", id="DeepSpeed dp2 x ep2", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(3), "plain", id="DeepSpeed ZeRO-3", marks=pytest.mark.slow),
    ],
)
def test_manual_optimization_with_clipping(sizes: dict[str, Any], model: str) -> None:
    expected = run_distributed(train_by_hand, 1, 1, {}, model)[0]
    for losses in run_distributed(train_by_hand, 2, 2, sizes, model):
        assert losses == pytest.approx(expected, abs=1e-4)


class Plain(LightningModule):
    """No plan, blocks in a list on the module itself, and a part that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(16, VOCAB)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.embedding(batch["input_ids"])
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        loss = F.cross_entropy(self.head(x).flatten(0, 1), batch["input_ids"].flatten())
        self.log("train_loss", loss.detach(), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train_plain(world_size: int, sizes: dict[str, Any], precision: str, folder: Path | None) -> list[float]:
    losses = []
    for path in (None, folder) if folder is not None else (None,):
        torch.manual_seed(0)
        strategy, recorder, module = make_strategy(sizes), Recorder(), Plain()
        trainer = make_trainer(
            strategy, world_size, callbacks=[recorder], precision=precision, max_steps=3 if path is None else 5
        )
        trainer.fit(module, loader(trainer, strategy), ckpt_path=path)
        if path is None and folder is not None:
            trainer.save_checkpoint(folder)
        losses += recorder.losses
    return losses


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="dp2"),
        pytest.param(on_deepspeed(1), id="DeepSpeed ZeRO-1", marks=pytest.mark.slow),
        pytest.param(on_deepspeed(3), id="DeepSpeed ZeRO-3"),
    ],
)
def test_a_module_with_a_list_and_an_unused_part_trains_and_resumes(tmp_path: Path, sizes: dict[str, Any]) -> None:
    expected = run_distributed(train_plain, 1, 1, {}, "32-true", tmp_path / "one")[0]
    for losses in run_distributed(train_plain, 2, 2, sizes, "32-true", tmp_path / "two"):
        assert len(losses) == 5 and losses == pytest.approx(expected, abs=1e-4)


def test_its_loss_is_in_float32_in_mixed_precision() -> None:
    exact = run_distributed(train_plain, 1, 1, {}, "32-true", None)[0]
    (mixed,) = run_distributed(train_plain, 1, 1, {}, "bf16-mixed", None)
    assert mixed == pytest.approx(exact, abs=0.02) and mixed != exact
