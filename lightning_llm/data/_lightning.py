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
    """Make loader and Trainer agree on where a resumed run goes on: after the last finished optimizer step.

    Lightning stores the loader's place and its own counts of batches and epochs. Left alone, these go wrong in silence:

    - A run that ended within an epoch (`max_steps`, early stopping, a signal) counts that epoch as done: on resuming,
      the rest of it would be left out, and as many batches of the next.
    - With `max_steps`, a run that goes on from the end of an epoch would leave out the next epoch.
    - A place saved within a batch (by an exception) or an accumulation counts sequences whose gradients are lost.
    - With another `accumulate_grad_batches` (or batch size) the count of batches would end the epoch at the wrong place
      and optimizer steps within an accumulation.
    - A module that reads `trainer.estimated_stepping_batches` in `configure_optimizers` makes Lightning build the
      loader before it has read the place, which it then never loads (Lightning issue 20550).

    Called when the loader is built, and again before an epoch begins for the last case. Does nothing unless the Trainer
    is about to go on from a checkpoint.

    Raises:
        ConfigurationError: the place is not at the end of a batch of the present size.
    """
    fit_loop = trainer.fit_loop
    states = fit_loop._combined_loader_states_to_load if fit_loop.is_resuming else []
    if len(states) != 1 or "step_size" not in states[0]:
        return
    state, batches = states[0], fit_loop.epoch_loop.batch_progress
    count: Any = batches.current
    within_batch = count.ready > count.processed
    consumed = (state["consumed"] - within_batch) // state["step_size"] * state["step_size"]
    done, rest = divmod(consumed, loader.batch_size)
    if rest:
        raise ConfigurationError(
            f"The checkpoint was saved after {consumed} sequences of its epoch, which is not at the end of a batch: "
            f"{consumed} / {loader.batch_size} sequences per batch leaves {rest}. "
            "Resume with the batch_size that it was saved with."
        )
    if count.ready and (count.ready, state["consumed"]) != (done, consumed):
        # One less completed when it was saved by the hooks at the end of a batch: Lightning will complete that batch.
        unfinished = 0 if within_batch else count.processed - count.completed
        count.ready = count.started = count.processed = done
        count.completed = done - unfinished
    epochs: Any = fit_loop.epoch_progress
    counted_as_done = count.ready > 0 and epochs.current.processed == state["epoch"] + 1
    if counted_as_done and batches.is_last_batch:
        fit_loop._restarting = False  # a new epoch begins; its own setter would keep it, given max_steps
        fit_loop.epoch_loop.restarting = False
    elif counted_as_done:
        for counter in (epochs.total, epochs.current):
            counter.processed -= 1
            counter.completed = min(counter.completed, counter.processed)
        fit_loop.restarting = True  # it had found nothing unfinished to go on with
        fit_loop.update_restart_stage()
    states[0] = state | {"consumed": consumed}
    fit_loop._load_combined_loader_states()  # where Lightning has missed it; else it does this itself, a little later
