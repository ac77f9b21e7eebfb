"""What DeepSpeed says of a run: its figures to the Trainer's loggers, what it prints to Lightning's log.

strategy.py puts it on an engine. What is private in DeepSpeed was read in 0.19.8.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info

PREFIX = "deepspeed/"

NO_NEWS = (
    # Said of every optimizer that is not DeepSpeed's or torch's Adam; optimizers.py knows which do not go with ZeRO.
    "You are using ZeRO with an untested optimizer",
    "Attempting to get learning rate from scheduler before it has started",  # as DeepSpeed's own do when they are made
)


def watch(engine: Any, trainer: pl.Trainer) -> None:
    """Connects an engine with the Trainer's loggers: its monitor's events, and the figures of its flops profiler.

    Args:
        engine: DeepSpeed's.
        trainer: Whose loggers get `deepspeed/Train/Samples/lr` and the like, every `log_every_n_steps` steps.
    """
    engine.monitor = LoggersMonitor(engine.monitor, trainer)
    profiler = getattr(engine, "flops_profiler", None)
    if profiler is not None:
        shown = profiler.print_model_profile

        def print_and_log(*args: Any, **kwargs: Any) -> None:
            shown(*args, **kwargs)
            log_figures(
                trainer,
                {
                    "flops_profiler/forward_flops": profiler.get_total_flops(),
                    "flops_profiler/forward_macs": profiler.get_total_macs(),
                    "flops_profiler/forward_seconds": profiler.get_total_duration(),
                    "flops_profiler/parameters": profiler.get_total_params(),
                },
            )

        profiler.print_model_profile = print_and_log


class LoggersMonitor:
    """In the place of an engine's monitor: writes events to the Trainer's loggers too.

    Args:
        monitor: DeepSpeed's, with the sinks that its configuration asks for ("tensorboard", "csv_monitor", ...).
        trainer: Whose loggers are written to.
    """

    def __init__(self, monitor: Any, trainer: pl.Trainer) -> None:
        self.monitor = monitor
        self.trainer = trainer
        self.enabled = monitor.enabled or bool(trainer.loggers)

    def write_events(self, events: list[tuple[str, Any, int]]) -> None:
        """Called by the engine on rank 0.

        Args:
            events: Names, values, and the number of samples by which DeepSpeed's own sinks count.
        """
        if self.monitor.enabled:
            self.monitor.write_events(events)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0:  # the step that ends now is not counted yet
            log_figures(self.trainer, {name: value for name, value, _ in events})


def log_figures(trainer: pl.Trainer, figures: dict[str, Any]) -> None:
    """Logs numbers under names of DeepSpeed's, in the row of the batch that is being trained on."""
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # Lightning logs by it
    for logger in trainer.loggers:
        logger.log_metrics({PREFIX + name: float(value) for name, value in figures.items()}, step=step)


@contextmanager
def printed(tell: Callable[[str], object] = rank_zero_info) -> Iterator[None]:
    """Has what is printed within it told instead, once it ends."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if said := text.getvalue().strip():
            tell(said)


@contextmanager
def printed_for_debugging() -> Iterator[None]:
    """Has what is printed within it go to DeepSpeed's own log, which shows it with `"log_level": "info"`."""
    with printed(logging.getLogger("DeepSpeed").info):
        yield


def quieten() -> None:
    """Ends what DeepSpeed says of itself and not of the run. Once it has taken up the processes."""
    import deepspeed.comm.comm

    # By the names that torch has for them since 2.13: under the old ones, each call of each place warns.
    backend = deepspeed.comm.comm.cdb
    if backend is not None and hasattr(dist, "all_gather_single"):
        backend.all_gather_function = dist.all_gather_single
        backend.reduce_scatter_function = dist.reduce_scatter_single
    logger = logging.getLogger("DeepSpeed")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not any(said in record.getMessage() for said in NO_NEWS)
