"""The training loop after a resume: nothing that was still to come is left out. Read in Lightning 2.6.6.

`LLM3DStrategy` puts it in the place of Lightning's own; tests/checkpoint/test_exact_resume.py holds it to that.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loops import evaluation_loop, training_epoch_loop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from typing_extensions import override


class ResumableEpochLoop(_TrainingEpochLoop):
    """Goes on right after the batch at whose end a checkpoint was saved.

    `ModelCheckpoint(every_n_train_steps=...)` saves at the end of a batch. A validation that is due after that batch
    comes after the save, and so does the end of the epoch with its hooks; on a resume Lightning counts both as done and
    leaves them out. Here the batch counts as completed, and the loop begins with what follows it.
    """

    _only_the_end_is_left = False  # of the epoch: no batch, no validation

    @classmethod
    def install(cls, trainer: Any) -> None:
        """Swaps it into the trainer's fit loop, with all that the loop there has. Idempotent."""
        before = trainer.fit_loop.epoch_loop
        if not isinstance(before, cls):
            loop = cls.__new__(cls)
            loop.__dict__ = before.__dict__
            trainer.fit_loop.epoch_loop = loop

    @override
    def update_restart_stage(self) -> None:
        super().update_restart_stage()
        fetcher = self.trainer.fit_loop._data_fetcher
        if fetcher is None or not self.restarted_on_train_batch_end:
            return
        validate, last = self._should_check_val_fx(fetcher), self.batch_progress.is_last_batch
        if validate or last:
            self.batch_progress.increment_completed()
            self._restart_stage = training_epoch_loop.RestartStage.RESTARTED_ON_LAST
        if validate:
            self.val_loop.batch_progress.reset_on_run()
            self.val_loop._restart_stage = evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION
        elif last:
            self._only_the_end_is_left = True
            self._batches_that_stepped += 1  # what `on_advance_end` would have counted

    @property
    def _is_validation_done(self) -> bool:
        return self._only_the_end_is_left or super()._is_validation_done

    @override
    def run(self, data_fetcher: Any) -> None:
        try:
            super().run(data_fetcher)
        finally:
            self._only_the_end_is_left = False
            self.on_iteration_done()  # the restart is over, also where there was no iteration
