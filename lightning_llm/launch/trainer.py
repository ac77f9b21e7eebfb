"""LightningCLI in a rank that the launcher has started: as many devices as there are ranks, and what lets it go on.

cli.py uses it for `fit`, `validate`, `test` and `predict`, launched or not.
"""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_llm.callbacks import Heartbeat, Preemption
from lightning_llm.resilience.environment import MONITOR_VARIABLE

CALLBACKS: tuple[type[Callback], ...] = (Heartbeat, Preemption)


class LaunchedCLI(LightningCLI):
    """LightningCLI; what it changes, it changes under `lightning-llm launch` alone.

    There the launcher says how many processes and nodes there are, the trainer has a `Heartbeat` and a `Preemption` if
    the file has none, and `fit` goes on from its newest checkpoint unless it is told from which.
    """

    @override
    def before_instantiate_classes(self) -> None:
        if MONITOR_VARIABLE in os.environ and self.subcommand == "fit":
            run = self.config[self.subcommand]
            run.ckpt_path = run.ckpt_path or "last"

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if MONITOR_VARIABLE not in os.environ:
            return super().instantiate_trainer(**kwargs)
        sizes = {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "num_nodes": int(os.environ["GROUP_WORLD_SIZE"])}
        trainer = super().instantiate_trainer(**{**kwargs, **sizes})
        there = trainer.callbacks  # type: ignore[attr-defined]
        there[:0] = [kind() for kind in CALLBACKS if not any(isinstance(callback, kind) for callback in there)]
        return trainer
