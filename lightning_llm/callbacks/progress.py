"""What a person sees while a run trains: steps of the whole run, loss and tokens per second.

A bar in a terminal; plain lines now and then where output goes to a file or a pipe.
"""

import math
import os
import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import Tensor
from typing_extensions import override

from lightning_llm.errors import ConfigurationError

# Shown whenever they are logged; other metrics are shown when they are logged with prog_bar=True.
_ALWAYS_SHOWN = ("train_loss", "val_loss", "tokens_per_second")
_LABELS = {"train_loss": "loss", "tokens_per_second": "tokens/s"}


class StepProgressBar(TQDMProgressBar):
    """Progress over the optimizer steps of the whole run, with loss, validation loss and tokens per second.

    Lightning's own bars count the batches of an epoch and write control codes into log files. This one counts
    `step/max_steps` (or the steps that `max_epochs` comes to), and where stdout is no terminal it prints a line at the
    first step, at the last, after each validation, and otherwise every `line_interval` seconds.

    `tokens_per_second` comes from the `Throughput` callback.

    Args:
        refresh_rate: In a terminal, optimizer steps between two updates of the bar; 0 shows nothing at all.
        line_interval: Where stdout is no terminal, seconds between two lines.

    Raises:
        ConfigurationError: `line_interval` is negative.
    """

    shows_train_loss = True  # by itself: `LLMModule` need not have Lightning tell it at every step

    def __init__(self, refresh_rate: int = 1, line_interval: float = 10.0) -> None:
        if line_interval < 0:
            raise ConfigurationError(f"StepProgressBar(line_interval={line_interval}): seconds cannot be negative")
        super().__init__(refresh_rate=refresh_rate)
        self.line_interval = line_interval
        self._terminal = True
        self._total: int | None = None
        self._first_step = 0
        self._last_step = 0
        self._started = 0.0
        self._last_line = -math.inf

    @property
    def is_enabled(self) -> bool:
        """Whether bars are drawn: false on all ranks but the first, and where stdout is no terminal."""
        return super().is_enabled and self._terminal

    @property
    def _prints_lines(self) -> bool:
        return super().is_enabled and not self._terminal

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._terminal = _stdout_is_terminal()

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What is shown beside the bar, formatted; a metric's name is its label, but for `loss` and `tokens/s`."""
        logged = trainer.callback_metrics
        metrics: dict[str, Any] = {name: logged[name] for name in _ALWAYS_SHOWN if name in logged}
        metrics.update(trainer.progress_bar_metrics)
        return {_LABELS.get(name, name): _format(value) for name, value in metrics.items()}

    @override
    def init_train_tqdm(self) -> Tqdm:
        return Tqdm(
            desc=self.train_description,
            total=self._total,
            initial=self._first_step,
            position=2 * self.process_position,
            disable=self.is_disabled,
            leave=True,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format="{desc} {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    @override
    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self._total = _total_steps(trainer)
        self._first_step = self._last_step = trainer.global_step
        self._started = time.monotonic()
        self._last_line = -math.inf
        super().on_train_start(trainer, *_)

    @override
    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        # The bar spans the run, so an epoch does not reset it.
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch}")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._last_step:  # gradients are still being accumulated
            return
        self._last_step = step
        is_last = step == self._total
        if self.is_enabled and (is_last or step % self.refresh_rate == 0):
            self.train_progress_bar.n = step
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))  # redraws, too
        elif self._prints_lines and (is_last or time.monotonic() - self._last_line >= self.line_interval):
            self._line(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.train_progress_bar.disable:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self._prints_lines and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._line(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # A bar left open would have the traceback written into its line.
        for bar in (self._train_progress_bar, self._val_progress_bar):
            if bar is not None:
                bar.close()

    @override
    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._prints_lines:
            print(*args, sep=sep, flush=True, **kwargs)
        else:
            super().print(*args, sep=sep, **kwargs)

    def _line(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints one line: `step 20/200 | loss 5.1234 | tokens/s 2,310 | 0:00:12 gone, 0:01:48 left`."""
        self._last_line = time.monotonic()
        gone = self._last_line - self._started
        clock = f"{_clock(gone)} gone"
        done = self._last_step - self._first_step
        if self._total is not None and done:
            clock += f", {_clock(gone / done * (self._total - self._last_step))} left"
        steps = f"step {self._last_step}" + (f"/{self._total}" if self._total is not None else "")
        shown = [f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()]
        print(" | ".join([steps, *shown, clock]), flush=True)


def _total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the run, or None when it has no end.

    Only reads what is known once training starts; `trainer.estimated_stepping_batches` may load data as a side effect.
    """
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(trainer.num_training_batches):
        limits.append(math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * trainer.max_epochs)
    return min(limits, default=None)


def _stdout_is_terminal() -> bool:
    """Whether stdout can show a bar: a terminal that moves its cursor and knows its width (a bare pty has width 0)."""
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return False
    return os.get_terminal_size(sys.stdout.fileno()).columns > 0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _format(value: Any) -> str:
    """Losses to four places, large figures with thousands, small ones (learning rates) in e-notation."""
    if isinstance(value, Tensor):
        value = value.item()
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < size < 1e-3 else f"{value:.4f}"
