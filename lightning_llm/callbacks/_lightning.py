"""What the callbacks need of Lightning beyond its public names. Read in Lightning 2.6.6."""

from __future__ import annotations

import logging
import signal
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor

from lightning_llm.errors import EndOfRunError
from lightning_llm.strategies.launcher import ProcessLauncher

log = logging.getLogger(__name__)


def dump_checkpoint(trainer: pl.Trainer, weights_only: bool) -> dict[str, Any]:
    """What `Trainer.save_checkpoint` hands to the strategy. Collective under strategies that gather."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only)


def checkpoint_folder(callback: ModelCheckpoint, trainer: pl.Trainer) -> str:
    """Where a ModelCheckpoint saves: its `dirpath`, or else what the loggers say."""
    return str(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


def log_step(trainer: pl.Trainer) -> None:
    """Gives the loggers this step's metrics, as the loop does behind the hook `on_train_batch_end`."""
    trainer._logger_connector.update_train_step_metrics()


def metrics_of_last_batch(trainer: pl.Trainer) -> dict[str, Tensor]:
    """What `self.log` was given until the batch before this one, as it is, on its device; not to be changed.

    `trainer.callback_metrics` would also turn what the progress bar shows into numbers, for which the host waits.
    """
    return trainer._logger_connector._callback_metrics


def run_last(callback: Callback, trainer: pl.Trainer) -> None:
    """Has a callback's hooks called after those of all others, from the next hook on."""
    # A new list: Lightning may be iterating over the present one.
    trainer.callbacks = [other for other in trainer.callbacks if other is not callback] + [callback]  # type: ignore[attr-defined]


def keep_signals_from_lightning(trainer: pl.Trainer) -> None:
    """Until `return_signals_to_lightning`, Lightning installs no signal handlers and does not ask for signals.

    Its handler for SIGTERM broadcasts where the signal finds the process: unless all ranks get it between the same two
    collectives, the run hangs (Lightning issue 20806). And where there are several ranks, it asks rank 0 before each
    batch whether it has got one, for which the host waits for the device.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def return_signals_to_lightning(trainer: pl.Trainer) -> None:
    """Undoes `keep_signals_from_lightning`. Idempotent."""
    vars(trainer._signal_connector).pop("register_signal_handlers", None)
    vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)


def release_children(trainer: pl.Trainer) -> None:
    """All ranks are about to exit with the same code, and the first one's is the run's.

    Lightning's observer kills the main process with SIGKILL when a child's exit code is not 0; ours hands it on.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher) and not isinstance(launcher, ProcessLauncher):
        launcher.procs.clear()  # the list that the observer looks at


def end_run(trainer: pl.Trainer, error: EndOfRunError, level: int = logging.ERROR) -> NoReturn:
    """Says once why the run ends, and ends it, on all ranks alike."""
    if trainer.is_global_zero:
        log.log(level, error.message)
    release_children(trainer)
    raise error


def kill_children(trainer: pl.Trainer) -> None:
    """Ends the ranks that this process has started, if it has."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
