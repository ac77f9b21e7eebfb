"""Modules with parameters, buffers and optimizers of every kind: each is saved, and goes on bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_llm import LLM3DStrategy
from lightning_llm.checkpoint.reading import Checkpoint
from tests.checkpoint.stories import equal
from tests.distributed import full, run_distributed
from tests.strategies.training import VOCAB, Recorder, TokenRows, make_trainer

WIDTH = 5  # divides among no number of ranks
SAVED, LAST = 2, 5


class Net(nn.Module):
    """A language model of odd parts, without a plan."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.narrow = nn.Linear(WIDTH, 1)  # one row, and a bias of one element: most ranks have nothing of them
        self.head = nn.Linear(WIDTH, VOCAB)
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(3))
        self.late = nn.Parameter(torch.ones(WIDTH))  # without a gradient in the first steps
        # Without a dim where there is one process; FSDP refuses to shard that.
        self.temperature = nn.Parameter(torch.ones([1] * (torch.distributed.get_world_size() > 1)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(VOCAB, dtype=torch.bool))
        self.register_buffer("mask", torch.ones(WIDTH), persistent=False)
        self.register_buffer("empty", torch.empty(0, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.mask
        for layer in self.layers:
            x = x + layer(x).relu()
        x = x + self.frozen(x) + self.narrow(x)
        if self.steps > SAVED:
            x = x * self.late
        self.steps += 1
        self.seen[self.steps] = True
        return self.head(x) / self.temperature


class Odd(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1).float(), batch["labels"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Two(Odd):
    """Two optimizers of different kinds, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> Any:
        layers = list(self.model.layers.parameters())
        others = [p for p in self.parameters() if not any(p is layer for layer in layers)]
        return [torch.optim.SGD(layers, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)]


class Groups(Odd):
    """One optimizer with several groups of parameters, a scheduler, and a learning rate that is a tensor."""

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.parameters() if p.ndim > 1 and p.requires_grad]
        others = [p for p in self.parameters() if p.ndim <= 1 and p.requires_grad]
        groups = [{"params": decayed, "weight_decay": 0.1, "lr": torch.tensor(0.02)}, {"params": others, "lr": 0.01}]
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Unoptimized(Odd):
    """Nothing is optimized: statistics are gathered."""

    def configure_optimizers(self) -> None:
        return None


class Smallest(Odd):
    """One number, of which only one rank has something."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1, bias=False)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(batch["labels"].float().mean().view(1, 1) / VOCAB).square().mean()


MODULES = {"odd": Odd, "two optimizers": Two, "groups": Groups, "unoptimized": Unoptimized, "smallest": Smallest}


def fit(
    world_size: int,
    sizes: dict[str, Any],
    name: str,
    steps: int,
    resume: Path | None,
    save: Path | None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(3 if resume is None else 4)  # what is loaded must not be what was there anyway
    strategy, recorder = LLM3DStrategy(**sizes), Recorder()
    trainer = make_trainer(
        strategy, world_size, callbacks=[recorder], limit_val_batches=0, gradient_clip_val=None, **options
    )
    module = MODULES[name]()
    trainer.fit_loop.epoch_loop.max_steps = steps * (2 if name == "two optimizers" else 1)
    rows = TokenRows(4 * world_size, ignore=False)  # a batch is an epoch, since a DataLoader has no place to go on from
    trainer.fit(module, DataLoader(rows, batch_size=4), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return {
        "losses": recorder.losses,
        "weights": {key: full(value).detach().clone() for key, value in module.state_dict().items()},
        "kinds": {key: value.dtype for key, value in module.state_dict().items()},
        "rates": [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups],
    }


def story(world_size: int, sizes: dict[str, Any], name: str, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A run that is saved at SAVED, as it ends at LAST when it is not interrupted, and as it goes on."""
    fit(world_size, sizes, name, SAVED, None, folder / "saved", **options)
    return {
        "whole": fit(world_size, sizes, name, LAST, None, None, **options),
        "resumed": fit(world_size, sizes, name, LAST, folder / "saved", None, **options),
        "loaded": fit(world_size, sizes, name, SAVED, folder / "saved", folder / "again", **options),
    }


def content(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder, alone=True)
    return {name: checkpoint.read(name) for name in checkpoint.tensors} | {"values": checkpoint.values}


@pytest.mark.parametrize(
    ("world_size", "sizes", "name", "options"),
    [
        pytest.param(1, {}, "odd", {}, id="one process"),
        pytest.param(3, {}, "odd", {}, id="dp3"),
        pytest.param(2, {"zero_stage": 0}, "odd", {}, id="dp2, ZeRO-0"),
        pytest.param(4, {"replicate_size": 2}, "odd", {}, id="hybrid", marks=pytest.mark.slow),
        pytest.param(2, {}, "two optimizers", {}, id="dp2, two optimizers"),
        pytest.param(2, {}, "groups", {}, id="dp2, groups"),
        pytest.param(2, {}, "odd", {"precision": "bf16-true"}, id="dp2, bf16-true"),
    ],
)
def test_every_kind_is_saved_and_goes_on(
    tmp_path: Path, world_size: int, sizes: dict[str, Any], name: str, options: dict[str, Any]
) -> None:
    for rank in run_distributed(story, world_size, world_size, sizes, name, tmp_path, options, timeout=200):
        whole, resumed = rank["whole"], rank["resumed"]
        assert len(whole["losses"]) == LAST and len(resumed["losses"]) == LAST - SAVED
        assert resumed["losses"] == whole["losses"][SAVED:]
        assert resumed["kinds"] == whole["kinds"] and resumed["rates"] == whole["rates"]
        assert equal(resumed["weights"], whole["weights"])
    saved, again = content(tmp_path / "saved"), content(tmp_path / "again")
    assert equal(saved, again)
    assert saved["model.model.steps"] == SAVED and saved["model.model.seen"].sum() == SAVED
    assert "model.model.mask" not in saved and saved["model.model.empty"].shape == (0, 4)
    moments = {key.split(".", 2)[2].rpartition(".")[0] for key in saved if key.startswith("optimizer") and "exp" in key}
    assert "model.temperature" in moments and not moments & {"model.late", "model.unused", "model.frozen.weight"}


def save_before_training(world_size: int, folder: Path, save: bool) -> dict[str, Any]:
    strategy, recorder = LLM3DStrategy(), Recorder()
    callbacks = [recorder, SaveAtStart(folder)] if save else [recorder]
    trainer = make_trainer(
        strategy, world_size, callbacks=callbacks, limit_val_batches=0, max_steps=3, gradient_clip_val=None
    )
    torch.manual_seed(3)
    module = Odd()
    rows = TokenRows(4 * world_size, ignore=False)
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return {"losses": recorder.losses, "steps": [float(s["step"]) for s in trainer.optimizers[0].state.values()]}


class SaveAtStart(pl.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder)


def test_a_save_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    """torch fills an optimizer's state by a step of its own."""
    expected = run_distributed(save_before_training, 2, 2, tmp_path / "start", False)
    assert run_distributed(save_before_training, 2, 2, tmp_path / "start", True) == expected
    resumed = run_distributed(fit, 2, 2, {}, "odd", 3, tmp_path / "start", None)
    assert [rank["losses"] for rank in resumed] == [rank["losses"] for rank in expected]


def test_without_an_optimizer(tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    for rank in run_distributed(story, 2, 2, {}, "unoptimized", tmp_path, options):
        assert len(rank["whole"]["losses"]) >= LAST and rank["whole"]["rates"] == []
    saved = content(tmp_path / "saved")
    assert saved["model.model.steps"] > 0 and not any(name.startswith("optimizer") for name in saved)


def test_a_rank_without_any_tensor(tmp_path: Path) -> None:
    for rank in run_distributed(story, 3, 3, {}, "smallest", tmp_path, {}):
        assert rank["resumed"]["losses"] == rank["whole"]["losses"][SAVED:]
    assert equal(content(tmp_path / "saved"), content(tmp_path / "again"))


def test_sizes_that_do_not_divide_in_other_numbers_of_ranks(tmp_path: Path) -> None:
    run_distributed(fit, 3, 3, {}, "odd", SAVED, None, tmp_path / "3")
    for before, after in ((3, 2), (2, 4)):
        run_distributed(fit, after, after, {}, "odd", SAVED, tmp_path / str(before), tmp_path / str(after))
        assert equal(content(tmp_path / str(before)), content(tmp_path / str(after)))
