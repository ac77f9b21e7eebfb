"""An uninterrupted run that saves as it goes, and runs that go on from what it saved: what each of them saw.

All in one group of processes, so that they are started once.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from lightning_llm import DecoderConfig, LLMModule, TokenDataModule
from lightning_llm.callbacks import Throughput
from lightning_llm.checkpoint.pieces import Pieces
from lightning_llm.checkpoint.random_state import random_state
from tests.checkpoint.runs import CONFIG
from tests.distributed import full
from tests.strategies.training import make_strategy, make_trainer


@dataclass
class Saves:
    """ModelCheckpoint's arguments."""

    every_n_train_steps: int | None = None
    every_n_epochs: int | None = None
    save_on_train_epoch_end: bool | None = None
    monitor: str | None = None


@dataclass
class Story:
    """How a run is made; `module` and `trainer` are the arguments of these."""

    sizes: dict[str, Any] = field(default_factory=dict)
    config: DecoderConfig = CONFIG
    module: dict[str, Any] = field(default_factory=dict)
    num_workers: int = 0
    save: Saves = field(default_factory=lambda: Saves(every_n_train_steps=1))
    trainer: dict[str, Any] = field(default_factory=dict)


class MemoryLogger(Logger):
    """Keeps what is logged, without what the clock says."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, {k: v for k, v in metrics.items() if k not in ("tokens_per_second", "step_time")}))

    def log_hyperparams(self, *arguments: Any, **_: Any) -> None:
        pass


class Noisy(LLMModule):
    """Draws from all generators in every step; where no pipeline has run the backward already, it learns of it too."""

    def on_fit_start(self) -> None:
        data_rank = self.trainer.distributed_sampler_kwargs["rank"]
        random.seed(self.trainer.global_rank)
        np.random.seed(self.trainer.global_rank)
        torch.manual_seed(data_rank)  # ranks that share samples must share what changes the weights

    def _draw(self, name: str) -> torch.Tensor:
        noise = torch.rand(())
        self.log(f"{name}_draws", torch.tensor([random.random(), float(np.random.rand()), noise]).double().sum())
        return noise

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        noise = self._draw("train")
        loss = super().training_step(batch, batch_idx)
        return loss if self.trainer.strategy.pipeline is not None else loss * (1 + noise)

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> Any:
        self._draw("val")
        return super().validation_step(batch, batch_idx)


class Samples(Callback):
    """Keeps the tokens of every training batch."""

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: dict[str, torch.Tensor], index: int) -> None:
        self.seen.append(batch["input_ids"].tolist())


def story(
    folder: Path, corpus: Path, world_size: int, options: Story, steps: list[int], last: int
) -> dict[str | int, dict[str, Any]]:
    """The uninterrupted run to step `last`, as "whole", and the runs resumed from its checkpoints of `steps`."""
    saver = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **asdict(options.save))
    seen: dict[str | int, dict[str, Any]] = {"whole": fit(corpus, world_size, options, last, [saver])}
    for step in steps:
        seen[step] = fit(corpus, world_size, options, last, [], folder / f"step={step}.ckpt")
    return seen


def fit(
    corpus: Path, world_size: int, options: Story, last: int, callbacks: list[Callback], resume: Path | None = None
) -> dict[str, Any]:
    logger, samples = MemoryLogger(), Samples()
    arguments = {"max_steps": last, "val_check_interval": 2, "limit_val_batches": 1, **options.trainer}
    trainer = make_trainer(
        make_strategy(options.sizes),
        world_size,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[samples, Throughput(), LearningRateMonitor("step"), *callbacks],
        enable_checkpointing=bool(callbacks),
        **arguments,
    )
    if "val_check_interval" not in options.trainer:
        trainer.val_check_interval *= trainer.accumulate_grad_batches
    module = Noisy(options.config, learning_rate=3e-3, warmup_steps=2, **options.module)
    data = TokenDataModule(corpus, batch_size=8, seq_len=32, num_workers=options.num_workers)
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    (optimizer,) = trainer.optimizers
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return {
        "logged": logger.rows,
        "samples": samples.seen,
        "batches": (trainer.current_epoch, progress.ready, progress.completed),
        "global_step": trainer.global_step,
        "steps_per_epoch": data.steps_per_epoch,
        "weights": held(trainer.strategy.lightning_module_state_dict()),
        "optimizer": held(trainer.strategy.optimizer_state(optimizer)),
        "random_state": random_state(),
    }


def held(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of what a rank has of a state, whatever it has it in."""
    found = {}
    for name, value in state.items():
        if isinstance(value, Pieces):
            found[name] = [(piece.offsets, piece.tensor.clone()) for piece in value.pieces]
        else:
            found[name] = full(value).detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def equal(left: Any, right: Any) -> bool:
    """Whether two trees with tensors and arrays in them are the same."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)
