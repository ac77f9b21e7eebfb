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

from lightning_llm import LLM3DStrategy, LLMModule
from tests.distributed import run_distributed
from tests.strategies.test_parity import EP2, MODELS, PP2, TP2
from tests.strategies.training import SMALL, VOCAB, Recorder, TokenRows, loader, make_module, make_trainer


def evaluate_then_fit(world_size: int, sizes: dict[str, Any], first: str) -> list[float]:
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    trainer = make_trainer(strategy, world_size, callbacks=[recorder], max_steps=4, limit_val_batches=1)
    module = make_module()
    if first:
        getattr(trainer, first)(module, loader(trainer, strategy, rows=8))
    trainer.fit(module, loader(trainer, strategy), loader(trainer, strategy, rows=16))
    return [*recorder.losses, *recorder.grad_norms]


@pytest.mark.parametrize("sizes", [{"zero_stage": 0}, {"zero_stage": 2}, {}], ids=["ZeRO-0", "ZeRO-2", "ZeRO-3"])
@pytest.mark.parametrize("first", ["validate", "predict"])
def test_an_evaluation_before_changes_nothing(sizes: dict[str, Any], first: str) -> None:
    expected = run_distributed(evaluate_then_fit, 2, 2, sizes, "")
    assert run_distributed(evaluate_then_fit, 2, 2, sizes, first) == expected


def fit_on_from_a_checkpoint(world_size: int, sizes: dict[str, Any], folder: Path, same: bool) -> list[float]:
    """Fits, saves, and goes on from there: with the same trainer, or with a new one."""
    recorders = []
    trainer: Any = None
    for steps, path in ((3, None), (6, folder / "ckpt")):
        strategy, recorder = LLM3DStrategy(**sizes), Recorder()
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


@pytest.mark.parametrize(("world_size", "sizes"), [(2, {}), (2, PP2)], ids=["dp2", "pp2"])
def test_a_second_fit_of_one_trainer_resumes_with_optimizer_states(
    tmp_path: Path, world_size: int, sizes: dict[str, Any]
) -> None:
    anew = run_distributed(fit_on_from_a_checkpoint, world_size, world_size, sizes, tmp_path / "anew", False)
    same = run_distributed(fit_on_from_a_checkpoint, world_size, world_size, sizes, tmp_path / "same", True)
    assert len(anew[0]) == 3 and same == anew


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


def train_frozen(world_size: int, sizes: dict[str, Any], model: str) -> tuple[set[str], set[str]]:
    strategy, seen = LLM3DStrategy(**sizes), SeenGradients()
    trainer = make_trainer(strategy, world_size, callbacks=[seen], max_steps=2, limit_val_batches=0)
    module = Frozen(MODELS[model], learning_rate=5e-3)
    trainer.fit(module, loader(trainer, strategy))
    return seen.names, {name for name, parameter in module.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("world_size", "sizes", "model"),
    [(2, TP2, "qk_norm"), (2, EP2, "moe"), (4, {**TP2, **EP2}, "shared"), (2, PP2, "tied")],
    ids=["tp2", "ep2", "dp2 x tp2 x ep2", "pp2 tied"],
)
def test_what_is_frozen_stays_frozen(world_size: int, sizes: dict[str, Any], model: str) -> None:
    ends = {"model.model.embed_tokens.weight", "model.lm_head.weight"}
    for gradients, trainable in run_distributed(train_frozen, world_size, world_size, sizes, model):
        assert gradients <= ends and trainable <= ends and gradients == trainable


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
    strategy = LLM3DStrategy(**sizes)
    trainer = make_trainer(strategy, world_size, max_steps=1, limit_val_batches=0)
    trainer.fit(module_class(), loader(trainer, strategy))


@pytest.mark.parametrize(
    ("sizes", "module_class", "message"),
    [({}, WithGain, "parameters beside self.model, for example"), (PP2, WithAnotherLoss, r"Override loss\(\)")],
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
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
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


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {}), (2, PP2)], ids=["one process", "pp2"])
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
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    trainer = make_trainer(
        strategy, world_size, callbacks=[recorder], max_steps=4, limit_val_batches=0, gradient_clip_val=None
    )
    trainer.fit(ByHand(model), loader(trainer, strategy, ignore=False))
    return recorder.losses


@pytest.mark.parametrize(("sizes", "model"), [(TP2, "plain"), (EP2, "moe")], ids=["tp2", "dp2 x ep2"])
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


def train_plain(world_size: int, precision: str, folder: Path | None) -> list[float]:
    losses = []
    for path in (None, folder) if folder is not None else (None,):
        torch.manual_seed(0)
        strategy, recorder, module = LLM3DStrategy(), Recorder(), Plain()
        trainer = make_trainer(
            strategy, world_size, callbacks=[recorder], precision=precision, max_steps=3 if path is None else 5
        )
        trainer.fit(module, loader(trainer, strategy), ckpt_path=path)
        if path is None and folder is not None:
            trainer.save_checkpoint(folder)
        losses += recorder.losses
    return losses


def test_a_module_with_a_list_and_an_unused_part_trains_and_resumes(tmp_path: Path) -> None:
    expected = run_distributed(train_plain, 1, 1, "32-true", tmp_path / "one")[0]
    for losses in run_distributed(train_plain, 2, 2, "32-true", tmp_path / "two"):
        assert len(losses) == 5 and losses == pytest.approx(expected, abs=1e-4)


def test_its_loss_is_in_float32_in_mixed_precision() -> None:
    exact = run_distributed(train_plain, 1, 1, "32-true", None)[0]
    (mixed,) = run_distributed(train_plain, 1, 1, "bf16-mixed", None)
    assert mixed == pytest.approx(exact, abs=0.02) and mixed != exact
