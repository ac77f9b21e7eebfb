"""Short runs with a checkpoint callback, and hands that reach into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_llm import LLM3DStrategy
from lightning_llm.callbacks import AsyncDistributedCheckpoint
from lightning_llm.checkpoint.folder import CLAIM
from tests.strategies.training import Recorder, loader, make_module, make_trainer
from tests.waiting import until

TP2 = {"tensor_parallel_size": 2}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != CLAIM)


def fit(
    callback: ModelCheckpoint, *others: Callback, world_size: int = 1, strategy: Any = None, **arguments: Any
) -> Any:
    """A run with `callback`; returns the trainer, and its losses by step."""
    ckpt_path, rows = arguments.pop("ckpt_path", None), arguments.pop("rows", 64)
    strategy = LLM3DStrategy(**(TP2 if world_size == 2 else {})) if strategy is None else strategy
    recorder = Recorder()
    defaults = {"max_steps": 8, "val_check_interval": 2, "enable_checkpointing": True}
    trainer = make_trainer(strategy, world_size, callbacks=[recorder, *others, callback], **{**defaults, **arguments})
    llm3d = strategy if isinstance(strategy, LLM3DStrategy) else None
    validation = loader(trainer, llm3d, rows=16) if trainer.val_check_interval else None
    trainer.fit(make_module(schedule="constant"), loader(trainer, llm3d, rows=rows), validation, ckpt_path=ckpt_path)
    return trainer, recorder.losses


# Every epoch is one and the same batch, so that Lightning, which does not keep a plain loader's place, cannot lose it.
ONE_BATCH = {"rows": 8, "val_check_interval": None}


class AtStep(Callback):
    """Does something after a step."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self.actions = actions

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.actions.get(trainer.global_step, lambda: None)()


def worker_of(callback: AsyncDistributedCheckpoint) -> int:
    assert callback._saver is not None
    until(lambda: callback._saver is not None and callback._saver.worker_pid is not None, 20.0)
    pid = callback._saver.worker_pid
    assert pid is not None
    return pid
