"""`Preemption`: a run that is told to stop saves a checkpoint, at the same step on all ranks, and exits with 75.

Schedulers send a signal some time before they take a machine away. Often one process alone gets it.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_llm.callbacks._lightning import (
    checkpoint_folder,
    end_run,
    keep_signals_from_lightning,
    kill_children,
    log_step,
    return_signals_to_lightning,
    run_last,
)
from lightning_llm.callbacks.agreement import Reading, maximum_over_ranks
from lightning_llm.callbacks.checkpoint import AsyncDistributedCheckpoint
from lightning_llm.errors import CheckpointError, ConfigurationError, PreemptedError


class Preemption(Callback):
    """On SIGTERM or SIGUSR1: saves at the end of the step and ends the run with exit code 75, "queue it again".

    The handler does nothing but note the signal. At the end of each optimizer step one all-reduce tells all ranks
    whether any of them has got one, so they stop at the same step even where one process alone was told. On CUDA the
    answer is read a step later, without waiting for the device. A validation that is under way is finished first.

    The checkpoint is `AsyncDistributedCheckpoint`'s if there is one in the trainer: committed and verified, in its
    folder, found by `fit(ckpt_path="last")`; a save that is under way is finished before. With another
    `ModelCheckpoint`, or none, it is `Trainer.save_checkpoint`'s. If it cannot be saved the run ends all the same.

    While a fit goes on this takes the place of Lightning's own handlers, Slurm's requeueing among them, which deadlock
    where not all ranks get the signal at once. Ctrl-C stays as it is. A second signal ends the process as it would
    without this callback, once Python gets to run: a process that hangs in a collective must be killed.

    Args:
        signals: Names, such as "SIGTERM".
        every_n_steps: Ask after so many optimizer steps.
        debounce: Seconds in which further signals count as the first one: a scheduler that signals all processes, and
            a launcher that hands the signal on, reach a process twice.

    Attributes:
        received: The signal that this process has got, if it has.

    Raises:
        ConfigurationError: A signal that does not exist or cannot be caught, or a number out of its range.
    """

    def __init__(
        self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), every_n_steps: int = 1, debounce: float = 3.0
    ) -> None:
        if every_n_steps < 1 or debounce < 0:
            raise ConfigurationError(
                f"Preemption(every_n_steps={every_n_steps}, debounce={debounce}): they must be at least 1 and 0."
            )
        self.signals = [_signal_named(name) for name in signals]
        self.every_n_steps = every_n_steps
        self.debounce = debounce
        self.received: signal.Signals | None = None
        self._since = 0.0
        self._process = 0
        self._trainer: pl.Trainer | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._last_step = 0
        self._asked: Reading | None = None

    # -- signals --

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        run_last(self, trainer)  # what it saves is to have all that others did at the end of the step
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preemption catches no signals: Python allows that in the main thread alone.")
            return
        self._restore_handlers()
        self.received, self._process, self._trainer = None, os.getpid(), trainer
        keep_signals_from_lightning(trainer)
        self._before = {signum: signal.signal(signum, self._note) for signum in self.signals}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """The handler: no collective, no lock, nothing that the interrupted code may be in the middle of."""
        if os.getpid() != self._process:  # a forked worker, which has inherited it
            _end_by(signum)
        elif self.received is None:
            self.received, self._since = signal.Signals(signum), time.monotonic()
            os.write(2, f"{self.received.name}: stopping after this step\n".encode())
        elif time.monotonic() - self._since > self.debounce:
            if self._trainer is not None:
                kill_children(self._trainer)
            _end_by(signum)

    def _restore_handlers(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        if self._trainer is not None:
            return_signals_to_lightning(self._trainer)
            self._trainer = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore_handlers()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    # -- stopping together --

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_step = trainer.global_step
        self._asked = None

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = step
        if step % self.every_n_steps or step == trainer.max_steps:  # at its end it may end
            return
        before, self._asked = self._asked, self._ask(trainer)
        if not self._asked.costs_a_wait:
            before, self._asked = self._asked, None
        if before is not None and before.value():
            log_step(trainer)
            self._stop(trainer)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.global_step != trainer.max_steps:
            if self._ask(trainer).value():
                self._stop(trainer)

    def _ask(self, trainer: pl.Trainer) -> Reading:
        told = int(self.received is not None)
        return Reading(maximum_over_ranks(torch.full((), told, device=trainer.strategy.root_device)))

    def _stop(self, trainer: pl.Trainer) -> NoReturn:
        why = self.received.name if self.received is not None else "Another rank was told to stop"
        try:
            saved = f"saved {_save(trainer)}"
        except (CheckpointError, OSError) as error:
            saved = f"nothing was saved: {error}"
        ending = PreemptedError(f"{why}: stopped after step {trainer.global_step}, {saved}")
        end_run(trainer, ending, logging.WARNING)


def _save(trainer: pl.Trainer) -> str:
    """Saves with what the trainer has for it; returns where. Collective."""
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and not c.save_weights_only]
    for saver in savers:
        if isinstance(saver, AsyncDistributedCheckpoint):
            return saver.save_now(trainer)
    if not savers:
        path = Path(trainer.default_root_dir) / f"preempted-step={trainer.global_step}.ckpt"
    else:  # a name that Lightning finds by fit(ckpt_path="last")
        name = f"{savers[0].CHECKPOINT_NAME_LAST}-preempted-step={trainer.global_step}{savers[0].FILE_EXTENSION}"
        path = Path(checkpoint_folder(savers[0], trainer)) / name
    trainer.save_checkpoint(path)
    return str(path)


def _signal_named(name: str) -> signal.Signals:
    try:
        signum = signal.Signals[name]
    except KeyError:
        raise ConfigurationError(f"There is no signal {name!r} here. Use names such as SIGTERM and SIGUSR1.") from None
    if signum in (signal.SIGKILL, signal.SIGSTOP):
        raise ConfigurationError(f"{name} cannot be caught. Use SIGTERM, SIGUSR1 or SIGUSR2.")
    return signum


def _end_by(signum: int) -> None:
    """Ends this process as the signal does when nobody catches it."""
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
