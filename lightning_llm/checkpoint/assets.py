"""What lies beside the tensors in a checkpoint, to use them without the run. Strategies and callbacks ask."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN_CONFIG = "config.yaml"


def module_assets(trainer: Any) -> Callable[[Path], None]:
    """What writes into a folder: all that the trainer's module wants there, and the run's configuration.

    A module wants something if it has a method `write_assets(folder)`, as `LLMModule` has.
    """

    def write_assets(folder: Path) -> None:
        write = getattr(trainer.lightning_module, "write_assets", None)
        if callable(write):
            write(folder)
        _write_run_config(trainer, folder)

    return write_assets


def _write_run_config(trainer: Any, folder: Path) -> None:
    """Writes `config.yaml`, which `lightning-llm fit -c` takes; nothing where no LightningCLI made the trainer."""
    cli = sys.modules.get("lightning.pytorch.cli")  # slow to import, and without it no trainer is made by it
    for callback in trainer.callbacks if cli is not None else ():
        if isinstance(callback, cli.SaveConfigCallback):  # type: ignore[union-attr]
            callback.parser.save(callback.config, folder / RUN_CONFIG, skip_none=False, multifile=False)
