"""The configuration that a command line started a run with, for the checkpoint's folder. The strategies call it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

RUN_CONFIG = "config.yaml"


def write_run_config(trainer: Any, folder: Path) -> None:
    """Writes `config.yaml`, which `lightning-llm fit -c` takes; nothing where no LightningCLI made the trainer."""
    cli = sys.modules.get("lightning.pytorch.cli")  # slow to import, and without it no trainer is made by it
    for callback in trainer.callbacks if cli is not None else ():
        if isinstance(callback, cli.SaveConfigCallback):  # type: ignore[union-attr]
            callback.parser.save(callback.config, folder / RUN_CONFIG, skip_none=False, multifile=False)
