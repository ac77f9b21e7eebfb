"""What the callbacks need of Lightning beyond its public names. Read in Lightning 2.6.6."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


def dump_checkpoint(trainer: pl.Trainer, weights_only: bool) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` hands to the strategy. Collective under strategies that gather."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def checkpoint_folder(callback: ModelCheckpoint, trainer: pl.Trainer) -> str:
    """Where a ModelCheckpoint saves: its `dirpath`, or else what the loggers say."""
    return str(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
