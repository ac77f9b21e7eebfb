"""What this room asks of Lightning beyond its documented hooks; read in 2.6.6, held by tests/data/test_module.py.

`module.py` calls this.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lightning_llm.data.loader import TokenLoader
from lightning_llm.errors import ConfigurationError


def data_coordinates(trainer: Trainer | None) -> tuple[int, int]:
    """(number of data ranks, data rank of this process), as the strategy tells its samplers; (1, 0) without one."""
    wanted = None if trainer is None else trainer.distributed_sampler_kwargs
    return (int(wanted["num_replicas"]), int(wanted["rank"])) if wanted else (1, 0)


def resume_exactly(trainer: Trainer, loader: TokenLoader) -> None:
    """Make loader and Trainer agree on the place in the data, before the first batch of a resumed run.

    Two things would otherwise go wrong in silence:

    - A module that reads `trainer.estimated_stepping_batches` in `configure_optimizers` makes Lightning build the
      loader before it has read the checkpoint's place, which it then never loads (Lightning issue 20550).
    - Lightning counts batches, the place counts sequences. Resumed with another `accumulate_grad_batches` (or batch
      size), the old count would end the epoch at the wrong place, and optimizer steps within an accumulation.

    Does nothing unless the Trainer is about to go on from a checkpoint.

    Raises:
        ConfigurationError: the checkpoint's place is not at the end of a batch of the present size.
    """
    fit_loop = trainer.fit_loop
    if not fit_loop.restarting:
        return
    fit_loop._load_combined_loader_states()  # does nothing when they are loaded
    consumed = loader.sampler.resume_at
    done, rest = divmod(consumed, loader.batch_size)
    if rest:
        raise ConfigurationError(
            f"The checkpoint was saved after {consumed} sequences of its epoch, which is not at the end of a batch: "
            f"{consumed} / {loader.batch_size} sequences per batch leaves {rest}. Resume with the batch_size and "
            "accumulate_grad_batches that it was saved with."
        )
    count: Any = fit_loop.epoch_loop.batch_progress.current
    if done == 0 or count.ready in (0, done):
        return  # at the start of an epoch, or with batches of the same size
    unfinished = count.ready - count.completed  # 1 when it was saved at the end of a batch, within its hooks
    count.ready = count.started = count.processed = done
    count.completed = done - unfinished
